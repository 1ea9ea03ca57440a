"""Pooled block scores, those of InfLLM-V2 (arXiv 2509.24663, section 3.2): a scorer of `prefill.select`.

Softmax weights of compressed keys, normalised over the coarse ones (or exactly), summed over a group's heads, and their
maximum over the windows that reach into a block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import COARSE_FACTOR, BlockGeometry
from ..configs import SelectionConfig
from ..importance import rank_blocks
from ..launch import wrap_triton
from ..score_terms import cap_products
from ..tile_ops import LOWEST_SCORE, online_softmax
from ..tile_tables import TileLists, TilePlan, TileShape
from .compress import LEAD_SLOTS, CompressedKeys
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
from .topk import pool_scores, scored_range

SHARES = tl.constexpr(8)
"""Shares of a row of scores, every eighth element each: in the layout of a product one thread holds all of a share."""


@triton.jit
def _select_column(column, PANEL: tl.constexpr, GP: tl.constexpr, PIECES: tl.constexpr):
    """Token and head of a column. Tokens run fastest: then one thread holds all heads of its tokens and sums them."""
    tokens: tl.constexpr = PANEL // PIECES
    rest = column // tokens
    return rest // GP * tokens + column % tokens, rest % GP


@triton.jit
def _select_panel_normaliser(
    q_tile,
    keys,
    visible,  # [C] leading keys that a column sees
    scale_log2,
    cap_log2,
    D: tl.constexpr,
    DP: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 log-sum-exp of a column's visible keys; +inf where none is visible, which makes its scores 0."""
    dims = tl.arange(0, DP)
    places = tl.arange(0, BN)[None, :] * D + dims[:, None]
    most = tl.max(visible, 0)
    least = tl.min(visible, 0)
    origin = most.to(tl.int64) * 0
    # A maximum and a sum for each share of a row: threads exchange nothing until the loop has ended.
    highest = tl.full([C, SHARES], LOWEST_SCORE, tl.float32)
    total = tl.zeros([C, SHARES], tl.float32)
    for start in range(0, most, BN):
        index = start + tl.arange(0, BN)
        pointers = keys + (origin + start) * D + places
        tile = tl.load(pointers) if DP == D else tl.load(pointers, mask=(dims < D)[:, None], other=0.0)  # [DP, BN]
        scores = tl.dot(q_tile, tile, input_precision=PRECISION)  # [C, BN]
        if HAS_SOFTCAP:
            scores = cap_products(scores, cap_log2)
        if start + BN > least:
            scores = tl.where(index[None, :] < visible[:, None], scores, float("-inf"))
        shares = tl.reshape(scores, [C, BN // SHARES, SHARES])
        _, highest, total, _ = online_softmax(shares, scale_log2, highest, total, True, False, 1)
    norm = tl.max(highest, 1)
    norm += tl.log2(tl.sum(total * tl.exp2(highest - norm[:, None]), 1))
    return tl.where(visible > 0, norm, float("inf"))


@triton.jit(
    do_not_specialize=["num_panels", "slots1", "slots2", "slots3", "num_blocks", "capacity", "dense_len", "window"]
)
def _select_pooled_kernel(
    q,
    k1,  # as in `CompressedKeys`, whose memory around the slots is read
    k2,
    ranks,  # of `rank_blocks`, FILL only
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
    slots1,
    slots2,
    slots3,
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
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    EXACT: tl.constexpr,
    COARSE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FUSED_POOL: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    RG: tl.constexpr,
    PEAKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FETCHED: tl.constexpr,
    LISTED: tl.constexpr,
    FILL: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    cap_log2 = tl.cast(cap_log2, tl.float32)
    R: tl.constexpr = PANEL // QUERY_BLOCK  # rows: queries, or groups of QUERY_BLOCK queries, with one selection each
    CHUNKS: tl.constexpr = PANEL * GP // C  # products that cover the panel's columns
    PIECES: tl.constexpr = CHUNKS if R > 1 else 1  # of these, so many hold rows of their own
    PARTS: tl.constexpr = CHUNKS // PIECES  # and so many add up to one row
    PR: tl.constexpr = R // PIECES
    RATIO: tl.constexpr = BLOCK // STRIDE
    OVERLAP: tl.constexpr = KERNEL // STRIDE - 1  # windows of earlier blocks that reach into a block
    RAW: tl.constexpr = 0 if FUSED_POOL else RATIO
    EARLY: tl.constexpr = 1 if OVERLAP > 0 else 0
    CHECKED: tl.constexpr = KERNEL - STRIDE > LOCAL * BLOCK  # windows of scored blocks that may lie ahead of a query

    slots_at, dense_at, norms_at, keys_at, marks_at, raw_at = panel_scratch(
        scratch, num_blocks, T, PANEL, QUERY_BLOCK, RG, CANDIDATES, CHUNKS * C, R * RAW
    )
    raw_stride = num_blocks * RAW
    columns = tl.arange(0, C)
    dims = tl.arange(0, DP)
    for item in range(tl.program_id(0), num_panels * heads_kv, PROGRAMS):
        panel = num_panels - 1 - item // heads_kv  # late panels have most to do: they go first
        head = item % heads_kv
        batch, query, begin, end, position, key_begin, length, scored, low, high = panel_range(
            panels, panel, dense_len, window, PANEL, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
        )
        clear_marks(marks_at, num_blocks, low, high, T, PANEL, QUERY_BLOCK, LISTED)
        head_q = q + batch * stride_qb + head.to(tl.int64) * G * stride_qh
        keys1 = k1 + ((batch * heads_kv + head) * slots1 + key_begin // STRIDE + LEAD_SLOTS) * D
        for chunk in tl.static_range(CHUNKS):
            token, member = _select_column(chunk * C + columns, PANEL, GP, PIECES)
            real = (token >= begin) & (token < end) & (member < G)
            at = head_q + member.to(tl.int64) * stride_qh + (query + token).to(tl.int64) * stride_qt
            q_tile = tl.load(
                at[:, None] + dims[None, :], mask=real[:, None] & (dims < D)[None, :], other=0.0
            )  # [C, DP]
            sees = tl.minimum(position + token // QUERY_BLOCK * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
            if EXACT:
                visible = tl.where(scored & (sees + 1 >= KERNEL), (sees + 1 - KERNEL) // STRIDE + 1, 0)
                norm = _select_panel_normaliser(
                    q_tile, keys1, visible, scale_log2, cap_log2, D, DP, C, BN, HAS_SOFTCAP, PRECISION
                )
            else:
                keys2 = k2 + ((batch * heads_kv + head) * slots2 + key_begin // (COARSE * STRIDE) + LEAD_SLOTS) * D
                complete = (sees + 1 - COARSE * KERNEL) // (COARSE * STRIDE) + 1
                visible = tl.where(scored & (sees + 1 >= COARSE * KERNEL), complete, 0)
                norm = _select_panel_normaliser(
                    q_tile, keys2, visible, scale_log2, cap_log2, D, DP, C, BN, HAS_SOFTCAP, PRECISION
                )
            tl.store(norms_at + chunk * C + columns, tl.where(real, norm, float("inf")))
        tl.debug_barrier()

        # Transposed scores, windows x columns, so that a head-sum stays within a row of the product.
        # Rows of a product start one block early where windows of that block reach into the next.
        first = low - EARLY
        for piece in range(PIECES):
            piece_rows = piece * PR + tl.arange(0, PR)
            sees_row = tl.minimum(position + piece_rows * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
            piece_begin, piece_end, _piece_wanted = scored_range(
                piece_rows, position, begin, end, length, window, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
            )
            if PARTS == 1:
                column = piece * C + columns
                token, member = _select_column(column, PANEL, GP, PIECES)
                real = (token >= begin) & (token < end) & (member < G)
                at = head_q + member.to(tl.int64) * stride_qh + (query + token).to(tl.int64) * stride_qt
                q_turned = tl.load(
                    at[None, :] + dims[:, None], mask=real[None, :] & (dims < D)[:, None], other=0.0
                )  # [DP, C]
                norm = tl.load(norms_at + column)
            # A step takes one window of each of BC blocks, so that pooling a block is an elementwise maximum.
            pooled = tl.full([BC, PR], -1.0, tl.float32)
            tail = tl.full([BC, PR], -1.0, tl.float32)  # of the windows that reach into the next block
            places = tl.arange(0, BC)[:, None] * (RATIO * D) + dims[None, :]
            for step in range(tl.cdiv(high - low, BC - EARLY) * RATIO):
                start = first + step // RATIO * (BC - EARLY)
                place = step % RATIO
                block = start + tl.arange(0, BC)
                index = block * RATIO + place
                pointers = keys1 + (start * RATIO + place).to(tl.int64) * D + places
                # [BC, DP]
                windows = tl.load(pointers) if DP == D else tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
                if PARTS == 1:
                    product = tl.dot(windows, q_turned, input_precision=PRECISION)  # [BC, C]
                    if HAS_SOFTCAP:
                        product = cap_products(product, cap_log2)
                    weights = tl.exp2(product * scale_log2 - norm[None, :])
                    score = tl.sum(tl.reshape(weights, [BC, GP, C // GP]), 1)  # [BC, tokens of the piece]
                    if QUERY_BLOCK > 1:
                        score = tl.sum(tl.reshape(score, [BC, PR, QUERY_BLOCK]), 2)  # [BC, PR]
                else:
                    score = tl.zeros([BC, 1], tl.float32)
                    for part in range(PARTS):
                        column = part * C + columns
                        token, member = _select_column(column, PANEL, GP, PIECES)
                        real = (token >= begin) & (token < end) & (member < G)
                        at = head_q + member.to(tl.int64) * stride_qh + (query + token).to(tl.int64) * stride_qt
                        q_turned = tl.load(
                            at[None, :] + dims[:, None], mask=real[None, :] & (dims < D)[:, None], other=0.0
                        )
                        norm = tl.load(norms_at + column)
                        product = tl.dot(windows, q_turned, input_precision=PRECISION)
                        if HAS_SOFTCAP:
                            product = cap_products(product, cap_log2)
                        score += tl.sum(tl.exp2(product * scale_log2 - norm[None, :]), 1)[:, None]
                if CHECKED:
                    ahead = (index * STRIDE + KERNEL - 1)[:, None] > sees_row[None, :]
                    score = tl.where(ahead, -1.0, score)
                if FUSED_POOL:
                    if OVERLAP > 1:
                        tail = tl.where(place >= RATIO - OVERLAP, tl.maximum(tail, score), tail)
                    if place == RATIO - 1:
                        # The maximum is taken here, too, lest every step brings it to the layout of what follows.
                        best = tl.maximum(pooled, score)
                        if OVERLAP > 0:
                            source = tl.maximum(tl.arange(0, BC) - 1, 0)[:, None] + tl.zeros([1, PR], tl.int32)
                            best = tl.maximum(best, tl.gather(tail if OVERLAP > 1 else score, source, 0))
                        key = block_keys(best, block[:, None], piece_begin[None, :], piece_end[None, :], HAS_WINDOW)
                        row_keys = keys_at + piece_rows[None, :] * num_blocks
                        mine = (block >= start + EARLY) & (block < high)
                        tl.store(row_keys + block[:, None], key, mask=mine[:, None])
                        pooled = tl.full([BC, PR], -1.0, tl.float32)
                        tail = tl.full([BC, PR], -1.0, tl.float32)
                    else:
                        pooled = tl.maximum(pooled, score)
                else:
                    row_scores = raw_at + piece_rows[None, :] * raw_stride
                    tl.store(row_scores + index[:, None], score, mask=(block < high)[:, None])
        tl.debug_barrier()
        if not FUSED_POOL:
            for group in range(R // RG):
                row = group * RG + tl.arange(0, RG)
                row_begin, row_end, _row_wanted = scored_range(
                    row, position, begin, end, length, window, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
                )
                pool_scores(
                    raw_at + row * raw_stride, keys_at + row * num_blocks, row_begin, row_end, low, high, first,
                    RG, RATIO, OVERLAP,
                )  # fmt: skip
            tl.debug_barrier()
        list_panel(
            slots_at, dense_at, keys_at, marks_at, num_blocks, list_blocks, list_tokens, list_counts, capacity,
            panel, head, heads_kv, begin, end, position, length, window, scored, low, high,
            T, PANEL, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW, RG, PEAKS, CANDIDATES, FETCHED, LISTED, FILL,
            ranks + ((batch * heads_kv + head) * slots3 + key_begin // BLOCK),
        )  # fmt: skip
        tl.debug_barrier()


def _constants(shape: TileShape, geometry: BlockGeometry, config: SelectionConfig) -> Constants:
    g = geometry
    return {
        "KERNEL": g.kernel_size,
        "STRIDE": g.kernel_stride,
        "EXACT": g.lse == "exact",
        "COARSE": COARSE_FACTOR,
        "FUSED_POOL": g.kernel_size // g.kernel_stride - 1 <= g.block_size // g.kernel_stride,
        "C": min(config.columns, shape.panel_tokens * shape.padded_group),
        "BC": config.windows,
        "BN": config.normaliser_keys,
    }


def _scratch(constants: Constants) -> tuple[int, int]:
    """A normaliser a column; scores of single windows where pooling is a pass of its own."""
    rows = constants["PANEL"] // constants["QUERY_BLOCK"]
    raw = 0 if constants["FUSED_POOL"] else constants["BLOCK"] // constants["STRIDE"]
    return constants["PANEL"] * constants["GP"], rows * raw


POOLED = PanelScorer("pooled", _constants, _scratch)


def select_tiles(
    q: Tensor,
    keys: CompressedKeys,
    plan: TilePlan,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    length_k: int,
    window: int | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
) -> TileLists:
    """Blocks that every tile visits by pooled scores: `select_blocks` with what `compress_keys` returned as `keys`.

    With ``geometry.agnostic_blocks`` so many of them by the importance of their keys, `key_bias` ``[B or 1, Hkv or 1,
    Lk]``.
    """
    ranks, slots = keys.fine, 0
    if geometry.agnostic_blocks and key_bias is not None:
        ranks = rank_blocks(key_bias.expand(keys.batch, -1, -1), keys.heads, plan, geometry)
        slots = ranks.shape[1]
    return select_blocks(
        POOLED,
        wrap_triton(_select_pooled_kernel),
        q,
        (keys.fine, keys.coarse, ranks),
        (keys.fine_slots, keys.coarse_slots, slots),
        plan,
        heads_kv=keys.heads,
        geometry=geometry,
        scale=scale,
        dense_len=dense_len,
        length_k=length_k,
        window=window,
        softcap=softcap,
    )
