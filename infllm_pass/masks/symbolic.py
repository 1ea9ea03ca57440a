"""Symbolic tensors: a shape, and one sympy expression of the index symbols for every element at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from infllm_pass.graph.facts import axis


class NotFollowed(Exception):
    """A node uses an operator in a way that the interpreter has no exact rule for; the message says which."""


@dataclass(frozen=True)
class SymbolicTensor:
    """A tensor of which every element is known as an expression of its index.

    Attributes:
        shape: sizes, outermost first.
        value: the element at ``(axis(0), axis(1), …)``: a sympy Boolean for dtype bool, else a number, an integer
            expression or `masks.cases.Cases` of them.
        dtype: the dtype; Python numbers have those of their kind, torch.int64 and torch.float64.
    """

    shape: tuple[sympy.Expr, ...]
    value: sympy.Basic
    dtype: torch.dtype

    def at(self, index: Sequence[sympy.Expr]) -> sympy.Basic:
        """The element at the given index expressions, one for each dimension."""
        return self.value.xreplace({axis(dim): expr for dim, expr in enumerate(index)})

    def broadcast_to(self, shape: tuple[sympy.Expr, ...]) -> sympy.Basic:
        """The element that stands at ``(axis(0), …)`` once this tensor is broadcast to `shape`."""
        pad = len(shape) - len(self.shape)
        index = [
            sympy.Integer(0) if extent == 1 and shape[dim + pad] != 1 else axis(dim + pad)
            for dim, extent in enumerate(self.shape)
        ]
        return self.at(index)


def element(name: str, rank: int, dtype: torch.dtype, hidden: Sequence[sympy.Symbol] = ()) -> sympy.Basic:
    """An element of a tensor that nothing is known of: a named function of the index.

    Booleans are written as a non-zero test of an integer function, so that casts between the two cancel.

    Args:
        name: name of the function.
        rank: dimensions of the tensor.
        dtype: its dtype.
        hidden: further indices that the element depends on, see `hidden_axis`.
    """
    indices = [*(axis(dim) for dim in range(rank)), *hidden]
    kind = {"real": True} if dtype.is_floating_point or dtype.is_complex else {"integer": True}
    known = sympy.Function(name, **kind)(*indices) if indices else sympy.Symbol(name, **kind)
    return sympy.Ne(known, 0) if dtype == torch.bool else known
