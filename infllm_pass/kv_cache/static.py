"""Compressed keys of a cache as inputs of the graph that reads it: which caches, and what stays true of the keys.

A graph of a few queries over a cache calls the decode operator, which keeps the compressed keys from step to step. They
are inputs that the pass adds to the graph, a set for each cache; who calls the graph hands them over, see
`cached_graph`. The cache is a tensor that the graph writes to, or one that it continues by concatenation, see
`growing`. What the graph itself writes to the cache is read here: slots other than those of the queries' own keys lower
the count of keys that are compressed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from infllm_pass.emit.builder import Emitter
from infllm_pass.emit.mask_operands import MaskOperands
from infllm_pass.graph.facts import GraphFacts, example_of, same, size, storage
from infllm_pass.graph.op_table import Write, read_write, written_arguments
from infllm_pass.graph.subgraphs import fake_mode_of, input_name
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kv_cache.dynamic import GrowingCacheSpec
from infllm_pass.lowering.ops.decode_cpu import state_slots
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.plan.cache_writes import written_slots
from infllm_pass.plan.planner import SitePlan, unemittable
from infllm_pass.sites import AttentionSite

MOST_QUERIES = 16
"""Queries of a row up to which a graph decodes: the decode operator goes through them one by one."""


@dataclass(frozen=True)
class CacheSpec:
    """A cache whose compressed keys a graph keeps.

    Attributes:
        position: place of the tensor among the graph's inputs.
        name: what the caller knows it by.
        batch: number of rows, or the dimension of the tensor that says it.
        batch_is_dim: which of the two.
        keys: ``[Hkv, C, D]``, the sizes of one row of keys.
        view: storage offset and strides of the keys in the tensor's memory.
        padded: whether a mask says where rows begin; without one they begin in slot 0, and windows with them.
        geometry: the block geometry.
    """

    position: int
    name: str
    batch: int
    batch_is_dim: bool
    keys: tuple[int, int, int]
    view: tuple[Any, ...]
    padded: bool
    geometry: BlockGeometry

    def rows(self, cache: torch.Tensor) -> int:
        """Rows of the keys in a tensor at run time."""
        return cache.shape[self.batch] if self.batch_is_dim else self.batch

    def state_shapes(self, batch: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The shapes of `k1` and `k2`."""
        heads, capacity, dim = self.keys
        fine, coarse = state_slots(capacity, self.geometry)
        return (batch, heads, int(fine), dim), (batch, heads, int(coarse), dim)

    def examples(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`k1` and `k2` as the graph gets them, for an example of the keys."""
        shapes = self.state_shapes(keys.shape[0])
        fine, coarse = (torch.empty(shape, dtype=keys.dtype, device=keys.device) for shape in shapes)
        return fine, coarse


AnyCacheSpec = CacheSpec | GrowingCacheSpec


@dataclass(frozen=True)
class StateNodes:
    """The inputs that hold a cache's state: see `cached_graph.CacheState`."""

    k1: fx.Node
    k2: fx.Node
    filled: fx.Node
    first: fx.Node


class CacheInputs:
    """The states that a graph needs, added to it as inputs.

    Args:
        geometry: the block geometry.
    """

    def __init__(self, geometry: BlockGeometry) -> None:
        self.geometry = geometry
        self.specs: dict[AnyCacheSpec, StateNodes] = {}

    @property
    def examples(self) -> list[torch.Tensor]:
        """Fake tensors for the added inputs, in their order."""
        nodes = [node for state in self.specs.values() for node in vars(state).values()]
        return [example_of(node) for node in nodes]

    def drop_unused(self, graph: fx.Graph) -> None:
        """Take back the inputs of sites that were not rewritten after all."""
        for spec, state in list(self.specs.items()):
            nodes: list[fx.Node] = list(vars(state).values())
            if not any(node.users for node in nodes):
                for node in nodes:
                    graph.erase_node(node)
                del self.specs[spec]

    def spec_of(self, plan: SitePlan, site: AttentionSite, facts: GraphFacts) -> AnyCacheSpec | str:
        """The cache that a site decodes from; a text says why it decodes from nothing that outlives the call.

        Where a size that matters is dynamic, deciding guards on it.
        """
        if not plan.switchable:
            return "the site stays dense"
        if any(example_of(operand.node).requires_grad for operand in (site.query, site.key_heads, site.value_heads)):
            return "gradients are asked for"
        if site.key_heads.example.dtype != site.dtype:
            return f"its keys are converted to {site.dtype}"
        padded = plan.mask is not None and bool(plan.mask.key_conditions)
        if plan.in_cache:
            return self._static_spec(site, facts, padded)
        return self._growing_spec(plan, site, facts, padded)

    def _static_spec(self, site: AttentionSite, facts: GraphFacts, padded: bool) -> CacheSpec | str:
        """The spec of a cache that the graph writes to."""
        keys, cell = site.key_heads.example, storage(site.key_heads.node)
        inputs = [node for node in facts.graph.nodes if node.op == "placeholder"]
        position = next((place for place, node in enumerate(inputs) if storage(node) == cell), None)
        if position is None or storage_of(keys) != cell:
            return "it is copied in the graph"
        if facts.is_written_elsewhere(site.key_heads.node):
            return "a nested graph writes to it"
        if any(not writer < site.node for writer in _writers(facts.graph, keys)):
            return "the graph writes to it after it was read"
        if not _is_decoding(site):
            return _MANY_QUERIES
        node, batch = inputs[position], keys.shape[0]
        dims = [dim for dim, extent in enumerate(example_of(node).shape) if same(size(extent), size(batch))]
        if not isinstance(batch, int) and not dims:
            return _UNKNOWN_SIZES
        sizes = int(keys.shape[1]), int(keys.shape[2]), int(keys.shape[3])
        view = (str(keys.storage_offset()), *(str(stride) for stride in keys.stride()))
        fixed = isinstance(batch, int)
        rows = batch if fixed else dims[0]
        return CacheSpec(position, input_name(node), rows, not fixed, sizes, view, padded, self.geometry)

    def _growing_spec(
        self, plan: SitePlan, site: AttentionSite, facts: GraphFacts, padded: bool
    ) -> GrowingCacheSpec | str:
        """The spec of a cache that grows by concatenation."""
        if site.growth is None:
            return "its keys are no cache"
        if isinstance(site.growth.continuation, str):
            return site.growth.continuation
        if site.growth.trimmed:
            return "the graph cuts its keys"
        if plan.mask is not None and plan.mask.segments is not None:
            return "its sequences are packed"
        if not _is_decoding(site):
            return _MANY_QUERIES
        spec = GrowingCacheSpec.of(
            site.key_heads.example,
            site.growth.continuation,
            site.growth.appended,
            facts,
            padded=padded,
            geometry=self.geometry,
        )
        return spec or _UNKNOWN_SIZES

    def state(self, spec: AnyCacheSpec, site: AttentionSite, graph: fx.Graph) -> StateNodes:
        """The inputs with a cache's state, added to the graph unless they are there."""
        if spec not in self.specs:
            keys = site.key_heads.example
            with fake_mode_of(site.key_heads.node) or torch.no_grad():
                fine, coarse = spec.examples(keys)
                counts = [torch.empty(keys.shape[0], dtype=torch.int32, device=keys.device) for _ in range(2)]
            number, values = len(self.specs), (fine, coarse, *counts)
            names = ("k1", "k2", "filled", "first")
            nodes = [
                _add_input(graph, f"cache{number}_{name}", value) for name, value in zip(names, values, strict=True)
            ]
            self.specs[spec] = StateNodes(*nodes)
        return self.specs[spec]


_MANY_QUERIES = f"a call has more than {MOST_QUERIES} queries"
_UNKNOWN_SIZES = "its sizes cannot be told from the graph's inputs"


def _is_decoding(site: AttentionSite) -> bool:
    """Whether a site has few queries; guards on their number where it is dynamic."""
    return bool(site.shape(site.query)[2] <= MOST_QUERIES)


def may_read_a_cache(graph: fx.Graph) -> bool:
    """Whether an input of a graph may be a cache of keys: a tensor of at least four dimensions."""
    inputs = (example_of(node) for node in graph.nodes if node.op == "placeholder")
    return any(isinstance(example, torch.Tensor) and example.dim() >= 4 for example in inputs)


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of the memory that a tensor lives in."""
    cell: int = tensor.untyped_storage()._cdata
    return cell


def _add_input(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    """Append an input whose address does not change, so that writing to it keeps CUDA graphs possible."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        node = graph.placeholder(name)
    node.meta["example_value"] = example
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = None
    return node


def _writers(graph: fx.Graph, keys: torch.Tensor) -> list[fx.Node]:
    """The nodes that may write to the memory of a tensor; other parts of its storage are other caches."""
    span = _span(keys)
    found = []
    for node in graph.nodes:
        for written in written_arguments(node):
            if storage(written) != storage_of(keys):
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
        for writer in _writers(self._facts.graph, site.key_heads.example):
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
