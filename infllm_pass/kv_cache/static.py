"""Static caches: tensors of fixed capacity that a graph writes to in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from infllm_pass.compat.tensors import storage_id
from infllm_pass.graph.facts import GraphFacts, example_of, same, size, storage
from infllm_pass.graph.subgraphs import input_name
from infllm_pass.kv_cache.invalidation import writers_of
from infllm_pass.kv_cache.spec import UNKNOWN_SIZES, StateLayout, StateTensor, refused_queries
from infllm_pass.sites import AttentionSite


@dataclass(frozen=True)
class StaticCacheSpec:
    """A static cache whose state a graph keeps.

    Attributes:
        position: place of the tensor among the graph's inputs.
        name: what the caller knows it by.
        batch: number of rows, or the dimension of the tensor that says it.
        batch_is_dim: which of the two.
        keys: ``[Hkv, C, D]``, the sizes of one row of keys.
        view: storage offset and strides of the keys in the tensor's memory.
        padded: whether a mask says where rows begin; without one they begin in slot 0, and windows with them.
        layout: the tensors that are kept.
    """

    position: int
    name: str
    batch: int
    batch_is_dim: bool
    keys: tuple[int, int, int]
    view: tuple[Any, ...]
    padded: bool
    layout: StateLayout

    @classmethod
    def of(cls, site: AttentionSite, facts: GraphFacts, layout: StateLayout, *, padded: bool) -> StaticCacheSpec | str:
        """The cache that a site decodes from; a text says why no state of it can be kept.

        Args:
            site: the site.
            facts: what is known of the graph.
            layout: the tensors to keep.
            padded: see the attributes.
        """
        keys, cell = site.key_heads.example, storage(site.key_heads.node)
        inputs = [node for node in facts.graph.nodes if node.op == "placeholder"]
        position = next((place for place, node in enumerate(inputs) if storage(node) == cell), None)
        if position is None or storage_id(keys) != cell:
            return "it is copied in the graph"
        if facts.is_written_elsewhere(site.key_heads.node):
            return "a nested graph writes to it"
        if any(not writer < site.node for writer in writers_of(facts.graph, keys)):
            return "the graph writes to it after it was read"
        refused = refused_queries(site)
        if refused is not None:
            return refused
        node, batch = inputs[position], keys.shape[0]
        dims = [dim for dim, extent in enumerate(example_of(node).shape) if same(size(extent), size(batch))]
        if not isinstance(batch, int) and not dims:
            return UNKNOWN_SIZES
        sizes = int(keys.shape[1]), int(keys.shape[2]), int(keys.shape[3])
        view = (str(keys.storage_offset()), *(str(stride) for stride in keys.stride()))
        fixed = isinstance(batch, int)
        rows = batch if fixed else dims[0]
        return cls(position, input_name(node), rows, not fixed, sizes, view, padded, layout)

    def rows(self, cache: torch.Tensor) -> int:
        """Rows of the keys in a tensor at run time."""
        return cache.shape[self.batch] if self.batch_is_dim else self.batch

    def tensors(self, batch: Any, dtype: torch.dtype) -> tuple[StateTensor, ...]:
        """The tensors that are kept of so many rows."""
        return self.layout((batch, *self.keys), dtype)

    def examples(self, keys: torch.Tensor) -> list[torch.Tensor]:
        """The same as the graph gets them, for an example of the keys ``[B, Hkv, C, D]``."""
        return new_tensors(self.tensors(keys.shape[0], keys.dtype), keys.device)


def new_tensors(described: tuple[StateTensor, ...], device: torch.device) -> list[torch.Tensor]:
    """Uninitialised tensors."""
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in described]
