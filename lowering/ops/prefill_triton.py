"""Attention over whole prompts in Triton kernels: what the operators of `prefill` compute on CUDA devices.

Nothing is read on the host, and grids follow from shapes alone. The state is K1 and K2 (`CompressedKeys`) and the table
of sequences; a selection is the lists of blocks (`TileLists`) and the tables of tiles (`TilePlan`), so that attention
and its gradient find them planned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infllm_pass.errors import ShapeError
from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.backward.dkv import key_gradients
from infllm_pass.kernels.triton.backward.dq import output_delta, query_gradient
from infllm_pass.kernels.triton.prefill import compress, pooled
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.prefill.compress import LEAD_SLOTS, SLACK_SLOTS, CompressedKeys, slots_of
from infllm_pass.kernels.triton.tile_schedule import (
    cut_panels,
    key_bounds,
    list_packed_sequences,
    list_sequences,
    panel_bound,
)
from infllm_pass.kernels.triton.tile_tables import SequenceTable, TileLists, TilePlan, TileShape

from .attention_args import AttentionCall

STATE = 3
"""Tensors of the state."""

SELECTION = 5
"""Tensors of a selection that is not empty."""

LISTS = ("blocks", "tokens", "counts")
"""Its first ones."""


def compress_keys(q: Tensor, k: Tensor, call: AttentionCall) -> list[Tensor]:
    """`infllm::compress_keys`."""
    if _is_empty(q, k):
        nothing = k.new_empty(0, k.shape[3])
        return [nothing, nothing.clone(), q.new_empty(0, dtype=torch.int32)]
    table = _list_sequences(q, k, call)
    keys = compress.compress_keys(k, table, geometry=call.geometry)
    return [keys.fine, keys.coarse, table.sequences]


def select_blocks(q: Tensor, k: Tensor, state: Sequence[Tensor], call: AttentionCall) -> list[Tensor]:
    """`infllm::select_blocks`.

    Raises:
        ShapeError: the state is not that of these keys.
    """
    shape = _tile_shape(q, k, call)
    fine, coarse, sequences = state
    if _is_empty(q, k):
        dtypes = (torch.int16, shape.mask_dtype, torch.int32, torch.int32, torch.int32)
        return [q.new_empty(0, dtype=dtype) for dtype in dtypes]
    batch, heads, length_k, dim = k.shape
    slots = slots_of(length_k, call.geometry)
    for name, buffer, count in zip(("K1", "K2"), (fine, coarse), slots, strict=True):
        expected = (LEAD_SLOTS.value + batch * heads * count + SLACK_SLOTS, dim)
        if buffer.dim() != 2 or buffer.shape[0] != expected[0] or buffer.shape[1] != dim or not buffer.is_contiguous():
            raise ShapeError(
                f"{name} has shape {tuple(buffer.shape)}: expected {expected}, contiguous; give infllm::select_blocks "
                "the state that infllm::compress_keys made of the same keys"
            )
    # A table of its own: results of an operator are no views of what it was given.
    table = SequenceTable(sequences.clone(), call.cu_seqlens_k is not None)
    plan = cut_panels(shape, table, batch=q.shape[0], length_q=q.shape[2])
    lists = pooled.select_tiles(
        q,
        CompressedKeys(fine, coarse, batch, heads, *slots),
        plan,
        geometry=call.geometry,
        scale=call.scale,
        dense_len=call.dense_len,
        length_k=length_k,
        window=call.window,
    )
    return [lists.blocks, lists.tokens, lists.counts, plan.sequences, plan.panels]


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Sequence[Tensor], call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """`infllm::block_attention`."""
    if _is_empty(q, k):
        batch, heads, length, _ = q.shape
        log_sum = q.new_full((batch, heads, length), float("-inf"), dtype=torch.float32)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`infllm::block_attention_backward`; bitwise the same in every run."""
    if _is_empty(q, k):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    given = _inputs(q, k, v, selection, call)
    gradients = grad_out, lse, output_delta(grad_out, out), given
    return query_gradient(*gradients), *key_gradients(*gradients)


def _inputs(q: Tensor, k: Tensor, v: Tensor, selection: Sequence[Tensor], call: AttentionCall) -> AttentionInputs:
    """A call of attention as the kernels take it; errors: see `_selected`."""
    numbers = {name: getattr(call, name) for name in ("geometry", "scale", "dense_len", "key_mask", "window")}
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
