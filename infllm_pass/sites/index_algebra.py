"""Algebra of index expressions: simplification by known ranges, and decomposition of merged dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import sympy

from infllm_pass.masks.normal_form import BATCH, HEAD, KEY, QUERY

FEATURE = sympy.Symbol("feature", integer=True, nonnegative=True)
"""Index into the head dimension of queries and keys."""

VALUE_FEATURE = sympy.Symbol("value_feature", integer=True, nonnegative=True)
"""Index into the head dimension of values."""

Extents = Mapping[sympy.Symbol, sympy.Expr]


def simplify(expr: sympy.Expr, extents: Extents) -> sympy.Expr:
    """The same index with every ``floor`` and ``Mod`` resolved that the ranges of the symbols resolve.

    Args:
        expr: built from symbols, sums, products, ``floor`` and ``Mod``.
        extents: for index symbols, one past their largest value; an index of extent 1 is 0.
    """
    if isinstance(expr, sympy.Symbol):
        return sympy.Integer(0) if extents.get(expr) == 1 else expr
    if not expr.args:
        return expr
    parts = [simplify(part, extents) for part in expr.args]
    if isinstance(expr, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(parts[0]))
        quotient, rest = _divide(numerator, denominator)
        return quotient if _below(rest, denominator, extents) else quotient + sympy.floor(rest / denominator)
    if isinstance(expr, sympy.Mod):
        _, rest = _divide(parts[0], parts[1])
        return rest if _below(rest, parts[1], extents) else sympy.Mod(rest, parts[1])
    return sympy.expand(expr.func(*parts))


@lru_cache(maxsize=4096)
def _divide(number: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Quotient and remainder, term by term: ``number == quotient * divisor + remainder``."""
    quotient = rest = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(number)):
        ratio = sympy.cancel(term / divisor)
        if ratio.is_integer is True:
            quotient += ratio
        else:
            rest += term
    return quotient, rest


def _below(expr: sympy.Expr, limit: sympy.Expr, extents: Extents) -> bool:
    """Whether ``0 <= expr < limit`` whatever the symbols are within their ranges."""
    largest = _largest(expr, extents)
    if largest is None or expr.is_nonnegative is not True:
        return False
    return bool(sympy.expand(limit - 1 - largest).is_nonnegative)


def _largest(expr: sympy.Expr, extents: Extents) -> sympy.Expr | None:
    if isinstance(expr, sympy.Symbol) and expr in extents:
        return extents[expr] - 1
    if isinstance(expr, sympy.Integer):
        return expr
    if isinstance(expr, sympy.Mod):
        return expr.args[1] - 1
    if isinstance(expr, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(expr.args[0]))
        inside = _largest(numerator, extents)
        return None if inside is None else sympy.floor(inside / denominator)
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        parts = [_largest(part, extents) if part.free_symbols & set(extents) else part for part in expr.args]
        if any(part is None or part.is_nonnegative is not True for part in parts):
            return None
        return expr.func(*parts)
    return None


def split_digits(expr: sympy.Expr, extents: Extents) -> list[tuple[sympy.Expr, int]] | None:
    """An index ``high * n + low`` as its digits, highest first, each with how many lower values one step of it spans.

    Args:
        expr: a simplified index.
        extents: of its symbols.

    Returns:
        ``[(high, n), (low, 1)]``, or ``[(expr, 1)]`` for an index of one digit; None where `n` is no number or `low`
        can reach it.
    """
    terms = sympy.Add.make_args(expr)
    if len(terms) == 1:
        return [(expr, 1)] if expr.is_Symbol or isinstance(expr, (sympy.floor, sympy.Mod)) else None
    if len(terms) != 2:
        return None
    for high, low in (terms, terms[::-1]):
        step, digit = high.as_coeff_Mul()
        if step.is_Integer and step > 1 and (digit.is_Symbol or isinstance(digit, (sympy.floor, sympy.Mod))):
            largest = _largest(low, extents)
            if largest is not None and low.as_coeff_Mul()[0] == 1 and largest == step - 1:
                return [(digit, int(step)), (low, 1)]
    return None


__all__ = ["BATCH", "FEATURE", "HEAD", "KEY", "QUERY", "VALUE_FEATURE", "Extents", "simplify", "split_digits"]
