"""Importance of key blocks: the largest mean key bias of a block's windows, whatever the query (arXiv 2510.13602).

Selections take the best scored blocks first and fill up with the most important of the rest. Since that order is the
same for all queries, prompts sort blocks once and kernels compare ranks, small integers without ties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import BlockGeometry
from ..params import LEAST_BIAS
from .launch import wrap_triton
from .tile_schedule import find_sequence
from .tile_tables import SEQ_BATCH, SEQ_KEY_BEGIN, SEQ_KEY_END, TABLE_COLUMNS, SequenceTable

WINDOWS = 32
"""Windows of which one step takes the means: the same everywhere, so that their sums run in one order."""

WARPS = 4

_LEAST_BIAS = tl.constexpr(LEAST_BIAS)


@triton.jit
def window_means(
    bias_row,  # of the batch row and key/value head, at the sequence's first key
    stride_t,
    window,  # [WINDOWS]
    complete,  # [WINDOWS], whether there is such a window
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
):
    """Mean biases of windows; -inf where a key is hidden or there is none."""
    place = tl.arange(0, PADDED_SIZE)[None, :]
    key = window[:, None] * STRIDE + place
    bias = tl.load(bias_row + key.to(tl.int64) * stride_t, mask=complete[:, None] & (place < SIZE), other=0.0)
    bias = tl.where(bias < _LEAST_BIAS, float("-inf"), bias.to(tl.float32))
    return tl.where(complete, tl.sum(bias, 1) / SIZE, float("-inf"))


@triton.jit(do_not_specialize=["count", "length_k", "slots"])
def _importance_kernel(
    importance,  # float32 [B * Hkv, slots]
    key_bias,
    sequences,
    count,
    length_k,
    slots,
    heads,
    stride_b,
    stride_h,
    stride_t,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PACKED: tl.constexpr,
):
    RATIO: tl.constexpr = BLOCK // STRIDE
    OVERLAP: tl.constexpr = SIZE // STRIDE - 1  # windows of earlier blocks that reach into a block
    pair = tl.program_id(1)
    batch = pair // heads
    slot = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    # A whole block covers the last key of its slot, whatever the sequence's first key is.
    probe = tl.minimum(slot * BLOCK + BLOCK - 1, length_k - 1)
    sequence = slot * 0 + batch
    if PACKED:
        sequence = find_sequence(sequences, count, batch * length_k + probe, SEQ_KEY_BEGIN, length_k, True)
    table = sequences + sequence * TABLE_COLUMNS
    key_begin = tl.load(table + SEQ_KEY_BEGIN)
    length = tl.load(table + SEQ_KEY_END) - key_begin
    block = slot - key_begin // BLOCK
    whole = (block >= 0) & ((block + 1) * BLOCK <= length)
    if PACKED:
        whole &= tl.load(table + SEQ_BATCH) == batch
    head = pair % heads
    bias_at = key_bias + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    bias_row = bias_at + key_begin.to(tl.int64)[:, None] * stride_t
    best = tl.full([BLOCKS], float("-inf"), tl.float32)
    for part in tl.static_range(RATIO + OVERLAP):
        window = block * RATIO + (part - OVERLAP)
        complete = whole & (window >= 0) & (window * STRIDE + SIZE <= length)
        best = tl.maximum(best, window_means(bias_row, stride_t, window, complete, SIZE, STRIDE, PADDED_SIZE))
    tl.store(importance + pair.to(tl.int64) * slots + slot, best, mask=slot < slots)


def block_slots(length: int, geometry: BlockGeometry) -> int:
    """Slots of whole blocks for a row of ``length`` keys."""
    return torch.sym_max(length // geometry.block_size, 1)


def rank_blocks(key_bias: Tensor, heads: int, plan: SequenceTable, geometry: BlockGeometry) -> Tensor:
    """Ranks of all whole blocks by importance, of equal ones the lower first.

    Block ``j`` of a sequence whose first key is number ``f`` lies in slot ``f // block_size + j``: whole blocks of
    different sequences of a row never meet in one slot.

    Args:
        key_bias: ``[B, Hkv or 1, Lk]``, expanded to all rows.
        heads: ``Hkv``.
        plan: which sequences the rows hold.
        geometry: the block and window sizes.

    Returns:
        int32 ``[B * Hkv, slots]``, of `block_slots`: from the number of slots, for the most important one, down to 1.
    """
    batch, length = key_bias.shape[0], key_bias.shape[2]
    slots = block_slots(length, geometry)
    importance = torch.empty(batch * heads, slots, dtype=torch.float32, device=key_bias.device)
    wrap_triton(_importance_kernel)[(triton.cdiv(slots, WINDOWS), batch * heads)](
        importance,
        key_bias,
        plan.sequences,
        plan.sequences.shape[0],
        length,
        slots,
        heads,
        *key_bias.expand(batch, heads, length).stride(),
        SIZE=geometry.kernel_size,
        STRIDE=geometry.kernel_stride,
        BLOCK=geometry.block_size,
        PADDED_SIZE=triton.next_power_of_2(geometry.kernel_size),
        BLOCKS=WINDOWS,
        PACKED=plan.packed,
        num_warps=WARPS,
    )
    order = torch.sort(importance, dim=1, descending=True, stable=True).indices
    falling = torch.arange(slots, 0, -1, dtype=torch.int32, device=key_bias.device)
    ranks = torch.empty(batch * heads, slots, dtype=torch.int32, device=key_bias.device)
    return ranks.scatter(1, order, falling.expand(batch * heads, slots))
