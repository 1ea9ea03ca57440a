"""Assembly of a site: finds the layout operators that bring q, k and v of two products to ``[B, H, L, D]``.

Both matchers say how an attention reads its tensors: for an element ``out[o0, o1, …]`` of the result, where the
queries, the keys and the values are read, in terms of ``o0, o1, …``, the key index and the feature index. Which of the
result's dimensions are batch, heads, queries and value features follows from which tensor depends on which of them;
layout operators are then chosen that bring each tensor to ``[B, H, L, D]``, and the result back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.graph.facts import same
from infllm_pass.masks.normal_form import MaskTerm
from infllm_pass.sites.concat_cache import appended_keys, growth_of
from infllm_pass.sites.index_algebra import BATCH, FEATURE, HEAD, KEY, QUERY, VALUE_FEATURE, simplify
from infllm_pass.sites.layout_ops import (
    ONE,
    LayoutError,
    Roles,
    choices_of,
    fewest_heads,
    of_equal_heads,
    operand_of,
    out_axis,
    output_steps,
    with_heads,
)
from infllm_pass.sites.layouts import Index, Layouts, Reading
from infllm_pass.sites.site import AttentionSite, Sinks

ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Reads:
    """How an attention reads its tensors, for one element of its result.

    Attributes:
        node: the result.
        query: a node and where it is read, in terms of `out_axis` and `FEATURE`.
        key: the same, in terms of `out_axis`, `KEY` and `FEATURE`.
        value: the same, in terms of `out_axis` and `KEY`.
        terms: mask terms, their index in terms of `out_axis` and `KEY`.
        scale: softmax scale, as in `AttentionSite`.
        dtypes: dtypes that the two products are computed in.
        is_causal: causal flag of a fused call.
        dropout_p: dropout probability.
        first: the node at which the tensors are read for the first time.
        last: the node at which they are read for the last time.
        length: the dimension of the result that counts queries, where the call says so; None: it has to be found.
        softcap: as in `AttentionSite`.
        sinks: the sinks of the softmax; None without any.
    """

    node: fx.Node
    query: Reading
    key: Reading
    value: Reading
    terms: tuple[MaskTerm, ...]
    scale: Any
    dtypes: tuple[torch.dtype, torch.dtype]
    first: fx.Node
    last: fx.Node
    is_causal: Any = False
    dropout_p: Any = 0.0
    length: sympy.Symbol | None = None
    softcap: float = 0.0
    sinks: SinkReading | None = None


@dataclass(frozen=True)
class SinkReading:
    """Where the sinks of a softmax are read.

    Attributes:
        chain: nodes that hold them, and where they are read in terms of `out_axis`, the nearest to the softmax first;
            none for one number.
        factor: what the elements are multiplied with; without a chain, the number.
    """

    chain: tuple[Reading, ...]
    factor: float


class NoSinks(Exception):
    """What is joined to the scores depends on more than the head; never leaves the matchers."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


class NoAttention(Exception):
    """No dimension of the result belongs to queries alone, or to values alone; never leaves the matchers."""


class OwnQueries(Exception):
    """The queries are the same in every row of the batch, and the keys are not; never leaves the matchers."""


class Overwrite(Exception):
    """A tensor of an attention is overwritten before the attention ends; never leaves the matchers."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


def assemble(layouts: Layouts, reads: Reads) -> AttentionSite:
    """The site that an attention's reads make.

    Raises:
        LayoutError, NoAttention, OwnQueries: its dimensions could not be told apart, or are not an attention's.
        Overwrite: one of its tensors is overwritten while it runs.
        NoSinks: its sinks are not one number a head.
    """
    for reading in (reads.query, reads.key, reads.value):
        if not layouts.stable(reading.node, reads.first, reads.last):
            raise Overwrite(reading.node)
    scalable = isinstance(reads.scale, float)
    chains = [
        [
            reading
            for reading, reader in layouts.readings(start.node, start.index, scaled=scaled)
            if layouts.stable(reading.node, reader or reads.first, reads.last)
        ]
        for start, scaled in ((reads.query, scalable), (reads.key, scalable), (reads.value, False))
    ]
    plan = _plan(layouts, reads, *chains)
    query = fewest_heads(choices_of(layouts, plan, chains[0], QUERY, FEATURE))
    key_choices = choices_of(layouts, plan, chains[1], KEY, FEATURE)
    value_choices = choices_of(layouts, plan, chains[2], KEY, VALUE_FEATURE)
    keys, values = of_equal_heads(key_choices, value_choices, plan.extents[HEAD])
    if query is None or query.heads != plan.extents[HEAD]:
        raise LayoutError
    full = [
        with_heads(choices, plan.extents[HEAD]) or found
        for choices, found in ((key_choices, keys), (value_choices, values))
    ]
    if full[0].reading.factor != keys.reading.factor:
        full = [keys, values]
    factor = query.reading.factor * keys.reading.factor
    scale = reads.scale if factor == 1.0 else reads.scale * factor
    return AttentionSite(
        node=reads.node,
        query=operand_of(layouts, query),
        key=operand_of(layouts, full[0]),
        value=operand_of(layouts, full[1]),
        key_heads=operand_of(layouts, keys),
        value_heads=operand_of(layouts, values),
        masks=tuple(_term(layouts, plan, term) for term in reads.terms),
        is_causal=reads.is_causal,
        dropout_p=reads.dropout_p,
        scale=scale,
        output_steps=output_steps(layouts, plan, reads.node),
        dtype=_computed_in(layouts, reads, chains),
        growth=growth_of(layouts, chains[1], keys.reading, plan, reads.query.node),
        softcap=reads.softcap,
        sinks=None if reads.sinks is None else _sinks(layouts, plan, reads.sinks),
    )


def _sinks(layouts: Layouts, plan: Roles, sinks: SinkReading) -> Sinks:
    """The sinks as one tensor of heads: the furthest from the softmax that depends on the head alone."""
    for reading in reversed(sinks.chain):
        index = tuple(simplify(part.xreplace(plan.meaning), plan.extents) for part in reading.index)
        heads = [part for part in index if not part.is_Integer]
        if heads in ([HEAD], []):
            return Sinks(reading.node, index, sinks.factor)
    if sinks.chain:
        raise NoSinks(sinks.chain[0].node)
    return Sinks(None, (), sinks.factor)


def _computed_in(layouts: Layouts, reads: Reads, chains: Sequence[Sequence[Reading]]) -> torch.dtype:
    """The dtype that the attention's precision comes to: the tensors' own, or what autocast makes of them."""
    found: torch.dtype = layouts.facts.example(reads.node).dtype
    for chain, product in zip(chains, (reads.dtypes[0], reads.dtypes[0], reads.dtypes[1]), strict=True):
        own = [layouts.facts.example(reading.node).dtype for reading in (chain[0], chain[-1])]
        narrowest = min((*own, product), key=lambda dtype: dtype.itemsize)
        found = torch.promote_types(found, narrowest)
    return found


def _plan(
    layouts: Layouts, reads: Reads, query: Sequence[Reading], key: Sequence[Reading], value: Sequence[Reading]
) -> Roles:
    """Tell the dimensions of the result apart."""
    shape = layouts.shape(reads.node)
    axes = [out_axis(dim) for dim in range(len(shape))]
    extent = dict(zip(axes, shape, strict=True))
    in_query, in_key, in_value = (_symbols(chain[0].index) for chain in (query, key, value))
    if KEY not in key[0].index or FEATURE not in query[0].index:
        raise LayoutError
    key_length = layouts.shape(key[0].node)[key[0].index.index(KEY)]
    depth = layouts.shape(query[0].node)[query[0].index.index(FEATURE)]
    features = _longer_than_one([axis for axis in axes if axis in in_value - in_query - in_key], extent)
    if not features:
        raise NoAttention
    if len(features) > 1:
        raise LayoutError
    length = reads.length
    if length is None:
        own = [axis for axis in axes if axis in in_query - in_key - in_value]
        lost = [axis for axis in axes if extent[axis] == 1 and axis not in in_query | in_key | in_value]
        length = _query_axis(own, lost, extent, reads, _appended(layouts, key, query, key_length))
    outer = [axis for axis in axes if axis not in (features[0], length)]
    unit = {axis for axis in outer if extent[axis] == 1}  # which tensors of one row may not show
    in_query, in_key = in_query | unit, in_key | unit
    if any(axis not in in_query | in_key | in_value for axis in outer):
        raise LayoutError
    spare = _spare(outer, unit, in_key)
    outer = [axis for axis in outer if axis not in spare]
    meaning, batch, heads = _batch_and_heads(outer, extent, in_key, query, key)
    if any(axis not in in_query for axis in outer):
        raise OwnQueries
    meaning |= dict.fromkeys(spare, ZERO) | {features[0]: VALUE_FEATURE}
    if length is not None:
        meaning[length] = QUERY
    extents = {
        BATCH: batch,
        HEAD: heads,
        QUERY: ONE if length is None else extent[length],
        KEY: key_length,
        FEATURE: depth,
        VALUE_FEATURE: extent[features[0]],
    }
    return Roles(meaning, extents)


def _appended(
    layouts: Layouts, key: Sequence[Reading], query: Sequence[Reading], key_length: sympy.Expr
) -> sympy.Expr | None:
    """How many queries there have to be: as many as the call has new keys; None where that cannot be told."""
    if key_length == 1:
        return ONE
    return appended_keys(layouts, key, query[0].node)


def _query_axis(
    own: list[sympy.Symbol],
    lost: list[sympy.Symbol],
    extent: dict[sympy.Symbol, sympy.Expr],
    reads: Reads,
    appended: sympy.Expr | None,
) -> sympy.Symbol | None:
    """The dimension of the queries; None: there is one query and no dimension.

    The other dimensions that the queries alone have are members of a group, which share their keys as queries do. A
    mask tells most of them apart, and in decoding the number of new keys: one token of a group of three is not three
    tokens.

    Args:
        own: dimensions that the queries alone have.
        lost: dimensions of extent 1 that no tensor shows, as views do not.
        extent: of the result's dimensions.
        reads: see `assemble`.
        appended: how many queries there have to be; None: not known.
    """
    long = [axis for axis in own if extent[axis] != 1]
    fitting = own if appended is None else [axis for axis in own if same(extent[axis], appended)]
    masked = [axis for axis in own if any(axis in _symbols(term.index or ()) for term in reads.terms)]
    for found in ([axis for axis in masked if axis in long], masked):
        if len(found) == 1 and found[0] in fitting:
            return found[0]
    for found in ([axis for axis in fitting if axis in long], fitting):
        if found:
            return found[-1]
    if lost and (appended == 1 or not own):
        return lost[-1]
    if appended == 1:
        return None
    if not own:
        raise NoAttention
    return (long or own)[-1]


def _spare(outer: list[sympy.Symbol], unit: set[sympy.Symbol], in_key: set[sympy.Symbol]) -> list[sympy.Symbol]:
    """Dimensions of extent 1 beyond what batch and heads need: three if one of them is a group's, else two."""
    needed = 3 if any(axis not in in_key for axis in outer) else 2
    return [axis for axis in reversed(outer) if axis in unit][: max(0, len(outer) - needed)]


def _longer_than_one(axes: list[sympy.Symbol], extent: dict[sympy.Symbol, sympy.Expr]) -> list[sympy.Symbol]:
    """Of several dimensions those that are not of extent 1, if there are any."""
    return [axis for axis in axes if extent[axis] != 1] or axes[-1:]


def _batch_and_heads(
    outer: list[sympy.Symbol],
    extent: dict[sympy.Symbol, sympy.Expr],
    in_key: set[sympy.Symbol],
    query: Sequence[Reading],
    key: Sequence[Reading],
) -> tuple[dict[sympy.Symbol, sympy.Expr], sympy.Expr, sympy.Expr]:
    """What the dimensions mean that are neither queries nor features, with the extents of batch and heads."""
    if not outer:
        return {}, ONE, ONE
    if len(outer) == 1:
        (only,) = outer
        heads = _merged_heads(only, query)
        if heads is not None:
            return {only: BATCH * heads + HEAD}, sympy.cancel(extent[only] / heads), sympy.Integer(heads)
        shared = any(only not in _symbols(reading.index) for reading in key) and extent[only] != 1
        if only not in in_key or shared or _merged_heads(only, key) is not None:
            return {only: HEAD}, ONE, extent[only]
        return {only: BATCH}, extent[only], ONE
    grouped = [axis for axis in outer if axis not in in_key]
    if len(outer) == 2:
        batch, heads_axis = outer[::-1] if grouped == outer[:1] else outer
        return {batch: BATCH, heads_axis: HEAD}, extent[batch], extent[heads_axis]
    if len(outer) != 3:
        raise LayoutError
    if len(grouped) == 1:
        place = outer.index(grouped[0])
        shared = outer[place - 1] if place else outer[1]
        (batch,) = (axis for axis in outer if axis not in (grouped[0], shared))
        low = extent[grouped[0]]
        meaning = {shared: sympy.floor(HEAD / low), grouped[0]: sympy.Mod(HEAD, low), batch: BATCH}
        return meaning, extent[batch], extent[shared] * low
    low = extent[outer[1]]
    meaning = {outer[0]: sympy.floor(BATCH / low), outer[1]: sympy.Mod(BATCH, low), outer[2]: HEAD}
    return meaning, extent[outer[0]] * low, extent[outer[2]]


def _merged_heads(merged: sympy.Symbol, chain: Sequence[Reading]) -> int | None:
    """How many heads lie in each row of a merged dimension, read off how the tensor was merged."""
    divisors = set()
    for reading in chain:
        for part in reading.index:
            for found in part.atoms(sympy.floor):
                numerator, denominator = sympy.fraction(found.args[0])
                if numerator == merged and denominator.is_Integer:
                    divisors.add(int(denominator))
    return max(divisors, default=None)


def _symbols(index: Index) -> set[sympy.Symbol]:
    return {symbol for part in index for symbol in part.free_symbols}


def _term(layouts: Layouts, plan: Roles, term: MaskTerm) -> MaskTerm:
    """A mask term with its index in terms of batch, head, query and key; None where it just broadcasts."""
    if term.index is None:
        return term
    index = tuple(simplify(part.xreplace(plan.meaning), plan.extents) for part in term.index)
    shape = layouts.shape(term.node)
    own = (BATCH, HEAD, QUERY, KEY)[4 - len(shape) :] if len(shape) <= 4 else ()
    plain = tuple(ZERO if e == 1 or plan.extents[s] == 1 else s for e, s in zip(shape, own, strict=False))
    return replace(term, index=None if index == plain else index)
