"""A decode step on the CPU: a few new queries over a cache, with compressed keys kept from step to step.

Of a sparse row only its compressed keys and the visited blocks are read. A C++ kernel does it where it can
(`kernels.cpu.native`): what it does not take, float64 above all, and machines without a compiler get torch operators,
which use the forced blocks in place and gather the chosen ones. Formulas: arXiv 2509.24663, sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import COARSE_FACTOR, BlockGeometry
from . import native
from .gemm import LN2, LOG2E, compute_dtype
from .selection import pool_keys, top_blocks

LOWEST = -1e30
"""Least maximum of a softmax: finite, so that a difference is never NaN."""


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    filled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    key_mask: Tensor | None,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries of every row over its valid keys, sparse from ``dense_len`` keys on.

    Args:
        q: ``[B, Hq, Lq, D]``; query ``i`` of a row stands in slot ``lengths - Lq + i``.
        k: ``[B, Hkv, C, D]``, any strides; only slots of valid keys are read.
        v: ``[B, Hkv, C, Dv]``.
        k1: ``[B, Hkv, n1, D]``, any strides: means of the windows among a row's first `filled` keys; brought up to
            date.
        k2: the same for coarse windows.
        filled: int32 ``[B]``; set to the rows' lengths.
        lengths: integers ``[B]`` or ``[1]``: one past the last valid key.
        starts: the same: the first valid key; None: 0.
        key_mask: bool ``[B, C]``: False hides a key from attention, and from nothing else.
        geometry: the block geometry.
        scale: softmax scale.
        dense_len: rows with fewer keys are dense.
        window: sliding window in keys, or None.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's type, stored as ``[B, Lq, Hq, Dv]``, and the natural log-sum-exp ``[B, Hq, Lq]``,
        float32 (float64 for float64 inputs); 0 and ``-inf`` for a query that sees no key.
    """
    batch, heads_q, length_q = q.shape[:3]
    capacity, dim_v = v.shape[2:]
    out = q.new_zeros(batch, length_q, heads_q, dim_v)
    lse = q.new_full((batch, heads_q, length_q), -torch.inf, dtype=compute_dtype(q.dtype))
    ends = lengths.clamp(0, capacity).expand(batch).tolist()
    begins = [0] * batch if starts is None else starts.clamp(min=0).expand(batch).tolist()
    begins = [min(begin, end) for begin, end in zip(begins, ends, strict=True)]
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        old = max(0, min(int(filled[row]), end - begin - length_q))
        for compressed, factor in ((k1[row], 1), (k2[row], COARSE_FACTOR)):
            sizes = geometry.kernel_size * factor, geometry.kernel_stride * factor
            _compress_new(k[row, :, begin:end], compressed, old, *sizes)
        filled[row] = end - begin
    numbers = {"geometry": geometry, "scale": scale, "dense_len": dense_len, "window": window, "out": out, "lse": lse}
    fields = (q, k, v, k1, k2, begins, ends, key_mask)
    if not native.decode_attention(*fields, **numbers):
        _attend(*fields, **numbers)
    return out.transpose(1, 2), lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    begins: list[int],
    ends: list[int],
    key_mask: Tensor | None,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    window: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`kernels.cpu.native.decode_attention` in torch operators."""
    heads, length_q = v.shape[1], q.shape[2]
    queries = q.unflatten(1, (heads, -1)).to(lse.dtype) * (scale * LOG2E)  # [B, Hkv, G, Lq, D]
    out, lse = out.unflatten(2, (heads, -1)), lse.unflatten(1, (heads, -1))
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        length = end - begin
        row_k, row_v = k[row, :, begin:end], v[row, :, begin:end]
        row_mask = None if key_mask is None else key_mask[row, begin:end]
        for line in _lines(length, length_q, geometry.query_block if length >= dense_len else 1):
            x = queries[row, :, :, line.tokens]  # [Hkv, G, n, D]
            chosen = None
            if length >= dense_len:
                chosen = _choose(x, k1[row], k2[row], line.last, geometry, window)
            for number, token in enumerate(range(line.tokens.start, line.tokens.stop)):
                position = length - length_q + token
                spans = _spans(chosen is not None, line.last, position, geometry, window)
                logits = _logits(
                    *(x[:, :, number], row_k, row_mask, spans, chosen, line.last, position, geometry.block_size, window)
                )
                top = logits.amax(-1, keepdim=True).clamp_(min=LOWEST)  # [Hkv, G, 1]
                weights = logits.sub_(top).exp2_()
                total = weights.sum(-1, keepdim=True)
                lse[row, :, :, token] = ((top + total.log2()) * LN2)[..., 0]
                weights /= total.clamp(min=1.0)  # 1 at least, or 0 where no key is seen
                out[row, token] = _weighted(weights, row_v, spans, chosen, geometry.block_size)


@dataclass(frozen=True)
class _Line:
    """Queries that share a selection, and the position that decides it."""

    tokens: slice
    last: int


def _lines(length: int, length_q: int, query_block: int) -> list[_Line]:
    """The lines of a row: only of queries that stand on a key."""
    base = length - length_q
    token = max(0, -base)
    lines = []
    while token < length_q:
        end = (base + token) // query_block * query_block + query_block  # one past the line's last position
        stop = min(end - base, length_q)
        lines.append(_Line(slice(token, stop), min(end, length) - 1))
        token = stop
    return lines


def _compress_new(k: Tensor, compressed: Tensor, old: int, size: int, stride: int) -> None:
    """Write the windows of ``k [Hkv, L, D]`` that end after its first ``old`` keys to ``compressed [Hkv, n, D]``."""
    begin, end = ((max(0, (length - size) // stride + 1)) for length in (old, k.shape[1]))
    if begin < end:
        compressed[:, begin:end] = pool_keys(k[:, begin * stride :], size, stride)


def _choose(x: Tensor, k1: Tensor, k2: Tensor, last: int, geometry: BlockGeometry, window: int | None) -> Tensor | None:
    """Blocks that a line visits beside the forced ones, ascending ``[Hkv, n]``; None: it visits all candidates.

    Args:
        x: ``[Hkv, G, n, D]``, scaled by ``scale * log2(e)``.
        k1: ``[Hkv, n1, D]``.
        k2: ``[Hkv, n2, D]``.
        last: position that decides what the line sees.
        geometry: the block geometry.
        window: sliding window in keys, or None.
    """
    g = geometry
    reach = _reach(last, g.block_size, window)
    low, high = max(reach, g.init_blocks), last // g.block_size - g.local_blocks
    taken = g.selected_blocks - g.local_blocks - 1 - max(g.init_blocks - reach, 0)
    if high - low <= taken:
        return None
    rows = x.flatten(1, 2)  # [Hkv, G*n, D]
    norm_keys, factor = (k1, 1) if g.lse == "exact" else (k2, COARSE_FACTOR)
    visible = max(0, (last + 1 - factor * g.kernel_size) // (factor * g.kernel_stride) + 1)
    per_block, overhang = g.block_size // g.kernel_stride, g.kernel_size // g.kernel_stride - 1
    first = low * per_block - overhang  # window of the first score; before 0 there is none
    seen = min(high * per_block, max(0, (last + 1 - g.kernel_size) // g.kernel_stride + 1))
    scores = rows.new_full((x.shape[0], high * per_block - first), -torch.inf)
    part = scores[:, max(first, 0) - first : max(seen - first, 0)]
    if visible:
        norm = _bits(rows @ norm_keys[:, :visible].to(rows.dtype).mT)  # [Hkv, G*n, 1]
        logits = rows @ k1[:, max(first, 0) : seen].to(rows.dtype).mT  # [Hkv, G*n, windows]
        part.copy_(logits.sub_(norm).exp2_().sum(1))
    else:
        part.zero_()
    best = scores.unfold(1, per_block + overhang, per_block).amax(-1)  # [Hkv, high - low]
    return top_blocks(best, taken).add_(low).sort(1).values


def _bits(logits: Tensor) -> Tensor:
    """Binary log-sum-exp over the last dimension, kept; the logits are overwritten."""
    top = logits.amax(-1, keepdim=True)
    return logits.sub_(top).exp2_().sum(-1, keepdim=True).log2_().add_(top)


def _reach(last: int, block_size: int, window: int | None) -> int:
    """The first block that a sliding window touches."""
    return 0 if window is None else max(last - window + 1, 0) // block_size


def _spans(chooses: bool, last: int, position: int, geometry: BlockGeometry, window: int | None) -> list[slice]:
    """The stretches of keys that a query sees whatever the scores; if nothing is chosen by score, one of all.

    Args:
        chooses: whether blocks are chosen by score besides.
        last: position that decided the selection.
        position: of the query.
        geometry: the block geometry.
        window: sliding window in keys, or None.
    """
    size = geometry.block_size
    begin = 0 if window is None else max(0, position - window + 1)
    if not chooses:
        return [slice(begin, position + 1)]
    local = (last // size - geometry.local_blocks) * size
    spans = [slice(begin, min(geometry.init_blocks * size, position + 1)), slice(max(local, begin), position + 1)]
    return [span for span in spans if span.start < span.stop]


def _logits(
    x: Tensor,
    k: Tensor,
    mask: Tensor | None,
    spans: list[slice],
    chosen: Tensor | None,
    last: int,
    position: int,
    size: int,
    window: int | None,
) -> Tensor:
    """Logits of a query for the keys of `spans` and then of its chosen blocks, -inf where a key may not be seen.

    Args:
        x: ``[Hkv, G, D]``, scaled by ``scale * log2(e)``.
        k: ``[Hkv, L, D]``.
        mask: bool ``[L]``: which keys may be seen; None: all.
        spans: from `_spans`.
        chosen: ``[Hkv, n]`` from `_choose`; None: no blocks.
        last: position that decided the selection.
        position: of the query.
        size: keys of a block.
        window: sliding window in keys, or None.

    Returns:
        ``[Hkv, G, keys]``.
    """
    parts = [torch.bmm(x, k[:, span].to(x.dtype).mT) for span in spans]
    seen = [] if mask is None else [mask[span].expand(k.shape[0], -1) for span in spans]
    if chosen is not None:
        far = torch.bmm(x, _gather(k, chosen, size).to(x.dtype).mT)
        parts.append(far)
        begin = 0 if window is None else max(0, position - window + 1)
        if begin > 0 or last > position:
            keys = (chosen[:, :, None] * size + torch.arange(size, device=x.device)).flatten(1)  # [Hkv, n * size]
            far.masked_fill_(((keys < begin) | (keys > position))[:, None], -torch.inf)
        if mask is not None:
            seen.append(mask[: mask.shape[0] // size * size].unflatten(0, (-1, size))[chosen].flatten(1))
    logits = torch.cat(parts, -1)
    if mask is not None:
        logits.masked_fill_(~torch.cat(seen, -1)[:, None], -torch.inf)
    return logits


def _weighted(weights: Tensor, v: Tensor, spans: list[slice], chosen: Tensor | None, size: int) -> Tensor:
    """The values of the keys of `_logits`, weighted and added.

    Args:
        weights: ``[Hkv, G, keys]``.
        v: ``[Hkv, L, Dv]``.
        spans: from `_spans`.
        chosen: from `_choose`.
        size: keys of a block.

    Returns:
        ``[Hkv, G, Dv]``.
    """
    out = weights.new_zeros(*weights.shape[:2], v.shape[2])
    begin = 0
    for span in spans:
        end = begin + span.stop - span.start
        out.baddbmm_(weights[:, :, begin:end], v[:, span].to(out.dtype))
        begin = end
    if chosen is not None:
        out.baddbmm_(weights[:, :, begin:], _gather(v, chosen, size).to(out.dtype))
    return out


def _gather(x: Tensor, blocks: Tensor, size: int) -> Tensor:
    """Whole blocks: ``x [Hkv, L, D]``, ``blocks [Hkv, n]`` -> ``[Hkv, n * size, D]``."""
    count = x.shape[1] // size
    whole = x[:, : count * size].unflatten(1, (count, size))  # [Hkv, count, size, D]
    out = x.new_empty(*blocks.shape, size, x.shape[2])
    for head, some in enumerate(blocks):
        torch.index_select(whole[head], 0, some, out=out[head])
    return out.flatten(1, 2)
