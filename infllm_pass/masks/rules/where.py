"""Rules for values that are chosen by a condition: where, masked_fill, abs, tril, triu; and for buffers of masks."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch

from infllm_pass.graph.buffers import ClosedForm
from infllm_pass.graph.facts import axis
from infllm_pass.graph.mask_values import MaskForm
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.cases import choose, combine, exact, negation, pairs, rounded_to, truth
from infllm_pass.masks.rules.arithmetic import cast
from infllm_pass.masks.rules.registry import EXACT_INTEGERS, Evaluator, Rule, boolean, numeric, rule, shape_of
from infllm_pass.masks.symbolic import NotFollowed, SymbolicTensor


def select(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
    """``yes`` where the condition holds, else ``no``."""
    if dtype == torch.bool:
        return sympy.Or(sympy.And(condition, yes), sympy.And(negation(condition), no))
    return choose(
        [
            *((value, sympy.And(condition, test)) for value, test in pairs(yes)),
            *((value, sympy.And(negation(condition), test)) for value, test in pairs(no)),
        ]
    )


def _branch(run: Evaluator, argument: Any, example: torch.Tensor) -> sympy.Basic:
    operand = run.operand(argument)
    value = SymbolicTensor(operand.shape, cast(operand, example.dtype), example.dtype)
    return value.broadcast_to(shape_of(example))


@rule(Kind.WHERE)
def _where(run: Evaluator, example: torch.Tensor, condition: Any, input: Any, other: Any) -> sympy.Basic:
    test = boolean(run.operand(condition), shape_of(example))
    return select(test, _branch(run, input, example), _branch(run, other, example), example.dtype)


@rule(Kind.MASKED_FILL)
def _masked_fill(run: Evaluator, example: torch.Tensor, input: Any, mask: Any, value: Any) -> sympy.Basic:
    test = boolean(run.operand(mask), shape_of(example))
    return select(test, _branch(run, value, example), _branch(run, input, example), example.dtype)


@rule(Kind.ABS)
def _abs(run: Evaluator, example: torch.Tensor, input: Any) -> sympy.Basic:
    if example.dtype not in EXACT_INTEGERS:
        raise NotFollowed("it takes the absolute value of numbers that are not int64 or int32")
    value = numeric(run.operand(input), shape_of(example))
    return select(truth(lambda a: sympy.Lt(a, 0), value), combine(operator.neg, value), value, example.dtype)


def _triangle(lower: bool) -> Rule:
    def apply(run: Evaluator, example: torch.Tensor, input: Any, diagonal: Any = 0) -> sympy.Basic:
        rank = example.dim()
        column_minus_row = axis(rank - 1) - axis(rank - 2)
        edge = run.integer(diagonal)
        kept = sympy.Le(column_minus_row, edge) if lower else sympy.Ge(column_minus_row, edge)
        zero = rounded_to(sympy.Integer(0), example.dtype)
        return select(kept, run.operand(input).value, zero, example.dtype)

    return apply


rule(Kind.TRIL)(_triangle(lower=True))
rule(Kind.TRIU)(_triangle(lower=False))


def held_value(form: ClosedForm, dtype: torch.dtype) -> sympy.Basic:
    """The element of a tensor with a closed form."""
    position = axis(form.dims[-1]) if form.rank else sympy.Integer(0)
    if form.rank == 2:
        position = position - axis(form.dims[0])
    if form.step is not None:
        return exact(int(form.values[0])) + form.step * position
    runs = []
    for number, value in enumerate(form.values):
        after = sympy.Gt(position, form.ends[number - 1]) if number else sympy.true
        until = sympy.Le(position, form.ends[number]) if number < len(form.ends) else sympy.true
        runs.append(
            (rounded_to(exact(value if isinstance(value, float) else int(value)), dtype), sympy.And(after, until))
        )
    if dtype == torch.bool:
        return sympy.Or(*(condition for value, condition in runs if value == sympy.true))
    if dtype.is_complex:
        raise NotFollowed("it is complex")
    return choose(runs)


def mask_value(
    form: MaskForm,
    shape: tuple[sympy.Expr, ...],
    dtype: torch.dtype,
    valid: SymbolicTensor | None,
    sequences: SymbolicTensor | None,
) -> sympy.Basic:
    """The element of a mask ``[..., Lq, Lk]`` that was read by value.

    Args:
        form: what it was found to be.
        shape: its sizes.
        dtype: its dtype.
        valid: the keys that some query sees, ``[B, Lk]``; None: all.
        sequences: the numbers of the keys' sequences, ``[B, Lk]``; None: there is one a row.
    """
    query, key = axis(len(shape) - 2), axis(len(shape) - 1)
    place = query + (shape[-1] - shape[-2] if form.offset is None else form.offset)
    row = sympy.Integer(0) if len(shape) == 2 or shape[0] == 1 else axis(0)
    tests = [sympy.Le(key, place)]
    if form.window is not None:
        tests.append(sympy.Gt(key, place - form.window))
    if valid is not None:
        tests.append(valid.at((row, key)))
    if sequences is not None:
        tests.append(sympy.Eq(sequences.at((row, place)), sequences.at((row, key))))
    visible = sympy.And(*tests)
    if dtype == torch.bool:
        return visible if form.kept else negation(visible)
    kept, hidden = (rounded_to(exact(_number(value, dtype)), dtype) for value in (form.kept, form.hidden))
    return select(visible, kept, hidden, dtype)


def _number(value: float, dtype: torch.dtype) -> float | int:
    """A number as tensors of a dtype hold it."""
    return value if dtype.is_floating_point else int(value)
