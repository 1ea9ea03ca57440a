"""The root graph of a compiled module and the graphs that higher-order operators nest in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from infllm_pass.compat import dynamo, tensors
from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.graph.facts import GraphFacts, example_of, overwritten_storages
from infllm_pass.graph.input_readings import readable_inputs
from infllm_pass.graph.mask_values import InputForm

_TRANSPARENT_CALLS = {
    "tag_activation_checkpoint",
    "wrap_activation_checkpoint",
    "wrap",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
}
"""Higher-order operators ``(…, body, *args)`` that compute just what their body computes."""


@dataclass(frozen=True)
class GraphView:
    """One graph of a module tree.

    Attributes:
        module: the module that owns the graph.
        facts: what is known of the graph.
        rewritable: whether replacing a node by an equal computation is sound there. It is not in a body whose
            meaning the surrounding operator fixes, such as the forward half of a custom autograd function.
        caller: name of the operator that the graph is the body of; "" for the root.
    """

    module: fx.GraphModule
    facts: GraphFacts
    rewritable: bool
    caller: str


def all_graphs(root: fx.GraphModule, held: HeldTensors | None = None) -> list[GraphView]:
    """The root graph first, then nested ones, each with its placeholders bound to the caller's nodes.

    Args:
        root: the module of the root graph.
        held: tensors that may be read by value; None: none.
    """
    nested = [module.graph for module in root.modules() if isinstance(module, fx.GraphModule) and module is not root]
    overwritten = overwritten_storages(root.graph, nested)
    return list(_walk(root, GraphFacts(root.graph, overwritten, held=held), True, "", overwritten))


def held_tensors(
    root: fx.GraphModule,
    inputs: Sequence[object],
    expected: Mapping[str, InputForm] | None = None,
    came_from: str = "",
) -> HeldTensors:
    """The tensors that modules hold: those that Dynamo found in modules, and attributes of the graph's own module.

    Args:
        root: the module of the root graph.
        inputs: real values of its placeholders.
        expected: see `readable_inputs`, as for `came_from`.
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
    return HeldTensors(found, inputs=readable_inputs(root.graph, inputs, expected, came_from))


def input_name(node: fx.Node) -> str:
    """What the caller knows an input of a Dynamo graph by, such as ``past_key_values.layers[0].keys``."""
    name = dynamo.source_name(node)
    if name is None:
        return str(node.target)
    name = re.sub(r"^L\['(\w+)'\]", r"\1", name)
    name = re.sub(r"^kwargs\['(\w+)'\]", r"\1", name)
    return re.sub(r"\._(?:modules|buffers|parameters)\['(\w+)'\]", r".\1", name)


def _walk(
    module: fx.GraphModule, facts: GraphFacts, rewritable: bool, caller: str, overwritten: Mapping[int, fx.Node | None]
) -> Iterator[GraphView]:
    yield GraphView(module, facts, rewritable, caller)
    bodies = [(node, user) for node in module.graph.nodes if _body(module, node) is not None for user in node.users]
    seen: set[int] = set()
    for node, user in bodies:
        body = _body(module, node)
        if body is None or id(body) in seen:
            continue
        seen.add(id(body))
        name = getattr(user.target, "__name__", None) or str(user.target)
        calls = [call for other, call in bodies if _body(module, other) is body]
        bindings = {}
        transparent = name in _TRANSPARENT_CALLS
        placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        arguments = list(user.args[user.args.index(node) + 1 :]) if node in user.args else []
        if transparent and len(calls) == 1 and len(placeholders) == len(arguments):
            bindings = {
                inner: (facts, outer)
                for inner, outer in zip(placeholders, arguments, strict=True)
                if isinstance(outer, fx.Node)
            }
        inner_facts = facts.nested(body.graph, bindings, user)
        yield from _walk(body, inner_facts, rewritable and transparent, name, overwritten)


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
