"""Single elements of tensors as sums of products: of elements that are not followed further, and of sines and cosines.

An index holds a number along every dimension that the caller fixed, such as the channel, and symbols elsewhere. Only
operators that place, scale and add elements are followed. A sum is kept where it mixes elements of one tensor at
different channels, which is what a rotation does; any other sum is an element of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from infllm_pass.graph.facts import GraphFacts, axis, size
from infllm_pass.graph.kinds import Call, Kind
from infllm_pass.graph.op_table import read, read_in_place, read_update, read_write
from infllm_pass.sites.layouts import LAYOUT_KINDS, Index, Layouts
from infllm_pass.sites.scalars import read_number

MOST_TERMS = 2
"""Terms of a sum that is followed: a rotation mixes two elements."""

ZERO = sympy.Integer(0)


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


class NotRead(Exception):
    """The graph writes to memory in a way that is not followed, so that what an element is cannot be told."""


class _Opaque(Exception):
    """A node's element is one of its own."""


class Elements:
    """The elements of one graph's tensors, and of those of graphs around it.

    Args:
        layouts: the graph's layout operators.
    """

    def __init__(self, layouts: Layouts) -> None:
        self._layouts: dict[GraphFacts, Layouts] = {layouts.facts: layouts}
        self._facts = layouts.facts
        self._known: dict[tuple[fx.Node, Index, str, int], Sum] = {}

    def of(self, node: fx.Node, index: Index, before: fx.Node | None = None) -> Sum:
        """The element of a tensor.

        Args:
            node: the tensor.
            index: the place, numbers along the dimensions that are told apart.
            before: the node that reads it; writes to its memory from there on do not count. None: the graph's last.

        Raises:
            NotRead: see there.
        """
        return _Reader(self, self._facts).element(node, index, "", before)

    def layouts_of(self, facts: GraphFacts) -> Layouts:
        """The layout operators of one of the graphs."""
        if facts not in self._layouts:
            self._layouts[facts] = Layouts(facts)
        return self._layouts[facts]


def _somewhere(node: fx.Node, dim: int, *index: sympy.Expr) -> sympy.Expr:
    """A place along a dimension that only the device knows, the same whenever a node asks for it."""
    name = f"{node.name}_{dim}"
    if index:
        return sympy.Function(name, integer=True, nonnegative=True)(*index)
    return sympy.Symbol(name, integer=True, nonnegative=True)


class _Reader:
    """Reads elements of one graph."""

    def __init__(self, elements: Elements, facts: GraphFacts) -> None:
        self.elements = elements
        self.facts = facts
        self.layouts = elements.layouts_of(facts)

    def element(self, node: fx.Node, index: Index, part: str, before: fx.Node | None) -> Sum:
        """See `Elements.of`; `part` as in `Element`, but never "inverse"."""
        if self.facts.is_written_elsewhere(node):
            raise NotRead
        overwritten = self.facts.is_overwritten(node)
        at = self.layouts.position(before) if overwritten and before is not None else -1
        key = (node, index, part, at)
        known = self.elements._known
        if key not in known:
            known[key] = self._written(node, index, part, before) if overwritten else self._computed(node, index, part)
        return known[key]

    def _computed(self, node: fx.Node, index: Index, part: str) -> Sum:
        try:
            found = self._rule(node, index, part)
        except _Opaque:
            found = None
        return _single(Element(node, index, part)) if found is None else found

    def _rule(self, node: fx.Node, index: Index, part: str) -> Sum | None:
        """What a node computes, of the elements of its arguments."""
        if node.op == "placeholder":
            binding = self.facts.bindings.get(node)
            return None if binding is None else _Reader(self.elements, binding[0]).element(binding[1], index, part, None)
        update = read_update(node)
        if update is not None and read(node) is None:
            return self._updated(node, update.target, update.entries, update.value, index, part)
        call = self.layouts.read(node) or read_in_place(node)
        if call is None:
            return None
        if call.kind in LAYOUT_KINDS or call.kind in (Kind.CAST, Kind.DETACH):
            return self._moved(node, call, index, part)
        rule = _RULES.get(call.kind)
        return None if rule is None else rule(self, node, call.args, index, part)

    def _moved(self, node: fx.Node, call: Call, index: Index, part: str) -> Sum | None:
        source = call.args.get("input")
        if not isinstance(source, fx.Node):
            return None
        if not self.layouts.is_tensor(source):
            return self._part_of_list(node, source, call.args.get("index"), index, part)
        if call.kind in (Kind.CAST, Kind.DETACH):
            return self.element(source, index, part, node)
        moved = self.layouts.step(node, source, index)
        return None if moved is None else self.element(source, moved, part, node)

    def _part_of_list(self, node: fx.Node, source: fx.Node, number: Any, index: Index, part: str) -> Sum | None:
        """An element of one of the tensors that a tensor was split into."""
        call = self.layouts.read(source)
        whole = None if call is None else call.args.get("input")
        parts = self.layouts.example(source)
        if call is None or not self.layouts.is_tensor(whole) or not isinstance(number, int):
            return None
        rank = len(self.layouts.shape(whole))
        dim = call.args.get("dim", 0) % rank
        if call.kind is Kind.UNBIND:
            place = number % len(parts)
            return self.element(whole, (*index[:dim], sympy.Integer(place), *index[dim:]), part, node)
        if call.kind is not Kind.SPLIT:
            return None
        start = sum((size(each.shape[dim]) for each in parts[: number % len(parts)]), ZERO)
        return self.element(whole, (*index[:dim], index[dim] + start, *index[dim + 1 :]), part, node)

    def _written(self, node: fx.Node, index: Index, part: str, before: fx.Node | None) -> Sum:
        """An element of a tensor that the graph writes to, as the last write before a node leaves it."""
        if node.op == "placeholder" and node in self.facts.bindings and not self._writers(node, before):
            return self._computed(node, index, part)
        for writer in reversed(self._writers(node, before)):
            if writer is node:
                break
            target = writer.args[0]
            if read_in_place(writer) is not None and self.layouts.latest(node, writer) == target:
                return self._computed(writer, index, part)
            write = read_write(writer)
            if write is None or self.layouts.latest(node, writer) is not self.layouts.latest(target, writer):
                raise NotRead
            place = self._place_in_value(writer, write.entries, write.value, index)
            if place is not None:
                return self._value(write.value, place, part, writer)
        return self._computed(node, index, part)

    def _writers(self, node: fx.Node, before: fx.Node | None) -> list[fx.Node]:
        """The nodes that write to a tensor's memory after it is made, in order."""
        first = self.layouts.position(node)
        last = self.layouts.position(before) if before is not None and before.graph is node.graph else None
        found = self.layouts.writers(node)
        return [each for each in found if first <= self.layouts.position(each) and (last is None or each < before)]

    def _updated(
        self, node: fx.Node, target: fx.Node, entries: Sequence[Any], value: Any, index: Index, part: str
    ) -> Sum | None:
        """An element of a copy of a tensor in which some elements were replaced."""
        try:
            place = self._place_in_value(node, entries, value, index)
        except NotRead:
            return None
        return self._value(value, place, part, node) if place is not None else self.element(target, index, part, node)

    def _value(self, value: Any, place: Index, part: str, writer: fx.Node) -> Sum:
        number = read_number(self.facts, value)
        if number is not None:
            return _number(number)
        if not self.layouts.is_tensor(value):
            raise NotRead
        return self.element(value, place, part, writer)

    def _place_in_value(
        self, writer: fx.Node, entries: Sequence[Any], value: Any, index: Index
    ) -> Index | None:
        """Where a written value holds what ends up at an index; None: the write leaves that place alone.

        What is written at places that only the device knows is taken for the new part of a cache.

        Raises:
            NotRead: it is not known whether the place is written to.
        """
        place: list[sympy.Expr] = []
        gathered = False
        shape = self.layouts.shape(value) if self.layouts.is_tensor(value) else ()
        for dim, (entry, at) in enumerate(zip(entries, index, strict=True)):
            if isinstance(entry, slice) and entry == slice(None):
                place.append(at)
            elif isinstance(entry, slice):
                inside = self._in_slice(entry, at, _somewhere(writer, dim))
                if inside is None:
                    return None
                place.append(inside)
            elif isinstance(entry, int):
                if at.is_Integer and at != entry:
                    return None
            elif at.is_Integer:
                raise NotRead
            elif not gathered:
                gathered = True
                others = sum(isinstance(each, slice) for each in entries)
                place += [_somewhere(writer, dim + more) for more in range(max(1, len(shape) - others))]
        excess = len(place) - len(shape)
        if excess < 0:
            raise NotRead
        kept = place[excess:]
        return tuple(ZERO if extent == 1 else at for at, extent in zip(kept, shape, strict=True))

    def _in_slice(self, entry: slice, at: sympy.Expr, somewhere: sympy.Expr) -> sympy.Expr | None:
        """Where a slice counts a place from its own start; None: outside of it."""
        if not at.is_Integer:
            return somewhere
        bounds = (entry.start, entry.stop, entry.step)
        if any(bound is not None and not isinstance(bound, int) for bound in bounds):
            raise NotRead
        start, stop, step = entry.start or 0, entry.stop, entry.step or 1
        if start < 0 or (stop is not None and stop < 0):
            raise NotRead
        if at < start or (stop is not None and at >= stop) or (at - start) % step:
            return None
        return (at - start) // step

    def operand(self, node: fx.Node, argument: Any, index: Index, part: str = "") -> Sum:
        """An element of an argument of an elementwise operator, for one of its result's."""
        number = read_number(self.facts, argument)
        if number is not None:
            return _number(0.0 if part == "imaginary" else number)
        if not self.layouts.is_tensor(argument):
            raise _Opaque
        if part == "imaginary" and not self.layouts.example(argument).is_complex():
            return _number(0.0)
        place = self.layouts.broadcast(argument, index, self.layouts.shape(node))
        if place is None:
            raise _Opaque
        own = part if self.layouts.example(argument).is_complex() else ""
        return self.element(argument, place, own, node)


def _single(element: Element) -> Sum:
    return frozenset([((element,), 1.0)])


def _number(value: float) -> Sum:
    return frozenset([((), value)]) if value else frozenset()


def _times(left: Sum, right: Sum) -> Sum:
    """The product of two sums.

    Raises:
        _Opaque: it has too many terms.
    """
    if len(left) * len(right) > MOST_TERMS:
        raise _Opaque
    terms = [
        (tuple(sorted((*a, *b), key=hash)), first * second) for a, first in left for b, second in right
    ]
    return frozenset(terms)


def _plus(left: Sum, right: Sum, sign: float = 1.0) -> Sum:
    """The sum of two sums, if it mixes elements of one tensor.

    Raises:
        _Opaque: it does not.
    """
    terms = dict(left)
    for product, number in right:
        terms[product] = terms.get(product, 0.0) + sign * number
    found = frozenset((product, number) for product, number in terms.items() if number)
    if len(found) < 2:
        return found
    if len(found) == MOST_TERMS and mixed(found):
        return found
    raise _Opaque


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


_Rule = Callable[[_Reader, fx.Node, dict[str, Any], Index, str], "Sum | None"]


def _mul(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    left, right = args.get("input"), args.get("other")
    if not part:
        return _times(run.operand(node, left, index), run.operand(node, right, index))
    a, b = (run.operand(node, left, index, each) for each in ("real", "imaginary"))
    c, d = (run.operand(node, right, index, each) for each in ("real", "imaginary"))
    if part == "real":
        return _plus(_times(a, c), _times(b, d), -1.0)
    return _plus(_times(a, d), _times(b, c))


def _div(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    by = args.get("other")
    number = read_number(run.facts, by)
    above = run.operand(node, args.get("input"), index, part)
    if number is not None:
        return _times(above, _number(1.0 / number)) if number else None
    if part or not run.layouts.is_tensor(by) or set(args) - {"input", "other"}:
        return None
    place = run.layouts.broadcast(by, index, run.layouts.shape(node))
    return None if place is None else _times(above, _single(Element(by, place, "inverse")))


def _add(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return _sum(run, node, args, index, part, 1.0)


def _sub(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return _sum(run, node, args, index, part, -1.0)


def _sum(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str, sign: float) -> Sum | None:
    if set(args) - {"input", "other"} and args.get("alpha", 1) != 1:
        return None
    left, right = (run.operand(node, args.get(name), index, part) for name in ("input", "other"))
    return _plus(left, right, sign)


def _neg(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return _times(run.operand(node, args.get("input"), index, part), _number(-1.0))


def _cos(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return None if part else frozenset([((Wave("cos", run.operand(node, args.get("input"), index)),), 1.0)])


def _sin(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return None if part else frozenset([((Wave("sin", run.operand(node, args.get("input"), index)),), 1.0)])


def _polar(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    wave = Wave("cos" if part == "real" else "sin", run.operand(node, args.get("angle"), index))
    return _times(run.operand(node, args.get("abs"), index), frozenset([((wave,), 1.0)]))


def _complex(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return run.operand(node, args.get("real" if part == "real" else "imag"), index)


def _view_as_complex(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return run.element(args["input"], (*index, sympy.Integer(part == "imaginary")), "", node)


def _view_as_real(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    if not index[-1].is_Integer:
        return None
    return run.element(args["input"], index[:-1], "imaginary" if index[-1] else "real", node)


def _cat(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    parts = args.get("tensors")
    dim = args.get("dim", 0) % len(index)
    if not isinstance(parts, (list, tuple)) or not all(map(run.layouts.is_tensor, parts)):
        return None
    if not index[dim].is_Integer:
        return _appended(run, node, parts, dim, index, part)
    start: sympy.Expr = ZERO
    for each in parts:
        extent = run.layouts.shape(each)[dim]
        if not extent.is_Integer:
            return None
        if index[dim] < start + extent:
            return run.element(each, (*index[:dim], index[dim] - start, *index[dim + 1 :]), part, node)
        start += extent
    return None


def _appended(
    run: _Reader, node: fx.Node, parts: Sequence[fx.Node], dim: int, index: Index, part: str
) -> Sum | None:
    """An element of what a graph appends to a cache: of the one part that is not an input, nor empty."""
    new = [each for each in parts if run.layouts.example(each).numel() != 0 and not _is_input(run.layouts, each)]
    if len(new) != 1:
        return None
    return run.element(new[0], (*index[:dim], _somewhere(node, dim), *index[dim + 1 :]), part, node)


def _is_input(layouts: Layouts, node: fx.Node) -> bool:
    places = tuple(axis(dim) for dim in range(len(layouts.shape(node))))
    *_, (end, _) = layouts.readings(node, places, scaled=False)
    return end.node.op in ("placeholder", "get_attr") and end.node not in layouts.facts.bindings


def _stack(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    parts = args.get("tensors")
    dim = args.get("dim", 0) % len(index)
    if not isinstance(parts, (list, tuple)) or not index[dim].is_Integer:
        return None
    return run.element(parts[int(index[dim])], (*index[:dim], *index[dim + 1 :]), part, node)


def _outer(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    left, right = args.get("input"), args.get("vec2")
    if part or not run.layouts.is_tensor(left) or not run.layouts.is_tensor(right):
        return None
    return _times(run.element(left, index[:1], "", node), run.element(right, index[1:], "", node))


def _matmul(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    """A product of matrices of which one has a single column, the other a single row."""
    pair = args.get("input"), args.get("other")
    if part or not all(map(run.layouts.is_tensor, pair)):
        return None
    left, right = (run.layouts.shape(each) for each in pair)
    if len(left) < 2 or len(right) < 2 or left[-1] != 1:
        return None
    shape = run.layouts.shape(node)
    places = [(*index[:-1], ZERO), (*index[:-2], ZERO, index[-1])]
    wholes = [(*shape[:-1], sympy.Integer(1)), (*shape[:-2], sympy.Integer(1), shape[-1])]
    found = [run.layouts.broadcast(each, at, whole) for each, at, whole in zip(pair, places, wholes, strict=True)]
    if None in found:
        return None
    return _times(*(run.element(each, at, "", node) for each, at in zip(pair, found, strict=True)))


def _einsum(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    """A product of two tensors that sums over nothing."""
    equation, operands = args.get("equation"), args.get("operands", ())
    if part or not isinstance(equation, str) or len(operands) != 2 or not all(map(run.layouts.is_tensor, operands)):
        return None
    inputs, arrow, output = equation.replace(" ", "").replace("...", "").partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != 2 or set("".join(letters)) - set(output):
        return None
    missing = len(index) - len(output)
    place = dict(zip(output, index[missing:], strict=True))
    found = []
    for each, own in zip(operands, letters, strict=True):
        dots = len(run.layouts.shape(each)) - len(own)
        if dots < 0 or dots > missing:
            return None
        found.append((*index[missing - dots : missing], *(place[letter] for letter in own)))
    return _times(*(run.element(each, at, "", node) for each, at in zip(operands, found, strict=True)))


def _gather(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    source = args.get("input")
    if not run.layouts.is_tensor(source) or args.get("dim") is None:
        return None
    dim = args["dim"] % len(index)
    if index[dim].is_Integer and run.layouts.shape(node)[dim] != 1:
        return None
    return run.element(source, (*index[:dim], _somewhere(node, dim, *index), *index[dim + 1 :]), part, node)


def _embedding(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    weight = args.get("weight")
    if not run.layouts.is_tensor(weight):
        return None
    return run.element(weight, (_somewhere(node, 0, *index[:-1]), index[-1]), part, node)


def _where(run: _Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    """What a graph puts into a cache: of two tensors the one that is not an input."""
    pair = [args.get("input"), args.get("other")]
    new = [each for each in pair if run.layouts.is_tensor(each) and not _is_input(run.layouts, each)]
    if len(new) != 1 or not all(map(run.layouts.is_tensor, pair)):
        return None
    return run.operand(node, new[0], index, part)


_RULES: dict[Kind, _Rule] = {
    Kind.MUL: _mul,
    Kind.DIV: _div,
    Kind.ADD: _add,
    Kind.SUB: _sub,
    Kind.NEG: _neg,
    Kind.COS: _cos,
    Kind.SIN: _sin,
    Kind.POLAR: _polar,
    Kind.COMPLEX: _complex,
    Kind.VIEW_AS_COMPLEX: _view_as_complex,
    Kind.VIEW_AS_REAL: _view_as_real,
    Kind.CAT: _cat,
    Kind.STACK: _stack,
    Kind.OUTER: _outer,
    Kind.MATMUL: _matmul,
    Kind.EINSUM: _einsum,
    Kind.GATHER: _gather,
    Kind.EMBEDDING: _embedding,
    Kind.WHERE: _where,
}

__all__ = ["Element", "Elements", "NotRead", "Product", "Sum", "Wave", "mixed"]
