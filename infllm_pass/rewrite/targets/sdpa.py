"""PyTorch's fused attention with its causal flag, for sites whose mask says no more than that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from infllm_pass.graph.facts import example_of, size
from infllm_pass.plan.site_plan import Lowering
from infllm_pass.rewrite.targets.site_builder import SiteBuilder
from infllm_pass.rewrite.targets.target import Kernels, Refusal, Request

_GQA_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""On CUDA only the half-precision flash kernels take grouped heads; float32 would fall back to N x N scores."""


class CausalSdpa:
    """``scaled_dot_product_attention(q, k, v, is_causal=True)``."""

    name = "sdpa"

    def accepts(self, request: Request) -> Refusal | None:
        """Sites that are plain causal attention and dense."""
        if request.lowering is not Lowering.CAUSAL:
            return Refusal(f"it computes {Lowering.CAUSAL.value} only")
        return None

    def state(self, request: Request) -> None:
        """Nothing is kept."""

    def kernels(self, request: Request) -> Kernels:
        """PyTorch chooses."""
        return Kernels("SDPA")

    def emit(self, request: Request, builder: SiteBuilder) -> fx.Node:
        """One call."""
        site, plan = request.site, request.plan
        grouped = site.query.example.device.type == "cpu" or site.dtype in _GQA_KERNEL_DTYPES
        key, value = (site.key_heads, site.value_heads) if grouped else (site.key, site.value)
        q, k, v = builder.operands(site.query, key, value)
        heads = [example_of(node).shape[1] for node in (q, k, v)]
        return builder.call(
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
