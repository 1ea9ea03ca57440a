"""Schedule of the persistent kernels of scattered selections: chunks, phases, tickets and rings of buffers.

The partial results of all queries would take gigabytes, so the work is cut into *chunks*, adjacent tiles of one
key/value head, which pass through five phases over a ring of buffers: count the queries of each block, place the
blocks, list the queries, compute partial results, merge them. Programs draw the items of all chunks and phases from one
sequence of tickets and wait only for items with earlier tickets, which a program holds already, so they cannot
deadlock.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....geometry import BlockGeometry
from ...attention_inputs import AttentionInputs
from ...backward.block_to_query import block_bound
from ...configs import ScatteredConfig, optional_config
from .block_to_query import PIECE_WIDTH, count_queries, list_queries, place_blocks

MERGED_ROWS = tl.constexpr(32)
"""Queries x heads of one item of merging."""

_SMALL_RING = 8
"""Chunks whose lists of queries exist at a time; a power of two above the number of steps that a chunk takes."""

_POOL_RING = 3
"""Chunks whose partial results exist at a time: one being computed, one being merged, one between."""

_PIECE = 256
"""Most queries of one piece of a block."""

_STATE = tl.constexpr(2)  # numbers in `state` before the counters: whether to run, the next ticket
_COUNT_TILES = tl.constexpr(4)  # tiles of one item of counting
_LIST_TILES = tl.constexpr(2)
_PHASES = tl.constexpr(5)
_COUNTED = tl.constexpr(0)
_PLACED = tl.constexpr(1)
LISTED = tl.constexpr(2)  # the last phase of `index_chunk`
COMPUTED = tl.constexpr(3)
_MERGED = tl.constexpr(4)
_DELAY = tl.constexpr(5)  # steps between the counting of a chunk and its merging; less than _POOL_RING after COMPUTED
_PLACED_BLOCKS = tl.constexpr(1024)  # blocks placed at once


@triton.jit
def _await_items(counter, number):
    """Wait until so many items of a phase are done and their writes visible."""
    reached = tl.atomic_add(counter, 0, sem="acquire")
    while reached < number:
        reached = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()  # the number reaches all threads through memory that the functions called next overwrite


@triton.jit
def count_items(state, chunks, chunk_tiles, TOKENS: tl.constexpr, PADDED_GROUP: tl.constexpr):
    """Items of counting, listing and merging of a chunk, of one step, and tickets: none where not to run."""
    counting = (chunk_tiles + _COUNT_TILES - 1) // _COUNT_TILES
    listing = (chunk_tiles + _LIST_TILES - 1) // _LIST_TILES
    merging = chunk_tiles * (TOKENS * PADDED_GROUP // MERGED_ROWS)
    step = 1 + listing + counting + 2 * merging
    return counting, listing, merging, step, tl.load(state) * (chunks + _DELAY) * step


@triton.jit
def draw_ticket(state):
    """The next ticket."""
    return tl.atomic_add(state + 1, 1)


@triton.jit
def read_ticket(ticket, step_items, counting, listing):
    """Phase, item and chunk of a ticket; the chunk may be one that does not exist."""
    item = ticket % step_items
    # In the order of a step: place, list, count; then merge and compute, whose items alternate, as the one moves bytes
    # and the other multiplies.
    rest = item - (1 + listing + counting)
    busy = rest >= 0
    phase = tl.where(item <= listing, tl.where(item == 0, _PLACED, LISTED), _COUNTED)
    phase = tl.where(busy, tl.where(rest % 2 == 0, _MERGED, COMPUTED), phase)
    item = tl.where(busy, rest // 2, tl.where(item <= listing, item - 1, item - 1 - listing))
    delay = tl.where(phase == _COUNTED, 0, tl.where(phase == _MERGED, _DELAY, phase))
    return phase, item, ticket // step_items - delay


@triton.jit
def chunk_buffers(
    state,
    scratch,
    chunk,
    chunks,
    num_blocks,
    bound,
    SCORED: tl.constexpr,
    PIECE: tl.constexpr,
    SMALL_RING: tl.constexpr,
    POOL_RING: tl.constexpr,
):
    """A chunk's counters of items done, counts of blocks, and lists; and the number of its first partial result.

    The lists are: how many pieces, a panel of each block, where each block's next entry goes, pieces, entries, and how
    many blocks each token scored.
    """
    most_pieces = num_blocks + bound // PIECE
    small = chunk % SMALL_RING
    done = state + _STATE
    pieces = scratch + small.to(tl.int64) * (1 + num_blocks * 2 + most_pieces * PIECE_WIDTH + bound + bound // SCORED)
    owners = pieces + 1
    cursors = owners + num_blocks
    work = cursors + num_blocks
    entries = work + most_pieces * PIECE_WIDTH
    return (
        done + chunk * _PHASES,
        done + chunks * _PHASES + small * num_blocks,
        pieces,
        owners,
        cursors,
        work,
        entries,
        entries + bound,
        (chunk % POOL_RING).to(tl.int64) * bound,
    )


@triton.jit
def index_chunk(
    phase,
    item,
    chunk,
    first,  # tile of the chunk
    last,
    head,
    done,  # counters of the chunk, as what follows
    unit_counts,
    pieces,
    owners,
    cursors,
    work,
    entries,
    scored_counts,
    panels,
    blocks,
    tokens,
    counts,
    capacity,
    heads,
    num_blocks,
    bound,
    counting,
    merging,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SCORED: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    SMALL_RING: tl.constexpr,
):
    """An item of the phases up to LISTED."""
    if phase == _COUNTED:
        if chunk >= SMALL_RING:
            _await_items(done - SMALL_RING * _PHASES + _MERGED, merging)
        begin = first + item * _COUNT_TILES
        count_queries(
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
        _await_items(done + _COUNTED, counting)
        place_blocks(
            unit_counts,
            owners,
            cursors,
            work,
            pieces,
            panels,
            num_blocks,
            bound,
            TOKENS * TILES,
            BLOCK_SIZE,
            PIECE,
            _PLACED_BLOCKS,
        )
    else:
        _await_items(done + _PLACED, 1)
        begin = first + item * _LIST_TILES
        list_queries(
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
            first,
            begin,
            tl.minimum(begin + _LIST_TILES, last),
            bound,
            TOKENS,
            TILES,
            BLOCK_SIZE,
            INIT_BLOCKS,
            LOCAL_BLOCKS,
            SCORED,
            WIDTH,
        )


@triton.jit
def await_lists(done, chunk, listing, merging, POOL_RING: tl.constexpr):
    """Wait until a chunk's queries are listed and its part of the pool is free."""
    _await_items(done + LISTED, listing)
    if chunk >= POOL_RING:
        _await_items(done - POOL_RING * _PHASES + _MERGED, merging)


@triton.jit
def await_partials(done, merging):
    """Wait until a chunk's partial results are computed."""
    _await_items(done + COMPUTED, merging)


@triton.jit
def finish_item(done, phase):
    """Say that an item of a phase is done."""
    tl.debug_barrier()  # all threads have written before one of them says so
    tl.atomic_add(done + phase, 1, sem="release")


def max_scored_blocks(geometry: BlockGeometry, has_window: bool) -> int:
    """Most scored blocks that a query visits; a window may drop the initial ones of the forced blocks."""
    forced = geometry.local_blocks + 1 + (0 if has_window else geometry.init_blocks)
    return max(0, geometry.selected_blocks - forced)


def offer_kernel(
    given: AttentionInputs, kernel: Any, name: str, partial_bytes: int
) -> tuple[Tensor, ScatteredConfig] | None:
    """What a persistent kernel of scattered selections needs for a call, where it serves such calls.

    Args:
        given: the call.
        kernel: the kernel.
        name: what the tuning tables call it.
        partial_bytes: memory of one query's and head's partial result.

    Returns:
        None where the kernel does not serve the call; else its state, int32, all 0, whose first number is to become 1
        where the kernel is to run, and its configuration.
    """
    q, geometry, shape = given.q, given.geometry, given.plan.shape
    block_size = geometry.block_size
    launch = optional_config(ScatteredConfig, name, q, given.padded)
    # Tiles of few tokens gain little; tokens of a tile must share their own block, so that they share what is forced;
    # and a block's keys and values stay in shared memory, each in one piece.
    if (
        launch is None
        or given.lists is None
        or max_scored_blocks(geometry, given.window is not None) == 0
        or geometry.query_block > 1
        or shape.padded_group > 8
        or block_size % shape.tokens
        or block_size & -block_size != block_size
        or block_size * given.padded * q.element_size() > launch.block_bytes
    ):
        return None
    launch = launch.as_launched(kernel)
    ranges = triton.cdiv(given.plan.num_tiles, _chunk_tiles(given, launch, partial_bytes))
    size = _STATE.value + ranges * given.v.shape[1] * _PHASES.value + _SMALL_RING * _num_blocks(given)
    return torch.zeros(size, dtype=torch.int32, device=q.device), launch


def _num_blocks(given: AttentionInputs) -> int:
    batch, _, length_k = given.k.shape[:3]
    return block_bound(given.plan, batch=batch, length_k=length_k, block_size=given.geometry.block_size)


def _chunk_tiles(given: AttentionInputs, launch: ScatteredConfig, partial_bytes: int) -> int:
    """Tiles of a chunk: as many as the memory for partial results holds."""
    shape, scored = given.plan.shape, max_scored_blocks(given.geometry, given.window is not None)
    row = shape.tokens * scored * shape.group * partial_bytes
    tiles: int = torch.sym_min(max(1, launch.pool_bytes // (_POOL_RING * row)), given.plan.num_tiles)
    return tiles


def scattered_constants(geometry: BlockGeometry, tokens: int, has_window: bool) -> dict[str, int]:
    """What a kernel is compiled for beside `AttentionInputs.constants`, for tiles of so many tokens."""
    return {
        "INIT_BLOCKS": geometry.init_blocks,
        "LOCAL_BLOCKS": geometry.local_blocks,
        "SCORED": max_scored_blocks(geometry, has_window),
        "PIECE": _PIECE,
        "WIDTH": max(32, min(128, 2048 // tokens)),
        "SMALL_RING": _SMALL_RING,
        "POOL_RING": _POOL_RING,
    }


def chunk_sizes(given: AttentionInputs, launch: ScatteredConfig, partial_bytes: int) -> tuple[int, ...]:
    """Arguments ``num_tiles``, ``num_blocks``, ``chunk_tiles``, ``ranges`` and ``heads`` of a kernel."""
    tiles, chunk_tiles = given.plan.num_tiles, _chunk_tiles(given, launch, partial_bytes)
    return tiles, _num_blocks(given), chunk_tiles, triton.cdiv(tiles, chunk_tiles), given.k.shape[1]


def allocate_rings(given: AttentionInputs, sizes: tuple[int, ...]) -> tuple[Tensor, int]:
    """Memory for the lists of a ring of chunks, and the number of partial results in the pool.

    Args:
        given: the call.
        sizes: from `chunk_sizes`.
    """
    shape = given.plan.shape
    scored = max_scored_blocks(given.geometry, given.window is not None)
    _, num_blocks, chunk_tiles, *_ = sizes
    tokens = chunk_tiles * shape.tokens
    entries = tokens * scored
    small = 1 + num_blocks * 2 + (num_blocks + entries // _PIECE) * PIECE_WIDTH.value + entries + tokens
    scratch = torch.empty(_SMALL_RING, small, dtype=torch.int32, device=given.q.device)
    return scratch, _POOL_RING * entries * shape.group
