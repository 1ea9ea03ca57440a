"""Functions that hold a whole attention inside: spelled out in the graph, so that their parts can be read.

Dynamo keeps ``multi_head_attention_forward`` as one call. It is traced once more, by itself, and its operators are put
before the call. If the attention among them is rewritten they take the call's place; otherwise they go again.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from infllm_pass.graphs import fake_mode_of
from infllm_pass.masks.values import example_of
from infllm_pass.vocabulary import Kind, read

_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack")


@dataclass(frozen=True)
class Expansion:
    """A call spelled out in front of itself.

    Attributes:
        graph: the graph.
        call: the call.
        nodes: what it was spelled out to, in order.
        results: what stands for each of the call's results.
    """

    graph: fx.Graph
    call: fx.Node
    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node | None, ...]

    def accept(self) -> None:
        """Let the operators take the call's place."""
        for user in list(self.call.users):
            result = self.results[user.args[1]]  # type: ignore[index]
            if result is not None:
                user.replace_all_uses_with(result)
                self.graph.erase_node(user)
        self.graph.erase_node(self.call)

    def withdraw(self) -> None:
        """Take the operators out of the graph again."""
        for node in reversed(self.nodes):
            self.graph.erase_node(node)


def expand_composites(module: fx.GraphModule) -> list[Expansion]:
    """Spell out every call of a composite function, in a graph and in those nested in it.

    Args:
        module: the graph.
    """
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    calls = [(graph, node) for graph in graphs for node in graph.nodes if _is_composite(node)]
    found = (_expand(graph, node) for graph, node in calls)
    return [expansion for expansion in found if expansion is not None]


def _is_composite(node: fx.Node) -> bool:
    call = read(node)
    plain = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    return call is not None and call.kind is Kind.MULTI_HEAD_ATTENTION and plain


def _expand(graph: fx.Graph, call: fx.Node) -> Expansion | None:
    """Spell out one call; None where it cannot be traced by itself, and stays a call."""
    inputs = call.all_input_nodes
    try:
        traced = _trace(call, inputs)
    except Exception:
        return None
    results: Any = next(node.args[0] for node in traced.graph.nodes if node.op == "output")
    asked = max((int(user.args[1]) for user in call.users), default=0)  # type: ignore[arg-type]
    if len(results) <= asked or any(node.op == "get_attr" for node in traced.graph.nodes):
        return None
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(call):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = inputs[len(copies)]
            elif node.op != "output":
                copies[node] = _copy(graph, call, node, copies)
    made = tuple(copy for node, copy in copies.items() if node.op != "placeholder")
    return Expansion(graph, call, made, tuple(None if result is None else copies[result] for result in results))


def _trace(call: fx.Node, inputs: list[fx.Node]) -> fx.GraphModule:
    used = {user.args[1] for user in call.users}

    def body(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((call.args, call.kwargs), given.__getitem__)
        results = call.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(result if place in used else None for place, result in enumerate(results))

    with fake_mode_of(call) or _first_mode(inputs) or nullcontext(), torch.no_grad():
        traced = make_fx(body, pre_dispatch=True)(*map(example_of, inputs))
    traced.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))
    return traced


def _first_mode(inputs: list[fx.Node]) -> Any:
    return next((mode for node in inputs if (mode := fake_mode_of(node)) is not None), None)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _copy(graph: fx.Graph, call: fx.Node, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, copies.__getitem__)
    value = node.meta.get("val")
    key = "example_value" if "example_value" in call.meta else "val"
    copy.meta = {name: call.meta[name] for name in _ORIGIN if name in call.meta} | {key: value}
    return copy
