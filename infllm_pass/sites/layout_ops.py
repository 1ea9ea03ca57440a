"""Layout operations from a tensor of the graph to ``[B, H, L, D]``, and back for the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from infllm_pass.graph.subgraphs import fake_mode_of
from infllm_pass.sites.index_algebra import BATCH, HEAD, KEY, QUERY, VALUE_FEATURE, simplify, split_digits
from infllm_pass.sites.layouts import Layouts, Reading
from infllm_pass.sites.site import Operand, Step

ONE = sympy.Integer(1)


def out_axis(dim: int) -> sympy.Symbol:
    """The index along dimension `dim` of the result."""
    return sympy.Symbol(f"o{dim}", integer=True, nonnegative=True)


class LayoutError(Exception):
    """The dimensions of an attention could not be told apart; never leaves the matchers."""


@dataclass(frozen=True)
class Roles:
    """What the dimensions of the result mean."""

    meaning: dict[sympy.Symbol, sympy.Expr]
    extents: dict[sympy.Symbol, sympy.Expr]


@dataclass(frozen=True)
class Choice:
    """A node to read a tensor from, and the operations that bring it to ``[B, H, L, D]``."""

    reading: Reading
    steps: tuple[Step, ...]
    heads: sympy.Expr


def choices_of(
    layouts: Layouts, plan: Roles, chain: Sequence[Reading], length: sympy.Symbol, feature: sympy.Symbol
) -> list[Choice]:
    """Every reading of a tensor that layout operators can bring to ``[B, H, L, D]``, nearest to the product first."""
    extents = dict(plan.extents)
    for part, extent in zip(chain[0].index, layouts.shape(chain[0].node), strict=True):
        symbol = simplify(part.xreplace(plan.meaning), plan.extents)
        if length is KEY and symbol in extents:
            extents[symbol] = extent  # Dynamo may give sizes that a call forces to be equal symbols of their own
    plan = Roles(plan.meaning, extents)
    return [choice for reading in chain if (choice := _bring(layouts, plan, reading, length, feature)) is not None]


def of_equal_heads(keys: Sequence[Choice], values: Sequence[Choice], heads: sympy.Expr) -> tuple[Choice, Choice]:
    """Keys and values with the fewest heads that both can have."""
    found = fewest_heads(keys), fewest_heads(values)
    counts = [choice.heads for choice in found if choice is not None]
    for count in (*counts, heads):
        pair = with_heads(keys, count), with_heads(values, count)
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    raise LayoutError


def fewest_heads(choices: Sequence[Choice]) -> Choice | None:
    """The choice with the fewest heads, then the fewest operations, then nearest to the product."""
    if not choices:
        return None
    fewest = choices[0].heads
    for choice in choices:
        if bool((fewest / choice.heads).is_integer):
            fewest = choice.heads
    return with_heads(choices, fewest)


def with_heads(choices: Sequence[Choice], heads: sympy.Expr) -> Choice | None:
    """The choice with so many heads that takes the fewest operations, then nearest to the product."""
    return min((choice for choice in choices if choice.heads == heads), key=lambda c: len(c.steps), default=None)


def _bring(
    layouts: Layouts, plan: Roles, reading: Reading, length: sympy.Symbol, feature: sympy.Symbol
) -> Choice | None:
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
    if unit:
        steps.insert(0, ("squeeze", unit))
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
    return Choice(reading, _tidy(tuple(steps), layouts, reading), heads)


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


def operand_of(layouts: Layouts, choice: Choice) -> Operand:
    """A choice as an operand, with an example of the tensor that its operations give."""
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
    return Operand(node, choice.steps, example, choice.reading.index)


def output_steps(layouts: Layouts, plan: Roles, node: fx.Node) -> tuple[Step, ...]:
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
