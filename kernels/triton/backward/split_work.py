"""Split-K for dK and dV: splits long query lists across programs and reduces fp32 partials in a fixed order.

A *unit* is a key block for one key/value head: unit ``u`` is block ``u // heads`` of head ``u % heads``. A unit with
more queries than a piece holds has a *slot* of a pool for every piece. The piece size is computed on the device from
the selection, so that the pool, whose size follows from shapes, suffices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..launch import wrap_triton
from ..tile_tables import TABLE_COLUMNS, padded_dim
from .block_to_query import BLOCK_BATCH, BLOCK_KEY, BLOCK_KEYS, BLOCK_RUN, BlockQueries

POOL_BYTES = 1 << 26
"""Memory for the sums of pieces."""

PIECE_STEPS = 256
"""Steps of the smallest piece: half a millisecond of an H100 multiprocessor, far above what adding up costs."""

_UNITS = 512
"""Units that one step of the schedule looks at."""

_REDUCED_KEYS = 16
"""Keys whose pieces one program adds."""


@dataclass(frozen=True)
class Pieces:
    """How the units of a call are cut.

    Attributes:
        slots: int32 ``[num_units + 1]``: a unit's first slot; a unit without slots is not cut. The last: slots in use.
        size: int32 ``[1]``: queries of a piece.
        pool: float32 ``[limit * slot_size]``.
        limit: slots in the pool.
    """

    slots: Tensor
    size: Tensor
    pool: Tensor
    limit: int


@triton.jit(do_not_specialize=["num_units", "limit", "num_blocks"])
def _schedule_kernel(
    slots,  # int32 [num_units + 1]: the unit's first slot; a unit without slots is not cut. The last: slots in use
    piece,  # int32 [1]: queries of a piece
    table,
    counts,
    num_units,
    limit,
    heads,
    num_blocks,
    SMALLEST: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    sizes = tl.full([16], SMALLEST, tl.int32) << tl.arange(0, 16)
    demand = tl.zeros([16], tl.int32)
    for start in range(0, num_units, UNITS):
        queries = _unit_queries(table, counts, start, num_units, heads, num_blocks, HAS_LISTS, UNITS)
        pieces = (queries[:, None] + sizes[None, :] - 1) // sizes[None, :]
        demand += tl.sum(tl.where(pieces > 1, pieces, 0), 0)
    size = tl.min(tl.where(demand <= limit, sizes, 1 << 30), 0)
    tl.store(piece, size)
    base = 0
    for start in range(0, num_units, UNITS):
        queries = _unit_queries(table, counts, start, num_units, heads, num_blocks, HAS_LISTS, UNITS)
        pieces = (queries + size - 1) // size
        pieces = tl.where(pieces > 1, pieces, 0)
        unit = start + tl.arange(0, UNITS)
        tl.store(slots + unit, base + tl.cumsum(pieces, 0) - pieces, mask=unit < num_units)
        base += tl.sum(pieces, 0)
    tl.store(slots + num_units, base)


@triton.jit
def _unit_queries(table, counts, start, num_units, heads, num_blocks, HAS_LISTS: tl.constexpr, UNITS: tl.constexpr):
    """Queries of adjacent units; unit ``u`` is block ``u // heads`` of key/value head ``u % heads``."""
    unit = start + tl.arange(0, UNITS)
    ok = unit < num_units
    queries = tl.load(table + unit // heads * TABLE_COLUMNS + BLOCK_RUN, mask=ok, other=0)
    if HAS_LISTS:
        queries += tl.load(counts + unit % heads * num_blocks + unit // heads, mask=ok, other=0)
    return queries


@triton.jit
def unit_of_slot(slots, num_units, slot):
    """The unit that owns a slot."""
    low = 0
    high = num_units
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(slots + middle) <= slot:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["key_mask_batch_stride", "length_k", "num_units"])
def _add_pieces_kernel(
    grad_k,
    grad_v,
    grad_bias,  # float32 [B, Hkv, Lk], HAS_BIAS only
    pool,
    key_mask,
    table,
    slots,
    key_mask_batch_stride,
    key_mask_token_stride,
    heads,
    length_k,
    num_units,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program a slot and KEYS keys; the first slot of a unit adds them all."""
    slot = tl.program_id(0)
    if slot >= tl.load(slots + num_units):
        return
    unit = unit_of_slot(slots, num_units, slot)
    if tl.load(slots + unit) != slot:
        return
    row = table + unit // heads * TABLE_COLUMNS
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    valid = keys < tl.load(row + BLOCK_KEYS)
    dims = tl.arange(0, BLOCK_D)[None, :]
    value_dims = tl.arange(0, BLOCK_DV)[None, :]
    ok_k = valid[:, None] & (dims < HEAD_DIM)
    ok_v = valid[:, None] & (value_dims < VALUE_DIM)
    sum_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    sum_v = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    sum_bias = tl.zeros([KEYS], tl.float32)
    part = pool + slot.to(tl.int64) * BLOCK_SIZE * (HEAD_DIM + VALUE_DIM + HAS_BIAS)
    for _ in range(slot, tl.load(slots + unit + 1)):
        sum_k += tl.load(part + keys[:, None] * HEAD_DIM + dims, mask=ok_k, other=0.0)
        sum_v += tl.load(part + BLOCK_SIZE * HEAD_DIM + keys[:, None] * VALUE_DIM + value_dims, mask=ok_v, other=0.0)
        if HAS_BIAS:
            sum_bias += tl.load(part + BLOCK_SIZE * (HEAD_DIM + VALUE_DIM) + keys, mask=valid, other=0.0)
        part += BLOCK_SIZE * (HEAD_DIM + VALUE_DIM + HAS_BIAS)
    batch = tl.load(row + BLOCK_BATCH).to(tl.int64)
    key_rows = (tl.load(row + BLOCK_KEY) + keys).to(tl.int64)
    if HAS_KEY_MASK:
        seen = (
            tl.load(key_mask + batch * key_mask_batch_stride + key_rows * key_mask_token_stride, mask=valid, other=0)
            != 0
        )
        ok_k &= seen[:, None]
        ok_v &= seen[:, None]
        valid &= seen
    at_rows = ((batch * heads + unit % heads) * length_k + key_rows)[:, None]
    tl.store(grad_k + at_rows * HEAD_DIM + dims, sum_k.to(grad_k.dtype.element_ty), mask=ok_k)
    tl.store(grad_v + at_rows * VALUE_DIM + value_dims, sum_v.to(grad_v.dtype.element_ty), mask=ok_v)
    if HAS_BIAS:
        tl.store(grad_bias + (batch * heads + unit % heads) * length_k + key_rows, sum_bias, mask=valid)


def plan_pieces(
    lists: BlockQueries, *, heads: int, length_q: int, smallest: int, slot_size: int, pool_bytes: int
) -> Pieces:
    """Cut the units of a call.

    Args:
        lists: the queries of each unit.
        heads: key/value heads.
        length_q: queries of a row.
        smallest: queries of the smallest piece, a power of two; pieces hold it times a power of two.
        slot_size: numbers that a piece computes.
        pool_bytes: memory of the pool, at most.
    """
    device = lists.table.device
    num_units = lists.table.shape[0] * heads
    cuts = (length_q + smallest - 1) // smallest - 1  # of a unit that all queries of a row visit
    limit = torch.sym_max(1, torch.sym_min(pool_bytes // (4 * slot_size), 2 * num_units * cuts))
    slots = torch.empty(num_units + 1, dtype=torch.int32, device=device)
    size = torch.empty(1, dtype=torch.int32, device=device)
    wrap_triton(_schedule_kernel)[(1,)](
        slots,
        size,
        lists.table,
        lists.table if lists.counts is None else lists.counts,
        num_units,
        limit,
        heads,
        lists.table.shape[0],
        SMALLEST=smallest,
        HAS_LISTS=lists.counts is not None,
        UNITS=_UNITS,
        num_warps=8,
    )
    return Pieces(slots, size, torch.empty(limit * slot_size, dtype=torch.float32, device=device), limit)


def add_pieces(
    grad_k: Tensor,
    grad_v: Tensor,
    grad_bias: Tensor | None,
    pieces: Pieces,
    lists: BlockQueries,
    given: AttentionInputs,
) -> None:
    """Write the gradients of the units that were cut.

    Args:
        grad_k: memory of ``[B, Hkv, Lk, D]``, contiguous.
        grad_v: memory of ``[B, Hkv, Lk, Dv]``, contiguous.
        grad_bias: float32 ``[B, Hkv, Lk]``, contiguous; None: the call has no key bias.
        pieces: the pieces, computed.
        lists: the queries of each unit.
        given: the call; gradients of keys that its mask hides are not written.
    """
    block_size, (dim, value_dim), (_, heads, length_k) = given.geometry.block_size, given.dims, given.k.shape[:3]
    wrap_triton(_add_pieces_kernel)[(pieces.limit, block_size // _REDUCED_KEYS)](
        grad_k,
        grad_v,
        pieces.pool if grad_bias is None else grad_bias,
        pieces.pool,
        lists.table if given.key_mask is None else given.key_mask,
        lists.table,
        pieces.slots,
        *given.mask_strides,
        heads,
        length_k,
        lists.table.shape[0] * heads,
        HEAD_DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=padded_dim(dim),
        BLOCK_DV=padded_dim(value_dim),
        BLOCK_SIZE=block_size,
        KEYS=_REDUCED_KEYS,
        HAS_KEY_MASK=given.key_mask is not None,
        HAS_BIAS=grad_bias is not None,
    )
