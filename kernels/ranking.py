"""Ranking of key blocks within the selection kernel: the blocks that compete, the cut of each query, the lists.

A row is a query, or a group of queries that share a selection. Its blocks' scores come as *keys*: the bits of the
float plus one, which order as the scores do; 0 where no compressed key of the block is visible, -1 for no candidate.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCAN_WIDTH = tl.constexpr(128)
"""Blocks that a warp scans at once, four to a lane."""

BOUND_OCTAVES = tl.constexpr(16)
"""The bound of a row's keys is first sought within this many factors of two of its largest score."""

BOUND_STEPS = tl.constexpr(8)
"""Halvings of that range: they leave a bound good to 4 %, so that few keys above it are not wanted."""

NEAR_BITS = tl.constexpr(18)
"""The exact search steps up from the bound by 2^18 units of the last place (3 %), 2^19, ..., at most to the middle."""

SEARCH_STEPS = tl.constexpr(4)
"""Steps of the exact search between two questions, over all rows, whether it is done."""


@triton.jit
def far_range(
    row,
    position,
    begin,
    end,
    length,
    window,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Per row of a panel: its far blocks, which compete by score, as a range, and how many of them it visits."""
    last = tl.minimum(position + row * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
    reach = row * 0  # the first block that the sliding window touches
    if HAS_WINDOW:
        reach = tl.maximum(last - window + 1, 0) // BLOCK
    far_begin = tl.maximum(reach, INIT)
    there = (row * QUERY_BLOCK < end) & ((row + 1) * QUERY_BLOCK > begin)
    far_end = tl.where(there, last // BLOCK - LOCAL, 0)
    wanted = tl.minimum(tl.maximum(far_end - far_begin, 0), BUDGET - tl.maximum(INIT - reach, 0))
    return far_begin, far_end, wanted


@triton.jit
def pool_scores(raw_at, keys_at, low, high, first, R: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr):
    """Keys of blocks ``[low, high)`` from the scores of single windows, where scoring could not pool them."""
    for column in range(low // SCAN_WIDTH * SCAN_WIDTH, high, SCAN_WIDTH):
        block = column + tl.arange(0, SCAN_WIDTH)
        inside = (block >= low) & (block < high)
        pooled = tl.full([R, SCAN_WIDTH], -1.0, tl.float32)
        for part in tl.static_range(RATIO + OVERLAP):
            index = block * RATIO + (part - OVERLAP)
            known = inside & (index >= first * RATIO)
            value = tl.load(raw_at[:, None] + index[None, :], mask=known[None, :], other=-1.0)
            pooled = tl.maximum(pooled, value)
        key = tl.where(pooled >= 0.0, pooled.to(tl.int32, bitcast=True) + 1, 0)
        tl.store(keys_at[:, None] + block[None, :], key, mask=inside[None, :])
    tl.debug_barrier()


@triton.jit
def bound_keys(keys_at, begin, end, wanted, low, high, R: tl.constexpr):
    """Per row a bound that at least ``wanted`` keys of blocks ``[begin, end)`` reach, and few more, and a strict
    upper bound of all keys.

    Column maxima give it, each being a key of its own.
    """
    peaks = tl.full([R, SCAN_WIDTH], -1, tl.int32)
    for column in range(low, high, SCAN_WIDTH):
        index = (column + tl.arange(0, SCAN_WIDTH))[None, :]
        inside = (index >= begin[:, None]) & (index < end[:, None])
        peaks = tl.maximum(peaks, tl.load(keys_at[:, None] + index, mask=inside, other=-1))
    top = tl.maximum(tl.max(peaks, 1) + 1, 1)
    most = top
    least = tl.maximum(top - (BOUND_OCTAVES << 23), 0)
    least = tl.where(tl.sum((peaks >= least[:, None]).to(tl.int32), 1) >= wanted, least, 0)
    for _ in range(BOUND_STEPS):
        middle = least + (most - least) // 2
        enough = tl.sum((peaks >= middle[:, None]).to(tl.int32), 1) >= wanted
        least = tl.where(enough, middle, least)
        most = tl.where(enough, most, middle)
    return least, top


@triton.jit
def load_kept(keys_at, columns_at, kept, start, begin, end):
    """Keys of 128 kept columns from ``start`` on; -1 past the last and outside a row's range ``[begin, end)``."""
    place = start + tl.arange(0, SCAN_WIDTH)
    index = tl.load(columns_at + place, mask=place < kept, other=-1)[None, :]
    inside = (index >= begin[:, None]) & (index < end[:, None])
    return tl.load(keys_at[:, None] + index, mask=inside, other=-1)


@triton.jit
def extent_of_keys(keys, least, most):
    """Per row the smallest and the largest key in ``[least, most)``; where there is none, the smallest is 2^31 - 1."""
    inside = (keys >= least[:, None]) & (keys < most[:, None])
    return tl.min(tl.where(inside, keys, 2147483647), 1), tl.max(tl.where(inside, keys, -1), 1)


@triton.jit
def cut_keys(keys_at, columns_at, kept, begin, end, wanted, least, top, R: tl.constexpr):
    """Per row a key that exactly ``wanted`` of the kept columns reach; where equal keys forbid that, the smallest
    key wanted, and how many of its equals are.
    """
    most = top
    spare = tl.full([R], 2147483647, tl.int32)  # columns that reach `least` beyond those wanted
    few = kept <= 2 * SCAN_WIDTH
    keys = load_kept(keys_at, columns_at, kept, 0, begin, end)
    keys_odd = load_kept(keys_at, columns_at, kept, SCAN_WIDTH, begin, end)
    # The bound lies just below the key sought: look near it first, then halve. Neighbouring blocks share a window and
    # so, often, a key: the range is cut to the keys within it now and then, which ends the search at equal ones.
    near = NEAR_BITS
    while tl.max(tl.where(spare > 0, most - least, 0), 0) > 1:
        for _ in range(SEARCH_STEPS):
            middle = least + tl.minimum((most - least) // 2, 1 << near)
            near = min(near + 1, 30)
            excess = tl.sum((keys >= middle[:, None]).to(tl.int32) + (keys_odd >= middle[:, None]).to(tl.int32), 1)
            if few == 0:
                for start in range(2 * SCAN_WIDTH, kept, SCAN_WIDTH):
                    more = load_kept(keys_at, columns_at, kept, start, begin, end)
                    excess += tl.sum((more >= middle[:, None]).to(tl.int32), 1)
            excess -= wanted
            least = tl.where(excess >= 0, middle, least)
            spare = tl.where(excess >= 0, excess, spare)
            most = tl.where(excess >= 0, most, middle)
        lowest, highest = extent_of_keys(keys, least, most)
        low_odd, high_odd = extent_of_keys(keys_odd, least, most)
        lowest = tl.minimum(lowest, low_odd)
        highest = tl.maximum(highest, high_odd)
        if few == 0:
            for start in range(2 * SCAN_WIDTH, kept, SCAN_WIDTH):
                more = load_kept(keys_at, columns_at, kept, start, begin, end)
                low_more, high_more = extent_of_keys(more, least, most)
                lowest = tl.minimum(lowest, low_more)
                highest = tl.maximum(highest, high_more)
        least = tl.where(lowest < most, lowest, least)
        most = tl.where(lowest < most, highest + 1, least + 1)
    spare = tl.sum((keys >= least[:, None]).to(tl.int32) + (keys_odd >= least[:, None]).to(tl.int32), 1) - wanted
    above = tl.sum((keys > least[:, None]).to(tl.int32) + (keys_odd > least[:, None]).to(tl.int32), 1)
    if few == 0:
        for start in range(2 * SCAN_WIDTH, kept, SCAN_WIDTH):
            more = load_kept(keys_at, columns_at, kept, start, begin, end)
            spare += tl.sum((more >= least[:, None]).to(tl.int32), 1)
            above += tl.sum((more > least[:, None]).to(tl.int32), 1)
    return least, tl.where(spare > 0, wanted - above, 2147483647)


@triton.jit
def append_blocks(
    blocks_at,
    tokens_at,
    written,
    seen,
    block,  # [W] ascending
    there,  # [W] whether `block` is to be looked at
    keys_at,  # [ROWS]
    bits,
    reach,
    row_begin,
    row_end,
    own,
    threshold,
    equals,
    ranked,
    tied,
):
    """Append to a tile's list those of some blocks that a row of the tile visits."""
    block_ = block[None, :]
    candidate = (bits != 0)[:, None] & there[None, :] & (block_ >= reach[:, None]) & (block_ <= own[:, None])
    distant = candidate & ranked[:, None] & (block_ >= row_begin[:, None]) & (block_ < row_end[:, None])
    keys = tl.load(keys_at[:, None] + block_, mask=distant, other=2147483647)
    chosen = candidate & (keys >= threshold[:, None])
    if tied:
        equal = (distant & (keys == threshold[:, None])).to(tl.int32)
        rank = seen[:, None] + tl.cumsum(equal, 1)
        chosen = chosen & ((equal == 0) | (rank <= equals[:, None]))
        seen += tl.sum(equal, 1)
    mask = tl.sum(tl.where(chosen, bits[:, None], 0).to(bits.dtype), 0).to(bits.dtype)  # [W]
    used = (mask != 0).to(tl.int32)
    place = written + tl.cumsum(used, 0) - 1
    tl.store(blocks_at + place, block.to(tl.int16), mask=used != 0)
    tl.store(tokens_at + place, mask, mask=used != 0)
    return written + tl.sum(used, 0), seen
