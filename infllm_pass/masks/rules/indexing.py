"""Interpreter rules for indexing: slices, integer positions, and advanced indexing by tensors."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.compat.shapes import statically_known_true
from infllm_pass.graph.facts import axis
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.rules.arithmetic import cast
from infllm_pass.masks.rules.registry import ONE, ZERO, Evaluator, dim_of, integer_value, rule, shape_of
from infllm_pass.masks.rules.where import select
from infllm_pass.masks.symbolic import NotFollowed, SymbolicTensor


@rule(Kind.GETITEM)
def _getitem(run: Evaluator, example: torch.Tensor, input: Any, index: Any) -> sympy.Basic:
    source = run.operand(input)
    if isinstance(index, list):
        raise NotFollowed("its index is a list of numbers")
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(entry, (bool, list)) for entry in entries):
        raise NotFollowed("its index holds booleans or lists")
    consumed = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if not any(entry is Ellipsis for entry in entries):
        entries.append(Ellipsis)
    place = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
    entries[place : place + 1] = [slice(None)] * (len(source.shape) - consumed)
    tensors = [i for i, entry in enumerate(entries) if _is_tensor(run, entry)]
    shared = _shared_rank(run, entries, tensors)
    picked: list[sympy.Expr] = []
    new = 0
    for position, entry in enumerate(entries):
        if entry is None:
            new += 1
        elif isinstance(entry, slice):
            extent = source.shape[len(picked)]
            picked.append(axis(new) * _step(entry) + _slice_start(run, entry, extent))
            new += 1
        elif position in tensors:
            first = new - shared if position != tensors[0] else new
            picked.append(_gathered(run, entry, shape_of(example)[first : first + shared], first, source, len(picked)))
            new = first + shared
        else:
            picked.append(_position(run, entry, source.shape[len(picked)]))
    return source.at(picked)


def _is_tensor(run: Evaluator, entry: Any) -> bool:
    return isinstance(entry, fx.Node) and isinstance(run.facts.example(entry), torch.Tensor)


def _shared_rank(run: Evaluator, entries: list[Any], tensors: list[int]) -> int:
    """How many dimensions the index tensors, broadcast against each other, put in their place."""
    if not tensors:
        return 0
    adjacent = tensors == list(range(tensors[0], tensors[0] + len(tensors)))
    plain = all(entry is None or isinstance(entry, slice) for i, entry in enumerate(entries) if i not in tensors)
    ranks: list[int] = [run.facts.example(entries[place]).dim() for place in tensors]
    if any(ranks) and not (adjacent and plain):  # single numbers put no dimension in their place, wherever they are
        raise NotFollowed("it mixes index tensors with other indices")
    return max(ranks)


def _gathered(
    run: Evaluator, entry: fx.Node, block: tuple[sympy.Expr, ...], first: int, source: SymbolicTensor, dim: int
) -> sympy.Expr:
    """An index tensor's element; `first` is the dimension of the result at which its dimensions start."""
    value = integer_value(run.operand(entry), block)
    if value.is_nonnegative is not True:  # a negative one counts from the end
        if source.value.atoms(AppliedUndef):
            raise NotFollowed("its index may be negative")
        value = sympy.Mod(value, source.shape[dim])
    return value.xreplace({axis(dim): axis(first + dim) for dim in range(len(block))})


def _position(run: Evaluator, entry: Any, extent: sympy.Expr) -> sympy.Expr:
    position = run.integer(entry)
    if position.is_negative is True:
        position = position + extent
    if position.is_nonnegative is not True and not _known(entry, run):
        raise NotFollowed("its index may be negative")
    return position


def _known(entry: Any, run: Evaluator) -> bool:
    """Whether Dynamo knows a size not to be negative."""
    value = run.facts.example(entry) if isinstance(entry, fx.Node) else entry
    return isinstance(value, torch.SymInt) and statically_known_true(value >= 0)


def _step(entry: slice) -> sympy.Expr:
    if entry.step is None:
        return ONE
    if not isinstance(entry.step, int) or entry.step < 1:
        raise NotFollowed("its step is not a number")
    return sympy.Integer(entry.step)


def _slice_start(run: Evaluator, entry: slice, extent: sympy.Expr) -> sympy.Expr:
    if entry.start is None:
        return ZERO
    start = run.integer(entry.start)
    if start.is_nonnegative is True or _known(entry.start, run):
        return start
    from_end = extent + start
    if start.is_negative is True and from_end.is_nonnegative is True:
        return from_end
    raise NotFollowed("its slice may start before the first element")


@rule(Kind.CAT)
def _cat(run: Evaluator, example: torch.Tensor, tensors: Any, dim: Any = 0) -> sympy.Basic:
    along = dim_of(dim, example.dim())
    if not isinstance(tensors, (list, tuple)):
        raise NotFollowed("what it puts together is not listed")
    value: sympy.Basic | None = None
    start: sympy.Expr = ZERO
    for part in tensors:
        operand = run.operand(part)
        if len(operand.shape) != example.dim():
            raise NotFollowed("it puts tensors of different rank together")
        here = [axis(d) for d in range(example.dim())]
        shifted = cast(operand, example.dtype).xreplace({here[along]: here[along] - start})
        if value is None:
            value = shifted
        elif shifted != value:
            value = select(sympy.Lt(here[along], start), value, shifted, example.dtype)
        start = start + operand.shape[along]
    if value is None:
        raise NotFollowed("it puts no tensors together")
    return value


@rule(Kind.PAD)
def _pad(
    run: Evaluator, example: torch.Tensor, input: Any, pad: Any, mode: Any = "constant", value: Any = None
) -> sympy.Basic:
    source = run.operand(input)
    if mode != "constant" or not isinstance(pad, (list, tuple)) or len(pad) != 2:
        raise NotFollowed("it pads more than the last dimension, or with other than a number")
    last = axis(example.dim() - 1)
    before = run.integer(pad[0])
    inside = sympy.And(sympy.Ge(last, before), sympy.Lt(last, before + source.shape[-1]))
    filler = cast(run.operand(0 if value is None else value), example.dtype)
    return select(inside, source.value.xreplace({last: last - before}), filler, example.dtype)
