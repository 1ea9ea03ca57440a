"""Block selection in one Triton kernel: normaliser, scores, pooling to blocks, top-k, lists (section 3.2).

A persistent program takes one panel of queries of one key/value head at a time and keeps the panel's block
scores in a slice of scratch memory of its own, which stays in the L2 cache: scratch grows with the number of
key blocks, not with the number of queries times key blocks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import COARSE_FACTOR, BlockGeometry
from ..configs import SelectionConfig, config_for
from ..launch import multiprocessors, precision, wrap_triton
from ..tile_ops import LOWEST_SCORE, online_softmax
from ..tile_tables import TileLists, TilePlan, TileShape, load_panel
from .compress import LEAD_SLOTS, CompressedKeys
from .topk import (
    LANES,
    SLOTS,
    below,
    bound_keys,
    cut_keys,
    far_range,
    gather_keys,
    mark_blocks,
    pool_scores,
    write_lists,
)

FETCHED_KEYS = 128
"""Pieces of rows, of 32 keys each, that one step of a scan over keys fetches: they take 32 registers of a thread."""

ROW_MULTIPLE = 32
"""Rows of keys in scratch are a multiple of so many blocks."""

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
    D: tl.constexpr,
    DP: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
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
        if start + BN > least:
            scores = tl.where(index[None, :] < visible[:, None], scores, float("-inf"))
        shares = tl.reshape(scores, [C, BN // SHARES, SHARES])
        _, highest, total, _ = online_softmax(shares, scale_log2, highest, total, True, False, 1)
    norm = tl.max(highest, 1)
    norm += tl.log2(tl.sum(total * tl.exp2(highest - norm[:, None]), 1))
    return tl.where(visible > 0, norm, float("inf"))


@triton.jit(do_not_specialize=["num_panels", "slots1", "slots2", "num_blocks", "capacity", "dense_len", "window"])
def _select_kernel(
    q,
    k1,  # as in `CompressedKeys`, whose memory around the slots is read
    k2,
    panels,
    scratch,
    list_blocks,
    list_tokens,
    list_counts,
    stride_qb,
    stride_qh,
    stride_qt,
    scale_log2,
    num_panels,
    heads_kv,
    slots1,
    slots2,
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
    FUSED_POOL: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    RG: tl.constexpr,
    PEAKS: tl.constexpr,
    HELD: tl.constexpr,
    FETCHED: tl.constexpr,
    LISTED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    R: tl.constexpr = PANEL // QUERY_BLOCK  # rows: queries, or groups of QUERY_BLOCK queries, with one selection each
    CHUNKS: tl.constexpr = PANEL * GP // C  # products that cover the panel's columns
    PIECES: tl.constexpr = CHUNKS if R > 1 else 1  # of these, so many hold rows of their own
    PARTS: tl.constexpr = CHUNKS // PIECES  # and so many add up to one row
    PR: tl.constexpr = R // PIECES
    TILES: tl.constexpr = PANEL // T
    RATIO: tl.constexpr = BLOCK // STRIDE
    OVERLAP: tl.constexpr = KERNEL // STRIDE - 1  # windows of earlier blocks that reach into a block
    RAW: tl.constexpr = 0 if FUSED_POOL else RATIO
    EARLY: tl.constexpr = 1 if OVERLAP > 0 else 0
    CHECKED: tl.constexpr = KERNEL - STRIDE > LOCAL * BLOCK  # windows of far blocks that may lie ahead of a query
    SHARED: tl.constexpr = QUERY_BLOCK > T  # one row for all tiles of the panel
    MARKED: tl.constexpr = 1 if SHARED else TILES
    MASK: tl.constexpr = tl.int64 if T == 64 else tl.int32
    K: tl.constexpr = TILES if TILES < 2 else 2  # tiles whose lists are written at once

    # Scratch of one program: candidates of rows as lanes find them and side by side, 64 bits each, normalisers
    # [CHUNKS * C], keys [R, num_blocks], marks [MARKED, num_blocks] and, where pooling is a pass of its own, raw scores
    # [R, num_blocks * RATIO]. What has a fixed size comes first: one register then addresses all of it.
    blocks_wide = tl.cast(num_blocks, tl.int64)
    mark_words: tl.constexpr = MARKED * (MASK.primitive_bitwidth // 32)
    fixed: tl.constexpr = RG * (SLOTS + HELD) * LANES * 2 + CHUNKS * C
    span = blocks_wide * (R * (1 + RAW) + mark_words) + fixed
    slots_at = (scratch + tl.program_id(0) * span).to(tl.pointer_type(tl.int64))
    dense_at = slots_at + RG * SLOTS * LANES
    norms_at = (dense_at + RG * HELD * LANES).to(tl.pointer_type(tl.float32))
    keys_at = (norms_at + CHUNKS * C).to(tl.pointer_type(tl.int32))
    marks_at = (keys_at + blocks_wide * R).to(tl.pointer_type(MASK))
    raw_at = (marks_at + blocks_wide * MARKED).to(tl.pointer_type(tl.float32))
    raw_stride = num_blocks * RAW

    rows = tl.arange(0, R)
    columns = tl.arange(0, C)
    dims = tl.arange(0, DP)
    for item in range(tl.program_id(0), num_panels * heads_kv, PROGRAMS):
        panel = num_panels - 1 - item // heads_kv  # late panels have most to do: they go first
        head = item % heads_kv
        batch, query, begin, end, position, key_begin, length, _ = load_panel(panels, panel)
        # Panels without a choice to make run through the same loops, with nothing to do in them: a branch around the
        # products lets the assembler of Triton 3.6 reuse matrix descriptors that only the other arm has computed.
        end = tl.where(length < dense_len, 0, end)
        there = (rows * QUERY_BLOCK < end) & ((rows + 1) * QUERY_BLOCK > begin)
        far_begin, far_end, wanted = far_range(
            rows, position, begin, end, length, window, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
        )
        scored = tl.max(far_end - far_begin - wanted, 0) > 0  # some query leaves blocks out
        low = tl.where(scored, tl.min(tl.where(there, far_begin, 2147483647), 0), INIT)
        high = tl.where(scored, tl.max(far_end, 0), INIT)
        for start in range(low, high, LISTED):
            marked = tl.arange(0, MARKED)[:, None] * num_blocks + (start + tl.arange(0, LISTED))[None, :]
            inside = (start + tl.arange(0, LISTED) < high)[None, :] & (marked >= 0)
            tl.store(marks_at + marked, tl.zeros([MARKED, LISTED], MASK), mask=inside)
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
                norm = _select_panel_normaliser(q_tile, keys1, visible, scale_log2, D, DP, C, BN, PRECISION)
            else:
                keys2 = k2 + ((batch * heads_kv + head) * slots2 + key_begin // (COARSE * STRIDE) + LEAD_SLOTS) * D
                complete = (sees + 1 - COARSE * KERNEL) // (COARSE * STRIDE) + 1
                visible = tl.where(scored & (sees + 1 >= COARSE * KERNEL), complete, 0)
                norm = _select_panel_normaliser(q_tile, keys2, visible, scale_log2, D, DP, C, BN, PRECISION)
            tl.store(norms_at + chunk * C + columns, tl.where(real, norm, float("inf")))
        tl.debug_barrier()

        # Transposed scores, windows x columns, so that a head-sum stays within a row of the product.
        # Rows of a product start one block early where windows of that block reach into the next.
        first = low - EARLY
        for piece in range(PIECES):
            piece_rows = piece * PR + tl.arange(0, PR)
            sees_row = tl.minimum(position + piece_rows * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)
            piece_begin, piece_end, _piece_wanted = far_range(
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
                        key = tl.where(best >= 0.0, best.to(tl.int32, bitcast=True) + 1, 0)
                        candidate = block[:, None] < piece_end[None, :]
                        if HAS_WINDOW:
                            candidate = candidate & (block[:, None] >= piece_begin[None, :])
                        key = tl.where(candidate, key, -1)
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
        for group in range(R // RG):
            row = group * RG + tl.arange(0, RG)
            if not FUSED_POOL:
                row_begin, row_end, _row_wanted = far_range(
                    row, position, begin, end, length, window, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
                )
                pool_scores(
                    raw_at + row * raw_stride, keys_at + row * num_blocks, row_begin, row_end, low, high, first,
                    RG, LANES, RATIO, OVERLAP,
                )  # fmt: skip
                tl.debug_barrier()
            line = row[:, None]
            rows_at = keys_at + line * num_blocks
            _line_begin, _line_end, line_wanted = far_range(
                line + tl.zeros([RG, LANES], tl.int32), position, begin, end, length, window,
                QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW,
            )  # fmt: skip
            bound, top = bound_keys(rows_at, line_wanted, low, high, RG, PEAKS)
            keys, blocks, rest = gather_keys(rows_at, slots_at, dense_at, bound, low, high, RG, HELD, FETCHED)
            cut, equals = cut_keys(keys, rows_at, line_wanted, bound, top, rest, high, RG, HELD)
            if SHARED:
                bits = tl.full([RG, LANES], 1, MASK)
                row_marks = marks_at + line * 0
            else:
                line_token = line * QUERY_BLOCK
                bits = (below(tl.full([1, 1], QUERY_BLOCK, tl.int32), MASK) << (line_token % T).to(MASK)) + tl.zeros(
                    [RG, LANES], MASK
                )
                row_marks = marks_at + (line_token // T).to(tl.int64) * num_blocks
            mark_blocks(row_marks, bits, keys, blocks, rows_at, cut, equals, rest, high, RG, HELD)
        tl.debug_barrier()
        for pair in range(TILES // K):
            tile = pair * K + tl.arange(0, K)[:, None]
            slot = ((panel * TILES + tile) * heads_kv + head).to(tl.int64)
            write_lists(
                list_blocks + slot * capacity,
                list_tokens + slot * capacity,
                list_counts + slot,
                marks_at + (tile * 0 if SHARED else tile).to(tl.int64) * num_blocks,
                tile * T,
                position,
                begin,
                end,
                length,
                window,
                tl.where(scored, LOCAL, length // BLOCK + 1),
                low,
                high,
                T,
                LISTED,
                QUERY_BLOCK,
                BLOCK,
                INIT,
                HAS_WINDOW,
                SHARED,
            )
        tl.debug_barrier()


def selection_constants(
    shape: TileShape, geometry: BlockGeometry, dim: int, has_window: bool, launch: SelectionConfig
) -> dict[str, int | bool]:
    """What the kernel is compiled for beside the number of programs and the precision."""
    g = geometry
    rows = min(shape.panel_tokens // g.query_block, launch.rows)
    fetched = min(16, max(4, FETCHED_KEYS // rows))
    budget = g.selected_blocks - g.local_blocks - 1
    return {
        "G": shape.group,
        "GP": shape.padded_group,
        "T": shape.tokens,
        "PANEL": shape.panel_tokens,
        "QUERY_BLOCK": g.query_block,
        "D": dim,
        "DP": max(16, triton.next_power_of_2(dim)),
        "KERNEL": g.kernel_size,
        "STRIDE": g.kernel_stride,
        "BLOCK": g.block_size,
        "INIT": g.init_blocks,
        "LOCAL": g.local_blocks,
        "BUDGET": budget,
        "EXACT": g.lse == "exact",
        "COARSE": COARSE_FACTOR,
        "HAS_WINDOW": has_window,
        "FUSED_POOL": g.kernel_size // g.kernel_stride - 1 <= g.block_size // g.kernel_stride,
        "C": min(launch.columns, shape.panel_tokens * shape.padded_group),
        "BC": launch.windows,
        "BN": launch.normaliser_keys,
        "RG": rows,
        "PEAKS": max(fetched, 4 if budget <= 48 else 8),
        "HELD": min(8, triton.cdiv(budget + budget // 4 + 32, 32)),
        "FETCHED": fetched,
        "LISTED": 512 if shape.tokens < 64 else 256,
    }


def list_capacity(plan: TilePlan, geometry: BlockGeometry, length_k: int) -> int:
    """Entries that the list of one tile can need: blocks that its tokens visit, or all that exist."""
    far = plan.shape.tokens * (geometry.selected_blocks - geometry.local_blocks - 1)
    spread = (plan.shape.tokens + geometry.query_block - 2) // geometry.block_size + 1  # blocks that tokens stand in
    blocks = torch.sym_min(far + geometry.local_blocks + 1 + spread, geometry.num_blocks(length_k))
    return torch.sym_max(blocks, 1)


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
) -> TileLists:
    """Blocks that every tile visits (section 3.2).

    Args:
        q: ``[B, Hq, Lq, D]``, float16, bfloat16 or float32, unit last stride.
        keys: the compressed keys, from `compress_keys`.
        plan: the call's tables, made for the shape ``TileShape.choose(Hq // Hkv, geometry.query_block)``.
        geometry: the block geometry.
        scale: softmax scale.
        dense_len: sequences with fewer keys select nothing.
        length_k: ``Lk``.
        window: sliding window in keys; blocks wholly before it are no candidates.

    Returns:
        The lists, with the capacity that the geometry and the length bound.
    """
    shape, g = plan.shape, geometry
    heads_kv, dim = keys.heads, q.shape[3]
    capacity = list_capacity(plan, g, length_k)
    list_blocks = torch.empty(plan.num_tiles, heads_kv, capacity, dtype=torch.int16, device=q.device)
    # A tile more than needed: a compiler merges two equal allocations, and then copies one of them.
    list_tokens = torch.empty(plan.num_tiles + 1, heads_kv, capacity, dtype=shape.mask_dtype, device=q.device)
    list_counts = torch.empty(plan.num_tiles, heads_kv, dtype=torch.int32, device=q.device)
    padded = max(16, triton.next_power_of_2(dim))
    rows = shape.panel_tokens // g.query_block
    launch = config_for(SelectionConfig, "select", q, padded).for_panel(rows)
    constants = selection_constants(shape, g, dim, window is not None, launch)
    programs = multiprocessors(q.device) * launch.programs
    blocks = (g.num_blocks(length_k) + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    raw = 0 if constants["FUSED_POOL"] else g.block_size // g.kernel_stride
    marks = (1 if g.query_block > shape.tokens else shape.tiles) * (2 if shape.tokens == 64 else 1)
    candidates = constants["RG"] * (SLOTS.value + constants["HELD"]) * LANES.value * 2
    span = blocks * (rows * (1 + raw) + marks) + candidates + shape.panel_tokens * shape.padded_group
    scratch = torch.empty(programs * span, dtype=torch.int32, device=q.device)
    wrap_triton(_select_kernel)[(programs,)](
        q,
        keys.fine,
        keys.coarse,
        plan.panels,
        scratch,
        list_blocks,
        list_tokens,
        list_counts,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        scale / math.log(2),
        plan.panels.shape[0],
        heads_kv,
        keys.fine_slots,
        keys.coarse_slots,
        blocks,
        capacity,
        dense_len,
        0 if window is None else window,
        **constants,
        PROGRAMS=programs,
        PRECISION=precision(q),
        **launch.options,
    )
    return TileLists(list_blocks, list_tokens[: plan.num_tiles], list_counts)
