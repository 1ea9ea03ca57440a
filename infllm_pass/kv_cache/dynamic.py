"""State of dynamic caches (``torch.cat``): its layout, its memory, and the graph inputs that hold it.

Such a cache is another tensor after every call, longer by the call's keys. Its state lies slots first,
``[n, B, Hkv, ...]``, in memory with room for more, so that the slots of any length are a prefix: the graph gets a view
of it, whose strides stay the same while its size follows from the number of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from infllm_pass.graph.facts import GraphFacts, size
from infllm_pass.graph.subgraphs import input_name
from infllm_pass.kv_cache.spec import UNKNOWN_SIZES, StateLayout, StateTensor, refused_queries
from infllm_pass.masks import MaskPredicate
from infllm_pass.sites import AttentionSite


@dataclass(frozen=True)
class InputSize:
    """A size that differs from call to call: an input, or a dimension of one.

    Attributes:
        position: place among the graph's inputs.
        dim: dimension of that tensor; None: the input is the number.
    """

    position: int
    dim: int | None

    def read(self, inputs: Sequence[Any]) -> int:
        """The size in one call."""
        return int(inputs[self.position] if self.dim is None else inputs[self.position].shape[self.dim])


Size = int | InputSize


def read_size(extent: Size, inputs: Sequence[Any]) -> int:
    """A size in one call of a graph."""
    return extent if isinstance(extent, int) else extent.read(inputs)


@dataclass(frozen=True)
class DynamicCacheSpec:
    """A dynamic cache whose state a graph keeps.

    Attributes:
        position: place among the graph's inputs of the keys of earlier calls.
        output: place among its outputs of all keys.
        name: the input's name in the graph, for people.
        length_dim: dimension of the input that counts keys.
        appended: keys that a call appends.
        batch: number of rows.
        keys: ``(Hkv, D)``.
        dtype: of the keys as the graph reads them.
        order: see `sites.site.Continuation.layout`.
        padded: whether a mask says where rows begin; without one they begin with their first key, and windows with
            them.
        layout: the tensors that are kept.
    """

    position: int
    output: int
    name: str
    length_dim: int
    appended: Size
    batch: Size
    keys: tuple[int, int]
    dtype: torch.dtype
    order: tuple[str, ...]
    padded: bool
    layout: StateLayout

    @classmethod
    def of(
        cls, site: AttentionSite, mask: MaskPredicate | None, facts: GraphFacts, layout: StateLayout, *, padded: bool
    ) -> DynamicCacheSpec | str:
        """The cache that a site continues; a text says why no state of it can be kept.

        Args:
            site: the site.
            mask: what its mask was proved to be.
            facts: what is known of the graph.
            layout: the tensors to keep.
            padded: see the attributes.
        """
        if site.growth is None:
            return "its keys are no cache"
        continuation = site.growth.continuation
        if isinstance(continuation, str):
            return continuation
        if site.growth.trimmed:
            return "the graph cuts its keys"
        if mask is not None and mask.segments is not None:
            return "its sequences are packed"
        refused = refused_queries(site)
        if refused is not None:
            return refused
        keys = site.key_heads.example
        new, batch = _size_of(site.growth.appended, facts), _size_of(size(keys.shape[0]), facts)
        if new is None or batch is None:
            return UNKNOWN_SIZES
        return cls(
            position=_inputs(facts).index(continuation.past),
            output=continuation.output,
            name=input_name(continuation.past),
            length_dim=continuation.length_dim,
            appended=new,
            batch=batch,
            keys=(int(keys.shape[1]), int(keys.shape[3])),
            dtype=keys.dtype,
            order=continuation.layout,
            padded=padded,
            layout=layout,
        )

    def examples(self, keys: Tensor) -> list[Tensor]:
        """The state as the graph gets it, ``[B, Hkv, n, ...]``, for an example of all keys ``[B, Hkv, L, D]``."""
        found = []
        for tensor in self.layout(keys.shape, keys.dtype):
            batch, heads, _, *width = tensor.shape
            size = width[0] if width else 1
            strides = heads * size, size, batch * heads * size, *[1] * len(width)
            found.append(torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=keys.device))
        return found

    def rows(self, inputs: Sequence[Any]) -> int:
        """Rows of the keys in one call."""
        return read_size(self.batch, inputs)

    def tensors(self, inputs: Sequence[Any]) -> tuple[StateTensor, ...]:
        """The tensors of one call, as in the graph's examples."""
        length = inputs[self.position].shape[self.length_dim] + read_size(self.appended, inputs)
        heads, dim = self.keys
        return self.layout((self.rows(inputs), heads, int(length), dim), self.dtype)

    def new_memory(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Uninitialised memory for them, ``[n, B, Hkv, ...]``."""
        device = inputs[self.position].device
        found = []
        for tensor in self.tensors(inputs):
            batch, heads, slots, *width = tensor.shape
            found.append(torch.empty((slots, batch, heads, *width), dtype=tensor.dtype, device=device))
        return found


def with_room(memory: Tensor, slots: int) -> Tensor:
    """Memory ``[n, B, Hkv, ...]`` with room for so many slots: the same, or twice as many, copied."""
    if memory.shape[0] >= slots:
        return memory
    wider = memory.new_empty(max(slots, 2 * memory.shape[0]), *memory.shape[1:])
    wider[: memory.shape[0]] = memory
    return wider


def _inputs(facts: GraphFacts) -> list[fx.Node]:
    return [node for node in facts.graph.nodes if node.op == "placeholder"]


def _size_of(extent: sympy.Expr, facts: GraphFacts) -> Size | None:
    """A size of the graph as what it is in a call; None where no input shows it."""
    if extent.is_Integer:
        return int(extent)
    if extent not in facts.size_sources:
        return None
    node, dim = facts.size_sources[extent]
    return InputSize(_inputs(facts).index(node), dim)
