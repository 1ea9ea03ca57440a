"""Decode: compresses newly completed windows, and the queries' partial normalisers over the compressed keys.

Formulas: arXiv 2509.24663, section 3.2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..pdl import await_previous
from ..score_terms import cap_products
from ..tile_ops import LOWEST_SCORE, online_softmax
from .rows import DECODE_FACTOR, clip_row, count_windows, last_of_line, line_of

DECODE_FINE = tl.constexpr(8)
"""``K1`` windows that are compressed at once, with a quarter as many of ``K2``."""

DECODE_MEANS = tl.constexpr(16)
"""Rows of that product: 8 + 2, padded to what one matrix instruction holds."""


@triton.jit
def load_columns(
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
    stride_1t,
    stride_2t,
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
        slot = window.to(tl.int64)[:, None]
        tl.store(k1_row + slot * stride_1t + dims, mean, mask=(new & is_fine)[:, None] & (dims < D))
        tl.store(k2_row + slot * stride_2t + dims, mean, mask=(new & (row >= DECODE_FINE))[:, None] & (dims < D))


@triton.jit(do_not_specialize=["capacity", "chunks", "dense_len", "length_q", "tiles"])
def decode_compress_kernel(
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
    arrivals,  # int32 [B * Hkv], set to 0 for the next kernel
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_1b,
    stride_1h,
    stride_1t,
    stride_2b,
    stride_2h,
    stride_2t,
    scale_log2,
    cap_log2,
    heads,
    capacity,
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
    HAS_SOFTCAP: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program owns CHUNK coarse keys: it writes the new ones, and takes the queries' log-sum-exp over them all."""
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes numbers as float64
    cap_log2 = tl.cast(cap_log2, tl.float32)
    C: tl.constexpr = TOKENS * GP
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
    k1_row = k1 + batch * stride_1b + head * stride_1h
    k2_row = k2 + batch * stride_2b + head * stride_2h
    _compress_new(
        k + batch * stride_kb + head * stride_kh + start.to(tl.int64) * stride_kt,
        stride_kt,
        k1_row,
        k2_row,
        stride_1t,
        stride_2t,
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
    keys_stride = stride_1t if EXACT else stride_2t
    complete = count_windows(length, SIZE, STEP)
    used = (length >= dense_len) & ((length - 1) // BLOCK >= BUDGET) & (chunk * OWNED < complete)
    columns = tl.arange(0, C)
    member = columns % GP
    dims = tl.arange(0, DP)[None, :]
    for tile in range(tl.where(used, tiles, 0)):
        token = tile * TOKENS + columns // GP
        position = length - length_q + token
        real = (token < length_q) & (member < G) & (position >= 0)
        turned = load_columns(
            q + batch * stride_qb + head * G * stride_qh, stride_qh, stride_qt, token, member, real, D, DP
        )
        line = line_of(tl.maximum(position, 0), length, length_q, QUERY_BLOCK)
        visible = count_windows(last_of_line(line, length, length_q, QUERY_BLOCK) + 1, SIZE, STEP)  # [C]
        highest = tl.full([C], LOWEST_SCORE, tl.float32)
        total = tl.zeros([C], tl.float32)
        for begin in range(chunk * OWNED, tl.minimum(chunk * OWNED + OWNED, complete), CHUNK):
            index = begin + tl.arange(0, CHUNK)
            there = (index < complete)[:, None] & (dims < D)
            at = keys_row + index.to(tl.int64)[:, None] * keys_stride + dims
            keys = tl.load(at, mask=there, other=0.0)  # [CHUNK, DP]
            scores = tl.dot(keys, turned, input_precision=PRECISION)  # [CHUNK, C]
            if HAS_SOFTCAP:
                scores = cap_products(scores, cap_log2)
            scores = tl.where(index[:, None] < visible[None, :], scores, float("-inf"))
            _, highest, total, _ = online_softmax(scores, scale_log2, highest, total, True, False, 0)
        at = parts + (pair * chunks + chunk) * tiles * C + tile * C + columns
        tl.store(at, tl.where(total > 0.0, highest + tl.log2(total), float("-inf")))
