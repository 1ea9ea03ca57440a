"""Walk from the softmax up to the product of queries and keys: scales, mask terms, casts, layouts, shifts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.graph.op_table import Call, Kind, read, read_in_place
from infllm_pass.masks.normal_form import MaskRole, MaskTerm
from infllm_pass.masks.terms import hides
from infllm_pass.reasons import Reason
from infllm_pass.sites.index_algebra import KEY
from infllm_pass.sites.layouts import LAYOUT_KINDS, Index, Layouts, Reading
from infllm_pass.sites.products import Product, read_product
from infllm_pass.sites.scalars import number_of, read_number

NEAR = 12
"""How many operators beyond an unknown one a product is looked for, to tell a miss from what is no attention."""


@dataclass(frozen=True)
class Stop:
    """Where reading an attention ended, and whether a product of queries and keys lies behind it."""

    node: fx.Node
    reason: Reason
    behind_product: bool
    detail: str = ""


@dataclass(frozen=True)
class Scores:
    """The product that makes the scores, and what happens to them before the softmax.

    Attributes:
        product: the product.
        index: where its result is read, in terms of `out_axis` and `KEY`.
        factor: what the product is multiplied with.
        terms: what masks the scores.
        path: the nodes from the product to what the softmax reads.
        softcap: the cap ``c`` of ``c * tanh(x / c)``, where `factor` makes ``x`` of the product; 0.0 without one.
        sinks: the column that is joined to the scores, and how often it counts; None without one.
        shifted: a node that adds one number to all scores of a query, which a softmax does not see, but a cap and a
            sink do; None: there is none.
    """

    product: Product
    index: Index
    factor: float
    terms: tuple[MaskTerm, ...] = ()
    path: tuple[fx.Node, ...] = ()
    softcap: float = 0.0
    sinks: SinkColumn | None = None
    shifted: fx.Node | None = None


@dataclass(frozen=True)
class SinkColumn:
    """A column that is joined to the scores and belongs to no key.

    Attributes:
        node: where it is joined.
        dim: the dimension along which it is.
        column: where it is read, in terms of `out_axis`.
        factor: what its elements are multiplied with before the softmax.
    """

    node: fx.Node
    dim: int
    column: Reading
    factor: float


def follow_scores(layouts: Layouts, node: Any, index: Index, factor: float) -> Scores | Stop:
    """Follow the scores up from the softmax to the product of queries and keys.

    Args:
        layouts: the graph's layout operators.
        node: the node to go on from.
        index: where it is read.
        factor: what its elements are multiplied with before the softmax.
    """
    found = _scores_behind(layouts, node, index, factor)
    return replace(found, path=(*found.path, node)) if isinstance(found, Scores) else found


def _scores_behind(layouts: Layouts, node: Any, index: Index, factor: float) -> Scores | Stop:
    if not layouts.is_tensor(node):
        return Stop(node, Reason.PARTIAL_MATCH, False)
    product = read_product(layouts, node)
    if product is not None:
        found = Scores(product, index, factor * product.factor)
        if product.added is None:
            return found
        return _with_term(layouts, found, node, product.added, MaskRole.ADDED, index, factor)
    call = layouts.read(node) or _written(layouts, node)
    rule = None if call is None else _SCORE_RULES.get(call.kind)
    if call is None or rule is None:
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    return rule(layouts, node, call, index, factor)  # type: ignore[no-any-return]


def _written(layouts: Layouts, node: fx.Node) -> Call | None:
    """An in-place operator on memory of its own, as what it computes."""
    call = read_in_place(node)
    target = None if call is None else call.args.get("input")
    if call is None or not isinstance(target, fx.Node):
        return None
    source = read(target)
    fresh = source is not None and source.kind not in LAYOUT_KINDS | {Kind.CAST}
    if not fresh and read_in_place(target) is None:
        return None
    return replace(call, args={name: layouts.latest(argument, node) for name, argument in call.args.items()})


def _moved(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    source = call.args.get("input")
    moved = layouts.step(node, source, index) if isinstance(source, fx.Node) else None
    if moved is None:
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    return follow_scores(layouts, source, moved, factor)


def _cast(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    if not layouts.facts.example(node).dtype.is_floating_point:
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    return follow_scores(layouts, call.args.get("input"), index, factor)


def _scaled(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    source, number = layouts.scaling(call.kind, call.args)
    if source is not None and number is not None:
        return follow_scores(layouts, source, index, factor * number)
    for name in ("input", "other"):
        found = _operand(layouts, node, call.args.get(name), index, factor)
        if isinstance(found, Scores):
            return Stop(node, Reason.SCALE_IS_DATA, True)
        if found.behind_product:
            return found
    return Stop(node, Reason.PARTIAL_MATCH, False)


def _added(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    operands = [call.args.get("input"), call.args.get("other")]
    if number_of(call.args.get("alpha", 1)) != 1.0 or set(call.args) - {"input", "other", "alpha"}:
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    stops = []
    for operand, other in (operands, operands[::-1]):
        found = _operand(layouts, node, operand, index, factor)
        if isinstance(found, Scores):
            return _with_term(layouts, found, node, other, MaskRole.ADDED, index, factor)
        stops.append(found)
    return max(stops, key=lambda stop: stop.behind_product)


def _subtracted(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    scores, other = call.args.get("input"), call.args.get("other")
    if set(call.args) - {"input", "other"}:
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    found = _operand(layouts, node, scores, index, factor)
    if isinstance(found, Stop):
        return found if found.behind_product else Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    if _is_row_maximum(layouts, node, other, scores, index):
        return replace(found, shifted=node)
    return _with_term(layouts, found, node, other, MaskRole.ADDED, index, -factor)


def _is_row_maximum(layouts: Layouts, node: fx.Node, other: Any, scores: Any, index: Index) -> bool:
    """Whether an operand is, for each query, the largest of all its scores: a shift, which a softmax does not see.

    Args:
        layouts: the graph's layout operators.
        node: the operator that combines the two.
        other: the operand.
        scores: the scores that `node` reads.
        index: where the result is read.
    """
    place = layouts.broadcast(other, index, layouts.shape(node)) if layouts.is_tensor(other) else None
    if place is None or len(layouts.shape(scores)) != len(index):
        return False
    reading, call = Reading(other, place), None
    while call is None or call.kind is Kind.DETACH:
        source = reading.node if call is None else call.args["input"]
        *_, (reading, _reader) = layouts.readings(source, reading.index, scaled=False)
        call = layouts.read(reading.node)
        if call is None:
            return False
    if call.kind is Kind.GETITEM and call.args.get("index") == 0:
        call = layouts.read(call.args["input"])  # the values, of values and indices
    if call is None or call.kind is not Kind.MAX or call.args.get("input") is not scores:
        return False
    dims = call.args.get("dim")
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    if len(dims) != 1:
        return False
    dim = dims[0] % len(index)
    own = reading.index[:dim] + reading.index[dim + 1 :] if call.args.get("keepdim") else reading.index
    return bool((index[dim] - KEY).is_Integer) and own == index[:dim] + index[dim + 1 :]


def _floored(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    """Scores that are kept from falling below the least number of their dtype, which only hidden ones do."""
    floor = read_number(layouts.facts, call.args.get("other", call.args.get("min")))
    dtype = layouts.facts.example(node).dtype
    if floor is None or not dtype.is_floating_point or call.args.get("max") is not None:
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    if floor > torch.finfo(dtype).min or not _hides(floor, factor, dtype):
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    return _operand(layouts, node, call.args.get("input"), index, factor)


def _hides(number: float, factor: float, dtype: torch.dtype) -> bool:
    """Whether scores of that number hide their keys once they are scaled."""
    return factor > 0.0 and hides(sympy.sympify(number * factor), dtype)


def _filled(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    found = follow_scores(layouts, call.args.get("input"), index, factor)
    if isinstance(found, Stop):
        return found
    return _hide(layouts, found, node, call.args.get("mask"), call.args.get("value"), MaskRole.HIDE, index, factor)


def _where(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    stops = []
    for name, fill, role in (("input", "other", MaskRole.KEEP), ("other", "input", MaskRole.HIDE)):
        found = _operand(layouts, node, call.args.get(name), index, factor)
        if isinstance(found, Scores):
            return _hide(layouts, found, node, call.args.get("condition"), call.args.get(fill), role, index, factor)
        stops.append(found)
    return max(stops, key=lambda stop: stop.behind_product)


def _detached(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    found = follow_scores(layouts, call.args.get("input"), index, factor)
    return Stop(node, Reason.DETACHED, True) if isinstance(found, Scores) else found


def _capped(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    """Scores under a tanh: ``f * tanh(y)`` is ``c * tanh(x / c)`` for ``c = |f|`` and ``x = f * y``."""
    found = follow_scores(layouts, call.args.get("input"), index, factor)
    if isinstance(found, Stop):
        return found
    if not (math.isfinite(factor) and factor):
        return Stop(node, Reason.SOFT_CAP, True, ", the cap is no positive number")
    if found.softcap:
        return Stop(node, Reason.SOFT_CAP, True, ", the scores are capped twice")
    if found.terms or found.sinks is not None or found.shifted is not None:
        return Stop(node, Reason.SOFT_CAP, True, ", the cap comes after what is added to the scores or masks them")
    return replace(found, softcap=abs(factor))


def _joined(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> Scores | Stop:
    """Scores with a column joined to them that belongs to no key."""
    tensors = call.args.get("tensors")
    tensors = list(tensors) if isinstance(tensors, (list, tuple)) else []
    if not all(map(layouts.is_tensor, tensors)):
        return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    dim = call.args.get("dim", 0) % len(index)
    start = sympy.Integer(0)
    for place, tensor in enumerate(tensors):
        own = (*index[:dim], index[dim] - start, *index[dim + 1 :])
        start += layouts.shape(tensor)[dim]
        found = follow_scores(layouts, tensor, own, factor)
        if isinstance(found, Stop):
            continue
        others = tensors[:place] + tensors[place + 1 :]
        if own[dim] != KEY or len(others) != 1 or layouts.shape(others[0])[dim] != 1:
            return Stop(node, Reason.SINK, True, ", what is joined to the scores is not one column")
        if found.sinks is not None or found.shifted is not None:
            return Stop(node, Reason.SINK, True, ", the scores are changed before the column is joined to them")
        column = Reading(others[0], (*index[:dim], sympy.Integer(0), *index[dim + 1 :]))
        return replace(found, sinks=SinkColumn(node, dim, column, factor))
    return Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))


_SCORE_RULES: dict[Kind, Any] = {
    **dict.fromkeys(LAYOUT_KINDS, _moved),
    Kind.CAST: _cast,
    Kind.MUL: _scaled,
    Kind.DIV: _scaled,
    Kind.ADD: _added,
    Kind.SUB: _subtracted,
    Kind.MAX: _floored,
    Kind.CLAMP: _floored,
    Kind.MASKED_FILL: _filled,
    Kind.WHERE: _where,
    Kind.TANH: _capped,
    Kind.DETACH: _detached,
    Kind.CAT: _joined,
}


def _operand(layouts: Layouts, node: fx.Node, operand: Any, index: Index, factor: float) -> Scores | Stop:
    """Follow one operand of an elementwise operator."""
    if not layouts.is_tensor(operand):
        return Stop(node, Reason.PARTIAL_MATCH, False)
    place = layouts.broadcast(operand, index, layouts.shape(node))
    if place is None:
        return Stop(node, Reason.PARTIAL_MATCH, False)
    return follow_scores(layouts, operand, place, factor)


def _with_term(
    layouts: Layouts, found: Scores, node: fx.Node, mask: Any, role: MaskRole, index: Index, factor: float
) -> Scores | Stop:
    number = read_number(layouts.facts, mask) if role is MaskRole.ADDED else None
    if number is not None and math.isfinite(number):
        return replace(found, shifted=node)
    if not layouts.is_tensor(mask):
        return Stop(node, Reason.PARTIAL_MATCH, True)
    if found.sinks is not None:
        return Stop(node, Reason.SINK, True, ", the scores are masked after a column was joined to them")
    place = layouts.broadcast(mask, index, layouts.shape(node))
    if place is None:
        return Stop(node, Reason.LAYOUT, True)
    scaled = factor if role is MaskRole.ADDED else 1.0
    return replace(found, terms=(*found.terms, MaskTerm(mask, role, place, factor=scaled)))


def _hide(
    layouts: Layouts,
    found: Scores,
    node: fx.Node,
    mask: Any,
    fill: Any,
    role: MaskRole,
    index: Index,
    factor: float,
) -> Scores | Stop:
    """Scores of which some are set to a number, which hides their keys if it is the least there is."""
    value = read_number(layouts.facts, fill)
    if value is None:
        return Stop(node, Reason.PARTIAL_MATCH, True)
    if not _hides(value, factor, layouts.facts.example(node).dtype):
        return Stop(node, Reason.SOFT_MASK, True, f", masked scores are set to {value}")
    return _with_term(layouts, found, node, mask, role, index, factor)


def _product_behind(layouts: Layouts, node: fx.Node) -> bool:
    """Whether a product of two computed tensors is near above a node."""
    seen: set[fx.Node] = set()
    level = [node]
    for _ in range(NEAR):
        level = [source for current in level for source in current.all_input_nodes if source not in seen]
        seen.update(level)
        if any(read_product(layouts, candidate) is not None for candidate in level):
            return True
    return False
