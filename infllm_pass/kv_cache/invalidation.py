"""Invalidation inside a graph: lowers the count of compressed keys where the graph writes to other cache slots.

Writes to other slots than those of the queries' own keys lower the count of keys that the state stands for.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from infllm_pass.compat.tensors import storage_id
from infllm_pass.emit.builder import Emitter
from infllm_pass.emit.mask_operands import MaskOperands
from infllm_pass.graph.facts import GraphFacts, example_of, same, size, storage
from infllm_pass.graph.op_table import Write, read_write, written_arguments
from infllm_pass.kv_cache.spec import StateNodes
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.plan.cache_writes import written_slots
from infllm_pass.plan.planner import unemittable
from infllm_pass.plan.site_plan import SitePlan
from infllm_pass.sites import AttentionSite


def writers_of(graph: fx.Graph, keys: torch.Tensor) -> list[fx.Node]:
    """The nodes that may write to the memory of a tensor; other parts of its storage are other caches."""
    span = _span(keys)
    found = []
    for node in graph.nodes:
        for written in written_arguments(node):
            if storage(written) != storage_id(keys):
                continue
            other = _span(example_of(written))
            if span is None or other is None or (span[0] < other[1] and other[0] < span[1]):
                found.append(node)
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The elements of its storage between which a tensor lies; None where sizes are dynamic."""
    if not all(isinstance(number, int) for number in (tensor.storage_offset(), *tensor.shape, *tensor.stride())):
        return None
    begin = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return begin, begin + 1 + sum((int(extent) - 1) * int(stride) for extent, stride in steps)


class CacheUpkeep:
    """Keeps the count of compressed keys true to what the graph writes to a cache.

    Args:
        facts: what is known of the graph.
        emitter: inserts calls into the graph.
        masks: makes positions.
    """

    def __init__(self, facts: GraphFacts, emitter: Emitter, masks: MaskOperands) -> None:
        self._facts = facts
        self._emitter = emitter
        self._masks = masks
        self._interpreter = Interpreter(facts)

    def emit(self, plan: SitePlan, site: AttentionSite, state: StateNodes, starts: fx.Node | None) -> None:
        """Lower the count of a cache's compressed keys to what is unchanged, before a site reads it.

        Args:
            plan: the site's plan.
            site: the site.
            state: the cache's state.
            starts: each row's first key; None: 0.
        """
        count = state.filled
        if starts is not None:
            moved = self._call(site, operator.ne, state.first, starts)
            count = self._call(site, "masked_fill", count, moved, 0)
            self._call(site, "copy_", state.first, starts)
        for writer in writers_of(self._facts.graph, site.key_heads.example):
            count = self._lowered(plan, site, writer, count, starts)
        if count is not state.filled:
            self._call(site, "copy_", state.filled, count)

    def _lowered(
        self, plan: SitePlan, site: AttentionSite, writer: fx.Node, count: fx.Node, starts: fx.Node | None
    ) -> fx.Node:
        """The count after a node wrote to the cache."""
        write = read_write(writer)
        first, own = (None, False) if write is None else self._first_slot(plan, site, write)
        if own:
            return count
        if first is None:
            return self._call(site, torch.zeros_like, count)
        if starts is not None:
            first = self._call(site, operator.sub, first, starts)
        first = self._call(site, "to", self._call(site, "clamp", first, 0), torch.int32)
        return self._call(site, torch.minimum, count, first)

    def _first_slot(self, plan: SitePlan, site: AttentionSite, write: Write) -> tuple[fx.Node | None, bool]:
        """The first slot that is written, as a node if it is known; and whether only the queries' own are."""
        keys, target = site.key_heads.example, example_of(write.target)
        along = [
            dim
            for dim in range(target.dim())
            if same(size(target.shape[dim]), size(keys.shape[2])) and target.stride(dim) == keys.stride(2)
        ]
        place = write.entries[along[0]] if len(along) == 1 and len(write.entries) == target.dim() else None
        if place is None:
            return None, False
        found = written_slots(self._interpreter, place, keys.shape[0])
        if found is None:
            return None, False
        start, extent = found
        offset = plan.mask.causal_offset if plan.mask is not None else None
        if same(start, offset) and extent is not None and same(extent, size(site.shape(site.query)[2])):
            return None, True
        leaves = self._interpreter.tensors_in(start)
        if isinstance(place, slice) and start.is_nonnegative is not True:  # it may count from the end
            return None, False
        if unemittable(start, leaves, self._interpreter, site):
            return None, False
        return self._masks.position(start, leaves, site), False

    def _call(self, site: AttentionSite, target: Any, *args: Any) -> fx.Node:
        return self._emitter.call(site.node, target, *args)
