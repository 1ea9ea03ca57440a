"""The length guard: evaluates ``key length >= dense_len`` so that Dynamo guards the graph on the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy
import torch

from infllm_pass.compat.shapes import declared_sizes, free_unbacked_symbols, statically_known_true


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
            compiled graph, so that a length on the other side compiles, once, a graph of its own. "at run time": no
            guard may be, and one graph serves both sides, see `decided`.
        dynamic: whether the length is dynamic and guarded.
    """

    branch: Branch
    expression: str
    dynamic: bool


def decided(condition: bool | torch.SymBool) -> bool | None:
    """Whether a condition on sizes holds, guarded where it may not hold in every call.

    None where no guard can be: the sizes come from data, or the user declared a range for them, within which Dynamo
    lets one graph serve all. The graph then has to be right on both sides.
    """
    if isinstance(condition, bool):
        return condition
    if statically_known_true(condition):
        return True
    if statically_known_true(torch.sym_not(condition)):
        return False
    compared = condition.node.expr
    difference = sympy.expand(compared.lhs - compared.rhs) if isinstance(compared, sympy.Rel) else compared
    if free_unbacked_symbols(condition) or not declared_sizes(condition).isdisjoint(difference.free_symbols):
        return None
    return bool(condition)


def decide_capacity(capacity: int | torch.SymInt, dense_len: int) -> LengthGuard:
    """The switch of attention over a cache with spare capacity: its length is known on the device only.

    Args:
        capacity: tokens that the cache has room for; with fewer than `dense_len` no length is ever sparse.
        dense_len: length from which attention is sparse.
    """
    dynamic = isinstance(capacity, torch.SymInt)
    if decided(capacity >= dense_len) is not False:
        return LengthGuard(Branch.SPARSE, "on the device", dynamic)
    return LengthGuard(Branch.DENSE, f"capacity {capacity} < {dense_len}", dynamic)


def decide_length(key_length: int | torch.SymInt, dense_len: int) -> LengthGuard:
    """Compare a key length with ``dense_len`` (arXiv 2509.24663, section 3: the dense/sparse switch).

    Taking the truth of a comparison of a SymInt makes Dynamo guard on it. Where it may not, the sparse side serves all
    lengths: its operators compare each sequence's own with ``dense_len`` when they run.

    Args:
        key_length: tokens, after new keys are appended.
        dense_len: length from which attention is sparse.
    """
    dynamic = isinstance(key_length, torch.SymInt)
    symbol = str(key_length)
    sparse = decided(key_length >= dense_len)
    if sparse is None:
        return LengthGuard(Branch.SPARSE, f"{symbol} >= {dense_len} at run time", False)
    expression = f"{symbol} >= {dense_len}" if sparse else f"{symbol} < {dense_len}"
    return LengthGuard(Branch.SPARSE if sparse else Branch.DENSE, expression, dynamic)
