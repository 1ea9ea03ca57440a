"""Block-to-query index of a call: which queries visit each key block, for the gradients of keys and values.

The forward's lists name the blocks that a tile visits; dK and dV need the reverse. Queries that visit a block by rule
need no list: they are a *run* of adjacent queries, from the first one at or after the block's first key to the end of
the local window (or of the sequence: initial blocks, dense sequences). Queries beyond the run that selected the block
are *listed* one by one, so that products over them have no empty rows.

Counting, prefix sums and filling take the tiles in one fixed order, without atomics: the same lists in every run.

The persistent kernel of scattered selections builds an index of its own (`prefill.scattered.block_to_query`), because
the two need different things. Here a block's sums depend on the order of its queries, so the order must be fixed: one
count for each block and range of tiles, 8 MB for 128k tokens and 8 key/value heads, and two passes in launches of
their own. There a result's slot does not depend on the order, so atomics on one count a block do, within one kernel;
and an index of the whole call would take 130 MB (128k tokens, 31 scored blocks, 8 heads), the ring of eight chunks
takes 3 MB, which stay in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import BlockGeometry
from ..launch import wrap_triton
from ..tile_schedule import find_sequence
from ..tile_tables import (
    PANEL_BLOCK_BASE,
    PANEL_QUERY,
    SEQ_BATCH,
    SEQ_BLOCK_BASE,
    SEQ_KEY_BEGIN,
    SEQ_KEY_END,
    SEQ_QUERY_BEGIN,
    SEQ_QUERY_END,
    SEQ_SHIFT,
    TABLE_COLUMNS,
    TABLE_WIDTH,
    TileLists,
    TilePlan,
)

PROGRAMS = 1024
"""Programs that go through the tiles, over all heads: some ten a multiprocessor hide the latency of their loads."""

_ROWS = 256
"""Table rows that one program writes."""

_LANES = 2048
"""List entries times tokens of one step."""

_SCANNED_BLOCKS = 1024
"""Blocks whose counts one step adds up."""

_SCANNED_PARTS, _COLUMNS = 32, 32
"""Parts and blocks of one step of the prefix sums."""

# Columns of `BlockQueries.table`. Key and query numbers index the tensors of the batch row.
BLOCK_BATCH = tl.constexpr(0)
BLOCK_KEY = tl.constexpr(1)  # number of the block's first key
BLOCK_KEYS = tl.constexpr(2)  # keys in the block; 0: no such block
BLOCK_QUERY = tl.constexpr(3)  # first query of the run
BLOCK_RUN = tl.constexpr(4)  # queries in the run
BLOCK_SHIFT = tl.constexpr(5)  # key number minus query number of the same token


@dataclass(frozen=True)
class BlockQueries:
    """The queries that visit each key block: the block's run, then its listed queries.

    Attributes:
        table: int32 ``[num_blocks, 8]``, one row a block of the call, numbered through all sequences.
        starts: int32 ``[Hkv, num_blocks]``: where a block's listed queries begin in `queries`.
        counts: int32 ``[Hkv, num_blocks]``: how many queries are listed.
        queries: int32 ``[Hkv, bound]``: query numbers, ascending within a block.

    The last three are None where no sequence is sparse.
    """

    table: Tensor
    starts: Tensor | None
    counts: Tensor | None
    queries: Tensor | None


@triton.jit(do_not_specialize=["count", "num_blocks", "dense_len", "window"])
def _block_table_kernel(
    table,
    sequences,
    count,
    num_blocks,
    dense_len,
    window,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = block < num_blocks
    row = sequences + find_sequence(sequences, count, block, SEQ_BLOCK_BASE) * TABLE_COLUMNS
    key_begin = tl.load(row + SEQ_KEY_BEGIN)
    shift = tl.load(row + SEQ_SHIFT)
    length = tl.load(row + SEQ_KEY_END) - key_begin
    number = block - tl.load(row + SEQ_BLOCK_BASE)
    begin = number * BLOCK_SIZE
    first = tl.maximum(tl.load(row + SEQ_QUERY_BEGIN), key_begin + begin - shift)
    # Positions before `reach` visit the block by rule.
    dense = ok if DENSE else length < dense_len
    reach = tl.where(dense | (number < INIT_BLOCKS), length, begin + (LOCAL_BLOCKS + 1) * BLOCK_SIZE)
    if HAS_WINDOW:
        reach = tl.minimum(reach, begin + BLOCK_SIZE - 1 + window)
    # Queries that share a selection go by the position of their last one, which is at most the sequence's last.
    reach = tl.where(dense | (reach >= length), tl.minimum(reach, length), reach // QUERY_BLOCK * QUERY_BLOCK)
    last = tl.minimum(tl.load(row + SEQ_QUERY_END), reach + key_begin - shift)
    keys = tl.minimum(tl.maximum(length - begin, 0), BLOCK_SIZE)
    out = table + block * TABLE_COLUMNS
    tl.store(out + BLOCK_BATCH, tl.load(row + SEQ_BATCH), mask=ok)
    tl.store(out + BLOCK_KEY, key_begin + begin, mask=ok)
    tl.store(out + BLOCK_KEYS, keys, mask=ok)
    tl.store(out + BLOCK_QUERY, first, mask=ok)
    tl.store(out + BLOCK_RUN, tl.where(keys > 0, tl.maximum(last - first, 0), 0), mask=ok)
    tl.store(out + BLOCK_SHIFT, shift, mask=ok)


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_part", "num_blocks", "capacity", "bound"])
def _invert_kernel(
    cursors,  # int32 [Hkv, parts, num_blocks]: counts of listed queries, or where the next one goes when FILL
    queries,
    table,
    panels,
    blocks,
    tokens,
    counts,
    num_tiles,
    tiles_per_part,
    num_blocks,
    capacity,
    bound,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    FILL: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    cursors += (head * tl.num_programs(0) + part).to(tl.int64) * num_blocks
    token = tl.arange(0, TOKENS)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, num_tiles)):
        panel = panels + tile // TILES * TABLE_COLUMNS
        query = tl.load(panel + PANEL_QUERY) + tile % TILES * TOKENS + token  # [TOKENS]
        base = tl.load(panel + PANEL_BLOCK_BASE)
        index = heads.to(tl.int64) * tile + head
        count = tl.load(counts + index)
        for start in range(0, count, WIDTH):
            at = start + tl.arange(0, WIDTH)
            ok = at < count
            block = (tl.load(blocks + index * capacity + at, mask=ok, other=0).to(tl.int32) & 0xFFFF) + base
            bits = tl.load(tokens + index * capacity + at, mask=ok, other=0)
            row = table + block * TABLE_COLUMNS
            listed_from = tl.load(row + BLOCK_QUERY, mask=ok, other=0) + tl.load(row + BLOCK_RUN, mask=ok, other=0)
            listed = ((bits[:, None] >> token[None, :]) & 1) != 0  # [WIDTH, TOKENS]
            listed = (listed & (query[None, :] >= listed_from[:, None])).to(tl.int32)
            number = tl.sum(listed, 1)  # [WIDTH]
            cursor = tl.load(cursors + block, mask=number > 0, other=0)
            tl.debug_barrier()  # several threads may read the same cursor; one of them moves it
            tl.store(cursors + block, cursor + number, mask=number > 0)
            if FILL:
                place = cursor[:, None] + tl.cumsum(listed, 1) - listed
                ones = tl.zeros([WIDTH, TOKENS], tl.int32)
                tl.store(
                    queries + head.to(tl.int64) * bound + place,
                    query[None, :] + ones,
                    mask=(listed != 0) & (place < bound),
                )
        tl.debug_barrier()  # the blocks of one tile differ, those of the next may be the same


@triton.jit(do_not_specialize=["num_blocks"])
def _starts_kernel(starts, counts, num_blocks, BLOCKS: tl.constexpr):
    """Where each block's list begins: sums of the counts before it, one program a head."""
    starts += tl.program_id(0).to(tl.int64) * num_blocks
    counts += tl.program_id(0).to(tl.int64) * num_blocks
    base = 0
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        count = tl.load(counts + block, mask=block < num_blocks, other=0)
        tl.store(starts + block, base + tl.cumsum(count, 0) - count, mask=block < num_blocks)
        base += tl.sum(count, 0)


@triton.jit(do_not_specialize=["parts", "num_blocks"])
def _cursors_kernel(
    cursors,  # int32 [Hkv, parts, num_blocks]: counts, replaced by where each part's first query goes
    starts,
    parts,
    num_blocks,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    ok = block < num_blocks
    place = tl.load(starts + head * num_blocks + block, mask=ok, other=0)  # [BLOCKS]
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = cursors + (head * parts + part[:, None]) * num_blocks + block[None, :]
        there = (part[:, None] < parts) & ok[None, :]
        count = tl.load(at, mask=there, other=0)  # [PARTS, BLOCKS]
        tl.store(at, place[None, :] + tl.cumsum(count, 0) - count, mask=there)
        place += tl.sum(count, 0)


def block_bound(plan: TilePlan, *, batch: int, length_k: int, block_size: int) -> int:
    """A number that the key blocks of a call cannot pass, from shapes alone."""
    count = plan.sequences.shape[0]
    if plan.packed:
        return batch * length_k // block_size + count
    return count * ((length_k + block_size - 1) // block_size)


def invert_selection(
    lists: TileLists | None,
    plan: TilePlan,
    *,
    geometry: BlockGeometry,
    batch: int,
    length_k: int,
    dense_len: int,
    window: int | None = None,
    programs: int = PROGRAMS,
) -> BlockQueries:
    """The queries that visit each key block.

    Args:
        lists: the selection; it must hold the blocks that `geometry` forces and no token may visit more than
            ``geometry.selected_blocks``. None: every sequence is dense.
        plan: the tiles of the call.
        geometry: the block geometry of the selection.
        batch: rows of the batch.
        length_k: keys of a row.
        dense_len: sequences with fewer keys are dense.
        window: the site's sliding window in keys.
        programs: programs that go through the tiles, over all heads.
    """
    num_blocks = block_bound(plan, batch=batch, length_k=length_k, block_size=geometry.block_size)
    device = plan.sequences.device
    table = torch.empty(num_blocks, TABLE_WIDTH, dtype=torch.int32, device=device)
    wrap_triton(_block_table_kernel)[((num_blocks + _ROWS - 1) // _ROWS,)](
        table,
        plan.sequences,
        plan.sequences.shape[0],
        num_blocks,
        dense_len,
        0 if window is None else window,
        BLOCK_SIZE=geometry.block_size,
        INIT_BLOCKS=geometry.init_blocks,
        LOCAL_BLOCKS=geometry.local_blocks,
        QUERY_BLOCK=geometry.query_block,
        DENSE=lists is None,
        HAS_WINDOW=window is not None,
        ROWS=_ROWS,
    )
    if lists is None:
        return BlockQueries(table, None, None, None)

    tokens = plan.shape.tokens
    _, heads, capacity = lists.blocks.shape
    scored = torch.sym_min(capacity, max(1, geometry.selected_blocks - geometry.local_blocks - 1))
    bound = plan.num_tiles * tokens * scored
    queries = torch.empty(heads, bound, dtype=torch.int32, device=device)
    parts = torch.sym_min(max(1, programs // heads), plan.num_tiles)

    def launch(cursors: Tensor, *, fill: bool) -> None:
        wrap_triton(_invert_kernel)[(parts, heads)](
            cursors,
            queries,
            table,
            plan.panels,
            lists.blocks,
            lists.tokens,
            lists.counts,
            plan.num_tiles,
            (plan.num_tiles + parts - 1) // parts,
            num_blocks,
            capacity,
            bound,
            TILES=plan.shape.tiles,
            TOKENS=tokens,
            WIDTH=max(32, min(128, _LANES // tokens)),
            FILL=fill,
            num_warps=4,
            num_stages=1,
        )

    cursors = torch.zeros(heads, parts, num_blocks, dtype=torch.int32, device=device)
    launch(cursors, fill=False)
    # Kernels of our own add up: Inductor of torch 2.11 fails on cumulative sums along few, long rows.
    counts = cursors.sum(1, dtype=torch.int32)
    starts = torch.empty(heads, num_blocks, dtype=torch.int32, device=device)
    wrap_triton(_starts_kernel)[(heads,)](starts, counts, num_blocks, BLOCKS=_SCANNED_BLOCKS)
    wrap_triton(_cursors_kernel)[(heads, (num_blocks + _COLUMNS - 1) // _COLUMNS)](
        cursors, starts, parts, num_blocks, PARTS=_SCANNED_PARTS, BLOCKS=_COLUMNS
    )
    launch(cursors, fill=True)
    # A selection of more blocks than promised, from queries that are not numbers, must not lead reads astray.
    starts = starts.clamp(max=bound)
    return BlockQueries(table, starts, torch.minimum(counts, bound - starts), queries)
