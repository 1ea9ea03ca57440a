"""Query side of the backward pass: row sums of ``dO * O`` (delta), and the gradient of q.

The gradient of q visits the blocks of the forward's lists, recomputes the weights from the log-sum-exp, and masks the
same rows. As in the forward, tiles of scattered selections visit the forced blocks only, and `backward.scattered` adds
the scored ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..configs import LaunchConfig, config_for
from ..launch import wrap_triton
from ..prefill.choose import choose_variant
from ..score_terms import cap_products, load_key_bias
from ..tile_ops import (
    LOG2_E,
    in_registers,
    load_attention_tile,
    load_keys,
    load_visit,
    mask_step,
    reload_rows,
    row_addresses,
    row_mask,
    start_visits,
)
from .scattered import add_scattered_gradient, offer_scattered_gradient

_DELTA_ROWS = 32
"""Queries of one program of `_output_delta_kernel`."""


@triton.jit(do_not_specialize=["delta_batch_stride", "delta_head_stride", "length_q"])
def _output_delta_kernel(
    grad_out,  # [B, Hq, Lq, Dv]
    out,  # [B, Hq, Lq, Dv]
    delta,  # float32 [B, Hq, Lq]
    grad_batch_stride,
    grad_head_stride,
    grad_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    delta_batch_stride,
    delta_head_stride,
    length_q,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    head = tl.zeros([ROWS], tl.int64) + tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * ROWS + rows
    exists = query < length_q
    mask = row_mask(exists, VALUE_DIM, BLOCK_DV)
    grad_rows = row_addresses(
        grad_out, batch, grad_batch_stride, head, grad_head_stride, query, grad_token_stride, BLOCK_DV
    )
    out_rows = row_addresses(out, batch, out_batch_stride, head, out_head_stride, query, out_token_stride, BLOCK_DV)
    gradients = tl.load(grad_rows, mask=mask, other=0.0).to(tl.float32)  # [ROWS, Dv]
    outputs = tl.load(out_rows, mask=mask, other=0.0).to(tl.float32)
    delta_rows = delta + batch * delta_batch_stride + head * delta_head_stride + query
    tl.store(delta_rows, tl.sum(gradients * outputs, 1), mask=exists)


def output_delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """Sum of ``dO * O`` over the last dimension, which the gradient of every softmax row needs.

    Args:
        grad_out: gradient of `out`, ``[B, Hq, Lq, Dv]``, any strides with the last one 1.
        out: what `attention_forward` gave.

    Returns:
        float32 ``[B, Hq, Lq]``.
    """
    batch, heads, length_q = out.shape[:3]
    value_dim = int(out.shape[3])
    delta = out.new_empty((batch, heads, length_q), dtype=torch.float32)
    wrap_triton(_output_delta_kernel)[((length_q + _DELTA_ROWS - 1) // _DELTA_ROWS, heads, batch)](
        grad_out,
        out,
        delta,
        *grad_out.stride()[:3],
        *out.stride()[:3],
        *delta.stride()[:2],
        length_q,
        VALUE_DIM=value_dim,
        BLOCK_DV=triton.next_power_of_2(value_dim),
        ROWS=_DELTA_ROWS,
    )
    return delta


@triton.jit
def _add_step(
    acc,  # [BM, D]
    queries,  # [BM, D]
    gradients,  # [BM, Dv]
    k_rows,  # [BN, D] addresses
    v_rows,  # [Dv, BN] addresses
    key_mask,  # [BN] addresses
    key_bias,  # [BN] addresses
    dims,  # [1, D]
    value_dims,  # [Dv, 1]
    count,
    key_positions,  # [BN]
    start,
    position,
    positions,  # [BM]
    last,
    window,
    shift,  # [BM]
    row_delta,  # [BM]
    scale_log2,
    cap_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the keys of a step give; `load_keys` and `mask_step` explain what they are handed on."""
    numbers = tl.arange(0, k_rows.shape[0])
    k_step = load_keys(k_rows, numbers[:, None], dims, count, HEAD_DIM, dims.shape[1] == HEAD_DIM, SHORT)  # [BN, D]
    v_step = load_keys(v_rows, numbers[None, :], value_dims, count, VALUE_DIM, value_dims.shape[0] == VALUE_DIM, SHORT)
    scores = tl.dot(queries, tl.trans(k_step), input_precision=PRECISION)  # [BM, BN]
    if HAS_SOFTCAP:
        scores = cap_products(scores, cap_log2)
        slope = 1.0 - scores * scores
    if HAS_BIAS:
        scores += load_key_bias(key_bias, scale_log2, None)[None, :]
    scores = mask_step(
        scores, key_positions, start, position, positions, last, window, key_mask, HAS_WINDOW, HAS_KEY_MASK
    )
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    grad_weights = tl.dot(gradients, v_step, input_precision=PRECISION)  # [BM, BN]
    grad_scores = weights * (grad_weights - row_delta[:, None])
    if HAS_SOFTCAP:
        grad_scores *= slope
    return tl.dot(grad_scores.to(k_step.dtype), k_step, acc, input_precision=PRECISION)


@triton.jit
def _store_query_gradient(
    gradients,  # [BM, D]
    grad_q,
    panels,
    tile,
    row_head,  # [BM]
    token,  # [BM]
    present,  # [BM] whether the row has a head
    FEWEST: tl.constexpr,
    grad_q_batch_stride,
    grad_q_head_stride,
    grad_q_token_stride,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    batch, query, exists = reload_rows(panels, tile, token, FEWEST, TOKENS, TILES)
    exists = exists & present
    size: tl.constexpr = gradients.shape[1]
    grad_q_rows = row_addresses(
        grad_q, batch, grad_q_batch_stride, row_head, grad_q_head_stride, query, grad_q_token_stride, size
    )
    tl.store(grad_q_rows, gradients.to(grad_q.dtype.element_ty), mask=row_mask(exists, HEAD_DIM, size))


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
def _query_gradient_kernel(
    grad_out,  # [B, Hq, Lq, Dv]
    q,  # [B, Hq, Lq, D]
    k,  # [B, Hkv, Lk, D]
    v,  # [B, Hkv, Lk, Dv]
    lse,  # float32 [B, Hq, Lq]
    delta,  # float32 [B, Hq, Lq], strides of lse
    grad_q,  # [B, Hq, Lq, D]
    panels,
    blocks,
    tokens,
    counts,
    key_mask,  # bool [B, Lk], HAS_KEY_MASK only
    key_bias,  # [B, Hkv, Lk], HAS_BIAS only
    is_scattered,  # int32 [1], SCATTERED_OFFERED only: whether tiles visit their forced blocks alone
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
    dense_len,
    window,
    scale,
    scale_log2,  # base-2 logarithm that a score of 1 stands for
    cap_log2,  # of `cap_products`, HAS_SOFTCAP only
    log2_e,
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
    HAS_SOFTCAP: tl.constexpr,
    QUERIES_IN_REGISTERS: tl.constexpr,
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
    dims = tl.arange(0, BLOCK_D)[None, :]
    value_dims = tl.arange(0, BLOCK_DV)[:, None]
    keys = tl.arange(0, BLOCK_N)

    q_rows = row_addresses(q, batch, q_batch_stride, row_head, q_head_stride, row_query, q_token_stride, BLOCK_D)
    queries = tl.load(q_rows, mask=row_mask(exists, HEAD_DIM, BLOCK_D), other=0.0)  # [BM, D]
    if QUERIES_IN_REGISTERS:
        queries = in_registers(queries, PRECISION)
    grad_rows = row_addresses(
        grad_out, batch, grad_batch_stride, row_head, grad_head_stride, row_query, grad_token_stride, BLOCK_DV
    )
    gradients = tl.load(grad_rows, mask=row_mask(exists, VALUE_DIM, BLOCK_DV), other=0.0)  # [BM, Dv]
    scalars = batch * lse_batch_stride + row_head * lse_head_stride + row_query
    shift = tl.load(lse + scalars, mask=exists, other=0.0) * log2_e  # [BM]
    shift = tl.where(shift == float("-inf"), float("inf"), shift)  # no key: every weight is 0
    row_delta = tl.load(delta + scalars, mask=exists, other=0.0)  # [BM]
    k += batch * k_batch_stride + head.to(tl.int64) * k_head_stride
    v += batch * v_batch_stride + head.to(tl.int64) * v_head_stride
    k_offsets = keys[:, None] * k_token_stride + dims  # [BN, D]
    v_offsets = keys[None, :] * v_token_stride + value_dims  # [Dv, BN]
    key_mask += batch * key_mask_batch_stride
    key_bias += batch * bias_batch_stride + head.to(tl.int64) * bias_head_stride

    if length < BLOCK_N:
        # As in the forward: one step, which all queries visit.
        key = key_begin.to(tl.int64)
        acc = _add_step(
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
            queries,
            gradients,
            k + key * k_token_stride + k_offsets,
            v + key * v_token_stride + v_offsets,
            key_mask + (key + tl.minimum(keys, length - 1)) * key_mask_token_stride,
            key_bias + (key + tl.minimum(keys, length - 1)) * bias_token_stride,
            dims,
            value_dims,
            length,
            keys,
            0,
            position,
            positions,
            position + end - 1,
            window,
            shift,
            row_delta,
            scale_log2,
            cap_log2,
            HEAD_DIM,
            VALUE_DIM,
            True,
            HAS_WINDOW,
            HAS_KEY_MASK,
            HAS_BIAS,
            HAS_SOFTCAP,
            PRECISION,
        )
        _store_query_gradient(
            acc * scale,
            grad_q,
            panels,
            tile,
            row_head,
            token,
            group_head < GROUP,
            0,
            grad_q_batch_stride,
            grad_q_head_stride,
            grad_q_token_stride,
            TOKENS,
            TILES,
            HEAD_DIM,
        )
        visits = 0

    last_start = length - BLOCK_N  # as in the forward
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(visits * (BLOCK_SIZE // BLOCK_N)):
        entry = step // (BLOCK_SIZE // BLOCK_N)
        start_block = first
        if SCATTERED_OFFERED:
            start_block = tl.where(entry < initial, first, later)
        block, bits = load_visit(blocks, tokens, entry, start_block, by_rule, HAS_LISTS)
        start = block * BLOCK_SIZE + step % (BLOCK_SIZE // BLOCK_N) * BLOCK_N
        moved = tl.minimum(start, last_start)
        key = (key_begin + moved).to(tl.int64)
        step_shift = shift
        if HAS_LISTS and TOKENS > 1:
            step_shift = tl.where((bits >> token) & 1 != 0, shift, float("inf"))
        acc = _add_step(
            acc,
            queries,
            gradients,
            k + key * k_token_stride + k_offsets,
            v + key * v_token_stride + v_offsets,
            key_mask + (key + keys) * key_mask_token_stride,
            key_bias + (key + keys) * bias_token_stride,
            dims,
            value_dims,
            length,
            moved + keys,
            start,
            position,
            positions,
            position + end - 1,
            window,
            step_shift,
            row_delta,
            scale_log2,
            cap_log2,
            HEAD_DIM,
            VALUE_DIM,
            False,
            HAS_WINDOW,
            HAS_KEY_MASK,
            HAS_BIAS,
            HAS_SOFTCAP,
            PRECISION,
        )

    _store_query_gradient(
        acc * scale,
        grad_q,
        panels,
        tile,
        row_head,
        token,
        group_head < GROUP,
        BLOCK_N,
        grad_q_batch_stride,
        grad_q_head_stride,
        grad_q_token_stride,
        TOKENS,
        TILES,
        HEAD_DIM,
    )


def query_gradient(grad_out: Tensor, lse: Tensor, delta: Tensor, given: AttentionInputs) -> Tensor:
    """Gradient of q, the selection held fixed.

    Args:
        grad_out: gradient of the output, ``[B, Hq, Lq, Dv]``, any strides with the last one 1.
        lse: float32 ``[B, Hq, Lq]``, contiguous, from `attention_forward`.
        delta: float32 ``[B, Hq, Lq]``, contiguous, from `output_delta`.
        given: the call, as the forward had it.

    Returns:
        ``[B, Hq, Lq, D]`` in q's dtype, contiguous; 0 for a query of no panel.
    """
    q = given.q
    grad_q = (q.new_empty if given.every_query else q.new_zeros)(q.shape)
    launch = config_for(LaunchConfig, "query_gradient", q, given.padded)
    offered = offer_scattered_gradient(given)
    if offered is not None:
        choose_variant(*offered, given)
    wrap_triton(_query_gradient_kernel)[given.programs(launch.rows)](
        grad_out,
        q,
        given.k,
        given.v,
        lse,
        delta,
        grad_q,
        *given.tables,
        given.plan.panels if offered is None else offered[0],
        *grad_out.stride()[:3],
        *given.strides,
        *grad_q.stride()[:3],
        *lse.stride()[:2],
        *given.mask_strides,
        *given.bias_strides,
        given.capacity,
        given.dense_len,
        given.bound,
        given.scale,
        *given.unit,
        LOG2_E,
        **given.list_constants(launch),
        INIT_BLOCKS=given.geometry.init_blocks,
        LOCAL_BLOCKS=given.geometry.local_blocks,
        SCATTERED_OFFERED=offered is not None,
        QUERIES_IN_REGISTERS=launch.queries_in_registers,
        **launch.options,
    )
    if offered is not None:
        add_scattered_gradient(grad_out, lse, delta, given, grad_q, *offered)
    return grad_q
