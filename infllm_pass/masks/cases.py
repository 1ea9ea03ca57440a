"""Piecewise values (`Cases`): values with mutually exclusive, exhaustive conditions, and arithmetic on constants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import sympy
import torch

from infllm_pass.compat.tensors import without_modes
from infllm_pass.masks.symbolic import NotFollowed

_MOST_CASES = 12


class Cases(sympy.Basic):  # type: ignore[misc]
    """``Cases(v1, c1, v2, c2, …)``: the value whose condition holds; exactly one does, whatever the index."""


class Rounded(sympy.Function):  # type: ignore[misc]
    """An integer expression after a cast to a floating-point dtype, which rounds large numbers."""

    is_real = True


Pair = tuple[sympy.Basic, sympy.Basic]


def negation(condition: sympy.Basic) -> sympy.Basic:
    """Where a condition does not hold, with the negations at its tests, so that contradictions cancel."""
    if isinstance(condition, sympy.And):
        return sympy.Or(*map(negation, condition.args))
    if isinstance(condition, sympy.Or):
        return sympy.And(*map(negation, condition.args))
    return sympy.Not(condition)


def pairs(value: sympy.Basic) -> list[Pair]:
    """The cases of a value as ``(value, condition)``; one that always holds for a value without cases."""
    if not isinstance(value, Cases):
        return [(value, sympy.true)]
    return [pair for pair in zip(value.args[::2], value.args[1::2], strict=True) if pair[1] != sympy.false]


def choose(cases: Iterable[Pair]) -> sympy.Basic:
    """One value from cases whose conditions exclude each other and leave nothing out.

    Raises:
        NotFollowed: there are too many cases.
    """
    merged: dict[sympy.Basic, sympy.Basic] = {}
    for value, condition in cases:
        if condition != sympy.false:
            value = sympy.Integer(0) if _is_zero_under(value, condition) else value
            merged[value] = sympy.Or(merged[value], condition) if value in merged else condition
    if len(merged) == 1:
        return next(iter(merged))
    if not merged or len(merged) > _MOST_CASES:
        raise NotFollowed("it takes too many different values")
    return Cases(*itertools.chain.from_iterable(merged.items()))


def unrounded(value: sympy.Basic) -> sympy.Expr:
    """The integer expression that a rounded one equals as far as small numbers can tell."""
    return value.replace(Rounded, lambda inner: inner)


def _is_zero_under(value: sympy.Basic, condition: sympy.Basic) -> bool:
    """Whether a condition says that a rounded integer expression is 0."""
    if not value.has(Rounded):
        return False
    plain = sympy.expand(unrounded(value))
    equations = (part for part in sympy.And.make_args(condition) if isinstance(part, sympy.Eq))
    return any(sympy.expand(part.lhs - part.rhs) in (plain, sympy.expand(-plain)) for part in equations)


def combine(function: Callable[..., sympy.Basic], *values: sympy.Basic) -> sympy.Basic:
    """``function(*values)``, case by case."""
    if not any(isinstance(value, Cases) for value in values):
        return function(*values)
    found = []
    for combination in itertools.product(*map(pairs, values)):
        condition = sympy.And(*(test for _, test in combination))
        if condition != sympy.false:
            found.append((function(*(value for value, _ in combination)), condition))
    return choose(found)


def truth(function: Callable[..., sympy.Basic], *values: sympy.Basic) -> sympy.Basic:
    """Where a test of values given by cases holds."""
    if not any(isinstance(value, Cases) for value in values):
        return function(*values)
    found = []
    for combination in itertools.product(*map(pairs, values)):
        outcome = function(*(value for value, _ in combination))
        found.append(sympy.And(*(test for _, test in combination), outcome))
    return sympy.Or(*found)


def as_number(value: sympy.Basic) -> bool:
    """Whether a value is a plain number."""
    return bool(value.is_number) and isinstance(value, sympy.Expr)


def exact(number: float) -> sympy.Expr:
    """A Python number as sympy knows it, without rounding.

    Raises:
        NotFollowed: it is NaN.
    """
    if isinstance(number, float):
        if math.isnan(number):
            raise NotFollowed("it is NaN")
        if math.isinf(number):
            return sympy.oo if number > 0 else -sympy.oo
        return sympy.Rational(number)
    return sympy.Integer(number)


@cache
def rounded_to(number: sympy.Expr, dtype: torch.dtype) -> sympy.Basic:
    """A number as a tensor of a dtype stores it: a Boolean for torch.bool.

    Raises:
        NotFollowed: an integer dtype does not hold it.
    """
    if dtype == torch.bool:
        return sympy.true if number != 0 else sympy.false
    if dtype.is_floating_point:
        with without_modes():
            return exact(float(torch.tensor(float(number), dtype=torch.float64).to(dtype)))
    if dtype.is_complex or not number.is_finite:
        raise NotFollowed(f"{dtype} does not hold {number}")
    whole = int(number)  # towards zero, as a cast does
    bounds = torch.iinfo(dtype)
    if not bounds.min <= whole <= bounds.max:
        raise NotFollowed(f"{dtype} does not hold {number}")
    return sympy.Integer(whole)


@cache
def computed(operation: Callable[..., Any], dtype: torch.dtype, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """What an operation on two numbers gives in a dtype.

    Operands may be rounded to the dtype before the operation or not, as kernels differ in it.

    Raises:
        NotFollowed: that makes a difference, or the result is NaN or overflows an integer dtype.
    """
    if not dtype.is_floating_point:
        return rounded_to(exact(operation(int(a), int(b))), dtype)
    with without_modes():
        wide = [torch.tensor(float(x), dtype=torch.float64) for x in (a, b)]
        narrow = [x.to(dtype) for x in wide]
        results = [float(operation(*wide).to(dtype)), float(operation(*narrow))]
    if results[0] != results[1]:
        raise NotFollowed("it is NaN, or depends on rounding")
    return exact(results[0])
