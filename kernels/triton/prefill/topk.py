"""Top-k of block selection: the range of scored blocks, an exact threshold search, and the lists of tiles.

A row is a query, or a group of queries that share a selection. Its scores come as integer *keys* that order as they do:
the bits of the float plus one; 0 where no compressed key of the block is visible, -1 where the block is no candidate.

Tensors of rows have 32 columns, one a lane, so that a warp holds whole rows: reductions over a row are single
instructions, and no value of a row is exchanged between warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)

SLOTS = tl.constexpr(16)
"""Candidates that one lane may keep of the keys that it scans; of 63 wanted it keeps up to 11."""

PIECES_AT_ONCE = tl.constexpr(4)
"""Pieces of 32 keys or slots that a loop handles at once where few rounds are expected."""

BOUND_STEPS = tl.constexpr(8)
"""Halvings of the range of column maxima, in which the bound of a row's keys is sought."""

NEAR_BITS = tl.constexpr(18)
"""The exact search steps up from the bound by 2^18 units of the last place (3 %), 2^19, ..., at most to the middle."""

SEARCH_STEPS = tl.constexpr(4)
"""Steps of the exact search between two questions, over all rows, whether it is done."""

ALL = tl.constexpr(2147483647)


@triton.jit
def scored_range(
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
    """Per row of a panel: the range of its scored blocks, those that are not forced, and how many of them it visits."""
    last = tl.minimum(position + row * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
    reach = row * 0  # the first block that the sliding window touches
    if HAS_WINDOW:
        reach = tl.maximum(last - window + 1, 0) // BLOCK
    scored_begin = tl.maximum(reach, INIT)
    there = (row * QUERY_BLOCK < end) & ((row + 1) * QUERY_BLOCK > begin)
    scored_end = tl.where(there, last // BLOCK - LOCAL, 0)
    wanted = tl.minimum(tl.maximum(scored_end - scored_begin, 0), BUDGET - tl.maximum(INIT - reach, 0))
    return scored_begin, scored_end, wanted


@triton.jit
def pool_scores(
    raw_at,
    keys_at,
    scored_begin,
    scored_end,
    low,
    high,
    first,
    R: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Keys of blocks ``[low, high)`` from the scores of single windows, where scoring could not pool them."""
    for column in range(low, high, LANES):
        block = column + tl.arange(0, LANES)
        inside = block < high
        pooled = tl.full([R, LANES], -1.0, tl.float32)
        for part in tl.static_range(RATIO + OVERLAP):
            index = block * RATIO + (part - OVERLAP)
            known = inside & (index >= first * RATIO)
            value = tl.load(raw_at[:, None] + index[None, :], mask=known[None, :], other=-1.0)
            pooled = tl.maximum(pooled, value)
        key = tl.where(pooled >= 0.0, pooled.to(tl.int32, bitcast=True) + 1, 0)
        mine = (block[None, :] >= scored_begin[:, None]) & (block[None, :] < scored_end[:, None])
        tl.store(keys_at[:, None] + block[None, :], tl.where(mine, key, -1), mask=inside[None, :])


@triton.jit
def fetch_keys(rows_at, start, high, COUNT: tl.constexpr):
    """A tuple of COUNT adjacent pieces of the rows' keys; -1 from block `high` on."""
    block = start + tl.arange(0, LANES)[None, :]
    keys = ()
    for part in tl.static_range(COUNT):
        keys = keys + (tl.load(rows_at + (block + part * LANES), mask=block + part * LANES < high, other=-1),)  # noqa: RUF005
    return keys


@triton.jit
def count_keys(keys, least, COUNT: tl.constexpr):
    """Per row and lane, how many keys of a tuple reach `least`."""
    count = (keys[0] >= least).to(tl.int32)
    for part in tl.static_range(1, COUNT):
        count += (keys[part] >= least).to(tl.int32)
    return count


@triton.jit
def bound_keys(rows_at, wanted, low, high, R: tl.constexpr, PEAKS: tl.constexpr):
    """Per row a bound that at least `wanted` keys of blocks ``[low, high)`` reach, and few more, and a strict upper
    bound of all keys.

    The maxima of 32 * PEAKS columns give it, each being a key of its own.
    """
    none = tl.full([R, LANES], -1, tl.int32)
    peaks = (none,) * PEAKS
    for start in range(low, high, PEAKS * LANES):
        keys = fetch_keys(rows_at, start, high, PEAKS)
        higher = ()
        for part in tl.static_range(PEAKS):
            higher = higher + (tl.maximum(peaks[part], keys[part]),)  # noqa: RUF005
        peaks = higher
    peak = peaks[0]
    trough = peaks[0]
    for part in tl.static_range(1, PEAKS):
        peak = tl.maximum(peak, peaks[part])
        trough = tl.minimum(trough, peaks[part])
    top = tl.maximum(tl.max(peak, 1)[:, None] + 1, 1) + tl.zeros([R, LANES], tl.int32)
    most = top
    least = tl.maximum(tl.min(trough, 1)[:, None], 0) + tl.zeros([R, LANES], tl.int32)
    least = tl.where(tl.sum(count_keys(peaks, least, PEAKS), 1)[:, None] >= wanted, least, 0)
    for _ in range(BOUND_STEPS):
        middle = least + (most - least) // 2
        enough = tl.sum(count_keys(peaks, middle, PEAKS), 1)[:, None] >= wanted
        least = tl.where(enough, middle, least)
        most = tl.where(enough, most, middle)
    return least, top


@triton.jit
def compact_keys(
    rows_at, slots_at, dense_at, least, low, high, R: tl.constexpr, CANDIDATES: tl.constexpr, COUNT: tl.constexpr
):
    """Stream compaction: the keys that reach `least` and their blocks, two tuples of CANDIDATES pieces, padded with -1.

    Also the first block that the pieces do not cover: `high`, or, where a row or a lane has more candidates than fit,
    `low`, and then the pieces are empty.
    """
    lane = tl.arange(0, LANES)[None, :]
    row = tl.arange(0, R)[:, None]
    row_slots = slots_at + row * (SLOTS * LANES)
    count = tl.zeros([R, LANES], tl.int32)
    for start in range(low, high, COUNT * LANES):
        keys = fetch_keys(rows_at, start, high, COUNT)
        for part in tl.static_range(COUNT):
            entry = (keys[part].to(tl.int64) << 32) | (lane + start + part * LANES).to(tl.int64)
            keep = keys[part] >= least
            slot = tl.max_contiguous(count * LANES + lane, [1, 2])  # keeps stores in this layout
            tl.store(row_slots + slot, entry, mask=keep & (count < SLOTS))
            count += keep.to(tl.int32)
    tl.debug_barrier()
    total = tl.sum(count, 1)[:, None]
    deepest = tl.max(tl.max(count, 1), 0)
    fit = (deepest <= SLOTS) & (tl.max(tl.max(total, 1), 0) <= CANDIDATES * LANES)
    rest = tl.where(fit, high, low)
    place = tl.cumsum(count, 1) - count
    for depth in range(0, tl.where(fit, deepest, 0), PIECES_AT_ONCE):
        entries = ()
        for part in tl.static_range(PIECES_AT_ONCE):
            at = row_slots + (lane + (depth + part) * LANES)
            entries = entries + (tl.load(at, mask=depth + part < count, other=0),)  # noqa: RUF005
        for part in tl.static_range(PIECES_AT_ONCE):
            index = tl.max_contiguous(place + (depth + part), [1, 2])
            tl.store(dense_at + row * (CANDIDATES * LANES) + index, entries[part], mask=depth + part < count)
    tl.debug_barrier()
    total = tl.where(fit, total, 0)
    keys = ()
    blocks = ()
    for part in tl.static_range(CANDIDATES):
        index = part * LANES + lane
        entry = tl.load(dense_at + row * (CANDIDATES * LANES) + index, mask=index < total, other=-1)
        keys = keys + ((entry >> 32).to(tl.int32),)  # noqa: RUF005
        blocks = blocks + (entry.to(tl.int32),)  # noqa: RUF005
    return keys, blocks, rest


@triton.jit
def count_row(keys, rows_at, least, rest, high, CANDIDATES: tl.constexpr):
    """Per row how many keys reach `least`: those in registers, and those of blocks ``[rest, high)``."""
    count = count_keys(keys, least, CANDIDATES)
    for start in range(rest, high, PIECES_AT_ONCE * LANES):
        count += count_keys(fetch_keys(rows_at, start, high, PIECES_AT_ONCE), least, PIECES_AT_ONCE)
    return tl.sum(count, 1)[:, None]


@triton.jit
def extent_of_keys(keys, least, most, lowest, highest, COUNT: tl.constexpr):
    """The smallest and the largest key in ``[least, most)``, by row and lane, from `lowest` and `highest` on."""
    for part in tl.static_range(COUNT):
        inside = (keys[part] >= least) & (keys[part] < most)
        lowest = tl.minimum(lowest, tl.where(inside, keys[part], ALL))
        highest = tl.maximum(highest, tl.where(inside, keys[part], -1))
    return lowest, highest


@triton.jit
def cut_keys(keys, rows_at, wanted, least, top, rest, high, R: tl.constexpr, CANDIDATES: tl.constexpr):
    """Per row a threshold that exactly `wanted` keys reach; with ties, the smallest key wanted, and how
    many of its equals are.
    """
    most = top
    spare = tl.full([R, LANES], ALL, tl.int32)  # keys that reach `least` beyond those wanted
    # The bound lies just below the key sought: look near it first, then halve. Neighbouring blocks share a window and
    # so, often, a key: the range is cut to the keys within it now and then, which ends the search at equal ones.
    near = NEAR_BITS
    while tl.max(tl.max(tl.where(spare > 0, most - least, 0), 1), 0) > 1:
        for _ in range(SEARCH_STEPS):
            middle = least + tl.minimum((most - least) // 2, 1 << near)
            near = min(near + 1, 30)
            excess = count_row(keys, rows_at, middle, rest, high, CANDIDATES) - wanted
            least = tl.where(excess >= 0, middle, least)
            spare = tl.where(excess >= 0, excess, spare)
            most = tl.where(excess >= 0, most, middle)
        lowest, highest = extent_of_keys(
            keys, least, most, tl.full([R, LANES], ALL, tl.int32), tl.full([R, LANES], -1, tl.int32), CANDIDATES
        )
        for start in range(rest, high, PIECES_AT_ONCE * LANES):
            more = fetch_keys(rows_at, start, high, PIECES_AT_ONCE)
            lowest, highest = extent_of_keys(more, least, most, lowest, highest, PIECES_AT_ONCE)
        first = tl.min(lowest, 1)[:, None]
        last = tl.max(highest, 1)[:, None]
        least = tl.where(first < most, first, least)
        most = tl.where(first < most, last + 1, least + 1)
    spare = count_row(keys, rows_at, least, rest, high, CANDIDATES) - wanted
    above = count_row(keys, rows_at, least + 1, rest, high, CANDIDATES)
    return least, tl.where(spare > 0, wanted - above, ALL)


@triton.jit
def mark_blocks(
    marks_at, bits, keys, blocks, rows_at, cut, equals, rest, high, R: tl.constexpr, CANDIDATES: tl.constexpr
):
    """Set the row's bits at the blocks that it takes; of the blocks whose key equals the cut, the first `equals`."""
    last = tl.where(equals < ALL, -1, ALL) + tl.zeros([R, LANES], tl.int32)  # the last of these
    left = tl.where((equals < ALL) & (rest == high), equals, 0)
    while tl.max(tl.max(left, 1), 0) > 0:
        following = tl.full([R, LANES], ALL, tl.int32)
        for part in tl.static_range(CANDIDATES):
            equal = (keys[part] == cut) & (blocks[part] > last)
            following = tl.minimum(following, tl.where(equal, blocks[part], ALL))
        last = tl.where(left > 0, tl.min(following, 1)[:, None], last)
        left -= 1
    for part in tl.static_range(CANDIDATES):
        taken = (keys[part] > cut) | ((keys[part] == cut) & (blocks[part] <= last))
        mark_at = tl.max_contiguous(marks_at + blocks[part], [1, 2])
        tl.atomic_or(mark_at, bits, mask=taken & (keys[part] >= 0), sem="relaxed", scope="cta")
    seen = tl.zeros([R, LANES], tl.int32)
    for start in range(rest, high, LANES):
        block = start + tl.arange(0, LANES)[None, :]
        key = tl.load(rows_at + block, mask=block < high, other=-1)
        equal = (key == cut).to(tl.int32)
        taken = (key > cut) | ((equal != 0) & (seen + tl.cumsum(equal, 1) <= equals))
        tl.atomic_or(marks_at + block, bits, mask=taken & (key >= 0), sem="relaxed", scope="cta")
        seen += tl.sum(equal, 1)[:, None]


@triton.jit
def fill_keys(rows_at, marks_at, bits, ranks_at, highest, low, high, R: tl.constexpr):
    """Keys for filling up: ranks of blocks ``[low, high)`` by importance, `highest` at those that are marked."""
    for start in range(low, high, LANES):
        block = start + tl.arange(0, LANES)[None, :] + tl.zeros([R, 1], tl.int32)
        key = tl.load(rows_at + block, mask=block < high, other=-1)
        mark = tl.load(marks_at + block, mask=block < high, other=0, cache_modifier=".cg")
        rank = tl.load(ranks_at + block, mask=key >= 0, other=-1)
        tl.store(rows_at + block, tl.where((key >= 0) & ((mark & bits) != 0), highest, rank), mask=block < high)


@triton.jit
def below(count, MASK: tl.constexpr):
    """Masks of the lowest `count` bits."""
    width: tl.constexpr = MASK.primitive_bitwidth
    lowest = (tl.full([1, 1], 1, MASK) << tl.minimum(count, width - 1).to(MASK)) - 1
    return tl.where(count < width, lowest, -1)


@triton.jit
def tokens_before(place, position, length, QUERY_BLOCK: tl.constexpr):
    """How many tokens of a panel belong to rows whose last query stands before a place of the sequence."""
    count = tl.maximum(place - position, 0) // QUERY_BLOCK * QUERY_BLOCK
    return tl.where(place < length, count, ALL)


@triton.jit
def write_lists(
    blocks_at,  # [K, 1] where the lists of some tiles begin
    tokens_at,
    counts_at,
    marks_at,  # [K, 1]
    shift,  # [K, 1] first token of each tile
    position,
    begin,
    end,
    length,
    window,
    local,
    low,
    high,
    T: tl.constexpr,
    W: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
):
    """The lists of some tiles: scored blocks ``[low, high)`` as marked, and the forced blocks.

    Tokens are in the order of their positions, so those that see a block are neighbours, and so are those among them
    that visit it for its nearness: two masks of lower bits bound each.
    """
    MASK: tl.constexpr = marks_at.dtype.element_ty
    final_token = (end - 1) // QUERY_BLOCK * QUERY_BLOCK + (QUERY_BLOCK - 1)
    final_block = tl.where(end > begin, tl.minimum(position + final_token, length - 1) // BLOCK, -1)
    first_block = begin * 0
    if HAS_WINDOW:
        first_token = begin // QUERY_BLOCK * QUERY_BLOCK + (QUERY_BLOCK - 1)
        first_block = tl.maximum(tl.minimum(position + first_token, length - 1) - window + 1, 0) // BLOCK
    written = shift * 0
    for start in range(first_block, final_block + 1, W):
        block = start + tl.arange(0, W)[None, :]
        there = (block >= low) & (block < high)
        marks = tl.load(marks_at + block, mask=there, other=0, cache_modifier=".cg")  # [K, W]
        if SHARED:
            marks = tl.where(marks != 0, -1, 0).to(MASK)
        past = tl.maximum(tokens_before(block * BLOCK, position, length, QUERY_BLOCK), begin)  # tokens before the block
        near = tokens_before((block + local + 1) * BLOCK, position, length, QUERY_BLOCK)
        near = tl.where(block < INIT, ALL, near)
        seeing = end + block * 0
        if HAS_WINDOW:
            within = tokens_before((block + 1) * BLOCK + window - 1, position, length, QUERY_BLOCK)
            seeing = tl.minimum(seeing, within)
        seen = below(tl.minimum(tl.maximum(seeing - shift, 0), T), MASK)
        seen = seen & ~below(tl.minimum(tl.maximum(past - shift, 0), T), MASK)
        mask = seen & (marks | below(tl.minimum(tl.maximum(near - shift, 0), T), MASK))
        used = (mask != 0).to(tl.int32)
        place = tl.max_contiguous(written + tl.cumsum(used, 1) - 1, [1, 2])
        tl.store(blocks_at + place, (block + shift * 0).to(tl.int16), mask=used != 0)
        tl.store(tokens_at + place, mask.to(tokens_at.dtype.element_ty), mask=used != 0)
        written += tl.sum(used, 1)[:, None]
    tl.store(counts_at, written)
