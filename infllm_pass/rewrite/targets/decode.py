"""The decode operator: few queries over a cache, of whose keys the scorer's state is kept from call to call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.emit.mask_operands import ROW_ARGUMENTS
from infllm_pass.graph.facts import example_of, same, size, storage
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.scorer import scorer_of
from infllm_pass.kv_cache.spec import StateTensor
from infllm_pass.lowering.ops.attention_args import DECODE, geometry_text
from infllm_pass.lowering.ops.decode import decode_attention
from infllm_pass.masks.normal_form import BATCH, KEY
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


def _are_kept_with_keys(request: Request) -> bool:
    """Whether a key's biases lie in the cache's memory, in the key's own slot.

    Then they change only as the key may: what is kept of both is void together.
    """
    keys, plan = request.site.key_heads, request.plan
    slot = size(keys.example.stride(2))
    for bias in () if plan.mask is None else plan.mask.key_terms.bias:
        node = bias.leaf[2]
        if bias.by_position or storage(node) is None or storage(node) != storage(keys.node):
            return False
        example = example_of(node)
        steps = {at: size(step) for at, step in zip(bias.index, example.stride(), strict=True)}
        numbers = (at * step for at, step in steps.items() if at.is_Integer)
        behind = sum(numbers, size(example.storage_offset())) - size(keys.example.storage_offset())
        row, step = (steps.get(at, sympy.Integer(0)) for at in (BATCH, KEY))
        one_row = size(keys.example.shape[0]) == 1 or same(row, size(keys.example.stride(0)))
        if not one_row or not same(step, slot) or not 0 <= behind < slot:
            return False
    return True


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
        if request.geometry.agnostic_blocks and not _are_kept_with_keys(request):
            return Refusal("its keys' bias lies in other memory than the cache: what is pooled of it may change")
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
