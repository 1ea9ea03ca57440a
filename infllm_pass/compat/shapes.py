"""Symbolic sizes: the expressions behind them, and what is known of these.

``torch.fx.experimental`` is no underscored name, but its members move between releases: they are imported here only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
import torch
from torch._dynamo.source import TensorProperty, TensorPropertySource
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    GuardOnDataDependentSymNode,
    StrictMinMaxConstraint,
    free_unbacked_symbols,
    is_concrete_int,
    statically_known_true,
)
from torch.utils._sympy.functions import FloorDiv

__all__ = [
    "ConstraintViolationError",
    "GuardOnDataDependentSymNode",
    "declared_sizes",
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


@lru_cache(maxsize=4096)
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


def declared_sizes(size: torch.SymInt | torch.SymBool) -> frozenset[sympy.Symbol]:
    """The size symbols of a graph that is being traced whose range the user declared, by ``mark_dynamic(min=, max=)``.

    Dynamo refuses guards that narrow them. ``TracingContext.tensor_to_context`` holds what is asked of each input, with
    the symbols that its sizes got, in torch 2.11 to 2.15. Nothing public.

    Args:
        size: one of the graph's symbolic numbers.
    """
    context, env = TracingContext.try_get(), size.node.shape_env
    inputs: Any = None if context is None else context.tensor_to_context
    found: set[sympy.Symbol] = set()
    if env is None or inputs is None:
        return frozenset()
    for asked in inputs.values():
        symbols = getattr(asked, "shape_env_to_source_to_symbol_cache", {}).get(id(env), {})
        for dim, constraint in enumerate(getattr(asked, "constraint_sizes", ())):
            if not isinstance(constraint, StrictMinMaxConstraint):
                continue
            name: Any = TensorPropertySource(asked.tensor_source, TensorProperty.SIZE, dim).name
            symbol = symbols.get(name() if callable(name) else name)
            if symbol is not None:
                found |= env.simplify(symbol).free_symbols
    return frozenset(found)
