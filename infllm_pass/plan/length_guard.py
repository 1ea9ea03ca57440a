"""The length guard: evaluates ``key length >= dense_len`` so that Dynamo guards the graph on the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class Branch(Enum):
    """The side of the switch that one compiled graph takes."""

    DENSE = "dense"
    SPARSE = "sparse"


@dataclass(frozen=True)
class LengthGuard:
    """The outcome of the length switch for one site.

    Attributes:
        branch: the side taken.
        expression: what was decided, in Dynamo's size symbols; for a dynamic length it is also a guard of the
            compiled graph, so that a length on the other side compiles, once, a graph of its own.
        dynamic: whether the length is dynamic.
    """

    branch: Branch
    expression: str
    dynamic: bool


def decide_capacity(capacity: int | torch.SymInt, dense_len: int) -> LengthGuard:
    """The switch of attention over a cache with spare capacity: its length is known on the device only.

    Args:
        capacity: tokens that the cache has room for; with fewer than `dense_len` no length is ever sparse.
        dense_len: length from which attention is sparse.
    """
    dynamic = isinstance(capacity, torch.SymInt)
    if bool(capacity >= dense_len):
        return LengthGuard(Branch.SPARSE, "on the device", dynamic)
    return LengthGuard(Branch.DENSE, f"capacity {capacity} < {dense_len}", dynamic)


def decide_length(key_length: int | torch.SymInt, dense_len: int) -> LengthGuard:
    """Compare a key length with ``dense_len`` (arXiv 2509.24663, section 3: the dense/sparse switch).

    Taking the truth of a comparison of a SymInt makes Dynamo guard on it.

    Args:
        key_length: tokens, after new keys are appended.
        dense_len: length from which attention is sparse.
    """
    dynamic = isinstance(key_length, torch.SymInt)
    symbol = str(key_length)
    sparse = bool(key_length >= dense_len)
    expression = f"{symbol} >= {dense_len}" if sparse else f"{symbol} < {dense_len}"
    return LengthGuard(Branch.SPARSE if sparse else Branch.DENSE, expression, dynamic)
