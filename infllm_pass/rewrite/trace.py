"""What a run of the pass leaves beside its report: log lines, artifacts of the structured trace, counters, times."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import fx

from infllm_pass.compat.logging import counter, is_tracing, register_log, timed, trace_artifact
from infllm_pass.reasons import Reason
from infllm_pass.rewrite.report import GraphReport, Report
from infllm_pass.stages import Stage, StageTimes

logger = logging.getLogger("infllm_pass")
register_log("infllm", logger.name)

ARTIFACT = "infllm_pass"
"""Name of the artifacts in the structured trace, and of the pass among PyTorch's timings."""


class PassTrace:
    """Follows one graph through the pass and the compiler behind it.

    Args:
        number: number of the graph.
        silent: whether it only takes the times, for a run that is none of the user's.
    """

    def __init__(self, number: int, *, silent: bool = False) -> None:
        self.number = number
        self.silent = silent
        self.times = StageTimes()

    @contextmanager
    def run(self, module: fx.GraphModule) -> Iterator[None]:
        """Follow the pass: its times, and the graph before and after it."""
        self._show(module, "before")
        with nullcontext() if self.silent else timed(ARTIFACT), self.times.collecting():
            yield
        self._show(module, "after")

    @contextmanager
    def compiler_behind(self, report: GraphReport) -> Iterator[None]:
        """Follow the compiler that takes the rewritten graph, and tell of all stages, whether it succeeds or not."""
        try:
            with self.times.stage(Stage.COMPILE):
                yield
        finally:
            self.finish(report)

    def count(self, report: GraphReport, masks_elided: Sequence[bool]) -> None:
        """Add a graph to ``torch._dynamo.utils.counters["infllm"]``.

        Args:
            report: the graph's report.
            masks_elided: for each of its sites, whether it had a mask tensor that it reads no more.
        """
        if self.silent:
            return
        counts = counter("infllm")
        counts["graphs"] += 1
        counts["sites"] += len(report.sites)
        for site in report.sites:
            if site.decision == "switchable":
                counts["switchable"] += 1
                counts[f"{site.branch}_branches"] += 1
            else:
                counts[f"dense_{site.reason.lower()}"] += 1
            counts["internal_failures"] += site.reason == Reason.INTERNAL.name
        counts["masks_elided"] += sum(masks_elided)

    def finish(self, report: GraphReport) -> None:
        """Tell of the graph's report and the times of the stages so far."""
        if self.silent:
            return
        if logger.isEnabledFor(logging.DEBUG):
            spent = ", ".join(f"{name} {seconds:.4f} s" for name, seconds in self.times.seconds.items())
            logger.debug("graph %d: %s", self.number, spent)
        trace_artifact(ARTIFACT, "json", lambda: Report([report]).to_dict()["graphs"][0])

    def _show(self, module: fx.GraphModule, when: str) -> None:
        """Show the graph as code, where anybody looks."""
        logged = logger.isEnabledFor(logging.DEBUG)
        if self.silent or not (logged or is_tracing()):
            return
        code = as_code(module)
        if logged:
            logger.debug("graph %d %s the pass:\n%s", self.number, when, code)
        trace_artifact(f"{ARTIFACT}_{when}", "string", lambda: code)


def as_code(module: fx.GraphModule) -> str:
    """A graph as Python code, with the shapes and source lines of its nodes."""
    return module.print_readable(print_output=False)
