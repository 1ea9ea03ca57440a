"""What a matcher returns: an `AttentionSite`, or a `PartialSite` with the node that stopped it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.graph.facts import example_of
from infllm_pass.masks.normal_form import MaskTerm
from infllm_pass.reasons import Reason

Step = tuple[str, tuple[int, ...]]
"""One layout operation on a tensor.

``("unflatten", (dim, inner))``: split a dimension, `inner` elements adjacent; ``("flatten", (first, last))``,
``("permute", dims)``, ``("squeeze", dims)``, ``("unsqueeze", (dim,))``; ``("expand", ())``: to the queries' batch.
"""


@dataclass(frozen=True)
class Operand:
    """A tensor of a site: a node of the graph, and the layout operations that bring it to ``[B, H, L, D]``.

    Attributes:
        node: the node.
        steps: the operations, none for a node that has the layout already.
        example: fake tensor of the result.
        index: where the node holds the tensor's elements, in terms of `index_algebra.FEATURE` along the head dimension.
    """

    node: fx.Node
    steps: tuple[Step, ...] = ()
    example: torch.Tensor = field(compare=False, repr=False, default=None)  # type: ignore[assignment]
    index: tuple[sympy.Expr, ...] = field(compare=False, repr=False, default=())


@dataclass(frozen=True)
class Continuation:
    """Keys that grow from call to call: an input of the graph, which an output replaces at the next call.

    Attributes:
        past: the input, the keys of earlier calls.
        output: place among the graph's outputs of the grown keys, which hold every key where the input would.
        length_dim: dimension of the input that counts its keys.
        layout: where the input holds the key of a row, query head and position; equal for equal layouts.
    """

    past: fx.Node
    output: int
    length_dim: int
    layout: tuple[str, ...]


@dataclass(frozen=True)
class Growth:
    """How a graph's keys grow with its queries: by concatenation, after keys that are inputs of the graph.

    Attributes:
        appended: how many keys are appended; they are computed from what the queries are computed from.
        trimmed: whether the graph cuts the grown keys, as a cache does that forgets all beyond a window.
        continuation: how the next call gets the grown keys; a text says what keeps that from being known.
    """

    appended: sympy.Expr
    trimmed: bool
    continuation: Continuation | str


@dataclass(frozen=True)
class Sinks:
    """Logits without a key that join each query's softmax, one for each query head.

    Attributes:
        node: what holds them; None: they are all one number.
        index: where it holds that of a head, an entry for each of its dimensions: `HEAD`, or a number.
        factor: what its elements are multiplied with; without a node, the number.
    """

    node: fx.Node | None
    index: tuple[sympy.Expr, ...]
    factor: float


class Located:
    """A place in the user's model, read off a node."""

    node: fx.Node

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
        return source_line(self.node)


@dataclass(frozen=True)
class AttentionSite(Located):
    """One attention computation of a graph: ``softmax(cap(scale * q k^T) + masks) v``.

    Attributes:
        node: the node that holds the result, in whatever layout the model chose.
        query: the queries, ``[B, Hq, Lq, D]``.
        key: the keys as the products see them, ``[B, Hq or Hkv, Lk, D]``.
        value: the values as the products see them.
        key_heads: the keys before they were repeated for a group, ``[B, Hkv, Lk, D]``.
        value_heads: the same for the values.
        masks: what restricts the keys that a query sees, beside `is_causal`.
        is_causal: the causal flag as the call gives it, aligned top-left.
        dropout_p: dropout probability: a number or a node.
        scale: softmax scale: None for ``D ** -0.5``, a number or a node.
        output_steps: layout operations from ``[B, Hq, Lq, Dv]`` to the layout of `node`.
        dtype: the dtype that attention is computed in.
        growth: how the keys grow with the queries; None: not by concatenation.
        order: number of the site among those of its graph that were traced in the same module.
        softcap: the cap ``c`` of scaled scores ``x``, which become ``c * tanh(x / c)`` before masks; 0.0: none.
        sinks: logits that join the softmax without a key; None: none.
    """

    node: fx.Node
    query: Operand
    key: Operand
    value: Operand
    key_heads: Operand
    value_heads: Operand
    masks: tuple[MaskTerm, ...]
    is_causal: Any
    dropout_p: Any
    scale: Any
    output_steps: tuple[Step, ...]
    dtype: torch.dtype
    growth: Growth | None = None
    order: int = 0
    softcap: float = 0.0
    sinks: Sinks | None = None

    def shape(self, tensor: Operand | fx.Node) -> tuple[int | torch.SymInt, ...]:
        """The example shape of one of the site's tensors."""
        return tuple(tensor.example.shape if isinstance(tensor, Operand) else example_of(tensor).shape)

    @property
    def query_heads(self) -> int | torch.SymInt:
        """Number of query heads ``Hq``."""
        return self.shape(self.query)[1]

    @property
    def kv_heads(self) -> int | torch.SymInt:
        """Number of key/value heads ``Hkv`` before any repetition."""
        return self.shape(self.key_heads)[1]


@dataclass(frozen=True)
class PartialSite(Located):
    """Something that computes attention, or looks like it, and was not read to the end.

    Attributes:
        node: the softmax, or the fused call.
        reason: what kept it from being a site.
        stopped: the node at which reading stopped.
        reached: how far it had come, in words.
        error: what a reader failed with; None: nothing failed.
    """

    node: fx.Node
    reason: Reason
    stopped: fx.Node
    reached: str
    error: Exception | None = field(default=None, compare=False, repr=False)

    @property
    def detail(self) -> str:
        """How far the matcher got, and what stopped it."""
        line = source_line(self.stopped)
        place = f" ({line})" if line else ""
        return f"{self.reached}; stopped at node {self.stopped.name}{place}"


def source_line(node: fx.Node) -> str:
    """``file:line`` of the user-level call behind a node, or "" if the graph does not record it."""
    location = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
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
