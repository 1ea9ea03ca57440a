"""Token scores: a block's largest score of a token over a few channels, a scorer of `prefill.select`.

For every query head ``m``, the maximum of ``scale * q.k`` over a block's visible tokens, and over all blocks the
log-sum-exp ``z`` of ``m``; a block's score is the sum of ``exp(m - z)`` over a group's heads.

Eight blocks are scored at a time, and of each as many tokens at a step as make one product of all. Keys are loaded in
such an order that a thread holds all of a block's scores for its rows: it takes their maximum without an exchange. The
maxima go to scratch memory in float32, from where they are read once more when ``z`` is known; a second product with
its maxima would cost more than these bytes.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import BlockGeometry
from ..configs import SelectionConfig
from ..index_keys import FORMS, KEY_FORM, Channels, IndexKeys, head_channels, place_channels, stored_bits
from ..index_keys import unpack_index_keys as unpack
from ..launch import wrap_triton
from ..score_terms import cap_products
from ..tile_ops import LOWEST_SCORE, mask_scores
from ..tile_tables import TileLists, TilePlan, TileShape
from .select import (
    Constants,
    PanelScorer,
    block_keys,
    clear_marks,
    list_panel,
    panel_range,
    panel_scratch,
    select_blocks,
)
from .topk import scored_range

SCORED_BLOCKS = tl.constexpr(8)
"""Blocks scored at a time: in the layout of a product one thread holds every eighth element of a row."""


@triton.jit(
    do_not_specialize=[
        "num_panels",
        "slots",
        "channel_stride",
        "mask_batch_stride",
        "num_blocks",
        "capacity",
        "dense_len",
        "window",
    ]
)
def _select_tokens_kernel(
    q,
    ki,  # as in `IndexKeys`, whose memory behind the keys is read
    scales,
    channels,
    key_mask,  # bool [B, Lk], HAS_KEY_MASK only
    panels,
    scratch,
    list_blocks,
    list_tokens,
    list_counts,
    stride_qb,
    stride_qh,
    stride_qt,
    scale_log2,
    cap_log2,
    num_panels,
    heads_kv,
    slots,  # keys of a row
    channel_stride,
    mask_batch_stride,
    mask_token_stride,
    num_blocks,  # columns of a row of keys in scratch, a multiple of ROW_MULTIPLE
    capacity,
    dense_len,
    window,
    G: tl.constexpr,
    GP: tl.constexpr,
    T: tl.constexpr,
    PANEL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    KEPT: tl.constexpr,
    KP: tl.constexpr,
    RUNS: tl.constexpr,
    CODE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    READ: tl.constexpr,
    RG: tl.constexpr,
    PEAKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FETCHED: tl.constexpr,
    LISTED: tl.constexpr,
    FILL: tl.constexpr,  # 0
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    cap_log2 = tl.cast(cap_log2, tl.float32)
    R: tl.constexpr = PANEL // QUERY_BLOCK  # rows: queries, or groups of QUERY_BLOCK queries, with one selection each
    CHUNKS: tl.constexpr = PANEL * GP // C  # products that cover the panel's columns, tokens x heads
    PIECES: tl.constexpr = CHUNKS if CHUNKS < R else R  # of these, so many hold rows of their own
    PARTS: tl.constexpr = CHUNKS // PIECES  # and so many add up to the same rows
    PT: tl.constexpr = PANEL // PIECES
    PR: tl.constexpr = R // PIECES
    W: tl.constexpr = PT if PT < C else C  # columns of one head, which the second pass reads at once
    STEPS: tl.constexpr = BLOCK // TOKENS
    KEYS: tl.constexpr = SCORED_BLOCKS * TOKENS
    SPAN: tl.constexpr = SCORED_BLOCKS * BLOCK

    slots_at, dense_at, norms_at, keys_at, marks_at, best_at = panel_scratch(
        scratch, num_blocks, T, PANEL, QUERY_BLOCK, RG, CANDIDATES, C, C
    )
    ki = stored_bits(ki, FORM)
    columns = tl.arange(0, C)
    dims = tl.arange(0, KP)
    lane = tl.arange(0, SCORED_BLOCKS)
    number = tl.arange(0, KEYS)
    number = number % SCORED_BLOCKS * BLOCK + number // SCORED_BLOCKS  # of the keys of a step, from its first on
    places = number[None, :] * KP + dims[:, None]
    for item in range(tl.program_id(0), num_panels * heads_kv, PROGRAMS):
        panel = num_panels - 1 - item // heads_kv  # late panels have most to do: they go first
        head = item % heads_kv
        batch, query, begin, end, position, key_begin, length, scored, low, high = panel_range(
            panels, panel, dense_len, window, PANEL, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
        )
        clear_marks(marks_at, num_blocks, low, high, T, PANEL, QUERY_BLOCK, LISTED)
        head_q = q + batch * stride_qb + head.to(tl.int64) * G * stride_qh
        channel = head_channels(channels + head * channel_stride, dims, KEPT, RUNS, CODE)
        first_key = (batch * heads_kv + head) * slots + key_begin
        mask_row = key_mask + batch * mask_batch_stride + key_begin.to(tl.int64) * mask_token_stride
        # What the first and the last of the panel's queries see.
        least = tl.minimum(position + begin // QUERY_BLOCK * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
        most = tl.minimum(position + (end - 1) // QUERY_BLOCK * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
        first = begin * 0
        if HAS_WINDOW:
            first = tl.maximum(least - window + 1, 0) // SPAN
        until = tl.where(scored, most // SPAN + 1, first)
        for chunk in range(CHUNKS):
            piece = chunk // PARTS
            part = chunk % PARTS
            token = piece * PT + (part * C + columns) % PT
            member = (part * C + columns) // PT
            real = (token >= begin) & (token < end) & (member < G)
            at = head_q + member.to(tl.int64) * stride_qh + (query + token).to(tl.int64) * stride_qt
            q_tile = tl.load(at[:, None] + channel[None, :], mask=real[:, None] & (dims < KEPT)[None, :], other=0.0)
            sees = tl.minimum(position + token // QUERY_BLOCK * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
            best = tl.full([C, SCORED_BLOCKS], float("-inf"), tl.float32)
            highest = tl.full([C, SCORED_BLOCKS], LOWEST_SCORE, tl.float32)
            total = tl.zeros([C, SCORED_BLOCKS], tl.float32)
            for step in range(first * STEPS, until * STEPS):
                start = step // STEPS * SPAN + step % STEPS * TOKENS
                keys = unpack(tl.load(ki + (first_key + start) * KP + places), q_tile.dtype, FORM)  # [KP, KEYS]
                scores = tl.dot(q_tile, keys, input_precision=PRECISION)  # [C, KEYS]
                if FORM != KEY_FORM:
                    scores = scores * tl.load(scales + first_key + start + number)[None, :]
                key = start + number
                if (step // STEPS + 1) * SPAN > least + 1:
                    scores = mask_scores(scores, key[None, :], sees[:, None], window, True, True, False)
                if HAS_WINDOW and step // STEPS * SPAN <= most - window:
                    scores = mask_scores(scores, key[None, :], sees[:, None], window, True, False, True)
                if HAS_KEY_MASK:
                    valid = tl.load(mask_row + key.to(tl.int64) * mask_token_stride, mask=key < length, other=0) != 0
                    scores = mask_scores(scores, 0, 0, 0, valid[None, :], False, False)
                best = tl.maximum(best, tl.max(tl.reshape(scores, [C, TOKENS, SCORED_BLOCKS]), 1))
                if step % STEPS == STEPS - 1:
                    if HAS_SOFTCAP:  # which ascends: that of the largest score is the largest
                        best = tl.where(best == float("-inf"), best, cap_products(best, cap_log2))
                    best = best * scale_log2
                    group = step // STEPS * SCORED_BLOCKS
                    if group < high:
                        tl.store(best_at + group * C + columns[:, None] * SCORED_BLOCKS + lane[None, :], best)
                    raised = tl.maximum(highest, best)
                    total = total * tl.exp2(highest - raised) + tl.exp2(best - raised)
                    highest = raised
                    best = tl.full([C, SCORED_BLOCKS], float("-inf"), tl.float32)
            norm = tl.max(highest, 1)
            total_row = tl.sum(total * tl.exp2(highest - norm[:, None]), 1)
            visible = real & (total_row > 0.0)
            tl.store(norms_at + columns, tl.where(visible, norm + tl.log2(total_row), float("inf")))
            tl.debug_barrier()

            rows = piece * PR + tl.arange(0, PR)
            rows_begin, rows_end, _wanted = scored_range(
                rows, position, begin, end, length, window, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
            )
            for start in range(low // SCORED_BLOCKS * SCORED_BLOCKS, high, READ):
                block = start + tl.arange(0, READ)
                inside = block < high
                block_at = best_at + block // SCORED_BLOCKS * (SCORED_BLOCKS * C) + block % SCORED_BLOCKS
                weights = tl.zeros([W, READ], tl.float32)
                largest = tl.full([W, READ], float("-inf"), tl.float32)
                for line in range(C // W):
                    column = line * W + tl.arange(0, W)
                    normaliser = tl.load(norms_at + column)
                    some_at = block_at[None, :] + column[:, None] * SCORED_BLOCKS
                    some = tl.load(some_at, mask=inside[None, :], other=float("-inf"))
                    weights += tl.exp2(some - normaliser[:, None])
                    if HAS_KEY_MASK:
                        largest = tl.maximum(largest, some)
                score = tl.sum(tl.reshape(weights, [PR, W // PR, READ]), 1)  # [PR, READ]
                to = keys_at + rows[:, None] * num_blocks + block[None, :]
                if PARTS > 1:
                    earlier = tl.load(to, mask=inside[None, :] & (part > 0), other=0)
                    score += earlier.to(tl.float32, bitcast=True)
                found = score
                if HAS_KEY_MASK:  # a scored block of which no token is visible
                    seen = tl.max(tl.reshape(largest, [PR, W // PR, READ]), 1) > LOWEST_SCORE
                    found = tl.where(seen, score, -1.0)
                result = block_keys(found, block[None, :], rows_begin[:, None], rows_end[:, None], HAS_WINDOW)
                if PARTS > 1:
                    result = tl.where(part == PARTS - 1, result, score.to(tl.int32, bitcast=True))
                tl.store(to, result, mask=inside[None, :])
            tl.debug_barrier()
        list_panel(
            slots_at, dense_at, keys_at, marks_at, num_blocks, list_blocks, list_tokens, list_counts, capacity,
            panel, head, heads_kv, begin, end, position, length, window, scored, low, high,
            T, PANEL, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW, RG, PEAKS, CANDIDATES, FETCHED, LISTED, FILL,
        )  # fmt: skip
        tl.debug_barrier()


def _constants(
    shape: TileShape, geometry: BlockGeometry, config: SelectionConfig, *, channels: Channels, has_key_mask: bool
) -> Constants:
    columns = min(config.columns, shape.panel_tokens * shape.padded_group)
    tokens = min(config.windows // SCORED_BLOCKS.value, geometry.block_size & -geometry.block_size)
    chunks = shape.panel_tokens * shape.padded_group // columns
    wide = min(columns, shape.panel_tokens // min(chunks, shape.panel_tokens // geometry.query_block))
    return {
        **channels.constants,
        "FORM": FORMS[geometry.score_dtype],
        "HAS_KEY_MASK": has_key_mask,
        "C": columns,
        "TOKENS": tokens,
        "READ": max(16, min(64, 2048 // wide)),
    }


def _scratch(constants: Constants) -> tuple[int, int]:
    """A normaliser a column, and a column's largest score in every block."""
    return constants["C"], constants["C"]


def token_scorer(channels: Channels, has_key_mask: bool) -> PanelScorer:
    """The scorer of some channels."""
    constants = partial(_constants, channels=channels, has_key_mask=has_key_mask)
    return PanelScorer("tokens", constants, _scratch, "select_tokens", channels.padded)


def select_tiles(
    q: Tensor,
    keys: IndexKeys,
    plan: TilePlan,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    length_k: int,
    heads_kv: int,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
) -> TileLists:
    """Blocks that every tile visits by token scores: `select_blocks` with what `index_keys` returned as `keys`.

    Where there is a `key_mask`, bool ``[B, Lk]``, keys that it hides count nowhere.
    """
    channels = place_channels(geometry, q)
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    return select_blocks(
        token_scorer(channels, key_mask is not None),
        wrap_triton(_select_tokens_kernel),
        q,
        (
            keys.keys,
            q if keys.scales is None else keys.scales,
            channels.table,
            plan.panels if key_mask is None else key_mask,
        ),
        (length_k, channels.stride, *mask_strides),
        plan,
        heads_kv=heads_kv,
        geometry=geometry,
        scale=scale,
        dense_len=dense_len,
        length_k=length_k,
        window=window,
        softcap=softcap,
    )
