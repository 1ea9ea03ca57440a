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


@triton.jit(do_not_specialize=["stride_mb", "length_k", "num_units"])
def _add_pieces_kernel(
    grad_k,
    grad_v,
    pool,
    key_mask,
    table,
    slots,
    stride_mb,
    stride_mn,
    heads,
    length_k,
    num_units,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_MASK: tl.constexpr,
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
    dims = tl.arange(0, PADDED)[None, :]
    dims_v = tl.arange(0, PADDED_V)[None, :]
    ok_k = valid[:, None] & (dims < DIM)
    ok_v = valid[:, None] & (dims_v < DIM_V)
    sum_k = tl.zeros([KEYS, PADDED], tl.float32)
    sum_v = tl.zeros([KEYS, PADDED_V], tl.float32)
    part = pool + slot.to(tl.int64) * BLOCK_SIZE * (DIM + DIM_V)
    for _ in range(slot, tl.load(slots + unit + 1)):
        sum_k += tl.load(part + keys[:, None] * DIM + dims, mask=ok_k, other=0.0)
        sum_v += tl.load(part + BLOCK_SIZE * DIM + keys[:, None] * DIM_V + dims_v, mask=ok_v, other=0.0)
        part += BLOCK_SIZE * (DIM + DIM_V)
    batch = tl.load(row + BLOCK_BATCH).to(tl.int64)
    key_rows = (tl.load(row + BLOCK_KEY) + keys).to(tl.int64)
    if HAS_MASK:
        seen = tl.load(key_mask + batch * stride_mb + key_rows * stride_mn, mask=valid, other=0) != 0
        ok_k &= seen[:, None]
        ok_v &= seen[:, None]
    at_rows = ((batch * heads + unit % heads) * length_k + key_rows)[:, None]
    tl.store(grad_k + at_rows * DIM + dims, sum_k.to(grad_k.dtype.element_ty), mask=ok_k)
    tl.store(grad_v + at_rows * DIM_V + dims_v, sum_v.to(grad_v.dtype.element_ty), mask=ok_v)


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
    pieces: Pieces,
    lists: BlockQueries,
    key_mask: Tensor | None,
    *,
    heads: int,
    length_k: int,
    dim: int,
    dim_v: int,
    block_size: int,
) -> None:
    """Write the gradients of the units that were cut.

    Args:
        grad_k: memory of ``[B, Hkv, Lk, D]``, contiguous.
        grad_v: memory of ``[B, Hkv, Lk, Dv]``, contiguous.
        pieces: the pieces, computed.
        lists: the queries of each unit.
        key_mask: bool ``[B, Lk]``; gradients of other keys are not written.
        heads: ``Hkv``.
        length_k: ``Lk``.
        dim: ``D``.
        dim_v: ``Dv``.
        block_size: tokens in a key block.
    """
    wrap_triton(_add_pieces_kernel)[(pieces.limit, block_size // _REDUCED_KEYS)](
        grad_k,
        grad_v,
        pieces.pool,
        lists.table if key_mask is None else key_mask,
        lists.table,
        pieces.slots,
        *((0, 0) if key_mask is None else key_mask.stride()),
        heads,
        length_k,
        lists.table.shape[0] * heads,
        DIM=dim,
        DIM_V=dim_v,
        PADDED=padded_dim(dim),
        PADDED_V=padded_dim(dim_v),
        BLOCK_SIZE=block_size,
        KEYS=_REDUCED_KEYS,
        HAS_MASK=key_mask is not None,
    )
