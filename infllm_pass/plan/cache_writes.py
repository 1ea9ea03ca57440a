"""Infers the cache slots a graph writes from the index of ``index_copy_``, ``scatter_`` or ``setitem``."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.graph.facts import axis, example_of, same, size
from infllm_pass.graph.op_table import read_update
from infllm_pass.masks.interpreter import Interpreter, Overwritten
from infllm_pass.masks.normal_form import BATCH
from infllm_pass.masks.symbolic import NotFollowed


def written_slots(
    interpreter: Interpreter, place: Any, batch: int | torch.SymInt
) -> tuple[sympy.Expr, sympy.Expr | None] | None:
    """The first of the consecutive slots that an index means, and their number if it is known.

    Args:
        interpreter: evaluates positions.
        place: an entry of an index, as in `vocabulary.Write`: a slice, or a node that holds positions.
        batch: rows of the cache; what depends on the row is in terms of `BATCH`.

    Returns:
        None where the slots are not known to be consecutive, or not known.
    """
    if isinstance(place, slice):
        try:
            start = interpreter.integer(0 if place.start is None else place.start)
            stop = None if place.stop is None else interpreter.integer(place.stop)
        except NotFollowed:
            return None
        return start, None if stop is None else sympy.expand(stop - start)
    example = example_of(place) if isinstance(place, fx.Node) else None
    if not isinstance(example, torch.Tensor):
        return None
    try:
        value = interpreter.evaluate(place)
    except Overwritten:
        return None
    if value is None or value.dtype not in (torch.int64, torch.int32) or not isinstance(value.value, sympy.Expr):
        return None
    axes = {axis(dim) for dim in range(example.dim())}
    for dim in reversed(range(example.dim())):
        start = sympy.expand(value.value - axis(dim))
        by_row = {BATCH} if dim > 0 and same(size(example.shape[0]), size(batch)) else set()
        if not start.free_symbols & (axes - by_row):
            return start, size(example.shape[dim])
    single = {axis(dim) for dim, extent in enumerate(example.shape) if same(size(extent), size(1))}
    start = value.value.xreplace({symbol: sympy.Integer(0) for symbol in single})
    by_row = {BATCH} if example.dim() > 1 and same(size(example.shape[0]), size(batch)) else set()
    return None if start.free_symbols & (axes - by_row) else (start, size(1))


def writes_slots(
    interpreter: Interpreter,
    start: sympy.Expr,
    tokens: int | torch.SymInt,
    capacity: int | torch.SymInt,
    batch: int | torch.SymInt,
) -> bool:
    """Whether the graph writes `tokens` slots from `start` on to some cache of that capacity.

    Where it does, the slots exist: writing past the last one is an error of the model's own.
    """
    for node in interpreter.facts.graph.nodes:
        write = read_update(node)
        if write is None:
            continue
        shape = example_of(write.target).shape
        for extent, place in zip(shape, write.entries, strict=False):
            found = written_slots(interpreter, place, batch) if same(size(extent), size(capacity)) else None
            if found is None or found[1] is None or not same(found[1], size(tokens)):
                continue
            if same(found[0], start) or same(sympy.Mod(found[0], size(capacity)), start):  # negative ones wrap around
                return True
    return False
