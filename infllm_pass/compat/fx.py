"""Graphs of FX: their nodes, and tracing them."""

from __future__ import annotations

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["is_erased", "make_fx", "rename"]


def is_erased(node: fx.Node) -> bool:
    """Whether a node was erased from its graph.

    ``Node._erased``, the same in torch 2.11 to 2.15. Looking for the node among the graph's would replace it, in time
    linear in the graph.
    """
    return bool(node._erased)


def rename(node: fx.Node, name: str) -> None:
    """Give a node a name, or one made from it where it is taken.

    ``Node._rename``, the same in torch 2.11 to 2.15. ``Node.name`` is writable in none of them without it.
    """
    node._rename(name)
