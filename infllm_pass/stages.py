"""Times of the stages of the pass, measured where the work is done and collected by whoever started it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import TypeVar

Item = TypeVar("Item")


class Stage(Enum):
    """A stage of the pass. The value is what reports call it."""

    DECOMPOSE = "decompose"
    FIND = "find sites"
    PROVE = "prove masks"
    PLAN = "plan"
    REWRITE = "rewrite"
    COMPILE = "compile behind"


class StageTimes:
    """Seconds that the stages of one run took. Time in a stage inside another one counts for the inner one alone.

    Attributes:
        seconds: by the value of the stage, in the order in which they were first begun.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[Stage] = []
        self._since = 0.0

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Count what is done inside for a stage."""
        self._settle()
        self._open.append(stage)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect what `stage` measures inside."""
        token = _COLLECTOR.set(self)
        try:
            yield
        finally:
            _COLLECTOR.reset(token)

    def _settle(self) -> None:
        """Count the time since the last change of stage for the innermost one."""
        now = time.perf_counter()
        if self._open:
            name = self._open[-1].value
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_COLLECTOR: ContextVar[StageTimes | None] = ContextVar("infllm_pass_stages", default=None)


@contextmanager
def stage(stage: Stage) -> Iterator[None]:
    """Count what is done inside for a stage of the run that this is a part of, if it is one."""
    times = _COLLECTOR.get()
    if times is None:
        yield
        return
    with times.stage(stage):
        yield


def each_in(stage_of: Stage, items: Iterable[Item]) -> Iterator[Item]:
    """The same items; making each counts for a stage, and what is done with it does not."""
    iterator = iter(items)
    while True:
        with stage(stage_of):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]


_END = object()
