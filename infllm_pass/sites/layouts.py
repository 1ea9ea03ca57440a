"""Index maps of layout operators: where each element of a view, permutation or repetition is read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.compat.aten import SET_GRAD_ENABLED
from infllm_pass.graph.facts import GraphFacts, axis, size, storage
from infllm_pass.graph.op_table import Call, Kind, read, read_in_place, written_arguments
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.sites.scalars import read_number

LAYOUT_KINDS = {
    Kind.IDENTITY,
    Kind.GETITEM,
    Kind.UNSQUEEZE,
    Kind.EXPAND,
    Kind.RESHAPE,
    Kind.TRANSPOSE,
    Kind.PERMUTE,
    Kind.REPEAT,
    Kind.REPEAT_INTERLEAVE,
}
"""Kinds that move elements and compute nothing; their source is the argument ``input``."""

Index = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Reading:
    """An element of a product's operand, as an element of another node.

    Attributes:
        node: the node.
        index: the place in it, one expression for a dimension.
        factor: what the element is multiplied with on its way to the product.
    """

    node: fx.Node
    index: Index
    factor: float = 1.0


@dataclass(frozen=True)
class Returned:
    """An output of the graph that views, copies or widens a node.

    Attributes:
        place: number of the output.
        index: where the node holds the element of the output at ``(axis(0), axis(1), …)``.
    """

    place: int
    index: Index


class Layouts:
    """The layout operators of one graph.

    Args:
        facts: the graph's facts.
    """

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self._plain = GraphFacts(facts.graph, {}, facts.bindings)
        self._positions = {node: number for number, node in enumerate(facts.graph.nodes)}
        self._steps: dict[Any, Index | None] = {}
        self._maps: dict[tuple[fx.Node, fx.Node], Index | None] = {}
        self._writes: list[tuple[int, int | None]] = [
            (number, storage(target)) for node, number in self._positions.items() for target in written_arguments(node)
        ]
        self._switches: list[tuple[int, Any]] = [
            (number, node.args[0]) for node, number in self._positions.items() if node.target is SET_GRAD_ENABLED
        ]

    def example(self, node: Any) -> Any:
        """The example value of an argument: a node's, or the argument itself."""
        return self.facts.example(node) if isinstance(node, fx.Node) else node

    def is_tensor(self, argument: Any) -> bool:
        """Whether an argument is a node that holds a tensor."""
        return isinstance(argument, fx.Node) and isinstance(self.facts.example(argument), torch.Tensor)

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """A tensor's sizes as symbolic expressions."""
        return tuple(size(extent) for extent in self.facts.example(node).shape)

    def broadcast(self, operand: fx.Node, index: Index, shape: Sequence[sympy.Expr]) -> Index | None:
        """Where an operand of an elementwise operator is read for one element of its result.

        Args:
            operand: the operand.
            index: the place in the result.
            shape: the result's sizes.
        """
        own = self.shape(operand)
        pad = len(shape) - len(own)
        if pad < 0:
            return None
        zero = sympy.Integer(0)
        return tuple(
            zero if extent == 1 and shape[pad + dim] != 1 else index[pad + dim] for dim, extent in enumerate(own)
        )

    def step(self, node: fx.Node, source: fx.Node, index: Index) -> Index | None:
        """The place in `source` of the element of `node` at `index`, for one layout operator between the two."""
        if not self.is_tensor(source):
            return None
        if self.facts.example(source).dim() == 0:
            return ()
        if (node, source) not in self._maps:
            key = self._signature(node, source)
            if key not in self._steps:
                self._steps[key] = self._evaluate_step(node, source)
            self._maps[node, source] = self._steps[key]
        moved = self._maps[node, source]
        place = {axis(dim): expr for dim, expr in enumerate(index)}
        return None if moved is None else tuple(_substituted(part, place) for part in moved)

    def _signature(self, node: fx.Node, source: fx.Node) -> Any:
        """All that a layout operator's index map depends on, equal for the layers of a model."""

        def described(argument: fx.Node) -> Any:
            example = self.facts.example(argument)
            if isinstance(example, torch.Tensor):
                return ("source",) if argument is source else argument
            return size(example) if isinstance(example, (int, torch.SymInt)) else argument

        arguments = fx.map_arg((node.args, node.kwargs), described)
        return node.target, repr(arguments), self.shape(source), self.shape(node)

    def _evaluate_step(self, node: fx.Node, source: fx.Node) -> Index | None:
        """The place in `source` of each element of `node`, in terms of ``axis(d)`` of `node`."""
        interpreter = Interpreter(self._plain, leaves=frozenset([source]))
        value = interpreter.evaluate(node)
        element: Any = None if value is None else value.value
        if isinstance(element, sympy.Ne):
            element = element.lhs  # how an element of a boolean tensor is written
        if not isinstance(element, sympy.core.function.AppliedUndef):
            return None
        unknown = interpreter.unknowns.get(element.func.__name__)
        if unknown is None or unknown.node is not source or len(element.args) != self.facts.example(source).dim():
            return None
        return element.args  # type: ignore[no-any-return]

    def readings(self, node: fx.Node, index: Index, *, scaled: bool) -> Iterator[tuple[Reading, fx.Node | None]]:
        """The node itself, and what it views, copies, repeats, widens or (if `scaled`) scales, nearest first.

        With each the node of the chain that reads it, None for the first.
        """
        reading, reader = Reading(node, index), None
        while True:
            yield reading, reader
            call = read(reading.node)
            if call is None:
                return
            source, factor, moved = call.args.get("input"), 1.0, None
            if call.kind in LAYOUT_KINDS and isinstance(source, fx.Node):
                moved = self.step(reading.node, source, reading.index)
            elif call.kind is Kind.CAST and isinstance(source, fx.Node):
                moved = reading.index if self._widens(source, reading.node) else None
            elif scaled and call.kind in (Kind.MUL, Kind.DIV):
                source, number = self.scaling(call.kind, call.args)
                if source is not None and number is not None:
                    moved, factor = reading.index, number
            if moved is None or not isinstance(source, fx.Node) or not self.is_tensor(source):
                return
            if self.gradients(reading.node) != self.gradients(node) or self._is_changed_copy(reading.node, source):
                return
            reading, reader = Reading(source, moved, reading.factor * factor), reading.node

    def _is_changed_copy(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node has memory of its own, not that of its source, and anything writes to it."""
        return storage(node) != storage(source) and self.facts.is_overwritten(node)

    def scaling(self, kind: Kind, args: dict[str, Any]) -> tuple[fx.Node | None, float | None]:
        """For a product or quotient of a tensor and a number, the tensor and what it is multiplied with."""
        if set(args) - {"input", "other"}:
            return None, None
        left, right = args.get("input"), args.get("other")
        number = read_number(self.facts, right)
        if isinstance(left, fx.Node) and number is not None:
            if kind is Kind.MUL:
                return left, number
            return (left, 1.0 / number) if number else (None, None)
        number = read_number(self.facts, left)
        if kind is Kind.MUL and isinstance(right, fx.Node) and number is not None:
            return right, number
        return None, None

    def _widens(self, source: fx.Node, result: fx.Node) -> bool:
        """Whether a cast keeps every value as it is."""
        if not self.is_tensor(source):
            return False
        before, after = self.facts.example(source).dtype, self.facts.example(result).dtype
        floats = before.is_floating_point and after.is_floating_point
        return bool(floats and torch.promote_types(before, after) == after)

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that write to the memory of a node's tensor, in order."""
        cell, nodes = storage(node), list(self._positions)
        return [nodes[number] for number, written in self._writes if written == cell]

    def position(self, node: fx.Node) -> int:
        """The place of a node in the graph."""
        return self._positions[node]

    @cached_property
    def data(self) -> frozenset[fx.Node]:
        """The nodes that depend on a tensor which a call brings along: on more than sizes and what modules hold."""
        found: set[fx.Node] = set()
        for node in self._positions:
            brought = node.op == "placeholder" and self.is_tensor(node) and not self._is_held(node)
            if brought or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def returned(self) -> dict[fx.Node, list[Returned]]:
        """The outputs of the graph that hold elements of a node, for every node of which there are some."""
        found: dict[fx.Node, list[Returned]] = {}
        (outputs,) = self.facts.graph.output_node().args
        for place, output in enumerate(outputs if isinstance(outputs, (list, tuple)) else ()):
            if self.is_tensor(output):
                index = tuple(axis(dim) for dim in range(self.example(output).dim()))
                for reading, _ in self.readings(output, index, scaled=False):
                    found.setdefault(reading.node, []).append(Returned(place, reading.index))
        return found

    def _is_held(self, node: fx.Node) -> bool:
        """Whether a module holds an input; exported graphs tell parameters by the gradients that they ask for."""
        example = self.facts.example(node)
        return node in self.facts.held.tensors or isinstance(example, torch.nn.Parameter) or example.requires_grad

    def gradients(self, node: fx.Node) -> Any:
        """Whether a node is computed with gradients; None where the graph does not say, as everywhere in most."""
        return next((mode for number, mode in reversed(self._switches) if number < self._positions[node]), None)

    def latest(self, node: Any, reader: fx.Node) -> Any:
        """The node that stands for a tensor's value where `reader` reads it: what last wrote over it, if anything did.

        An operator in place returns the tensor that it was given, and graphs go on to name any of its results.

        Args:
            node: an argument of `reader`; what is no node is returned as it is.
            reader: the node that reads it.
        """
        if not isinstance(node, fx.Node):
            return node
        while (written := read_in_place(node)) is not None and isinstance(written.args["input"], fx.Node):
            node = written.args["input"]
        names = [node]
        for name in names:
            names += [user for user in name.users if user.args[:1] == (name,) and read_in_place(user) is not None]
        before = self._positions[reader]
        earlier = [name for name in names if self._positions[name] < before]
        return max(earlier, key=self._positions.__getitem__, default=node)

    def read(self, node: fx.Node) -> Call | None:
        """What a node computes, see `vocabulary.read`, of the latest values of its arguments."""
        call = read(node)
        if call is None:
            return None
        return replace(call, args={name: self.latest(argument, node) for name, argument in call.args.items()})

    def disturbed(self, path: Sequence[fx.Node], end: fx.Node) -> fx.Node | None:
        """A node of a path that something beside the path writes to before the path ends."""
        inside, last = {self._positions[node] for node in path}, self._positions[end]
        for node in path:
            cell, first = storage(node), self._positions[node]
            if any(first < at <= last and at not in inside and written == cell for at, written in self._writes):
                return node
        return None

    def stable(self, node: fx.Node, reader: fx.Node, later: fx.Node) -> bool:
        """Whether nothing writes to a node's memory between a node that reads it and a later one."""
        if not self.facts.is_overwritten(node):
            return True
        cell = storage(node)
        times = [number for number, written in self._writes if written == cell]
        first, last = self._positions[reader], self._positions[later]
        return bool(times) and not any(first < number <= last for number in times)


def _substituted(part: sympy.Expr, place: dict[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    """A part of an index map at a place; most parts are one of its symbols, or a number."""
    if part.is_Symbol:
        return place.get(part, part)
    return part if part.is_Integer else part.xreplace(place)
