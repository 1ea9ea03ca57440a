"""Forward kernel of block-sparse attention: one program a tile, over the union of its tokens' blocks.

A tile is the queries of a few adjacent tokens for the heads of one key/value head. Its blocks are visited in
ascending order; rows whose token did not select a block are masked as a whole, and only blocks at an edge (the tile's
own tokens, a sliding window) are masked by element. Where the device finds that tokens of a tile share few blocks,
tiles visit the forced blocks only, and `prefill.scattered` adds the scored ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..configs import LaunchConfig, config_for
from ..launch import wrap_triton
from ..score_terms import add_sink, score_products
from ..tile_ops import (
    LN_2,
    LOWEST_SCORE,
    in_registers,
    load_attention_tile,
    load_keys,
    load_visit,
    mask_step,
    online_softmax,
    reload_rows,
    row_addresses,
    row_mask,
    softmax_weights,
    start_visits,
)
from ..tile_tables import padded_dim
from .choose import choose_variant
from .scattered.persistent import attend_scattered, offer_scattered


@triton.jit
def _score_keys(
    queries,  # [BM, D], or the first half of the elements if SPLIT
    queries_rest,  # [BM, D / 2], the others
    k_rows,  # [D, BN] addresses, of the first half of the elements if SPLIT
    numbers,  # [1, BN]
    dims,  # [D, 1], of the first half of the elements if SPLIT
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of queries and keys, ``[BM, BN]``."""
    if SPLIT:
        rest = load_keys(
            k_rows + BLOCK_D // 2, numbers, dims + BLOCK_D // 2, count, HEAD_DIM, HEAD_DIM == BLOCK_D, SHORT
        )
        scores = tl.dot(queries_rest, rest, input_precision=PRECISION)
        k_step = load_keys(k_rows, numbers, dims, count, HEAD_DIM, HEAD_DIM == BLOCK_D, SHORT)
        scores = tl.dot(queries, k_step, scores, input_precision=PRECISION)
    else:
        k_step = load_keys(k_rows, numbers, dims, count, HEAD_DIM, HEAD_DIM == BLOCK_D, SHORT)
        scores = tl.dot(queries, k_step, input_precision=PRECISION)
    return scores


@triton.jit
def _store_tile(
    out,
    lse,
    panels,
    tile,
    row_head,  # [BM]
    token,  # [BM]
    present,  # [BM] whether the row has a head
    FEWEST: tl.constexpr,
    highest,  # [BM]
    total,  # [BM]
    acc,  # [BM, Dv]
    sinks,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    lse_batch_stride,
    lse_head_stride,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Normalise and store a tile's output and log-sum-exp."""
    batch, query, exists = reload_rows(panels, tile, token, FEWEST, TOKENS, TILES)
    exists = exists & present
    if HAS_SINKS:
        highest, total, decay = add_sink(tl.load(sinks + row_head, mask=present, other=0.0), highest, total)
        acc = acc * decay[:, None]
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    out_rows = row_addresses(
        out, batch, out_batch_stride, row_head, out_head_stride, query, out_token_stride, acc.shape[1]
    )
    tl.store(out_rows, acc, mask=row_mask(exists, VALUE_DIM, acc.shape[1]))
    log_total = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * LN_2)
    tl.store(lse + batch * lse_batch_stride + row_head * lse_head_stride + query, log_total, mask=exists)


@triton.jit(
    do_not_specialize=[
        "lse_batch_stride",
        "lse_head_stride",
        "key_mask_batch_stride",
        "bias_batch_stride",
        "bias_head_stride",
        "capacity",
        "dense_len",
        "window",
    ]
)
def _attention_forward_kernel(
    q,  # [B, Hq, Lq, D]
    k,  # [B, Hkv, Lk, D]
    v,  # [B, Hkv, Lk, Dv]
    out,  # [B, Hq, Lq, Dv]
    lse,  # float32 [B, Hq, Lq]
    panels,
    blocks,
    tokens,
    counts,
    key_mask,  # bool [B, Lk], HAS_KEY_MASK only
    key_bias,  # [B, Hkv, Lk], HAS_BIAS only
    sinks,  # [Hq], HAS_SINKS only
    is_scattered,  # int32 [1], SCATTERED_OFFERED only: whether tiles visit their forced blocks alone
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
    dense_len,
    window,
    scale_log2,  # base-2 logarithm that a score of 1 stands for
    cap_log2,  # of `cap_products`, HAS_SOFTCAP only
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    SCATTERED_OFFERED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
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
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    parts: tl.constexpr = TOKENS * PADDED_GROUP // BLOCK_M  # programs of one tile
    head = tl.program_id(1) // parts
    batch, query, begin, end, position, key_begin, length = load_attention_tile(panels, tile, TOKENS, TILES)
    dense = length < dense_len
    row = tile.to(tl.int64) * (tl.num_programs(1) // parts) + head
    visits, by_rule, initial, first, later = start_visits(
        counts,
        is_scattered,
        row,
        position,
        begin,
        end,
        dense,
        window,
        BLOCK_SIZE,
        INIT_BLOCKS,
        LOCAL_BLOCKS,
        HAS_LISTS,
        SCATTERED_OFFERED,
    )
    blocks += row * capacity
    tokens += row * capacity

    rows = tl.program_id(1) % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // PADDED_GROUP  # [BM]
    group_head = rows % PADDED_GROUP
    positions = position + token
    exists = (token >= begin) & (token < end) & (group_head < GROUP)
    row_head = head.to(tl.int64) * GROUP + group_head
    row_query = query.to(tl.int64) + token
    dims = tl.arange(0, BLOCK_D // 2 if SPLIT else BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)[None, :]
    keys = tl.arange(0, BLOCK_N)

    q_rows = row_addresses(q, batch, q_batch_stride, row_head, q_head_stride, row_query, q_token_stride, dims.shape[0])
    there = exists[:, None]
    full: tl.constexpr = HEAD_DIM == BLOCK_D
    queries = tl.load(q_rows, mask=there if full else there & (dims < HEAD_DIM)[None, :], other=0.0)  # [BM, D]
    queries_rest = queries
    if SPLIT:
        there = there if full else there & (dims + BLOCK_D // 2 < HEAD_DIM)[None, :]
        queries_rest = in_registers(tl.load(q_rows + BLOCK_D // 2, mask=there, other=0.0), PRECISION)
    dims = dims[:, None]
    k += batch * k_batch_stride + head.to(tl.int64) * k_head_stride
    v += batch * v_batch_stride + head.to(tl.int64) * v_head_stride
    k_offsets = keys[None, :] * k_token_stride + dims  # [D, BN]
    v_offsets = keys[:, None] * v_token_stride + value_dims  # [BN, Dv]
    key_mask += batch * key_mask_batch_stride
    key_bias += batch * bias_batch_stride + head.to(tl.int64) * bias_head_stride

    if length < BLOCK_N:
        # A sequence shorter than a step has one block, which all its queries visit.
        key = key_begin.to(tl.int64)
        scores = _score_keys(
            queries,
            queries_rest,
            k + key * k_token_stride + k_offsets,
            keys[None, :],
            dims,
            length,
            HEAD_DIM,
            BLOCK_D,
            SPLIT,
            True,
            PRECISION,
        )
        own = key + tl.minimum(keys, length - 1)  # [BN]
        scores = score_products(scores, key_bias + own * bias_token_stride, scale_log2, cap_log2, HAS_BIAS, HAS_SOFTCAP)
        scores = mask_step(
            scores,
            keys,
            0,
            position,
            positions,
            position + end - 1,
            window,
            key_mask + own * key_mask_token_stride,
            HAS_WINDOW,
            HAS_KEY_MASK,
        )
        weights, top = softmax_weights(scores, scale_log2, LOWEST_SCORE, 1)  # [BM, BN], [BM]
        v_rows = v + key * v_token_stride + v_offsets
        v_step = load_keys(v_rows, keys[:, None], value_dims, length, VALUE_DIM, VALUE_DIM == BLOCK_DV, True)
        _store_tile(
            out,
            lse,
            panels,
            tile,
            row_head,
            token,
            group_head < GROUP,
            0,
            top,
            tl.sum(weights, 1),
            tl.dot(weights.to(v_step.dtype), v_step, input_precision=PRECISION),
            sinks,
            out_batch_stride,
            out_head_stride,
            out_token_stride,
            lse_batch_stride,
            lse_head_stride,
            TOKENS,
            TILES,
            VALUE_DIM,
            HAS_SINKS,
        )
        visits = 0

    last_start = length - BLOCK_N  # steps at a sequence's end move back until they end with it
    highest = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for step in range(visits * (BLOCK_SIZE // BLOCK_N)):
        entry = step // (BLOCK_SIZE // BLOCK_N)
        start_block = first
        if SCATTERED_OFFERED:
            start_block = tl.where(entry < initial, first, later)
        block, bits = load_visit(blocks, tokens, entry, start_block, by_rule, HAS_LISTS)
        start = block * BLOCK_SIZE + step % (BLOCK_SIZE // BLOCK_N) * BLOCK_N
        moved = tl.minimum(start, last_start)
        key = (key_begin + moved).to(tl.int64)
        scores = _score_keys(
            queries,
            queries_rest,
            k + key * k_token_stride + k_offsets,
            keys[None, :],
            dims,
            length,
            HEAD_DIM,
            BLOCK_D,
            SPLIT,
            False,
            PRECISION,
        )
        scores = score_products(
            scores, key_bias + (key + keys) * bias_token_stride, scale_log2, cap_log2, HAS_BIAS, HAS_SOFTCAP
        )
        scores = mask_step(
            scores,
            moved + keys,
            start,
            position,
            positions,
            position + end - 1,
            window,
            key_mask + (key + keys) * key_mask_token_stride,
            HAS_WINDOW,
            HAS_KEY_MASK,
        )
        visiting = True
        if HAS_LISTS and TOKENS > 1:
            visiting = (bits >> token) & 1 != 0  # [BM]
        weights, highest, total, decay = online_softmax(
            scores, scale_log2, highest, total, visiting, HAS_LISTS and TOKENS > 1, 1
        )
        acc = acc * decay[:, None]
        v_rows = v + key * v_token_stride + v_offsets
        v_step = load_keys(v_rows, keys[:, None], value_dims, length, VALUE_DIM, VALUE_DIM == BLOCK_DV, False)
        acc = tl.dot(weights.to(v_step.dtype), v_step, acc, input_precision=PRECISION)

    _store_tile(
        out,
        lse,
        panels,
        tile,
        row_head,
        token,
        group_head < GROUP,
        BLOCK_N,
        highest,
        total,
        acc,
        sinks,
        out_batch_stride,
        out_head_stride,
        out_token_stride,
        lse_batch_stride,
        lse_head_stride,
        TOKENS,
        TILES,
        VALUE_DIM,
        HAS_SINKS,
    )


def attention_forward(given: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over the keys of its blocks.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype, which lies in memory as ``[B, Lq, Hq, Dv]``, and the log-sum-exp, float32
        ``[B, Hq, Lq]``, which counts the sink in. A query without a visible key gives 0, and -inf or its sink.
    """
    q, geometry = given.q, given.geometry
    batch, heads_q, length_q = q.shape[:3]
    dim, value_dim = given.dims
    out_shape, lse_shape = (batch, length_q, heads_q, value_dim), (batch, heads_q, length_q)
    if given.every_query:
        out = q.new_empty(out_shape)
        lse = q.new_empty(lse_shape, dtype=torch.float32)
    else:
        out = q.new_zeros(out_shape)
        if given.sinks is None:
            lse = q.new_full(lse_shape, float("-inf"), dtype=torch.float32)
        else:
            lse = given.sinks.float()[None, :, None].expand(lse_shape).contiguous()
    launch = config_for(LaunchConfig, "attention_forward", q, given.padded).as_launched(_attention_forward_kernel)
    offered = offer_scattered(given)
    if offered is not None:
        choose_variant(*offered, given)
    wrap_triton(_attention_forward_kernel)[given.programs(launch.rows)](
        q,
        given.k,
        given.v,
        out,
        lse,
        *given.tables,
        given.sink_logits,
        given.plan.panels if offered is None else offered[0],
        *given.strides,
        *(out.stride(0), out.stride(2), out.stride(1), *lse.stride()[:2]),
        *given.mask_strides,
        *given.bias_strides,
        given.capacity,
        given.dense_len,
        given.bound,
        *given.unit,
        **given.list_constants(launch),
        INIT_BLOCKS=geometry.init_blocks,
        LOCAL_BLOCKS=geometry.local_blocks,
        HAS_SINKS=given.sinks is not None,
        SCATTERED_OFFERED=offered is not None,
        SPLIT=launch.queries_in_registers and padded_dim(dim) >= 32,
        **launch.options,
    )
    if offered is not None:
        attend_scattered(given, out, lse, *offered)
    return out.transpose(1, 2), lse
