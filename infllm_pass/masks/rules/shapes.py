"""Rules for operators that move elements without changing them: views, expansion, permutation, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from infllm_pass.graph.facts import axis, same
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.rules.registry import ONE, ZERO, Evaluator, dim_of, rule, shape_of
from infllm_pass.masks.symbolic import NotFollowed


@rule(Kind.IDENTITY)
@rule(Kind.DETACH)
def _identity(run: Evaluator, example: torch.Tensor, input: Any, **_placement: Any) -> sympy.Basic:
    return run.operand(input).value


@rule(Kind.UNSQUEEZE)
def _unsqueeze(run: Evaluator, example: torch.Tensor, input: Any, dim: Any) -> sympy.Basic:
    new = dim_of(dim, example.dim())
    return run.operand(input).at([axis(d) for d in range(example.dim()) if d != new])


@rule(Kind.EXPAND)
def _expand(
    run: Evaluator, example: torch.Tensor, input: Any, sizes: Any = (), size: Any = None, other: Any = None
) -> sympy.Basic:
    return run.operand(input).broadcast_to(shape_of(example))


@rule(Kind.TRANSPOSE)
def _transpose(run: Evaluator, example: torch.Tensor, input: Any, dim0: Any, dim1: Any) -> sympy.Basic:
    index = [axis(d) for d in range(example.dim())]
    a, b = dim_of(dim0, example.dim()), dim_of(dim1, example.dim())
    index[a], index[b] = index[b], index[a]
    return run.operand(input).at(index)


@rule(Kind.PERMUTE)
def _permute(run: Evaluator, example: torch.Tensor, input: Any, dims: tuple[Any, ...]) -> sympy.Basic:
    index = [ZERO] * example.dim()
    for new, old in enumerate(dims):
        index[dim_of(old, example.dim())] = axis(new)
    return run.operand(input).at(index)


@rule(Kind.REPEAT)
def _repeat(run: Evaluator, example: torch.Tensor, input: Any, repeats: Any = (), dims: Any = ()) -> sympy.Basic:
    source = run.operand(input)
    pad = example.dim() - len(source.shape)
    index = []
    for dim, (extent, total) in enumerate(zip(source.shape, shape_of(example)[pad:], strict=True)):
        whole = axis(dim + pad) if same(extent, total) else sympy.Mod(axis(dim + pad), extent)
        index.append(ZERO if extent == 1 else whole)
    return source.at(index)


@rule(Kind.REPEAT_INTERLEAVE)
def _repeat_interleave(run: Evaluator, example: torch.Tensor, input: Any, repeats: Any, dim: Any = None) -> sympy.Basic:
    along = dim_of(dim, example.dim())
    index: list[sympy.Expr] = [axis(d) for d in range(example.dim())]
    index[along] = sympy.floor(axis(along) / run.integer(repeats))
    return run.operand(input).at(index)


@rule(Kind.RESHAPE)
def _reshape(run: Evaluator, example: torch.Tensor, input: Any, shape: Any = ()) -> sympy.Basic:
    source = run.operand(input)
    if source.dtype != example.dtype:
        raise NotFollowed("it takes the memory of its numbers for another dtype")
    if ZERO in (*source.shape, *shape_of(example)):
        raise NotFollowed("it reshapes a tensor without elements")
    return source.at(_reshaped_index(source.shape, shape_of(example)))


def _reshaped_index(old: Sequence[sympy.Expr], new: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """For a reshape, the old tensor's index as expressions of the new one's.

    Dimensions are matched in groups of equal element count from the outside in; inside a group the row-major
    position is put together and taken apart again.
    """
    index: list[sympy.Expr] = []
    i = j = 0
    while i < len(old) or j < len(new):
        group_old, group_new = [i], [j]
        count_old = old[i] if i < len(old) else ONE
        count_new = new[j] if j < len(new) else ONE
        i, j = i + 1, j + 1
        while not same(count_old, count_new):
            if i < len(old) and (j >= len(new) or _divides(count_old, count_new)):
                count_old, i = count_old * old[i], i + 1
                group_old.append(i - 1)
            elif j < len(new):
                count_new, j = count_new * new[j], j + 1
                group_new.append(j - 1)
            else:
                raise NotFollowed("it regroups dimensions whose sizes are not known to match")
        position: sympy.Expr = ZERO
        for dim in group_new:
            if dim < len(new):
                position = position * new[dim] + (ZERO if new[dim] == 1 else axis(dim))
        group = [dim for dim in group_old if dim < len(old)]
        parts = dict.fromkeys(group, ZERO)
        inner: sympy.Expr = ONE
        real = [dim for dim in group if old[dim] != 1]
        for dim in reversed(real):
            part = position if inner == 1 else sympy.floor(position / inner)
            parts[dim] = part if dim == real[0] else sympy.Mod(part, old[dim])
            inner = inner * old[dim]
        index.extend(parts[dim] for dim in group)
    return index


def _divides(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether `a` is a proper factor of `b`, so that a group starting with `a` has to grow."""
    ratio = sympy.cancel(b / a)
    return bool(ratio.is_polynomial(*ratio.free_symbols)) and ratio.is_integer is not False
