"""The root graph of a compiled module and the graphs that higher-order operators nest in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from infllm_pass.compat import dynamo, tensors
from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.graph.facts import GraphFacts, Place, example_of, overwritten_storages, storage
from infllm_pass.graph.input_readings import InputContext, readable_inputs
from infllm_pass.graph.regions import Region, RegionCall, caller_name, is_transparent, operands_of, placeholders_of


@dataclass(frozen=True)
class GraphView:
    """One graph of a module tree.

    Attributes:
        module: the module that owns the graph.
        facts: what is known of the graph.
        rewritable: whether replacing a node by an equal computation is sound there. It is not in a body whose
            meaning the surrounding operator fixes, such as the forward half of a custom autograd function.
        caller: name of the operator that the graph is the body of; "" for the root.
        region: the bodies and calls that share operands with the graph; None: it is the root, or its operands are not
            known to be those of its calls.
    """

    module: fx.GraphModule
    facts: GraphFacts
    rewritable: bool
    caller: str
    region: Region | None = None


def all_graphs(root: fx.GraphModule, held: HeldTensors | None = None) -> list[GraphView]:
    """The root graph first, then nested ones, each with its placeholders bound to the caller's nodes.

    Args:
        root: the module of the root graph.
        held: tensors that may be read by value; None: none.
    """
    nested = [module.graph for module in root.modules() if isinstance(module, fx.GraphModule) and module is not root]
    overwritten = overwritten_storages(root.graph, nested)
    views = _Walk(root, GraphFacts(root.graph, overwritten, held=held)).views
    _spread_writes(views, overwritten)
    return views


def regions_of(views: Sequence[GraphView]) -> dict[GraphFacts, Region]:
    """The regions of the graphs that are in one."""
    return {view.facts: view.region for view in views if view.region is not None}


def held_tensors(root: fx.GraphModule, inputs: Sequence[object], context: InputContext | None = None) -> HeldTensors:
    """The tensors that modules hold: those that Dynamo found in modules, and attributes of the graph's own module.

    Args:
        root: the module of the root graph.
        inputs: real values of its placeholders.
        context: what is known of the inputs beside.
    """
    found: dict[fx.Node, torch.Tensor] = {}
    placeholders = [node for node in root.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=False):
        if isinstance(value, torch.Tensor) and dynamo.is_held_by_module(node):
            found[node] = value
    for node in root.graph.nodes:
        value = _attribute(root, node)
        if isinstance(value, torch.Tensor):
            found[node] = value
    return HeldTensors(found, inputs=readable_inputs(root.graph, inputs, context))


def input_name(node: fx.Node) -> str:
    """What the caller knows an input of a Dynamo graph by, such as ``past_key_values.layers[0].keys``."""
    name = dynamo.source_name(node)
    if name is None:
        return str(node.target)
    name = re.sub(r"^L\['(\w+)'\]", r"\1", name)
    name = re.sub(r"^kwargs\['(\w+)'\]", r"\1", name)
    return re.sub(r"\._(?:modules|buffers|parameters)\['(\w+)'\]", r".\1", name)


_Call = tuple[fx.GraphModule, fx.Node, fx.Node]
"""A call of a nested graph: the graph that makes it, the node that stands for the body there, and the call."""


@dataclass(eq=False)
class _Body:
    """A nested graph.

    Attributes:
        module: the graph.
        calls: its calls.
        tied: the bodies that some of these name as well.
    """

    module: fx.GraphModule
    calls: list[_Call] = field(default_factory=list)
    tied: set[int] = field(default_factory=set)

    def is_open(self) -> bool:
        """Whether the operands of all its calls are those that it reads."""
        count = len(placeholders_of(self.module.graph))
        return all(is_transparent(call) and len(operands_of(call, node)) == count for _, node, call in self.calls)


class _Walk:
    """Visits a root graph and those nested in it, each after all graphs that call it.

    Args:
        root: the module of the root graph.
        facts: what is known of it.
    """

    def __init__(self, root: fx.GraphModule, facts: GraphFacts) -> None:
        self.views = [GraphView(root, facts, True, "")]
        self._found: dict[int, _Body] = {}
        self._collect(root, set())
        known = {id(root): self.views[0]}
        groups = self._groups()
        while groups:
            waiting = []
            for group in groups:
                if all(id(parent) in known for body in group for parent, _, _ in body.calls):
                    self.views += _views_of(group, known)
                    known.update((id(view.module), view) for view in self.views[-len(group) :])
                else:
                    waiting.append(group)
            groups = waiting

    def _collect(self, module: fx.GraphModule, seen: set[int]) -> None:
        """Find the bodies that a graph calls, and those that these call, in the order of their first calls."""
        seen.add(id(module))
        for node in module.graph.find_nodes(op="get_attr"):
            body = _body(module, node)
            if body is None or not node.users:
                continue
            found = self._found.setdefault(id(body), _Body(body))
            for user in node.users:
                found.calls.append((module, node, user))
                named = (_body(module, source) for source in user.all_input_nodes)
                found.tied.update(id(each) for each in named if each is not None)
            if id(body) not in seen:
                self._collect(body, seen)

    def _groups(self) -> list[list[_Body]]:
        """The bodies, together with those that they share calls with, directly or through others."""
        groups: list[list[_Body]] = []
        grouped: set[int] = set()
        for first in self._found:
            pending = [first]
            members: set[int] = set()
            while pending:
                each = pending.pop()
                if each not in members | grouped:
                    members.add(each)
                    pending += self._found[each].tied
            grouped |= members
            if members:
                groups.append([body for each, body in self._found.items() if each in members])
        return groups


def _views_of(group: Sequence[_Body], known: Mapping[int, GraphView]) -> list[GraphView]:
    """The views of bodies that share operands, whose callers are known."""
    found = {
        call: RegionCall(known[id(parent)].facts, call, node) for body in group for parent, node, call in body.calls
    }
    calls = list(found.values())
    rewritable = all(known[id(parent)].rewritable for body in group for parent, _, _ in body.calls)
    is_open = all(body.is_open() for body in group)
    transform = next(filter(None, (call.facts.transform_of(call.node) for call in calls)), "")
    facts = []
    for body in group:
        bindings, given = _bound(body.module.graph, calls) if is_open else ({}, {})
        callers = [call.facts for call in calls] if is_open else []
        inner = calls[0].facts.nested(body.module.graph, bindings, callers, transform)
        inner.given.update(given)
        facts.append(inner)
    region = Region(calls, facts) if is_open else None
    transparent = all(map(is_transparent, found))
    return [
        GraphView(body.module, inner, rewritable and transparent, caller_name(body.calls[0][2]), region)
        for body, inner in zip(group, facts, strict=True)
    ]


def _bound(
    graph: fx.Graph, calls: Sequence[RegionCall]
) -> tuple[dict[fx.Node, Place], dict[fx.Node, tuple[Place, ...]]]:
    """What the placeholders of a body stand for: those that are one node in all calls, and the others."""
    bindings, given = {}, {}
    for placeholder, operands in zip(
        placeholders_of(graph), zip(*(call.operands for call in calls), strict=True), strict=True
    ):
        pairs = zip(calls, operands, strict=True)
        places = tuple(call.facts.origin(operand) for call, operand in pairs if isinstance(operand, fx.Node))
        if len(places) == len(calls) and len(set(places)) == 1:
            bindings[placeholder] = places[0]
        elif len(places) == len(calls):
            given[placeholder] = places
    return bindings, given


def _spread_writes(views: Sequence[GraphView], overwritten: dict[int, fx.Node | None]) -> None:
    """Enter the memory that calls hand to a placeholder which a body writes to, for every call of the body."""
    pairs = [
        (storage(placeholder), storage(operand))
        for view in views
        if view.region is not None
        for call in view.region.calls
        for placeholder, operand in zip(placeholders_of(view.facts.graph), call.operands, strict=True)
        if isinstance(operand, fx.Node)
    ]
    spreading = True
    while spreading:
        found = {
            outer
            for inner, outer in pairs
            if inner in overwritten and overwritten[inner] is None and outer is not None
            if outer not in overwritten or overwritten[outer] is not None
        }
        overwritten.update(dict.fromkeys(found))
        spreading = bool(found)


def _body(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    value = _attribute(module, node)
    return value if isinstance(value, fx.GraphModule) else None


def _attribute(module: fx.GraphModule, node: fx.Node) -> object:
    """What a ``get_attr`` node reads; None for other nodes."""
    if node.op != "get_attr":
        return None
    try:
        value: object = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
    except AttributeError:
        return None
    return value


def fake_mode_of(node: fx.Node) -> tensors.FakeTensorMode | None:
    """The fake tensor mode that a node's example tensor belongs to."""
    return tensors.fake_mode_of(example_of(node))
