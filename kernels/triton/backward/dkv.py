"""Gradients of keys and values: one program a key block, over the queries that visit it (`block_to_query`).

A step takes 64 rows, tokens x heads of one key/value head, whether the queries are adjacent or listed. Blocks with
many queries, the initial ones above all, are split (`split_work`), and their fp32 partials reduced in a fixed order:
every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..configs import LaunchConfig, config_for
from ..launch import precision, wrap_triton
from ..score_terms import cap_products, load_key_bias
from ..tile_ops import UNBOUNDED, mask_scores
from ..tile_tables import TABLE_COLUMNS, padded_dim
from .block_to_query import BLOCK_BATCH, BLOCK_KEY, BLOCK_KEYS, BLOCK_QUERY, BLOCK_RUN, BLOCK_SHIFT, invert_selection
from .split_work import PIECE_STEPS, POOL_BYTES, add_pieces, plan_pieces, unit_of_slot

EVERY_KEY = tl.constexpr(UNBOUNDED)
"""Position of a query that sees all keys of a call."""


@triton.jit
def _step_start(begin, step, turn, run, TOKENS: tl.constexpr, HEAD_CHUNKS: tl.constexpr):
    """First query of a step; the run's steps are rotated by `turn`, so that concurrent programs share L2 lines."""
    start = begin + step // HEAD_CHUNKS * TOKENS
    turned = run // TOKENS * TOKENS
    moved = start - turn
    moved = tl.where(moved < 0, moved + turned, moved)
    return tl.where(start < turned, moved, start)


@triton.jit
def _listed_queries(queries, start, token, run, last):
    """Listed queries of a step's rows, whose tokens in the step are `token`; read before the step, which waits less."""
    index = tl.minimum(start + token, last)
    return tl.load(queries + index, mask=index >= run, other=0)


@triton.jit
def _step_queries(first, listed, start, token, run, last):
    """Queries of a step's rows, of the run or listed; rows past the last query repeat it."""
    index = tl.minimum(start + token, last)
    return tl.where(index < run, first + index, listed)


@triton.jit(
    do_not_specialize=[
        "key_mask_batch_stride",
        "bias_batch_stride",
        "bias_head_stride",
        "length_q",
        "length_k",
        "num_units",
        "num_blocks",
        "bound",
        "limit",
        "window",
    ]
)
def _key_gradients_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    grad_k,
    grad_v,
    grad_bias,  # float32 [B, Hkv, Lk], HAS_BIAS only, as the bias
    pool,
    key_mask,
    key_bias,
    table,
    starts,
    counts,
    queries,
    slots,
    piece,
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
    key_mask_batch_stride,
    key_mask_token_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_token_stride,
    heads,
    length_q,
    length_k,
    num_units,
    num_blocks,
    bound,
    limit,
    window,
    scale,
    softcap,  # HAS_SOFTCAP only
    GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Pieces first: they are the longest.
    task = tl.program_id(0) // (BLOCK_SIZE // BLOCK_N)
    part = tl.program_id(0) % (BLOCK_SIZE // BLOCK_N)
    in_pool = task < limit
    unit = task - limit
    number = 0
    if in_pool:
        if task >= tl.load(slots + num_units):
            return
        unit = unit_of_slot(slots, num_units, task)
        number = task - tl.load(slots + unit)
    else:
        # Head by head: programs that run at the same time then have queries in common, which stay in the L2 cache.
        unit = unit % num_blocks * heads + unit // num_blocks
        if tl.load(slots + unit + 1) > tl.load(slots + unit):
            return
    block = unit // heads
    head = unit % heads
    row = table + block * TABLE_COLUMNS
    if tl.load(row + BLOCK_KEYS) <= part * BLOCK_N:
        return
    batch = tl.load(row + BLOCK_BATCH).to(tl.int64)
    key = tl.load(row + BLOCK_KEY) + part * BLOCK_N
    last_key = tl.load(row + BLOCK_KEYS) - part * BLOCK_N - 1
    first = tl.load(row + BLOCK_QUERY)
    run = tl.load(row + BLOCK_RUN)
    shift = tl.load(row + BLOCK_SHIFT)
    end = run
    if HAS_LISTS:
        end += tl.load(counts + head * num_blocks + block)
        queries += head.to(tl.int64) * bound + tl.load(starts + head * num_blocks + block) - run
    size = tl.load(piece)
    begin = number * size
    last = tl.minimum(end, begin + size) - 1
    early = key + BLOCK_N - 1 - shift - first  # queries before this one, in the block's order, may not see every key
    # Runs of neighbouring blocks overlap. Each starts where it has a multiple of its length, so that programs which
    # started together read the same queries at the same time.
    steps = tl.maximum(run // TOKENS, 1).to(tl.uint32)  # a remainder without signs takes fewer registers
    turn = tl.where(in_pool, 0, ((first // TOKENS).to(tl.uint32) % steps).to(tl.int32) * TOKENS)

    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    key_rows = (key + tl.minimum(keys, last_key)).to(tl.int64)  # the last key again where the block ends early
    k_at = (
        k
        + batch * k_batch_stride
        + head.to(tl.int64) * k_head_stride
        + key_rows[:, None] * k_token_stride
        + dims[None, :]
    )
    v_at = (
        v
        + batch * v_batch_stride
        + head.to(tl.int64) * v_head_stride
        + key_rows[:, None] * v_token_stride
        + value_dims[None, :]
    )
    k_tile = tl.load(k_at) if HEAD_DIM == BLOCK_D else tl.load(k_at, mask=dims[None, :] < HEAD_DIM, other=0.0)
    v_tile = tl.load(v_at) if VALUE_DIM == BLOCK_DV else tl.load(v_at, mask=value_dims[None, :] < VALUE_DIM, other=0.0)

    scale = tl.cast(scale, tl.float32)  # Inductor passes numbers as float64
    LOG2E: tl.constexpr = 1.4426950408889634
    ROWS: tl.constexpr = TOKENS * TILE_HEADS
    unit = scale  # of scores, as in `score_terms`
    if HAS_SOFTCAP:
        unit = tl.cast(softcap, tl.float32)
        cap_log2 = 2.0 * LOG2E * scale / unit
    scale_log2 = unit * LOG2E
    inverse_unit = 1.0 / unit
    heads_q = heads * GROUP
    q += batch * q_batch_stride + (head * GROUP).to(tl.int64) * q_head_stride
    grad_out += batch * grad_batch_stride + (head * GROUP).to(tl.int64) * grad_head_stride
    statistics = (batch * heads_q + head * GROUP) * length_q
    row_token = tl.arange(0, ROWS) // TILE_HEADS
    row_head = tl.arange(0, ROWS) % TILE_HEADS
    # One load fetches a step's lse and delta, each thread one number, a step ahead. Products start from what would be
    # subtracted from them, lse in the unit of scores and delta, which each thread prepares for its number.
    lane = tl.arange(0, 2 * ROWS)
    lane_base = tl.where(lane < ROWS, lse + statistics, delta + statistics)
    lane_factor = tl.where(lane < ROWS, -inverse_unit, -1.0)
    lane_token = lane % ROWS // TILE_HEADS
    lane_head = lane % TILE_HEADS
    row_listed = row_token
    lane_listed = lane_token
    start = _step_start(begin, 0, turn, run, TOKENS, HEAD_CHUNKS)
    if HAS_LISTS:
        row_listed = _listed_queries(queries, start, row_token, run, last)
        lane_listed = _listed_queries(queries, start, lane_token, run, last)
    lane_query = _step_queries(first, lane_listed, start, lane_token, run, last)
    lane_at = tl.minimum(lane_head, GROUP - 1) * length_q + lane_query
    lane_next = tl.load(lane_base + lane_at, mask=start + lane_token <= last, other=0.0)
    following = _step_start(begin, 1, turn, run, TOKENS, HEAD_CHUNKS)
    if HAS_LISTS:
        lane_listed = _listed_queries(queries, following, lane_token, run, last)

    if HAS_BIAS:
        bias_at = key_bias + batch * bias_batch_stride + head.to(tl.int64) * bias_head_stride
        bias = load_key_bias(bias_at + key_rows * bias_token_stride, scale_log2, None)  # [BLOCK_N]
        sum_bias = tl.zeros([BLOCK_N], tl.float32)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for step in range(tl.cdiv(last - begin + 1, TOKENS) * HEAD_CHUNKS):
        start = _step_start(begin, step, turn, run, TOKENS, HEAD_CHUNKS)
        following = _step_start(begin, step + 1, turn, run, TOKENS, HEAD_CHUNKS)
        first_head = step % HEAD_CHUNKS * TILE_HEADS
        row_query = _step_queries(first, row_listed, start, row_token, run, last)
        if HAS_LISTS:
            row_listed = _listed_queries(queries, following, row_token, run, last)
        head_q = tl.minimum(first_head + row_head, GROUP - 1).to(tl.int64)
        q_at = q + (head_q * q_head_stride + row_query.to(tl.int64) * q_token_stride)[:, None] + dims[None, :]
        g_at = (
            grad_out
            + (head_q * grad_head_stride + row_query.to(tl.int64) * grad_token_stride)[:, None]
            + value_dims[None, :]
        )
        q_tile = tl.load(q_at) if HEAD_DIM == BLOCK_D else tl.load(q_at, mask=dims[None, :] < HEAD_DIM, other=0.0)
        g_tile = (
            tl.load(g_at) if VALUE_DIM == BLOCK_DV else tl.load(g_at, mask=value_dims[None, :] < VALUE_DIM, other=0.0)
        )
        prepared = tl.where(lane_next == float("-inf"), float("inf"), lane_next)  # no visible key: weight 0
        score_start, grad_start = tl.split(tl.trans(tl.reshape(prepared * lane_factor, [2, ROWS])))
        next_head = tl.minimum((step + 1) % HEAD_CHUNKS * TILE_HEADS + lane_head, GROUP - 1)
        lane_query = _step_queries(first, lane_listed, following, lane_token, run, last)
        lane_next = tl.load(lane_base + next_head * length_q + lane_query)
        if HAS_LISTS:
            after = _step_start(begin, step + 2, turn, run, TOKENS, HEAD_CHUNKS)
            lane_listed = _listed_queries(queries, after, lane_token, run, last)
        if GROUP < TILE_HEADS * HEAD_CHUNKS:
            score_start = tl.where(first_head + row_head < GROUP, score_start, float("-inf"))

        zeros = tl.zeros([BLOCK_N, ROWS], tl.float32)
        grad_weights = zeros + grad_start[None, :]
        grad_weights = tl.dot(v_tile, tl.trans(g_tile), grad_weights, input_precision=PRECISION)  # [BLOCK_N, ROWS]
        scores = zeros + score_start[None, :]
        if HAS_BIAS:
            scores += bias[:, None]
        if HAS_SOFTCAP:
            capped = cap_products(tl.dot(k_tile, tl.trans(q_tile), zeros, input_precision=PRECISION), cap_log2)
            slope = 1.0 - capped * capped
            scores += capped
        else:
            scores = tl.dot(k_tile, tl.trans(q_tile), scores, input_precision=PRECISION)  # [BLOCK_N, ROWS]
        if (start < early) | (start + (TOKENS - 1) > last):
            index = start + row_token
            own = first + index + shift  # number of the query's own key
            if QUERY_BLOCK > 1 and HAS_LISTS:
                listed = tl.load(queries + index, mask=(index >= run) & (index <= last), other=0)
                own = tl.where(index < run, own, listed + shift)
            else:
                own = tl.where(index < run, own, EVERY_KEY)
            own = tl.where(index <= last, own, -1)
            scores = mask_scores(scores, key + keys[:, None], own[None, :], window, True, True, False)
        if HAS_WINDOW:
            own = row_query + shift
            scores = mask_scores(scores, key + keys[:, None], own[None, :], window, True, False, True)
        weights = tl.exp2(scores * scale_log2)
        sum_v = tl.dot(weights.to(g_tile.dtype), g_tile, sum_v, input_precision=PRECISION)
        grad_scores = weights * grad_weights
        if HAS_BIAS:
            sum_bias += tl.sum(grad_scores, 1)
        if HAS_SOFTCAP:
            grad_scores *= slope
        sum_k = tl.dot(grad_scores.to(q_tile.dtype), q_tile, sum_k, input_precision=PRECISION)
    sum_k *= scale

    if in_pool:
        slot = pool + task.to(tl.int64) * BLOCK_SIZE * (HEAD_DIM + VALUE_DIM + HAS_BIAS)
        inside = (part * BLOCK_N + keys)[:, None]
        tl.store(slot + inside * HEAD_DIM + dims[None, :], sum_k, mask=dims[None, :] < HEAD_DIM)
        slot += BLOCK_SIZE * HEAD_DIM
        tl.store(slot + inside * VALUE_DIM + value_dims[None, :], sum_v, mask=value_dims[None, :] < VALUE_DIM)
        if HAS_BIAS:
            tl.store(slot + BLOCK_SIZE * VALUE_DIM + part * BLOCK_N + keys, sum_bias)
    else:
        valid = keys <= last_key
        if HAS_KEY_MASK:
            valid &= tl.load(key_mask + batch * key_mask_batch_stride + key_rows * key_mask_token_stride) != 0
        at_rows = ((batch * heads + head) * length_k + key + keys)[:, None]
        out = grad_k + at_rows * HEAD_DIM + dims[None, :]
        tl.store(out, sum_k.to(grad_k.dtype.element_ty), mask=valid[:, None] & (dims[None, :] < HEAD_DIM))
        out = grad_v + at_rows * VALUE_DIM + value_dims[None, :]
        tl.store(out, sum_v.to(grad_v.dtype.element_ty), mask=valid[:, None] & (value_dims[None, :] < VALUE_DIM))
        if HAS_BIAS:
            tl.store(grad_bias + (batch * heads + head) * length_k + key + keys, sum_bias, mask=valid)


def key_gradients(
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    given: AttentionInputs,
    *,
    piece_steps: int = PIECE_STEPS,
    pool_bytes: int = POOL_BYTES,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the keys, the values and the key bias of block-sparse attention.

    Args:
        grad_out: gradient of the output, ``[B, Hq, Lq, Dv]``, any strides with the last one 1.
        lse: natural log-sum-exp of the forward, float32 ``[B, Hq, Lq]``, contiguous.
        delta: row sums of ``grad_out * out``, float32 ``[B, Hq, Lq]``, contiguous.
        given: the call, as the forward had it; see `invert_selection`.
        piece_steps: steps of the smallest piece into which a block's queries are cut, a power of two.
        pool_bytes: memory for the sums of pieces, which bounds how small the pieces become.

    Returns:
        Contiguous gradients in the dtypes of `k` and `v`, and of the key bias in its dtype and shape, None where there
        is none; 0 for keys that no query sees.
    """
    q, k, v, key_bias = given.q, given.k, given.v, given.key_bias
    batch, heads, length_k = k.shape[:3]
    length_q, (dim, value_dim) = q.shape[2], given.dims
    shape, block_size = given.plan.shape, given.geometry.block_size
    # Of different shapes on purpose: a compiler merges two equal allocations, and then copies one of them.
    grad_k = torch.zeros(k.numel() // dim, dim, dtype=k.dtype, device=k.device)
    grad_v = torch.zeros(v.numel(), dtype=v.dtype, device=v.device)
    grad_bias = None
    if key_bias is not None:
        grad_bias = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    key_lists = invert_selection(
        given.lists,
        given.plan,
        geometry=given.geometry,
        batch=batch,
        length_k=length_k,
        dense_len=given.dense_len,
        window=given.window,
    )
    table = key_lists.table
    num_units = table.shape[0] * heads
    pieces = plan_pieces(
        key_lists,
        heads=heads,
        length_q=length_q,
        smallest=piece_steps * shape.tokens,
        slot_size=block_size * (dim + value_dim + (grad_bias is not None)),
        pool_bytes=pool_bytes,
    )
    launch = config_for(LaunchConfig, "key_gradients", k, given.padded)
    tile_heads = min(shape.padded_group, launch.rows)
    keys = launch.step_keys(block_size)
    wrap_triton(_key_gradients_kernel)[((pieces.limit + num_units) * (block_size // keys),)](
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        grad_k,
        grad_v,
        pieces.pool if grad_bias is None else grad_bias,
        pieces.pool,
        *given.of_keys,
        table,
        table if key_lists.starts is None else key_lists.starts,
        table if key_lists.counts is None else key_lists.counts,
        table if key_lists.queries is None else key_lists.queries,
        pieces.slots,
        pieces.size,
        *grad_out.stride()[:3],
        *given.strides,
        *given.mask_strides,
        *given.bias_strides,
        heads,
        length_q,
        length_k,
        num_units,
        table.shape[0],
        0 if key_lists.queries is None else key_lists.queries.shape[1],
        pieces.limit,
        0 if given.window is None else given.window,
        given.scale,
        given.softcap,
        GROUP=shape.group,
        TILE_HEADS=tile_heads,
        HEAD_CHUNKS=shape.padded_group // tile_heads,
        TOKENS=launch.rows // tile_heads,
        HEAD_DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=padded_dim(dim),
        BLOCK_DV=padded_dim(value_dim),
        BLOCK_SIZE=block_size,
        BLOCK_N=keys,
        QUERY_BLOCK=given.geometry.query_block,
        HAS_LISTS=given.lists is not None,
        HAS_KEY_MASK=given.key_mask is not None,
        HAS_BIAS=grad_bias is not None,
        HAS_SOFTCAP=given.softcap != 0.0,
        HAS_WINDOW=given.window is not None,
        PRECISION=precision(k),
        **launch.options,
    )
    add_pieces(grad_k, grad_v, grad_bias, pieces, key_lists, given)
    if key_bias is not None and grad_bias is not None:
        grad_bias = grad_bias.sum_to_size(key_bias.shape).to(key_bias.dtype)
    return grad_k.view(k.shape), grad_v.view(v.shape), grad_bias
