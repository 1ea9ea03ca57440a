"""Decode block selection by token scores: index keys, the blocks' largest scores, their sum over heads; see `select`.

The first kernel stores the index keys of new tokens and takes, for every query head and block, the largest score of a
token, and a partial log-sum-exp of them; the second adds a group's heads up. Each index key is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..index_keys import FORMS, KEY_FORM, head_channels, place_channels, store_index_keys, stored_bits
from ..index_keys import unpack_index_keys as unpack
from ..launch import wrap_triton
from ..pdl import await_previous, dependent_launch
from ..score_terms import cap_products
from ..tile_ops import LOWEST_SCORE, mask_scores
from .rows import IndexState, clip_row, last_of_line, line_of, scored_range
from .select import DecodeStep, join_normalisers
from .topk import rank_when_last

DECODE_SCORED = tl.constexpr(8)
"""Blocks scored at a time; their tokens lie side by side in a product, so that a thread holds some of each."""

DECODE_STORED = tl.constexpr(64)
"""Index keys stored at a time."""


@triton.jit(
    do_not_specialize=[
        "channel_stride",
        "capacity",
        "chunks",
        "num_blocks",
        "length_q",
        "tiles",
        "dense_len",
        "window",
    ]
)
def decode_tokens_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    q,
    k,
    ki,
    ki_scale,  # float32 [B, Hkv, C], keys of 8 bits only
    filled,
    channels,
    key_mask,  # bool [B, C], HAS_KEY_MASK only
    parts,  # float32 [B * Hkv, chunks, columns of all tiles]
    best,  # float32 [B * Hkv, columns of all tiles, num_blocks]
    arrivals,  # int32 [B * Hkv], set to 0 for the next kernel
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_ib,
    stride_ih,
    stride_it,
    stride_sb,
    stride_sh,
    stride_st,
    stride_mb,
    stride_mt,
    channel_stride,
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
    QUERY_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    KP: tl.constexpr,
    RUNS: tl.constexpr,
    CODE: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    OWNED: tl.constexpr,
    STEP_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program owns OWNED blocks: it stores the index keys of their new tokens, and scores all of their tokens."""
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    cap_log2 = tl.cast(cap_log2, tl.float32)
    C: tl.constexpr = TOKENS * GP
    STEPS: tl.constexpr = BLOCK // STEP_TOKENS
    KEYS: tl.constexpr = DECODE_SCORED * STEP_TOKENS
    chunk = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    if DEPENDENT:
        await_previous()
    row_end = tl.load(lengths + batch * lengths_stride)
    start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    if chunk == 0:
        tl.store(arrivals + pair, 0)
    # The queries' own keys are new in any case, also where the cache was cut back since the last step.
    old = tl.maximum(tl.minimum(tl.load(filled + batch), length - length_q), 0)
    dims = tl.arange(0, KP)
    channel = head_channels(channels + head * channel_stride, dims, KEPT, RUNS, CODE)
    begin = chunk * (OWNED * BLOCK)
    end = tl.minimum(begin + OWNED * BLOCK, length)
    slot = start.to(tl.int64)
    k_row = k + batch * stride_kb + head * stride_kh + slot * stride_kt
    ki_row = stored_bits(ki, FORM) + batch * stride_ib + head * stride_ih + slot * stride_it
    scale_row = ki_scale + batch * stride_sb + head * stride_sh + slot * stride_st
    for position in range(tl.maximum(begin, old), end, DECODE_STORED):
        key = position + tl.arange(0, DECODE_STORED)
        there = key < end
        numbers = there[:, None] & (dims < KEPT)[None, :]
        wide = key.to(tl.int64)
        keys = tl.load(k_row + wide[:, None] * stride_kt + channel[None, :], mask=numbers, other=0.0)
        to = ki_row + wide[:, None] * stride_it + dims[None, :]
        store_index_keys(to, scale_row + wide * stride_st, keys, there, numbers, FORM)
    tl.debug_barrier()

    used = (length >= dense_len) & ((length - 1) // BLOCK >= BUDGET) & (begin < length)
    columns = tl.arange(0, C)
    member = columns % GP
    lane = tl.arange(0, DECODE_SCORED)
    number = tl.arange(0, KEYS)
    number = number % DECODE_SCORED * BLOCK + number // DECODE_SCORED  # of the keys of a step, from its first on
    mask_row = key_mask + batch * stride_mb + slot * stride_mt
    q_row = q + batch * stride_qb + head * G * stride_qh
    groups = (end - begin + DECODE_SCORED * BLOCK - 1) // (DECODE_SCORED * BLOCK)
    for tile in range(tl.where(used, tiles, 0)):
        token = tile * TOKENS + columns // GP
        place = length - length_q + token
        real = (token < length_q) & (member < G) & (place >= 0)
        q_at = q_row + (member.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qt)[:, None] + channel[None, :]
        queries = tl.load(q_at, mask=real[:, None] & (dims < KEPT)[None, :], other=0.0)  # [C, KP]
        line = line_of(tl.maximum(place, 0), length, length_q, QUERY_BLOCK)
        sees = last_of_line(line, length, length_q, QUERY_BLOCK)  # [C]
        best_rows = best + ((pair * tiles + tile) * C + columns)[:, None] * num_blocks + lane[None, :]
        top = tl.full([C, DECODE_SCORED], float("-inf"), tl.float32)
        highest = tl.full([C, DECODE_SCORED], LOWEST_SCORE, tl.float32)
        total = tl.zeros([C, DECODE_SCORED], tl.float32)
        for step in range(groups * STEPS):
            group = step // STEPS * DECODE_SCORED
            seen_key = begin + group * BLOCK + step % STEPS * STEP_TOKENS + number
            inside = seen_key < length
            far = seen_key.to(tl.int64)
            stored_at = ki_row + far[None, :] * stride_it + dims[:, None]
            stored = tl.load(stored_at, mask=inside[None, :] & (dims < KEPT)[:, None], other=0.0)
            scores = tl.dot(queries, unpack(stored, queries.dtype, FORM), input_precision=PRECISION)  # [C, KEYS]
            if FORM != KEY_FORM:
                scores = scores * tl.load(scale_row + far * stride_st, mask=inside, other=0.0)[None, :]
            if HAS_KEY_MASK:
                inside &= tl.load(mask_row + far * stride_mt, mask=inside, other=0) != 0
            scores = mask_scores(scores, seen_key[None, :], sees[:, None], window, inside[None, :], True, HAS_WINDOW)
            top = tl.maximum(top, tl.max(tl.reshape(scores, [C, STEP_TOKENS, DECODE_SCORED]), 1))
            if step % STEPS == STEPS - 1:
                if HAS_SOFTCAP:  # which ascends: that of the largest score is the largest
                    top = tl.where(top == float("-inf"), top, cap_products(top, cap_log2))
                top = top * scale_log2
                block = chunk * OWNED + group
                tl.store(best_rows + block, top, mask=(block + lane < num_blocks)[None, :])
                raised = tl.maximum(highest, top)
                total = total * tl.exp2(highest - raised) + tl.exp2(top - raised)
                highest = raised
                top = tl.full([C, DECODE_SCORED], float("-inf"), tl.float32)
        norm = tl.max(highest, 1)
        sums = tl.sum(total * tl.exp2(highest - norm[:, None]), 1)
        at = parts + (pair * chunks + chunk) * tiles * C + tile * C + columns
        tl.store(at, tl.where(sums > 0.0, norm + tl.log2(sums), float("-inf")))


@triton.jit(do_not_specialize=["capacity", "chunks", "num_blocks", "dense_len", "window", "length_q", "tiles"])
def _decode_sum_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    best,  # float32 [B * Hkv, columns of all tiles, num_blocks]
    parts,  # float32 [B * Hkv, chunks, columns of all tiles]
    keys,  # int32 [B * Hkv * LINES, num_blocks]
    arrivals,  # int32 [B * Hkv], 0 at the start; RANKS only, as the two that follow
    blocks,  # int32 [B * Hkv, BUDGET]
    filled,
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
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    OWNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
    RANKED: tl.constexpr,  # blocks that ranking keeps in registers
    WIDTH: tl.constexpr,  # the next power of two of BUDGET
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Scores of BLOCKS blocks for the lines of a tile, or for one line of several queries; RANKS: ranked, too."""
    C: tl.constexpr = TOKENS * GP
    SHARED: tl.constexpr = QUERY_BLOCK > 1
    ROWS: tl.constexpr = 1 if SHARED else TOKENS  # lines of one program
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
        queries = tl.maximum(base, 0) // QUERY_BLOCK + tl.program_id(2)
        first_token = tl.maximum(queries * QUERY_BLOCK - base, 0)
        end_token = tl.minimum((queries + 1) * QUERY_BLOCK - base, length_q)
    else:
        last = base + line
        exists = (line < length_q) & (last >= 0)
        first_token = tl.program_id(2) * TOKENS
        end_token = tl.minimum(first_token + TOKENS, length_q)
    low, high, _ = scored_range(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
    high = tl.where(length >= dense_len, high, low)
    exists = exists & (high > low)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    final = tl.max(tl.where(exists, high, 0), 0)
    if DEPENDENT:
        await_previous()
    if (tl.program_id(0) * BLOCKS < final) & ((tl.program_id(0) + 1) * BLOCKS > tl.min(low, 0)):
        parts_row = parts + pair * chunks * tiles * C
        norm_chunks = (length + OWNED * BLOCK - 1) // (OWNED * BLOCK)
        columns = tl.arange(0, C)
        member = columns % GP
        score = tl.zeros([BLOCKS, ROWS], tl.float32)
        largest = tl.full([BLOCKS, ROWS], float("-inf"), tl.float32)
        for begin in range(first_token, end_token, TOKENS):
            token = begin + columns // GP
            real = (token < end_token) & (member < G) & (base + token >= 0)
            column = token * GP + member
            norm = join_normalisers(parts_row, norm_chunks, tiles * C, column, real)  # [C]
            at = best + (pair * tiles * C + column)[None, :] * num_blocks + block[:, None]
            some = tl.load(at, mask=real[None, :] & (block < final)[:, None], other=float("-inf"))  # [BLOCKS, C]
            weights = tl.exp2(some - norm[None, :])
            score += tl.sum(tl.reshape(weights, [BLOCKS, ROWS, C // ROWS]), 2)
            largest = tl.maximum(largest, tl.max(tl.reshape(some, [BLOCKS, ROWS, C // ROWS]), 2))
        key = tl.where((largest > LOWEST_SCORE) & (score >= 0.0), score.to(tl.int32, bitcast=True) + 1, 0)
        to = keys + (pair * LINES + line)[None, :] * num_blocks + block[:, None]
        inside = (block[:, None] >= low[None, :]) & (block[:, None] < high[None, :])
        tl.store(to, key, mask=inside & exists[None, :])
    if RANKS:
        rank_when_last(
            keys + pair * num_blocks, blocks + pair * BUDGET, filled + batch, arrivals + pair, head == 0,
            length, dense_len, window, BLOCK, INIT, LOCAL, BUDGET, BLOCKS, RANKED, WIDTH, HAS_WINDOW,
        )  # fmt: skip


def decode_select_tokens(step: DecodeStep, state: IndexState) -> Tensor:
    """Bring the index keys up to date, and list the blocks that every line of every sparse row visits.

    Returns:
        As `select.decode_select`.
    """
    q, k, g, shape, launch = step.q, step.k, step.geometry, step.shape, step.launch
    heads, capacity = k.shape[1:3]
    channels = place_channels(g, q)
    ki = state.ki
    scales = q if state.ki_scale is None else state.ki_scale
    chunks = (step.num_blocks + launch.token_blocks - 1) // launch.token_blocks
    parts = step.parts(chunks)
    count = step.pairs * shape.tiles * shape.columns
    best = torch.empty(count * step.num_blocks, dtype=torch.float32, device=q.device)
    keys, arrivals, blocks = step.lists()
    wrap_triton(decode_tokens_kernel)[(chunks, step.pairs)](
        *step.rows.arguments,
        q,
        k,
        ki,
        scales,
        state.filled,
        channels.table,
        q if step.key_mask is None else step.key_mask,
        parts,
        best,
        arrivals,
        *q.stride()[:3],
        *k.stride()[:3],
        *ki.stride()[:3],
        *scales.stride()[:3],
        *((0, 0) if step.key_mask is None else step.key_mask.stride()),
        channels.stride,
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
        **step.scoring,
        **channels.constants,
        FORM=FORMS[g.score_dtype],
        HAS_KEY_MASK=step.key_mask is not None,
        HAS_WINDOW=step.window is not None,
        OWNED=launch.token_blocks,
        STEP_TOKENS=min(launch.token_keys // DECODE_SCORED.value, g.block_size & -g.block_size),
        **dependent_launch(decode_tokens_kernel, q),
        num_warps=launch.warps(launch.compress_warps, shape.columns),
        num_stages=launch.token_stages,
    )
    wrap_triton(_decode_sum_kernel)[step.score_grid()](
        *step.rows.arguments,
        best,
        parts,
        keys,
        arrivals,
        blocks,
        state.filled,
        heads,
        capacity,
        chunks,
        step.num_blocks,
        shape.length_q,
        shape.tiles,
        step.dense_len,
        step.bound,
        **step.common,
        **step.products,
        **step.ranking,
        OWNED=launch.token_blocks,
        BLOCKS=launch.blocks,
        RANKS=step.ranks_at_once,
        **dependent_launch(_decode_sum_kernel, q),
        num_warps=launch.warps(launch.score_warps, shape.columns),
    )
    step.rank(keys, blocks, state.filled)
    return blocks
