"""Elements of tensors, and sums of products of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from infllm_pass.sites.layouts import Index

MOST_TERMS = 2
"""Terms of a sum that is followed: a rotation mixes two elements."""


@dataclass(frozen=True)
class Element:
    """An element of a tensor that is not followed further.

    Attributes:
        node: the tensor.
        index: the place in it.
        part: "real" or "imaginary" of a complex element, "inverse" for what it divides; "" for the element itself.
    """

    node: fx.Node
    index: Index
    part: str = ""

    def beside(self, other: Element) -> bool:
        """Whether another element lies in the same tensor, a known number of places away along every dimension."""
        if self.node is not other.node or (self.index, self.part) == (other.index, other.part):
            return False
        return all(a == b or (a - b).is_Integer for a, b in zip(self.index, other.index, strict=True))


@dataclass(frozen=True)
class Wave:
    """The sine or cosine of a sum.

    Attributes:
        function: "sin" or "cos".
        angle: the sum.
    """

    function: str
    angle: Sum


Factor: TypeAlias = "Element | Wave"
Product: TypeAlias = "tuple[Factor, ...]"
Sum: TypeAlias = "frozenset[tuple[Product, float]]"


class Opaque(Exception):
    """A node's element is one of its own; never leaves the reading of elements."""


def single(element: Element) -> Sum:
    """An element by itself."""
    return frozenset([((element,), 1.0)])


def number_of(value: float) -> Sum:
    """A number; 0 is the sum of nothing."""
    return frozenset([((), value)]) if value else frozenset()


def times(left: Sum, right: Sum) -> Sum:
    """The product of two sums.

    Raises:
        Opaque: it has too many terms.
    """
    if len(left) * len(right) > MOST_TERMS:
        raise Opaque
    terms = [(tuple(sorted((*a, *b), key=hash)), first * second) for a, first in left for b, second in right]
    return frozenset(terms)


def plus(left: Sum, right: Sum, sign: float = 1.0) -> Sum:
    """The sum of two sums, if it mixes elements of one tensor.

    Raises:
        Opaque: it does not.
    """
    terms = dict(left)
    for product, number in right:
        terms[product] = terms.get(product, 0.0) + sign * number
    found = frozenset((product, number) for product, number in terms.items() if number)
    if len(found) < 2:
        return found
    if len(found) == MOST_TERMS and mixed(found):
        return found
    raise Opaque


def mixed(terms: Sum) -> list[tuple[Element, Element]]:
    """Of a sum of two products, the elements of one tensor that one holds at another channel than the other."""
    if len(terms) != MOST_TERMS:
        return []
    (first, _), (second, _) = sorted(terms, key=hash)
    return [
        (a, b)
        for a in first
        for b in second
        if isinstance(a, Element) and isinstance(b, Element) and a not in second and b not in first and a.beside(b)
    ]
