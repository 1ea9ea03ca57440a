"""Persistent kernel for scattered selections: attention to the scored blocks, block by block.

Where neighbouring queries select different blocks, tiles of `prefill.attention` would visit many blocks for few
tokens each. They then visit the forced blocks only, and this kernel does the rest key-stationary: a block's keys and
values stay in shared memory while the queries that selected it pass, 64 rows a step. A query's partial result over
one block is stored with its log-sum-exp in a slot that the query and the block's rank among the query's blocks
determine, and then merged with the others and with the tile's result in a fixed order: every run gives the same bits.

The partial results of all queries would take gigabytes, so the work is cut into *chunks*, adjacent tiles of one
key/value head, which pass through five phases over a ring of buffers: count the queries of each block, place the
blocks, list the queries, attend, merge. Programs draw the items of all chunks and phases from one sequence of tickets
and wait only for items with earlier tickets, which a program holds already, so they cannot deadlock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....geometry import BlockGeometry
from ...attention_inputs import AttentionInputs
from ...backward.block_to_query import block_bound
from ...configs import ScatteredConfig, optional_config
from ...launch import multiprocessors, wrap_triton
from .block_to_query import PIECE_WIDTH, count_queries, list_queries, place_blocks
from .partials import MERGED_ROWS, attend_pieces, merge_queries

_SMALL_RING = 8
"""Chunks whose lists of queries exist at a time; a power of two above the number of steps that a chunk takes."""

_POOL_RING = 3
"""Chunks whose partial results exist at a time: one being attended to, one being merged, one between."""

_PIECE = 256
"""Most queries of one piece of a block."""

_STATE = tl.constexpr(2)  # numbers in `state` before the counters: whether to run, the next ticket
_COUNT_TILES = tl.constexpr(4)  # tiles of one item of counting
_LIST_TILES = tl.constexpr(2)
_PHASES = tl.constexpr(5)
_COUNTED = tl.constexpr(0)
_PLACED = tl.constexpr(1)
_LISTED = tl.constexpr(2)
_ATTENDED = tl.constexpr(3)
_MERGED = tl.constexpr(4)
_DELAY = tl.constexpr(5)  # steps between the counting of a chunk and its merging; less than _POOL_RING after attention
_PLACED_BLOCKS = tl.constexpr(1024)  # blocks placed at once


@triton.jit
def _await_items(counter, number):
    """Wait until so many items of a phase are done and their writes visible."""
    reached = tl.atomic_add(counter, 0, sem="acquire")
    while reached < number:
        reached = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()  # the number reaches all threads through memory that the functions called next overwrite


@triton.jit(
    do_not_specialize=[
        "lse_batch_stride",
        "lse_head_stride",
        "key_mask_batch_stride",
        "bias_batch_stride",
        "bias_head_stride",
        "capacity",
        "num_tiles",
        "num_blocks",
        "chunk_tiles",
        "ranges",
        "heads",
        "window",
    ]
)
def _scattered_kernel(
    q,
    k,
    v,
    out,  # [B, Hq, Lq, Dv], holds the attention to the forced blocks
    lse,
    panels,
    blocks,
    tokens,
    counts,
    key_mask,
    key_bias,
    state,  # int32: whether to run; next ticket; items done, chunk by chunk and phase by phase; queries of the blocks
    scratch,  # int32: a ring of lists
    pool,  # a ring of partial results [slots, GROUP, Dv]
    sums,  # float32: their log-sum-exp, base 2
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    v_batch_stride,
    v_head_stride,
    v_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    lse_batch_stride,
    lse_head_stride,
    key_mask_batch_stride,
    key_mask_token_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_token_stride,
    capacity,
    num_tiles,
    num_blocks,
    chunk_tiles,
    ranges,  # chunks of one head
    heads,
    window,
    scale_log2,
    cap_log2,
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
    SCORED: tl.constexpr,
    PADDED_SCORED: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    SMALL_RING: tl.constexpr,
    POOL_RING: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    K_TOKEN_STRIDE: tl.constexpr,
    V_TOKEN_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    cap_log2 = tl.cast(cap_log2, tl.float32)
    if K_TOKEN_STRIDE > 0:  # a number of the program: the addresses of a step's keys then take no registers
        k_token_stride = K_TOKEN_STRIDE
    if V_TOKEN_STRIDE > 0:
        v_token_stride = V_TOKEN_STRIDE
    chunks = ranges * heads
    bound = chunk_tiles * TOKENS * SCORED  # entries of a chunk
    most_pieces = num_blocks + bound // PIECE
    count_items = (chunk_tiles + _COUNT_TILES - 1) // _COUNT_TILES
    list_items = (chunk_tiles + _LIST_TILES - 1) // _LIST_TILES
    merge_items = chunk_tiles * (TOKENS * PADDED_GROUP // MERGED_ROWS)
    step_items = 1 + list_items + count_items + 2 * merge_items
    tickets = tl.load(state) * (chunks + _DELAY) * step_items
    done = state + _STATE
    ticket = tl.atomic_add(state + 1, 1)
    while ticket < tickets:
        tl.debug_barrier()  # as in _await_items: all threads have read the ticket
        item = ticket % step_items
        chunk = ticket // step_items
        # In the order of a step: place, list, count; then merge and attend, whose items alternate, as the one moves
        # bytes and the other multiplies.
        rest = item - (1 + list_items + count_items)
        busy = rest >= 0
        phase = tl.where(item <= list_items, tl.where(item == 0, _PLACED, _LISTED), _COUNTED)
        phase = tl.where(busy, tl.where(rest % 2 == 0, _MERGED, _ATTENDED), phase)
        item = tl.where(busy, rest // 2, tl.where(item <= list_items, item - 1, item - 1 - list_items))
        delay = tl.where(phase == _COUNTED, 0, tl.where(phase == _MERGED, _DELAY, phase))
        chunk -= delay
        if (chunk >= 0) & (chunk < chunks):
            head = chunk // ranges
            first = chunk % ranges * chunk_tiles
            last = tl.minimum(first + chunk_tiles, num_tiles)
            small = chunk % SMALL_RING
            unit_counts = done + chunks * _PHASES + small * num_blocks
            lists = scratch + small.to(tl.int64) * (
                1 + num_blocks * 2 + most_pieces * PIECE_WIDTH + bound + bound // SCORED
            )
            owners = lists + 1
            cursors = owners + num_blocks
            work = cursors + num_blocks
            entries = work + most_pieces * PIECE_WIDTH
            scored_counts = entries + bound
            pool_slot = (chunk % POOL_RING).to(tl.int64) * bound * GROUP
            mine = done + chunk * _PHASES
            if phase == _COUNTED:
                if chunk >= SMALL_RING:
                    _await_items(mine - SMALL_RING * _PHASES + _MERGED, merge_items)
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
                _await_items(mine + _COUNTED, count_items)
                place_blocks(
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
            elif phase == _ATTENDED:
                _await_items(mine + _LISTED, list_items)
                if chunk >= POOL_RING:
                    _await_items(mine - POOL_RING * _PHASES + _MERGED, merge_items)
                pieces = tl.load(lists)
                begin = pieces * item // merge_items
                end = pieces * (item + 1) // merge_items
                if begin < end:
                    attend_pieces(
                        q,
                        k,
                        v,
                        pool + pool_slot * VALUE_DIM,
                        sums + pool_slot,
                        key_mask,
                        key_bias,
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
                        bias_batch_stride,
                        bias_head_stride,
                        bias_token_stride,
                        window,
                        scale_log2,
                        cap_log2,
                        GROUP,
                        PADDED_GROUP,
                        BLOCK_M,
                        BLOCK_SIZE,
                        HEAD_DIM,
                        BLOCK_D,
                        VALUE_DIM,
                        BLOCK_DV,
                        SCORED,
                        HAS_WINDOW,
                        HAS_KEY_MASK,
                        HAS_BIAS,
                        HAS_SOFTCAP,
                        PRECISION,
                    )
            else:
                _await_items(mine + _ATTENDED, merge_items)
                if item * MERGED_ROWS < (last - first) * TOKENS * PADDED_GROUP:
                    merge_queries(
                        out,
                        lse,
                        pool + pool_slot * VALUE_DIM,
                        sums + pool_slot,
                        scored_counts,
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
                        SCORED,
                        PADDED_SCORED,
                    )
            tl.debug_barrier()  # all threads have written before one of them says so
            tl.atomic_add(mine + phase, 1, sem="release")
        ticket = tl.atomic_add(state + 1, 1)


def max_scored_blocks(geometry: BlockGeometry, has_window: bool) -> int:
    """Most scored blocks that a query visits; a window may drop the initial ones of the forced blocks."""
    forced = geometry.local_blocks + 1 + (0 if has_window else geometry.init_blocks)
    return max(0, geometry.selected_blocks - forced)


def offer_scattered(given: AttentionInputs) -> tuple[Tensor, ScatteredConfig] | None:
    """What `attend_scattered` needs for a call, where it serves such calls.

    Returns:
        None where the kernel does not serve the call; else its state, int32, all 0, whose first number is to become 1
        where the kernel is to run, and its configuration.
    """
    q, geometry, shape = given.q, given.geometry, given.plan.shape
    block_size = geometry.block_size
    launch = optional_config(ScatteredConfig, "scattered", q, given.padded)
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
    launch = launch.as_launched(_scattered_kernel)
    ranges = triton.cdiv(given.plan.num_tiles, _chunk_tiles(given, launch))
    size = _STATE.value + ranges * given.v.shape[1] * _PHASES.value + _SMALL_RING * _num_blocks(given)
    return torch.zeros(size, dtype=torch.int32, device=q.device), launch


def _num_blocks(given: AttentionInputs) -> int:
    batch, _, length_k = given.k.shape[:3]
    return block_bound(given.plan, batch=batch, length_k=length_k, block_size=given.geometry.block_size)


def _chunk_tiles(given: AttentionInputs, launch: ScatteredConfig) -> int:
    """Tiles of a chunk: as many as the memory for partial results holds."""
    shape, scored = given.plan.shape, max_scored_blocks(given.geometry, given.window is not None)
    row = shape.tokens * scored * shape.group * (given.dims[1] * given.q.element_size() + 4)
    tiles: int = torch.sym_min(max(1, launch.pool_bytes // (_POOL_RING * row)), given.plan.num_tiles)
    return tiles


def scattered_constants(geometry: BlockGeometry, tokens: int, has_window: bool) -> dict[str, int]:
    """What the kernel is compiled for beside `AttentionInputs.constants`, for tiles of so many tokens."""
    scored = max_scored_blocks(geometry, has_window)
    return {
        "INIT_BLOCKS": geometry.init_blocks,
        "LOCAL_BLOCKS": geometry.local_blocks,
        "SCORED": scored,
        "PADDED_SCORED": triton.next_power_of_2(scored),
        "PIECE": _PIECE,
        "WIDTH": max(32, min(128, 2048 // tokens)),
        "SMALL_RING": _SMALL_RING,
        "POOL_RING": _POOL_RING,
    }


def attend_scattered(given: AttentionInputs, out: Tensor, lse: Tensor, state: Tensor, launch: ScatteredConfig) -> None:
    """Add the scored blocks of every query to `out` and `lse`, if `state` says so.

    Args:
        given: the call.
        out: ``[B, Lq, Hq, Dv]``: attention to the forced blocks; changed.
        lse: float32 ``[B, Hq, Lq]``: its log-sum-exp; changed.
        state: from `offer_scattered`, its first number decided; changed.
        launch: from `offer_scattered`.
    """
    q, plan, geometry = given.q, given.plan, given.geometry
    tokens, has_window = plan.shape.tokens, given.window is not None
    scored = max_scored_blocks(geometry, has_window)
    chunk_tiles = _chunk_tiles(given, launch)
    num_blocks = _num_blocks(given)
    entries = chunk_tiles * tokens * scored
    slots = _POOL_RING * entries * plan.shape.group
    small = 1 + num_blocks * 2 + (num_blocks + entries // _PIECE) * PIECE_WIDTH.value + entries + chunk_tiles * tokens
    wrap_triton(_scattered_kernel)[(launch.programs * multiprocessors(q.device),)](
        q,
        given.k,
        given.v,
        out,
        lse,
        *given.tables,
        state,
        torch.empty(_SMALL_RING, small, dtype=torch.int32, device=q.device),
        torch.empty(slots, given.dims[1], dtype=q.dtype, device=q.device),
        torch.empty(slots, dtype=torch.float32, device=q.device),
        *given.strides,
        *(out.stride(0), out.stride(2), out.stride(1), *lse.stride()[:2]),
        *given.mask_strides,
        *given.bias_strides,
        given.capacity,
        plan.num_tiles,
        num_blocks,
        chunk_tiles,
        triton.cdiv(plan.num_tiles, chunk_tiles),
        given.k.shape[1],
        given.bound,
        *given.unit,
        **given.constants(launch.rows),
        **scattered_constants(geometry, tokens, has_window),
        **launch.options,
    )
