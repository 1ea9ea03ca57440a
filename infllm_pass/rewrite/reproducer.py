"""Scripts that make a failure of the pass happen again, written to the folder that ``INFLLM_DEBUG_DUMP`` names.

The graph is recorded before the pass, and only if the folder is set. For a site at which the pass fails, the part of
the graph that the site depends on is written as a script that builds it again and runs the pass on it. The smallest
part that fails in the same place is taken: each is tried before it is written.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import fx

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import InternalError
from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.lowering.export.atomic_file import written_whole
from infllm_pass.rewrite.graph_slice import RecordedGraph
from infllm_pass.rewrite.reproducer_script import Failure, Script
from infllm_pass.rewrite.source_text import Unwritable

FOLDER = "INFLLM_DEBUG_DUMP"

logger = logging.getLogger("infllm_pass")

_REPRODUCING: ContextVar[bool] = ContextVar("infllm_pass_reproducing", default=False)
_TRYING: ContextVar[bool] = ContextVar("infllm_pass_trying", default=False)


def trying() -> bool:
    """Whether a script is tried before it is written, which nobody is to hear of."""
    return _TRYING.get()


@contextmanager
def not_reproducing() -> Iterator[None]:
    """Failures inside leave no script: they are those of a script."""
    token = _REPRODUCING.set(True)
    try:
        yield
    finally:
        _REPRODUCING.reset(token)


def recorded(module: fx.GraphModule, held: HeldTensors | None) -> Reproducer | None:
    """A record of a graph before the pass; None if no folder is set."""
    folder = os.environ.get(FOLDER)
    if not folder or _REPRODUCING.get():
        return None
    return Reproducer(Path(folder), RecordedGraph.of(module), held)


class Reproducer:
    """Writes scripts for the failures in one graph, one for each place in the code.

    Args:
        folder: where scripts are written.
        graph: the graph as it was before the pass.
        held: tensors that masks may be read from.
    """

    def __init__(self, folder: Path, graph: RecordedGraph, held: HeldTensors | None) -> None:
        self.folder = folder
        self.graph = graph
        self.held = held
        self._written: dict[str, str] = {}

    def write(self, failure: Failure, config: SparseAttentionConfig, switch: str) -> str:
        """Write the script for a failure.

        Args:
            failure: the failure.
            config: the configuration that the pass ran with.
            switch: how sides of the length switch are chosen, the value of a `Switch`.

        Returns:
            The file, or why there is none.
        """
        place = _place(failure.error)
        if place not in self._written:
            try:
                self._written[place] = str(self._write(failure, config, switch))
            except Exception as error:  # of a report of a failure: the graph itself is compiled all the same
                self._written[place] = f"none could be written: {type(error).__name__}: {error}"
        return self._written[place]

    def _write(self, failure: Failure, config: SparseAttentionConfig, switch: str) -> Path:
        text = self._smallest(failure, config, switch)
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        path = self.folder.resolve() / f"graph{failure.graph}_site{failure.site}_{digest}.py"
        with written_whole(path) as whole:
            whole.write_text(text)
        return path

    def _smallest(self, failure: Failure, config: SparseAttentionConfig, switch: str) -> str:
        """The script of the smallest part that fails in the same place; of the largest that could be written else."""
        logger.debug("graph %d, %s: looking for a small part that fails alike", failure.graph, failure.place)
        anchors = self.graph.anchors(failure.node)
        wider = self.graph.with_users(anchors)
        everything = [node for node in self.graph.steps if node.op != "output"]
        largest, refusal = None, Unwritable("the graph is empty")
        for wanted, cut_opaque in ((anchors, True), (wider, True), (wider, False), (everything, False)):
            if not wanted:
                continue
            try:
                script = Script(self.graph, wanted, cut_opaque, self.held)
                if _fails_alike(script.text(failure, config, switch, again=True), failure.error):
                    return script.text(failure, config, switch, again=True)
            except Unwritable as error:
                refusal = error
                continue
            largest = script
        if largest is None:
            raise refusal
        return largest.text(failure, config, switch, again=False)


def _fails_alike(text: str, expected: Exception) -> bool:
    """Whether a script fails in the place of an error, run in a thread, whose modes of computing are its own."""
    found: list[str] = []

    def run() -> None:
        _TRYING.set(True)
        script: dict[str, Any] = {"__name__": "reproducer"}
        try:
            exec(compile(text, "<reproducer>", "exec"), script)
            script["reproduce"]()
        except InternalError as error:
            found.append(_place(error.__cause__))
        except Exception:
            return

    thread = threading.Thread(target=run, name="infllm_pass reproducer")
    thread.start()
    thread.join()
    return found == [_place(expected)]


def _place(error: BaseException | None) -> str:
    """Where in the code an error was raised, and its type."""
    frames = traceback.extract_tb(None if error is None else error.__traceback__)[-1:]
    return " ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)])
