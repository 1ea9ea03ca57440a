"""Single elements of tensors as sums of products: of elements that are not followed further, and of sines and cosines.

An index holds a number along every dimension that the caller fixed, such as the channel, and symbols elsewhere. Only
operators that place, scale and add elements are followed. A sum is kept where it mixes elements of one tensor at
different channels, which is what a rotation does; any other sum is an element of its own.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from infllm_pass.graph.facts import GraphFacts, axis, size
from infllm_pass.graph.kinds import Call, Kind
from infllm_pass.graph.op_table import Write, read, read_copy, read_in_place, read_update, read_write
from infllm_pass.sites.element_rules import RULES, ZERO, somewhere
from infllm_pass.sites.layouts import LAYOUT_KINDS, Index, Layouts
from infllm_pass.sites.scalars import read_number
from infllm_pass.sites.sums import Element, Opaque, Sum, number_of, single

MOST_DEEP = 64
"""Operators that are followed one after the other; what lies deeper is an element of its own."""


class NotRead(Exception):
    """The graph writes to memory in a way that is not followed, so that what an element is cannot be told."""


class Elements:
    """The elements of one graph's tensors, and of those of graphs around it.

    Args:
        layouts: the graph's layout operators.
    """

    def __init__(self, layouts: Layouts) -> None:
        self._layouts: dict[GraphFacts, Layouts] = {layouts.facts: layouts}
        self._facts = layouts.facts
        self._known: dict[tuple[fx.Node, Index, str, int], Sum] = {}
        self._calls: dict[fx.Node, Call | None] = {}
        self._numbers: dict[fx.Node, float | None] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._made: dict[tuple[object, str], fx.Node] = {}

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

    def same(self, node: fx.Node, facts: GraphFacts, depth: int = MOST_DEEP) -> fx.Node:
        """The first node that was asked for of those that compute the same, in the same way of the same."""
        if depth == 0:
            return node
        if node not in self._same:
            found = node
            call = read(node)
            if call is not None and call.kind is not Kind.DROPOUT and not facts.is_overwritten(node):
                names = {source: self.same(source, facts, depth - 1).name for source in node.all_input_nodes}
                key = (node.target, repr(fx.map_arg((node.args, node.kwargs), names.__getitem__)))
                found = self._made.setdefault(key, node)
            self._same[node] = found if found.graph is node.graph else node
        return self._same[node]

    def layouts_of(self, facts: GraphFacts) -> Layouts:
        """The layout operators of one of the graphs."""
        if facts not in self._layouts:
            self._layouts[facts] = Layouts(facts)
        return self._layouts[facts]


class _Reader:
    """Reads elements of one graph."""

    def __init__(self, elements: Elements, facts: GraphFacts) -> None:
        self.elements = elements
        self.facts = facts
        self.depth = 0
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
            self.depth += 1
            try:
                known[key] = (
                    self._written(node, index, part, before) if overwritten else self._computed(node, index, part)
                )
            finally:
                self.depth -= 1
        return known[key]

    def _computed(self, node: fx.Node, index: Index, part: str) -> Sum:
        try:
            found = self._rule(node, index, part) if self.depth < MOST_DEEP else None
        except Opaque:
            found = None
        return single(Element(self.elements.same(node, self.facts), index, part)) if found is None else found

    def _rule(self, node: fx.Node, index: Index, part: str) -> Sum | None:
        """What a node computes, of the elements of its arguments."""
        if node.op == "placeholder":
            binding = self.facts.bindings.get(node)
            return (
                None if binding is None else _Reader(self.elements, binding[0]).element(binding[1], index, part, None)
            )
        call = self._call(node)
        if call is None:
            update = read_update(node)
            return None if update is None else self._updated(node, update, index, part)
        if call.kind in LAYOUT_KINDS or call.kind in (Kind.CAST, Kind.DETACH):
            return self._moved(node, call, index, part)
        rule = RULES.get(call.kind)
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
        parts = self.layouts.example(source)
        if call is None or not isinstance(number, int) or not self.layouts.is_tensor(call.args.get("input")):
            return None
        whole = call.args["input"]
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
            place = self._place_in_view(node, index, writer)
            if place is not None and read_in_place(writer) is not None:
                return self._computed(writer, place, part)
            copied, write = read_copy(writer), read_write(writer)
            if place is not None and copied is not None:
                return self.operand(writer, copied, place, part)
            if place is not None and write is None:
                raise NotRead
            place = None if place is None or write is None else self._place_in_value(writer, write, place)
            if place is not None and write is not None:
                return self._value(write.value, place, part, writer)
        return self._computed(node, index, part)

    def _place_in_view(self, node: fx.Node, index: Index, writer: fx.Node) -> Index | None:
        """Where the tensor that is written to holds an element of a node; None: it does not.

        Raises:
            NotRead: it is no view of the node by slices alone.
        """
        view = writer.args[0]
        if not isinstance(view, fx.Node):
            raise NotRead
        whole = self.layouts.latest(node, writer)
        if self.layouts.latest(view, writer) is whole:
            return index
        shape = self.layouts.shape(view)
        places = tuple(axis(dim) for dim in range(len(shape)))
        chain = [reading for reading, _ in self.layouts.readings(view, places, scaled=False)]
        found = next((reading.index for reading in chain if reading.node is node), None)
        if found is None:
            raise NotRead
        back = [ZERO] * len(shape)
        for part, at, extent in zip(found, index, self.layouts.shape(node), strict=True):
            axes = [dim for dim in range(len(shape)) if axis(dim) in part.free_symbols]
            if not axes:
                if part.is_Integer and at.is_Integer and part != at:
                    return None
                if extent != 1 and not at.is_Integer:
                    raise NotRead
                continue
            dim, step = axes[0], part.coeff(axis(axes[0]))
            start = part - step * axis(dim)
            if not step.is_Integer or start.free_symbols & set(places):
                raise NotRead
            back[dim] = (at - start) / step
            if at.is_Integer and not (back[dim].is_Integer and 0 <= back[dim] < shape[dim]):
                return None
        return tuple(back)

    def _writers(self, node: fx.Node, before: fx.Node | None) -> list[fx.Node]:
        """The nodes that write to a tensor's memory after it is made, in order."""
        first = self.layouts.position(node)
        last = None if before is None else self.layouts.position(before)
        places = [(self.layouts.position(each), each) for each in self.layouts.writers(node)]
        return [each for place, each in places if first <= place and (last is None or place < last)]

    def _call(self, node: fx.Node) -> Call | None:
        """What a node computes."""
        calls = self.elements._calls
        if node not in calls:
            calls[node] = self.layouts.read(node) or read_in_place(node)
        return calls[node]

    def number(self, argument: Any) -> float | None:
        """The number that an argument stands for; None for anything else."""
        if not isinstance(argument, fx.Node):
            return read_number(self.facts, argument)
        numbers = self.elements._numbers
        if argument not in numbers:
            numbers[argument] = read_number(self.facts, argument)
        return numbers[argument]

    def _updated(self, node: fx.Node, update: Write, index: Index, part: str) -> Sum | None:
        """An element of a copy of a tensor in which some elements were replaced."""
        try:
            place = self._place_in_value(node, update, index)
        except NotRead:
            return None
        if place is None:
            return self.element(update.target, index, part, node)
        return self._value(update.value, place, part, node)

    def _value(self, value: Any, place: Index, part: str, writer: fx.Node) -> Sum:
        number = self.number(value)
        if number is not None:
            return number_of(number)
        if not self.layouts.is_tensor(value):
            raise NotRead
        return self.element(value, place, part, writer)

    def _place_in_value(self, writer: fx.Node, write: Write, index: Index) -> Index | None:
        """Where a written value holds what ends up at an index; None: the write leaves that place alone.

        What is written at places that only the device knows is taken for the new part of a cache.

        Raises:
            NotRead: it is not known whether the place is written to.
        """
        place: list[sympy.Expr] = []
        gathered = False
        shape = self.layouts.shape(write.value) if self.layouts.is_tensor(write.value) else ()
        extents = self.layouts.shape(write.target)
        for dim, (entry, at) in enumerate(zip(write.entries, index, strict=True)):
            counted = at.is_Integer and extents[dim] != 1
            if isinstance(entry, slice) and entry == slice(None):
                place.append(at)
            elif isinstance(entry, slice):
                inside = _in_slice(entry, at) if counted else somewhere(writer, dim)
                if inside is None:
                    return None
                place.append(inside)
            elif isinstance(entry, int):
                if counted and at != entry:
                    return None
            elif counted:
                raise NotRead
            elif not gathered:
                gathered = True
                others = sum(isinstance(each, slice) for each in write.entries)
                place += [somewhere(writer, dim + more) for more in range(max(1, len(shape) - others))]
        excess = len(place) - len(shape)
        if excess < 0:
            raise NotRead
        kept = place[excess:]
        return tuple(ZERO if extent == 1 else at for at, extent in zip(kept, shape, strict=True))

    def operand(self, node: fx.Node, argument: Any, index: Index, part: str = "") -> Sum:
        """An element of an argument of an elementwise operator, for one of its result's."""
        number = self.number(argument)
        if number is not None:
            return number_of(0.0 if part == "imaginary" else number)
        if not self.layouts.is_tensor(argument):
            raise Opaque
        if part == "imaginary" and not self.layouts.example(argument).is_complex():
            return number_of(0.0)
        place = self.layouts.broadcast(argument, index, self.layouts.shape(node))
        if place is None:
            raise Opaque
        own = part if self.layouts.example(argument).is_complex() else ""
        return self.element(argument, place, own, node)


def _in_slice(entry: slice, at: sympy.Expr) -> sympy.Expr | None:
    """Where a slice counts a place from its own start; None: outside of it.

    Raises:
        NotRead: its bounds are no plain numbers.
    """
    bounds = (entry.start, entry.stop, entry.step)
    if any(bound is not None and (not isinstance(bound, int) or bound < 0) for bound in bounds):
        raise NotRead
    start, step = entry.start or 0, entry.step or 1
    if at < start or (entry.stop is not None and at >= entry.stop) or (at - start) % step:
        return None
    return (at - start) // step
