"""Partial gradients of q of the queries that selected a block, and their sum over a query's blocks, by rank."""

from __future__ import annotations

import triton
import triton.language as tl

from ..prefill.scattered.block_to_query import PIECE_WIDTH
from ..prefill.scattered.partials import load_piece
from ..prefill.scattered.schedule import MERGED_ROWS
from ..score_terms import cap_products, load_key_bias
from ..tile_ops import mask_scores, row_addresses, row_mask
from ..tile_tables import PANEL_BATCH, PANEL_QUERY, TABLE_COLUMNS


@triton.jit
def _row_places(
    row_head,  # [BM]
    batch,
    batch_stride,
    head_stride,
    token_stride,
    query_shift,
    slot,  # [BM]
    SCORED: tl.constexpr,
):
    """Where the queries of some entries begin in a tensor, ``[BM]``, in 64 bits."""
    query = (query_shift + slot // SCORED).to(tl.int64)
    return batch.to(tl.int64) * batch_stride + row_head * head_stride + query * token_stride


@triton.jit
def _load_rows(tensor, places, exists, DIM: tl.constexpr, SIZE: tl.constexpr):
    """One vector a row, ``[BM, SIZE]``, 0 where none exists."""
    rows = (tensor + places)[:, None] + tl.arange(0, SIZE)[None, :]
    return tl.load(rows, mask=row_mask(exists, DIM, SIZE), other=0.0)


@triton.jit
def compute_pieces(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    pool,
    key_mask,
    key_bias,
    work,
    entries,
    begin_piece,
    end_piece,
    head,
    first,  # token of the chunk
    last_entry,  # of the chunk's entries
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
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCORED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial gradients of the queries of some pieces over the pieces' blocks, whose keys all stand before them.

    A step's rows are fetched into registers a step ahead, across pieces, and its entries two steps ahead: pieces follow
    one another in the list of entries.
    """
    ENTRIES: tl.constexpr = BLOCK_M // PADDED_GROUP
    keys = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    row = tl.arange(0, BLOCK_M)
    group_head = row % PADDED_GROUP
    row_entry = row // PADDED_GROUP
    row_head = head.to(tl.int64) * GROUP + tl.minimum(group_head, GROUP - 1)
    k += head.to(tl.int64) * k_head_stride
    v += head.to(tl.int64) * v_head_stride
    key_bias += head.to(tl.int64) * bias_head_stride
    heads = group_head < GROUP
    batch, key, query_shift, key_shift, begin, end = load_piece(work + begin_piece * PIECE_WIDTH)
    slot = tl.load(entries + tl.minimum(begin + row_entry, last_entry))
    exists = (begin + row_entry < end) & heads & (slot >= 0)
    places = _row_places(
        row_head, batch, q_batch_stride, q_head_stride, q_token_stride, query_shift + first, slot, SCORED
    )
    queries = _load_rows(q, places, exists, HEAD_DIM, BLOCK_D)
    places = _row_places(
        row_head, batch, grad_batch_stride, grad_head_stride, grad_token_stride, query_shift + first, slot, SCORED
    )
    gradients = _load_rows(grad_out, places, exists, VALUE_DIM, BLOCK_DV)
    for piece in range(begin_piece, end_piece):
        at_batch = batch.to(tl.int64)
        at_key = key.to(tl.int64)
        k_at = k + at_batch * k_batch_stride + at_key * k_token_stride
        k_at += keys[:, None] * k_token_stride + dims[None, :]
        v_at = v + at_batch * v_batch_stride + at_key * v_token_stride
        v_at += keys[None, :] * v_token_stride + value_dims[:, None]
        k_tile = tl.load(k_at) if HEAD_DIM == BLOCK_D else tl.load(k_at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        v_mask = (value_dims < VALUE_DIM)[:, None]
        v_tile = tl.load(v_at) if VALUE_DIM == BLOCK_DV else tl.load(v_at, mask=v_mask, other=0.0)
        hidden = tl.zeros([BLOCK_SIZE], tl.int32)
        if HAS_KEY_MASK:
            at = key_mask + at_batch * key_mask_batch_stride + (at_key + keys) * key_mask_token_stride
            hidden = (tl.load(at) == 0).to(tl.int32)
        bias = tl.zeros([BLOCK_SIZE], tl.float32)
        if HAS_BIAS:
            at_bias = key_bias + at_batch * bias_batch_stride + (at_key + keys) * bias_token_stride
            bias = load_key_bias(at_bias, scale_log2, None)
        next_batch, next_key, next_query_shift, next_key_shift, next_begin, next_end = load_piece(
            work + tl.minimum(piece + 1, end_piece - 1) * PIECE_WIDTH
        )
        next_end = tl.where(piece + 1 < end_piece, next_end, next_begin)  # no rows to fetch after the last piece
        # Of this step and the next; what a row takes one number of is fetched in each layout that it is used in.
        slot = tl.load(entries + tl.minimum(begin + row_entry, last_entry))
        following = tl.load(entries + tl.minimum(tl.minimum(begin + ENTRIES, end) + row_entry, last_entry))
        exists = (begin + row_entry < end) & heads & (slot >= 0)
        scalars = _row_places(row_head, batch, lse_batch_stride, lse_head_stride, 1, query_shift + first, slot, SCORED)
        log_sum = tl.load(lse + scalars, mask=exists, other=float("inf"))
        row_delta = tl.load(delta + scalars, mask=exists, other=0.0)
        for start in range(begin, end, ENTRIES):
            slot = tl.load(entries + tl.minimum(start + row_entry, last_entry))
            ends = start + ENTRIES >= end  # with the piece
            next_start = tl.where(ends, next_begin, start + ENTRIES)
            stop = tl.where(ends, next_end, end)
            row_batch = tl.where(ends, next_batch, batch)
            row_shift = tl.where(ends, next_query_shift, query_shift) + first
            exists = (next_start + row_entry < stop) & heads & (following >= 0)
            places = _row_places(
                row_head, row_batch, q_batch_stride, q_head_stride, q_token_stride, row_shift, following, SCORED
            )
            next_queries = _load_rows(q, places, exists, HEAD_DIM, BLOCK_D)
            places = _row_places(
                row_head,
                row_batch,
                grad_batch_stride,
                grad_head_stride,
                grad_token_stride,
                row_shift,
                following,
                SCORED,
            )
            next_gradients = _load_rows(grad_out, places, exists, VALUE_DIM, BLOCK_DV)
            scalars = _row_places(
                row_head, row_batch, lse_batch_stride, lse_head_stride, 1, row_shift, following, SCORED
            )
            next_log_sum = tl.load(lse + scalars, mask=exists, other=float("inf"))
            next_delta = tl.load(delta + scalars, mask=exists, other=0.0)
            after = tl.minimum(next_start + ENTRIES, stop)
            following = tl.load(entries + tl.minimum(after + row_entry, last_entry))
            scores = tl.dot(queries, tl.trans(k_tile), input_precision=PRECISION)  # [BM, BN]
            if HAS_SOFTCAP:
                scores = cap_products(scores, cap_log2)
                slope = 1.0 - scores * scores
            if HAS_BIAS:
                scores += bias[None, :]
            if HAS_WINDOW or HAS_KEY_MASK:
                own = key_shift + first + slot // SCORED  # [BM]
                valid = (hidden == 0)[None, :]
                scores = mask_scores(scores, (at_key + keys)[None, :], own[:, None], window, valid, False, HAS_WINDOW)
            shift = tl.where(log_sum == float("-inf"), float("inf"), log_sum) * log2_e  # no key: every weight is 0
            weights = tl.exp2(scores * scale_log2 - shift[:, None])
            grad_weights = tl.dot(gradients, v_tile, input_precision=PRECISION)  # [BM, BN]
            grad_scores = weights * (grad_weights - row_delta[:, None])
            if HAS_SOFTCAP:
                grad_scores *= slope
            partial = tl.dot(grad_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION) * scale  # [BM, D]
            exists = (start + row_entry < end) & heads & (slot >= 0)
            place = (slot * GROUP + group_head) * HEAD_DIM
            tl.store(
                pool + place[:, None] + dims[None, :],
                partial.to(pool.dtype.element_ty),
                mask=row_mask(exists, HEAD_DIM, BLOCK_D),
            )
            queries, gradients, log_sum, row_delta = next_queries, next_gradients, next_log_sum, next_delta
        batch, key, query_shift, key_shift = next_batch, next_key, next_query_shift, next_key_shift
        begin, end = next_begin, next_end


@triton.jit(noinline=True)  # keeps its registers out of `compute_pieces`
def add_partials(
    grad_q,
    pool,
    scored_counts,
    panels,
    first,  # tile of the chunk
    item,
    head,
    grad_q_batch_stride,
    grad_q_head_stride,
    grad_q_token_stride,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORED: tl.constexpr,
):
    """Add some queries' partial gradients to what their tile wrote."""
    row = tl.arange(0, MERGED_ROWS)
    local = item * (MERGED_ROWS // PADDED_GROUP) + row // PADDED_GROUP  # [BM], token of the chunk
    group_head = row % PADDED_GROUP
    number = tl.load(scored_counts + local)
    number = tl.where(group_head < GROUP, number, 0)  # [BM]
    most = tl.max(number, 0)
    if most > 0:
        token = first * TOKENS + local  # of all tiles
        panel = panels + token // (TOKENS * TILES) * TABLE_COLUMNS
        batch = tl.load(panel + PANEL_BATCH).to(tl.int64)
        query = (tl.load(panel + PANEL_QUERY) + token % (TOKENS * TILES)).to(tl.int64)
        row_head = head.to(tl.int64) * GROUP + group_head
        mask = row_mask(number > 0, HEAD_DIM, BLOCK_D)
        grad_at = row_addresses(
            grad_q, batch, grad_q_batch_stride, row_head, grad_q_head_stride, query, grad_q_token_stride, BLOCK_D
        )
        acc = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        dims = tl.arange(0, BLOCK_D)
        place = (local * SCORED * GROUP + group_head) * HEAD_DIM  # [BM], of the first rank
        for step in tl.range(0, most, num_stages=7):  # asynchronous loads, six at a time
            part_at = pool + (place + step * (GROUP * HEAD_DIM))[:, None] + dims[None, :]
            partial = tl.load(part_at, mask=row_mask(step < number, HEAD_DIM, BLOCK_D), other=0.0)
            acc += partial.to(tl.float32)
        tl.store(grad_at, acc.to(grad_q.dtype.element_ty), mask=mask)
