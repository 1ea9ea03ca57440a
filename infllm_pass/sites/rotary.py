"""The rotary embedding of a site's keys, read off the dataflow: which channels it mixes, and by which frequencies.

A rotated channel is a sum of two elements of one tensor, each times a sine or cosine; the two channels that mix the
same two elements are a pair (RoFormer, arXiv 2104.09864, section 3.2). How they are numbered, half-split
``d, d + D/2``, interleaved ``2i, 2i + 1`` or otherwise, follows from where the graph reads them and is never assumed.
"""

from __future__ import annotations

import cmath
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.graph.constants import Constants
from infllm_pass.graph.facts import example_of
from infllm_pass.sites.elements import Elements, NotRead
from infllm_pass.sites.forms import form_of
from infllm_pass.sites.index_algebra import FEATURE
from infllm_pass.sites.layouts import Layouts
from infllm_pass.sites.site import AttentionSite
from infllm_pass.sites.sums import Element, Factor, Product, Sum, Wave, mixed

logger = logging.getLogger("infllm_pass")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a head's channels.

    Attributes:
        unrotated: channels that it leaves as they are.
        pairs: channels that it turns together, those of the lowest frequency first.
        pairing: how the pairs are numbered, for people.
        order: what their order was read off, for people; "" where their frequencies are known.
    """

    unrotated: tuple[int, ...]
    pairs: tuple[Pair, ...]
    pairing: str
    order: str


class RotaryReader:
    """Reads the rotary embeddings of one graph's sites.

    Args:
        layouts: the graph's layout operators.
    """

    def __init__(self, layouts: Layouts) -> None:
        self._layouts = layouts
        self._elements = Elements(layouts)
        self._constants = Constants(layouts.facts.held)
        self._known: dict[Any, Rotary | str] = {}

    def read(self, site: AttentionSite, head_dim: int) -> Rotary | str:
        """The rotary embedding of a site's keys, or why none is known.

        Args:
            site: the site.
            head_dim: channels of its keys.
        """
        form = form_of(self._layouts, site.key_heads.node, site.key_heads.index)
        found = self._known.get(form) if form is not None else None
        if found is None:
            found = self._read(site, head_dim)
            self._known[form] = found
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("channels: keys %s: %s", site.key_heads.node.name, found)
        return found

    def _read(self, site: AttentionSite, head_dim: int) -> Rotary | str:
        key = site.key_heads
        sums: list[Sum] = []
        for channel in range(head_dim):
            place = {FEATURE: sympy.Integer(channel)}
            try:
                sums.append(self._elements.of(key.node, tuple(part.xreplace(place) for part in key.index), site.node))
            except NotRead:
                return "the graph writes to its keys in a way that is not followed"
        _tell(sums)
        rotated = {channel: terms for channel, terms in enumerate(sums) if len(terms) > 1}
        if not rotated:
            return "no rotary embedding found"
        pairs = _pairs(rotated)
        if pairs is None:
            return "its keys mix channels otherwise than in pairs"
        turns = [_Turn.of(pair, sources, rotated) for pair, sources in pairs.items()]
        if any(turn is None for turn in turns):
            return "its keys mix channels in pairs that are no rotation"
        known = [turn for turn in turns if turn is not None]
        ordered = self._by_frequency(known)
        if ordered is None:
            return "the order of its rotary frequencies is not known"
        unrotated = tuple(channel for channel in range(head_dim) if channel not in rotated)
        if self._is_hidden(unrotated, sums, known):
            return "some channels are made of positions in a way that is not followed"
        pairs_in_order, order = ordered
        return Rotary(unrotated, tuple(pairs_in_order), _pairing(sorted(pairs_in_order)), order)

    def _by_frequency(self, turns: Sequence[_Turn]) -> tuple[list[Pair], str] | None:
        """Pairs, the lowest frequency first, and what their order relies on beside known values."""
        values = [self._frequency(turn) for turn in turns]
        if all(value is not None for value in values):
            ranked = sorted(zip(values, turns, strict=True), key=lambda each: (each[0], -each[1].pair[0]))
            return [turn.pair for _, turn in ranked], ""
        places = _places(turns)
        if places is None:
            return None
        ranked_places = sorted(zip(places, turns, strict=True), key=lambda each: (each[0], each[1].pair), reverse=True)
        return [turn.pair for _, turn in ranked_places], "taken to fall with their index, as their values are not known"

    def _frequency(self, turn: _Turn) -> float | None:
        """The angle between two neighbouring positions, in radians; None: not known."""
        if turn.angle is not None:
            found, known = abs(turn.angle[1]), False
            for factor in turn.angle[0]:
                value = self._value(factor) if isinstance(factor, Element) else None
                found, known = (found * abs(value), True) if value is not None else (found, known)
            return found if known else None
        vectors = []
        for position in (0, 1):
            values = [self._value(each, position) for each in turn.coefficients]
            if None in values:
                return None
            vectors.append(complex(values[0] or 0.0, values[1] or 0.0))
        return abs(cmath.phase(vectors[1] / vectors[0])) if all(vectors) else None

    def _value(self, element: Element, position: int | None = None) -> float | None:
        """The value of an element of a constant; where its place depends on one thing only, that at a position."""
        tensor = self._constants.of(element.node)
        place = [part if position is None else _at(part, position) for part in element.index]
        if tensor is None or not all(part.is_Integer for part in place):
            return None
        if len({thing for part in element.index for thing in _unknowns(part)}) > 1:
            return None
        if any(at >= extent for at, extent in zip(place, tensor.shape, strict=True)):
            return None
        value = complex(tensor[tuple(map(int, place))].item())
        number = value.imag if element.part == "imaginary" else value.real
        if element.part == "inverse":
            return 1.0 / number if number else None
        return number

    def _is_hidden(self, unrotated: Sequence[int], sums: Sequence[Sum], turns: Sequence[_Turn]) -> bool:
        """Whether what is not rotated is computed from sines, cosines or angles by operators that are not followed."""
        made_of = {element.node for turn in turns for element in turn.made_of}
        marks = {node for node in made_of if not _counts(node)}
        sources = {element.node for turn in turns for element in turn.sources}
        factors = [factor for channel in unrotated for product, _ in sums[channel] for factor in product]
        leaves = {factor.node for factor in factors if isinstance(factor, Element)}
        return any(_reaches(leaf, marks) for leaf in leaves - sources)


@dataclass(frozen=True)
class _Turn:
    """One pair of channels, and what turns it.

    Attributes:
        pair: the channels, ascending.
        sources: the two elements that both channels are made of.
        coefficients: what the lower channel multiplies them with, where these are elements.
        angle: the factors and the number of the angle, where sines and cosines are computed from one.
    """

    pair: Pair
    sources: tuple[Element, Element]
    coefficients: tuple[Element, ...] = ()
    angle: tuple[Product, float] | None = None

    @property
    def made_of(self) -> list[Element]:
        """The elements that the rotation is made of."""
        if self.angle is None:
            return list(self.coefficients)
        return [factor for factor in self.angle[0] if isinstance(factor, Element)]

    @staticmethod
    def of(pair: Pair, sources: tuple[Element, Element], rotated: Mapping[int, Sum]) -> _Turn | None:
        """What turns a pair; None where that is no rotation."""
        matrix = _matrix([rotated[channel] for channel in pair], sources)
        if matrix is None:
            return None
        waves = [wave for wave, _ in matrix if isinstance(wave, Wave)]
        if len(waves) < len(matrix):
            elements = tuple(each for each, _ in matrix[:2] if isinstance(each, Element))
            return _Turn(pair, sources, elements) if len(elements) == 2 else None
        functions = [wave.function for wave in waves]
        signs = [number for (_, number), function in zip(matrix, functions, strict=True) if function == "sin"]
        turned = functions in (["cos", "sin", "sin", "cos"], ["sin", "cos", "cos", "sin"])
        angle = waves[0].angle
        if not turned or any(wave.angle != angle for wave in waves) or signs[0] * signs[1] > 0 or len(angle) != 1:
            return None
        return _Turn(pair, sources, angle=next(iter(angle)))


_Coefficient = tuple[Factor, float]


def _matrix(rows: Sequence[Sum], sources: tuple[Element, Element]) -> list[_Coefficient] | None:
    """What two sums multiply two elements with, row by row.

    Factors beside it are left out: those that a row has with both elements, as a norm after the rotation, and those
    that an element has in both rows, as a norm before it.
    """
    cells: list[tuple[list[Factor], float]] = []
    for terms in rows:
        for source in sources:
            products = [(list(product), number) for product, number in terms if source in product]
            if len(products) != 1:
                return None
            products[0][0].remove(source)
            cells += products
    for one, other in ((0, 1), (2, 3), (0, 2), (1, 3)):
        first, second = cells[one][0], cells[other][0]
        for factor in list(first):
            if factor in second:
                first.remove(factor)
                second.remove(factor)
    turning = [(_turning(factors), number) for factors, number in cells]
    found = [(factor, number) for factor, number in turning if factor is not None]
    return found if len(found) == len(cells) else None


def _turning(factors: Sequence[Factor]) -> Factor | None:
    """Of several factors the one that is a sine or cosine, or the only one."""
    waves: list[Factor] = [factor for factor in factors if isinstance(factor, Wave)]
    found = waves or list(factors)
    return found[0] if len(found) == 1 else None


def _pairs(rotated: Mapping[int, Sum]) -> dict[Pair, tuple[Element, Element]] | None:
    """The pairs of channels, with the two elements that both are made of; None: not all channels have one mate."""
    options: dict[frozenset[Element], list[int]] = {}
    for channel, terms in rotated.items():
        for pair in mixed(terms):
            options.setdefault(frozenset(pair), []).append(channel)
    found: dict[Pair, tuple[Element, Element]] = {}
    mates: dict[int, int] = {}
    complete = [(elements, channels) for elements, channels in options.items() if len(channels) == 2]
    for elements, channels in sorted(complete, key=lambda each: _likely(each[0], rotated[each[1][0]]), reverse=True):
        low, high = channels
        if mates.get(low, high) != high or mates.get(high, low) != low:
            return None
        if low not in mates:
            mates |= {low: high, high: low}
            first, second = elements
            found[low, high] = (first, second)
    return found if len(mates) == len(rotated) else None


def _likely(elements: frozenset[Element], terms: Sum) -> tuple[int, int, str]:
    """How likely elements are what is turned, and not what turns it: the same for all pairs of one embedding.

    What is left of the factors should be sines, cosines or inputs; keys depend on the head, sines do not.
    """
    rest = [factor for product, _ in terms for factor in product if factor not in elements]
    turning = sum(isinstance(factor, Wave) or factor.node.op != "call_function" for factor in rest)
    symbols = {symbol for element in elements for part in element.index for symbol in part.free_symbols}
    return turning, len(symbols), next(iter(elements)).node.name


def _unknowns(part: sympy.Expr) -> set[sympy.Expr]:
    """What a place depends on: elements of tensors, else indices."""
    found: set[sympy.Expr] = part.atoms(AppliedUndef) or part.free_symbols
    return found


def _at(part: sympy.Expr, position: int) -> sympy.Expr:
    """A place where what it depends on has a value."""
    return part.xreplace({thing: sympy.Integer(position) for thing in _unknowns(part)})


def _places(turns: Sequence[_Turn]) -> list[int] | None:
    """For each pair the place of its frequency in the one vector that all are read from; None: there is no such."""
    by_node: dict[tuple[fx.Node, int], dict[int, int]] = {}
    for number, turn in enumerate(turns):
        for element in turn.made_of:
            for dim, part in enumerate(element.index):
                if part.is_Integer:
                    seen = by_node.setdefault((element.node, dim), {})
                    seen[number] = min(int(part), seen.get(number, int(part)))
    for seen in by_node.values():
        if len(seen) == len(turns) == len(set(seen.values())):
            return [seen[number] for number in range(len(turns))]
    return None


def _counts(node: fx.Node) -> bool:
    """Whether a tensor holds integers, as positions are."""
    example = example_of(node)
    return isinstance(example, torch.Tensor) and not (example.is_floating_point() or example.is_complex())


def _reaches(leaf: fx.Node, marks: set[fx.Node], most: int = 12) -> bool:
    """Whether a node is computed from one of some others, so many nodes before it at most."""
    pending, seen = [leaf], {leaf}
    while pending and len(seen) <= most:
        node = pending.pop()
        if node in marks:
            return True
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        pending += new
    return False


def _pairing(pairs: Sequence[Pair]) -> str:
    """The name of a numbering of pairs."""
    gaps = {high - low for low, high in pairs}
    lows = [low for low, _ in pairs]
    if gaps == {1}:
        return "interleaved"
    if len(gaps) == 1 and lows == list(range(lows[0], lows[0] + len(lows))) and gaps == {len(lows)}:
        return "half-split"
    return "pairs of its own"


def _tell(sums: Sequence[Sum]) -> None:
    """The proof's steps, in the log."""
    if logger.isEnabledFor(logging.DEBUG):
        for channel, terms in enumerate(sums):
            logger.debug("channels: channel %d is %s", channel, text_of(terms))


def text_of(terms: Sum) -> str:
    """A sum, for people."""
    parts = []
    for product, number in sorted(terms, key=str):
        factors = [_factor_text(factor) for factor in product]
        sign = [] if number == 1.0 and factors else ["-" if number == -1.0 and factors else f"{number:g}"]
        parts.append(" ".join([*sign, *factors]))
    return " + ".join(parts) or "0"


def _factor_text(factor: Factor) -> str:
    if isinstance(factor, Wave):
        return f"{factor.function}({text_of(factor.angle)})"
    place = f"{factor.node.name}[{', '.join(map(str, factor.index))}]"
    return f"{factor.part} {place}" if factor.part else place
