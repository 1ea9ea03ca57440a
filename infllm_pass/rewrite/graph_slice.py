"""A graph as it was before the pass, and the part of it that one node depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from infllm_pass.graph.facts import example_of, hidden_axes, storage
from infllm_pass.graph.op_table import Kind, read, written_arguments
from infllm_pass.rewrite.source_text import Unwritable, literal, reference

FOLLOWED_USERS = 12
"""Nodes after a site that a wider slice takes: the second product and the layout of a handwritten attention."""


@dataclass(frozen=True)
class Step:
    """One node as it was when the graph was recorded; rewriting changes the node itself.

    Attributes:
        node: the node.
        args: its arguments then.
        kwargs: its arguments by name then.
        inputs: the nodes among both.
        users: the nodes that used it.
        writes: identities of the memory that it writes to.
        changes_mode: whether it changes how later nodes compute, as the begin of a ``vmap`` or of autocast does.
        in_vmap: whether its tensor hides a dimension, inside a ``vmap``.
        body: the graph that a ``get_attr`` node holds.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[fx.Node, ...]
    users: tuple[fx.Node, ...]
    writes: frozenset[int]
    changes_mode: bool
    in_vmap: bool
    body: RecordedGraph | None

    def is_known_input(self) -> bool:
        """Whether it can be an input of a smaller graph: a tensor or number whose example was recorded."""
        example = example_of(self.node)
        if isinstance(example, torch.Tensor):
            return not self.in_vmap and example.layout is torch.strided
        return isinstance(example, (int, float, torch.SymInt, torch.SymFloat))

    def is_opaque(self) -> bool:
        """Whether the pass sees nothing but data in its result, a tensor in memory of its own."""
        if not isinstance(example_of(self.node), torch.Tensor) or self.writes or self.node.op == "placeholder":
            return False
        if self.in_vmap:
            return False
        call = read(self.node)
        unknown = call is None or call.kind in (Kind.ATTENTION, Kind.FLEX_ATTENTION)  # which may be another site
        return unknown and storage(self.node) not in map(storage, self.inputs)

    def is_writable(self) -> bool:
        """Whether its call can be written as source, and made on tensors without data."""
        if self.node.op == "call_method" and self.node.target == "item":
            return False
        if self.node.op == "call_module" or (self.node.op == "get_attr" and self.body is None):
            return False
        try:
            if self.node.op == "call_function":
                reference(self.node.target)
            if self.node.op in ("call_function", "call_method"):
                literal((self.args, self.kwargs), {node: node.name for node in self.inputs})
        except Unwritable:
            return False
        return True


@dataclass
class RecordedGraph:
    """The nodes of one graph in order, as they were, and the graphs nested in it."""

    graph: fx.Graph
    steps: dict[fx.Node, Step] = field(default_factory=dict)

    @classmethod
    def of(cls, module: fx.GraphModule) -> RecordedGraph:
        """Record a graph and those nested in it."""
        recorded = cls(module.graph)
        hidden = hidden_axes(module.graph)
        for node in module.graph.nodes:
            tensors = [each for each in (node, *node.all_input_nodes) if isinstance(example_of(each), torch.Tensor)]
            written = {cell for cell in map(storage, written_arguments(node)) if cell is not None}
            recorded.steps[node] = Step(
                node,
                node.args,
                dict(node.kwargs),
                tuple(node.all_input_nodes),
                tuple(node.users),
                frozenset(written),
                node.op == "call_function" and read(node) is None and not tensors,
                node in hidden,
                _body(module, node),
            )
        return recorded

    def holds(self, graph: fx.Graph) -> bool:
        """Whether this is the record of a graph, or one of a graph that it is nested in."""
        bodies = (step.body for step in self.steps.values() if step.body is not None)
        return graph is self.graph or any(body.holds(graph) for body in bodies)

    def anchors(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of this graph that a node of it, or of a nested graph, stands for; none for a node added later."""
        if node in self.steps:
            return [node]
        holders = [step for step in self.steps.values() if step.body is not None and step.body.holds(node.graph)]
        return [user for step in holders for user in step.users]

    def with_users(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Nodes, and the first that use them, directly or not."""
        found = dict.fromkeys(nodes)
        pending = list(found)
        while pending and len(found) < FOLLOWED_USERS:
            for user in self.steps[pending.pop(0)].users:
                if user.op != "output" and user not in found:
                    found[user] = None
                    pending.append(user)
        return list(found)

    def slice(self, wanted: Iterable[fx.Node], *, cut_opaque: bool) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes that some nodes depend on, writes to the memory of these and changes of mode included.

        Args:
            wanted: the nodes.
            cut_opaque: whether results that the pass does not look into become inputs.

        Returns:
            The nodes to compute, and those to take as inputs.

        Raises:
            Unwritable: a node can be neither written nor an input.
        """
        kept: set[fx.Node] = set()
        inputs: set[fx.Node] = set()
        wanted = set(wanted)
        pending = [*wanted, *(node for node, step in self.steps.items() if step.changes_mode)]
        while pending:
            self._follow(pending, wanted, kept, inputs, cut_opaque)
            cells = set(map(storage, kept | inputs)) - {None}
            pending = [
                node
                for node, step in self.steps.items()
                if node not in kept | inputs and not step.writes.isdisjoint(cells)
            ]
        return kept, inputs

    def _follow(
        self, pending: list[fx.Node], wanted: set[fx.Node], kept: set[fx.Node], inputs: set[fx.Node], cut_opaque: bool
    ) -> None:
        """Move nodes and what they are computed from to those that are kept and those that become inputs."""
        while pending:
            node = pending.pop()
            step = self.steps[node]
            if node in kept or node in inputs:
                continue
            cut = node.op == "placeholder" or not step.is_writable()
            if cut or (cut_opaque and node not in wanted and step.is_opaque()):
                if not step.is_known_input():
                    raise Unwritable(f"node {node.name} is no tensor or number, and its call cannot be written")
                inputs.add(node)
                continue
            kept.add(node)
            pending.extend(step.inputs)


def _body(module: fx.GraphModule, node: fx.Node) -> RecordedGraph | None:
    if node.op != "get_attr":
        return None
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return RecordedGraph.of(value) if isinstance(value, fx.GraphModule) else None
