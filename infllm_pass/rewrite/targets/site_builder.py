"""Inserting calls in the place of one site: what targets emit with."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from infllm_pass.emit.builder import Emitter
from infllm_pass.emit.mask_operands import MaskOperands
from infllm_pass.graph.facts import GraphFacts, example_of
from infllm_pass.kernels.params import compute_dtype
from infllm_pass.kv_cache.invalidation import CacheUpkeep
from infllm_pass.kv_cache.spec import StateNodes
from infllm_pass.plan.site_plan import SitePlan
from infllm_pass.sites import AttentionSite, Operand


class SiteBuilder:
    """Inserts the calls that stand for a site, and makes their operands.

    Args:
        plan: the site's plan.
        site: the site.
        facts: what is known of its graph.
        emitter: inserts calls into the graph.
        masks: makes mask operands, which sites of one graph share.
        state: the inputs with the state that the target keeps of the site's cache; None for a target that keeps none.
    """

    def __init__(
        self,
        plan: SitePlan,
        site: AttentionSite,
        facts: GraphFacts,
        emitter: Emitter,
        masks: MaskOperands,
        state: StateNodes | None = None,
    ) -> None:
        self._plan = plan
        self._site = site
        self._facts = facts
        self._emitter = emitter
        self._masks = masks
        self._state = state

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call, see `Emitter.call`."""
        return self._emitter.call(self._site.node, target, *args, **kwargs)

    def operands(self, *operands: Operand) -> list[fx.Node]:
        """The site's tensors ``[B, H, L, D]`` in the dtype it computes in, which autocast may have made another.

        Args:
            operands: some of the site's; none: queries, keys and values, these two before heads were repeated.
        """
        site = self._site
        nodes = [
            self._emitter.operand(site.node, operand, site.query)
            for operand in operands or (site.query, site.key_heads, site.value_heads)
        ]
        return [node if example_of(node).dtype == site.dtype else self.call("to", node, site.dtype) for node in nodes]

    def unit_stride(self, node: fx.Node) -> fx.Node:
        """The tensor with its last dimension adjacent in memory, as the Triton kernels read it."""
        return node if example_of(node).stride(-1) == 1 else self.call("contiguous", node)

    def mask_arguments(self) -> tuple[Any, ...]:
        """What the mask was proved to be as arguments of the operators, see `MaskOperands.arguments`."""
        return self._masks.arguments(self._plan, self._site)

    def key_bias(self) -> list[fx.Node]:
        """The numbers that are added to the scores, see `MaskOperands.key_bias`."""
        return self._masks.key_bias(self._plan, self._site)

    def terms(self) -> dict[str, Any]:
        """What the scores have beside the mask, by the names of the operators' arguments.

        A bias is one tensor ``[B or 1, Hkv or 1, Lk]``, sinks are ``[Hq]``. Several biases are added up in the dtype
        that scores are summed in; a single one is not converted, which would read all of a cache's.
        """
        site, wide = self._site, compute_dtype(self._site.dtype)
        biases = self.key_bias()
        bias = biases[0] if biases else None
        if len(biases) > 1:
            first, *others = (
                each if example_of(each).dtype == wide else self.call("to", each, wide) for each in biases
            )
            bias = first
            for each in others:
                bias = self.call(operator.add, bias, each)
        return {"key_bias": bias, "sinks": self._masks.sinks(site), "softcap": site.softcap}

    def decoding_arguments(self) -> tuple[StateNodes, tuple[Any, ...]]:
        """The cache's state, true to what the graph wrote to the cache, and lengths, starts, key_mask and window.

        See `CacheUpkeep.emit` and `MaskOperands.rows`.
        """
        if self._state is None:
            raise TypeError("the target keeps no state of caches: return a layout from its state()")
        rows = self._masks.rows(self._plan, self._site)
        CacheUpkeep(self._facts, self._emitter, self._masks).emit(self._plan, self._site, self._state, rows[1])
        return self._state, rows
