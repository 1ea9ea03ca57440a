"""The oracle: InfLLM-V2 selection and attention written as their formulas, in quadratic memory.

Every function promotes its inputs to float64, works on any device, and is differentiable by autograd
(selection returns booleans, through which nothing flows). Nothing here is tuned; the other kernels are
tested against it. Formulas: arXiv 2509.24663, sections 3.1 (sparse attention) and 3.2 (block selection).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .geometry import COARSE_FACTOR, BlockGeometry
from .params import LEAST_BIAS, PrefillParams

NEG_INF = float("-inf")


def sequence_bounds(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First valid key and one past the last valid key of every row.

    Args:
        key_mask: bool ``[B, Lk]``, True where a key is valid.

    Returns:
        Two int64 tensors ``[B]``; both 0 for a row without a valid key.
    """
    length = key_mask.shape[1]
    index = torch.arange(length, device=key_mask.device)
    first = torch.where(key_mask, index, length).amin(1) if length else key_mask.new_zeros(key_mask.shape[0]).long()
    end = torch.where(key_mask, index + 1, 0).amax(1) if length else torch.zeros_like(first)
    return torch.minimum(first, end), end


def pool_keys(k: Tensor, size: int, stride: int) -> Tensor:
    """Mean of every complete window, rounded to k's dtype: ``[..., Lk, D]`` -> float64 ``[..., n, D]``."""
    if k.shape[-2] < size:
        return k.double()[..., :0, :]
    windows = k.double().unfold(-2, size, stride)  # [..., n, D, size]
    return windows.mean(-1).to(k.dtype).double()


def block_scores(
    q: Tensor,
    k: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Scores ``r[j]`` of every key block for every query of one unpadded sequence.

    Args:
        q: ``[Hq, Lq, D]``; query ``i`` stands at position ``offset + i``.
        k: ``[Hkv, Lk, D]``.
        geometry: the block geometry, whose scorer decides.
        scale: softmax scale.
        offset: position of the first query.
        key_mask: bool ``[Lk]``, False where a key is invalid; read by token scores.
        window: sliding window, read by token scores.
        softcap: scaled products ``x`` become ``softcap * tanh(x / softcap)``; 0: no cap.

    Returns:
        float64 ``[Hkv, Lq, n_blocks]``; ``-inf`` where nothing of a block that is scored is visible: no compressed
        key, or no token.
    """
    heads_kv, (heads_q, length_q, dim) = k.shape[0], q.shape
    queries = q.double().reshape(heads_kv, heads_q // heads_kv, length_q, dim)
    positions = torch.arange(length_q, device=q.device) + offset
    last = tile_position(positions, geometry.query_block, k.shape[1])  # [Lq]
    if geometry.scorer == "tokens":
        index = torch.arange(k.shape[1], device=k.device)
        visible = index <= last[:, None]  # [Lq, Lk]
        if key_mask is not None:
            visible = visible & key_mask
        if window is not None:
            visible = visible & (index > last[:, None] - window)
        scores, visible = _token_scores(scale * queries, k, visible, geometry, softcap)
        return _shared(scores, positions, geometry.query_block).masked_fill(~visible, NEG_INF)
    scores, visible = _window_scores(scale * queries, k, last, geometry, softcap)
    scores = _shared(scores, positions, geometry.query_block).masked_fill(~visible, NEG_INF)
    starts = geometry.kernel_stride * torch.arange(scores.shape[-1], device=k.device)
    blocks = torch.arange(geometry.num_blocks(k.shape[1]), device=k.device)
    begin, end = blocks * geometry.block_size, (blocks + 1) * geometry.block_size
    overlaps = (starts < end[:, None]) & (starts + geometry.kernel_size > begin[:, None])  # [n_blocks, n1]
    columns = [
        scores[..., hit].amax(-1) if bool(hit.any()) else torch.full_like(scores[..., :1].sum(-1), NEG_INF)
        for hit in overlaps
    ]
    return torch.stack(columns, -1) if columns else scores.new_empty(*scores.shape[:2], 0)


def _shared(scores: Tensor, positions: Tensor, query_block: int) -> Tensor:
    """Scores ``[Hkv, Lq, n]``, added up over the queries that share a selection."""
    if query_block == 1:
        return scores
    tile = positions // query_block
    return (tile[:, None] == tile[None, :]).double() @ scores


def capped(scores: Tensor, softcap: float) -> Tensor:
    """Scaled scores under a soft cap; 0: none."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _window_scores(
    queries: Tensor, k: Tensor, last: Tensor, geometry: BlockGeometry, softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores of compressed keys ``[Hkv, Lq, n1]`` for scaled queries ``[Hkv, G, Lq, D]``; which of them are visible."""
    size, stride = geometry.kernel_size, geometry.kernel_stride
    k1 = pool_keys(k, size, stride)  # [Hkv, n1, D]
    visible = stride * torch.arange(k1.shape[1], device=k.device) + size - 1 <= last[:, None]  # [Lq, n1]
    logits = capped(queries @ k1[:, None].mT, softcap)  # [Hkv, G, Lq, n1]
    if geometry.lse == "exact":
        norm = logits.masked_fill(~visible, NEG_INF).logsumexp(-1, keepdim=True)
        normalised = visible.any(-1)  # [Lq]
    else:
        k2 = pool_keys(k, COARSE_FACTOR * size, COARSE_FACTOR * stride)  # [Hkv, n2, D]
        starts2 = COARSE_FACTOR * stride * torch.arange(k2.shape[1], device=k.device)
        visible2 = starts2 + COARSE_FACTOR * size - 1 <= last[:, None]
        coarse = capped(queries @ k2[:, None].mT, softcap)  # [Hkv, G, Lq, n2]
        norm = coarse.masked_fill(~visible2, NEG_INF).logsumexp(-1, keepdim=True)
        normalised = visible2.any(-1)
    scores = torch.exp(logits - torch.where(normalised[:, None], norm, 0.0)).sum(1)  # [Hkv, Lq, n1]
    return torch.where(normalised[:, None], scores, 0.0), visible


def index_keys(k: Tensor, geometry: BlockGeometry) -> Tensor:
    """The channels of keys that token scores read, as they are stored: ``[Hkv, Lk, D]`` -> float64 ``[Hkv, Lk, d]``."""
    sets = geometry.channels * (k.shape[0] if len(geometry.channels) == 1 else 1)
    keys = torch.stack([k[head][:, list(channels)] for head, channels in enumerate(sets)])
    if geometry.score_dtype == "key":
        return keys.double()
    kept, highest = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}[geometry.score_dtype]
    largest = keys.float().abs().amax(-1, keepdim=True)  # rounded as in storage: in float32
    step = largest / largest.new_tensor(highest)  # by a number of the host CUDA multiplies with its reciprocal
    parts = keys.float() / torch.where(step > 0, step, 1.0)
    stored = parts.round().to(kept) if kept is torch.int8 else parts.to(kept)
    return stored.double() * step.double()


def _token_scores(
    queries: Tensor, k: Tensor, visible: Tensor, geometry: BlockGeometry, softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores of blocks by their tokens for scaled queries ``[Hkv, G, Lq, D]``, and which have a visible one.

    Token ``j`` scores ``t[j] = q.k[j]`` over the channels, a block the maximum ``m`` of its visible tokens, and a
    query's heads are added: ``sum of exp(m - z)``, with ``z`` the log-sum-exp of ``m`` over all blocks.
    """
    sets = geometry.channels * (k.shape[0] if len(geometry.channels) == 1 else 1)
    queries = torch.stack([queries[head][..., list(channels)] for head, channels in enumerate(sets)])
    logits = capped(queries @ index_keys(k, geometry)[:, None].mT, softcap)  # [Hkv, G, Lq, Lk]
    tokens = logits.masked_fill(~visible, NEG_INF)
    room = -k.shape[1] % geometry.block_size
    best = pad(tokens, (0, room), value=NEG_INF).unflatten(-1, (-1, geometry.block_size)).amax(-1)
    seen = pad(visible, (0, room)).unflatten(-1, (-1, geometry.block_size)).any(-1)  # [Lq, n_blocks]
    norm = best.logsumexp(-1, keepdim=True)
    return torch.exp(best - norm.masked_fill(norm.isinf(), 0.0)).sum(1), seen


def tile_position(positions: Tensor, query_block: int, length: int) -> Tensor:
    """Position of the last query, within the sequence, of the tile that each position belongs to."""
    return (positions // query_block * query_block + query_block - 1).clamp(max=length - 1)


def block_importance(key_bias: Tensor, geometry: BlockGeometry) -> Tensor:
    """Importance of every key block of one sequence, whatever the query (NOSA, arXiv 2510.13602).

    Args:
        key_bias: ``[Hkv or 1, Lk]``, the importance of the keys; below `LEAST_BIAS` a key is hidden.
        geometry: the block geometry.

    Returns:
        float64 ``[Hkv or 1, n_blocks]``: of the complete windows that overlap a block the largest mean; ``-inf`` where
        there is none or each has a hidden key.
    """
    g, length = geometry, key_bias.shape[1]
    keys = torch.where(key_bias.double() < LEAST_BIAS, NEG_INF, key_bias.double())
    found = torch.full((key_bias.shape[0], g.num_blocks(length)), NEG_INF, dtype=torch.float64, device=keys.device)
    for start in range(0, length - g.kernel_size + 1, g.kernel_stride):
        mean = keys[:, start : start + g.kernel_size].sum(1) / g.kernel_size
        touched = slice(start // g.block_size, (start + g.kernel_size - 1) // g.block_size + 1)
        found[:, touched] = torch.maximum(found[:, touched], mean[:, None])
    return found


def select_sequence(
    q: Tensor,
    k: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The selected set of one unpadded sequence, bool ``[Hkv, Lq, n_blocks]``; see `block_scores`.

    With ``geometry.agnostic_blocks`` of ``n`` the best ``selected_blocks - n`` blocks by score are taken first, forced
    ones included, and then the best of the rest by `block_importance` of ``key_bias [Hkv or 1, Lk]``.
    """
    g = geometry
    length_q, length_k = q.shape[1], k.shape[1]
    count = g.num_blocks(length_k)
    scores = block_scores(
        q, k, geometry=g, scale=scale, offset=offset, key_mask=key_mask, window=window, softcap=softcap
    )
    positions = torch.arange(length_q, device=q.device) + offset
    own = tile_position(positions, g.query_block, length_k) // g.block_size  # [Lq]
    blocks = torch.arange(count, device=q.device)
    candidate = blocks <= own[:, None]  # [Lq, n_blocks]
    if window is not None:
        last = tile_position(positions, g.query_block, length_k)
        candidate &= (blocks + 1) * g.block_size - 1 > last[:, None] - window
    forced = candidate & ((blocks < g.init_blocks) | (blocks >= own[:, None] - g.local_blocks))
    scores = scores.clamp(min=-1.0)  # a candidate without a score still comes before what is no candidate
    rank = torch.where(forced, torch.inf, scores).masked_fill(~candidate, NEG_INF)
    chosen = _best(rank, g.selected_blocks - g.agnostic_blocks) & candidate
    if g.agnostic_blocks:
        assert key_bias is not None
        importance = block_importance(key_bias, g)[:, None].clamp(min=torch.finfo(torch.float64).min)
        rank = torch.where(chosen, torch.inf, importance).masked_fill(~candidate, NEG_INF)
        chosen = _best(rank, g.selected_blocks) & candidate
    return chosen


def _best(rank: Tensor, count: int) -> Tensor:
    """Where the `count` largest numbers of each row are; ties go to the lower index."""
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def select_blocks(q: Tensor, k: Tensor, **fields: Any) -> Tensor:
    """Selected blocks of a batch, as a set.

    Args:
        q: ``[B, Hq, Lq, D]``; query ``i`` stands at key index ``offset + i``.
        k: ``[B, Hkv, Lk, D]``.
        fields: those of `PrefillParams`; without ``dense_len`` every sequence is sparse.

    Returns:
        bool ``[B, Hkv, Lq, n_blocks]``; blocks are numbered from the sequence's own first key.
    """
    call = PrefillParams(**{"dense_len": 0} | fields)
    count = call.geometry.num_blocks(k.shape[2])
    chosen = q.new_zeros(q.shape[0], k.shape[1], q.shape[2], count, dtype=torch.bool)
    for row, keys, queries, shift in sequences(q, k, call):
        if keys.stop - keys.start < max(call.dense_len, 1) or queries.stop <= queries.start:
            continue
        part = select_sequence(
            q[row, :, queries],
            k[row, :, keys],
            geometry=call.geometry,
            scale=call.scale,
            offset=shift + queries.start - keys.start,
            key_mask=None if call.key_mask is None else call.key_mask[row, keys],
            window=call.window,
            softcap=call.softcap,
            key_bias=None if call.key_bias is None else call.key_bias[min(row, call.key_bias.shape[0] - 1), :, keys],
        )
        chosen[row, :, queries, : part.shape[-1]] = part
    return chosen


def sequences(q: Tensor, k: Tensor, call: PrefillParams) -> list[tuple[int, slice, slice, int]]:
    """Per sequence: its row, the slice of its keys, that of the queries that stand on them, and what a query's number
    is less than its key's.
    """
    batch, length_q, length_k, offset = q.shape[0], q.shape[2], k.shape[2], call.first_key(q, k)
    every = slice(0, length_q)
    if call.cu_seqlens_k is None:
        mask = torch.ones(batch, length_k, dtype=torch.bool) if call.key_mask is None else call.key_mask
        bounds = zip(*(number.tolist() for number in sequence_bounds(mask)), strict=True)
        places = [(row, slice(*bound), every, offset) for row, bound in enumerate(bounds)]
        if call.offsets is not None:
            shifts = [offset + number for number in call.offsets.expand(batch).tolist()]
            ends = [max(keys.start, min(keys.stop, shifts[row] + length_q)) for row, keys, _, _ in places]
            places = [(row, slice(keys.start, ends[row]), every, shifts[row]) for row, keys, _, _ in places]
    else:
        places = []
        for number, (begin, end) in enumerate(pairwise(call.cu_seqlens_k.tolist())):
            row = begin // max(length_k, 1)
            keys, queries, shift = slice(begin - row * length_k, end - row * length_k), every, offset
            if call.cu_seqlens_q is not None:
                queries = slice(*call.cu_seqlens_q[number : number + 2].tolist())
                shift = keys.stop - queries.stop
            if begin < end:
                places.append((row, keys, queries, shift))
    found = []
    for row, keys, queries, shift in places:
        low = min(max(keys.start - shift, queries.start), queries.stop)
        high = max(min(keys.stop - shift, queries.stop), low)
        found.append((row, keys, slice(low, high), shift))
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None, **fields: Any) -> tuple[Tensor, Tensor]:
    """Causal attention over selected blocks, or over everything.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        selected: bool ``[B, Hkv, Lq, n_blocks]`` from `select_blocks`; None for dense attention.
        fields: those of `PrefillParams`; without ``dense_len`` every sequence is sparse.

    Returns:
        ``[B, Hq, Lq, Dv]`` and the log-sum-exp ``[B, Hq, Lq]``, sinks counted in, float64. A query without a visible
        key gives 0 and ``-inf``, or its sink; so do queries outside every sequence.
    """
    call = PrefillParams(**{"dense_len": 0} | fields)
    batch, heads_q, length_q, dim = q.shape
    _, heads_kv, length_k, _ = k.shape
    group = heads_q // heads_kv
    allowed = torch.zeros(batch, heads_kv, length_q, length_k, dtype=torch.bool, device=q.device)
    for row, keys, queries, shift in sequences(q, k, call):
        positions = torch.arange(length_q, device=q.device)[queries] + shift
        key_index = torch.arange(length_k, device=q.device)[keys]
        see = key_index <= positions[:, None]  # [queries, keys]
        if call.key_mask is not None:
            see = see & call.key_mask[row, keys]
        if call.window is not None:
            see = see & (key_index > positions[:, None] - call.window)
        if selected is not None and keys.stop - keys.start >= call.dense_len:
            block = (key_index - keys.start) // call.geometry.block_size
            see = see & selected[row, :, queries][..., block]  # [Hkv, queries, keys]
        allowed[row, :, queries, keys] = see
    queries_ = q.double().reshape(batch, heads_kv, group, length_q, dim)
    logits = capped(call.scale * queries_ @ k.double()[:, :, None].mT, call.softcap)  # [B, Hkv, G, Lq, Lk]
    if call.key_bias is not None:
        hidden = call.key_bias.double() < LEAST_BIAS
        logits = logits + call.key_bias.double().masked_fill(hidden, 0.0)[:, :, None, None]
        allowed = allowed & ~hidden[:, :, None]
    logits = logits.masked_fill(~allowed[:, :, None], NEG_INF)
    if call.sinks is not None:  # as one key more, of which nothing is added
        sinks = call.sinks.double().view(1, heads_kv, group, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], -1)
    empty = logits.isneginf().all(-1)  # [B, Hkv, G, Lq]
    lse = logits.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, NEG_INF)
    weights = torch.exp(logits - lse.masked_fill(empty, 0.0)[..., None])  # [B, Hkv, G, Lq, Lk]
    out = weights[..., :length_k] @ v.double()[:, :, None]
    return out.reshape(batch, heads_q, length_q, v.shape[-1]), lse.reshape(batch, heads_q, length_q)
