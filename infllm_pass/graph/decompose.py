"""Decomposition of composite calls such as ``multi_head_attention_forward`` into their operators, in place.

Dynamo keeps ``multi_head_attention_forward`` as one call, and what ``nn.TransformerEncoderLayer`` computes in
evaluation. It is traced once more, by itself, and its operators are put before the call, whose place they take. If the
attention among them is not rewritten the call gets its place back.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from infllm_pass.compat.aten import is_mutable
from infllm_pass.compat.fx import is_erased, make_fx
from infllm_pass.graph.encoder_layer import encoder_layer
from infllm_pass.graph.facts import example_of
from infllm_pass.graph.op_table import Kind, read
from infllm_pass.graph.subgraphs import fake_mode_of

logger = logging.getLogger("infllm_pass")

UNTRACED = "infllm_untraced"
"""Key of a call's ``meta``: why it could not be spelled out, for people."""

_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack")


@dataclass(frozen=True)
class Expansion:
    """A call spelled out in front of itself; what used its results uses theirs.

    Attributes:
        graph: the graph.
        call: the call.
        nodes: what it was spelled out to, in order.
        results: for each used result of the call, the node that held it and the one that stands for it.
    """

    graph: fx.Graph
    call: fx.Node
    nodes: tuple[fx.Node, ...]
    results: tuple[tuple[fx.Node, fx.Node], ...]

    def accept(self) -> None:
        """Erase the call."""
        for node in (*self.call.users, self.call):
            if not is_erased(node):  # a rewriting erases what nothing uses any more
                self.graph.erase_node(node)

    def withdraw(self) -> None:
        """Take the operators out of the graph again."""
        within = set(self.nodes)
        for held, result in self.results:
            result.replace_all_uses_with(held, delete_user_cb=lambda user: user not in within)
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


COMPOSITES: Mapping[Kind, Callable[..., Any] | None] = {
    Kind.MULTI_HEAD_ATTENTION: None,
    Kind.ENCODER_LAYER: encoder_layer,
}
"""Kinds of calls that hold a whole attention inside, and what they are traced as, where not as what they call."""


def _is_composite(node: fx.Node) -> bool:
    call = read(node)
    if call is None or call.kind not in COMPOSITES:
        return False
    plain = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    return isinstance(example_of(node), torch.Tensor) or plain


def _held_results(call: fx.Node) -> dict[fx.Node, Any]:
    """The nodes that hold the results of a call, with the place of each; None for a call of one result."""
    if isinstance(example_of(call), torch.Tensor):
        return {call: None}
    return {held: held.args[1] for held in call.users}


def _expand(graph: fx.Graph, call: fx.Node) -> Expansion | None:
    """Spell out one call; None where it cannot be traced by itself, and stays a call that says why."""
    inputs = call.all_input_nodes
    try:
        traced = _trace(call, inputs)
    except Exception as error:  # whatever the function raises for these arguments, the model's own call may not
        logger.debug("%s could not be traced by itself", call.name, exc_info=True)
        call.meta[UNTRACED] = f"{type(error).__name__}: {error}"
        return None
    results: Any = next(node.args[0] for node in traced.graph.nodes if node.op == "output")
    asked = {held: results[place] if place is not None else results for held, place in _held_results(call).items()}
    constants = [node.name for node in traced.graph.nodes if node.op == "get_attr"]
    if None in asked.values() or constants:
        call.meta[UNTRACED] = f"it makes constants ({', '.join(constants)})" if constants else "a used result is None"
        return None
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(call):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = inputs[len(copies)]
            elif node.op != "output":
                copies[node] = _copy(graph, call, node, copies)
    made = tuple(copy for node, copy in copies.items() if node.op != "placeholder")
    pairs = tuple((held, copies[result]) for held, result in asked.items())
    for held, result in pairs:
        held.replace_all_uses_with(result)
    return Expansion(graph, call, made, pairs)


def _trace(call: fx.Node, inputs: list[fx.Node]) -> fx.GraphModule:
    used = set(_held_results(call).values())
    known = read(call)
    function = call.target if known is None else COMPOSITES.get(known.kind) or call.target

    def body(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((call.args, call.kwargs), given.__getitem__)
        results = function(*args, **kwargs)  # type: ignore[operator]
        if isinstance(results, torch.Tensor):
            return results
        return tuple(result if place in used else None for place, result in enumerate(results))

    with fake_mode_of(call) or _first_mode(inputs) or nullcontext(), torch.no_grad():
        traced = make_fx(body, pre_dispatch=True)(*map(example_of, inputs))
    traced.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_mutable(node.target))
    return traced


def _first_mode(inputs: list[fx.Node]) -> Any:
    return next((mode for node in inputs if (mode := fake_mode_of(node)) is not None), None)


def _copy(graph: fx.Graph, call: fx.Node, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, copies.__getitem__)
    value = node.meta.get("val")
    key = "example_value" if "example_value" in call.meta else "val"
    copy.meta = {name: call.meta[name] for name in _ORIGIN if name in call.meta} | {key: value}
    return copy
