"""Finding attention sites in a graph and reading what each computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import sympy
import torch
from torch import fx

from infllm_pass.masks.interpreter import Interpreter, Overwritten
from infllm_pass.masks.values import GraphFacts, axis, same, size
from infllm_pass.vocabulary import Kind, read

_LAYOUT_KINDS = {
    Kind.IDENTITY,
    Kind.GETITEM,
    Kind.UNSQUEEZE,
    Kind.EXPAND,
    Kind.RESHAPE,
    Kind.REPEAT_INTERLEAVE,
}


@dataclass(frozen=True)
class AttentionSite:
    """One attention computation of a graph, its arguments by name.

    Attributes:
        node: the node that computes ``[B, Hq, Lq, Dv]``.
        query: the queries, ``[B, Hq, Lq, D]``.
        key: the keys as the call sees them, ``[B, Hq or Hkv, Lk, D]``.
        value: the values as the call sees them.
        key_heads: the node that holds the keys before they were repeated for a group, ``[B, Hkv, Lk, D]``.
        value_heads: the same for the values.
        mask: the mask argument, or None.
        is_causal: the causal flag as the call gives it.
        dropout_p: dropout probability as the call gives it: a number or a node.
        scale: softmax scale as the call gives it: None, a number or a node.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_heads: fx.Node
    value_heads: fx.Node
    mask: fx.Node | None
    is_causal: Any
    dropout_p: Any
    scale: Any

    def shape(self, node: fx.Node) -> tuple[int | torch.SymInt, ...]:
        """The example shape of one of the site's tensors."""
        return tuple(node.meta["example_value"].shape)

    @property
    def query_heads(self) -> int | torch.SymInt:
        """Number of query heads ``Hq``."""
        return self.shape(self.query)[1]

    @property
    def kv_heads(self) -> int | torch.SymInt:
        """Number of key/value heads ``Hkv`` before any repetition."""
        return self.shape(self.key_heads)[1]

    @property
    def module_path(self) -> str:
        """Dotted path of the module the call was traced in, or "" outside any module."""
        stack = self.node.meta.get("nn_module_stack") or {}
        path = ""
        for name, _ in stack.values():
            path = str(name)
        return _clean_path(path)

    @property
    def source_line(self) -> str:
        """``file:line`` of the user-level call, or "" if the graph does not record it."""
        location = ""
        for line in (self.node.meta.get("stack_trace") or "").splitlines():
            line = line.strip()
            if line.startswith('File "') and ", line " in line:
                file, rest = line[len('File "') :].split('"', 1)
                location = f"{file}:{rest.removeprefix(', line ').split(',', 1)[0]}"
        return location


def _clean_path(path: str) -> str:
    """``L['self']._modules['model'].layers[0]`` and its relatives as ``model.layers.0``."""
    for old, new in (("L['self']", ""), ("_modules['", "."), ("']", ""), ("['", "."), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return ".".join(part for part in path.split(".") if part and part not in ("L", "self", "_orig_mod"))


def find_sites(facts: GraphFacts) -> Iterator[AttentionSite]:
    """Every call of fused attention in a graph, in order.

    Args:
        facts: the graph's facts.
    """
    for node in facts.graph.nodes:
        call = read(node)
        if call is None or call.kind is not Kind.ATTENTION:
            continue
        args = call.args
        query, key, value = (args.get(name) for name in ("query", "key", "value"))
        if not (_is_tensor(query) and _is_tensor(key) and _is_tensor(value)):
            continue
        key_heads, value_heads = (look_through_repetition(facts, query, tensor) for tensor in (key, value))
        if key_heads.meta["example_value"].shape[1:2] != value_heads.meta["example_value"].shape[1:2]:
            key_heads, value_heads = key, value
        yield AttentionSite(
            node=node,
            query=query,
            key=key,
            value=value,
            key_heads=key_heads,
            value_heads=value_heads,
            mask=args.get("attn_mask"),
            is_causal=args.get("is_causal", False),
            dropout_p=args.get("dropout_p", 0.0),
            scale=args.get("scale"),
        )


def _is_tensor(argument: object) -> TypeGuard[fx.Node]:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("example_value"), torch.Tensor)


def look_through_repetition(facts: GraphFacts, query: fx.Node, tensor: fx.Node) -> fx.Node:
    """The node that holds keys or values before their heads were repeated for the query heads of a group.

    The chain of layout operators above `tensor` is walked up; a node of it is the answer if, by index algebra,
    ``tensor[b, h, n, d] == node[b, h // G, n, d]`` with ``G = Hq / Hkv``. Otherwise it is `tensor` itself.
    """
    found = tensor
    repeated = facts.example(tensor)
    if repeated.dim() != 4:
        return tensor
    heads = size(repeated.shape[1])
    for candidate in _layout_chain(tensor):
        example = facts.example(candidate)
        if not isinstance(example, torch.Tensor) or example.dim() != 4:
            continue
        group = heads / size(example.shape[1])
        if group.is_integer is not True:
            continue
        kept = (example.shape[0], example.shape[2], example.shape[3])
        wanted = (repeated.shape[0], repeated.shape[2], repeated.shape[3])
        if not all(same(size(a), size(b)) for a, b in zip(kept, wanted, strict=True)):
            continue
        interpreter = Interpreter(facts, leaves=frozenset([candidate]))
        try:
            source, result = interpreter.evaluate(candidate), interpreter.evaluate(tensor)
        except Overwritten:
            return tensor
        head = axis(1) if group == 1 else sympy.floor(axis(1) / group)
        if source is not None and result is not None:
            expected = source.at([axis(0), head, axis(2), axis(3)])
            if _drop_unit_axes(expected, repeated) == _drop_unit_axes(result.value, repeated):
                found = candidate
    return found


def _layout_chain(node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it views, copies or repeats, nearest first."""
    current: Any = node
    while isinstance(current, fx.Node):
        yield current
        call = read(current)
        current = call.args.get("input") if call is not None and call.kind in _LAYOUT_KINDS else None


def _drop_unit_axes(value: sympy.Basic, example: torch.Tensor) -> sympy.Basic:
    """The value with the index of every dimension of size 1 set to its only value, 0."""
    zero = sympy.Integer(0)
    return value.xreplace({axis(dim): zero for dim, extent in enumerate(example.shape) if size(extent) == 1})
