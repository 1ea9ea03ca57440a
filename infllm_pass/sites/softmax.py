"""Reading hand-written attention: a softmax between a product of queries and keys and one with values.

From the softmax down to the product that sums over the softmax's dimension, and from the softmax up to the product
that makes the scores; what lies between scales, masks, casts or moves the scores and nothing else. Places are followed
as index expressions all the way, so that no layout has to be known beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.liveness import live_users
from infllm_pass.masks.predicate import MaskRole, MaskTerm
from infllm_pass.masks.terms import hides
from infllm_pass.masks.values import axis
from infllm_pass.reasons import Reason
from infllm_pass.sites.algebra import FEATURE, KEY
from infllm_pass.sites.assembly import Reads
from infllm_pass.sites.constants import number_of, read_number
from infllm_pass.sites.fused import site_of
from infllm_pass.sites.layouts import LAYOUT_KINDS, Index, Layouts, Reading
from infllm_pass.sites.products import CONTRACTED, Product, read_product
from infllm_pass.sites.site import AttentionSite, PartialSite
from infllm_pass.sites.steps import out_axis
from infllm_pass.vocabulary import Call, Kind, read, read_in_place

NEAR = 12
"""How many operators beyond an unknown one a product is looked for, to tell a miss from what is no attention."""


def read_handwritten(layouts: Layouts, node: fx.Node) -> AttentionSite | PartialSite | None:
    """Read a node as the softmax of an attention; None for one that is none, or the softmax of something else."""
    call = layouts.read(node)
    if call is None or call.kind is not Kind.SOFTMAX or not layouts.is_tensor(call.args.get("input")):
        return None
    weights = _follow_weights(layouts, node)
    if weights is None:
        return None
    index = _softmax_index(layouts, call, weights)
    if index is None:
        return None
    scores = _follow_scores(layouts, call.args["input"], index, 1.0)
    if isinstance(scores, _Stop):
        if not scores.behind_product:
            return None
        return PartialSite(node, scores.reason, scores.node, f"softmax and product with values found{scores.detail}")
    reached = "scores, softmax and product with values found"
    if weights.stop is not None:
        return PartialSite(node, weights.stop.reason, weights.stop.node, reached)
    path, end = (*scores.path, *weights.path), weights.product.node
    overwritten = layouts.disturbed(path, end)
    if overwritten is not None:
        return PartialSite(node, Reason.OVERWRITTEN, overwritten, reached)
    detached = next((part for part in path if layouts.gradients(part) != layouts.gradients(end)), None)
    if detached is not None:
        return PartialSite(node, Reason.DETACHED, detached, reached)
    reads = _reads(layouts, weights, scores)
    if reads is None:
        return None
    return site_of(layouts, reads, None, reached)


@dataclass(frozen=True)
class _Stop:
    """Where reading an attention ended, and whether a product of queries and keys lies behind it."""

    node: fx.Node
    reason: Reason
    behind_product: bool
    detail: str = ""


@dataclass(frozen=True)
class _Weights:
    """The way from the softmax to the product with the values, nearest to the softmax first.

    Attributes:
        path: the nodes between softmax and product; starts with the softmax.
        product: the product.
        side: which operand of the product the weights are.
        dropout_p: probability of the dropout on the way.
        stop: what keeps the way from being plain.
    """

    path: tuple[fx.Node, ...]
    product: Product
    side: int
    dropout_p: Any = 0.0
    stop: _Stop | None = None


def _follow_weights(layouts: Layouts, softmax: fx.Node) -> _Weights | None:
    """Follow the weights down to the product that sums over them."""
    path = [softmax]
    dropout_p: Any = 0.0
    stop: _Stop | None = None
    while True:
        current = path[-1]
        users = [user for user in live_users(current) if not _reads_size(user)]
        onward = [user for user in users if _carries(layouts, user, current)]
        products = [product for user in users if (product := read_product(layouts, user)) is not None]
        if len(users) > 1 and stop is None:
            other = next(user for user in users if user not in [p.node for p in products[:1]])
            stop = _Stop(other, Reason.RETURNED_WEIGHTS, True)
        if products:
            product = products[0]
            if product.operands.count(current) != 1:
                return None
            return _Weights(tuple(path), product, product.operands.index(current), dropout_p, stop)
        following = onward or (users if len(path) <= NEAR else [])
        if len(following) != 1 and not onward:
            return None
        nearest = following[0]
        call = read(nearest)
        if call is not None and call.kind is Kind.DROPOUT:
            if call.args.get("training", True) is not False:
                dropout_p = call.args.get("p", 0.5)
        elif not onward and stop is None:
            detached = call is not None and call.kind is Kind.DETACH
            stop = _Stop(nearest, Reason.DETACHED if detached else Reason.PARTIAL_MATCH, True)
        path.append(nearest)


def _reads_size(node: fx.Node) -> bool:
    call = read(node)
    return call is not None and call.kind is Kind.SIZE


def _carries(layouts: Layouts, node: fx.Node, source: fx.Node) -> bool:
    """Whether a node passes its input on, moved or cast or under dropout at most."""
    call = read(node)
    if call is None or call.args.get("input") is not source or not layouts.is_tensor(node):
        return False
    return call.kind in LAYOUT_KINDS or call.kind in (Kind.CAST, Kind.DROPOUT)


def _softmax_index(layouts: Layouts, call: Call, weights: _Weights) -> Index | None:
    """Where the softmax is read for one element of the result and one key; None if it is not over the keys."""
    moved = dict(enumerate(weights.product.indices[weights.side]))
    rank = len(layouts.shape(weights.product.node))
    out = {axis(dim): out_axis(dim) for dim in range(rank)} | {CONTRACTED: KEY}
    index: Index | None = tuple(part.xreplace(out) for part in moved.values())
    for node, source in zip(weights.path[:0:-1], weights.path[-2::-1], strict=True):
        own = read(node)
        if own is not None and own.kind in LAYOUT_KINDS and index is not None:
            index = layouts.step(node, source, index)
        elif index is None or len(layouts.shape(node)) != len(layouts.shape(source)):
            return None
    if index is None:
        return None
    dim = call.args.get("dim")
    if not isinstance(dim, int) or not index:
        return None
    dim %= len(index)
    others = {symbol for place, part in enumerate(index) if place != dim for symbol in part.free_symbols}
    return index if index[dim] == KEY and KEY not in others else None


@dataclass(frozen=True)
class _Scores:
    """The product that makes the scores, and what happens to them before the softmax.

    Attributes:
        product: the product.
        index: where its result is read, in terms of `out_axis` and `KEY`.
        factor: what the product is multiplied with.
        terms: what masks the scores.
        path: the nodes from the product to what the softmax reads.
    """

    product: Product
    index: Index
    factor: float
    terms: tuple[MaskTerm, ...] = ()
    path: tuple[fx.Node, ...] = ()


def _follow_scores(layouts: Layouts, node: Any, index: Index, factor: float) -> _Scores | _Stop:
    """Follow the scores up from the softmax to the product of queries and keys.

    Args:
        layouts: the graph's layout operators.
        node: the node to go on from.
        index: where it is read.
        factor: what its elements are multiplied with before the softmax.
    """
    found = _scores_behind(layouts, node, index, factor)
    return replace(found, path=(*found.path, node)) if isinstance(found, _Scores) else found


def _scores_behind(layouts: Layouts, node: Any, index: Index, factor: float) -> _Scores | _Stop:
    if not layouts.is_tensor(node):
        return _Stop(node, Reason.PARTIAL_MATCH, False)
    product = read_product(layouts, node)
    if product is not None:
        found = _Scores(product, index, factor * product.factor)
        if product.added is None:
            return found
        return _with_term(layouts, found, node, product.added, MaskRole.ADDED, index, factor)
    call = layouts.read(node) or _written(layouts, node)
    rule = None if call is None else _SCORE_RULES.get(call.kind)
    if call is None or rule is None:
        return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
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


def _moved(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    source = call.args.get("input")
    moved = layouts.step(node, source, index) if isinstance(source, fx.Node) else None
    if moved is None:
        return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    return _follow_scores(layouts, source, moved, factor)


def _cast(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    if not layouts.facts.example(node).dtype.is_floating_point:
        return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    return _follow_scores(layouts, call.args.get("input"), index, factor)


def _scaled(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    source, number = layouts.scaling(call.kind, call.args)
    if source is not None and number is not None:
        return _follow_scores(layouts, source, index, factor * number)
    for name in ("input", "other"):
        found = _operand(layouts, node, call.args.get(name), index, factor)
        if isinstance(found, _Scores):
            return _Stop(node, Reason.SCALE_IS_DATA, True)
        if found.behind_product:
            return found
    return _Stop(node, Reason.PARTIAL_MATCH, False)


def _added(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    operands = [call.args.get("input"), call.args.get("other")]
    if number_of(call.args.get("alpha", 1)) != 1.0 or set(call.args) - {"input", "other", "alpha"}:
        return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    stops = []
    for operand, other in (operands, operands[::-1]):
        found = _operand(layouts, node, operand, index, factor)
        if isinstance(found, _Scores):
            return _with_term(layouts, found, node, other, MaskRole.ADDED, index, factor)
        stops.append(found)
    return max(stops, key=lambda stop: stop.behind_product)


def _subtracted(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    scores, other = call.args.get("input"), call.args.get("other")
    if set(call.args) - {"input", "other"}:
        return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    found = _operand(layouts, node, scores, index, factor)
    if isinstance(found, _Stop):
        return found if found.behind_product else _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    if isinstance(scores, fx.Node) and _is_row_maximum(layouts, node, other, scores, index):
        return found
    return _with_term(layouts, found, node, other, MaskRole.ADDED, index, -factor)


def _is_row_maximum(layouts: Layouts, node: fx.Node, other: Any, scores: fx.Node, index: Index) -> bool:
    """Whether an operand is, for each query, the largest of all its scores: a shift, which a softmax does not see.

    Args:
        layouts: the graph's layout operators.
        node: the operator that combines the two.
        other: the operand.
        scores: the scores that `node` reads.
        index: where the result is read.
    """
    place = layouts.broadcast(other, index, layouts.shape(node)) if layouts.is_tensor(other) else None
    if place is None:
        return False
    *_, (reading, _reader) = layouts.readings(other, place, scaled=False)
    call = layouts.read(reading.node)
    if call is not None and call.kind is Kind.DETACH:
        return _is_row_maximum_at(layouts, Reading(call.args["input"], reading.index), scores, index)
    return _is_row_maximum_at(layouts, reading, scores, index)


def _is_row_maximum_at(layouts: Layouts, reading: Reading, scores: fx.Node, index: Index) -> bool:
    call = layouts.read(reading.node)
    if call is not None and call.kind is Kind.GETITEM and call.args.get("index") == 0:
        call = layouts.read(call.args["input"])  # the values, of values and indices
    if call is None or call.kind is not Kind.MAX or call.args.get("input") is not scores:
        return False
    dims = call.args.get("dim")
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    if len(dims) != 1:
        return False
    dim = dims[0] % len(index)
    own = reading.index[:dim] + reading.index[dim + 1 :] if call.args.get("keepdim") else reading.index
    return index[dim] == KEY and own == index[:dim] + index[dim + 1 :]


def _floored(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    """Scores that are kept from falling below the least number of their dtype, which only hidden ones do."""
    floor = read_number(layouts.facts, call.args.get("other", call.args.get("min")))
    dtype = layouts.facts.example(node).dtype
    if floor is None or not dtype.is_floating_point or floor > torch.finfo(dtype).min:
        return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    if call.args.get("max") is not None or not _hides(floor, factor, dtype):
        return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))
    return _operand(layouts, node, call.args.get("input"), index, factor)


def _hides(number: float, factor: float, dtype: torch.dtype) -> bool:
    """Whether scores of that number hide their keys once they are scaled."""
    return factor > 0.0 and hides(sympy.sympify(number * factor), dtype)


def _filled(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    found = _follow_scores(layouts, call.args.get("input"), index, factor)
    if isinstance(found, _Stop):
        return found
    return _hide(layouts, found, node, call.args.get("mask"), call.args.get("value"), MaskRole.HIDE, index, factor)


def _where(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    stops = []
    for name, fill, role in (("input", "other", MaskRole.KEEP), ("other", "input", MaskRole.HIDE)):
        found = _operand(layouts, node, call.args.get(name), index, factor)
        if isinstance(found, _Scores):
            return _hide(layouts, found, node, call.args.get("condition"), call.args.get(fill), role, index, factor)
        stops.append(found)
    return max(stops, key=lambda stop: stop.behind_product)


def _detached(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    found = _follow_scores(layouts, call.args.get("input"), index, factor)
    return _Stop(node, Reason.DETACHED, True) if isinstance(found, _Scores) else found


def _capped(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    found = _follow_scores(layouts, call.args.get("input"), index, factor)
    return _Stop(node, Reason.SOFT_CAP, True) if isinstance(found, _Scores) else found


def _joined(layouts: Layouts, node: fx.Node, call: Call, index: Index, factor: float) -> _Scores | _Stop:
    tensors = call.args.get("tensors")
    for tensor in tensors if isinstance(tensors, (list, tuple)) else ():
        if layouts.is_tensor(tensor) and isinstance(_follow_scores(layouts, tensor, index, factor), _Scores):
            return _Stop(node, Reason.SINK, True)
    return _Stop(node, Reason.PARTIAL_MATCH, _product_behind(layouts, node))


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


def _operand(layouts: Layouts, node: fx.Node, operand: Any, index: Index, factor: float) -> _Scores | _Stop:
    """Follow one operand of an elementwise operator."""
    if not layouts.is_tensor(operand):
        return _Stop(node, Reason.PARTIAL_MATCH, False)
    place = layouts.broadcast(operand, index, layouts.shape(node))
    if place is None:
        return _Stop(node, Reason.PARTIAL_MATCH, False)
    return _follow_scores(layouts, operand, place, factor)


def _with_term(
    layouts: Layouts, found: _Scores, node: fx.Node, mask: Any, role: MaskRole, index: Index, factor: float
) -> _Scores | _Stop:
    number = read_number(layouts.facts, mask) if role is MaskRole.ADDED else None
    if number is not None and math.isfinite(number):
        return found  # a shift of all scores, which a softmax does not see
    if not layouts.is_tensor(mask):
        return _Stop(node, Reason.PARTIAL_MATCH, True)
    place = layouts.broadcast(mask, index, layouts.shape(node))
    if place is None:
        return _Stop(node, Reason.LAYOUT, True)
    scaled = factor if role is MaskRole.ADDED else 1.0
    return replace(found, terms=(*found.terms, MaskTerm(mask, role, place, factor=scaled)))


def _hide(
    layouts: Layouts,
    found: _Scores,
    node: fx.Node,
    mask: Any,
    fill: Any,
    role: MaskRole,
    index: Index,
    factor: float,
) -> _Scores | _Stop:
    """Scores of which some are set to a number, which hides their keys if it is the least there is."""
    value = read_number(layouts.facts, fill)
    if value is None:
        return _Stop(node, Reason.PARTIAL_MATCH, True)
    if not _hides(value, factor, layouts.facts.example(node).dtype):
        return _Stop(node, Reason.SOFT_MASK, True, f", masked scores are set to {value}")
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


def _reads(layouts: Layouts, weights: _Weights, scores: _Scores) -> Reads | None:
    """How the attention reads its tensors; None where the scores are no product of queries with keys."""
    place = {axis(dim): part for dim, part in enumerate(scores.index)} | {CONTRACTED: FEATURE}
    sides = [
        Reading(operand, tuple(part.xreplace(place) for part in index))
        for operand, index in zip(scores.product.operands, scores.product.indices, strict=True)
    ]
    over_keys = [any(KEY in part.free_symbols for part in side.index) for side in sides]
    if sum(over_keys) != 1:
        return None
    key, query = sides if over_keys[0] else sides[::-1]
    product = weights.product
    out = {axis(dim): out_axis(dim) for dim in range(len(layouts.shape(product.node)))} | {CONTRACTED: KEY}
    value = tuple(part.xreplace(out) for part in product.indices[1 - weights.side])
    if product.added is not None or product.factor != 1.0:
        return None
    return Reads(
        node=product.node,
        query=query,
        key=key,
        value=Reading(product.operands[1 - weights.side], value),
        terms=scores.terms,
        scale=scores.factor,
        dtypes=(layouts.facts.example(scores.product.node).dtype, layouts.facts.example(product.node).dtype),
        first=scores.product.node,
        last=product.node,
        dropout_p=weights.dropout_p,
    )
