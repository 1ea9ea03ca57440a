"""The operators of block-sparse attention, which take every proved mask; without a selection they are dense."""

from __future__ import annotations

import operator

from torch import fx

from infllm_pass.emit.mask_operands import MASK_ARGUMENTS
from infllm_pass.lowering.ops.attention_args import ATTEND, COMPRESS, SELECT, geometry_text
from infllm_pass.lowering.ops.prefill import block_attention, compress_keys, select_blocks
from infllm_pass.plan.site_plan import Lowering
from infllm_pass.rewrite.checkpoints import mark_saved
from infllm_pass.rewrite.targets.site_builder import SiteBuilder
from infllm_pass.rewrite.targets.target import Kernels, Refusal, Request, operator_kernels, refuses_terms


class BlockSparse:
    """Compression and selection, where a site is sparse, and attention of the selected blocks."""

    name = "block-sparse"

    def accepts(self, request: Request) -> Refusal | None:
        """Every site, but those of a GPU that the model's own mask serves better than operators tuned for the CPU."""
        refused = refuses_terms(request)
        replaces_own_mask = request.lowering is Lowering.DENSE and (
            request.plan.in_cache or not request.plan.switchable
        )
        if refused is None and replaces_own_mask and (refusal := operator_kernels(request).refusal):
            return Refusal(f"dense attention is faster with the model's own mask: {refusal}")
        return refused

    def state(self, request: Request) -> None:
        """Nothing is kept: keys are compressed anew at every call."""

    def kernels(self, request: Request) -> Kernels:
        """The Triton kernels where they take the site."""
        return operator_kernels(request)

    def emit(self, request: Request, builder: SiteBuilder) -> fx.Node:
        """Compression and selection, if asked for, and attention; without a selection every row is dense."""
        config = request.config
        operands = builder.operands()
        if self.kernels(request).name == "triton":
            operands = [builder.unit_stride(node) for node in operands]
        scalars = {
            "scale": request.scale,
            "dense_len": config.switch_length,
            "geometry": geometry_text(request.geometry),
        }
        call = dict(zip(MASK_ARGUMENTS, builder.mask_arguments(), strict=True)) | scalars | builder.terms()
        selection: fx.Node | list[fx.Node] = []
        if request.lowering is Lowering.SPARSE:
            state = builder.call(compress_keys.default, *operands[:2], *COMPRESS.rest(call))
            selection = builder.call(select_blocks.default, *operands[:2], state, *SELECT.rest(call))
            if config.checkpoint_saves != "nothing":
                mark_saved(selection)
        attended = builder.call(block_attention.default, *operands, selection, *ATTEND.rest(call))
        if config.checkpoint_saves == "attention":
            mark_saved(attended)
        return builder.call(operator.getitem, attended, 0)
