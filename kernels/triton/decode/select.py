"""Decode block selection: compression and normalisers, block scores, top-k (arXiv 2509.24663, section 3.2).

Two kernels for steps of one token over few heads, where the last program that scores a row's blocks also ranks them;
else a third kernel ranks. Grids follow from the cache's capacity; programs beyond a row's length exit at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import COARSE_FACTOR
from ..launch import wrap_triton
from ..pdl import await_previous, dependent_launch, prefetch_rows
from ..score_terms import cap_products
from ..tile_ops import LOWEST_SCORE, online_softmax
from ..tile_tables import padded_dim
from .compress import decode_compress_kernel, load_columns
from .importance import fill_lists, pool_importance
from .rows import (
    DecodeState,
    clip_row,
    count_windows,
    last_of_line,
    line_of,
    scored_range,
)
from .step import DecodeStep
from .topk import rank_when_last

DECODE_PARTS = tl.constexpr(32)
"""Partial normalisers that are added at once."""


@triton.jit
def join_normalisers(
    parts_row,
    count,
    stride,
    column,  # [C]
    real,  # [C]
):
    """Base-2 log-sum-exp of columns over all chunks; +inf, which makes scores 0, where no key is visible."""
    highest = tl.full([column.shape[0]], LOWEST_SCORE, tl.float32)
    total = tl.zeros([column.shape[0]], tl.float32)
    for begin in range(0, count, DECODE_PARTS):
        chunk = begin + tl.arange(0, DECODE_PARTS)
        mask = (chunk < count)[:, None] & real[None, :]
        some = tl.load(parts_row + chunk[:, None] * stride + column[None, :], mask=mask, other=float("-inf"))
        _, highest, total, _ = online_softmax(some, 1.0, highest, total, True, False, 0)
    return tl.where(total > 0.0, highest + tl.log2(total), float("inf"))


@triton.jit(do_not_specialize=["capacity", "chunks", "num_blocks", "dense_len", "window", "length_q", "tiles"])
def _decode_score_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    q,
    k1,
    parts,  # float32 [B * Hkv, chunks, columns of all tiles]
    keys,  # int32 [B * Hkv * LINES, num_blocks]
    arrivals,  # int32 [B * Hkv], 0 at the start; RANKS only, as the two that follow
    blocks,  # int32 [B * Hkv, BUDGET]
    filled,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_1b,
    stride_1h,
    stride_1t,
    scale_log2,
    cap_log2,
    heads,
    capacity,
    chunks,
    num_blocks,
    length_q,
    tiles,
    dense_len,
    window,
    G: tl.constexpr,
    GP: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    NORM_KEYS: tl.constexpr,  # keys of one partial normaliser
    NORM_SIZE: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
    RANKED: tl.constexpr,  # blocks that ranking keeps in registers
    WIDTH: tl.constexpr,  # the next power of two of BUDGET
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Scores of BLOCKS blocks for the lines of a tile, or for one line of several queries.

    With RANKS, for rows of a single query, the last program of a row and head to arrive also ranks the blocks.
    """
    scale_log2 = tl.cast(scale_log2, tl.float32)
    cap_log2 = tl.cast(cap_log2, tl.float32)
    C: tl.constexpr = TOKENS * GP
    SHARED: tl.constexpr = QUERY_BLOCK > 1
    ROWS: tl.constexpr = 1 if SHARED else TOKENS  # lines of one program
    RATIO: tl.constexpr = BLOCK // STRIDE
    OVERLAP: tl.constexpr = KERNEL // STRIDE - 1  # windows of earlier blocks that reach into a block
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    row_end = tl.load(lengths + batch * lengths_stride)
    _start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    base = length - length_q
    line = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    if SHARED:
        last = last_of_line(line, length, length_q, QUERY_BLOCK)
        exists = (line_of(length - 1, length, length_q, QUERY_BLOCK) >= line) & (last >= 0)
    else:
        last = base + line
        exists = (line < length_q) & (last >= 0)
    low, high, _ = scored_range(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
    high = tl.where(length >= dense_len, high, low)
    exists = exists & (high > low)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    final = tl.max(tl.where(exists, high, 0), 0)
    k1_row = k1 + batch * stride_1b + head * stride_1h
    complete = count_windows(length, KERNEL, STRIDE)
    if DEPENDENT:
        # While keys are compressed: the windows of this program's blocks, of which all but the newest are there.
        for part in range(tl.where(tl.program_id(0) * BLOCKS < final, RATIO, 0)):
            index = tl.maximum(tl.minimum(block * RATIO + part, complete - 1), 0)
            prefetch_rows(k1_row + index.to(tl.int64) * stride_1t, DP)
        await_previous()
    if (tl.program_id(0) * BLOCKS < final) & ((tl.program_id(0) + 1) * BLOCKS > tl.min(low, 0)):
        q_row = q + batch * stride_qb + head * G * stride_qh
        parts_row = parts + pair * chunks * tiles * C
        norm_chunks = (count_windows(length, NORM_SIZE, NORM_STRIDE) + NORM_KEYS - 1) // NORM_KEYS
        columns = tl.arange(0, C)
        member = columns % GP
        dims = tl.arange(0, DP)[None, :]
        if SHARED:
            number = tl.maximum(base, 0) // QUERY_BLOCK + tl.program_id(2)
            first_token = tl.maximum(number * QUERY_BLOCK - base, 0)
            end_token = tl.minimum((number + 1) * QUERY_BLOCK - base, length_q)
        else:
            token = tl.program_id(2) * TOKENS + columns // GP
            real = (token < length_q) & (member < G) & (base + token >= 0)
            turned = load_columns(q_row, stride_qh, stride_qt, token, member, real, D, DP)
            norm = join_normalisers(parts_row, norm_chunks, tiles * C, token * GP + member, real)  # [C]
        pooled = tl.full([BLOCKS, ROWS], -1.0, tl.float32)
        for part in range(RATIO + OVERLAP):
            index = block * RATIO + (part - OVERLAP)
            known = (index >= 0) & (index < complete)
            at = k1_row + index.to(tl.int64)[:, None] * stride_1t + dims
            windows = tl.load(at, mask=known[:, None] & (dims < D), other=0.0)  # [BLOCKS, DP]
            if SHARED:
                score = tl.zeros([BLOCKS, 1], tl.float32)
                for begin in range(first_token, end_token, TOKENS):
                    token = begin + columns // GP
                    real = (token < end_token) & (member < G)
                    turned = load_columns(q_row, stride_qh, stride_qt, token, member, real, D, DP)
                    norm = join_normalisers(parts_row, norm_chunks, tiles * C, token * GP + member, real)
                    product = tl.dot(windows, turned, input_precision=PRECISION)
                    if HAS_SOFTCAP:
                        product = cap_products(product, cap_log2)
                    score += tl.sum(tl.exp2(product * scale_log2 - norm[None, :]), 1)[:, None]
            else:
                product = tl.dot(windows, turned, input_precision=PRECISION)  # [BLOCKS, C]
                if HAS_SOFTCAP:
                    product = cap_products(product, cap_log2)
                weights = tl.exp2(product * scale_log2 - norm[None, :])
                score = tl.sum(tl.reshape(weights, [BLOCKS, ROWS, GP]), 2)
            seen = known[:, None] & ((index * STRIDE + (KERNEL - 1))[:, None] <= last[None, :])
            pooled = tl.where(seen, tl.maximum(pooled, score), pooled)
        key = tl.where(pooled >= 0.0, pooled.to(tl.int32, bitcast=True) + 1, 0)
        to = keys + (pair * LINES + line)[None, :] * num_blocks + block[:, None]
        inside = (block[:, None] >= low[None, :]) & (block[:, None] < high[None, :])
        tl.store(to, key, mask=inside & exists[None, :])
    if RANKS:
        rank_when_last(
            keys + pair * num_blocks, blocks + pair * BUDGET, filled + batch, arrivals + pair, head == 0,
            length, dense_len, window, BLOCK, INIT, LOCAL, BUDGET, BLOCKS, RANKED, WIDTH, HAS_WINDOW,
        )  # fmt: skip


def decode_select(step: DecodeStep, state: DecodeState) -> Tensor:
    """Bring the state up to date, and list the blocks that every line of every sparse row visits.

    Returns:
        int32 ``[B * Hkv * lines, selected_blocks]``, as `_decode_select` lists them.
    """
    if not step.geometry.agnostic_blocks or step.key_bias is None or state.s1 is None:
        return _decode_select(step, state)
    pool_importance(step, step.key_bias, state.s1, state.filled)  # which the selection by query raises
    chosen = _decode_select(replace(step, geometry=step.geometry.query_aware), state)
    return fill_lists(step, chosen, state.s1)


def _decode_select(step: DecodeStep, state: DecodeState) -> Tensor:
    """Bring the compressed keys up to date, and list the blocks that every line of every sparse row visits.

    Returns:
        int32 ``[B * Hkv * lines, selected_blocks]``, in no particular order. How many entries a line has follows from
        its position: all candidates where they are not more than the budget, else the budget.
    """
    q, g, shape, launch = step.q, step.geometry, step.shape, step.launch
    heads, capacity, dim = step.k.shape[1:]
    exact = g.lse == "exact"
    owned = launch.chunk * COARSE_FACTOR  # fine windows of one program
    chunks = torch.sym_max(1, (state.k1.shape[2] + owned - 1) // owned)
    chunks = torch.sym_max(chunks, (state.k2.shape[2] + launch.chunk - 1) // launch.chunk)
    parts = step.parts(chunks)
    keys, arrivals, blocks = step.lists()
    windows = {"D": int(dim), "DP": padded_dim(int(dim)), "KERNEL": g.kernel_size, "STRIDE": g.kernel_stride}
    products = {**step.scoring, **windows}
    wrap_triton(decode_compress_kernel)[(chunks, step.pairs)](
        *step.rows.arguments,
        q,
        step.k,
        state.k1,
        state.k2,
        state.filled,
        parts,
        arrivals,
        *q.stride()[:3],
        *step.k.stride()[:3],
        *state.k1.stride()[:3],
        *state.k2.stride()[:3],
        *step.unit,
        heads,
        capacity,
        chunks,
        shape.length_q,
        shape.tiles,
        step.dense_len,
        **step.common,
        **products,
        EXACT=exact,
        CHUNK=launch.chunk,
        KEYS=launch.keys,
        **dependent_launch(decode_compress_kernel, q),
        num_warps=launch.warps(launch.compress_warps, shape.columns),
        num_stages=launch.compress_stages,
    )
    wrap_triton(_decode_score_kernel)[step.score_grid()](
        *step.rows.arguments,
        q,
        state.k1,
        parts,
        keys,
        arrivals,
        blocks,
        state.filled,
        *q.stride()[:3],
        *state.k1.stride()[:3],
        *step.unit,
        heads,
        capacity,
        chunks,
        step.num_blocks,
        shape.length_q,
        shape.tiles,
        step.dense_len,
        step.bound,
        **step.common,
        **products,
        **step.ranking,
        NORM_KEYS=owned if exact else launch.chunk,
        NORM_SIZE=g.kernel_size if exact else COARSE_FACTOR * g.kernel_size,
        NORM_STRIDE=g.kernel_stride if exact else COARSE_FACTOR * g.kernel_stride,
        BLOCKS=launch.blocks,
        RANKS=step.ranks_at_once,
        **dependent_launch(_decode_score_kernel, q),
        num_warps=launch.warps(launch.score_warps, shape.columns),
        num_stages=launch.score_stages,
    )
    step.rank(keys, blocks, state.filled)
    return blocks
