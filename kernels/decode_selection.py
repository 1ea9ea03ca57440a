"""Block selection of a decode step: compressed keys that became complete, normaliser, block scores, top-k.

Three kernels, whose grids follow from the cache's capacity; programs beyond a row's length end at once. Formulas:
arXiv 2509.24663, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_pass.kernels.decode_launch import decode_launch
from infllm_pass.kernels.decode_rows import (
    DECODE_FACTOR,
    LEAST_COLUMNS,
    DecodeRows,
    DecodeShape,
    clip_row,
    count_windows,
    first_block,
    last_of_line,
    line_of,
    scored_blocks,
)
from infllm_pass.kernels.geometry import COARSE_FACTOR, BlockGeometry
from infllm_pass.kernels.launch import precision, wrap_triton
from infllm_pass.kernels.walking import LOG2_E, UNBOUNDED

DECODE_FINE = tl.constexpr(32)
"""``K1`` windows that are compressed at once, with a quarter as many of ``K2``."""

DECODE_MEANS = tl.constexpr(64)
"""Rows of that product: 32 + 8, padded to what one matrix instruction holds."""

DECODE_PARTS = tl.constexpr(32)
"""Partial normalisers that are added at once."""

DECODE_RANKED = tl.constexpr(2048)
"""Blocks that ranking keeps in registers: those of 128k keys."""


@triton.jit
def _load_columns(
    q_row,  # of the batch row and key/value head
    stride_h,
    stride_t,
    token,  # [C]
    member,  # [C]
    real,  # [C]
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Queries as columns, ``[DP, C]``, 0 where there is none."""
    dims = tl.arange(0, DP)[:, None]
    at = q_row + (member.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t)[None, :] + dims
    return tl.load(at, mask=real[None, :] & (dims < D), other=0.0)


@triton.jit
def _compress_new(
    k_row,  # of the batch row and key/value head, at the row's first key
    stride_t,
    k1_row,
    k2_row,
    old,
    length,
    low,  # the first of the K1 windows that this program owns
    high,
    D: tl.constexpr,
    DP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write those of a program's windows, ``K1 [low, high)`` and the ``K2`` ones beside them, that are new."""
    fine_begin = count_windows(old, KERNEL, STRIDE)
    fine_end = count_windows(length, KERNEL, STRIDE)
    coarse_begin = count_windows(old, DECODE_FACTOR * KERNEL, DECODE_FACTOR * STRIDE)
    coarse_end = count_windows(length, DECODE_FACTOR * KERNEL, DECODE_FACTOR * STRIDE)
    new_begin = tl.minimum(
        tl.where(fine_begin < fine_end, fine_begin, high),
        tl.where(coarse_begin < coarse_end, coarse_begin * DECODE_FACTOR, high),
    )
    new_begin = tl.maximum(new_begin, low)
    new_end = tl.minimum(tl.maximum(fine_end, coarse_end * DECODE_FACTOR), high)
    row = tl.arange(0, DECODE_MEANS)
    coarse_row = row - DECODE_FINE
    is_fine = row < DECODE_FINE
    factor = tl.where(is_fine, 1, DECODE_FACTOR)
    dims = tl.arange(0, DP)[None, :]
    for part in range((new_begin - low) // DECODE_FINE, (new_end - low + DECODE_FINE - 1) // DECODE_FINE):
        origin = low + part * DECODE_FINE
        window = tl.where(is_fine, origin + row, origin // DECODE_FACTOR + coarse_row)
        new = tl.where(
            is_fine,
            (window >= fine_begin) & (window < fine_end),
            (coarse_row < DECODE_FINE // DECODE_FACTOR) & (window >= coarse_begin) & (window < coarse_end),
        )
        start = window * STRIDE * factor
        size = KERNEL * factor
        first = tl.min(tl.where(new, start, length), 0)
        end = tl.max(tl.where(new, start + size, 0), 0)
        total = tl.zeros([DECODE_MEANS, DP], tl.float32)
        # From a multiple of KEYS on, so that a window is added up in the same order whenever it completes.
        for begin in range(first // KEYS * KEYS, end, KEYS):
            key = begin + tl.arange(0, KEYS)
            inside = (key < end)[:, None] & (dims < D)
            keys = tl.load(k_row + key.to(tl.int64)[:, None] * stride_t + dims, mask=inside, other=0.0)  # [KEYS, DP]
            weight = new[:, None] & (key[None, :] >= start[:, None]) & (key[None, :] < (start + size)[:, None])
            total = tl.dot(weight.to(keys.dtype), keys, total, input_precision="ieee")  # [MEANS, DP]
        mean = (total / size[:, None].to(tl.float32)).to(k1_row.dtype.element_ty)
        at = window.to(tl.int64)[:, None] * D + dims
        tl.store(k1_row + at, mean, mask=(new & is_fine)[:, None] & (dims < D))
        tl.store(k2_row + at, mean, mask=(new & (row >= DECODE_FINE))[:, None] & (dims < D))


@triton.jit(do_not_specialize=["capacity", "fine_slots", "coarse_slots", "chunks", "dense_len", "length_q", "tiles"])
def _decode_compress_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    q,
    k,
    k1,
    k2,
    filled,
    parts,  # float32 [B * Hkv, chunks, columns of all tiles]
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    scale_log2,
    heads,
    capacity,
    fine_slots,
    coarse_slots,
    chunks,
    length_q,
    tiles,
    dense_len,
    G: tl.constexpr,
    GP: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BUDGET: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns CHUNK coarse keys: it writes the new ones, and takes the queries' log-sum-exp over them all."""
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    C: tl.constexpr = TOKENS * GP
    chunk = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    row_end = tl.load(lengths + batch * lengths_stride)
    start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    # The queries' own keys are new in any case, also where the cache was cut back since the last step.
    old = tl.maximum(tl.minimum(tl.load(filled + batch), length - length_q), 0)
    k1_row = k1 + pair * fine_slots * D
    k2_row = k2 + pair * coarse_slots * D
    _compress_new(
        k + batch * stride_kb + head * stride_kh + start.to(tl.int64) * stride_kt,
        stride_kt,
        k1_row,
        k2_row,
        old,
        length,
        chunk * (CHUNK * DECODE_FACTOR),
        (chunk + 1) * (CHUNK * DECODE_FACTOR),
        D,
        DP,
        KERNEL,
        STRIDE,
        KEYS,
    )
    tl.debug_barrier()

    SIZE: tl.constexpr = KERNEL if EXACT else DECODE_FACTOR * KERNEL
    STEP: tl.constexpr = STRIDE if EXACT else DECODE_FACTOR * STRIDE
    OWNED: tl.constexpr = CHUNK * DECODE_FACTOR if EXACT else CHUNK
    keys_row = k1_row if EXACT else k2_row
    complete = count_windows(length, SIZE, STEP)
    used = (length >= dense_len) & ((length - 1) // BLOCK >= BUDGET) & (chunk * OWNED < complete)
    columns = tl.arange(0, C)
    member = columns % GP
    dims = tl.arange(0, DP)[None, :]
    for tile in range(tl.where(used, tiles, 0)):
        token = tile * TOKENS + columns // GP
        position = length - length_q + token
        real = (token < length_q) & (member < G) & (position >= 0)
        turned = _load_columns(
            q + batch * stride_qb + head * G * stride_qh, stride_qh, stride_qt, token, member, real, D, DP
        )
        line = line_of(tl.maximum(position, 0), length, length_q, QUERY_BLOCK)
        visible = count_windows(last_of_line(line, length, length_q, QUERY_BLOCK) + 1, SIZE, STEP)  # [C]
        peak = tl.full([C], float("-inf"), tl.float32)
        total = tl.zeros([C], tl.float32)
        for begin in range(chunk * OWNED, tl.minimum(chunk * OWNED + OWNED, complete), CHUNK):
            index = begin + tl.arange(0, CHUNK)
            there = (index < complete)[:, None] & (dims < D)
            keys = tl.load(keys_row + index.to(tl.int64)[:, None] * D + dims, mask=there, other=0.0)  # [CHUNK, DP]
            scores = tl.dot(keys, turned, input_precision=PRECISION) * scale_log2  # [CHUNK, C]
            scores = tl.where(index[:, None] < visible[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[None, :]), 0)
            peak = higher
        at = parts + (pair * chunks + chunk) * tiles * C + tile * C + columns
        tl.store(at, tl.where(total > 0.0, peak + tl.log2(total), float("-inf")))


@triton.jit
def _join_normalisers(
    parts_row,
    count,
    stride,
    column,  # [C]
    real,  # [C]
):
    """Base-2 log-sum-exp of columns over all chunks; +inf, which makes scores 0, where no key is visible."""
    peak = tl.full([column.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([column.shape[0]], tl.float32)
    for begin in range(0, count, DECODE_PARTS):
        chunk = begin + tl.arange(0, DECODE_PARTS)
        mask = (chunk < count)[:, None] & real[None, :]
        some = tl.load(parts_row + chunk[:, None] * stride + column[None, :], mask=mask, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(some, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(some - base[None, :]), 0)
        peak = higher
    return tl.where(total > 0.0, peak + tl.log2(total), float("inf"))


@triton.jit(do_not_specialize=["capacity", "slots", "chunks", "num_blocks", "dense_len", "window", "length_q", "tiles"])
def _decode_score_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    q,
    k1,
    parts,  # float32 [B * Hkv, chunks, columns of all tiles]
    keys,  # int32 [B * Hkv * LINES, num_blocks]
    stride_qb,
    stride_qh,
    stride_qt,
    scale_log2,
    heads,
    capacity,
    slots,
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
    PRECISION: tl.constexpr,
):
    """Scores of BLOCKS blocks for the lines of a tile, or for one line of several queries."""
    scale_log2 = tl.cast(scale_log2, tl.float32)
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
    low, high, _ = scored_blocks(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
    high = tl.where(length >= dense_len, high, low)
    exists = exists & (high > low)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    final = tl.max(tl.where(exists, high, 0), 0)
    if (tl.program_id(0) * BLOCKS < final) & ((tl.program_id(0) + 1) * BLOCKS > tl.min(low, 0)):
        q_row = q + batch * stride_qb + head * G * stride_qh
        parts_row = parts + pair * chunks * tiles * C
        k1_row = k1 + pair * slots * D
        norm_chunks = (count_windows(length, NORM_SIZE, NORM_STRIDE) + NORM_KEYS - 1) // NORM_KEYS
        complete = count_windows(length, KERNEL, STRIDE)
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
            turned = _load_columns(q_row, stride_qh, stride_qt, token, member, real, D, DP)
            norm = _join_normalisers(parts_row, norm_chunks, tiles * C, token * GP + member, real)  # [C]
        pooled = tl.full([BLOCKS, ROWS], -1.0, tl.float32)
        for part in range(RATIO + OVERLAP):
            index = block * RATIO + (part - OVERLAP)
            known = (index >= 0) & (index < complete)
            at = k1_row + index.to(tl.int64)[:, None] * D + dims
            windows = tl.load(at, mask=known[:, None] & (dims < D), other=0.0)  # [BLOCKS, DP]
            if SHARED:
                score = tl.zeros([BLOCKS, 1], tl.float32)
                for begin in range(first_token, end_token, TOKENS):
                    token = begin + columns // GP
                    real = (token < end_token) & (member < G)
                    turned = _load_columns(q_row, stride_qh, stride_qt, token, member, real, D, DP)
                    norm = _join_normalisers(parts_row, norm_chunks, tiles * C, token * GP + member, real)
                    product = tl.dot(windows, turned, input_precision=PRECISION)
                    score += tl.sum(tl.exp2(product * scale_log2 - norm[None, :]), 1)[:, None]
            else:
                product = tl.dot(windows, turned, input_precision=PRECISION)  # [BLOCKS, C]
                weights = tl.exp2(product * scale_log2 - norm[None, :])
                score = tl.sum(tl.reshape(weights, [BLOCKS, ROWS, GP]), 2)
            seen = known[:, None] & ((index * STRIDE + (KERNEL - 1))[:, None] <= last[None, :])
            pooled = tl.where(seen, tl.maximum(pooled, score), pooled)
        key = tl.where(pooled >= 0.0, pooled.to(tl.int32, bitcast=True) + 1, 0)
        to = keys + (pair * LINES + line)[None, :] * num_blocks + block[:, None]
        inside = (block[:, None] >= low[None, :]) & (block[:, None] < high[None, :])
        tl.store(to, key, mask=inside & exists[None, :])


@triton.jit
def _count_reaching(keys, first, second, third):
    """How many keys reach each of three ascending bounds, as three fields of 20 bits."""
    counts = (keys >= first).to(tl.int64) + ((keys >= second).to(tl.int64) << 20)
    return tl.sum(counts + ((keys >= third).to(tl.int64) << 40), 0)


@triton.jit(do_not_specialize=["capacity", "num_blocks", "dense_len", "window", "length_q"])
def _decode_rank_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    keys,
    blocks,  # int32 [B * Hkv * LINES, BUDGET]
    filled,
    heads,
    capacity,
    num_blocks,
    length_q,
    dense_len,
    window,
    LINES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    WIDTH: tl.constexpr,  # the next power of two of BUDGET
    HAS_WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """One program a line; the first of a row also notes how many keys are compressed by now.

    All loads stand in the kernel itself, for the reason given at `clip_row`.
    """
    line = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    row_end = tl.load(lengths + batch * lengths_stride)
    _start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    if (line == 0) & (pair % heads == 0):
        tl.store(filled + batch, length)
    last = last_of_line(line, length, length_q, QUERY_BLOCK)
    exists = (line_of(length - 1, length, length_q, QUERY_BLOCK) >= line) & (last >= 0)
    if exists & (length >= dense_len):
        own = last // BLOCK
        reach = first_block(last, window, BLOCK, HAS_WINDOW)
        begin, end, taken = scored_blocks(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
        row = (pair * LINES + line) * BUDGET
        entry = tl.arange(0, WIDTH)
        chooses = end > begin
        initial = tl.maximum(INIT - reach, 0)
        local = tl.where(chooses & (entry >= initial), own - LOCAL - initial, reach)
        count = tl.where(chooses, initial + LOCAL + 1, own - reach + 1)
        tl.store(blocks + row + entry, local + entry, mask=entry < count)
        if chooses:
            keys_row = keys + (pair * LINES + line) * num_blocks
            place = tl.arange(0, DECODE_RANKED)
            index = begin + place
            held = tl.load(keys_row + index, mask=index < end, other=-1)  # those of more blocks are loaded again
            top = tl.max(held, 0)
            for first in range(begin + DECODE_RANKED, end, DECODE_RANKED):
                more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                top = tl.maximum(top, tl.max(more, 0))
            # The key of the last block taken: at least `taken` keys reach `least`, fewer reach `most`.
            least = top * 0
            most = top + 1
            reached = end - begin  # keys that reach `least`
            while (most - least > 1) & (reached != taken):
                quarter = (most - least) // 4
                middle = least + (most - least) // 2
                low = least + quarter
                high = middle + quarter
                counts = _count_reaching(held, low, middle, high)
                for first in range(begin + DECODE_RANKED, end, DECODE_RANKED):
                    more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                    counts += _count_reaching(more, low, middle, high)
                reach_low = (counts & 0xFFFFF).to(tl.int32)
                reach_middle = ((counts >> 20) & 0xFFFFF).to(tl.int32)
                reach_high = (counts >> 40).to(tl.int32)
                most = tl.where(reach_high < taken, high, most)
                most = tl.where(reach_middle < taken, middle, most)
                most = tl.where(reach_low < taken, low, most)
                reached = tl.where(reach_low >= taken, reach_low, reached)
                least = tl.where(reach_low >= taken, low, least)
                reached = tl.where(reach_middle >= taken, reach_middle, reached)
                least = tl.where(reach_middle >= taken, middle, least)
                reached = tl.where(reach_high >= taken, reach_high, reached)
                least = tl.where(reach_high >= taken, high, least)
            above = tl.sum((held > least).to(tl.int32), 0)
            for first in range(begin + DECODE_RANKED, end, DECODE_RANKED):
                more = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                above += tl.sum((more > least).to(tl.int32), 0)
            equals = taken - above  # of the blocks with the key `least`, the first so many
            seen = begin * 0  # blocks with this key so far, and in the upper half those above it
            for first in range(begin, end, DECODE_RANKED):
                some = tl.load(keys_row + first + place, mask=first + place < end, other=-1)
                level = (some == least).to(tl.int32)
                higher = (some > least).to(tl.int32)
                order = tl.cumsum(level + (higher << 16), 0) + seen
                rank = order & 0xFFFF
                chosen = (higher != 0) | ((level != 0) & (rank <= equals))
                at = row + count + (order >> 16) + tl.minimum(rank, equals) - 1
                tl.store(blocks + at, first + place, mask=chosen)
                seen += tl.sum(level + (higher << 16), 0)


@dataclass(frozen=True)
class DecodeState:
    """Compressed keys of a cache, kept from step to step.

    Attributes:
        k1: ``[B, Hkv, n1, D]``, contiguous; ``n1`` at least the windows of the cache's capacity.
        k2: ``[B, Hkv, n2, D]``, contiguous.
        filled: int32 ``[B]``: so many keys of the row, from its first, have not changed since their windows were
            written to `k1` and `k2`.
    """

    k1: Tensor
    k2: Tensor
    filled: Tensor


def decode_select(
    q: Tensor,
    k: Tensor,
    state: DecodeState,
    rows: DecodeRows,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    window: int | None,
) -> Tensor:
    """Bring the compressed keys up to date, and list the blocks that every line of every sparse row visits.

    Args:
        q: ``[B, Hq, Lq, D]``, last stride 1.
        k: ``[B, Hkv, C, D]``, last stride 1; only valid keys are read.
        state: compressed keys, written.
        rows: where the rows' keys lie.
        geometry: the block geometry.
        scale: softmax scale.
        dense_len: rows with fewer keys select nothing.
        window: sliding window in keys, or None.

    Returns:
        int32 ``[B * Hkv * lines, selected_blocks]``, in no particular order. How many entries a line has follows from
        its position: all candidates where they are not more than the budget, else the budget.
    """
    g = geometry
    batch, heads, capacity = k.shape[:3]
    dim, padded = int(q.shape[3]), max(LEAST_COLUMNS, triton.next_power_of_2(int(q.shape[3])))
    shape = DecodeShape.choose(int(q.shape[1]) // int(heads), int(q.shape[2]), g.query_block, q.element_size())
    launch = decode_launch(q, padded)
    exact = g.lse == "exact"
    owned = launch.chunk * COARSE_FACTOR  # fine windows of one program
    chunks = torch.sym_max(1, (state.k1.shape[2] + owned - 1) // owned)
    chunks = torch.sym_max(chunks, (state.k2.shape[2] + launch.chunk - 1) // launch.chunk)
    num_blocks = g.num_blocks(capacity)
    # No size of 1 and no two equal shapes: compilers specialise on the one and merge the other.
    pairs = batch * heads
    parts = torch.empty(pairs * chunks * shape.tiles * shape.columns, 1, dtype=torch.float32, device=q.device)
    keys = torch.empty(pairs * shape.lines * num_blocks, dtype=torch.int32, device=q.device)
    blocks = torch.empty(pairs * shape.lines, g.selected_blocks, dtype=torch.int32, device=q.device)
    common = {
        "QUERY_BLOCK": g.query_block,
        "BLOCK": g.block_size,
        "BUDGET": g.selected_blocks,
        "HAS_STARTS": rows.starts is not None,
    }
    products = {
        "G": shape.group,
        "GP": shape.padded_group,
        "TOKENS": shape.tokens,
        "D": dim,
        "DP": padded,
        "KERNEL": g.kernel_size,
        "STRIDE": g.kernel_stride,
        "PRECISION": precision(q),
    }
    ranking = {
        "LINES": shape.lines,
        "INIT": g.init_blocks,
        "LOCAL": g.local_blocks,
        "HAS_WINDOW": window is not None,
    }
    wrap_triton(_decode_compress_kernel)[(chunks, pairs)](
        *rows.arguments,
        q,
        k,
        state.k1,
        state.k2,
        state.filled,
        parts,
        *q.stride()[:3],
        *k.stride()[:3],
        scale * LOG2_E,
        heads,
        capacity,
        state.k1.shape[2],
        state.k2.shape[2],
        chunks,
        shape.length_q,
        shape.tiles,
        dense_len,
        **common,
        **products,
        EXACT=exact,
        CHUNK=launch.chunk,
        KEYS=launch.keys,
        num_warps=launch.warps(launch.compress_warps, shape.columns),
        num_stages=launch.compress_stages,
    )
    tiles = shape.tiles if g.query_block == 1 else shape.lines
    wrap_triton(_decode_score_kernel)[((num_blocks + launch.blocks - 1) // launch.blocks, pairs, tiles)](
        *rows.arguments,
        q,
        state.k1,
        parts,
        keys,
        *q.stride()[:3],
        scale * LOG2_E,
        heads,
        capacity,
        state.k1.shape[2],
        chunks,
        num_blocks,
        shape.length_q,
        shape.tiles,
        dense_len,
        UNBOUNDED if window is None else window,
        **common,
        **products,
        **ranking,
        NORM_KEYS=owned if exact else launch.chunk,
        NORM_SIZE=g.kernel_size if exact else COARSE_FACTOR * g.kernel_size,
        NORM_STRIDE=g.kernel_stride if exact else COARSE_FACTOR * g.kernel_stride,
        BLOCKS=launch.blocks,
        num_warps=launch.warps(launch.score_warps, shape.columns),
        num_stages=launch.score_stages,
    )
    wrap_triton(_decode_rank_kernel)[(shape.lines, pairs)](
        *rows.arguments,
        keys,
        blocks,
        state.filled,
        heads,
        capacity,
        num_blocks,
        shape.length_q,
        dense_len,
        UNBOUNDED if window is None else window,
        **common,
        **ranking,
        WIDTH=triton.next_power_of_2(g.selected_blocks),
        num_warps=launch.rank_warps,
    )
    return blocks
