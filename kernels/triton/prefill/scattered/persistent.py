"""Persistent kernel for scattered selections: attention to the scored blocks, block by block.

Where neighbouring queries select different blocks, tiles of `prefill.attention` would visit many blocks for few
tokens each. They then visit the forced blocks only, and this kernel does the rest key-stationary: a block's keys and
values stay in shared memory while the queries that selected it pass, 64 rows a step. A query's partial result over
one block is stored with its log-sum-exp in a slot that the query and the block's rank among the query's blocks
determine, and then merged with the others and with the tile's result in a fixed order: every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...attention_inputs import AttentionInputs
from ...configs import ScatteredConfig
from ...launch import multiprocessors, wrap_triton
from .partials import attend_pieces, merge_queries
from .schedule import (
    COMPUTED,
    LISTED,
    MERGED_ROWS,
    allocate_rings,
    await_lists,
    await_partials,
    chunk_buffers,
    chunk_sizes,
    count_items,
    draw_ticket,
    finish_item,
    index_chunk,
    offer_kernel,
    read_ticket,
    scattered_constants,
)


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
    counting, listing, merging, step, tickets = count_items(state, chunks, chunk_tiles, TOKENS, PADDED_GROUP)
    ticket = draw_ticket(state)
    while ticket < tickets:
        tl.debug_barrier()  # all threads have read the ticket from memory that the functions called next overwrite
        phase, item, chunk = read_ticket(ticket, step, counting, listing)
        if (chunk >= 0) & (chunk < chunks):
            head = chunk // ranges
            first = chunk % ranges * chunk_tiles
            last = tl.minimum(first + chunk_tiles, num_tiles)
            done, unit_counts, pieces, owners, cursors, work, entries, scored_counts, pool_slot = chunk_buffers(
                state, scratch, chunk, chunks, num_blocks, bound, SCORED, PIECE, SMALL_RING, POOL_RING
            )
            pool_slot *= GROUP
            if phase <= LISTED:
                index_chunk(
                    phase,
                    item,
                    chunk,
                    first,
                    last,
                    head,
                    done,
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
                    TOKENS,
                    TILES,
                    BLOCK_SIZE,
                    INIT_BLOCKS,
                    LOCAL_BLOCKS,
                    SCORED,
                    PIECE,
                    WIDTH,
                    SMALL_RING,
                )
            elif phase == COMPUTED:
                await_lists(done, chunk, listing, merging, POOL_RING)
                number = tl.load(pieces)
                begin = number * item // merging
                end = number * (item + 1) // merging
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
                await_partials(done, merging)
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
            finish_item(done, phase)
        ticket = draw_ticket(state)


def _partial_bytes(given: AttentionInputs) -> int:
    """Memory of one query's and head's partial result: its output and log-sum-exp."""
    return given.dims[1] * given.q.element_size() + 4


def offer_scattered(given: AttentionInputs) -> tuple[Tensor, ScatteredConfig] | None:
    """What `attend_scattered` needs for a call, None where it does not serve such calls: see `offer_kernel`."""
    return offer_kernel(given, _scattered_kernel, "scattered", _partial_bytes(given))


def attend_scattered(given: AttentionInputs, out: Tensor, lse: Tensor, state: Tensor, launch: ScatteredConfig) -> None:
    """Add the scored blocks of every query to `out` and `lse`, if `state` says so.

    Args:
        given: the call.
        out: ``[B, Lq, Hq, Dv]``: attention to the forced blocks; changed.
        lse: float32 ``[B, Hq, Lq]``: its log-sum-exp; changed.
        state: from `offer_scattered`, its first number decided; changed.
        launch: from `offer_scattered`.
    """
    q = given.q
    constants = scattered_constants(given.geometry, given.plan.shape.tokens, given.window is not None)
    sizes = chunk_sizes(given, launch, _partial_bytes(given))
    scratch, slots = allocate_rings(given, sizes)
    wrap_triton(_scattered_kernel)[(launch.programs * multiprocessors(q.device),)](
        q,
        given.k,
        given.v,
        out,
        lse,
        *given.tables,
        state,
        scratch,
        torch.empty(slots, given.dims[1], dtype=q.dtype, device=q.device),
        torch.empty(slots, dtype=torch.float32, device=q.device),
        *given.strides,
        *(out.stride(0), out.stride(2), out.stride(1), *lse.stride()[:2]),
        *given.mask_strides,
        *given.bias_strides,
        given.capacity,
        *sizes,
        given.bound,
        *given.unit,
        **given.constants(launch.rows),
        **constants,
        PADDED_SCORED=triton.next_power_of_2(constants["SCORED"]),
        **launch.options,
    )
