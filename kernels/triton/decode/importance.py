"""Decode: query-agnostic blocks. Pools the bias of newly completed windows, and fills lists up by importance (NOSA).

Of a step's biases only those of new windows are read; the means of the others are state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..importance import WARPS, WINDOWS, window_means
from ..launch import wrap_triton
from .rows import clip_row, count_windows, last_of_line, line_of, scored_range
from .step import DecodeStep
from .topk import list_chosen, list_forced

_ABOVE_ALL = tl.constexpr(1 << 32)
"""Key of a block that is listed already: importances, as integers that order as they do, lie below."""

_AT_ONCE = tl.constexpr(128)
"""Blocks whose importance one step takes, or entries of a list that it marks."""


@triton.jit(do_not_specialize=["capacity", "length_q"])
def _pool_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    key_bias,  # [B, Hkv, C]
    s1,  # [B, Hkv, n]
    filled,
    stride_bb,
    stride_bh,
    stride_bt,
    stride_sb,
    stride_sh,
    stride_st,
    heads,
    capacity,
    length_q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """Write the importance of those of a program's WINDOWS windows that are new."""
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    row_end = tl.load(lengths + batch * lengths_stride)
    start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    old = tl.maximum(tl.minimum(tl.load(filled + batch), length - length_q), 0)
    first = tl.program_id(0) * WINDOWS
    begin = count_windows(old, KERNEL, STRIDE)
    end = count_windows(length, KERNEL, STRIDE)
    if (first < end) & (first + WINDOWS > begin):
        window = first + tl.arange(0, WINDOWS)
        new = (window >= begin) & (window < end)
        bias_row = key_bias + batch * stride_bb + head * stride_bh + start.to(tl.int64) * stride_bt
        means = window_means(bias_row, stride_bt, window, new, KERNEL, STRIDE, PADDED)
        tl.store(s1 + batch * stride_sb + head * stride_sh + window.to(tl.int64) * stride_st, means, mask=new)


@triton.jit
def _importance_key(value):
    """A float as an integer that orders as it does, from 0 on."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) + (1 << 31)


@triton.jit(do_not_specialize=["capacity", "num_blocks", "dense_len", "window", "length_q"])
def _fill_kernel(
    lengths,
    starts,
    lengths_stride,
    starts_stride,
    s1,
    chosen,  # int32 [B * Hkv * LINES, AWARE]
    keys,  # int64 [B * Hkv * LINES, num_blocks]
    blocks,  # int32 [B * Hkv * LINES, BUDGET]
    stride_sb,
    stride_sh,
    stride_st,
    heads,
    capacity,
    num_blocks,
    length_q,
    dense_len,
    window,
    LINES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    AWARE: tl.constexpr,  # blocks of a list that is to be filled up
    BUDGET: tl.constexpr,
    WIDTH: tl.constexpr,  # the next power of two of BUDGET
    HAS_WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    RANKED: tl.constexpr,
):
    """One program a line: the blocks chosen so far, and the most important of the others."""
    RATIO: tl.constexpr = BLOCK // STRIDE
    OVERLAP: tl.constexpr = KERNEL // STRIDE - 1
    line = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    row_end = tl.load(lengths + batch * lengths_stride)
    _start, length = clip_row(row_end, tl.load(starts + batch * starts_stride), capacity, HAS_STARTS)
    last = last_of_line(line, length, length_q, QUERY_BLOCK)
    exists = (line_of(length - 1, length, length_q, QUERY_BLOCK) >= line) & (last >= 0)
    if exists & (length >= dense_len):
        row = pair * LINES + line
        blocks_row = blocks + row * BUDGET
        keys_row = keys + row * num_blocks
        begin, end, taken = scored_range(last, window, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW)
        list_forced(blocks_row, last, window, begin, end, BLOCK, INIT, LOCAL, WIDTH, HAS_WINDOW)
        if end > begin:
            means_row = s1 + batch * stride_sb + (pair % heads) * stride_sh
            complete = count_windows(length, KERNEL, STRIDE)
            for first in range(begin, end, _AT_ONCE):
                block = first + tl.arange(0, _AT_ONCE)
                best = tl.full([_AT_ONCE], float("-inf"), tl.float32)
                for part in tl.static_range(RATIO + OVERLAP):
                    index = block * RATIO + (part - OVERLAP)
                    known = (index >= 0) & (index < complete) & (block < end)
                    at = means_row + index.to(tl.int64) * stride_st
                    best = tl.maximum(best, tl.load(at, mask=known, other=float("-inf")).to(tl.float32))
                tl.store(keys_row + block, _importance_key(best), mask=block < end)
            tl.debug_barrier()  # all threads have written before those that are listed are marked
            entry = tl.arange(0, WIDTH)
            listed = tl.load(chosen + row * AWARE + entry, mask=entry < AWARE, other=-1)
            tl.store(keys_row + listed, tl.full([WIDTH], _ABOVE_ALL, tl.int64), mask=(listed >= begin) & (listed < end))
            tl.debug_barrier()
            list_chosen(keys_row, blocks_row + (BUDGET - taken), begin, end, taken, RANKED)


def pool_importance(step: DecodeStep, key_bias: Tensor, s1: Tensor, filled: Tensor) -> None:
    """Bring the importance of the windows up to date.

    Args:
        step: the step.
        key_bias: ``[B or 1, Hkv or 1, C]``.
        s1: ``[B, Hkv, n]``, written.
        filled: int32 ``[B]``: so many keys of a row, from its first, have not changed since their windows were pooled.
    """
    g = step.geometry
    chunks = (s1.shape[2] + WINDOWS - 1) // WINDOWS
    wrap_triton(_pool_kernel)[(chunks, step.pairs)](
        *step.rows.arguments,
        key_bias,
        s1,
        filled,
        *key_bias.expand(step.k.shape[:3]).stride(),
        *s1.stride(),
        step.k.shape[1],
        step.k.shape[2],
        step.shape.length_q,
        KERNEL=g.kernel_size,
        STRIDE=g.kernel_stride,
        PADDED=triton.next_power_of_2(g.kernel_size),
        WINDOWS=WINDOWS,
        HAS_STARTS=step.rows.starts is not None,
        num_warps=WARPS,
    )


def fill_lists(step: DecodeStep, chosen: Tensor, s1: Tensor) -> Tensor:
    """Lists of blocks filled up by importance.

    Args:
        step: the step.
        chosen: int32 ``[B * Hkv * lines, selected_blocks - agnostic_blocks]``, as `decode_select` lists blocks.
        s1: ``[B, Hkv, n]``, up to date.

    Returns:
        The same with ``selected_blocks`` entries a line.
    """
    g, lines = step.geometry, step.pairs * step.shape.lines
    keys = torch.empty(lines * step.num_blocks, dtype=torch.int64, device=chosen.device)
    blocks = torch.empty(lines, g.selected_blocks, dtype=torch.int32, device=chosen.device)
    wrap_triton(_fill_kernel)[(step.shape.lines, step.pairs)](
        *step.rows.arguments,
        s1,
        chosen,
        keys,
        blocks,
        *s1.stride(),
        step.k.shape[1],
        step.k.shape[2],
        step.num_blocks,
        step.shape.length_q,
        step.dense_len,
        step.bound,
        **step.common,
        **step.ranking,
        KERNEL=g.kernel_size,
        STRIDE=g.kernel_stride,
        AWARE=g.selected_blocks - g.agnostic_blocks,
        num_warps=step.launch.rank_warps,
    )
    return blocks
