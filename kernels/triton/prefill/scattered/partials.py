"""Partial attention of the queries that selected a block, and the merge of a query's partial results by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from ...score_terms import cap_products, load_key_bias
from ...tile_ops import LN_2, LOWEST_SCORE, mask_scores, row_addresses, row_mask, softmax_weights
from ...tile_tables import PANEL_BATCH, PANEL_QUERY, TABLE_COLUMNS
from .block_to_query import (
    PIECE_BATCH,
    PIECE_BEGIN,
    PIECE_END,
    PIECE_KEY,
    PIECE_KEY_SHIFT,
    PIECE_QUERY_SHIFT,
    PIECE_WIDTH,
)
from .schedule import MERGED_ROWS


@triton.jit
def load_piece(row):
    """A piece's numbers, one after the other."""
    return (
        tl.load(row + PIECE_BATCH),
        tl.load(row + PIECE_KEY),
        tl.load(row + PIECE_QUERY_SHIFT),
        tl.load(row + PIECE_KEY_SHIFT),
        tl.load(row + PIECE_BEGIN),
        tl.load(row + PIECE_END),
    )


@triton.jit
def attend_pieces(
    q,
    k,
    v,
    pool,
    sums,
    key_mask,
    key_bias,
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
    """Attention of the queries of some pieces to the pieces' blocks, whose keys all stand before them."""
    ENTRIES: tl.constexpr = BLOCK_M // PADDED_GROUP
    SOME_HIDDEN: tl.constexpr = HAS_WINDOW or HAS_KEY_MASK or HAS_BIAS  # a bias may be -inf
    keys = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    row = tl.arange(0, BLOCK_M)
    group_head = row % PADDED_GROUP
    row_head = head.to(tl.int64) * GROUP + tl.minimum(group_head, GROUP - 1)
    k += head.to(tl.int64) * k_head_stride
    v += head.to(tl.int64) * v_head_stride
    key_bias += head.to(tl.int64) * bias_head_stride
    next_batch, next_key, next_query_shift, next_key_shift, next_begin, next_end = load_piece(
        work + begin_piece * PIECE_WIDTH
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
        bias = tl.zeros([BLOCK_SIZE], tl.float32)
        if HAS_BIAS:
            at_bias = key_bias + batch * bias_batch_stride + (key + keys) * bias_token_stride
            bias = load_key_bias(at_bias, scale_log2, None)
        next_batch, next_key, next_query_shift, next_key_shift, next_begin, next_end = load_piece(
            work + tl.minimum(piece + 1, end_piece - 1) * PIECE_WIDTH
        )
        for _ in range(steps):
            slot = following
            following = tl.load(entries + tl.minimum(entry + ENTRIES, end - 1))  # a step ahead
            exists = (entry < end) & (group_head < GROUP) & (slot >= 0)
            slot = tl.maximum(slot, 0)
            token = slot // SCORED
            query = (query_shift + token).to(tl.int64)
            q_at = row_addresses(q, batch, q_batch_stride, row_head, q_head_stride, query, q_token_stride, BLOCK_D)
            q_mask = (dims < HEAD_DIM)[None, :]
            queries = tl.load(q_at) if HEAD_DIM == BLOCK_D else tl.load(q_at, mask=q_mask, other=0.0)
            scores = tl.dot(queries, k_tile, input_precision=PRECISION)  # [BM, BN]
            if HAS_SOFTCAP:
                scores = cap_products(scores, cap_log2)
            if HAS_BIAS:
                scores += bias[None, :]
            if HAS_WINDOW or HAS_KEY_MASK:
                own = key_shift + token  # [BM]
                valid = (hidden == 0)[None, :]
                scores = mask_scores(scores, (key + keys)[None, :], own[:, None], window, valid, False, HAS_WINDOW)
            lowest: tl.constexpr = LOWEST_SCORE if SOME_HIDDEN else None
            weights, highest = softmax_weights(scores, scale_log2, lowest, 1)  # [BM, BN], [BM]
            total = tl.sum(weights, 1)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)  # [BM, Dv]
            divisor = total
            if SOME_HIDDEN:
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


@triton.jit(noinline=True)  # keeps its registers out of `attend_pieces`
def merge_queries(
    out,
    lse,
    pool,
    sums,
    scored_counts,
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
    SCORED: tl.constexpr,
    PADDED_SCORED: tl.constexpr,
):
    """Merge some queries' partial results into what their tile wrote."""
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
        exists = number > 0
        lse_at = lse + batch * lse_batch_stride + row_head * lse_head_stride + query
        near = tl.load(lse_at, mask=exists, other=float("-inf")) * (1.0 / LN_2)
        place = local * SCORED * GROUP + group_head  # [BM], of the first rank
        rank = tl.arange(0, PADDED_SCORED)
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
