"""Regions: graphs nested in others that compute just what their calls do, and the operands of these calls.

The operands of a call are numbered alike in all bodies that it may run, and all calls of a body have as many: bodies
and calls that are tied together in this way are one region, whose operands are added and dropped everywhere at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from infllm_pass.graph.dce import erase_unused
from infllm_pass.graph.facts import GraphFacts, example_of

_OPERANDS_AFTER_BODY = {
    "tag_activation_checkpoint": 1,
    "wrap_activation_checkpoint": 1,
    "wrap": 1,
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 1,
    "invoke_subgraph": 2,
}
"""Higher-order operators ``(…, body, …, *operands)``, and how far after the body the operands begin."""

_OPERANDS_IN_A_TUPLE = {"cond"}
"""Higher-order operators ``(…, body, body, operands)`` that run one of their bodies."""


def caller_name(call: fx.Node) -> str:
    """The name of the operator that a node calls."""
    return getattr(call.target, "__name__", None) or str(call.target)


def is_transparent(call: fx.Node) -> bool:
    """Whether a higher-order operator computes just what its body, or one of its bodies, computes."""
    return caller_name(call) in _OPERANDS_AFTER_BODY or caller_name(call) in _OPERANDS_IN_A_TUPLE


def operands_of(call: fx.Node, body: fx.Node) -> tuple[Any, ...]:
    """What a transparent call hands to the placeholders of its bodies.

    Args:
        call: the call.
        body: the node that stands for a body.
    """
    if caller_name(call) in _OPERANDS_IN_A_TUPLE:
        operands: Any = call.args[-1]
        return tuple(operands)
    return call.args[call.args.index(body) + _OPERANDS_AFTER_BODY[caller_name(call)] :]


def placeholders_of(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return list(graph.find_nodes(op="placeholder"))


@dataclass(frozen=True)
class RegionCall:
    """One call of a region.

    Attributes:
        facts: the graph that the call is in.
        node: the call.
        body: the node that stands for one of its bodies.
    """

    facts: GraphFacts
    node: fx.Node
    body: fx.Node

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the call hands over."""
        return operands_of(self.node, self.body)

    def hand_over(self, operands: Sequence[Any]) -> None:
        """Replace what the call hands over."""
        if caller_name(self.node) in _OPERANDS_IN_A_TUPLE:
            self.node.args = (*self.node.args[:-1], tuple(operands))
        else:
            self.node.args = (*self.node.args[: len(self.node.args) - len(self.operands)], *operands)


class Region:
    """Bodies and the calls that may run them.

    Args:
        calls: the calls.
        bodies: what is known of the bodies.
    """

    def __init__(self, calls: Sequence[RegionCall], bodies: Sequence[GraphFacts]) -> None:
        self.calls = tuple(calls)
        self.bodies = tuple(bodies)
        self._read = set(self._readers())

    def append(self, operands: Sequence[fx.Node], like: fx.Node) -> list[fx.Node]:
        """Add an operand to all calls.

        Args:
            operands: what each call hands over.
            like: a node that is named and looks like it.

        Returns:
            The new placeholder of each body.
        """
        for call, operand in zip(self.calls, operands, strict=True):
            call.hand_over((*call.operands, operand))
        added = []
        for body in self.bodies:
            last = [*placeholders_of(body.graph)][-1:]
            first = next(iter(body.graph.nodes))
            with body.graph.inserting_after(last[0]) if last else body.graph.inserting_before(first):
                node = body.graph.placeholder(like.name)
            node.meta.update({key: like.meta[key] for key in ("example_value", "val") if key in like.meta})
            added.append(node)
        self._read.add(len(placeholders_of(self.bodies[0].graph)) - 1)
        return added

    def drop_unread(self) -> None:
        """Drop the tensors that no body reads any more, and what only made them."""
        unread = self._read - set(self._readers())
        dropped = sorted((place for place in unread if self._is_tensor(place)), reverse=True)
        for place in dropped:
            for body in self.bodies:
                body.graph.erase_node(placeholders_of(body.graph)[place])
            for call in self.calls:
                operands = list(call.operands)
                operand = operands.pop(place)
                call.hand_over(operands)
                if isinstance(operand, fx.Node):
                    erase_unused(call.facts.graph, operand)
        if dropped:
            self._read = set(self._readers())

    def _readers(self) -> list[int]:
        """The numbers of operands that a body reads."""
        return [place for body in self.bodies for place, node in enumerate(placeholders_of(body.graph)) if node.users]

    def _is_tensor(self, place: int) -> bool:
        return isinstance(example_of(placeholders_of(self.bodies[0].graph)[place]), Tensor)


Regions = Mapping[GraphFacts, Region]
"""The region of each body."""


def carry(facts: GraphFacts, home: GraphFacts, node: fx.Node, regions: Regions) -> fx.Node:
    """What a node of an outer graph is called in a graph nested in it, handed over as a further operand if need be.

    Args:
        facts: the graph that is to read it.
        home: the graph that the node belongs to: this one, or one around it through whatever calls.
        node: the node; the calls have to come after it.
        regions: the region of each body.
    """
    if facts is home:
        return node
    known = next((inner for inner, outer in facts.bindings.items() if outer == (home, node)), None)
    if known is not None:
        return known
    region = regions[facts]
    operands = [carry(call.facts, home, node, regions) for call in region.calls]
    added = dict(zip(region.bodies, region.append(operands, node), strict=True))
    for body, placeholder in added.items():
        body.bindings[placeholder] = (home, node)
    return added[facts]
