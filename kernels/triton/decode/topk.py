"""Decode top-k: lists of blocks from scores as integer keys that order as they do."""

from __future__ import annotations

import triton
import triton.language as tl

from ..pdl import await_previous
from .rows import clip_row, forced_block, last_of_line, line_of, scored_range

DECODE_SPAN = tl.constexpr(1 << 23)
"""Distance of two keys whose scores differ by a factor of two."""


DECODE_LISTED = tl.constexpr(1024)
"""Blocks that are listed at once, loaded again: keeping them since the search takes registers from scoring."""


@triton.jit
def _count_reaching(keys, low, high):
    """How many keys reach each of two bounds, in the halves of a number."""
    return tl.sum((keys >= low).to(tl.int32) + ((keys >= high).to(tl.int32) << 16), 0)


@triton.jit
def _next_bounds(least, most, span):
    """Two bounds between two: at thirds, but as long as nothing is known from below, at distances from the top.

    Most often the cut lies within a factor of two or four of the highest score, and no score near zero.
    """
    width = most - least
    below = (least == 0) & (width > 4 * span)
    low = tl.where(below, most - 4 * span, least + width // 3)
    high = tl.where(below, most - span, least + width // 3 + (width + 2) // 3)
    return low, high


@triton.jit
def list_forced(
    blocks_row,
    last,
    window,
    begin,
    end,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Write the blocks that a list holds whatever the scores: its first entries."""
    entry = tl.arange(0, WIDTH)
    block, known = forced_block(entry, last, window, begin, end, BLOCK, INIT, LOCAL, HAS_WINDOW)
    tl.store(blocks_row + entry, block, mask=known)


@triton.jit
def list_chosen(
    keys_row,
    blocks_row,  # past the forced blocks
    begin,
    end,
    taken,
    RANKED: tl.constexpr,  # blocks that stay in registers
):
    """Write the ``taken`` blocks of ``[begin, end)`` with the highest keys, of equal ones the lower."""
    place = tl.arange(0, RANKED)
    # Those of more blocks than fit are loaded again each time.
    first_keys = tl.load(keys_row + begin + place, mask=begin + place < end, other=-1)
    top = tl.max(first_keys, 0)
    for first in range(begin + RANKED, end, RANKED):
        more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
        top = tl.maximum(top, tl.max(more, 0))
    # The key of the last block taken: at least `taken` keys reach `least`, fewer reach `most`.
    least = top * 0
    most = top + 1
    reached = end - begin  # keys that reach `least`
    exceeding = top * 0  # keys that reach `most`
    span = least + DECODE_SPAN
    while (most - least > 1) & (reached != taken):
        low, high = _next_bounds(least, most, span)
        span = tl.minimum(16 * span, 1 << 28)
        counts = _count_reaching(first_keys, low, high)
        for first in range(begin + RANKED, end, RANKED):
            more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
            counts += _count_reaching(more, low, high)
        reach_low = counts & 0xFFFF
        reach_high = (counts >> 16) & 0xFFFF
        exceeding = tl.where(reach_high < taken, reach_high, exceeding)
        most = tl.where(reach_high < taken, high, most)
        exceeding = tl.where(reach_low < taken, reach_low, exceeding)
        most = tl.where(reach_low < taken, low, most)
        reached = tl.where(reach_low >= taken, reach_low, reached)
        least = tl.where(reach_low >= taken, low, least)
        reached = tl.where(reach_high >= taken, reach_high, reached)
        least = tl.where(reach_high >= taken, high, least)
    # Of the blocks with the key `least`, the first so many: all, or what the blocks above it leave.
    equals = tl.where(reached == taken, taken, taken - exceeding)
    seen = begin * 0  # blocks with this key so far, and in the upper half those above it
    for first in range(begin, end, DECODE_LISTED):
        block = first + tl.arange(0, DECODE_LISTED)
        some = tl.load(keys_row + block, mask=block < end, other=-1)
        level = (some == least).to(tl.int32)
        higher = (some > least).to(tl.int32)
        order = tl.cumsum(level + (higher << 16), 0) + seen
        rank = order & 0xFFFF
        chosen = (higher != 0) | ((level != 0) & (rank <= equals))
        at = (order >> 16) + tl.minimum(rank, equals) - 1
        tl.store(blocks_row + at, block, mask=chosen)
        seen += tl.sum(level + (higher << 16), 0)


@triton.jit
def rank_when_last(
    keys_row,
    blocks_row,
    filled_at,
    arrivals_at,
    notes,  # whether this program's head notes how many keys are kept by now
    length,
    dense_len,
    window,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    BLOCKS: tl.constexpr,  # that a program scores
    RANKED: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """For rows of a single query: the last program of a row and head to arrive ranks the blocks."""
    begin, end, taken = scored_range(length - 1, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
    first = tl.program_id(0) == 0
    if first & notes:
        tl.store(filled_at, length)
    if (length >= dense_len) & (length > 0):
        if first:
            list_forced(blocks_row, length - 1, window, begin, end, BLOCK, INIT, LOCAL, WIDTH, HAS_WINDOW)
        chunk = tl.program_id(0)
        if (end > begin) & (chunk >= begin // BLOCKS) & (chunk <= (end - 1) // BLOCKS):
            tl.debug_barrier()  # all threads have written before one of them says so
            arrived = tl.atomic_add(arrivals_at, 1, sem="acq_rel")
            if arrived == (end - 1) // BLOCKS - begin // BLOCKS:
                list_chosen(keys_row, blocks_row + (BUDGET - taken), begin, end, taken, RANKED)


@triton.jit(do_not_specialize=["capacity", "num_blocks", "dense_len", "window", "length_q"])
def decode_rank_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    keys,
    blocks,  # int32 [B * Hkv * LINES, BUDGET]
    filled,
    heads,
    capacity,
    num_blocks,
    length_q,
    dense_len,
    window,
    LINES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    WIDTH: tl.constexpr,  # the next power of two of BUDGET
    HAS_WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    RANKED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a line; the first of a row also notes how many keys are compressed by now."""
    line = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    row_end = tl.load(lengths + batch * lengths_stride)
    _start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    if DEPENDENT:
        await_previous()
    if (line == 0) & (pair % heads == 0):
        tl.store(filled + batch, length)
    last = last_of_line(line, length, length_q, QUERY_BLOCK)
    exists = (line_of(length - 1, length, length_q, QUERY_BLOCK) >= line) & (last >= 0)
    if exists & (length >= dense_len):
        begin, end, taken = scored_range(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
        row = pair * LINES + line
        blocks_row = blocks + row * BUDGET
        list_forced(blocks_row, last, window, begin, end, BLOCK, INIT, LOCAL, WIDTH, HAS_WINDOW)
        if end > begin:
            list_chosen(keys + row * num_blocks, blocks_row + (BUDGET - taken), begin, end, taken, RANKED)
