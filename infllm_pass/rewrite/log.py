"""The log of compiled graphs and the models that they belong to."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from infllm_pass.compat.dynamo import input_example
from infllm_pass.reasons import Uncompiled
from infllm_pass.rewrite.report import GraphReport, Report

logger = logging.getLogger("infllm_pass")

MOST_GRAPHS = 512
"""Graphs that a log remembers, the latest ones: a model that is compiled again and again must not fill the memory."""


@dataclass(frozen=True)
class _Entry:
    """A compiled graph, and what it reads."""

    report: GraphReport
    parameters: tuple[weakref.ref[torch.Tensor], ...]

    def reads(self, wanted: set[int]) -> bool:
        """Whether the graph reads one of the parameters with these ids."""
        return any(id(tensor) in wanted for ref in self.parameters if (tensor := ref()) is not None)

    def dead(self) -> bool:
        """Whether all parameters that the graph reads are gone, and it read some."""
        return bool(self.parameters) and all(ref() is None for ref in self.parameters)


class CompileLog:
    """The reports of compiled graphs, each with weak references to the parameters its graph reads.

    Threads may share one.

    Args:
        forgets_dead: whether graphs whose parameters are all gone are dropped: for a log of many models.
        most: how many graphs are remembered.
    """

    def __init__(self, *, forgets_dead: bool = False, most: int = MOST_GRAPHS) -> None:
        self.warned: set[str] = set()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._added = 0
        self._uncompiled: Counter[str] = Counter()
        self._forgets_dead = forgets_dead
        self._entries: deque[_Entry] = deque(maxlen=most)

    @property
    def added(self) -> int:
        """How many graphs were entered so far, forgotten ones included."""
        return self._added

    def new_number(self) -> int:
        """A number for a graph, which no other graph gets."""
        return next(self._numbers)

    def add(self, report: GraphReport, module: fx.GraphModule) -> None:
        """Enter a graph; each of its sites is also logged at INFO level."""
        entry = _Entry(report, tuple(weakref.ref(tensor) for tensor in _parameters(module)))
        with self._lock:
            self._drop_dead()
            self._entries.append(entry)
            self._added += 1
        for site in report.sites:
            logger.info(
                "graph %d, site %d %s: %s, runs %s through %s %s (%s)",
                site.graph,
                site.site,
                site.module or site.source,
                site.decision,
                site.branch,
                site.kernels,
                site.guard,
                site.explanation,
            )

    def discard(self, report: GraphReport) -> None:
        """Take back a graph that was entered and is not going to run."""
        with self._lock:
            kept = [entry for entry in self._entries if entry.report is not report]
            self._added -= len(self._entries) - len(kept)
            self._entries = deque(kept, maxlen=self._entries.maxlen)

    def add_uncompiled(self, reason: Uncompiled) -> bool:
        """Count a call that ran the plain model; whether it is the first for this reason."""
        with self._lock:
            self._uncompiled[reason.name] += 1
            return self._uncompiled[reason.name] == 1

    def report(self) -> Report:
        """All graphs that are remembered, and the calls that ran none."""
        with self._lock:
            self._drop_dead()
            return Report([entry.report for entry in self._entries], dict(self._uncompiled))

    def report_for(self, parameters: Iterable[torch.Tensor]) -> Report:
        """The graphs that read any of the given parameters."""
        wanted = {id(tensor) for tensor in parameters}
        with self._lock:
            return Report([entry.report for entry in self._entries if entry.reads(wanted)])

    def _drop_dead(self) -> None:
        if self._forgets_dead:
            alive = [entry for entry in self._entries if not entry.dead()]
            if len(alive) < len(self._entries):
                self._entries = deque(alive, maxlen=self._entries.maxlen)


def _parameters(module: fx.GraphModule) -> Iterable[torch.Tensor]:
    """Parameters a graph reads: its own, and those that Dynamo lifted to inputs."""
    yield from module.parameters()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            example = input_example(node)
            if isinstance(example, torch.nn.Parameter):
                yield example
