"""Rewriting planned sites in place: to sparse operators, or to attention without a mask tensor.

A site on a CUDA device becomes the operator of the Triton kernels where these take it; every other site becomes the
operators that run everywhere, on the CPU in C++.

Invariants: the graph computes what it did (up to the method's own approximation on the sparse side); every
emitted node is of the graph's dialect and carries the example value and the source location of the site it replaces;
a node is erased only if it is known to be pure and nothing uses it any more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.emit.builder import Emitter
from infllm_pass.emit.mask_operands import MaskOperands
from infllm_pass.graph.dce import dead_users, pure
from infllm_pass.graph.facts import GraphFacts, example_of, size
from infllm_pass.kernels.cpu import native
from infllm_pass.kv_cache.static import CacheInputs, CacheUpkeep, StateNodes
from infllm_pass.lowering.ops.checks import refused_by_tiled
from infllm_pass.lowering.ops.prefill_cpu import attention_arguments, selection_arguments
from infllm_pass.plan.length_guard import Branch
from infllm_pass.plan.planner import SitePlan
from infllm_pass.sites import AttentionSite, Operand

_GQA_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""On CUDA only the half-precision flash kernels take grouped heads; float32 would fall back to N x N scores."""

_NEVER_SPARSE = torch.iinfo(torch.int32).max
"""A `dense_len` beyond all lengths: decoding then is dense, in the operator that splits the keys among programs."""


class Kernels(Enum):
    """What computes a site. The value is what the report calls it."""

    TRITON = "triton"
    CPP = "C++"
    TORCH = "torch operators"
    SDPA = "SDPA"


class CacheUse(Enum):
    """What becomes of a cache's compressed keys. The value is what the report calls it."""

    NONE = ""
    CARRIED = "carried"
    RECOMPUTED = "recomputed"


@dataclass(frozen=True)
class Outcome:
    """What became of a site.

    Attributes:
        mask_elided: whether its mask tensor, if it had one, is no longer read.
        kernels: what computes it.
        refusal: why the Triton kernels do not take a site on a GPU that is left to the torch operators; else "".
        cache_state: what becomes of the compressed keys of a cache.
        cache_detail: why they are not carried.
    """

    mask_elided: bool = False
    kernels: Kernels = Kernels.SDPA
    refusal: str = ""
    cache_state: CacheUse = CacheUse.NONE
    cache_detail: str = ""

    @property
    def rewritten(self) -> bool:
        """Whether the site was changed at all: every rewriting does without its mask tensor."""
        return self.mask_elided


class Rewriter:
    """Rewrites the sites of one graph.

    Args:
        facts: what is known of the graph.
        config: what sparse attention selects.
        caches: takes up the caches whose compressed keys the graph is to keep; None: it keeps none.
    """

    def __init__(self, facts: GraphFacts, config: SparseAttentionConfig, caches: CacheInputs | None = None) -> None:
        self.graph = facts.graph
        self.config = config
        self._facts = facts
        self._emitter = Emitter(facts.graph)
        self._masks = MaskOperands(self._emitter, facts)
        self._caches = caches

    def rewrite(self, plan: SitePlan, branch: Branch) -> Outcome:
        """Rewrite one site for one side of the length switch.

        Args:
            plan: the site's plan.
            branch: the side that this graph is compiled for.

        Returns:
            What became of it.
        """
        site = plan.site
        if not isinstance(site, AttentionSite) or not (plan.switchable or plan.maskless or plan.windowed):
            return Outcome()
        dense = plan.windowed or (plan.in_cache and not plan.maskless and branch is Branch.DENSE)
        if dense and self._is_left_to_untuned_kernels(plan, site):
            return Outcome()
        try:
            result, outcome = self._compute(plan, site, branch)
        except Exception:
            self._emitter.undo()
            self._masks = MaskOperands(self._emitter, self._facts)  # it may hold nodes that are gone
            raise
        self._emitter.keep({site.node: result})
        site.node.replace_all_uses_with(result)
        _erase_unused(self.graph, site.node)
        return outcome

    def _is_left_to_untuned_kernels(self, plan: SitePlan, site: AttentionSite) -> bool:
        """Whether a site on a GPU would be computed by operators tuned for the CPU, slower than with its mask."""
        examples = site.query.example, site.value_heads.example
        refusal = refused_by_tiled(*examples, float(plan.scale or 0.0), self.config.geometry)
        return refusal is not None and examples[0].device.type != "cpu"

    def _compute(self, plan: SitePlan, site: AttentionSite, branch: Branch) -> tuple[fx.Node, Outcome]:
        """Emit what replaces a site, in its layout and dtype."""
        outcome = Outcome(mask_elided=True)
        with self.graph.inserting_before(site.node):
            if plan.maskless and not (plan.switchable and branch is Branch.SPARSE):
                result = self._causal(plan, site)
            else:
                q, k, v = self._operands(site, site.query, site.key_heads, site.value_heads)
                example = example_of(q)
                refusal = refused_by_tiled(example, example_of(v), float(plan.scale or 0.0), self.config.geometry)
                kernels = Kernels.TRITON if refusal is None else Kernels.CPP if native.takes(example) else Kernels.TORCH
                refusal = refusal if refusal is not None and example.device.type != "cpu" else ""
                outcome = Outcome(True, kernels, refusal)
                state = self._state_of(plan, site, branch, refusal)
                if isinstance(state, StateNodes):
                    outcome = replace(outcome, cache_state=CacheUse.CARRIED)
                    dense_len = self.config.dense_len if branch is Branch.SPARSE else _NEVER_SPARSE
                    result = self._decode_attention(plan, site, q, k, v, state, kernels, dense_len)
                else:
                    if branch is Branch.SPARSE and (plan.in_cache or site.growth is not None):
                        outcome = replace(outcome, cache_state=CacheUse.RECOMPUTED, cache_detail=state)
                    attend = self._tiled_attention if kernels is Kernels.TRITON else self._block_attention
                    result = attend(plan, site, q, k, v, select=branch is Branch.SPARSE)
            result = self._emitter.layout(site.node, result, site.output_steps)
            if example_of(result).dtype != example_of(site.node).dtype:
                result = self._emit(site, "to", result, example_of(site.node).dtype)
            result = self._emitter.strided_as(site.node, result)
        return result, outcome

    def _causal(self, plan: SitePlan, site: AttentionSite) -> fx.Node:
        grouped = site.query.example.device.type == "cpu" or site.dtype in _GQA_KERNEL_DTYPES
        key, value = (site.key_heads, site.value_heads) if grouped else (site.key, site.value)
        q, k, v = self._operands(site, site.query, key, value)
        heads = [example_of(node).shape[1] for node in (q, k, v)]
        return self._emit(
            site,
            F.scaled_dot_product_attention,
            q,
            k,
            v,
            None,
            0.0,
            plan.flagged or size(site.shape(site.query)[2]) != 1,  # a single query, the last of the keys, sees all
            scale=plan.scale,
            enable_gqa=heads[0] != heads[1] or heads[0] != heads[2],
        )

    def _tiled_attention(
        self, plan: SitePlan, site: AttentionSite, q: fx.Node, k: fx.Node, v: fx.Node, *, select: bool
    ) -> fx.Node:
        """Selection and attention in one operator of Triton kernels; without `select` every row is dense."""
        from infllm_pass.lowering.ops.prefill_triton import (
            tiled_arguments,  # needs Triton, which CPU installations lack
        )

        config = self.config
        operands = [self._unit_stride(site, node) for node in (q, k, v)]
        results = self._emit(
            site,
            torch.ops.infllm.tiled_attention.default,
            *operands,
            *self._masks.arguments(plan, site),
            plan.scale,
            config.dense_len,
            select,
            *tiled_arguments(config.geometry),
        )
        return self._emit(site, operator.getitem, results, 0)

    def _block_attention(
        self, plan: SitePlan, site: AttentionSite, q: fx.Node, k: fx.Node, v: fx.Node, *, select: bool
    ) -> fx.Node:
        """Selection, if asked for, and attention as the operators that run everywhere."""
        config = self.config
        call = (*self._masks.arguments(plan, site), plan.scale, config.dense_len)
        blocks = None
        if select:
            select_blocks = torch.ops.infllm.select_blocks.default
            blocks = self._emit(site, select_blocks, q, k, *call, *selection_arguments(config.geometry))
        block_attention = torch.ops.infllm.block_attention.default
        results = self._emit(site, block_attention, q, k, v, blocks, *call, *attention_arguments(config.geometry))
        return self._emit(site, operator.getitem, results, 0)

    def _state_of(self, plan: SitePlan, site: AttentionSite, branch: Branch, refusal: str) -> StateNodes | str:
        """The state of the cache that a site decodes from; a text says why the graph keeps no compressed keys.

        On a GPU the operator for the CPU would read lengths on the host, in calls that CUDA graphs record. Below
        `dense_len` a growing cache is another graph's; the first one above it compresses all keys.
        """
        if self._caches is None:
            return "nothing outlives a call of an exported or nested graph"
        if refusal:
            return "the Triton kernels do not take it"
        if branch is Branch.DENSE and not plan.in_cache:
            return "its keys are too few"
        spec = self._caches.spec_of(plan, site, self._facts)
        return spec if isinstance(spec, str) else self._caches.state(spec, site, self.graph)

    def _decode_attention(
        self,
        plan: SitePlan,
        site: AttentionSite,
        q: fx.Node,
        k: fx.Node,
        v: fx.Node,
        state: StateNodes,
        kernels: Kernels,
        dense_len: int,
    ) -> fx.Node:
        """Attention of a few queries over a cache, its compressed keys kept from call to call."""
        rows = self._masks.rows(plan, site)
        upkeep = CacheUpkeep(self._facts, self._emitter, self._masks)
        upkeep.emit(plan, site, state, rows[1])
        geometry = self.config.geometry
        if kernels is Kernels.TRITON:
            from infllm_pass.lowering.ops.decode_triton import tiled_decode_arguments  # needs Triton

            target, arguments = torch.ops.infllm.tiled_decode_attention.default, tiled_decode_arguments(geometry)
            q, k, v = (self._unit_stride(site, node) for node in (q, k, v))
        else:
            target, arguments = torch.ops.infllm.decode_attention.default, selection_arguments(geometry)
        call = (*rows, plan.scale, dense_len, *arguments)
        results = self._emit(site, target, q, k, v, state.k1, state.k2, state.filled, *call)
        return self._emit(site, operator.getitem, results, 0)

    def _unit_stride(self, site: AttentionSite, node: fx.Node) -> fx.Node:
        """The tensor with its head dimension adjacent in memory, as the Triton kernels read it."""
        return node if example_of(node).stride(-1) == 1 else self._emit(site, "contiguous", node)

    def _operands(self, site: AttentionSite, *operands: Operand) -> list[fx.Node]:
        """The site's tensors ``[B, H, L, D]`` in the dtype it computes in, which autocast may have made another."""
        nodes = [self._emitter.operand(site.node, operand, site.query) for operand in operands]
        return [
            node if example_of(node).dtype == site.dtype else self._emit(site, "to", node, site.dtype) for node in nodes
        ]

    def _emit(self, site: AttentionSite, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call in the place of a site; see `Emitter.call`."""
        return self._emitter.call(site.node, target, *args, **kwargs)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without effect and, after it, those of its inputs that only it used."""
    pending = [node]
    while pending:
        candidate = pending.pop()
        if candidate._erased or not pure(candidate):
            continue
        users = dead_users(candidate)
        if users is None:
            continue
        inputs = [source for erased in (*users, candidate) for source in erased.all_input_nodes]
        for erased in (*users, candidate):
            graph.erase_node(erased)
        pending.extend(inputs)
