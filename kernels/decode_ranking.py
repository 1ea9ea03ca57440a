"""Ranking of a decode step: the lists of blocks, from the scores as keys whose order is that of the scores."""

from __future__ import annotations

import triton
import triton.language as tl

from infllm_pass.kernels.decode_rows import clip_row, first_block, last_of_line, line_of, scored_blocks

DECODE_RANKED = tl.constexpr(2048)
"""Blocks that ranking keeps in registers: those of 128k keys."""


@triton.jit
def _count_reaching(keys, first, second, third):
    """How many keys reach each of three ascending bounds, as three fields of 20 bits."""
    counts = (keys >= first).to(tl.int64) + ((keys >= second).to(tl.int64) << 20)
    return tl.sum(counts + ((keys >= third).to(tl.int64) << 40), 0)


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
):
    """One program a line; the first of a row also notes how many keys are compressed by now.

    All loads stand in the kernel itself, for the reason given at `clip_row`.
    """
    line = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    row_end = tl.load(lengths + batch * lengths_stride)
    _start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    if (line == 0) & (pair % heads == 0):
        tl.store(filled + batch, length)
    last = last_of_line(line, length, length_q, QUERY_BLOCK)
    exists = (line_of(length - 1, length, length_q, QUERY_BLOCK) >= line) & (last >= 0)
    if exists & (length >= dense_len):
        own = last // BLOCK
        reach = first_block(last, window, BLOCK, HAS_WINDOW)
        begin, end, taken = scored_blocks(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
        row = (pair * LINES + line) * BUDGET
        entry = tl.arange(0, WIDTH)
        chooses = end > begin
        initial = tl.maximum(INIT - reach, 0)
        local = tl.where(chooses & (entry >= initial), own - LOCAL - initial, reach)
        count = tl.where(chooses, initial + LOCAL + 1, own - reach + 1)
        tl.store(blocks + row + entry, local + entry, mask=entry < count)
        if chooses:
            keys_row = keys + (pair * LINES + line) * num_blocks
            place = tl.arange(0, DECODE_RANKED)
            index = begin + place
            held = tl.load(keys_row + index, mask=index < end, other=-1)  # those of more blocks are loaded again
            top = tl.max(held, 0)
            for first in range(begin + DECODE_RANKED, end, DECODE_RANKED):
                more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                top = tl.maximum(top, tl.max(more, 0))
            # The key of the last block taken: at least `taken` keys reach `least`, fewer reach `most`.
            least = top * 0
            most = top + 1
            reached = end - begin  # keys that reach `least`
            while (most - least > 1) & (reached != taken):
                quarter = (most - least) // 4
                middle = least + (most - least) // 2
                low = least + quarter
                high = middle + quarter
                counts = _count_reaching(held, low, middle, high)
                for first in range(begin + DECODE_RANKED, end, DECODE_RANKED):
                    more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                    counts += _count_reaching(more, low, middle, high)
                reach_low = (counts & 0xFFFFF).to(tl.int32)
                reach_middle = ((counts >> 20) & 0xFFFFF).to(tl.int32)
                reach_high = (counts >> 40).to(tl.int32)
                most = tl.where(reach_high < taken, high, most)
                most = tl.where(reach_middle < taken, middle, most)
                most = tl.where(reach_low < taken, low, most)
                reached = tl.where(reach_low >= taken, reach_low, reached)
                least = tl.where(reach_low >= taken, low, least)
                reached = tl.where(reach_middle >= taken, reach_middle, reached)
                least = tl.where(reach_middle >= taken, middle, least)
                reached = tl.where(reach_high >= taken, reach_high, reached)
                least = tl.where(reach_high >= taken, high, least)
            above = tl.sum((held > least).to(tl.int32), 0)
            for first in range(begin + DECODE_RANKED, end, DECODE_RANKED):
                more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                above += tl.sum((more > least).to(tl.int32), 0)
            equals = taken - above  # of the blocks with the key `least`, the first so many
            seen = begin * 0  # blocks with this key so far, and in the upper half those above it
            for first in range(begin, end, DECODE_RANKED):
                some = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                level = (some == least).to(tl.int32)
                higher = (some > least).to(tl.int32)
                order = tl.cumsum(level + (higher << 16), 0) + seen
                rank = order & 0xFFFF
                chosen = (higher != 0) | ((level != 0) & (rank <= equals))
                at = row + count + (order >> 16) + tl.minimum(rank, equals) - 1
                tl.store(blocks + at, first + place, mask=chosen)
                seen += tl.sum(level + (higher << 16), 0)
