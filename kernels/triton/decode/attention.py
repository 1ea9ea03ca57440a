"""Decode attention: split-K over a tile's keys, and the merge of the partial results by log-sum-exp.

A sparse tile visits the listed blocks of each of its lines, a dense one all blocks; the number of *visits* follows on
the device from the row's length, and every program takes an equal share. Partials are merged in a fixed order, so
every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import BlockGeometry
from ..configs import DecodeConfig, config_for
from ..launch import multiprocessors, precision, wrap_triton
from ..pdl import await_previous, dependent_launch, prefetch_rows
from ..score_terms import cap_products, load_key_bias, score_unit
from ..tile_ops import LN_2, LOWEST_SCORE, UNBOUNDED, mask_scores, online_softmax
from ..tile_tables import padded_dim
from .rows import (
    DecodeRows,
    DecodeShape,
    clip_row,
    first_block,
    forced_block,
    last_of_line,
    line_of,
    scored_range,
    tile_visits,
)

MAX_SPLITS = 128
"""Programs that share a tile, at most: with one key/value head they fill an H100."""

_MANY_SPLITS = 64
"""More only as far as every multiprocessor then has one: with 128 in place of 66 a step took 0.9 us more."""

_MERGED_DIMS = 32
"""Numbers of a value that one program of the merge adds."""


@triton.jit(do_not_specialize=["capacity", "length_q", "dense_len", "window", "splits"])
def _decode_attention_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    q,
    k,
    v,
    blocks,  # int32 [B * Hkv * LINES, BUDGET]
    key_mask,  # bool [B, C], HAS_KEY_MASK only
    key_bias,  # [B, Hkv, C], HAS_BIAS only
    part_out,  # float32 [B, Hq, Lq, splits, VALUE_DIM]
    part_lse,  # float32 [B, Hq, Lq, splits], base 2
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_mb,
    stride_mt,
    stride_bb,
    stride_bh,
    stride_bt,
    scale_log2,  # base-2 logarithm that a score of 1 stands for
    cap_log2,  # of `cap_products`, HAS_SOFTCAP only
    heads,
    capacity,
    length_q,
    dense_len,
    window,
    splits,
    G: tl.constexpr,
    GP: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    STEP_KEYS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    AHEAD: tl.constexpr,  # visits whose keys and values are fetched early, DEPENDENT only
):
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    cap_log2 = tl.cast(cap_log2, tl.float32)
    M: tl.constexpr = TOKENS * GP
    STEPS: tl.constexpr = BLOCK // STEP_KEYS
    split = tl.program_id(0)
    tile = tl.program_id(2)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    row_end = tl.load(lengths + batch * lengths_stride)
    start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    sparse, first_line, first, width, visits = tile_visits(
        length, length_q, tile, dense_len, window, TOKENS, QUERY_BLOCK, BLOCK, BUDGET, HAS_WINDOW
    )
    share = (visits + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, visits)
    row = tl.arange(0, M)
    token = tile * TOKENS + row // GP  # [M]
    member = row % GP
    write = (token < length_q) & (member < G)
    out_row = ((pair * G + member) * length_q + token) * splits + split
    position = length - length_q + token
    real = (token < length_q) & (member < G) & (position >= 0)
    dims = tl.arange(0, DP)
    q_row = q + batch * stride_qb + head * G * stride_qh
    at = q_row + (member.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qt)[:, None] + dims[None, :]
    queries = tl.load(at, mask=real[:, None] & (dims < D)[None, :], other=0.0)  # [M, DP]
    k_row = k + batch * stride_kb + head * stride_kh + start.to(tl.int64) * stride_kt
    v_row = v + batch * stride_vb + head * stride_vh + start.to(tl.int64) * stride_vt
    if DEPENDENT:
        # While blocks are scored and ranked: those that no score decides on, of the first visits.
        for step in range(begin * STEPS, tl.where(sparse, tl.minimum(end, begin + AHEAD), begin) * STEPS):
            visit = step // STEPS
            last = last_of_line(first_line + visit // width, length, length_q, QUERY_BLOCK)
            low, high, _ = scored_range(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
            block, known = forced_block(visit % width, last, window, low, high, BLOCK, INIT, LOCAL, HAS_WINDOW)
            key = block * BLOCK + step % STEPS * STEP_KEYS + tl.arange(0, STEP_KEYS)
            key = tl.where(known & (key < length), key, length - 1).to(tl.int64)
            prefetch_rows(k_row + key * stride_kt, DP)
            prefetch_rows(v_row + key * stride_vt, BLOCK_DV)
        await_previous()
    if begin < end:
        line_of_row = line_of(tl.maximum(position, 0), length, length_q, QUERY_BLOCK)
        value_dims = tl.arange(0, BLOCK_DV)[None, :]
        mask_row = key_mask + batch * stride_mb + start.to(tl.int64) * stride_mt
        bias_row = key_bias + batch * stride_bb + head * stride_bh + start.to(tl.int64) * stride_bt
        lists = blocks + pair * (LINES * BUDGET)

        highest = tl.full([M], LOWEST_SCORE, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, BLOCK_DV], tl.float32)
        for step in range(begin * STEPS, end * STEPS):
            visit = step // STEPS
            line = first_line + visit // width
            entry = visit % width
            last = last_of_line(line, length, length_q, QUERY_BLOCK)
            listed_count = last // BLOCK - first_block(last, window, BLOCK, HAS_WINDOW) + 1
            listed = entry < tl.minimum(listed_count, BUDGET)
            entry_block = tl.load(lists + line * BUDGET + entry, mask=sparse & listed, other=0)
            block = tl.where(sparse, entry_block, first + entry)
            until = tl.where(sparse & (listed == 0), 0, length)  # past the end of a list there is nothing
            key = block * BLOCK + step % STEPS * STEP_KEYS + tl.arange(0, STEP_KEYS)
            there = key < until
            k_at = k_row + key.to(tl.int64)[None, :] * stride_kt + dims[:, None]
            keys = tl.load(k_at, mask=there[None, :] & (dims < D)[:, None], other=0.0)  # [DP, STEP_KEYS]
            v_at = v_row + key.to(tl.int64)[:, None] * stride_vt + value_dims
            values = tl.load(v_at, mask=there[:, None] & (value_dims < VALUE_DIM), other=0.0)  # [STEP_KEYS, DV]
            scores = tl.dot(queries, keys, input_precision=PRECISION)  # [M, STEP_KEYS]
            if HAS_SOFTCAP:
                scores = cap_products(scores, cap_log2)
            if HAS_BIAS:
                scores += load_key_bias(bias_row + key.to(tl.int64) * stride_bt, scale_log2, there)[None, :]
            valid = there[None, :] & (real & ((sparse == 0) | (line_of_row == line)))[:, None]
            if HAS_KEY_MASK:
                valid &= (tl.load(mask_row + key.to(tl.int64) * stride_mt, mask=there, other=0) != 0)[None, :]
            scores = mask_scores(scores, key[None, :], position[:, None], window, valid, True, HAS_WINDOW)
            weights, highest, total, decay = online_softmax(scores, scale_log2, highest, total, True, False, 1)
            acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)

        empty = total == 0.0
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        log_sum = tl.where(empty, float("-inf"), highest + tl.log2(total))
        tl.store(part_lse + out_row, log_sum, mask=write)
        to = part_out + out_row[:, None] * VALUE_DIM + value_dims
        tl.store(to, acc, mask=write[:, None] & (value_dims < VALUE_DIM))
    else:
        tl.store(part_lse + out_row, tl.full([M], float("-inf"), tl.float32), mask=write)


@triton.jit(do_not_specialize=["length_q", "splits"])
def _decode_merge_kernel(
    part_out,
    part_lse,
    sinks,  # [Hq], HAS_SINKS only
    out,  # [B, Lq, Hq, VALUE_DIM]
    lse,  # float32 [B, Hq, Lq]
    heads,  # query heads
    length_q,
    splits,
    VALUE_DIM: tl.constexpr,
    MOST: tl.constexpr,  # a power of two, at least `splits`
    DIMS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a query, head and DIMS numbers of the output; parts without a key have no output."""
    row = tl.program_id(0).to(tl.int64)
    token = (row % length_q).to(tl.int32)
    head = row // length_q % heads
    batch = row // length_q // heads
    split = tl.arange(0, MOST)
    if DEPENDENT:
        await_previous()
    parts = tl.load(part_lse + row * splits + split, mask=split < splits, other=float("-inf"))
    highest = tl.max(parts, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * (1.0 / LN_2)
        highest = tl.maximum(highest, sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(parts - shift)
    total = tl.sum(weight, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - shift)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)[None, :]
    at = part_out + (row * splits + split)[:, None] * VALUE_DIM + dims
    part = tl.load(at, mask=(weight > 0.0)[:, None] & (dims < VALUE_DIM), other=0.0)  # [MOST, DIMS]
    result = tl.sum(weight[:, None] * part, 0) / tl.where(total == 0.0, 1.0, total)
    number = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    to = out + ((batch * length_q + token) * heads + head) * VALUE_DIM + number
    tl.store(to, result.to(out.dtype.element_ty), mask=number < VALUE_DIM)
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), (highest + tl.log2(total)) * LN_2))


def decode_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    rows: DecodeRows,
    key_mask: Tensor | None,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    window: int | None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries of every row over its valid keys, or over their listed blocks.

    Args:
        q: ``[B, Hq, Lq, D]``, last stride 1, as for `k` and `v`.
        k: ``[B, Hkv, C, D]``; only valid keys are read.
        v: ``[B, Hkv, C, Dv]``.
        blocks: the lists from `decode_select`; those of rows with fewer than `dense_len` keys are not read.
        rows: where the rows' keys lie.
        key_mask: bool ``[B, C]``: False hides a key; None: no key is hidden.
        geometry: the block geometry.
        scale: softmax scale.
        dense_len: rows with fewer keys are dense.
        window: sliding window in keys, or None.
        key_bias: floating ``[B or 1, Hkv or 1, C]``, added to the capped scores, or None.
        sinks: floating ``[Hq]``: logits without a value that join every row's softmax, or None.
        softcap: scores ``x`` become ``softcap * tanh(x / softcap)``; 0: no cap.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype, which lies in memory as ``[B, Lq, Hq, Dv]``, and the log-sum-exp, float32
        ``[B, Hq, Lq]``, which counts the sink in. A query without a visible key gives 0, and -inf or its sink.
    """
    g = geometry
    batch, heads, capacity = k.shape[:3]
    heads_q, dim, value_dim = int(q.shape[1]), int(q.shape[3]), int(v.shape[3])
    padded, padded_value = (padded_dim(size) for size in (dim, value_dim))
    shape = DecodeShape.choose(heads_q // int(heads), int(q.shape[2]), g.query_block, q.element_size())
    launch = config_for(DecodeConfig, "decode", q, max(padded, padded_value))
    programs = batch * heads * shape.tiles
    available = multiprocessors(q.device)
    splits = (available * launch.programs + programs - 1) // programs
    splits = torch.sym_min(splits, torch.sym_max(_MANY_SPLITS, available // programs))
    splits = torch.sym_max(1, torch.sym_min(MAX_SPLITS, splits))
    count = batch * heads_q * shape.length_q
    part_out = torch.empty(count * splits, value_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(count * splits, dtype=torch.float32, device=q.device)
    out = q.new_empty(batch, shape.length_q, heads_q, value_dim)
    lse = q.new_empty(batch, heads_q, shape.length_q, dtype=torch.float32)
    wrap_triton(_decode_attention_kernel)[(splits, batch * heads, shape.tiles)](
        *rows.arguments,
        q,
        k,
        v,
        blocks,
        blocks if key_mask is None else key_mask,
        blocks if key_bias is None else key_bias,
        part_out,
        part_lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if key_mask is None else key_mask.stride()),
        *((0, 0, 0) if key_bias is None else key_bias.expand(k.shape[:3]).stride()),
        *score_unit(scale, softcap),
        heads,
        capacity,
        shape.length_q,
        dense_len,
        UNBOUNDED if window is None else window,
        splits,
        G=shape.group,
        GP=shape.padded_group,
        TOKENS=shape.tokens,
        LINES=shape.lines,
        QUERY_BLOCK=g.query_block,
        D=dim,
        DP=padded,
        VALUE_DIM=value_dim,
        BLOCK_DV=padded_value,
        BLOCK=g.block_size,
        INIT=g.init_blocks,
        LOCAL=g.local_blocks,
        BUDGET=g.selected_blocks,
        STEP_KEYS=min(g.block_size & -g.block_size, launch.step_keys),
        HAS_KEY_MASK=key_mask is not None,
        HAS_BIAS=key_bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        HAS_WINDOW=window is not None,
        HAS_STARTS=rows.starts is not None,
        PRECISION=precision(q),
        **dependent_launch(_decode_attention_kernel, q),
        AHEAD=launch.prefetch_visits,
        num_warps=launch.warps(launch.attend_warps, shape.columns),
        num_stages=launch.attend_stages,
    )
    dims = min(_MERGED_DIMS, padded_value)
    wrap_triton(_decode_merge_kernel)[(count, triton.cdiv(value_dim, dims))](
        part_out,
        part_lse,
        part_lse if sinks is None else sinks.contiguous(),
        out,
        lse,
        heads_q,
        shape.length_q,
        splits,
        VALUE_DIM=value_dim,
        MOST=MAX_SPLITS,
        DIMS=dims,
        HAS_SINKS=sinks is not None,
        **dependent_launch(_decode_merge_kernel, q),
        num_warps=4,
    )
    return out.transpose(1, 2), lse
