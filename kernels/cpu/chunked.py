"""Selection and block-sparse attention of one sequence in torch operators, in memory linear in its length.

For machines without a compiler, and tensors on other devices that the Triton kernels refuse; `kernels.cpu.native`
takes the rest. Queries run in chunks: logits of a chunk are computed for all blocks that any of its queries visits,
and masked where a query does not visit a block itself. They are in units of log 2: on the CPU torch's ``exp2`` is four
times as fast as its ``exp``.

Formulas: arXiv 2509.24663, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..geometry import COARSE_FACTOR, BlockGeometry
from ..params import LEAST_BIAS, compute_dtype
from .sequences import AttentionParams
from .tokens import HIDDEN, LOG2E, cap_scores, cap_slopes, token_block_scores

CHUNK_LOGITS = 2**21
"""Logits of a chunk of queries: 8 MB in float32. A quarter and four times as many are slower at 4k tokens."""


def pool_keys(k: Tensor, size: int, stride: int) -> Tensor:
    """Mean of every complete window, summed in `compute_dtype`.

    Args:
        k: ``[H, L, D]``.
        size: tokens in a window, a multiple of ``stride``.
        stride: tokens between the starts of two windows.

    Returns:
        ``[H, n, D]``, ``n = max(0, (L - size) // stride + 1)``, in k's type.
    """
    count, steps = max(0, (k.shape[1] - size) // stride + 1), size // stride
    if count == 0:
        return k[:, :0]
    keys = k[:, : (count + steps - 1) * stride].to(compute_dtype(k.dtype))
    sums = keys.reshape(k.shape[0], count + steps - 1, stride, k.shape[2]).sum(2)  # [H, count + steps - 1, D]
    return sums.unfold(1, steps, 1).sum(-1).mul_(1.0 / size).to(k.dtype)


def compress_keys(k: Tensor, k1: Tensor, k2: Tensor, geometry: BlockGeometry) -> None:
    """Write the complete windows of ``k [Hkv, L, D]`` to the first slots of ``k1`` and ``k2 [Hkv, n, D]``."""
    for compressed, factor in ((k1, 1), (k2, COARSE_FACTOR)):
        pooled = pool_keys(k, factor * geometry.kernel_size, factor * geometry.kernel_stride)
        compressed[:, : pooled.shape[1]] = pooled


def visible_blocks(tokens: Tensor, length: int, params: AttentionParams) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries ``[n]`` of a sequence: the last position that each one's shared selection sees, its first block, and
    its last.
    """
    g = params.geometry
    last = (tokens + params.offset) // g.query_block * g.query_block
    last = (last + g.query_block - 1).clamp(max=length - 1)
    return last, _first_keys(last, params.window) // g.block_size, last // g.block_size


def select_blocks(q: Tensor, state: Sequence[Tensor], length: int, params: AttentionParams) -> Tensor:
    """The blocks that every query of one sequence visits by their scores and their places.

    Args:
        q: ``[Hkv, G, n, D]``; query ``i`` stands at position ``offset + i``, ``offset + n <= length``.
        state: the compressed keys ``[Hkv, n1, D]`` and the coarse ones ``[Hkv, n2, D]``, or the index keys
            ``[Hkv, length, d]`` as numbers; read where a query has more candidates than it visits.
        length: keys in the sequence.
        params: the geometry, and what queries see.

    Returns:
        int32 ``[Hkv, n, S]``, ``S = geometry.selected_blocks``; -1 in unused places.
    """
    g, (heads, group, tokens, _) = params.geometry, q.shape
    last, first, own = visible_blocks(torch.arange(tokens, device=q.device), length, params)
    slots = first[:, None] + torch.arange(g.selected_blocks, device=q.device)
    chosen = torch.where(slots <= own[:, None], slots, -1).int().repeat(heads, 1, 1)  # all, where these are no more
    crowded = (own - first >= g.selected_blocks).nonzero()
    begin = int(crowded[0]) if crowded.numel() else tokens
    columns = max(1, heads * group * (length if g.scorer == "tokens" else g.num_compressed(length)))
    step = max(1, CHUNK_LOGITS // columns // g.query_block) * g.query_block
    while begin < tokens:  # whole tiles of queries that share a selection
        end = min(tokens, (params.offset + begin + step) // g.query_block * g.query_block - params.offset)
        some = slice(begin, end)
        scores = _block_scores(q[:, :, some], state, last[some], length, params)  # [Hkv, n, blocks]
        blocks, mine = torch.arange(scores.shape[-1], device=q.device), own[some, None]
        candidate = (blocks >= first[some, None]) & (blocks <= mine)
        forced = candidate & ((blocks < g.init_blocks) | (blocks >= mine - g.local_blocks))
        # A candidate without a score comes before what is none; ties go to the lower block.
        rank = scores.clamp(min=-1.0).masked_fill(forced, torch.inf).masked_fill(~candidate, -torch.inf)
        best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : g.selected_blocks]
        count = best.shape[-1]
        chosen[:, some, :count] = best.masked_fill_(~candidate.expand_as(rank).gather(-1, best), -1).int()
        chosen[:, some, count:] = -1
        begin = end
    return chosen


def _block_scores(q: Tensor, state: Sequence[Tensor], last: Tensor, length: int, params: AttentionParams) -> Tensor:
    """Scores ``[Hkv, n, blocks]`` of a chunk, ``-inf`` where nothing of a block that is scored is visible.

    Args:
        q: ``[Hkv, G, n, D]``.
        state: as in `select_blocks`.
        last: ``[n]``, the position up to which each query's shared selection sees.
        length: keys in the sequence.
        params: the geometry, the scale and what queries see.
    """
    rows = q.to(compute_dtype(q.dtype)) * (params.scale * LOG2E)
    if params.geometry.scorer == "tokens":
        return _shared(token_block_scores(rows, state[0], last, length, params), last, params.geometry.query_block)
    return _pooled_scores(rows, state[0], state[1], last, length, params)


def _shared(scores: Tensor, last: Tensor, query_block: int) -> Tensor:
    """Scores ``[Hkv, n, ...]`` of queries, added up over those that share a selection."""
    if query_block == 1:
        return scores
    tile = last // query_block - last[0] // query_block
    sums = scores.new_zeros(scores.shape[0], int(tile[-1]) + 1, scores.shape[2]).index_add_(1, tile, scores)
    return sums[:, tile]


def _pooled_scores(q: Tensor, k1: Tensor, k2: Tensor, last: Tensor, length: int, params: AttentionParams) -> Tensor:
    """`_block_scores` by compressed keys, of scaled queries."""
    g = params.geometry
    heads, group, count, dim = q.shape
    rows = q.reshape(heads, group * count, dim)

    def visible(factor: int) -> Tensor:  # windows that end at or before `last`, [n, windows]
        size, stride = factor * g.kernel_size, factor * g.kernel_stride
        windows = max(0, (int(last[-1]) + 1 - size) // stride + 1)
        return torch.arange(windows, device=q.device) * stride + size - 1 <= last[:, None]

    def logits(keys: Tensor, seen: Tensor) -> Tensor:  # [Hkv, G, n, windows]
        products = rows @ keys[:, : seen.shape[1]].to(rows.dtype).mT
        return cap_scores(products.view(heads, group, count, seen.shape[1]), params.softcap)

    norm_keys, norm_seen = (k1, visible(1)) if g.lse == "exact" else (k2, visible(COARSE_FACTOR))
    seen = visible(1)
    norm = _log2sumexp2(logits(norm_keys, norm_seen).masked_fill_(~norm_seen, HIDDEN))
    scores = (logits(k1, seen) - norm).exp2_().sum(1)  # [Hkv, n, windows]
    scores = _shared(scores, last, g.query_block)
    scores.masked_fill_(~norm_seen.any(1)[:, None], 0.0).masked_fill_(~seen, -torch.inf)
    # Block j overlaps the windows [j * per_block - overhang, (j + 1) * per_block).
    per_block, overhang = g.block_size // g.kernel_stride, g.kernel_size // g.kernel_stride - 1
    blocks = g.num_blocks(length)
    scores = pad(scores, (overhang, blocks * per_block - scores.shape[2]), value=-torch.inf)
    return scores.unfold(-1, per_block + overhang, per_block).amax(-1)


def _log2sumexp2(logits: Tensor) -> Tensor:
    """Binary log-sum-exp over the last dimension, kept; 0 where there is nothing to sum."""
    if logits.shape[-1] == 0:
        return logits.new_zeros(*logits.shape[:-1], 1)
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp2_().sum(-1, keepdim=True).log2_().add_(top)


def _first_keys(positions: Tensor, window: int | None) -> Tensor:
    """The first key in the window of each position."""
    return torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(min=0)


@dataclass(frozen=True)
class _Chunk:
    """Queries, and the keys that any of them visits.

    Attributes:
        queries: the queries.
        keys: a slice, or int64 ``[K]``.
        seen: bool ``[n, K]`` or ``[Hkv or 1, 1, n, K]``, which of the keys each query visits and sees.
        key_bias: of the keys, ``[Hkv or 1, 1, 1, K]``; None for none.
    """

    queries: slice
    keys: slice | Tensor
    seen: Tensor
    key_bias: Tensor | None

    def logits(self, scores: Tensor) -> Tensor:
        """Biased and masked logits of scores ``[Hkv, G, n, K]``, which are overwritten."""
        if self.key_bias is not None:
            scores.add_(self.key_bias.to(scores.dtype) * LOG2E)
        return scores.masked_fill_(~self.seen, HIDDEN)


def product(rows: Tensor, keys: Tensor) -> Tensor:
    """``rows [Hkv, G, n, D]`` times ``keys [Hkv, K, D]``: ``[Hkv, G, n, K]`` in the type of rows."""
    return (rows.flatten(1, 2) @ keys.to(rows.dtype).mT).view(*rows.shape[:3], keys.shape[1])


def _chunks(q: Tensor, length: int, blocks: Tensor | None, params: AttentionParams) -> Iterator[_Chunk]:
    """Chunks of the queries ``q [Hkv, G, n, D]`` of a sequence."""
    heads, group, tokens, _ = q.shape
    size, device = params.geometry.block_size, q.device
    step = max(1, CHUNK_LOGITS // (heads * group * length))
    for begin in range(0, tokens, step):
        some = slice(begin, min(begin + step, tokens))
        positions = torch.arange(params.offset + some.start, params.offset + some.stop, device=device)
        end = params.offset + some.stop
        start = 0 if params.window is None else max(0, params.offset + begin - params.window + 1)
        index = torch.arange(start, end, device=device)
        keys: slice | Tensor = slice(start, end)
        visited = None
        if blocks is not None:
            listed = blocks[:, some].long()
            visited = torch.zeros(heads, some.stop - begin, -(-length // size) + 1, dtype=torch.bool, device=device)
            visited = visited.scatter_(2, torch.where(listed < 0, visited.shape[2] - 1, listed), True)[..., :-1]
            kept = visited.flatten(0, 1).any(0)[index // size]
            kept[:1] = True  # one key at least, seen or not
            if not bool(kept.all()):
                keys = index = index[kept]
            visited = visited[:, None, :, index // size]  # [Hkv, 1, n, K]
        seen = (index <= positions[:, None]) & (index >= _first_keys(positions, params.window)[:, None])
        if params.mask is not None:
            seen &= params.mask[index]
        if visited is not None:
            seen = visited & seen
        bias = None
        if params.key_bias is not None:
            bias = params.key_bias[:, None, None, keys]
            seen = seen & (bias >= LEAST_BIAS)
        yield _Chunk(some, keys, seen, bias)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, out: Tensor, lse: Tensor, params: AttentionParams
) -> None:
    """Attention of one sequence.

    Args:
        q: ``[Hkv, G, n, D]``; query ``i`` stands at position ``offset + i``, ``offset + n <= L``.
        k: ``[Hkv, L, D]``.
        v: ``[Hkv, L, Dv]``.
        blocks: int32 ``[Hkv, n, S]``, distinct but for -1; None for attention to all keys that a query may see.
        out: ``[Hkv, G, n, Dv]``, written.
        lse: ``[Hkv, G, n]``, written: the natural log-sum-exp.
        params: the geometry, the scale, what queries see, and the score terms.
    """
    sinks = None
    if params.sinks is not None:
        sinks = params.sinks.to(lse.dtype).view(*q.shape[:2], 1, 1) * LOG2E
    for chunk in _chunks(q, k.shape[1], blocks, params):
        rows = q[:, :, chunk.queries].to(lse.dtype) * (params.scale * LOG2E)
        logits = chunk.logits(cap_scores(product(rows, k[:, chunk.keys]), params.softcap))
        top = logits.amax(-1, keepdim=True)
        if sinks is not None:
            top = torch.maximum(top, sinks)
        weights = logits.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks - top).exp2_()
        empty = top <= 0.5 * HIDDEN  # sees neither key nor sink
        part = product(weights, v[:, chunk.keys].mT) / total
        out[:, :, chunk.queries] = part.masked_fill_(empty, 0.0).to(out.dtype)
        lse[:, :, chunk.queries] = ((top + total.log2()) / LOG2E).masked_fill_(empty, -torch.inf)[..., 0]


def attend_blocks_backward(
    forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    blocks: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    params: AttentionParams,
    grad_bias: Tensor | None = None,
) -> None:
    """Gradient of `attend_blocks` with the blocks held fixed.

    With the weights ``P`` rebuilt from the log-sum-exp, ``dV = P' dO``, ``dS = P * (dO V' - delta)`` with
    ``delta = sum(dO * O)``, ``dQ = scale * dS K`` and ``dK = scale * dS' Q``. A bias gets the sums of ``dS``; behind a
    cap, whose scores are ``x``, ``dS`` is multiplied by ``1 - (x / softcap) ** 2``.

    Args:
        forward: the gradient of the output, q, k, v, the output and its log-sum-exp, shaped as in `attend_blocks`.
        blocks: as in `attend_blocks`.
        gradients: those of q, k and v, written.
        params: as in `attend_blocks`.
        grad_bias: ``[Hkv, L]`` in the type of ``lse``, where there is a bias; its gradients are added.
    """
    (grad_out, q, k, v, out, lse), (grad_q, grad_k, grad_v) = forward, gradients
    sum_k, sum_v = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    for chunk in _chunks(q, k.shape[1], blocks, params):
        some, keys = chunk.queries, chunk.keys
        rows, grad = (x[:, :, some].to(lse.dtype) for x in (q, grad_out))
        delta = (grad * out[:, :, some]).sum(-1, keepdim=True)
        shift = lse[:, :, some, None] * LOG2E
        scores = cap_scores(product(rows * (params.scale * LOG2E), k[:, keys]), params.softcap)
        flat = cap_slopes(scores, params.softcap)
        weights = chunk.logits(scores).sub_(shift.masked_fill(shift.isinf(), 0.0)).exp2_()
        slopes = product(grad, v[:, keys]).sub_(delta).mul_(weights)  # [Hkv, G, n, K]
        if grad_bias is not None:
            grad_bias[:, keys] += slopes.sum((1, 2))
        if flat is not None:
            slopes.mul_(flat)
        grad_q[:, :, some] = product(slopes, k[:, keys].mT).mul_(params.scale).to(grad_q.dtype)
        sum_k[:, keys] += slopes.flatten(1, 2).mT @ rows.flatten(1, 2)
        sum_v[:, keys] += weights.flatten(1, 2).mT @ grad.flatten(1, 2)
    grad_k.copy_(sum_k.mul_(params.scale))
    grad_v.copy_(sum_v)
