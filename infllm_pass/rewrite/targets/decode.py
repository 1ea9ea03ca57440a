"""The decode operator: few queries over a cache, of whose keys the scorer's state is kept from call to call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from infllm_pass.emit.mask_operands import ROW_ARGUMENTS
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.scorer import scorer_of
from infllm_pass.kv_cache.spec import StateTensor
from infllm_pass.lowering.ops.attention_args import DECODE, geometry_text
from infllm_pass.lowering.ops.decode import decode_attention
from infllm_pass.plan.site_plan import Lowering
from infllm_pass.rewrite.targets.site_builder import SiteBuilder
from infllm_pass.rewrite.targets.target import Kernels, Refusal, Request, operator_kernels, refuses_terms

_NEVER_SPARSE = torch.iinfo(torch.int32).max
"""A `dense_len` beyond all lengths: decoding then is dense, in the operator that splits the keys among programs."""


@dataclass(frozen=True)
class ScorerState:
    """What the scorer of a geometry keeps of keys."""

    geometry: BlockGeometry

    def __call__(self, keys: Sequence[Any], dtype: torch.dtype) -> tuple[StateTensor, ...]:
        """The scorer's tensors for keys ``[B, Hkv, L, D]``, ``[B, Hkv, ...]`` each."""
        batch, heads, length, dim = keys
        kept = scorer_of(self.geometry).state(self.geometry, length, dim, dtype)
        return tuple(StateTensor(each.name, (batch, heads, *each.shape), each.dtype) for each in kept)


class Decode:
    """Selection and attention in one operator, which also compresses the keys that are new."""

    name = "decode"

    def accepts(self, request: Request) -> Refusal | None:
        """Sites over a cache.

        On a GPU the operator for the CPU would read lengths on the host, in calls that CUDA graphs record. Below
        `dense_len` a growing cache is another graph's; the first one above it compresses all keys.
        """
        if request.lowering is Lowering.CAUSAL:
            return Refusal("it computes no attention without a mask")
        if operator_kernels(request).refusal:
            return Refusal("the Triton kernels do not take it")
        if request.lowering is Lowering.DENSE and not request.plan.in_cache:
            return Refusal("its keys are too few")
        return refuses_terms(request)

    def state(self, request: Request) -> ScorerState:
        """Compressed keys, or index keys."""
        return ScorerState(request.geometry)

    def kernels(self, request: Request) -> Kernels:
        """The Triton kernels where they take the site."""
        return operator_kernels(request)

    def emit(self, request: Request, builder: SiteBuilder) -> fx.Node:
        """What keeps the state true to the graph's writes, and the operator."""
        operands = builder.operands()
        state, rows = builder.decoding_arguments()
        config = request.config
        dense_len = config.switch_length if request.lowering is Lowering.SPARSE else _NEVER_SPARSE
        if self.kernels(request).name == "triton":
            operands = [builder.unit_stride(node) for node in operands]
        scalars = {"scale": request.scale, "dense_len": dense_len, "geometry": geometry_text(request.geometry)}
        call = dict(zip(ROW_ARGUMENTS, rows, strict=True)) | scalars | builder.terms()
        kept = [*state.tensors, state.filled]
        return builder.call(
            operator.getitem, builder.call(decode_attention.default, *operands, kept, *DECODE.rest(call)), 0
        )
