"""Interpreter rules along a dimension: ``diff`` and ``cumsum``.

A cumulative sum of a condition is a named function of its index that the interpreter remembers as a `Scan`. Two
facts follow for positions ``k <= q`` along its dimension: equal values are contiguous; and equal values at k and q mean
that the condition holds nowhere in ``(k, q]``. Both hold as well for numbers of which none returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from infllm_pass.graph.facts import axis, same
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.cases import Cases, choose, combine, negation, pairs, truth
from infllm_pass.masks.rules.arithmetic import compare
from infllm_pass.masks.rules.registry import EXACT_INTEGERS, ONE, ZERO, Evaluator, dim_of, numeric, rule, shape_of
from infllm_pass.masks.symbolic import NotFollowed, SymbolicTensor


@dataclass(frozen=True)
class Scan:
    """A cumulative sum of a condition, or other numbers of which none returns once another one has followed it.

    Attributes:
        dim: the dimension that is summed along.
        condition: where the numbers change, over the indices ``(axis(0), …)``.
    """

    dim: int
    condition: sympy.Basic


def numbered(numbers: SymbolicTensor, positions: Sequence[SymbolicTensor]) -> Scan:
    """What is known of numbers of sequences, none of which returns once another one has followed it.

    Args:
        numbers: their value, of which nothing else is known.
        positions: tensors that grow by one from key to key as long as the numbers stay the same.
    """
    along = len(numbers.shape) - 1

    def step(tensor: SymbolicTensor) -> sympy.Expr:
        rank = len(tensor.shape)
        index = [
            sympy.Integer(0) if extent == 1 else axis(along + 1 - rank + d) for d, extent in enumerate(tensor.shape)
        ]
        return tensor.at(index) - tensor.at([*index[:-1], index[-1] - 1])

    return Scan(along, sympy.Or(sympy.Ne(step(numbers), 0), *(sympy.Ne(step(tensor), 1) for tensor in positions)))


@rule(Kind.DIFF)
def _diff(
    run: Evaluator, example: torch.Tensor, input: Any, n: Any = 1, dim: Any = -1, prepend: Any = None
) -> sympy.Basic:
    source = run.operand(input)
    along = dim_of(dim, example.dim())
    if n != 1 or example.dtype not in EXACT_INTEGERS:
        raise NotFollowed("it takes differences more than once, or of numbers that round")
    values = SymbolicTensor(source.shape, numeric(source, source.shape), source.dtype)
    here: list[sympy.Expr] = [axis(d) for d in range(example.dim())]
    if prepend is None:
        here[along] = axis(along) + 1
        return combine(lambda a, b: sympy.expand(a - b), values.at(here), values.value)
    first = run.operand(prepend)
    if first.shape[along] != 1:
        raise NotFollowed("it prepends more than one element")
    here[along] = axis(along) - 1
    previous = values.at(here)
    head = numeric(first, shape_of(example)).xreplace({axis(along): ZERO})
    at_start = values.value.xreplace({axis(along): ZERO})
    inner = combine(lambda a, b: sympy.expand(a - b), values.value, previous)
    outer = combine(lambda a, b: sympy.expand(a - b), at_start, head)
    plain = not isinstance(inner, Cases) and not isinstance(outer, Cases)
    if plain and same(inner.xreplace({axis(along): ZERO}), outer):
        return inner
    start = sympy.Eq(axis(along), 0)
    return choose(
        [
            *((value, sympy.And(start, test)) for value, test in pairs(outer)),
            *((value, sympy.And(negation(start), test)) for value, test in pairs(inner)),
        ]
    )


@rule(Kind.CUMSUM)
def _cumsum(
    run: Evaluator, example: torch.Tensor, input: Any, dim: Any, dtype: torch.dtype | None = None
) -> sympy.Basic | Scan:
    source = run.operand(input)
    if example.dtype not in EXACT_INTEGERS or source.dtype.is_floating_point:
        raise NotFollowed("it sums numbers that round or overflow")
    along = dim_of(dim, example.dim())
    value = numeric(source, source.shape)
    if axis(along) not in value.free_symbols:
        return combine(lambda a: a * (axis(along) + 1), value)
    if any(test not in (ZERO, ONE) for test, _ in pairs(value)):
        raise NotFollowed("it sums data that may be other than 0 and 1")
    condition = truth(lambda a: compare(sympy.Ne, a, ZERO, rounds=False), value)
    return Scan(along, condition)
