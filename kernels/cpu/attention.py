"""Sparse attention of one sequence on the CPU (InfLLM-V2, arXiv 2509.24663, section 3.1).

The softmax is kept unnormalised: per query row a running maximum ``top`` of the binary logits, the sum
``total`` of ``2 ** (logit - top)`` and the sum ``acc`` of these weights times the values. The band comes
first and sets ``top``; far blocks then only add, as long as nothing nears overflow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..geometry import BlockGeometry
from .gemm import LN2, LOG2E, MASKED, compute_dtype, round_up, row_product
from .layout import BAND_KEY_STEP, BandTile, Sight, band_tiles, far_visits, includes_band

CHUNK_TOKENS = 8192
"""Queries whose sums are held at once: 8192 x 3 heads x 64 float32 are 6 MB, well within L3."""

KEY_CHUNK = 2560
"""Most keys of a band tile that meet its queries in one product; the default band has 2112."""

GATHER_TOKENS = 32
"""Up to this many queries, gathering every query's own keys beats going block by block."""

OVERFLOW = 2.0**90
"""A far block whose weights exceed this relative to ``top`` raises ``top`` first."""


class SoftmaxSums:
    """Unnormalised softmax of the query rows of one KV head; the last row belongs to no query.

    Attributes:
        x: ``[n + 1, G, D + 1]``; queries times ``scale * log2(e)``, then what is added to every logit.
        top: ``[n + 1, G]``, `MASKED` before the first key.
        total: ``[n + 1, G]``.
        acc: ``[n + 1, G, Dv]``.
    """

    def __init__(self, q: Tensor, scale: float, dim_v: int) -> None:
        group, tokens, _ = q.shape
        self.x = padded_rows(q, scale * LOG2E)
        self.top = self.x.new_full((tokens + 1, group), MASKED)
        self.top[tokens] = 0.0
        self.total = self.x.new_zeros(tokens + 1, group)
        self.acc = self.x.new_zeros(tokens + 1, group, dim_v)

    def result(self) -> tuple[Tensor, Tensor]:
        """Output ``[n, G, Dv]`` and natural log-sum-exp ``[n, G]``; 0 and ``-inf`` where nothing was seen."""
        top, total, acc = self.top[:-1], self.total[:-1], self.acc[:-1]
        empty = top <= 0.5 * MASKED
        lse = (top + total.log2()).mul_(LN2).masked_fill_(empty, -torch.inf)
        return acc.div_(total[..., None]).masked_fill_(empty[..., None], 0.0), lse


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    mask: Tensor | None,
    window: int | None,
) -> None:
    """Attention of one sequence.

    Args:
        q: ``[Hkv, G, n, D]``; query ``i`` stands at position ``offset + i``, ``offset + n <= L``.
        k: ``[Hkv, L, D]``.
        v: ``[Hkv, L, Dv]``.
        blocks: int32 ``[Hkv, n, S]``, distinct but for -1; None for attention to all keys that a query may see.
        out: ``[Hkv, G, n, Dv]``, written.
        lse: ``[Hkv, G, n]``, written.
        geometry: the block geometry.
        scale: softmax scale.
        offset: position of the first query.
        mask: bool ``[L]``, False where a key is invalid; None if none is.
        window: the query at position ``p`` sees keys after ``p - window`` only; None: all up to its own.
    """
    if blocks is None and window is None and mask is None and _has_fused_kernel(q, k, v):
        _attend_fused(q, k, v, out, lse, scale, offset)
        return
    length_q, dim_v = q.shape[2], v.shape[-1]
    sight = Sight(geometry, window, hidden_keys(mask))
    for head in range(q.shape[0]):
        few = blocks is not None and length_q <= GATHER_TOKENS
        keys, values = k[head], v[head]
        if not few:
            keys, values = padded_keys(keys, ones=True), padded_keys(values, ones=False)
        for begin in range(0, length_q, CHUNK_TOKENS):
            end = min(length_q, begin + CHUNK_TOKENS)
            sums = SoftmaxSums(q[head, :, begin:end], scale, dim_v)
            start = offset + begin
            if blocks is None:
                _add_band(sums, keys, values, start, sight, dense=True)
            elif few:
                _add_gathered(sums, keys, values, blocks[head], start, sight)
            else:
                visits = blocks[head, begin:end]
                banded = includes_band(visits, start, sight)
                if banded:
                    _add_band(sums, keys, values, start, sight, dense=False)
                _add_far(sums, keys, values, visits, start, sight, banded=banded)
            part, part_lse = sums.result()
            out[head, :, begin:end] = part.transpose(0, 1)
            lse[head, :, begin:end] = part_lse.t()


def _has_fused_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's flash kernel for the CPU takes these tensors."""
    unit = all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    return q.device.type == "cpu" and unit and k.shape[-1] == v.shape[-1]


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, offset: int) -> None:
    """Dense causal attention by the flash kernel: the keys that all queries see, and those from the first query on."""
    group, length_q = q.shape[1:3]
    keys, values = (x[:, None].expand(-1, group, -1, -1) for x in (k, v))  # [Hkv, G, L, D]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    own = slice(offset, offset + length_q)
    part, part_lse = attend(q, keys[:, :, own], values[:, :, own], 0.0, True, scale=scale)
    if offset == 0:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    common, common_lse = attend(q, keys[:, :, :offset], values[:, :, :offset], 0.0, False, scale=scale)
    torch.logaddexp(part_lse.to(lse.dtype), common_lse.to(lse.dtype), out=lse)
    weight = (common_lse - lse).exp_()[..., None]  # [Hkv, G, n, 1]
    out.copy_(torch.lerp(part.to(weight.dtype), common.to(weight.dtype), weight))


def padded_rows(x: Tensor, factor: float = 1.0) -> Tensor:
    """``[G, n, D]`` -> ``factor * x`` as ``[n + 1, G, D + 1]`` in the type of sums; the rest is 0."""
    group, tokens, dim = x.shape
    rows = torch.zeros(tokens + 1, group, dim + 1, dtype=compute_dtype(x.dtype), device=x.device)
    rows[:tokens, :, :dim] = x.transpose(0, 1)
    return rows.mul_(factor)


def padded_keys(x: Tensor, *, ones: bool) -> Tensor:
    """Rows in the type of sums, with zeros up to a multiple of `BAND_KEY_STEP`.

    Args:
        x: ``[L, D]``.
        ones: whether to append a column of ones.

    Returns:
        ``[L', D]`` or ``[L', D + 1]``, contiguous.
    """
    length, dim = x.shape
    rows = torch.zeros(round_up(length, BAND_KEY_STEP), dim + ones, dtype=compute_dtype(x.dtype), device=x.device)
    rows[:length, :dim] = x
    if ones:
        rows[:, dim] = 1.0
    return rows


def hidden_keys(mask: Tensor | None) -> Tensor | None:
    """The inverse of ``mask [L]``, padded like `padded_keys`."""
    return None if mask is None else pad(~mask, (0, -mask.shape[0] % BAND_KEY_STEP))


def hide_past(logits: Tensor, tile: BandTile, first_key: int, window: int) -> None:
    """Mask the keys before each window of a tile's queries, in place: ``logits [n*G, keys]`` from `first_key` on."""
    tokens = tile.end - tile.begin
    end = min(first_key + logits.shape[1], tile.end - window)
    last_hidden = torch.arange(tile.begin, tile.end, device=logits.device) - window
    past = torch.arange(first_key, end, device=logits.device) <= last_hidden[:, None]
    logits.view(tokens, -1, logits.shape[1])[:, :, : end - first_key].masked_fill_(past[:, None], MASKED)


def hide_future(logits: Tensor, tile: BandTile, first_key: int) -> None:
    """Mask the keys after each query of a tile, in place.

    Args:
        logits: ``[n*G, keys]``.
        tile: its queries.
        first_key: position of the first key in ``logits``.
    """
    tokens, keys = tile.end - tile.begin, logits.shape[1]
    begin = max(first_key, tile.begin)
    positions = torch.arange(tile.begin, tile.end, device=logits.device)
    future = torch.arange(begin, first_key + keys, device=logits.device) > positions[:, None]
    logits.view(tokens, -1, keys)[:, :, begin - first_key :].masked_fill_(future[:, None], MASKED)


def key_ranges(tile: BandTile) -> Iterator[tuple[int, int]]:
    """The keys of a tile in ranges of few different lengths; the last may pass the tile's end."""
    end = tile.end if tile.first_key else round_up(tile.end, BAND_KEY_STEP)
    for low in range(tile.first_key, end, KEY_CHUNK):
        yield low, min(end, low + KEY_CHUNK)


def band_logits(rows: Tensor, k: Tensor, tile: BandTile, low: int, high: int, sight: Sight) -> Tensor:
    """Logits ``[R, high - low]`` of a tile's rows over a range of its keys, masked."""
    logits: Tensor = row_product(rows, k[low:high])
    if high > tile.begin:
        hide_future(logits, tile, low)
    if sight.window is not None and low < tile.end - sight.window:
        hide_past(logits, tile, low, sight.window)
    if sight.hidden is not None:
        logits.masked_fill_(sight.hidden[low:high], MASKED)
    return logits


def _add_band(
    sums: SoftmaxSums,
    k: Tensor,
    v: Tensor,
    offset: int,
    sight: Sight,
    *,
    dense: bool,
) -> None:
    """Add the keys of every query's band: ``k [L', D + 1]``, ``v [L', Dv]``."""
    tokens, group, dim = sums.x[1:].shape
    for tile in band_tiles(offset, offset + tokens, group, sight, dense=dense):
        part = slice(tile.begin - offset, tile.end - offset)
        rows = sums.x[part].view(-1, dim)
        top, total = sums.top[part].view(-1), sums.total[part].view(-1)
        acc = sums.acc[part].view(-1, v.shape[1])
        for low, high in key_ranges(tile):
            logits = band_logits(rows, k, tile, low, high, sight)
            _raise_top(top, total, acc, logits.amax(1))
            weights = logits.sub_(top[:, None]).exp2_()
            total += weights.sum(1)
            acc += row_product(weights, v[low:high].t())


def _raise_top(top: Tensor, total: Tensor, acc: Tensor, other: Tensor) -> None:
    """Raise the running maxima of rows to ``other`` where that is higher, in place."""
    higher = torch.maximum(top, other)
    shrink = (top - higher).exp2_()
    top.copy_(higher)
    total.mul_(shrink)
    acc.mul_(shrink[:, None])


def _add_far(
    sums: SoftmaxSums,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    offset: int,
    sight: Sight,
    *,
    banded: bool,
) -> None:
    """Add the blocks outside the band, or all blocks: ``k [L', D + 1]``, ``v [L', Dv]``, ``blocks [n, S]``."""
    tokens, group, dim = sums.x.shape
    x, acc = sums.x.view(tokens, -1), sums.acc.view(tokens, -1)
    # With a top in every row, logits come out of the product relative to it.
    relative = banded and sight.hidden is None
    if relative:
        sums.x[..., -1] = -sums.top
    size, count = sight.geometry.block_size, sight.geometry.num_blocks(k.shape[0])
    for block, visitors in far_visits(blocks, offset, count, group, sight, beyond_band=banded):
        keys = slice(block * size, (block + 1) * size)
        rows = x.index_select(0, visitors).view(-1, dim)  # [r*G, D + 1]
        weights = far_logits(rows, k, visitors, block, offset, sight, causal=False).exp2_() if relative else None
        total = None if weights is None else weights.sum(1)
        if weights is None or total is None or not float(total.max()) < OVERFLOW:
            rows[:, -1] = 0.0
            weights = far_logits(rows, k, visitors, block, offset, sight, causal=not banded)
            top = _raise_visitors(sums, visitors, weights.amax(1).view(-1, group))
            weights.sub_(top.view(-1, 1)).exp2_()
            total = weights.sum(1)
            if relative:
                sums.x[visitors, :, -1] = -top
        sums.total.index_add_(0, visitors, total.view(-1, group))
        acc.index_add_(0, visitors, row_product(weights, v[keys].t()).view(visitors.shape[0], -1))


def _raise_visitors(sums: SoftmaxSums, visitors: Tensor, other: Tensor) -> Tensor:
    """Raise the running maxima of some queries to ``other [r, G]``; the new ones, ``[r, G]``."""
    top, total = sums.top.index_select(0, visitors), sums.total.index_select(0, visitors)
    acc = sums.acc.index_select(0, visitors)
    _raise_top(top.view(-1), total.view(-1), acc.view(-1, acc.shape[-1]), other.reshape(-1))
    sums.top.index_copy_(0, visitors, top)
    sums.total.index_copy_(0, visitors, total)
    sums.acc.index_copy_(0, visitors, acc)
    return top


def far_logits(
    rows: Tensor,
    k: Tensor,
    visitors: Tensor,
    block: int,
    offset: int,
    sight: Sight,
    *,
    causal: bool,
) -> Tensor:
    """Binary logits of the visitors of one block.

    Args:
        rows: ``[r*G, D + 1]``, scaled.
        k: ``[L', D + 1]``.
        visitors: int64 ``[r]``.
        block: the block.
        offset: position of visitor 0.
        sight: what the queries see.
        causal: whether the block may have keys after a visitor.

    Returns:
        ``[r*G, keys of the block]``, `MASKED` where a key may not be seen.
    """
    begin = block * sight.geometry.block_size
    keys = slice(begin, begin + sight.geometry.block_size)
    logits: Tensor = row_product(rows, k[keys])
    # Visitors ascend: the last one's window starts last.
    windowed = sight.window is not None and begin <= int(visitors[-1]) + offset - sight.window
    if causal or windowed:
        ahead = torch.arange(begin, begin + logits.shape[1], device=rows.device) - (visitors[:, None] + offset)
        unseen = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)  # [r, keys]
        if sight.window is not None:
            unseen |= ahead <= -sight.window
        logits.view(visitors.shape[0], -1, logits.shape[1]).masked_fill_(unseen[:, None], MASKED)
    if sight.hidden is not None:
        logits.masked_fill_(sight.hidden[keys], MASKED)
    return logits


def gathered_keys(blocks: Tensor, offset: int, length: int, sight: Sight) -> tuple[Tensor, Tensor]:
    """Every query's own keys.

    Args:
        blocks: int32 ``[n, S]``; -1 is none.
        offset: position of the first query.
        length: keys in the sequence.
        sight: what the queries see.

    Returns:
        int64 ``[n, S*size]`` key positions, and bool ``[n, S*size]``, True where that key may not be seen.
    """
    tokens, size = blocks.shape[0], sight.geometry.block_size
    keys = blocks.long()[:, :, None] * size + torch.arange(size, device=blocks.device)
    keys = keys.view(tokens, -1)
    positions = torch.arange(offset, offset + tokens, device=blocks.device)
    unseen = (keys < 0) | (keys > positions[:, None])
    if sight.window is not None:
        unseen |= keys <= positions[:, None] - sight.window
    keys = keys.clamp_(0, length - 1)
    if sight.hidden is not None:
        unseen |= sight.hidden[keys]
    return keys, unseen


def _add_gathered(
    sums: SoftmaxSums,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    offset: int,
    sight: Sight,
) -> None:
    """Add every query's selected blocks, query by query: ``k [L, D]``, ``v [L, Dv]``, ``blocks [n, S]``."""
    keys, unseen = gathered_keys(blocks, offset, k.shape[0], sight)
    for token in range(blocks.shape[0]):
        rows = sums.x[token, :, :-1]
        logits = rows @ k[keys[token]].to(rows.dtype).t()  # [G, S*B]
        logits.masked_fill_(unseen[token], MASKED)
        top = logits.amax(1)
        weights = logits.sub_(top[:, None]).exp2_()
        sums.top[token] = top
        sums.total[token] = weights.sum(1)
        sums.acc[token] = weights @ v[keys[token]].to(rows.dtype)
