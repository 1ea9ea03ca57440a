"""Rules for numbers: creation, arithmetic, comparisons, logic and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from infllm_pass.graph.facts import axis
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.cases import (
    Rounded,
    as_number,
    combine,
    computed,
    negation,
    pairs,
    rounded_to,
    truth,
    unrounded,
)
from infllm_pass.masks.rules.registry import (
    EXACT_INTEGERS,
    ONE,
    ZERO,
    Evaluator,
    Rule,
    boolean,
    integer_value,
    numeric,
    rule,
    shape_of,
)
from infllm_pass.masks.symbolic import NotFollowed, SymbolicTensor

_ROUNDING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Floating-point dtypes that integers are followed into."""

_SMALL = 8
"""Rounding to these dtypes moves no integer up to twice this size, and brings no larger one below it."""


@rule(Kind.ARANGE)
def _arange(
    run: Evaluator,
    example: torch.Tensor,
    bounds: tuple[Any, ...] = (),
    start: Any = None,
    end: Any = None,
    step: Any = None,
    **_placement: Any,
) -> sympy.Basic:
    if example.dtype not in EXACT_INTEGERS:
        raise NotFollowed("it counts in a dtype that rounds or overflows: use int64")
    if len(bounds) > 1:
        start = bounds[0]
    if len(bounds) > 2:
        step = bounds[2]
    first = ZERO if start is None else run.integer(start)
    return first + axis(0) * (ONE if step is None else run.integer(step))


@rule(Kind.FULL)
def _full(
    run: Evaluator,
    example: torch.Tensor,
    fill_value: Any,
    size: Any = None,
    like: Any = None,
    **_placement: Any,
) -> sympy.Basic:
    return cast(run.operand(fill_value), example.dtype)


@rule(Kind.SCALAR_TENSOR)
def _scalar_tensor(run: Evaluator, example: torch.Tensor, data: Any, **_placement: Any) -> sympy.Basic:
    if isinstance(data, (list, tuple)):
        raise NotFollowed("it lists its elements")
    return cast(run.operand(data), example.dtype)


@rule(Kind.NEG)
def _neg(run: Evaluator, example: torch.Tensor, input: Any) -> sympy.Basic:
    value = numeric(run.operand(input), shape_of(example))
    return combine(lambda a: _operate(operator.sub, example.dtype, ZERO, a), value)


def _arithmetic(operation: Callable[[Any, Any], Any]) -> Rule:
    def apply(run: Evaluator, example: torch.Tensor, input: Any, other: Any, alpha: Any = 1) -> sympy.Basic:
        shape = shape_of(example)
        if alpha != 1:
            raise NotFollowed("it scales an operand by alpha")
        a, b = run.operand(input), run.operand(other)
        if example.dtype == torch.bool:  # only + and * take two booleans: or, and
            logic = sympy.Or if operation is operator.add else sympy.And
            return logic(boolean(a, shape), boolean(b, shape))
        return combine(lambda x, y: _operate(operation, example.dtype, x, y), numeric(a, shape), numeric(b, shape))

    return apply


def _operate(operation: Callable[[Any, Any], Any], dtype: torch.dtype, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """One operation on two elements in a dtype."""
    if as_number(a) and as_number(b):
        return computed(operation, dtype, a, b)
    if dtype in EXACT_INTEGERS and not a.has(Rounded) and not b.has(Rounded):
        return operation(a, b)
    if dtype in _ROUNDING and operation in (operator.add, operator.sub):
        return _shift_rounded(operation, a, b)
    raise NotFollowed("it computes with data that may be other than 0 and 1: make the data bool first")


def _shift_rounded(operation: Callable[[Any, Any], Any], a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """A small number added to, or taken from, an integer that was cast to a floating-point dtype."""
    small, large = (a, b) if as_number(a) else (b, a)
    if as_number(small) and small.is_Integer and abs(small) <= 1:
        plain = as_rounded(large)
        return operation(a if a is small else plain, b if b is small else plain)
    raise NotFollowed("it adds up data that a floating-point dtype may round")


def as_rounded(value: sympy.Expr) -> sympy.Expr:
    """An integer expression as a floating-point dtype holds it."""
    if value.func is Rounded:
        return value
    if value.has(Rounded):
        raise NotFollowed("it rounds more than once")
    return Rounded(value)


for _kind, _operation in {Kind.ADD: operator.add, Kind.SUB: operator.sub, Kind.MUL: operator.mul}.items():
    rule(_kind)(_arithmetic(_operation))


def _divided(operation: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Rule:
    def apply(run: Evaluator, example: torch.Tensor, input: Any, other: Any) -> sympy.Basic:
        shape = shape_of(example)
        if example.dtype not in EXACT_INTEGERS:
            raise NotFollowed("it divides numbers that are not integers")
        divisor = integer_value(run.operand(other), shape)
        if divisor.is_nonzero is not True:
            raise NotFollowed("its divisor may be 0")
        return combine(lambda a: operation(a, divisor), numeric(run.operand(input), shape))

    return apply


rule(Kind.FLOORDIV)(_divided(lambda a, b: sympy.floor(a / b)))


def _comparison(relation: Callable[[sympy.Expr, sympy.Expr], sympy.Basic]) -> Rule:
    def apply(run: Evaluator, example: torch.Tensor, input: Any, other: Any) -> sympy.Basic:
        shape = shape_of(example)
        a, b = run.operand(input), run.operand(other)
        if _is_data(a) or _is_data(b):
            return _compare_data(relation, a, b, shape)
        rounds = a.dtype.is_floating_point or b.dtype.is_floating_point
        values = numeric(a, shape), numeric(b, shape)
        for side, other_value in ((a, values[1]), (b, values[0])):
            _check_held(side.dtype, other_value)
        return truth(lambda x, y: compare(relation, x, y, rounds), *values)

    return apply


def _check_held(dtype: torch.dtype, value: sympy.Basic) -> None:
    """Check that a narrow integer dtype holds what its tensor is compared with, which may be cast to it."""
    if dtype.is_floating_point or dtype in (torch.bool, *EXACT_INTEGERS):
        return
    for number, _ in pairs(value):
        if as_number(number) and rounded_to(number, dtype) != number:
            raise NotFollowed(f"it compares a {dtype} tensor with {number}, which that dtype does not hold")


def compare(
    relation: Callable[[sympy.Expr, sympy.Expr], sympy.Basic], a: sympy.Expr, b: sympy.Expr, rounds: bool
) -> sympy.Basic:
    """A comparison of two elements; `rounds`: both are cast to a floating-point dtype first."""
    if not rounds:
        return relation(a, b)
    if as_number(a) and as_number(b):
        outcomes = {relation(rounded_to(a, dtype), rounded_to(b, dtype)) for dtype in (*_ROUNDING[:2], torch.float64)}
        if len(outcomes) > 1:
            raise NotFollowed("it compares numbers that differ by rounding")
        return outcomes.pop()
    if as_number(a):
        return compare(lambda x, y: relation(y, x), b, a, rounds)
    if not as_number(b) or not b.is_finite or abs(b) > _SMALL:
        raise NotFollowed("it compares data that a floating-point dtype may round")
    return relation(unrounded(a if a.has(Rounded) else as_rounded(a)), b)


def _is_data(tensor: SymbolicTensor) -> bool:
    """Whether a tensor holds elements nothing is known of, in a dtype that is not computed with."""
    known = tensor.dtype in (torch.bool, *EXACT_INTEGERS)
    return not known and all(not as_number(value) and not value.has(Rounded) for value, _ in pairs(tensor.value))


def _compare_data(
    relation: Callable[[sympy.Expr, sympy.Expr], sympy.Basic],
    a: SymbolicTensor,
    b: SymbolicTensor,
    shape: tuple[sympy.Expr, ...],
) -> sympy.Basic:
    """Data of a narrow or a floating-point dtype against a number that this dtype holds."""
    if not _is_data(a):
        swapped = relation if relation in (sympy.Eq, sympy.Ne) else lambda x, y: relation(y, x)
        return _compare_data(swapped, b, a, shape)
    if not as_number(b.value) or a.dtype.is_complex:
        raise NotFollowed("it compares data of a dtype that is not computed with")
    number = rounded_to(b.value, a.dtype)
    if number != b.value:
        raise NotFollowed(f"it compares {a.dtype} data with {b.value}, which that dtype does not hold")
    if a.dtype.is_floating_point and (relation not in (sympy.Eq, sympy.Ne) or not number.is_finite):
        raise NotFollowed("it compares floating-point data, which may be NaN or infinite")
    return truth(lambda value: relation(value, number), a.broadcast_to(shape))


_RELATIONS = {
    Kind.EQ: sympy.Eq,
    Kind.NE: sympy.Ne,
    Kind.LT: sympy.Lt,
    Kind.LE: sympy.Le,
    Kind.GT: sympy.Gt,
    Kind.GE: sympy.Ge,
}
for _kind, _relation in _RELATIONS.items():
    rule(_kind)(_comparison(_relation))


def _logic(connective: Callable[..., sympy.Basic]) -> Rule:
    def apply(run: Evaluator, example: torch.Tensor, input: Any, other: Any) -> sympy.Basic:
        shape = shape_of(example)
        return connective(boolean(run.operand(input), shape), boolean(run.operand(other), shape))

    return apply


rule(Kind.AND)(_logic(sympy.And))
rule(Kind.OR)(_logic(sympy.Or))
rule(Kind.XOR)(_logic(lambda a, b: sympy.Or(sympy.And(a, negation(b)), sympy.And(negation(a), b))))


@rule(Kind.NOT)
def _not(run: Evaluator, example: torch.Tensor, input: Any) -> sympy.Basic:
    return negation(boolean(run.operand(input), shape_of(example)))


@rule(Kind.CAST)
def _cast(
    run: Evaluator, example: torch.Tensor, input: Any, targets: tuple[Any, ...] = (), **_placement: Any
) -> sympy.Basic:
    return cast(run.operand(input), example.dtype)


def cast(source: SymbolicTensor, dtype: torch.dtype) -> sympy.Basic:
    """The elements of a tensor in another dtype.

    Raises:
        NotFollowed: rounding or overflow could change them.
    """
    if source.dtype == dtype:
        return source.value
    if dtype == torch.bool:
        if _is_data(source):
            return _compare_data(sympy.Ne, source, SymbolicTensor((), ZERO, torch.int64), source.shape)
        rounds = source.dtype.is_floating_point
        return truth(lambda a: compare(sympy.Ne, a, ZERO, rounds), numeric(source, source.shape))
    return combine(lambda a: _cast_element(a, source.dtype, dtype), numeric(source, source.shape))


def _cast_element(value: sympy.Expr, source: torch.dtype, dtype: torch.dtype) -> sympy.Basic:
    if as_number(value):
        return rounded_to(value, dtype)
    if dtype in _ROUNDING and (source in EXACT_INTEGERS or value.func is Rounded):
        return as_rounded(value)
    holds = dtype == torch.int64 or not value.atoms(sympy.core.function.AppliedUndef)
    if dtype in EXACT_INTEGERS and source in EXACT_INTEGERS and holds:
        return value
    raise NotFollowed(f"it casts data to {str(dtype).removeprefix('torch.')}, which may change it")
