"""Block-to-query index of a chunk of tiles: counted, placed and listed by phases of the persistent kernel.

See `backward.block_to_query` for why the gradients build theirs in another way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...tile_tables import PANEL_BATCH, PANEL_BLOCK_BASE, PANEL_KEY_BEGIN, PANEL_POSITION, PANEL_QUERY, TABLE_COLUMNS

PIECE_WIDTH = tl.constexpr(8)
# Numbers of a piece; tokens are numbered through all tiles, so that a sequence's queries and keys differ by constants.
PIECE_BATCH = tl.constexpr(0)
PIECE_KEY = tl.constexpr(1)  # the block's first key
PIECE_QUERY_SHIFT = tl.constexpr(2)  # query number minus token number
PIECE_KEY_SHIFT = tl.constexpr(3)  # number of the token's own key minus token number
PIECE_BEGIN = tl.constexpr(4)  # entries
PIECE_END = tl.constexpr(5)


@triton.jit
def _scored_tokens(
    block,  # [WIDTH]
    bits,  # [WIDTH]
    own,
    token,  # [TOKENS]
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
):
    """Which tokens of a tile selected the blocks of its entries, int32 ``[WIDTH, TOKENS]``: none for forced blocks."""
    bits = tl.where((block >= INIT_BLOCKS) & (block < own - LOCAL_BLOCKS), bits, 0)
    return ((bits[:, None] >> token[None, :]) & 1).to(tl.int32)


@triton.jit(noinline=True)  # keeps its registers out of `attend_pieces`
def count_queries(
    unit_counts,
    owners,
    panels,
    blocks,
    tokens,
    counts,
    capacity,
    heads,
    head,
    begin,
    end,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Count the queries of some tiles that selected each block, and note a panel of the block's sequence."""
    token = tl.arange(0, TOKENS)
    for tile in range(begin, end):
        row = head.to(tl.int64) + tile * heads
        panel = panels + tile // TILES * TABLE_COLUMNS
        own = (tl.load(panel + PANEL_POSITION) + tile % TILES * TOKENS) // BLOCK_SIZE
        base = tl.load(panel + PANEL_BLOCK_BASE)
        count = tl.load(counts + row)
        for start in range(0, count, WIDTH):
            at = start + tl.arange(0, WIDTH)
            block = tl.load(blocks + row * capacity + at, mask=at < count, other=0).to(tl.int32) & 0xFFFF
            bits = tl.load(tokens + row * capacity + at, mask=at < count, other=0)
            listed = _scored_tokens(block, bits, own, token, INIT_BLOCKS, LOCAL_BLOCKS)
            number = tl.sum(listed, 1)  # [WIDTH]
            tl.atomic_add(unit_counts + base + block, number, mask=number > 0, sem="relaxed")
            tl.store(owners + base + block, block * 0 + tile // TILES, mask=number > 0)


@triton.jit(noinline=True)  # keeps its registers out of `attend_pieces`
def place_blocks(
    unit_counts,
    owners,
    cursors,
    work,
    pieces,
    panels,
    num_blocks,
    bound,
    PANEL_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where the entries of each block begin, and the pieces into which they are cut; clears the counts."""
    base = 0
    first = 0
    for start in range(0, num_blocks, WIDTH):
        block = start + tl.arange(0, WIDTH)
        ok = block < num_blocks
        count = tl.load(unit_counts + block, mask=ok, other=0)
        tl.store(unit_counts + block, count * 0, mask=ok)
        begin = base + tl.cumsum(count, 0) - count
        base += tl.sum(count, 0)
        tl.store(cursors + block, begin, mask=ok)
        # A selection of more blocks than promised, from queries that are not numbers, must not lead writes astray.
        end = tl.minimum(begin + count, bound)
        number = tl.maximum(end - begin + PIECE - 1, 0) // PIECE
        ok = number > 0
        owner = tl.load(owners + block, mask=ok, other=0)
        panel = panels + owner * TABLE_COLUMNS
        batch = tl.load(panel + PANEL_BATCH, mask=ok, other=0)
        base_block = tl.load(panel + PANEL_BLOCK_BASE, mask=ok, other=0)
        key_begin = tl.load(panel + PANEL_KEY_BEGIN, mask=ok, other=0)
        query_shift = tl.load(panel + PANEL_QUERY, mask=ok, other=0) - owner * PANEL_TOKENS
        key_shift = tl.load(panel + PANEL_POSITION, mask=ok, other=0) + key_begin - owner * PANEL_TOKENS
        row = work + (first + tl.cumsum(number, 0) - number) * PIECE_WIDTH
        for part in range(tl.max(number, 0)):
            here = part < number
            tl.store(row + PIECE_BATCH, batch, mask=here)
            tl.store(row + PIECE_KEY, key_begin + (block - base_block) * BLOCK_SIZE, mask=here)
            tl.store(row + PIECE_QUERY_SHIFT, query_shift, mask=here)
            tl.store(row + PIECE_KEY_SHIFT, key_shift, mask=here)
            tl.store(row + PIECE_BEGIN, begin + part * PIECE, mask=here)
            tl.store(row + PIECE_END, tl.minimum(begin + (part + 1) * PIECE, end), mask=here)
            row += PIECE_WIDTH
        first += tl.sum(number, 0)
    tl.store(pieces, first)


@triton.jit(noinline=True)  # keeps its registers out of `attend_pieces`
def list_queries(
    cursors,
    entries,
    scored_counts,
    panels,
    blocks,
    tokens,
    counts,
    capacity,
    heads,
    head,
    first,  # tile of the chunk
    begin,
    end,
    bound,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SCORED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """List the queries of some tiles under the blocks that they selected, each as the slot of its partial result.

    Programs list at the same time, so the order within a block differs from run to run; the places do not.
    """
    token = tl.arange(0, TOKENS)
    for tile in range(begin, end):
        row = head.to(tl.int64) + tile * heads
        panel = panels + tile // TILES * TABLE_COLUMNS
        own = (tl.load(panel + PANEL_POSITION) + tile % TILES * TOKENS) // BLOCK_SIZE
        base = tl.load(panel + PANEL_BLOCK_BASE)
        count = tl.load(counts + row)
        local = (tile - first) * TOKENS + token
        chosen = tl.zeros([TOKENS], tl.int32)
        for start in range(0, count, WIDTH):
            at = start + tl.arange(0, WIDTH)
            block = tl.load(blocks + row * capacity + at, mask=at < count, other=0).to(tl.int32) & 0xFFFF
            bits = tl.load(tokens + row * capacity + at, mask=at < count, other=0)
            listed = _scored_tokens(block, bits, own, token, INIT_BLOCKS, LOCAL_BLOCKS)
            number = tl.sum(listed, 1)  # [WIDTH]
            place = tl.atomic_add(cursors + base + block, number, mask=number > 0, sem="relaxed")
            place = place[:, None] + tl.cumsum(listed, 1) - listed  # [WIDTH, TOKENS]
            rank = chosen[None, :] + tl.cumsum(listed, 0) - listed
            slot = tl.where(rank < SCORED, local[None, :] * SCORED + rank, -1)
            tl.store(entries + place, slot, mask=(listed != 0) & (place < bound))
            chosen += tl.sum(listed, 0)
        tl.store(scored_counts + local, tl.minimum(chosen, SCORED))
