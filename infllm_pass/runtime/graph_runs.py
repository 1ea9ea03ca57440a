"""Counts the compiled graphs that run, so that a call of a sparsified model which ran none is noticed.

Dynamo runs a model uncompiled without an error past its recompile limit, under some stances, and where something
between the call and the model turned it off. Nothing else tells such a call from a compiled one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class GraphRuns(threading.local):
    """What a thread has run so far, of all sparsified models: one may call another.

    Attributes:
        graphs: how many graphs.
        sites: how many attention sites these had, switchable or dense.
    """

    graphs = 0
    sites = 0


RUNS = GraphRuns()


def counted(compiled: Callable[..., Any], sites: int) -> Callable[..., Any]:
    """A compiled graph that counts its runs in `RUNS`.

    Args:
        compiled: the compiled graph.
        sites: how many attention sites it has.
    """
    runs = RUNS

    def run(*inputs: Any) -> Any:
        runs.graphs += 1
        runs.sites += sites
        return compiled(*inputs)

    return run
