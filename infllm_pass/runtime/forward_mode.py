"""Keeps tangents of forward-mode differentiation from being lost in a compiled graph.

Dynamo guards on no tangents: a graph that was compiled without any is called with dual tensors all the same, and the
operators of sparse attention, which have no forward-mode derivative, would return what has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from infllm_pass.compat.tensors import have_tangents
from infllm_pass.errors import ForwardModeError


class ReverseModeGraph:
    """A compiled graph that takes no tensors with tangents.

    Args:
        compiled: the compiled graph.
    """

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph.

        Raises:
            ForwardModeError: an input has a tangent.
        """
        if have_tangents(inputs):
            raise ForwardModeError("a graph with rewritten attention")
        return self.compiled(*inputs)


def loses_tangents(module: fx.GraphModule) -> bool:
    """Whether a graph, or one nested in it, calls this package's operators."""
    graphs = (part.graph for part in module.modules() if isinstance(part, fx.GraphModule))
    return any(getattr(node.target, "namespace", "") == "infllm" for graph in graphs for node in graph.nodes)
