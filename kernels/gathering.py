"""Attention over scattered selections: for each key block, the queries that chose it are gathered.

Neighbouring queries that choose different blocks make the tiles of `kernels.attention` visit many blocks for few of
their tokens. There the tiles visit only what all tokens visit by rule, and one kernel of persistent programs does the
rest, block by block: keys and values of a block stay put while the queries that chose it pass, 64 rows a step. The
result of a query over one block is stored with its log-sum-exp at a place that the query and the block's rank among
the query's blocks fix, and then merged with the others and with what the tile wrote: every run gives the same bits.

The partial results of all queries would take gigabytes, so the work is cut into *chunks*, adjacent tiles for one
key/value head, which go through five phases in a ring of buffers: count the queries of each block, place the blocks,
list the queries, gather, merge. Programs draw the items of all chunks and phases from one sequence and wait only for
items drawn before their own, which some program is at work on already: they cannot wait for each other in a circle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_pass.kernels.configurations import GatherLaunch, gather_launch
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.launch import is_recorded, multiprocessors, precision, wrap_triton
from infllm_pass.kernels.tiles import (
    PANEL_BATCH,
    PANEL_BEGIN,
    PANEL_BLOCK_BASE,
    PANEL_END,
    PANEL_KEY_BEGIN,
    PANEL_POSITION,
    PANEL_QUERY,
    TABLE_COLUMNS,
    TileLists,
    TilePlan,
    TileShape,
)
from infllm_pass.kernels.transposition import block_bound
from infllm_pass.kernels.walking import LN_2, LOG2_E, LOWEST_SCORE, UNBOUNDED, count_forced, row_addresses, row_mask

_SMALL_RING = 8
"""Chunks whose lists of queries exist at a time; a power of two above the number of steps that a chunk takes."""

_POOL_RING = 3
"""Chunks whose partial results exist at a time: one being gathered, one being merged, one between."""

_PIECE = 256
"""Most queries of a block that are gathered in one go."""

_STATE = tl.constexpr(2)  # numbers in `state` before the counters: whether to gather, the next ticket
_COUNT_TILES = tl.constexpr(4)  # tiles of one item of counting
_LIST_TILES = tl.constexpr(2)
_PHASES = tl.constexpr(5)
_COUNTED = tl.constexpr(0)
_PLACED = tl.constexpr(1)
_LISTED = tl.constexpr(2)
_GATHERED = tl.constexpr(3)
_MERGED = tl.constexpr(4)
_DELAY = tl.constexpr(5)  # steps between the counting of a chunk and its merging; less than _POOL_RING after gathering
_PLACED_BLOCKS = tl.constexpr(1024)  # blocks placed at once
_MERGE_ROWS = tl.constexpr(32)  # queries x heads of one item of merging
_WORK = tl.constexpr(8)
# Numbers of a piece; tokens are numbered through all tiles, so that a sequence's queries and keys differ by constants.
_PIECE_BATCH = tl.constexpr(0)
_PIECE_KEY = tl.constexpr(1)  # the block's first key
_PIECE_QUERY_SHIFT = tl.constexpr(2)  # query number minus token number
_PIECE_KEY_SHIFT = tl.constexpr(3)  # number of the token's own key minus token number
_PIECE_BEGIN = tl.constexpr(4)  # entries
_PIECE_END = tl.constexpr(5)


@triton.jit(do_not_specialize=["num_tiles", "heads", "window"])
def _choose_kernel(
    state,
    panels,
    counts,
    num_tiles,
    heads,
    window,
    above,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    FAR: tl.constexpr,
    WIDTH: tl.constexpr,
):
    visits = tl.zeros([WIDTH], tl.int64)
    wanted = tl.zeros([WIDTH], tl.int64)
    for start in range(0, num_tiles * heads, WIDTH):
        at = start + tl.arange(0, WIDTH)
        count = tl.load(counts + at, mask=at < num_tiles * heads, other=0)
        tile = at // heads
        row = panels + tile // TILES * TABLE_COLUMNS
        ok = count > 0
        skip = tile % TILES * TOKENS
        begin = tl.maximum(tl.load(row + PANEL_BEGIN, mask=ok, other=0) - skip, 0)
        end = tl.minimum(tl.load(row + PANEL_END, mask=ok, other=0) - skip, TOKENS)
        position = tl.load(row + PANEL_POSITION, mask=ok, other=0) + skip
        forced, _, _, _ = count_forced(position, begin, end, window, BLOCK_SIZE, INIT_BLOCKS, LOCAL_BLOCKS)
        far = tl.minimum(tl.maximum(position // BLOCK_SIZE - LOCAL_BLOCKS - INIT_BLOCKS, 0), FAR)
        visits += tl.where(ok, tl.maximum(count - forced, 0), 0)
        wanted += tl.where(ok, (end - begin) * far, 0)
    scattered = tl.sum(visits, 0).to(tl.float32) > tl.sum(wanted, 0).to(tl.float32) * tl.cast(above, tl.float32)
    tl.store(state, scattered.to(tl.int32))


@triton.jit
def _await_items(counter, number):
    """Wait until so many items of a phase are done, and see what they wrote."""
    reached = tl.atomic_add(counter, 0, sem="acquire")
    while reached < number:
        reached = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def _far_tokens(
    block,  # [WIDTH]
    bits,  # [WIDTH]
    own,
    token,  # [TOKENS]
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
):
    """Which tokens of a tile chose the blocks of its entries, int32 ``[WIDTH, TOKENS]``: none where all visit one."""
    bits = tl.where((block >= INIT_BLOCKS) & (block < own - LOCAL_BLOCKS), bits, 0)
    return ((bits[:, None] >> token[None, :]) & 1).to(tl.int32)


@triton.jit(noinline=True)  # keeps its registers out of the gathering
def _count_queries(
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
    """Add up how many queries of some tiles chose each block, and note a panel of the block's sequence."""
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
            listed = _far_tokens(block, bits, own, token, INIT_BLOCKS, LOCAL_BLOCKS)
            number = tl.sum(listed, 1)  # [WIDTH]
            tl.atomic_add(unit_counts + base + block, number, mask=number > 0, sem="relaxed")
            tl.store(owners + base + block, block * 0 + tile // TILES, mask=number > 0)


@triton.jit(noinline=True)  # keeps its registers out of the gathering
def _place_blocks(
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
        row = work + (first + tl.cumsum(number, 0) - number) * _WORK
        for part in range(tl.max(number, 0)):
            here = part < number
            tl.store(row + _PIECE_BATCH, batch, mask=here)
            tl.store(row + _PIECE_KEY, key_begin + (block - base_block) * BLOCK_SIZE, mask=here)
            tl.store(row + _PIECE_QUERY_SHIFT, query_shift, mask=here)
            tl.store(row + _PIECE_KEY_SHIFT, key_shift, mask=here)
            tl.store(row + _PIECE_BEGIN, begin + part * PIECE, mask=here)
            tl.store(row + _PIECE_END, tl.minimum(begin + (part + 1) * PIECE, end), mask=here)
            row += _WORK
        first += tl.sum(number, 0)
    tl.store(pieces, first)


@triton.jit(noinline=True)  # keeps its registers out of the gathering
def _list_queries(
    cursors,
    entries,
    far_counts,
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
    FAR: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """List the queries of some tiles at the blocks that they chose, each as the place of its partial result.

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
            listed = _far_tokens(block, bits, own, token, INIT_BLOCKS, LOCAL_BLOCKS)
            number = tl.sum(listed, 1)  # [WIDTH]
            place = tl.atomic_add(cursors + base + block, number, mask=number > 0, sem="relaxed")
            place = place[:, None] + tl.cumsum(listed, 1) - listed  # [WIDTH, TOKENS]
            rank = chosen[None, :] + tl.cumsum(listed, 0) - listed
            slot = tl.where(rank < FAR, local[None, :] * FAR + rank, -1)
            tl.store(entries + place, slot, mask=(listed != 0) & (place < bound))
            chosen += tl.sum(listed, 0)
        tl.store(far_counts + local, tl.minimum(chosen, FAR))


@triton.jit
def _load_piece(row):
    return (
        tl.load(row + _PIECE_BATCH),
        tl.load(row + _PIECE_KEY),
        tl.load(row + _PIECE_QUERY_SHIFT),
        tl.load(row + _PIECE_KEY_SHIFT),
        tl.load(row + _PIECE_BEGIN),
        tl.load(row + _PIECE_END),
    )


@triton.jit
def _gather_pieces(
    q,
    k,
    v,
    pool,
    sums,
    key_mask,
    work,
    entries,
    begin_piece,
    end_piece,
    head,
    first,  # token of the chunk
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride: tl.constexpr,
    v_batch_stride,
    v_head_stride,
    v_token_stride: tl.constexpr,
    key_mask_batch_stride,
    key_mask_token_stride,
    window,
    scale_log2,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    FAR: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of the queries of some pieces to the pieces' blocks, whose keys all stand before them."""
    ENTRIES: tl.constexpr = BLOCK_M // PADDED_GROUP
    keys = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    row = tl.arange(0, BLOCK_M)
    group_head = row % PADDED_GROUP
    row_head = head.to(tl.int64) * GROUP + tl.minimum(group_head, GROUP - 1)
    k += head.to(tl.int64) * k_head_stride
    v += head.to(tl.int64) * v_head_stride
    next_batch, next_key, next_query_shift, next_key_shift, next_begin, next_end = _load_piece(
        work + begin_piece * _WORK
    )
    for piece in range(begin_piece, end_piece):
        batch = next_batch.to(tl.int64)
        key = next_key.to(tl.int64)
        query_shift = next_query_shift + first
        key_shift = next_key_shift + first
        entry = next_begin + row // PADDED_GROUP  # [BM]
        end = next_end
        following = tl.load(entries + tl.minimum(entry, end - 1))
        steps = tl.cdiv(end - next_begin, ENTRIES)
        k_at = k + batch * k_batch_stride + key * k_token_stride
        k_at += keys[None, :] * k_token_stride + dims[:, None]
        v_at = v + batch * v_batch_stride + key * v_token_stride
        v_at += keys[:, None] * v_token_stride + value_dims[None, :]
        k_tile = tl.load(k_at) if HEAD_DIM == BLOCK_D else tl.load(k_at, mask=(dims < HEAD_DIM)[:, None], other=0.0)
        v_mask = (value_dims < VALUE_DIM)[None, :]
        v_tile = tl.load(v_at) if VALUE_DIM == BLOCK_DV else tl.load(v_at, mask=v_mask, other=0.0)
        hidden = tl.zeros([BLOCK_SIZE], tl.int32)
        if HAS_KEY_MASK:
            at = key_mask + batch * key_mask_batch_stride + (key + keys) * key_mask_token_stride
            hidden = (tl.load(at) == 0).to(tl.int32)
        next_batch, next_key, next_query_shift, next_key_shift, next_begin, next_end = _load_piece(
            work + tl.minimum(piece + 1, end_piece - 1) * _WORK
        )
        for _ in range(steps):
            slot = following
            following = tl.load(entries + tl.minimum(entry + ENTRIES, end - 1))  # a step ahead
            exists = (entry < end) & (group_head < GROUP) & (slot >= 0)
            slot = tl.maximum(slot, 0)
            token = slot // FAR
            query = (query_shift + token).to(tl.int64)
            q_at = row_addresses(q, batch, q_batch_stride, row_head, q_head_stride, query, q_token_stride, BLOCK_D)
            q_mask = (dims < HEAD_DIM)[None, :]
            queries = tl.load(q_at) if HEAD_DIM == BLOCK_D else tl.load(q_at, mask=q_mask, other=0.0)
            scores = tl.dot(queries, k_tile, input_precision=PRECISION)  # [BM, BN]
            if HAS_WINDOW:
                own = key_shift + token  # [BM]
                scores = tl.where((key + keys)[None, :] > (own - window)[:, None], scores, float("-inf"))
            if HAS_KEY_MASK:
                scores = tl.where((hidden != 0)[None, :], float("-inf"), scores)
            highest = tl.max(scores, 1) * scale_log2  # [BM]
            if HAS_WINDOW or HAS_KEY_MASK:
                highest = tl.maximum(highest, LOWEST_SCORE)
            weights = tl.exp2(scores * scale_log2 - highest[:, None])
            total = tl.sum(weights, 1)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)  # [BM, Dv]
            divisor = total
            if HAS_WINDOW or HAS_KEY_MASK:
                divisor = tl.where(total == 0.0, 1.0, total)
            acc = acc * (1.0 / divisor)[:, None]
            place = slot * GROUP + group_head
            out_at = pool + (place * VALUE_DIM)[:, None] + value_dims[None, :]
            tl.store(
                out_at,
                acc.to(pool.dtype.element_ty),
                mask=row_mask(exists, VALUE_DIM, BLOCK_DV),
            )
            tl.store(sums + place, highest + tl.log2(total), mask=exists)
            entry += ENTRIES


@triton.jit(noinline=True)  # keeps its registers out of the gathering
def _merge_queries(
    out,
    lse,
    pool,
    sums,
    far_counts,
    panels,
    first,  # tile of the chunk
    item,
    head,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    lse_batch_stride,
    lse_head_stride,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    FAR: tl.constexpr,
    PADDED_FAR: tl.constexpr,
):
    """Add what some queries found in their far blocks to what their tile wrote."""
    row = tl.arange(0, _MERGE_ROWS)
    local = item * (_MERGE_ROWS // PADDED_GROUP) + row // PADDED_GROUP  # [BM], token of the chunk
    group_head = row % PADDED_GROUP
    number = tl.load(far_counts + local)
    number = tl.where(group_head < GROUP, number, 0)  # [BM]
    most = tl.max(number, 0)
    if most > 0:
        token = first * TOKENS + local  # of all tiles
        panel = panels + token // (TOKENS * TILES) * TABLE_COLUMNS
        batch = tl.load(panel + PANEL_BATCH).to(tl.int64)
        query = (tl.load(panel + PANEL_QUERY) + token % (TOKENS * TILES)).to(tl.int64)
        row_head = head.to(tl.int64) * GROUP + group_head
        exists = number > 0
        lse_at = lse + batch * lse_batch_stride + row_head * lse_head_stride + query
        near = tl.load(lse_at, mask=exists, other=float("-inf")) * (1.0 / LN_2)
        place = local * FAR * GROUP + group_head  # [BM], of the first rank
        rank = tl.arange(0, PADDED_FAR)
        listed = rank[None, :] < number[:, None]
        logs = tl.load(sums + place[:, None] + rank[None, :] * GROUP, mask=listed, other=float("-inf"))
        highest = tl.maximum(tl.maximum(near, tl.max(logs, 1)), LOWEST_SCORE)
        near = tl.exp2(near - highest)
        total = near + tl.sum(tl.exp2(logs - highest[:, None]), 1)
        dims = tl.arange(0, BLOCK_DV)
        mask = row_mask(exists, VALUE_DIM, BLOCK_DV)
        out_at = row_addresses(
            out, batch, out_batch_stride, row_head, out_head_stride, query, out_token_stride, BLOCK_DV
        )
        acc = tl.load(out_at, mask=mask, other=0.0).to(tl.float32) * near[:, None]
        for step in tl.range(0, most, num_stages=7):  # asynchronous loads, six at a time
            here = step < number
            weight = tl.exp2(tl.load(sums + place + step * GROUP, mask=here, other=float("-inf")) - highest)
            part_at = pool + ((place + step * GROUP) * VALUE_DIM)[:, None] + dims[None, :]
            values = tl.load(part_at, mask=row_mask(here, VALUE_DIM, BLOCK_DV), other=0.0)
            acc += weight[:, None] * values.to(tl.float32)
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        tl.store(lse_at, tl.where(empty, float("-inf"), (highest + tl.log2(total)) * LN_2), mask=exists)


@triton.jit(
    do_not_specialize=[
        "lse_batch_stride",
        "lse_head_stride",
        "key_mask_batch_stride",
        "capacity",
        "num_tiles",
        "num_blocks",
        "chunk_tiles",
        "ranges",
        "heads",
        "window",
    ]
)
def _gather_kernel(
    q,
    k,
    v,
    out,  # [B, Hq, Lq, Dv], holds the attention to the blocks visited by rule
    lse,
    panels,
    blocks,
    tokens,
    counts,
    key_mask,
    state,  # int32: whether to run; next ticket; items done, chunk by chunk and phase by phase; queries of the blocks
    scratch,  # int32: a ring of lists
    pool,  # a ring of partial results [slots, GROUP, Dv]
    sums,  # float32: their log-sum-exp, base 2
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride: tl.constexpr,
    v_batch_stride,
    v_head_stride,
    v_token_stride: tl.constexpr,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    lse_batch_stride,
    lse_head_stride,
    key_mask_batch_stride,
    key_mask_token_stride,
    capacity,
    num_tiles,
    num_blocks,
    chunk_tiles,
    ranges,  # chunks of one head
    heads,
    window,
    scale_log2,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    FAR: tl.constexpr,
    PADDED_FAR: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    SMALL_RING: tl.constexpr,
    POOL_RING: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    chunks = ranges * heads
    bound = chunk_tiles * TOKENS * FAR  # entries of a chunk
    most_pieces = num_blocks + bound // PIECE
    count_items = (chunk_tiles + _COUNT_TILES - 1) // _COUNT_TILES
    list_items = (chunk_tiles + _LIST_TILES - 1) // _LIST_TILES
    merge_items = chunk_tiles * (TOKENS * PADDED_GROUP // _MERGE_ROWS)
    step_items = 1 + list_items + count_items + 2 * merge_items
    tickets = tl.load(state) * (chunks + _DELAY) * step_items
    done = state + _STATE
    ticket = tl.atomic_add(state + 1, 1)
    while ticket < tickets:
        item = ticket % step_items
        chunk = ticket // step_items
        # In the order of a step: place, list, count; then merge and gather, whose items alternate, as the one moves
        # bytes and the other multiplies.
        rest = item - (1 + list_items + count_items)
        busy = rest >= 0
        phase = tl.where(item <= list_items, tl.where(item == 0, _PLACED, _LISTED), _COUNTED)
        phase = tl.where(busy, tl.where(rest % 2 == 0, _MERGED, _GATHERED), phase)
        item = tl.where(busy, rest // 2, tl.where(item <= list_items, item - 1, item - 1 - list_items))
        delay = tl.where(phase == _COUNTED, 0, tl.where(phase == _MERGED, _DELAY, phase))
        chunk -= delay
        if (chunk >= 0) & (chunk < chunks):
            head = chunk // ranges
            first = chunk % ranges * chunk_tiles
            last = tl.minimum(first + chunk_tiles, num_tiles)
            small = chunk % SMALL_RING
            unit_counts = done + chunks * _PHASES + small * num_blocks
            lists = scratch + small.to(tl.int64) * (1 + num_blocks * 2 + most_pieces * _WORK + bound + bound // FAR)
            owners = lists + 1
            cursors = owners + num_blocks
            work = cursors + num_blocks
            entries = work + most_pieces * _WORK
            far_counts = entries + bound
            pool_slot = (chunk % POOL_RING).to(tl.int64) * bound * GROUP
            mine = done + chunk * _PHASES
            if phase == _COUNTED:
                if chunk >= SMALL_RING:
                    _await_items(mine - SMALL_RING * _PHASES + _MERGED, merge_items)
                begin = first + item * _COUNT_TILES
                _count_queries(
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
                    tl.minimum(begin + _COUNT_TILES, last),
                    TOKENS,
                    TILES,
                    BLOCK_SIZE,
                    INIT_BLOCKS,
                    LOCAL_BLOCKS,
                    WIDTH,
                )
            elif phase == _PLACED:
                _await_items(mine + _COUNTED, count_items)
                _place_blocks(
                    unit_counts,
                    owners,
                    cursors,
                    work,
                    lists,
                    panels,
                    num_blocks,
                    bound,
                    TOKENS * TILES,
                    BLOCK_SIZE,
                    PIECE,
                    _PLACED_BLOCKS,
                )
            elif phase == _LISTED:
                _await_items(mine + _PLACED, 1)
                begin = first + item * _LIST_TILES
                _list_queries(
                    cursors,
                    entries,
                    far_counts,
                    panels,
                    blocks,
                    tokens,
                    counts,
                    capacity,
                    heads,
                    head,
                    first,
                    begin,
                    tl.minimum(begin + _LIST_TILES, last),
                    bound,
                    TOKENS,
                    TILES,
                    BLOCK_SIZE,
                    INIT_BLOCKS,
                    LOCAL_BLOCKS,
                    FAR,
                    WIDTH,
                )
            elif phase == _GATHERED:
                _await_items(mine + _LISTED, list_items)
                if chunk >= POOL_RING:
                    _await_items(mine - POOL_RING * _PHASES + _MERGED, merge_items)
                pieces = tl.load(lists)
                begin = pieces * item // merge_items
                end = pieces * (item + 1) // merge_items
                if begin < end:
                    _gather_pieces(
                        q,
                        k,
                        v,
                        pool + pool_slot * VALUE_DIM,
                        sums + pool_slot,
                        key_mask,
                        work,
                        entries,
                        begin,
                        end,
                        head,
                        first * TOKENS,
                        q_batch_stride,
                        q_head_stride,
                        q_token_stride,
                        k_batch_stride,
                        k_head_stride,
                        k_token_stride,
                        v_batch_stride,
                        v_head_stride,
                        v_token_stride,
                        key_mask_batch_stride,
                        key_mask_token_stride,
                        window,
                        scale_log2,
                        GROUP,
                        PADDED_GROUP,
                        BLOCK_M,
                        BLOCK_SIZE,
                        HEAD_DIM,
                        BLOCK_D,
                        VALUE_DIM,
                        BLOCK_DV,
                        FAR,
                        HAS_WINDOW,
                        HAS_KEY_MASK,
                        PRECISION,
                    )
            else:
                _await_items(mine + _GATHERED, merge_items)
                if item * _MERGE_ROWS < (last - first) * TOKENS * PADDED_GROUP:
                    _merge_queries(
                        out,
                        lse,
                        pool + pool_slot * VALUE_DIM,
                        sums + pool_slot,
                        far_counts,
                        panels,
                        first,
                        item,
                        head,
                        out_batch_stride,
                        out_head_stride,
                        out_token_stride,
                        lse_batch_stride,
                        lse_head_stride,
                        GROUP,
                        PADDED_GROUP,
                        TOKENS,
                        TILES,
                        VALUE_DIM,
                        BLOCK_DV,
                        FAR,
                        PADDED_FAR,
                    )
            tl.debug_barrier()  # all threads have written before one of them says so
            tl.atomic_add(mine + phase, 1, sem="release")
        ticket = tl.atomic_add(state + 1, 1)


def far_blocks(geometry: BlockGeometry, has_window: bool) -> int:
    """Most blocks that a query visits beyond those visited by rule; a window may drop the initial blocks."""
    forced = geometry.local_blocks + 1 + (0 if has_window else geometry.init_blocks)
    return max(0, geometry.selected_blocks - forced)


def choose_variant(
    q: Tensor,
    v: Tensor,
    lists: TileLists | None,
    plan: TilePlan,
    *,
    geometry: BlockGeometry,
    length_k: int,
    window: int | None = None,
) -> tuple[Tensor, GatherLaunch] | None:
    """Decide on the device whether gathering beats the union of a tile's blocks.

    Args:
        q: ``[B, Hq, Lq, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        lists: the selection.
        plan: the tiles.
        geometry: the block geometry.
        length_k: keys of a row.
        window: sliding window in keys.

    Returns:
        None where gathering is not offered; else int32 memory of `gather_far_blocks`, whose first number is 1 where
        the far blocks are to be gathered and 0 where they are not, and the launch.
    """
    shape = plan.shape
    far = far_blocks(geometry, window is not None)
    block_size, padded = geometry.block_size, max(16, triton.next_power_of_2(max(int(q.shape[3]), int(v.shape[3]))))
    launch = gather_launch(q, padded)
    # Tiles of few tokens gain little; tokens of a tile must share their own block, so that they share what is forced;
    # and a block's keys and values stay in shared memory, each in one piece.
    if (
        lists is None
        or launch is None
        or far == 0
        or geometry.query_block > 1
        or shape.padded_group > 8
        or block_size % shape.tokens
        or block_size & -block_size != block_size
        or block_size * padded * q.element_size() > launch.block_bytes
    ):
        return None
    if launch.recorded is not None and is_recorded(_gather_kernel):
        launch = launch.recorded
    heads = v.shape[1]
    ranges = triton.cdiv(plan.num_tiles, _chunk_tiles(q, v, plan, far, launch))
    num_blocks = block_bound(plan, batch=q.shape[0], length_k=length_k, block_size=block_size)
    size = _STATE.value + ranges * heads * _PHASES.value + _SMALL_RING * num_blocks
    state = torch.zeros(size, dtype=torch.int32, device=q.device)
    wrap_triton(_choose_kernel)[(1,)](
        state,
        plan.panels,
        lists.counts,
        plan.num_tiles,
        heads,
        UNBOUNDED if window is None else window,
        launch.above * shape.padded_group,
        TOKENS=shape.tokens,
        TILES=shape.tiles,
        BLOCK_SIZE=block_size,
        INIT_BLOCKS=geometry.init_blocks,
        LOCAL_BLOCKS=geometry.local_blocks,
        FAR=far,
        WIDTH=2048,
        num_warps=8,
    )
    return state, launch


def _chunk_tiles(q: Tensor, v: Tensor, plan: TilePlan, far: int, launch: GatherLaunch) -> int:
    """Tiles of a chunk: as many as the memory for partial results holds."""
    row = plan.shape.tokens * far * plan.shape.group * (int(v.shape[3]) * q.element_size() + 4)
    tiles: int = torch.sym_min(max(1, launch.pool_bytes // (_POOL_RING * row)), plan.num_tiles)
    return tiles


def gather_constants(
    shape: TileShape, geometry: BlockGeometry, dim: int, value_dim: int, has_window: bool, launch: GatherLaunch
) -> dict[str, int | bool]:
    """The sizes for which the kernel is compiled, by their names."""
    far = far_blocks(geometry, has_window)
    return {
        "GROUP": shape.group,
        "PADDED_GROUP": shape.padded_group,
        "TOKENS": shape.tokens,
        "TILES": shape.tiles,
        "BLOCK_M": launch.rows,
        "BLOCK_SIZE": geometry.block_size,
        "INIT_BLOCKS": geometry.init_blocks,
        "LOCAL_BLOCKS": geometry.local_blocks,
        "HEAD_DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "VALUE_DIM": value_dim,
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
        "FAR": far,
        "PADDED_FAR": triton.next_power_of_2(far),
        "PIECE": _PIECE,
        "WIDTH": max(32, min(128, 2048 // shape.tokens)),
        "SMALL_RING": _SMALL_RING,
        "POOL_RING": _POOL_RING,
        "HAS_WINDOW": has_window,
    }


def gather_far_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: TileLists,
    plan: TilePlan,
    state: Tensor,
    launch: GatherLaunch,
    *,
    geometry: BlockGeometry,
    scale: float,
    key_mask: Tensor | None = None,
    window: int | None = None,
) -> None:
    """Add the far blocks of every query to `out` and `lse`, if `state` says so.

    Args:
        q: ``[B, Hq, Lq, D]``, any strides with the last one 1, as for `k` and `v`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        out: ``[B, Lq, Hq, Dv]``: attention to the blocks that are visited by rule; changed.
        lse: float32 ``[B, Hq, Lq]``: its log-sum-exp; changed.
        lists: the selection.
        plan: the tiles.
        state: from `choose_variant`; changed.
        launch: from `choose_variant`.
        geometry: the block geometry.
        scale: softmax scale, positive.
        key_mask: bool ``[B, Lk]``, True where a key is valid.
        window: sliding window in keys.
    """
    batch, heads, length_k = k.shape[:3]
    shape, dim, value_dim = plan.shape, int(k.shape[3]), int(v.shape[3])
    far = far_blocks(geometry, window is not None)
    chunk_tiles = _chunk_tiles(q, v, plan, far, launch)
    num_blocks = block_bound(plan, batch=batch, length_k=length_k, block_size=geometry.block_size)
    entries = chunk_tiles * shape.tokens * far
    slots = _POOL_RING * entries * shape.group
    small = 1 + num_blocks * 2 + (num_blocks + entries // _PIECE) * _WORK.value + entries + chunk_tiles * shape.tokens
    wrap_triton(_gather_kernel)[(launch.programs * multiprocessors(q.device),)](
        q,
        k,
        v,
        out,
        lse,
        plan.panels,
        lists.blocks,
        lists.tokens,
        lists.counts,
        plan.panels if key_mask is None else key_mask,
        state,
        torch.empty(_SMALL_RING, small, dtype=torch.int32, device=q.device),
        torch.empty(slots, value_dim, dtype=q.dtype, device=q.device),
        torch.empty(slots, dtype=torch.float32, device=q.device),
        *q.stride()[:3],
        *k.stride()[:2],
        int(k.stride(2)),
        *v.stride()[:2],
        int(v.stride(2)),
        out.stride(0),
        out.stride(2),
        out.stride(1),
        lse.stride(0),
        lse.stride(1),
        0 if key_mask is None else key_mask.stride(0),
        0 if key_mask is None else key_mask.stride(1),
        lists.blocks.stride(1),
        plan.num_tiles,
        num_blocks,
        chunk_tiles,
        triton.cdiv(plan.num_tiles, chunk_tiles),
        heads,
        UNBOUNDED if window is None else window,
        scale * LOG2_E,
        **gather_constants(shape, geometry, dim, value_dim, window is not None, launch),
        HAS_KEY_MASK=key_mask is not None,
        PRECISION=precision(q),
        **launch.options,
    )
