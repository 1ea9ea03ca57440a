"""The operators of block-sparse attention, which take every proved mask; without a selection they are dense."""

from __future__ import annotations

import operator

import torch
from torch import fx

from infllm_pass.lowering.ops.prefill_cpu import attention_arguments, selection_arguments
from infllm_pass.plan.planner import Lowering
from infllm_pass.rewrite.targets.site_builder import SiteBuilder
from infllm_pass.rewrite.targets.target import Kernels, Refusal, Request, operator_kernels, refuses_bias


class BlockSparse:
    """Selection, where a site is sparse, and attention of the selected blocks."""

    name = "block-sparse"

    def accepts(self, request: Request) -> Refusal | None:
        """Every site, but those of a GPU that the model's own mask serves better than operators tuned for the CPU."""
        biased = refuses_bias(request)
        replaces_own_mask = request.lowering is Lowering.DENSE and (
            request.plan.in_cache or not request.plan.switchable
        )
        if biased is None and replaces_own_mask and (refusal := operator_kernels(request).refusal):
            return Refusal(f"dense attention is faster with the model's own mask: {refusal}")
        return biased

    def state(self, request: Request) -> None:
        """Nothing is kept: keys are compressed anew at every call."""

    def kernels(self, request: Request) -> Kernels:
        """The Triton kernels where they take the site."""
        return operator_kernels(request)

    def emit(self, request: Request, builder: SiteBuilder) -> fx.Node:
        """The operators of the site's device."""
        select = request.lowering is Lowering.SPARSE
        operands = builder.operands()
        if self.kernels(request).name == "triton":
            return _tiled(request, builder, [builder.unit_stride(node) for node in operands], select)
        return _portable(request, builder, operands, select)


def _tiled(request: Request, builder: SiteBuilder, operands: list[fx.Node], select: bool) -> fx.Node:
    """Selection and attention in one operator of Triton kernels; without `select` every row is dense."""
    from infllm_pass.lowering.ops.prefill_triton import tiled_arguments  # needs Triton, which CPU installations lack

    config = request.config
    call = (*builder.mask_arguments(), request.scale, config.dense_len, select, *tiled_arguments(config.geometry))
    return builder.call(operator.getitem, builder.call(torch.ops.infllm.tiled_attention.default, *operands, *call), 0)


def _portable(request: Request, builder: SiteBuilder, operands: list[fx.Node], select: bool) -> fx.Node:
    """Selection, if asked for, and attention as the operators that run everywhere."""
    config, (q, k, v) = request.config, operands
    call = (*builder.mask_arguments(), request.scale, config.dense_len)
    blocks = None
    if select:
        select_blocks = torch.ops.infllm.select_blocks.default
        blocks = builder.call(select_blocks, q, k, *call, *selection_arguments(config.geometry))
    block_attention = torch.ops.infllm.block_attention.default
    results = builder.call(block_attention, q, k, v, blocks, *call, *attention_arguments(config.geometry))
    return builder.call(operator.getitem, results, 0)
