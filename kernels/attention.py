"""Attention over the blocks that tiles of queries visit: the forward kernel, and what the backward shares with it.

One program computes one tile: the queries of a few adjacent tokens, for the heads of one key/value head. It walks
the union of the blocks that its tokens selected, ascending, and leaves out of a block the rows of the tokens that
did not select it. Only the blocks at an edge (the tile's own tokens, a sliding window) are masked key by key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_pass.kernels.configurations import launch_for
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.launch import precision, wrap_triton
from infllm_pass.kernels.tiles import (
    PANEL_BEGIN,
    PANEL_END,
    PANEL_QUERY,
    TABLE_COLUMNS,
    TileLists,
    TilePlan,
    load_panel,
)

LOG2_E = 1.4426950408889634

UNBOUNDED = 2**30
"""A sliding window, or a dense_len, that never ends."""

LN_2 = tl.constexpr(0.6931471805599453)

LOWEST_SCORE = tl.constexpr(-1e30)  # start of a running maximum: finite, so that differences are never NaN


@triton.jit
def load_attention_tile(panels, tile, TOKENS: tl.constexpr, TILES: tl.constexpr):
    """Where a tile lies: its row of the batch, query and position of its token 0, its valid tokens, its keys."""
    batch, query, begin, end, position, key_begin, length, _ = load_panel(panels, tile // TILES)
    skip = (tile % TILES) * TOKENS
    return batch, query + skip, begin - skip, tl.minimum(end - skip, TOKENS), position + skip, key_begin, length


@triton.jit
def reload_rows(panels, tile, token, TOKENS: tl.constexpr, TILES: tl.constexpr):
    """Query number of every row, in 64 bits, and whether its token exists, read again at the end of a program.

    The compiler cannot know them equal to what was read at its start, so no register holds them through the loop.
    """
    panel = panels + tile // TILES * TABLE_COLUMNS
    token += (tile % TILES) * TOKENS
    query = tl.load(panel + PANEL_QUERY, volatile=True).to(tl.int64) + token
    begin = tl.load(panel + PANEL_BEGIN, volatile=True)
    end = tl.load(panel + PANEL_END, volatile=True)
    return query, (token >= begin) & (token < end)


@triton.jit
def count_visits(counts, row, position, begin, end, dense, window, BLOCK_SIZE: tl.constexpr, HAS_LISTS: tl.constexpr):
    """Blocks that a tile visits, and the first of them where they are all from there on."""
    first = tl.maximum(position + begin - window + 1, 0) // BLOCK_SIZE
    visits = (position + end - 1) // BLOCK_SIZE + 1 - first
    if HAS_LISTS:
        visits = tl.where(dense, visits, tl.load(counts + row))
    return tl.where(begin < end, visits, 0), first


@triton.jit
def load_visit(blocks, tokens, entry, first, dense, HAS_LISTS: tl.constexpr):
    """One of the blocks that a tile visits, and the bits of the tokens that do."""
    block = first + entry
    bits = -1
    if HAS_LISTS:
        listed = tl.load(blocks + entry, mask=dense == 0, other=0).to(tl.int32) & 0xFFFF
        bits = tl.load(tokens + entry, mask=dense == 0, other=-1)
        block = tl.where(dense, block, listed)
    return block, bits


@triton.jit
def mask_scores(
    scores,  # [BM, BN]
    key_positions,  # [BN]
    start,  # the first key position that the step is for
    position,  # of the tile's token 0
    positions,  # [BM]
    last,  # position of the tile's last token
    window,
    key_mask,  # [BN] addresses
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    """Scores with -inf where a key is later than the query, before its window, masked or no part of the step."""
    if start + scores.shape[1] > position + 1:
        seen = (key_positions[None, :] <= positions[:, None]) & (key_positions >= start)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_WINDOW and start <= last - window:
        scores = tl.where(key_positions[None, :] > positions[:, None] - window, scores, float("-inf"))
    if HAS_KEY_MASK:
        scores = tl.where((tl.load(key_mask) != 0)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def row_addresses(tensor, batch, batch_stride, head, head_stride, query, token_stride, SIZE: tl.constexpr):
    """Addresses of one vector a row, ``[BM, SIZE]``: heads and queries are `[BM]`, in 64 bits."""
    vectors = tensor + batch * batch_stride + head * head_stride + query * token_stride
    return vectors[:, None] + tl.arange(0, SIZE)[None, :]


@triton.jit
def row_mask(exists, DIM: tl.constexpr, SIZE: tl.constexpr):
    """Which elements of one vector a row there are, ``[BM, SIZE]`` or ``[BM, 1]``."""
    mask = exists[:, None]
    if DIM != SIZE:
        mask = mask & (tl.arange(0, SIZE) < DIM)[None, :]
    return mask


@triton.jit
def load_keys(addresses, dims, DIM: tl.constexpr):
    """Vectors of keys or values; `dims`, a row or a column, numbers their elements and may pass their end."""
    if dims.shape[0] * dims.shape[1] == DIM:
        vectors = tl.load(addresses)
    else:
        vectors = tl.load(addresses, mask=dims < DIM, other=0.0)
    return vectors


@triton.jit(
    do_not_specialize=[
        "lse_batch_stride",
        "lse_head_stride",
        "key_mask_batch_stride",
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
    capacity,
    dense_len,
    window,
    scale_log2,  # softmax scale times log2(e)
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    parts: tl.constexpr = TOKENS * PADDED_GROUP // BLOCK_M  # programs of one tile
    head = tl.program_id(1) // parts
    batch, query, begin, end, position, key_begin, length = load_attention_tile(panels, tile, TOKENS, TILES)
    dense = length < dense_len
    row = tile.to(tl.int64) * (tl.num_programs(1) // parts) + head
    visits, first = count_visits(counts, row, position, begin, end, dense, window, BLOCK_SIZE, HAS_LISTS)
    blocks += row * capacity
    tokens += row * capacity

    rows = tl.program_id(1) % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // PADDED_GROUP  # [BM]
    group_head = rows % PADDED_GROUP
    positions = position + token
    exists = (token >= begin) & (token < end) & (group_head < GROUP)
    row_head = head.to(tl.int64) * GROUP + group_head
    row_query = query.to(tl.int64) + token
    dims = tl.arange(0, BLOCK_D)[:, None]
    value_dims = tl.arange(0, BLOCK_DV)[None, :]
    keys = tl.arange(0, BLOCK_N)

    q_rows = row_addresses(q, batch, q_batch_stride, row_head, q_head_stride, row_query, q_token_stride, BLOCK_D)
    queries = tl.load(q_rows, mask=row_mask(exists, HEAD_DIM, BLOCK_D), other=0.0)  # [BM, D]
    k += batch * k_batch_stride + head.to(tl.int64) * k_head_stride
    v += batch * v_batch_stride + head.to(tl.int64) * v_head_stride
    # Steps at a sequence's end move back until they end with it; in one shorter than a step, rows repeat the last key.
    last_start = tl.maximum(length - BLOCK_N, 0)
    offsets = tl.minimum(keys, length - 1)  # [BN]
    k_offsets = offsets[None, :] * k_token_stride + dims  # [D, BN]
    v_offsets = offsets[:, None] * v_token_stride + value_dims  # [BN, Dv]
    key_mask += batch * key_mask_batch_stride + offsets * key_mask_token_stride  # [BN]

    highest = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for step in range(visits * (BLOCK_SIZE // BLOCK_N)):
        entry = step // (BLOCK_SIZE // BLOCK_N)
        block, bits = load_visit(blocks, tokens, entry, first, dense, HAS_LISTS)
        start = block * BLOCK_SIZE + step % (BLOCK_SIZE // BLOCK_N) * BLOCK_N
        moved = tl.minimum(start, last_start)
        key = (key_begin + moved).to(tl.int64)
        k_step = load_keys(k + key * k_token_stride + k_offsets, dims, HEAD_DIM)  # [D, BN]
        scores = tl.dot(queries, k_step, input_precision=PRECISION)  # [BM, BN]
        scores = mask_scores(
            scores,
            moved + keys,
            start,
            position,
            positions,
            position + end - 1,
            window,
            key_mask + key * key_mask_token_stride,
            HAS_WINDOW,
            HAS_KEY_MASK,
        )
        raised = tl.maximum(highest, tl.max(scores, 1) * scale_log2)  # [BM]
        shift = raised
        if HAS_LISTS and TOKENS > 1:
            visiting = (bits >> token) & 1 != 0
            shift = tl.where(visiting, raised, float("inf"))
            raised = tl.where(visiting, raised, highest)
        weights = tl.exp2(scores * scale_log2 - shift[:, None])  # [BM, BN]
        decay = tl.exp2(highest - raised)
        highest = raised
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v_step = load_keys(v + key * v_token_stride + v_offsets, value_dims, VALUE_DIM)  # [BN, Dv]
        acc = tl.dot(weights.to(v_step.dtype), v_step, acc, input_precision=PRECISION)

    row_query, exists = reload_rows(panels, tile, token, TOKENS, TILES)
    exists = exists & (group_head < GROUP)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    out_rows = row_addresses(
        out, batch, out_batch_stride, row_head, out_head_stride, row_query, out_token_stride, BLOCK_DV
    )
    tl.store(out_rows, acc, mask=row_mask(exists, VALUE_DIM, BLOCK_DV))
    log_total = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * LN_2)
    tl.store(lse + batch * lse_batch_stride + row_head * lse_head_stride + row_query, log_total, mask=exists)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: TileLists | None,
    plan: TilePlan,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    key_mask: Tensor | None = None,
    window: int | None = None,
    every_query: bool,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over the keys of its blocks.

    Args:
        q: ``[B, Hq, Lq, D]``, any strides with the last one 1, as for `k` and `v`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        lists: the selection; None where all sequences are dense.
        plan: the tiles.
        geometry: the block geometry.
        scale: softmax scale, positive.
        dense_len: sequences with fewer keys are dense, whatever `lists` has for them.
        key_mask: bool ``[B, Lk]``, True where a key is valid.
        window: sliding window: the query at ``p`` sees keys after ``p - window`` only.
        every_query: whether every query belongs to a panel of the plan; if not, the others get 0 and -inf.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype, which lies in memory as ``[B, Lq, Hq, Dv]``, and the log-sum-exp, float32
        ``[B, Hq, Lq]``. A query without a visible key gives 0 and -inf.
    """
    batch, heads_q, length_q = q.shape[:3]
    heads_kv, dim, value_dim = k.shape[1], int(q.shape[3]), int(v.shape[3])
    out_shape, lse_shape = (batch, length_q, heads_q, value_dim), (batch, heads_q, length_q)
    if every_query:
        out = q.new_empty(out_shape).transpose(1, 2)
        lse = q.new_empty(lse_shape, dtype=torch.float32)
    else:
        out = q.new_zeros(out_shape).transpose(1, 2)
        lse = q.new_full(lse_shape, float("-inf"), dtype=torch.float32)
    shape = plan.shape
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    launch = launch_for("attention_forward", q, max(block_d, block_dv))
    parts = shape.tokens * shape.padded_group // launch.rows
    wrap_triton(_attention_forward_kernel)[(plan.num_tiles, heads_kv * parts)](
        q,
        k,
        v,
        out,
        lse,
        plan.panels,
        plan.panels if lists is None else lists.blocks,
        plan.panels if lists is None else lists.tokens,
        plan.panels if lists is None else lists.counts,
        plan.panels if key_mask is None else key_mask,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        lse.stride(0),
        lse.stride(1),
        0 if key_mask is None else key_mask.stride(0),
        0 if key_mask is None else key_mask.stride(1),
        0 if lists is None else lists.blocks.stride(1),
        dense_len,
        UNBOUNDED if window is None else window,
        scale * LOG2_E,
        GROUP=shape.group,
        PADDED_GROUP=shape.padded_group,
        TOKENS=shape.tokens,
        TILES=shape.tiles,
        BLOCK_M=launch.rows,
        BLOCK_SIZE=geometry.block_size,
        BLOCK_N=launch.step_keys(geometry.block_size),
        HEAD_DIM=dim,
        BLOCK_D=block_d,
        VALUE_DIM=value_dim,
        BLOCK_DV=block_dv,
        HAS_LISTS=lists is not None,
        HAS_WINDOW=window is not None,
        HAS_KEY_MASK=key_mask is not None,
        PRECISION=precision(q),
        **launch.options,
    )
    return out, lse
