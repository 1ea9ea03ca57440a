"""Block selection of one sequence on the CPU (InfLLM-V2, arXiv 2509.24663, section 3.2).

Queries run in chunks so that their scores stay in cache. Compressed keys are kept permuted, all first
keys of every block, then all second ones, ..., so that the maximum over a block's compressed keys is a
maximum of contiguous slices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..geometry import COARSE_FACTOR, BlockGeometry
from .gemm import LOG2E, MASKED, compute_dtype, round_up, row_product

BLOCK_STEP = 32
"""Blocks are scored in multiples of this many, for few shapes of products."""

NORM_STEP = 64
"""The same for the keys of the normaliser."""

CHUNK_ROWS = 768
"""Query rows (tokens x group) scored at once: 768 x 2048 float32 scores are 6 MB at 32k keys."""


def pool_keys(k: Tensor, size: int, stride: int) -> Tensor:
    """Mean of every complete window.

    Args:
        k: ``[H, L, D]``.
        size: tokens in a window, a multiple of ``stride``.
        stride: tokens between the starts of two windows.

    Returns:
        ``[H, n, D]``, ``n = max(0, (L - size) // stride + 1)``, in k's type; sums are float32 (float64
        for float64 keys).
    """
    heads, length, dim = k.shape
    count = max(0, (length - size) // stride + 1)
    if count == 0:
        return k[:, :0]
    steps = size // stride
    segments = count + steps - 1
    total = k[:, : segments * stride].to(compute_dtype(k.dtype))
    total = total.reshape(heads, segments, stride, dim).sum(2)  # [H, segments, D]
    pooled = total[:, :count].clone()
    for step in range(1, steps):
        pooled += total[:, step : step + count]
    return pooled.mul_(1.0 / size).to(k.dtype)


def select_sequence(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    length: int,
    offset: int,
    window: int | None,
) -> Tensor:
    """The blocks that every query of one unpadded sequence visits.

    Args:
        q: ``[Hkv, G, n, D]``; query ``i`` stands at position ``offset + i``, ``offset + n <= L``.
        k1: compressed keys ``[Hkv, n1, D]``, all that are complete.
        k2: coarse keys ``[Hkv, n2, D]``.
        geometry: the block geometry.
        scale: softmax scale.
        length: ``L``, keys of the sequence.
        offset: position of the first query.
        window: blocks without a key after ``p - window`` are no candidates of the query at ``p``; None: all are.

    Returns:
        int32 ``[Hkv, n, S]``, ``S = geometry.selected_blocks``; -1 in unused places.
    """
    g = geometry
    heads, _, length_q, _ = q.shape
    positions = torch.arange(offset, offset + length_q, device=q.device)
    last = (positions // g.query_block * g.query_block + g.query_block - 1).clamp_(max=length - 1)
    own = last // g.block_size  # [n]
    first = torch.zeros_like(own) if window is None else (last - window + 1).clamp_(min=0) // g.block_size  # [n]
    # A query with no more candidates than it may visit takes them all.
    slots = first[:, None] + torch.arange(g.selected_blocks, device=q.device)
    chosen = torch.where(slots <= own[:, None], slots, -1).int()  # [n, S]
    chosen = chosen.expand(heads, -1, -1).contiguous()
    crowded = (own - first >= g.selected_blocks).nonzero()
    if not crowded.numel():
        return chosen
    # From here on windows touch as many blocks as this query's or one less: never fewer than may be visited.
    begin = int(crowded[0])
    outside = first.clamp(max=g.init_blocks)  # [n], initial blocks that are no candidates

    scorer = _Scorer(k1, k2, length, g, scale)
    tokens = max(1, CHUNK_ROWS // (g.query_block * q.shape[1])) * g.query_block
    while begin < length_q:
        end = min(length_q, (begin + offset + tokens) // g.query_block * g.query_block - offset)
        skipped = int(outside[begin])
        end = begin + int((outside[begin:end] == skipped).sum())  # one number of forced blocks in a chunk
        own_chunk, first_chunk = own[begin:end], first[begin:end]
        forced = torch.cat(
            (
                torch.arange(skipped, g.init_blocks, device=q.device).expand(end - begin, -1),
                own_chunk[:, None] - torch.arange(g.local_blocks + 1, device=q.device),
            ),
            dim=1,
        )  # [n, init - skipped + local + 1]
        free = g.selected_blocks - forced.shape[1]
        chosen[:, begin:end, : forced.shape[1]] = forced
        for head in range(heads):
            chosen[head, begin:end, forced.shape[1] :] = scorer.best_blocks(
                head, q[head, :, begin:end], last[begin:end], own_chunk, first_chunk, free
            )
        begin = end
    return chosen


def top_blocks(scores: Tensor, count: int, barred: Tensor | None = None) -> Tensor:
    """Numbers of the ``count`` highest scores of every row; of equal scores the lower number wins.

    Neighbouring blocks share a compressed key, so that equal scores are common.

    Args:
        scores: ``[R, n]``, ``n >= count``; not negative, or ``-inf``.
        count: how many to take.
        barred: bool ``[R, n]``, whose scores are ``-inf`` and come after the other ``-inf``; None: there are none.

    Returns:
        int64 ``[R, count]`` in no particular order.
    """
    if scores.dtype == torch.float64:
        if barred is not None:
            scores = scores.clamp(min=-1.0).masked_fill_(barred, -torch.inf)
        return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
    # The bits of floats that are not negative are ordered as they are; the sign bit puts -inf below.
    bits = scores.contiguous().view(torch.int32).long() << 32
    lower_first = torch.arange(scores.shape[1], 0, -1, device=scores.device)
    if barred is not None:
        lower_first = torch.where(barred, 0, lower_first)
    return torch.topk(bits | lower_first, count, sorted=False).indices


def _tile_index(last: Tensor, query_block: int) -> Tensor:
    """Which tile of the chunk a query is in, from the positions of the tiles' last queries."""
    tile = last // query_block
    return tile - tile[0]


class _Scorer:
    """Compressed keys of one sequence, and the block scores of queries against them."""

    def __init__(self, k1: Tensor, k2: Tensor, length: int, geometry: BlockGeometry, scale: float) -> None:
        g = geometry
        self.geometry = g
        self.scale = scale
        k1, k2 = (keys.to(compute_dtype(keys.dtype)) for keys in (k1, k2))  # [Hkv, n, D]
        heads, _, dim = k1.shape
        per_block = g.block_size // g.kernel_stride
        blocks = round_up(max(g.num_blocks(length), -(-k1.shape[1] // per_block)), BLOCK_STEP)
        padded = pad(k1, (0, 0, 0, blocks * per_block - k1.shape[1]))
        self.keys = padded.view(heads, blocks, per_block, dim).transpose(1, 2).contiguous()  # [Hkv, B/s, n, D]
        if g.lse == "exact":
            self.norm_size, self.norm_stride, self.norm_keys = g.kernel_size, g.kernel_stride, k1
        else:
            self.norm_size, self.norm_stride = COARSE_FACTOR * g.kernel_size, COARSE_FACTOR * g.kernel_stride
            self.norm_keys = k2
        missing = -self.norm_keys.shape[1] % NORM_STEP
        self.norm_keys = pad(self.norm_keys, (0, 0, 0, missing))

    def best_blocks(self, head: int, q: Tensor, last: Tensor, own: Tensor, first: Tensor, count: int) -> Tensor:
        """The best scored of the candidates that are not forced.

        Args:
            head: KV head.
            q: ``[G, n, D]``; whole tiles of ``query_block``, except for the first and the last.
            last: int64 ``[n]``, the position of the last query of each query's tile.
            own: int64 ``[n]``, the block of that position.
            first: int64 ``[n]``, each query's first candidate.
            count: how many to take, no more than each query has.

        Returns:
            int64 ``[n, count]`` in no particular order.
        """
        g = self.geometry
        low, high = max(g.init_blocks, int(first[0])), int(own[-1]) - g.local_blocks
        if g.query_block > 1:
            tile = _tile_index(last, g.query_block)
            begins = torch.searchsorted(tile, torch.arange(int(tile[-1]) + 1, device=tile.device))
            own, first = own[begins], first[begins]
        scores = self._block_scores(head, q, last, low, high)  # [tiles, high - low]
        candidates = torch.arange(low, high, device=q.device)
        scores.masked_fill_(candidates >= own[:, None] - g.local_blocks, -torch.inf)
        barred = None
        if int(first[-1]) > low:
            barred = candidates < first[:, None]
            scores.masked_fill_(barred, -torch.inf)
        best = top_blocks(scores, count, barred) + low  # [tiles, count]
        return best[tile] if g.query_block > 1 else best

    def _block_scores(self, head: int, q: Tensor, last: Tensor, low: int, high: int) -> Tensor:
        """Scores of the blocks ``[low, high)``.

        Args:
            head: KV head.
            q: ``[G, n, D]``; whole tiles of ``query_block``, except for the first and the last.
            last: int64 ``[n]``, the position of the last query of each query's tile.
            low: the first block.
            high: one past the last block.

        Returns:
            ``[tiles, high - low]``; ``-inf`` where no compressed key of a block is visible.
        """
        g = self.geometry
        group, tokens, dim = q.shape
        x = q.transpose(0, 1).to(self.keys.dtype).mul(self.scale * LOG2E).reshape(tokens * group, dim)
        per_block = self.keys.shape[1]
        overhang = g.kernel_size // g.kernel_stride - 1
        base = max(0, low - -(-overhang // per_block))  # compressed keys of earlier blocks reach into low

        keys = self.keys[head, :, base : base + round_up(high - base, BLOCK_STEP)]  # [B/s, n, D]
        scores: Tensor = row_product(x, keys.reshape(-1, dim))  # [n*G, B/s*n]
        scores.sub_(self._log2_norm(head, x, last)[:, None]).exp2_()
        scores = scores.view(tokens, group, per_block, -1).sum(1)[:, :, : high - base]  # [n, B/s, n]
        if g.query_block > 1:
            tile = _tile_index(last, g.query_block)
            scores = scores.new_zeros(int(tile[-1]) + 1, *scores.shape[1:]).index_add_(0, tile, scores)
            last = last[torch.searchsorted(tile, torch.arange(scores.shape[0], device=tile.device))]
        if g.kernel_stride * (high * per_block - 1) + g.kernel_size - 1 > int(last[0]):
            block = torch.arange(base, high, device=q.device)
            phase = torch.arange(per_block, device=q.device)[:, None]
            end = g.kernel_stride * (block * per_block + phase) + g.kernel_size - 1  # [B/s, n]
            scores.masked_fill_(end > last[:, None, None], -torch.inf)

        best: Tensor = scores[:, :, low - base :].amax(1)  # [tiles, high - low]
        for distance in range(1, overhang + 1):
            back = -(-distance // per_block)
            phase_back = back * per_block - distance
            begin = max(low, back)  # the first block with such a compressed key
            if begin >= high:
                break
            reaching = scores[:, phase_back, begin - back - base : high - back - base]
            best[:, begin - low :] = torch.maximum(best[:, begin - low :], reaching)
        return best

    def _log2_norm(self, head: int, x: Tensor, last: Tensor) -> Tensor:
        """Binary log-sum-exp of x's logits over the visible normalising keys; ``inf`` where none is.

        Args:
            head: KV head.
            x: ``[n*G, D]``, scaled by ``scale * log2(e)``.
            last: int64 ``[n]``, positions up to which keys are visible.

        Returns:
            ``[n*G]``.
        """
        visible = ((last + 1 - self.norm_size) // self.norm_stride + 1).clamp_(min=0)  # [n]
        fewest, most = int(visible[0]), int(visible[-1])
        if most == 0:
            return x.new_full((x.shape[0],), torch.inf)
        logits: Tensor = row_product(x, self.norm_keys[head, : round_up(most, NORM_STEP)])  # [n*G, keys]
        keys = logits.shape[1]
        if fewest < keys:
            tail = logits.view(last.shape[0], -1, keys)[:, :, fewest:]
            hidden = torch.arange(fewest, keys, device=x.device) >= visible[:, None]
            tail.masked_fill_(hidden[:, None], MASKED)
        top = logits.amax(1)  # [n*G]
        norm = logits.sub_(top[:, None]).exp2_().sum(1).log2_().add_(top)
        return norm.masked_fill_(top <= MASKED, torch.inf)
