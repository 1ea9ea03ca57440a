"""From two products and a softmax to ``[B, H, L, D]`` tensors, by index algebra.

Both matchers say how an attention reads its tensors: for an element ``out[o0, o1, …]`` of the result, where the
queries, the keys and the values are read, in terms of ``o0, o1, …``, the key index and the feature index. Which of the
result's dimensions are batch, heads, queries and value features follows from which tensor depends on which of them;
layout operators are then chosen that bring each tensor to ``[B, H, L, D]``, and the result back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.graphs import fake_mode_of
from infllm_pass.masks.predicate import MaskTerm
from infllm_pass.sites.algebra import BATCH, FEATURE, HEAD, KEY, QUERY, VALUE_FEATURE, simplify, split_digits
from infllm_pass.sites.layouts import Index, Layouts, Reading
from infllm_pass.sites.site import AttentionSite, Operand, Step

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def out_axis(dim: int) -> sympy.Symbol:
    """The index along dimension `dim` of the result."""
    return sympy.Symbol(f"o{dim}", integer=True, nonnegative=True)


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


@dataclass(frozen=True)
class _Plan:
    """What the dimensions of the result mean."""

    meaning: dict[sympy.Symbol, sympy.Expr]
    extents: dict[sympy.Symbol, sympy.Expr]


class LayoutError(Exception):
    """The dimensions of an attention could not be told apart; never leaves the matchers."""


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
    query = _fewest_heads(_choices(layouts, plan, chains[0], QUERY, FEATURE))
    key_choices = _choices(layouts, plan, chains[1], KEY, FEATURE)
    value_choices = _choices(layouts, plan, chains[2], KEY, VALUE_FEATURE)
    keys, values = _of_equal_heads(key_choices, value_choices, plan.extents[HEAD])
    if query is None or query.heads != plan.extents[HEAD]:
        raise LayoutError
    full = [
        _with_heads(choices, plan.extents[HEAD]) or found
        for choices, found in ((key_choices, keys), (value_choices, values))
    ]
    if full[0].reading.factor != keys.reading.factor:
        full = [keys, values]
    factor = query.reading.factor * keys.reading.factor
    scale = reads.scale if factor == 1.0 else reads.scale * factor
    return AttentionSite(
        node=reads.node,
        query=_operand(layouts, query),
        key=_operand(layouts, full[0]),
        value=_operand(layouts, full[1]),
        key_heads=_operand(layouts, keys),
        value_heads=_operand(layouts, values),
        masks=tuple(_term(layouts, plan, term) for term in reads.terms),
        is_causal=reads.is_causal,
        dropout_p=reads.dropout_p,
        scale=scale,
        output_steps=_output_steps(layouts, plan, reads.node),
        dtype=_computed_in(layouts, reads, chains),
    )


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
) -> _Plan:
    """Tell the dimensions of the result apart."""
    shape = layouts.shape(reads.node)
    axes = [out_axis(dim) for dim in range(len(shape))]
    extent = dict(zip(axes, shape, strict=True))
    in_query, in_key, in_value = (_symbols(chain[0].index) for chain in (query, key, value))
    features = [axis for axis in axes if axis in in_value - in_query - in_key]
    queries = [axis for axis in axes if axis in in_query - in_key - in_value]
    if not features or not queries:
        raise NoAttention
    if len(features) > 1:
        raise LayoutError
    masked = [axis for axis in queries if any(axis in _symbols(term.index or ()) for term in reads.terms)]
    length = masked[0] if len(masked) == 1 else queries[-1]
    outer = [axis for axis in axes if axis not in (features[0], length)]
    if any(axis not in in_query | in_key | in_value for axis in outer):
        raise LayoutError
    meaning, batch, heads = _batch_and_heads(outer, extent, in_key, query, key)
    if any(axis not in in_query for axis in outer):
        raise OwnQueries
    meaning |= {length: QUERY, features[0]: VALUE_FEATURE}
    key_length = layouts.shape(key[0].node)[key[0].index.index(KEY)] if KEY in key[0].index else None
    depth = layouts.shape(query[0].node)[query[0].index.index(FEATURE)] if FEATURE in query[0].index else None
    if key_length is None or depth is None:
        raise LayoutError
    extents = {
        BATCH: batch,
        HEAD: heads,
        QUERY: extent[length],
        KEY: key_length,
        FEATURE: depth,
        VALUE_FEATURE: extent[features[0]],
    }
    return _Plan(meaning, extents)


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
        if only not in in_key or _merged_heads(only, key) is not None:
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


@dataclass(frozen=True)
class _Choice:
    """A node to read a tensor from, and the operations that bring it to ``[B, H, L, D]``."""

    reading: Reading
    steps: tuple[Step, ...]
    heads: sympy.Expr


def _choices(
    layouts: Layouts, plan: _Plan, chain: Sequence[Reading], length: sympy.Symbol, feature: sympy.Symbol
) -> list[_Choice]:
    """Every reading of a tensor that layout operators can bring to ``[B, H, L, D]``, nearest to the product first."""
    extents = dict(plan.extents)
    for part, extent in zip(chain[0].index, layouts.shape(chain[0].node), strict=True):
        symbol = simplify(part.xreplace(plan.meaning), plan.extents)
        if length is KEY and symbol in extents:
            extents[symbol] = extent  # Dynamo may give sizes that a call forces to be equal symbols of their own
    plan = _Plan(plan.meaning, extents)
    return [choice for reading in chain if (choice := _bring(layouts, plan, reading, length, feature)) is not None]


def _of_equal_heads(keys: Sequence[_Choice], values: Sequence[_Choice], heads: sympy.Expr) -> tuple[_Choice, _Choice]:
    """Keys and values with the fewest heads that both can have."""
    found = _fewest_heads(keys), _fewest_heads(values)
    counts = [choice.heads for choice in found if choice is not None]
    for count in (*counts, heads):
        pair = _with_heads(keys, count), _with_heads(values, count)
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    raise LayoutError


def _fewest_heads(choices: Sequence[_Choice]) -> _Choice | None:
    """The choice with the fewest heads, then the fewest operations, then nearest to the product."""
    if not choices:
        return None
    fewest = choices[0].heads
    for choice in choices:
        if bool((fewest / choice.heads).is_integer):
            fewest = choice.heads
    return _with_heads(choices, fewest)


def _with_heads(choices: Sequence[_Choice], heads: sympy.Expr) -> _Choice | None:
    """The choice with so many heads that takes the fewest operations, then nearest to the product."""
    return min((choice for choice in choices if choice.heads == heads), key=lambda c: len(c.steps), default=None)


def _bring(
    layouts: Layouts, plan: _Plan, reading: Reading, length: sympy.Symbol, feature: sympy.Symbol
) -> _Choice | None:
    """The operations that bring one reading to ``[B, H, L, D]``, if layout operators can."""
    index = [simplify(part.xreplace(plan.meaning), plan.extents) for part in reading.index]
    shape = layouts.shape(reading.node)
    digits: list[tuple[sympy.Expr, sympy.Expr]] = []  # of every dimension that is split and not of extent 1
    steps: list[Step] = []
    unit = tuple(dim for dim, extent in enumerate(shape) if extent == 1)
    for dim, part in enumerate(index):
        if dim in unit:
            continue
        parts = split_digits(part, plan.extents)
        if parts is None:
            return None
        if len(parts) == 2:
            steps.append(("unflatten", (len(digits), parts[0][1])))
            digits += [(parts[0][0], sympy.cancel(shape[dim] / parts[0][1])), (parts[1][0], sympy.Integer(parts[0][1]))]
        else:
            digits.append((part, shape[dim]))
    if unit and len(unit) < len(shape):
        steps.insert(0, ("squeeze", unit))
    elif unit:
        return None
    order: list[int] = []
    merges: list[Step] = []
    missing: list[int] = []
    for place, symbol in enumerate((BATCH, HEAD, length, feature)):
        taken = [n for n, (digit, _) in enumerate(digits) if symbol in digit.free_symbols]
        whole = _whole(
            symbol, [digits[n] for n in taken], plan.extents[symbol], shared=symbol is HEAD and length is KEY
        )
        if whole is None:
            return None
        if not taken:
            missing.append(place)
        if len(taken) == 2:
            high_first = sorted(taken, key=lambda n: isinstance(digits[n][0], sympy.Mod))
            merges.append(("flatten", (place, place + 1)))
            order += high_first
        else:
            order += taken
        if symbol is HEAD:
            heads = whole
    if len(order) != len(digits):
        return None
    if order != sorted(order):
        steps.append(("permute", tuple(order)))
    steps += _merged_in_place(merges, missing)
    if 0 in missing and plan.extents[BATCH] != 1:
        if length is QUERY:
            return None
        steps.append(("expand", ()))
    return _Choice(reading, _tidy(tuple(steps), layouts, reading), heads)


def _merged_in_place(merges: list[Step], missing: list[int]) -> list[Step]:
    """Merge digits and make the missing dimensions, counted as they stand while the tensor grows to four."""
    steps: list[Step] = []
    for _, (place, _last) in merges:
        first = place - sum(gap < place for gap in missing)
        steps.append(("flatten", (first, first + 1)))
    steps += [("unsqueeze", (place,)) for place in missing]
    return steps


def _tidy(steps: tuple[Step, ...], layouts: Layouts, reading: Reading) -> tuple[Step, ...]:
    """The steps without a squeeze that unsqueezes undo."""
    if steps and steps[0][0] == "squeeze" and all(name == "unsqueeze" for name, _ in steps[1:]):
        made = tuple(dim for _, dims in steps[1:] for dim in dims)
        if made == steps[0][1] and len(layouts.shape(reading.node)) == 4:
            return ()
    return steps


def _whole(
    symbol: sympy.Symbol, digits: list[tuple[sympy.Expr, sympy.Expr]], extent: sympy.Expr, *, shared: bool
) -> sympy.Expr | None:
    """How many values of an index a tensor's digits tell apart; None where they do not make it up.

    Args:
        symbol: the index.
        digits: expressions of it, each with the extent of its dimension.
        extent: the index's extent.
        shared: whether adjacent values may share one place, as the query heads of a group share a key head.
    """
    if not digits:
        return ONE if extent == 1 or shared or symbol is BATCH else None
    if len(digits) == 1:
        digit, count = digits[0]
        if digit == symbol:
            return count if count == extent else None
        if shared and isinstance(digit, sympy.floor):
            group = sympy.cancel(symbol / digit.args[0])
            return count if sympy.expand(group * count - extent) == 0 else None
        return None
    if len(digits) == 2:
        (high, high_count), (low, low_count) = sorted(digits, key=lambda pair: isinstance(pair[0], sympy.Mod))
        parted = high == sympy.floor(symbol / low_count) and low == sympy.Mod(symbol, low_count)
        return extent if parted and sympy.expand(high_count * low_count - extent) == 0 else None
    return None


def _operand(layouts: Layouts, choice: _Choice) -> Operand:
    node = choice.reading.node
    example = layouts.facts.example(node)
    with fake_mode_of(node) or nullcontext(), torch.no_grad():
        for name, numbers in choice.steps:
            if name == "unflatten":
                example = example.unflatten(numbers[0], (-1, numbers[1]))
            elif name == "flatten":
                example = example.flatten(*numbers)
            elif name in ("permute", "squeeze"):
                example = getattr(example, name)(numbers)
            elif name == "unsqueeze":
                example = example.unsqueeze(*numbers)
    return Operand(node, choice.steps, example)


def _term(layouts: Layouts, plan: _Plan, term: MaskTerm) -> MaskTerm:
    """A mask term with its index in terms of batch, head, query and key; None where it just broadcasts."""
    if term.index is None:
        return term
    index = tuple(simplify(part.xreplace(plan.meaning), plan.extents) for part in term.index)
    shape = layouts.shape(term.node)
    own = (BATCH, HEAD, QUERY, KEY)[4 - len(shape) :] if len(shape) <= 4 else ()
    plain = tuple(ZERO if e == 1 or plan.extents[s] == 1 else s for e, s in zip(shape, own, strict=False))
    return MaskTerm(term.node, term.role, None if index == plain else index, term.body, term.arguments)


def _output_steps(layouts: Layouts, plan: _Plan, node: fx.Node) -> tuple[Step, ...]:
    """The operations from ``[B, Hq, Lq, Dv]`` to the layout of the result."""
    shape = layouts.shape(node)
    present = [dim for dim, extent in enumerate(shape) if extent != 1]
    meanings = [simplify(plan.meaning[out_axis(dim)], plan.extents) for dim in present]
    flat: list[sympy.Expr] = []
    merges: list[int] = []
    for meaning in meanings:
        parts = split_digits(meaning, plan.extents)
        if parts is None:
            raise LayoutError
        if len(parts) == 2:
            merges.append(len(flat))
        flat += [digit for digit, _ in parts]
    steps: list[Step] = []
    sources: list[sympy.Expr] = []
    for symbol in (BATCH, HEAD, QUERY, VALUE_FEATURE):
        low = next((digit for digit in flat if isinstance(digit, sympy.Mod) and digit.args[0] == symbol), None)
        if low is None:
            sources.append(symbol)
            continue
        if not low.args[1].is_Integer:
            raise LayoutError
        steps.append(("unflatten", (len(sources), int(low.args[1]))))
        sources += [sympy.floor(symbol / low.args[1]), low]
    unit = tuple(n for n, source in enumerate(sources) if source not in flat)
    if unit:
        steps.append(("squeeze", unit))
    left = [source for source in sources if source in flat]
    order = tuple(left.index(digit) for digit in flat)
    if len(left) != len(flat):
        raise LayoutError
    if order != tuple(range(len(order))):
        steps.append(("permute", order))
    for done, place in enumerate(merges):
        steps.append(("flatten", (place - done, place - done + 1)))
    steps += [("unsqueeze", (dim,)) for dim in range(len(shape)) if dim not in present]
    if steps and steps[0][0] == "squeeze" and all(name == "unsqueeze" for name, _ in steps[1:]):
        made = tuple(dim for _, dims in steps[1:] for dim in dims)
        if len(shape) == 4 and made == steps[0][1]:
            return ()
    return tuple(steps)
