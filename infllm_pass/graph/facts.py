"""Per-graph analysis shared by proofs and rewrites: example values, sizes, index symbols, mutated memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.compat.shapes import expression_of
from infllm_pass.compat.tensors import storage_id, unwrap_functorch
from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.graph.op_table import Kind, read, read_in_place, written_arguments


@cache
def axis(dim: int) -> sympy.Symbol:
    """The index along dimension `dim` of whatever tensor an expression belongs to."""
    return sympy.Symbol(f"i{dim}", integer=True, nonnegative=True)


@cache
def hidden_axis(name: str) -> sympy.Symbol:
    """An index that no dimension of the tensor shows: that of a ``vmap`` level, or an argument of a mask function."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def size(value: int | torch.SymInt) -> sympy.Expr:
    """A tensor size as sympy sees it; sizes of one graph share Dynamo's own symbols."""
    if isinstance(value, torch.SymInt):
        return expression_of(value)
    return sympy.Integer(int(value))


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two integer expressions are equal for all values of their symbols."""
    return bool(a == b) or sympy.expand(a - b) == 0


Place = tuple["GraphFacts", fx.Node]
"""A node, and the graph that it belongs to."""


class GraphFacts:
    """What is known of one graph before any proof: example tensors, and which memory is overwritten.

    Args:
        graph: a graph whose nodes carry example values, see `example_of`.
        overwritten: storages that this graph, or one that it is nested with, writes to, and the first node of the
            root graph that writes to each; None where another graph writes.
        bindings: for the placeholders of a nested graph, the outer graph's facts and node they stand for.
        held: tensors that modules hold, which may be read by value.
        transform: the function transform that the whole graph runs inside, see `transforms`; "": none.
        callers: the graphs that call a nested graph and hand it operands.

    Attributes:
        given: for the placeholders of a nested graph that its calls hand different nodes, what each of them hands over.
        depth: how many graphs it is nested in.
    """

    def __init__(
        self,
        graph: fx.Graph,
        overwritten: Mapping[int, fx.Node | None],
        bindings: dict[fx.Node, Place] | None = None,
        held: HeldTensors | None = None,
        callers: Iterable[GraphFacts] = (),
        transform: str = "",
    ) -> None:
        self.graph = graph
        self._transform = transform
        self.bindings = bindings or {}
        self.given: dict[fx.Node, tuple[Place, ...]] = {}
        self.held = HeldTensors({}) if held is None else held
        self.callers = tuple(callers)
        self.depth: int = 1 + max((each.depth for each in self.callers), default=-1)
        self._overwritten = overwritten

    def nested(
        self,
        graph: fx.Graph,
        bindings: dict[fx.Node, Place],
        callers: Iterable[GraphFacts] = (),
        transform: str | None = None,
    ) -> GraphFacts:
        """The facts of a graph that is nested in this one; it runs inside a transform of its own where one is given."""
        inside = self._transform if transform is None else transform
        return GraphFacts(graph, self._overwritten, bindings, self.held, callers, inside)

    def transform_of(self, node: fx.Node) -> str:
        """The innermost transform of ``torch.func``, or forward-mode differentiation, that a node runs inside."""
        return self.transforms.get(node, self._transform)

    @cached_property
    def transforms(self) -> dict[fx.Node, str]:
        """The nodes that this graph runs inside a transform, and the innermost one's name."""
        return transforms(self.graph)

    def is_within(self, outer: GraphFacts) -> bool:
        """Whether a graph is this one, or one around it through whatever calls."""
        return self is outer or (bool(self.callers) and all(each.is_within(outer) for each in self.callers))

    def origin(self, node: fx.Node) -> Place:
        """The node that one stands for, in the graph where it is no placeholder that a call binds."""
        return self.bindings.get(node, (self, node))

    @cached_property
    def hidden_axes(self) -> dict[fx.Node, tuple[sympy.Symbol, ...]]:
        """For each node inside ``vmap`` calls, the indices that are hidden there."""
        return hidden_axes(self.graph)

    @cached_property
    def size_sources(self) -> dict[sympy.Symbol, tuple[fx.Node, int | None]]:
        """Inputs to read a dynamic size from: a node, and a dimension unless the node itself is the number.

        Of tensors those of few dimensions are taken: to read a mask's size would keep the mask.
        """
        found: dict[sympy.Symbol, tuple[fx.Node, int | None]] = {}
        inputs = [(node, self.example(node)) for node in self.graph.nodes if node.op == "placeholder"]
        tensors = [(node, example.shape) for node, example in inputs if isinstance(example, torch.Tensor)]
        for node, shape in sorted(tensors, key=lambda each: len(each[1])):
            for dim, extent in enumerate(shape):
                found.setdefault(size(extent), (node, dim))
        found.update((size(example), (node, None)) for node, example in inputs if isinstance(example, torch.SymInt))
        return {expr: source for expr, source in found.items() if isinstance(expr, sympy.Symbol)}

    def example(self, node: fx.Node) -> Any:
        """The fake tensor, SymInt or constant that was recorded for a node; None if none was."""
        return example_of(node)

    def is_overwritten(self, node: fx.Node) -> bool:
        """Whether anything writes to the memory this node's tensor lives in."""
        return storage(node) in self._overwritten

    def is_written_elsewhere(self, node: fx.Node) -> bool:
        """Whether another graph, nested with this one, writes to the memory this node's tensor lives in."""
        return self.is_overwritten(node) and self._overwritten[storage(node)] is None  # type: ignore[index]

    def is_final(self, node: fx.Node) -> bool:
        """Whether this graph writes to a node's memory, all of it before the node: its values stay what they are."""
        if self.is_written_elsewhere(node) or not self.is_overwritten(node):
            return False
        cell = storage(node)
        writers = [each for each in self.graph.nodes if cell in map(storage, written_arguments(each))]
        return bool(writers) and node.graph is self.graph and all(each <= node for each in writers)

    def is_settled(self, node: fx.Node, reader: fx.Node | None) -> bool:
        """Whether nothing can have written to a node's memory when a node of this graph reads it."""
        if not self.is_overwritten(node):
            return True
        writer = self._overwritten[storage(node)]  # type: ignore[index]
        if writer is None:
            return False
        if reader is not None and reader.graph is writer.graph and reader < writer:
            return True
        filled = read_in_place(writer)
        if filled is None or filled.kind is not Kind.MASKED_FILL or node.graph is not writer.graph:
            return False
        return reader is writer or self._is_written_once(node, writer)

    def _is_written_once(self, node: fx.Node, writer: fx.Node) -> bool:
        """Whether a node is the result of the only write to its memory, or a view of it."""
        while node is not writer:
            views = [source for source in node.all_input_nodes if storage(source) == storage(node)]
            if len(views) != 1 or node < writer:
                return False
            (node,) = views
        cell = storage(node)
        return all(each is writer or cell not in map(storage, written_arguments(each)) for each in self.graph.nodes)


def example_of(node: fx.Node) -> Any:
    """What tracing recorded for a node's value: Dynamo as ``example_value``, ``torch.export`` as ``val``."""
    return node.meta.get("example_value", node.meta.get("val"))


def storage(node: fx.Node) -> int | None:
    """Identity of the memory a node's tensor lives in; None for a node that is no tensor."""
    value = example_of(node)
    if not isinstance(value, torch.Tensor):
        return None
    return storage_id(unwrap_functorch(value))  # a tensor under vmap has no memory of its own


def overwritten_storages(root: fx.Graph, nested: Iterable[fx.Graph]) -> dict[int, fx.Node | None]:
    """Memory that nodes write to in place, with the first of the root graph's that does; None where others do."""
    found: dict[int, fx.Node | None] = {}
    for graph in (root, *nested):
        for node in graph.nodes:
            for cell in map(storage, written_arguments(node)):
                if cell is not None and graph is not root:
                    found[cell] = None
                elif cell is not None:
                    found.setdefault(cell, node)
    return found


def level_axis(level: Any) -> sympy.Symbol:
    """The index that a level hides."""
    return hidden_axis(f"vmap{level}")


def hidden_axes(graph: fx.Graph) -> dict[fx.Node, tuple[sympy.Symbol, ...]]:
    """For each node inside ``vmap`` calls, the indices that are hidden there."""
    found: dict[fx.Node, tuple[sympy.Symbol, ...]] = {}
    levels: list[list[sympy.Symbol]] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_vmap_increment_nesting":
            levels.append([])
        elif name == "_vmap_decrement_nesting" and levels:
            levels.pop()
        if levels:
            call = read(node)
            if call is not None and call.kind is Kind.HIDE_DIM:
                levels[-1].append(level_axis(call.args.get("level")))
            found[node] = tuple(dict.fromkeys(symbol for level in levels for symbol in level))
    return found


_TRANSFORMS = {
    "_grad_increment_nesting": ("_grad_decrement_nesting", "torch.func.grad or vjp"),
    "_jvp_increment_nesting": ("_jvp_decrement_nesting", "torch.func.jvp"),
    "_vmap_increment_nesting": ("_vmap_decrement_nesting", "torch.func.vmap"),
    "_func_increment_nesting": ("_func_decrement_nesting", "torch.func.functionalize"),
    "_enter_dual_level": ("_exit_dual_level", "forward-mode differentiation"),
}
"""Calls that begin a transform, those that end it, and what people call it."""


def transforms(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes that a graph runs inside transforms of ``torch.func``, and the innermost one's name."""
    found: dict[fx.Node, str] = {}
    active: list[tuple[str, str]] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _TRANSFORMS:
            active.append(_TRANSFORMS[name])
        elif any(name == end for end, _ in active):
            while active.pop()[0] != name:
                pass
        if active:
            found[node] = active[-1][1]
    return found
