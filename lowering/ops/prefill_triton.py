"""Attention over whole prompts in Triton kernels: what the operators of `prefill` compute on CUDA devices.

Nothing is read on the host, and grids follow from shapes alone. The state is what the scorer reads of the keys, K1 and
K2 (`CompressedKeys`) or index keys (`IndexKeys`), and the table of sequences; a selection is the lists of blocks
(`TileLists`) and the tables of tiles (`TilePlan`), so that attention and its gradient find them planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infllm_pass.errors import ShapeError
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.scorer import INDEX_DTYPES
from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.backward.dkv import key_gradients
from infllm_pass.kernels.triton.backward.dq import output_delta, query_gradient
from infllm_pass.kernels.triton.backward.sinks import sink_gradient
from infllm_pass.kernels.triton.index_keys import SLACK_KEYS, IndexKeys, index_keys
from infllm_pass.kernels.triton.prefill import compress, pooled, token_scores
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.prefill.compress import LEAD_SLOTS, SLACK_SLOTS, CompressedKeys, slots_of
from infllm_pass.kernels.triton.tile_schedule import (
    cut_panels,
    key_bounds,
    list_packed_sequences,
    list_sequences,
    panel_bound,
)
from infllm_pass.kernels.triton.tile_tables import SequenceTable, TileLists, TilePlan, TileShape, padded_dim

from .attention_args import AttentionCall

SELECTION = 5
"""Tensors of a selection that is not empty."""

LISTS = ("blocks", "tokens", "counts")
"""Its first ones."""


def state_count(geometry: BlockGeometry) -> int:
    """Tensors of the state."""
    return 2 if geometry.scorer == "tokens" and geometry.score_dtype == "key" else 3


def compress_keys(q: Tensor, k: Tensor, call: AttentionCall) -> list[Tensor]:
    """`infllm::compress_keys`."""
    if _is_empty(q, k):
        kept = [k.new_empty(0, dtype=dtype) for _, dtype, *_ in _state_shapes(k, call.geometry)]
        return [*kept, q.new_empty(0, dtype=torch.int32)]
    table = _list_sequences(q, k, call)
    if call.geometry.scorer == "tokens":
        return [*index_keys(k, geometry=call.geometry).tensors, table.sequences]
    keys = compress.compress_keys(k, table, geometry=call.geometry)
    return [keys.fine, keys.coarse, table.sequences]


def select_blocks(q: Tensor, k: Tensor, state: Sequence[Tensor], call: AttentionCall) -> list[Tensor]:
    """`infllm::select_blocks`.

    Raises:
        ShapeError: the state is not that of these keys.
    """
    shape = _tile_shape(q, k, call)
    *kept, sequences = state
    if _is_empty(q, k):
        dtypes = (torch.int16, shape.mask_dtype, torch.int32, torch.int32, torch.int32)
        return [q.new_empty(0, dtype=dtype) for dtype in dtypes]
    for buffer, (name, dtype, *expected) in zip(kept, _state_shapes(k, call.geometry), strict=True):
        if (
            buffer.dtype != dtype
            or buffer.dim() != len(expected)
            or any(found != size for found, size in zip(buffer.shape, expected, strict=True))
            or not buffer.is_contiguous()
        ):
            raise ShapeError(
                f"{name} has shape {tuple(buffer.shape)} of {buffer.dtype}: expected {tuple(expected)} of {dtype}, "
                "contiguous; give infllm::select_blocks the state that infllm::compress_keys made of the same keys"
            )
    # A table of its own: results of an operator are no views of what it was given.
    table = SequenceTable(sequences.clone(), call.cu_seqlens_k is not None)
    plan = cut_panels(shape, table, batch=q.shape[0], length_q=q.shape[2])
    batch, heads, length_k, _ = k.shape
    numbers = {name: getattr(call, name) for name in ("geometry", "scale", "dense_len", "window", "softcap")}
    if call.geometry.scorer == "tokens":
        keys = IndexKeys(kept[0], kept[1] if len(kept) > 1 else None)
        numbers |= {"heads_kv": heads, "key_mask": call.key_mask}
        lists = token_scores.select_tiles(q, keys, plan, length_k=length_k, **numbers)
    else:
        compressed = CompressedKeys(*kept, batch, heads, *slots_of(length_k, call.geometry))  # type: ignore[call-arg]
        lists = pooled.select_tiles(q, compressed, plan, length_k=length_k, key_bias=call.key_bias, **numbers)
    return [lists.blocks, lists.tokens, lists.counts, plan.sequences, plan.panels]


def _state_shapes(k: Tensor, geometry: BlockGeometry) -> list[tuple[Any, ...]]:
    """Name, dtype and sizes of the tensors of a state, without the table of sequences."""
    batch, heads, length, dim = k.shape
    if geometry.scorer == "tokens":
        count = batch * heads * length + SLACK_KEYS
        kept = ("ki", INDEX_DTYPES.get(geometry.score_dtype, k.dtype), count, padded_dim(geometry.score_dims))
        return [kept] if geometry.score_dtype == "key" else [kept, ("ki_scale", torch.float32, count)]
    around = LEAD_SLOTS.value + SLACK_SLOTS
    slots = zip(("K1", "K2"), slots_of(length, geometry), strict=True)
    return [(name, k.dtype, batch * heads * number + around, dim) for name, number in slots]


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Sequence[Tensor], call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """`infllm::block_attention`."""
    if _is_empty(q, k):
        batch, heads, length, _ = q.shape
        if call.sinks is None:
            log_sum = q.new_full((batch, heads, length), float("-inf"), dtype=torch.float32)
        else:
            log_sum = call.sinks.float()[None, :, None].repeat(batch, 1, length)
        return q.new_zeros(batch, length, heads, v.shape[3]).transpose(1, 2), log_sum
    return attention_forward(_inputs(q, k, v, selection, call))


def block_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Sequence[Tensor],
    call: AttentionCall,
) -> tuple[Tensor, ...]:
    """Gradients of `infllm::block_attention_backward`, one after the other; bitwise the same in every run."""
    if _is_empty(q, k):
        return tuple(x.new_zeros(x.shape) for x in (q, k, v, call.key_bias, call.sinks) if x is not None)
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    given = _inputs(q, k, v, selection, call)
    delta = output_delta(grad_out, out)
    grad_k, grad_v, grad_bias = key_gradients(grad_out, lse, delta, given)
    gradients = query_gradient(grad_out, lse, delta, given), grad_k, grad_v
    grad_sinks = None if call.sinks is None else sink_gradient(call.sinks, lse, delta)
    return *gradients, *(gradient for gradient in (grad_bias, grad_sinks) if gradient is not None)


def _inputs(q: Tensor, k: Tensor, v: Tensor, selection: Sequence[Tensor], call: AttentionCall) -> AttentionInputs:
    """A call of attention as the kernels take it; errors: see `_selected`."""
    names = ("geometry", "scale", "dense_len", "key_mask", "window", "key_bias", "sinks", "softcap")
    numbers = {name: getattr(call, name) for name in names}
    whole = _covers_every_query(q, k, call)
    return AttentionInputs(q, k, v, *_selected(q, k, selection, call), **numbers, every_query=whole)


def _selected(
    q: Tensor, k: Tensor, selection: Sequence[Tensor], call: AttentionCall
) -> tuple[TileLists | None, TilePlan]:
    """The lists of a selection, None for an empty one, and the tables.

    Raises:
        ShapeError: it is no selection of `select_blocks` here.
    """
    shape = _tile_shape(q, k, call)
    if not selection:
        return None, cut_panels(shape, _list_sequences(q, k, call), batch=q.shape[0], length_q=q.shape[2])
    blocks, tokens, counts, sequences, panels = selection
    expected = panel_bound(shape, call.cu_seqlens_k is not None, sequences, batch=q.shape[0], length_q=q.shape[2])
    for name, tensor, sizes in (
        ("panels", panels, (expected, panels.shape[1])),
        *((name, each, (expected * shape.tiles, k.shape[1])) for name, each in zip(LISTS, selection[:3], strict=True)),
    ):
        if tensor.shape[0] != sizes[0] or tensor.shape[1] != sizes[1]:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}: expected {sizes} first; give infllm::block_attention the "
                "selection that infllm::select_blocks made of the same queries"
            )
    packed = call.cu_seqlens_k is not None
    return TileLists(blocks, tokens, counts), TilePlan(sequences, packed, shape, panels)


def _tile_shape(q: Tensor, k: Tensor, call: AttentionCall) -> TileShape:
    return TileShape.choose(int(q.shape[1]) // int(k.shape[1]), call.geometry.query_block)  # numbers from here on


def _list_sequences(q: Tensor, k: Tensor, call: AttentionCall) -> SequenceTable:
    """Where the sequences of a call lie."""
    shape = _tile_shape(q, k, call)
    sizes = {
        "batch": q.shape[0],
        "length_q": q.shape[2],
        "length_k": k.shape[2],
        "block_size": call.geometry.block_size,
        "offset": call.first_key(q, k),
    }
    if call.cu_seqlens_k is not None:
        return list_packed_sequences(shape, call.cu_seqlens_k, call.cu_seqlens_q, **sizes)
    bounds = None if call.key_mask is None else key_bounds(call.key_mask)
    return list_sequences(shape, **sizes, device=q.device, offsets=call.offsets, key_bounds=bounds)


def _covers_every_query(q: Tensor, k: Tensor, call: AttentionCall) -> bool:
    """Whether every query is known to stand at a key; if not, the others' results are filled in beforehand."""
    placed = (call.key_mask, call.offsets, call.cu_seqlens_k, call.offset)
    return all(each is None for each in placed) and bool(q.shape[2] <= k.shape[2])


def _is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is no query or no key; compilers know that a dynamic size is not 0, so nothing is guarded."""
    return q.shape[0] == 0 or q.shape[2] == 0 or k.shape[2] == 0
