"""Dead code elimination: the nodes whose results are used, leaving out checks and results nothing reads."""

from __future__ import annotations

import torch
from torch import fx

from infllm_pass.compat.aten import OpOverload, is_mutable, returns_values
from infllm_pass.compat.fx import is_erased
from infllm_pass.graph.facts import storage
from infllm_pass.graph.op_table import Kind, read, read_in_place

DEAD_END = 16
"""Nodes that are followed below one whose results may be unused; more are taken for a use."""


def dead_users(node: fx.Node) -> list[fx.Node] | None:
    """The nodes that use a node, directly or not, in an order in which they can be erased; None if one has an effect.

    Args:
        node: the node.
    """
    found: dict[fx.Node, None] = {}
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user in found:
            continue
        if len(found) == DEAD_END or not (pure(user) or _writes_to(user, {node, *found})):
            return None
        found[user] = None
        pending.extend(user.users)
    return sorted(found, reverse=True)


def _writes_to(node: fx.Node, dead: set[fx.Node]) -> bool:
    """Whether a node does no more than write over one of some tensors, which has memory of its own."""
    written = read_in_place(node)
    while written is not None:
        target = written.args.get("input")
        if not isinstance(target, fx.Node) or target not in dead:
            return False
        written = read_in_place(target)
        if written is None:
            return target.op != "placeholder" and storage(target) not in map(storage, target.all_input_nodes)
    return False


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without effect and, after it, those of its inputs that only it used."""
    pending = [node]
    while pending:
        candidate = pending.pop()
        if is_erased(candidate) or not pure(candidate):
            continue
        users = dead_users(candidate)
        if users is None:
            continue
        inputs = [source for erased in (*users, candidate) for source in erased.all_input_nodes]
        for erased in (*users, candidate):
            graph.erase_node(erased)
        pending.extend(inputs)


def live_users(node: fx.Node) -> list[fx.Node]:
    """The nodes that use a node's values and have an effect: neither checks of it, nor results that nothing reads."""
    return [user for user in node.users if not (pure(user) and dead_users(user) is not None)]


def pure(node: fx.Node) -> bool:
    """Whether a node that nothing uses can be erased.

    Kinds of the vocabulary can, and ATen overloads without effects; ``Graph.eliminate_dead_code`` wrongly assumes it
    of in-place tensor methods as well. A write to a tensor that nothing else reads goes with the tensor.
    """
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    call = read(node)
    if call is not None:
        return call.kind is not Kind.DROPOUT or call.args.get("training", True) is False or call.args.get("p") == 0
    overload = node.target
    if isinstance(overload, OpOverload) and overload.namespace == "aten":
        seeded = torch.Tag.nondeterministic_seeded in overload.tags
        return returns_values(overload) and not is_mutable(overload) and not seeded
    written = read_in_place(node)
    target = None if written is None else written.args.get("input")
    return isinstance(target, fx.Node) and target.op != "placeholder" and list(target.users) == [node]
