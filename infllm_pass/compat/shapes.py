"""Symbolic sizes: the expressions behind them, and what is known of these.

``torch.fx.experimental`` is no underscored name, but its members move between releases: they are imported here only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    free_unbacked_symbols,
    is_concrete_int,
    statically_known_true,
)
from torch.utils._sympy.functions import FloorDiv

__all__ = [
    "ConstraintViolationError",
    "expression_of",
    "free_unbacked_symbols",
    "hint_of",
    "is_concrete_int",
    "number_hint",
    "statically_known_true",
]


def expression_of(size: torch.SymInt) -> sympy.Expr:
    """A symbolic size as an expression of sympy.

    ``SymInt.node.expr``, the same in torch 2.11 to 2.15. Nothing public; ``str(size)`` prints it. Floor divisions
    without a remainder, as of ``s * s`` by ``s``, are carried out: torch leaves them, and then equal sizes differ.
    """
    return _divided(size.node.expr)


@cache
def _divided(expression: sympy.Expr) -> sympy.Expr:
    """An expression with its exact floor divisions carried out."""
    return expression.replace(FloorDiv, _quotient) if expression.has(FloorDiv) else expression


def _quotient(number: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    ratio = sympy.cancel(number / divisor)
    exact = ratio.is_polynomial() and all(part.is_integer for part in ratio.as_coefficients_dict().values())
    return ratio if exact else FloorDiv(number, divisor)


def hint_of(size: torch.SymInt) -> int | None:
    """The value that a symbolic size had in the traced call, without a guard on it; None where it had none.

    ``SymInt.node.hint``, the same in torch 2.11 to 2.15. ``int(size)`` would guard on the value.
    """
    hint = size.node.hint
    return None if hint is None else int(hint)


def number_hint(number: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The value, an int, float or bool, that a symbolic number had in the traced call; None: none. See `hint_of`."""
    return number.node.hint
