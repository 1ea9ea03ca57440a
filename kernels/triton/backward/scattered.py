"""Gradient of q for scattered selections: what the scored blocks add, block by block.

The counterpart of `prefill.scattered`, on the same schedule: while a block's keys and values stay in shared memory, the
queries that selected it pass with the gradients of their outputs, 64 rows a step. The weights follow from the forward's
log-sum-exp, so that a query's partial gradients over its blocks are only to be added: each is stored, in q's dtype, in
the slot that the query and the block's rank among its blocks determine, and added to what the query's tile gave for the
forced blocks, in the order of ranks: every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..configs import ScatteredConfig
from ..launch import multiprocessors, wrap_triton
from ..prefill.scattered.schedule import (
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
from ..tile_ops import LOG2_E
from .partial_gradients import add_partials, compute_pieces


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
def _scattered_gradient_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,  # strides of lse
    grad_q,  # holds the gradient from the forced blocks
    panels,
    blocks,
    tokens,
    counts,
    key_mask,
    key_bias,
    state,  # int32: whether to run; next ticket; items done, chunk by chunk and phase by phase; queries of the blocks
    scratch,  # int32: a ring of lists
    pool,  # a ring of partial gradients [slots, GROUP, D]
    grad_batch_stride,
    grad_head_stride,
    grad_token_stride,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    v_batch_stride,
    v_head_stride,
    v_token_stride,
    grad_q_batch_stride,
    grad_q_head_stride,
    grad_q_token_stride,
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
    scale,
    scale_log2,
    cap_log2,
    log2_e,
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
    scale = tl.cast(scale, tl.float32)  # Inductor passes numbers as float64
    scale_log2 = tl.cast(scale_log2, tl.float32)
    cap_log2 = tl.cast(cap_log2, tl.float32)
    log2_e = tl.cast(log2_e, tl.float32)
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
            pool_slot *= GROUP * HEAD_DIM
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
                    compute_pieces(
                        grad_out,
                        q,
                        k,
                        v,
                        lse,
                        delta,
                        pool + pool_slot,
                        key_mask,
                        key_bias,
                        work,
                        entries,
                        begin,
                        end,
                        head,
                        first * TOKENS,
                        bound - 1,
                        grad_batch_stride,
                        grad_head_stride,
                        grad_token_stride,
                        q_batch_stride,
                        q_head_stride,
                        q_token_stride,
                        k_batch_stride,
                        k_head_stride,
                        k_token_stride,
                        v_batch_stride,
                        v_head_stride,
                        v_token_stride,
                        lse_batch_stride,
                        lse_head_stride,
                        key_mask_batch_stride,
                        key_mask_token_stride,
                        bias_batch_stride,
                        bias_head_stride,
                        bias_token_stride,
                        window,
                        scale,
                        scale_log2,
                        cap_log2,
                        log2_e,
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
                    add_partials(
                        grad_q,
                        pool + pool_slot,
                        scored_counts,
                        panels,
                        first,
                        item,
                        head,
                        grad_q_batch_stride,
                        grad_q_head_stride,
                        grad_q_token_stride,
                        GROUP,
                        PADDED_GROUP,
                        TOKENS,
                        TILES,
                        HEAD_DIM,
                        BLOCK_D,
                        SCORED,
                    )
            finish_item(done, phase)
        ticket = draw_ticket(state)


def _partial_bytes(given: AttentionInputs) -> int:
    """Memory of one query's and head's partial gradient."""
    return given.dims[0] * given.q.element_size()


def offer_scattered_gradient(given: AttentionInputs) -> tuple[Tensor, ScatteredConfig] | None:
    """What `add_scattered_gradient` needs for a call, None where it does not serve such calls: see `offer_kernel`."""
    return offer_kernel(given, _scattered_gradient_kernel, "scattered_gradient", _partial_bytes(given))


def add_scattered_gradient(
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    given: AttentionInputs,
    grad_q: Tensor,
    state: Tensor,
    launch: ScatteredConfig,
) -> None:
    """Add what the scored blocks of every query give to the gradient of q, if `state` says so.

    Args:
        grad_out: gradient of the output, ``[B, Hq, Lq, Dv]``, any strides with the last one 1.
        lse: float32 ``[B, Hq, Lq]``, contiguous, from `attention_forward`.
        delta: float32 ``[B, Hq, Lq]``, contiguous, from `output_delta`.
        given: the call, as the forward had it.
        grad_q: ``[B, Hq, Lq, D]``: the gradient from the forced blocks; changed.
        state: from `offer_scattered_gradient`, its first number decided; changed.
        launch: from it, too.
    """
    q, sizes = given.q, chunk_sizes(given, launch, _partial_bytes(given))
    scratch, slots = allocate_rings(given, sizes)
    wrap_triton(_scattered_gradient_kernel)[(launch.programs * multiprocessors(q.device),)](
        grad_out,
        q,
        given.k,
        given.v,
        lse,
        delta,
        grad_q,
        *given.tables,
        state,
        scratch,
        torch.empty(slots, given.dims[0], dtype=q.dtype, device=q.device),
        *grad_out.stride()[:3],
        *given.strides,
        *grad_q.stride()[:3],
        *lse.stride()[:2],
        *given.mask_strides,
        *given.bias_strides,
        given.capacity,
        *sizes,
        given.bound,
        given.scale,
        *given.unit,
        LOG2_E,
        **given.constants(launch.rows),
        **scattered_constants(given.geometry, given.plan.shape.tokens, given.window is not None),
        **launch.options,
    )
