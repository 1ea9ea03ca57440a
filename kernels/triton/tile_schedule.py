"""Builds the tables of `TilePlan` on the device: no length is read on the host."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import wrap_triton
from .tile_tables import (
    PANEL_BATCH,
    PANEL_BEGIN,
    PANEL_BLOCK_BASE,
    PANEL_END,
    PANEL_KEY_BEGIN,
    PANEL_LENGTH,
    PANEL_POSITION,
    PANEL_QUERY,
    SEQ_BATCH,
    SEQ_BLOCK_BASE,
    SEQ_KEY_BEGIN,
    SEQ_KEY_END,
    SEQ_PANEL_BASE,
    SEQ_QUERY_BEGIN,
    SEQ_QUERY_END,
    SEQ_SHIFT,
    TABLE_COLUMNS,
    TABLE_WIDTH,
    SequenceTable,
    TilePlan,
    TileShape,
)

_CHUNK = 256
"""Table rows that one program writes."""


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit
def _load_bounds(
    bounds,
    row,  # [CHUNK]
    ok,  # [CHUNK]
    least,  # the largest bound of earlier rows
    most,
):
    """Where sequences begin and end, and the largest bound so far; bounds that descend, or leave `most`, are moved.

    What is right stays as it is. Whatever the bounds are, sequences then neither overlap nor leave the tensors.
    """
    begin = tl.associative_scan(tl.load(bounds + row, mask=ok, other=0), 0, _larger)
    begin = tl.minimum(tl.maximum(begin, least), most)
    end = tl.minimum(tl.maximum(begin, tl.load(bounds + row + 1, mask=ok, other=0)), most)
    return begin, end, tl.max(end, 0)


@triton.jit
def _sequences_kernel(
    table,
    key_bounds,  # int32: [B, 2] first and one past the last valid key; PACKED: [R + 1] cumulative key numbers
    query_bounds,  # int32 [R + 1] cumulative query numbers, HAS_QUERY_BOUNDS only
    offsets,  # int32 [B] or one, HAS_OFFSETS only
    offset,
    offset_stride,
    count,
    batch_size,
    length_q,
    length_k,
    PANEL_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_KEY_BOUNDS: tl.constexpr,
    HAS_QUERY_BOUNDS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    panel_base = 0
    block_base = 0
    last_key = 0
    last_query = 0
    for start in range(0, tl.maximum(count, 1), CHUNK):
        row = start + tl.arange(0, CHUNK)
        ok = row < count
        if PACKED:
            flat_begin, flat_end, last_key = _load_bounds(key_bounds, row, ok, last_key, batch_size * length_k)
            batch = flat_begin // tl.maximum(length_k, 1)
            key_begin = flat_begin - batch * length_k
            key_end = tl.minimum(key_begin + flat_end - flat_begin, length_k)
        else:
            batch = row
            if HAS_KEY_BOUNDS:
                key_begin = tl.load(key_bounds + 2 * row, mask=ok, other=0)
                key_end = tl.load(key_bounds + 2 * row + 1, mask=ok, other=0)
            else:
                key_begin = tl.zeros([CHUNK], tl.int32)
                key_end = tl.where(ok, length_k, 0)
        if HAS_QUERY_BOUNDS:
            query_begin, query_end, last_query = _load_bounds(query_bounds, row, ok, last_query, length_q)
            shift = key_end - query_end
        else:
            query_begin = tl.zeros([CHUNK], tl.int32)
            query_end = tl.zeros([CHUNK], tl.int32) + length_q
            shift = tl.zeros([CHUNK], tl.int32) + offset
            if HAS_OFFSETS:
                shift += tl.load(offsets + batch * offset_stride, mask=ok, other=0).to(tl.int32)
                key_end = tl.maximum(tl.minimum(key_end, shift + length_q), key_begin)
        query_begin = tl.maximum(query_begin, key_begin - shift)
        query_end = tl.maximum(tl.minimum(query_end, key_end - shift), query_begin)
        first = query_begin + shift - key_begin
        last = query_end - 1 + shift - key_begin
        panels = tl.where(ok & (query_end > query_begin), last // PANEL_TOKENS - first // PANEL_TOKENS + 1, 0)
        blocks = tl.where(ok, (key_end - key_begin + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
        there = row < tl.maximum(count, 1)  # without any sequence, an empty one
        out = table + row * TABLE_COLUMNS
        tl.store(out + SEQ_BATCH, batch, mask=there)
        tl.store(out + SEQ_KEY_BEGIN, key_begin, mask=there)
        tl.store(out + SEQ_KEY_END, key_end, mask=there)
        tl.store(out + SEQ_QUERY_BEGIN, query_begin, mask=there)
        tl.store(out + SEQ_QUERY_END, query_end, mask=there)
        tl.store(out + SEQ_SHIFT, shift, mask=there)
        tl.store(out + SEQ_PANEL_BASE, panel_base + tl.cumsum(panels, 0) - panels, mask=there)
        tl.store(out + SEQ_BLOCK_BASE, block_base + tl.cumsum(blocks, 0) - blocks, mask=there)
        panel_base += tl.sum(panels, 0)
        block_base += tl.sum(blocks, 0)


@triton.jit
def find_sequence(sequences, count, index, COLUMN: tl.constexpr, row_step=0, ROWS: tl.constexpr = False):
    """The last sequence whose base in ``COLUMN`` is at most ``index``; `index` may be a vector.

    ``ROWS``: bases count from the start of a batch row, and `index` through all rows, which lie ``row_step`` apart.
    """
    low = index * 0
    high = index * 0 + count  # the answer lies in [low, high)
    for _ in range(32):
        middle = (low + high) // 2
        row = sequences + middle * TABLE_COLUMNS
        base = tl.load(row + COLUMN, mask=middle < count, other=2147483647)
        if ROWS:
            base += row_step * tl.load(row + SEQ_BATCH, mask=middle < count, other=0)
        low = tl.where(base <= index, middle, low)
        high = tl.where(base <= index, high, middle)
    return low


@triton.jit
def _panels_kernel(panels, sequences, count, num_panels, PANEL_TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    panel = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ok = panel < num_panels
    sequence = find_sequence(sequences, count, panel, SEQ_PANEL_BASE)
    row = sequences + sequence * TABLE_COLUMNS
    batch = tl.load(row + SEQ_BATCH)
    key_begin = tl.load(row + SEQ_KEY_BEGIN)
    key_end = tl.load(row + SEQ_KEY_END)
    query_begin = tl.load(row + SEQ_QUERY_BEGIN)
    query_end = tl.load(row + SEQ_QUERY_END)
    shift = tl.load(row + SEQ_SHIFT)
    base = tl.load(row + SEQ_PANEL_BASE)
    block_base = tl.load(row + SEQ_BLOCK_BASE)
    first = query_begin + shift - key_begin  # position of the sequence's first query
    position = (first // PANEL_TOKENS + panel - base) * PANEL_TOKENS
    query = position + key_begin - shift
    begin = tl.maximum(query_begin - query, 0)
    end = tl.maximum(tl.minimum(query_end - query, PANEL_TOKENS), 0)
    end = tl.where(begin < end, end, 0)
    out = panels + panel * TABLE_COLUMNS
    tl.store(out + PANEL_BATCH, batch, mask=ok)
    tl.store(out + PANEL_QUERY, query, mask=ok)
    tl.store(out + PANEL_BEGIN, begin, mask=ok)
    tl.store(out + PANEL_END, end, mask=ok)
    tl.store(out + PANEL_POSITION, position, mask=ok)
    tl.store(out + PANEL_KEY_BEGIN, key_begin, mask=ok)
    tl.store(out + PANEL_LENGTH, key_end - key_begin, mask=ok)
    tl.store(out + PANEL_BLOCK_BASE, block_base, mask=ok)


@triton.jit(do_not_specialize=["length"])
def _key_bounds_kernel(bounds, key_mask, length, stride_b, stride_t, CHUNK: tl.constexpr):
    row = tl.program_id(0)
    valid_keys = key_mask + row.to(tl.int64) * stride_b
    first = length
    end = 0
    for start in range(0, length, CHUNK):
        key = start + tl.arange(0, CHUNK)
        valid = tl.load(valid_keys + key.to(tl.int64) * stride_t, mask=key < length, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(valid, key, length), 0))
        end = tl.maximum(end, tl.max(tl.where(valid, key + 1, 0), 0))
    tl.store(bounds + 2 * row, tl.minimum(first, end))
    tl.store(bounds + 2 * row + 1, end)


def key_bounds(key_mask: Tensor) -> Tensor:
    """First valid key and one past the last of every row of ``[B, L]``, int32 ``[B, 2]``; both 0 if there is none."""
    batch, length = key_mask.shape
    bounds = torch.empty(batch, 2, dtype=torch.int32, device=key_mask.device)
    wrap_triton(_key_bounds_kernel)[(batch,)](
        bounds, key_mask, length, key_mask.stride(0), key_mask.stride(1), CHUNK=4096, num_warps=8
    )
    return bounds


def list_sequences(
    shape: TileShape,
    *,
    batch: int,
    length_q: int,
    length_k: int,
    block_size: int,
    device: torch.device,
    offset: int = 0,
    offsets: Tensor | None = None,
    key_bounds: Tensor | None = None,
) -> SequenceTable:
    """The table of a batch in which every row is one sequence; arguments: see `plan_tiles`."""
    sequences = torch.empty(batch, TABLE_WIDTH, dtype=torch.int32, device=device)
    wrap_triton(_sequences_kernel)[(1,)](
        sequences,
        sequences if key_bounds is None else key_bounds,
        sequences,
        sequences if offsets is None else offsets,
        offset,
        0 if offsets is None or offsets.numel() == 1 else offsets.stride(0),
        batch,
        batch,
        length_q,
        length_k,
        PANEL_TOKENS=shape.panel_tokens,
        BLOCK_SIZE=block_size,
        PACKED=False,
        HAS_KEY_BOUNDS=key_bounds is not None,
        HAS_QUERY_BOUNDS=False,
        HAS_OFFSETS=offsets is not None,
        CHUNK=_CHUNK,
    )
    return SequenceTable(sequences, packed=False)


def list_packed_sequences(
    shape: TileShape,
    cu_seqlens_k: Tensor,
    cu_seqlens_q: Tensor | None,
    *,
    batch: int,
    length_q: int,
    length_k: int,
    block_size: int,
    offset: int = 0,
) -> SequenceTable:
    """The table of sequences packed one after the other; arguments: see `plan_packed_tiles`."""
    count = cu_seqlens_k.shape[0] - 1
    sequences = torch.empty(torch.sym_max(count, 1), TABLE_WIDTH, dtype=torch.int32, device=cu_seqlens_k.device)
    wrap_triton(_sequences_kernel)[(1,)](
        sequences,
        cu_seqlens_k,
        cu_seqlens_k if cu_seqlens_q is None else cu_seqlens_q,
        sequences,
        offset,
        0,
        count,
        batch,
        length_q,
        length_k,
        PANEL_TOKENS=shape.panel_tokens,
        BLOCK_SIZE=block_size,
        PACKED=True,
        HAS_KEY_BOUNDS=True,
        HAS_QUERY_BOUNDS=cu_seqlens_q is not None,
        HAS_OFFSETS=False,
        CHUNK=_CHUNK,
    )
    return SequenceTable(sequences, packed=True)


def panel_bound(shape: TileShape, packed: bool, sequences: Tensor, *, batch: int, length_q: int) -> int:
    """Rows of the table of panels, for any place of the sequences."""
    tokens = shape.panel_tokens
    if packed:
        return batch * length_q // tokens + 2 * sequences.shape[0]
    return batch * ((length_q + tokens - 1) // tokens + 1)


def cut_panels(shape: TileShape, table: SequenceTable, *, batch: int, length_q: int) -> TilePlan:
    """The tables of a call whose sequences are listed.

    Args:
        shape: the tile sizes, those that the sequences were listed for.
        table: the sequences.
        batch: rows.
        length_q: queries of a row.
    """
    sequences, tokens = table.sequences, shape.panel_tokens
    bound = panel_bound(shape, table.packed, sequences, batch=batch, length_q=length_q)
    panels = torch.empty(bound, TABLE_WIDTH, dtype=torch.int32, device=sequences.device)
    wrap_triton(_panels_kernel)[(triton.cdiv(bound, _CHUNK),)](
        panels, sequences, sequences.shape[0], bound, PANEL_TOKENS=tokens, CHUNK=_CHUNK
    )
    return TilePlan(sequences, table.packed, shape, panels)


def plan_tiles(shape: TileShape, *, batch: int, length_q: int, **place: Any) -> TilePlan:
    """Tables for a batch in which every row is one sequence.

    Args:
        shape: the tile sizes.
        batch: rows.
        length_q: queries of a row.
        place: ``length_k``: keys of a row. ``block_size``: tokens in a key block. ``device``: where the tables go.
            ``offset``: key number of query 0, default 0. ``offsets``: integer tensor on the device, added to it: one
            number, or one a row; a row's sequence then ends at its last query's key at the latest. ``key_bounds``:
            int32 ``[B, 2]``: number of a row's first valid key, and one past its last; None: all keys.
    """
    table = list_sequences(shape, batch=batch, length_q=length_q, **place)
    return cut_panels(shape, table, batch=batch, length_q=length_q)


def plan_packed_tiles(
    shape: TileShape, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor | None, *, batch: int, length_q: int, **place: Any
) -> TilePlan:
    """Tables for sequences packed one after the other.

    Args:
        shape: the tile sizes.
        cu_seqlens_k: int32 ``[R + 1]``; sequence ``r`` has keys ``cu_seqlens_k[r]`` up to ``cu_seqlens_k[r + 1]``,
            counted through all rows of the batch; no sequence crosses a row. Bounds that descend or leave the rows
            are moved, so that no kernel reads or writes beyond the tensors: the result then has no meaning.
        cu_seqlens_q: the same for queries, batch 1 only: the last query of a sequence stands at its last key.
            None: query ``i`` of a row stands at key ``offset + i``.
        batch: rows.
        length_q: queries of a row.
        place: ``length_k``, ``block_size`` and ``offset``, as for `plan_tiles`.
    """
    table = list_packed_sequences(shape, cu_seqlens_k, cu_seqlens_q, batch=batch, length_q=length_q, **place)
    return cut_panels(shape, table, batch=batch, length_q=length_q)
