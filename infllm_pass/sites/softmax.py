"""Matcher for hand-written attention: a softmax between a query-key product and a product with values.

From the softmax down to the product that sums over the softmax's dimension, and from the softmax up to the product
that makes the scores; what lies between scales, masks, casts or moves the scores and nothing else. Places are followed
as index expressions all the way, so that no layout has to be known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from infllm_pass.graph.dce import live_users
from infllm_pass.graph.facts import axis, same
from infllm_pass.graph.op_table import Call, Kind, read
from infllm_pass.reasons import Reason
from infllm_pass.sites.assembly import Reads, SinkReading
from infllm_pass.sites.fused import site_of
from infllm_pass.sites.index_algebra import FEATURE, KEY
from infllm_pass.sites.layout_ops import out_axis
from infllm_pass.sites.layouts import LAYOUT_KINDS, Index, Layouts, Reading
from infllm_pass.sites.products import CONTRACTED, Product, read_product
from infllm_pass.sites.scalars import read_number
from infllm_pass.sites.scores import NEAR, Scores, SinkColumn, Stop, follow_scores
from infllm_pass.sites.site import AttentionSite, PartialSite


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
    scores = follow_scores(layouts, call.args["input"], index, 1.0)
    if isinstance(scores, Stop):
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
    sinks = None
    if scores.sinks is not None:
        sinks = _sink_of(layouts, node, index, scores.sinks, end)
        if sinks is None:
            return PartialSite(node, Reason.SINK, scores.sinks.node, reached)
    reads = _reads(layouts, weights, scores, sinks)
    if reads is None:
        return None
    return site_of(layouts, reads, None, reached)


def _sink_of(layouts: Layouts, softmax: fx.Node, index: Index, found: SinkColumn, end: fx.Node) -> SinkReading | None:
    """The column of a softmax's sinks; None where it is no column of that softmax, or is overwritten.

    Args:
        layouts: the graph's layout operators.
        softmax: the softmax.
        index: where its result is read.
        found: the column.
        end: the node that ends the attention.
    """
    dim = next(dim for dim, part in enumerate(index) if KEY in part.free_symbols)
    joined = layouts.shape(found.node)[found.dim]
    if not same(layouts.shape(softmax)[dim], joined):
        return None
    number = read_number(layouts.facts, found.column.node)
    if number is not None:
        return SinkReading((), number * found.factor)
    column = found.column
    chain = tuple(
        reading
        for reading, reader in layouts.readings(column.node, column.index, scaled=False)
        if layouts.stable(reading.node, reader or found.node, end)
    )
    return SinkReading(chain, found.factor) if chain else None


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
    stop: Stop | None = None


def _follow_weights(layouts: Layouts, softmax: fx.Node) -> _Weights | None:
    """Follow the weights down to the product that sums over them."""
    path = [softmax]
    dropout_p: Any = 0.0
    stop: Stop | None = None
    while True:
        current = path[-1]
        users = [user for user in live_users(current) if not _reads_size(user)]
        onward = [user for user in users if _carries(layouts, user, current)]
        products = [product for user in users if (product := read_product(layouts, user)) is not None]
        if len(users) > 1 and stop is None:
            other = next(user for user in users if user not in [p.node for p in products[:1]])
            stop = Stop(other, Reason.RETURNED_WEIGHTS, True)
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
            stop = Stop(nearest, Reason.DETACHED if detached else Reason.PARTIAL_MATCH, True)
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
    return index if bool((index[dim] - KEY).is_Integer) and KEY not in others else None


def _reads(layouts: Layouts, weights: _Weights, scores: Scores, sinks: SinkReading | None) -> Reads | None:
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
        softcap=scores.softcap,
        sinks=sinks,
    )
