"""Specification of a cache's state: its tensors, their shapes, and the nodes that hold them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from infllm_pass.plan.length_guard import decided
from infllm_pass.sites import AttentionSite

MOST_QUERIES = 16
"""Queries of a row up to which a graph decodes: the decode operator goes through them one by one."""

MANY_QUERIES = f"a call has more than {MOST_QUERIES} queries"
UNKNOWN_SIZES = "its sizes cannot be told from the graph's inputs"


@dataclass(frozen=True)
class StateTensor:
    """One tensor that is kept of a cache's keys.

    Attributes:
        name: what the graph's input is called.
        shape: ``[B, Hkv, n, ...]``; `n` alone follows from the number of keys, and never shrinks as that grows.
        dtype: its dtype.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype


class StateLayout(Hashable, Protocol):
    """The state that a scorer keeps of keys. Equal layouts share states: it is compared by value."""

    def __call__(self, keys: Sequence[Any], dtype: torch.dtype, /) -> tuple[StateTensor, ...]:
        """The tensors for keys of shape ``[B, Hkv, L, D]``, whose sizes may be symbolic, and of a dtype."""
        ...


@dataclass(frozen=True)
class StateNodes:
    """The inputs of a graph that hold a cache's state.

    Attributes:
        tensors: those of the layout, in its order.
        filled: int32 ``[B]``: keys of each row, from its first, that the tensors stand for.
        first: int32 ``[B]``: slot of each row's first key.
    """

    tensors: tuple[fx.Node, ...]
    filled: fx.Node
    first: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of them, in the order of the graph's inputs."""
        return *self.tensors, self.filled, self.first


def refused_queries(site: AttentionSite) -> str | None:
    """Why a site has too many queries to decode; None if it has few. Guards on their number where that may be."""
    few = decided(site.shape(site.query)[2] <= MOST_QUERIES)
    if few is None:
        return f"its graph serves calls of more than {MOST_QUERIES} queries too"
    return None if few else MANY_QUERIES
