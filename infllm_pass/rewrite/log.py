"""Which graphs were compiled, and for which model."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable

import torch
from torch import fx

from infllm_pass.rewrite.report import GraphReport, Report

logger = logging.getLogger("infllm_pass")


class CompileLog:
    """The reports of compiled graphs, each with weak references to the parameters its graph reads."""

    def __init__(self) -> None:
        self._entries: list[tuple[GraphReport, list[weakref.ref[torch.Tensor]]]] = []

    def next_number(self) -> int:
        """The number that the next graph gets."""
        return len(self._entries)

    def add(self, report: GraphReport, module: fx.GraphModule) -> None:
        """Enter a graph; each of its sites is also logged at INFO level."""
        self._entries.append((report, [weakref.ref(tensor) for tensor in _parameters(module)]))
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

    def report(self) -> Report:
        """All graphs."""
        return Report([report for report, _ in self._entries])

    def report_for(self, parameters: Iterable[torch.Tensor]) -> Report:
        """The graphs that read any of the given parameters."""
        wanted = {id(tensor) for tensor in parameters}
        return Report(
            [report for report, refs in self._entries if any(id(ref()) in wanted for ref in refs if ref() is not None)]
        )


def _parameters(module: fx.GraphModule) -> Iterable[torch.Tensor]:
    """Parameters a graph reads: its own, and those that Dynamo lifted to inputs."""
    yield from module.parameters()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            example = getattr(node.meta.get("grapharg"), "example", None)
            if isinstance(example, torch.nn.Parameter):
                yield example
