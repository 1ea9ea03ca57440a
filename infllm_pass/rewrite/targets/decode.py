"""The decode operator: few queries over a cache, of whose keys the scorer's state is kept from call to call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from infllm_pass.masks.normal_form import BATCH, HEAD, KEY, axes_of
from infllm_pass.plan.site_plan import Lowering
from infllm_pass.rewrite.targets.site_builder import SiteBuilder
from infllm_pass.rewrite.targets.target import Kernels, Refusal, Request, operator_kernels, refuses_terms

_NEVER_SPARSE = torch.iinfo(torch.int32).max
"""A `dense_len` beyond all lengths: decoding then is dense, in the operator that splits the keys among programs."""


BiasPlace: TypeAlias = tuple[str, str, float]
"""A bias in the memory of keys: how far behind a key it lies, numbers from head to head, and its factor."""


@dataclass(frozen=True)
class ScorerState:
    """What the scorer of a geometry keeps of keys.

    Attributes:
        geometry: the block geometry.
        importance: where the biases lie that blocks are chosen by; empty where none are.
    """

    geometry: BlockGeometry
    importance: tuple[BiasPlace, ...] = ()

    def __call__(self, keys: Sequence[Any], dtype: torch.dtype) -> tuple[StateTensor, ...]:
        """The scorer's tensors for keys ``[B, Hkv, L, D]``, ``[B, Hkv, ...]`` each."""
        batch, heads, length, dim = keys
        kept = scorer_of(self.geometry).state(self.geometry, length, dim, dtype)
        return tuple(StateTensor(each.name, (batch, heads, *each.shape), each.dtype) for each in kept)


def _places_beside_keys(request: Request) -> tuple[BiasPlace, ...] | None:
    """Where a key's biases lie in the cache's memory, if that is the key's own slot; None if some lie elsewhere.

    Where they do they change only as the key may: what is kept of both is void together.
    """
    keys, plan = request.site.key_heads, request.plan
    wanted = [size(step) for step in keys.example.stride()[:3]]
    found = []
    for bias in () if plan.mask is None else plan.mask.key_terms.bias:
        node = None if bias.leaf is None else bias.leaf[2]
        if node is None or bias.by_position or storage(node) is None or storage(node) != storage(keys.node):
            return None
        behind = size(example_of(node).storage_offset()) - size(keys.example.storage_offset())
        steps: list[sympy.Expr] = [sympy.Integer(0)] * 3
        for at, step in zip(bias.index, map(size, example_of(node).stride()), strict=True):
            axes = axes_of(at)
            if at.is_Integer:
                behind += at * step
            elif len(axes) == 1 and (at in (BATCH, KEY) or axes == (HEAD,)):
                steps[(BATCH, HEAD, KEY).index(axes[0])] += step
            else:
                return None
        one_row = size(keys.example.shape[0]) == 1
        fits = same(steps[2], wanted[2]) and (one_row or same(steps[0], wanted[0])) and steps[1] in (0, wanted[1])
        if not fits or not 0 <= behind < wanted[2]:
            return None
        found.append((str(behind), str(steps[1]), bias.factor))
    return tuple(found)


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
        if request.geometry.agnostic_blocks and _places_beside_keys(request) is None:
            return Refusal("its keys' bias lies in other memory than the cache: what is pooled of it may change")
        return refuses_terms(request)

    def state(self, request: Request) -> ScorerState:
        """Compressed keys and their importance, or index keys."""
        if not request.geometry.agnostic_blocks:
            return ScorerState(request.geometry)
        return ScorerState(request.geometry, _places_beside_keys(request) or ())

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
