"""Compressed keys for block scoring: means of windows of keys, fine (``K1``) and coarse (``K2``), in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import COARSE_FACTOR, BlockGeometry
from ..configs import LaunchConfig, config_for
from ..launch import wrap_triton
from ..tile_schedule import find_sequence
from ..tile_tables import SEQ_BATCH, SEQ_KEY_BEGIN, SEQ_KEY_END, TABLE_COLUMNS, SequenceTable, padded_dim

_FINE_ROWS = 48
"""``K1`` windows of one program. With a quarter as many ``K2`` windows they fill the 64 rows of one matrix
instruction: each key then is read once for both, and a product with a 0/1 matrix costs less than that read."""

LEAD_SLOTS = tl.constexpr(128)
"""Slots of memory before the first one: block selection reads from a block before its first candidate on."""

SLACK_SLOTS = 8192
"""Slots of memory behind the last one, so that block selection may read whole steps without asking where they end."""

COMPRESS_FINE = tl.constexpr(_FINE_ROWS)
COMPRESS_COARSE = tl.constexpr(_FINE_ROWS // COARSE_FACTOR)
COMPRESS_FACTOR = tl.constexpr(COARSE_FACTOR)
COMPRESS_ROWS = tl.constexpr(64)


@dataclass(frozen=True)
class CompressedKeys:
    """Compressed keys with the memory around them that block selection may read; it holds anything.

    Attributes:
        fine: ``K1``, ``[LEAD_SLOTS + B * Hkv * fine_slots + SLACK_SLOTS, D]``, contiguous.
        coarse: ``K2``, the same with `coarse_slots`.
        batch: ``B``.
        heads: ``Hkv``.
        fine_slots: slots of a row and head.
        coarse_slots: the same of `coarse`.
    """

    fine: Tensor
    coarse: Tensor
    batch: int
    heads: int
    fine_slots: int
    coarse_slots: int

    def windows(self) -> tuple[Tensor, Tensor]:
        """``K1`` and ``K2`` as ``[B, Hkv, n, D]``, views without the memory around them."""
        fine, coarse = (
            buffer[LEAD_SLOTS.value : buffer.shape[0] - SLACK_SLOTS].view(self.batch, self.heads, slots, -1)
            for buffer, slots in ((self.fine, self.fine_slots), (self.coarse, self.coarse_slots))
        )
        return fine, coarse


@triton.jit(do_not_specialize=["count", "length_k", "fine_slots", "coarse_slots"])
def _compress_kernel(
    k,
    fine,  # as in `CompressedKeys`
    coarse,
    sequences,
    count,
    length_k,
    fine_slots,
    coarse_slots,
    heads,
    stride_b,
    stride_h,
    stride_t,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
):
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    row = tl.arange(0, COMPRESS_ROWS)
    is_fine = row < COMPRESS_FINE
    is_coarse = (row >= COMPRESS_FINE) & (row < COMPRESS_FINE + COMPRESS_COARSE)
    factor = tl.where(is_fine, 1, COMPRESS_FACTOR)
    stride = STRIDE * factor
    size = SIZE * factor
    slot = tl.where(
        is_fine,
        tl.program_id(0) * COMPRESS_FINE + row,
        tl.program_id(0) * COMPRESS_COARSE + row - COMPRESS_FINE,
    )  # [ROWS]

    # A complete window covers the last key of its slot, whatever the sequence's first key is.
    probe = tl.minimum(slot * stride + stride - 1, length_k - 1)
    sequence = row * 0 + batch
    if PACKED:
        sequence = find_sequence(sequences, count, batch * length_k + probe, SEQ_KEY_BEGIN, length_k, True)
    table = sequences + sequence * TABLE_COLUMNS
    key_begin = tl.load(table + SEQ_KEY_BEGIN)
    key_end = tl.load(table + SEQ_KEY_END)
    start = slot * stride + key_begin % stride  # [ROWS]
    valid = (is_fine | is_coarse) & (start >= key_begin) & (start + size <= key_end)
    if PACKED:
        valid &= tl.load(table + SEQ_BATCH) == batch
    first = tl.min(tl.where(valid, start, length_k), 0)
    end = tl.max(tl.where(valid, start + size, 0), 0)

    dim = tl.arange(0, PADDED_DIM)
    source = k + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + dim[None, :]
    total = tl.zeros([COMPRESS_ROWS, PADDED_DIM], tl.float32)
    for begin in range(first, end, CHUNK):
        key = begin + tl.arange(0, CHUNK)
        # Keys between windows may hold anything, also NaN, which a weight of 0 would not silence.
        inside = key[:, None] < end
        if not PACKED:
            inside &= key[:, None] >= tl.min(key_begin, 0)
        if HEAD_DIM != PADDED_DIM:
            inside &= dim[None, :] < HEAD_DIM
        keys = tl.load(source + key.to(tl.int64)[:, None] * stride_t, mask=inside, other=0.0)  # [CHUNK, D]
        weight = valid[:, None] & (key[None, :] >= start[:, None]) & (key[None, :] < (start + size)[:, None])
        total = tl.dot(weight.to(keys.dtype), keys, total, input_precision="ieee")  # [ROWS, D]

    mean = (total / size[:, None].to(tl.float32)).to(fine.dtype.element_ty)
    pair = tl.program_id(1).to(tl.int64)
    number = (slot.to(tl.int64) + LEAD_SLOTS)[:, None] * HEAD_DIM + dim[None, :]
    ok = dim[None, :] < HEAD_DIM
    tl.store(fine + pair * fine_slots * HEAD_DIM + number, mean, mask=ok & (is_fine & (slot < fine_slots))[:, None])
    tl.store(
        coarse + pair * coarse_slots * HEAD_DIM + number,
        mean,
        mask=ok & (is_coarse & (slot < coarse_slots))[:, None],
    )


def slots_of(length: int, geometry: BlockGeometry) -> tuple[int, int]:
    """Slots of ``K1`` and ``K2`` for a row of ``length`` keys."""
    stride = geometry.kernel_stride
    return torch.sym_max(length // stride, 1), torch.sym_max(length // (COARSE_FACTOR * stride), 1)


def chunk_keys(padded_dim: int) -> int:
    """Keys that one step of a program reads."""
    return 64 if padded_dim <= 128 else 32


def compress_keys(k: Tensor, plan: SequenceTable, *, geometry: BlockGeometry) -> CompressedKeys:
    """Means of all complete windows of keys.

    Window ``c`` of a sequence whose first key is number ``f`` lies in slot ``f // s + c`` of ``K1``, and in slot
    ``f // (4 s) + c`` of ``K2``: windows of different sequences of a row never meet in one slot. A slot without
    a complete window holds 0.

    Args:
        k: ``[B, Hkv, Lk, D]``, last stride 1.
        plan: which sequences the rows hold.
        geometry: the window sizes.

    Returns:
        ``K1`` with ``max(Lk // s, 1)`` slots and ``K2`` with ``max(Lk // (4 s), 1)``, in k's dtype; means are taken in
        float32.
    """
    batch, heads, length, dim = k.shape
    stride = geometry.kernel_stride
    fine_slots, coarse_slots = slots_of(length, geometry)
    around = LEAD_SLOTS.value + SLACK_SLOTS
    fine, coarse = (k.new_empty(batch * heads * n + around, dim) for n in (fine_slots, coarse_slots))
    padded = padded_dim(dim)
    launch = config_for(LaunchConfig, "compress", k, padded)
    wrap_triton(_compress_kernel)[(triton.cdiv(fine_slots, _FINE_ROWS), batch * heads)](
        k,
        fine,
        coarse,
        plan.sequences,
        plan.sequences.shape[0],
        length,
        fine_slots,
        coarse_slots,
        heads,
        k.stride(0),
        k.stride(1),
        k.stride(2),
        SIZE=geometry.kernel_size,
        STRIDE=stride,
        HEAD_DIM=dim,
        PADDED_DIM=padded,
        CHUNK=chunk_keys(padded),
        PACKED=plan.packed,
        **launch.options,
    )
    return CompressedKeys(fine, coarse, batch, heads, fine_slots, coarse_slots)
