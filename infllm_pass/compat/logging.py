"""PyTorch's logs, structured trace, counters and timings of compilation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch._logging import _internal

__all__ = ["counter", "is_tracing", "register_log", "timed", "trace_artifact"]


def register_log(name: str, logger: str) -> None:
    """Let ``torch._logging.set_logs(modules={name: level})`` set the level of a logger.

    ``torch._logging._internal.register_log``, the same in torch 2.11 to 2.15. ``TORCH_LOGS`` is read when torch is
    imported, and takes names that are registered by then or that modules can be imported by, so it takes the name of
    the package only. Nothing public.
    """
    _internal.register_log(name, logger)


def is_tracing() -> bool:
    """Whether the structured trace that ``TORCH_TRACE`` asks for, which ``tlparse`` reads, goes anywhere.

    ``torch._logging._internal.trace_log``, all of whose records are DEBUG and whose handler removes itself at the first
    of them if no folder is set; the same in torch 2.11 to 2.15. Nothing public.
    """
    return any(handler.level <= logging.DEBUG for handler in _internal.trace_log.handlers)


def trace_artifact(name: str, encoding: str, payload: Callable[[], str | dict[str, Any]]) -> None:
    """Write an artifact to the structured trace, under the graph that is being compiled; nothing without a trace.

    Args:
        name: name of the artifact.
        encoding: "json" or "string".
        payload: makes the content, if there is a trace.

    ``torch._logging._internal.trace_structured``, the same in torch 2.11 to 2.15. Nothing public.
    """
    if not is_tracing():
        return
    _internal.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def timed(name: str) -> AbstractContextManager[Any]:
    """Times a part of a compilation for ``torch._dynamo.utils.compile_times()`` and the timeline of the trace.

    ``torch._dynamo.utils.dynamo_timed``, the same in torch 2.11 to 2.15. Nothing public.
    """
    from torch._dynamo.utils import dynamo_timed

    timer: AbstractContextManager[Any] = dynamo_timed(name)
    return timer


def counter(name: str) -> Counter[str]:
    """The counts of one part of the compiler; emptied by whoever clears ``torch._dynamo.utils.counters``.

    ``torch._dynamo.utils.counters``, the same in torch 2.11 to 2.15. Nothing public.
    """
    from torch._dynamo.utils import counters

    counts: Counter[str] = counters[name]
    return counts
