"""Caches that grow by concatenation: what a graph keeps of one, and the memory that it is kept in.

Such a cache is another tensor after every call, longer by the call's keys. Its compressed keys lie slots first,
``[n, B, Hkv, D]``, in memory with room for more, so that the slots of any length are a prefix: the graph gets a view of
it, whose strides stay the same while its size follows from the number of keys.
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
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops.decode_cpu import state_slots
from infllm_pass.sites.site import Continuation


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
class GrowingCacheSpec:
    """A growing cache whose compressed keys a graph keeps.

    Attributes:
        position: place among the graph's inputs of the keys of earlier calls.
        output: place among its outputs of all keys.
        name: the input's name in the graph, for people.
        length_dim: dimension of the input that counts keys.
        appended: keys that a call appends.
        batch: number of rows.
        keys: ``(Hkv, D)``.
        dtype: of the keys as the graph reads them, and of the compressed keys.
        layout: see `sites.site.Continuation`.
        padded: whether a mask says where rows begin; without one they begin with their first key, and windows with
            them.
        geometry: the block geometry.
    """

    position: int
    output: int
    name: str
    length_dim: int
    appended: Size
    batch: Size
    keys: tuple[int, int]
    dtype: torch.dtype
    layout: tuple[str, ...]
    padded: bool
    geometry: BlockGeometry

    @classmethod
    def of(
        cls,
        keys: Tensor,
        continuation: Continuation,
        appended: sympy.Expr,
        facts: GraphFacts,
        *,
        padded: bool,
        geometry: BlockGeometry,
    ) -> GrowingCacheSpec | None:
        """The cache that a graph continues; None where its sizes cannot be told from the inputs of a call.

        Args:
            keys: example of all keys, ``[B, Hkv, L, D]``.
            continuation: how the next call gets them.
            appended: how many of them are new.
            facts: what is known of the graph.
            padded: see the attributes.
            geometry: the block geometry.
        """
        new, batch = _size_of(appended, facts), _size_of(size(keys.shape[0]), facts)
        if new is None or batch is None:
            return None
        return cls(
            position=_inputs(facts).index(continuation.past),
            output=continuation.output,
            name=input_name(continuation.past),
            length_dim=continuation.length_dim,
            appended=new,
            batch=batch,
            keys=(int(keys.shape[1]), int(keys.shape[3])),
            dtype=keys.dtype,
            layout=continuation.layout,
            padded=padded,
            geometry=geometry,
        )

    def examples(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Compressed keys as the graph gets them, ``[B, Hkv, n, D]``, for an example of all keys."""
        batch, heads, length, dim = keys.shape
        strides = heads * dim, dim, batch * heads * dim, 1
        fine, coarse = (
            torch.empty_strided((batch, heads, slots, dim), strides, dtype=keys.dtype, device=keys.device)
            for slots in state_slots(length, self.geometry)
        )
        return fine, coarse

    def rows(self, inputs: Sequence[Any]) -> int:
        """Rows of the keys in one call."""
        return read_size(self.batch, inputs)

    def slots(self, inputs: Sequence[Any]) -> tuple[int, int]:
        """Windows of `k1` and `k2` in one call, as in the graph's examples."""
        length = inputs[self.position].shape[self.length_dim] + read_size(self.appended, inputs)
        fine, coarse = state_slots(length, self.geometry)
        return int(fine), int(coarse)

    def new_memory(self, slots: int, inputs: Sequence[Any]) -> Tensor:
        """Uninitialised compressed keys ``[n, B, Hkv, D]``."""
        heads, dim = self.keys
        shape = slots, self.rows(inputs), heads, dim
        return torch.empty(shape, dtype=self.dtype, device=inputs[self.position].device)


def with_room(memory: Tensor, slots: int) -> Tensor:
    """Compressed keys ``[n, B, Hkv, D]`` with room for so many slots: the same, or twice as many, copied."""
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
