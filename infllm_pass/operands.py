"""What a proof leaves of a site's masks, as arguments of the operators: vectors and numbers, nothing ``Lq x Lk``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.emission import Emitter
from infllm_pass.masks import KeyCondition, Segments
from infllm_pass.masks.emission import Site, build
from infllm_pass.masks.values import example_of
from infllm_pass.plan import SitePlan
from infllm_pass.sites import AttentionSite


class MaskOperands:
    """Makes the mask arguments of the operators, each tensor once for all sites of a graph that share it.

    Args:
        emitter: inserts calls into the graph.
    """

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._key_masks: dict[tuple[KeyCondition, ...], fx.Node] = {}
        self._bounds: dict[Segments, fx.Node] = {}

    def arguments(self, plan: SitePlan, site: AttentionSite) -> tuple[Any, ...]:
        """The arguments key_mask, offsets, cu_seqlens_q, cu_seqlens_k, offset and window of a site.

        The planner lets only sites through whose queries are the last of the keys: offsets are left out.
        """
        mask = plan.mask
        if mask is None:
            return (None,) * 6
        bounds = None if mask.segments is None else self._segment_bounds(mask.segments, site)
        window = None if mask.window is None else int(mask.window)
        return self._key_mask(mask.key_conditions, site), None, None, bounds, None, window

    def _key_mask(self, conditions: tuple[KeyCondition, ...], site: AttentionSite) -> fx.Node | None:
        """The keys' validity as a node ``[B, Lk]`` of dtype bool."""
        if not conditions:
            return None
        if conditions not in self._key_masks:
            tests = [self._test(condition, site) for condition in conditions]
            mask = tests[0]
            for test in tests[1:]:
                mask = self._call(site, torch.logical_and, mask, test)
            self._key_masks[conditions] = self._call(site, "expand", mask, list(self._extents(site)))
        return self._key_masks[conditions]

    def _test(self, condition: KeyCondition, site: AttentionSite) -> fx.Node:
        leaves = {name: node for name, _, node in condition.leaves}
        batch, length = self._extents(site)

        def size(symbol: sympy.Symbol) -> fx.Node:
            if symbol.name in leaves:
                return leaves[symbol.name]
            node, dim = sources[symbol]
            return node if dim is None else self._call(site, "size", node, dim)

        sources = condition.facts.size_sources
        test: fx.Node = build(
            condition.expression,
            Site(
                call=lambda target, *args, **kwargs: self._call(site, target, *args, **kwargs),
                leaf=lambda name: (leaves[name], tuple(example_of(leaves[name]).shape)),
                size=size,
                batch=batch,
                length=length,
                extents=(site.shape(site.key)[0], site.shape(site.key)[2]),
                device=site.key.example.device,
            ),
        )
        return test

    def _segment_bounds(self, segments: Segments, site: AttentionSite) -> fx.Node:
        """Where the sequences of all rows begin: int32 ``[B * Lk + 1]``."""
        if segments not in self._bounds:
            ids = self._call(site, "expand", segments.node, list(self._extents(site)))
            self._bounds[segments] = self._call(site, torch.ops.infllm.segment_bounds.default, ids)
        return self._bounds[segments]

    def _extents(self, site: AttentionSite) -> tuple[Any, Any]:
        """Rows and keys, numbers or nodes."""
        key = self._emitter.operand(site.node, site.key_heads, site.query)
        return self._emitter.size(site.node, key, 0), self._emitter.size(site.node, key, 2)

    def _call(self, site: AttentionSite, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._emitter.call(site.node, target, *args, **kwargs)
