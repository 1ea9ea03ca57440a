"""Block selection of one sequence on the CPU (InfLLM-V2, arXiv 2509.24663, section 3.2).

Queries run in chunks so that their scores stay in cache. Compressed keys are kept permuted, all first
keys of every block, then all second ones, ..., so that the maximum over a block's compressed keys is a
maximum of contiguous slices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from infllm_pass.kernels.cpu_linear import LOG2E, MASKED, compute_dtype, round_up, row_product
from infllm_pass.kernels.geometry import COARSE_FACTOR, BlockGeometry

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


def select_sequence(q: Tensor, k: Tensor, *, geometry: BlockGeometry, scale: float, offset: int) -> Tensor:
    """The blocks that every query of one unpadded sequence visits.

    Args:
        q: ``[Hkv, G, n, D]``; query ``i`` stands at position ``offset + i``, ``offset + n <= L``.
        k: ``[Hkv, L, D]``.
        geometry: the block geometry.
        scale: softmax scale.
        offset: position of the first query.

    Returns:
        int32 ``[Hkv, n, S]``, ``S = geometry.selected_blocks``; -1 in unused places.
    """
    g = geometry
    heads, _, length_q, _ = q.shape
    length_k = k.shape[1]
    positions = torch.arange(offset, offset + length_q, device=q.device)
    last = (positions // g.query_block * g.query_block + g.query_block - 1).clamp_(max=length_k - 1)
    own = last // g.block_size  # [n]
    slots = torch.arange(g.selected_blocks, device=q.device)
    # A query with no more blocks than it may visit takes them all.
    chosen = torch.where(slots <= own[:, None], slots, -1).int()  # [n, S]
    chosen = chosen.expand(heads, -1, -1).contiguous()
    begin = int((own < g.selected_blocks).sum())
    if begin == length_q:
        return chosen

    scorer = _Scorer(k, g, scale)
    tokens = max(1, CHUNK_ROWS // (g.query_block * q.shape[1])) * g.query_block
    while begin < length_q:
        end = min(length_q, (begin + offset + tokens) // g.query_block * g.query_block - offset)
        own_chunk = own[begin:end]
        forced = torch.cat(
            (
                torch.arange(g.init_blocks, device=q.device).expand(end - begin, -1),
                own_chunk[:, None] - torch.arange(g.local_blocks + 1, device=q.device),
            ),
            dim=1,
        )  # [n, init + local + 1]
        free = g.selected_blocks - forced.shape[1]
        chosen[:, begin:end, : forced.shape[1]] = forced
        for head in range(heads):
            scores = scorer.block_scores(head, q[head, :, begin:end], last[begin:end], own_chunk)
            best = top_blocks(scores, free) + g.init_blocks  # [tiles, free]
            if g.query_block > 1:
                best = best[_tile_index(last[begin:end], g.query_block)]
            chosen[head, begin:end, forced.shape[1] :] = best
        begin = end
    return chosen


def top_blocks(scores: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` highest scores of every row; of equal scores the lower number wins.

    Neighbouring blocks share a compressed key, so that equal scores are common.

    Args:
        scores: ``[R, n]``, ``n >= count``; not negative, or ``-inf``.
        count: how many to take.

    Returns:
        int64 ``[R, count]`` in no particular order.
    """
    if scores.dtype == torch.float64:
        return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
    # The bits of floats that are not negative are ordered as they are; the sign bit puts -inf below.
    bits = scores.contiguous().view(torch.int32).long() << 32
    lower_first = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return torch.topk(bits | lower_first, count, sorted=False).indices


def _tile_index(last: Tensor, query_block: int) -> Tensor:
    """Which tile of the chunk a query is in, from the positions of the tiles' last queries."""
    tile = last // query_block
    return tile - tile[0]


class _Scorer:
    """Compressed keys of one sequence, and the block scores of queries against them."""

    def __init__(self, k: Tensor, geometry: BlockGeometry, scale: float) -> None:
        g = geometry
        self.geometry = g
        self.scale = scale
        heads, length, dim = k.shape
        k1 = pool_keys(k, g.kernel_size, g.kernel_stride).to(compute_dtype(k.dtype))  # [Hkv, n1, D]
        per_block = g.block_size // g.kernel_stride
        blocks = round_up(max(g.num_blocks(length), -(-k1.shape[1] // per_block)), BLOCK_STEP)
        padded = pad(k1, (0, 0, 0, blocks * per_block - k1.shape[1]))
        self.keys = padded.view(heads, blocks, per_block, dim).transpose(1, 2).contiguous()  # [Hkv, B/s, n, D]
        if g.lse == "exact":
            self.norm_size, self.norm_stride, self.norm_keys = g.kernel_size, g.kernel_stride, k1
        else:
            self.norm_size, self.norm_stride = COARSE_FACTOR * g.kernel_size, COARSE_FACTOR * g.kernel_stride
            self.norm_keys = pool_keys(k, self.norm_size, self.norm_stride).to(k1.dtype)  # [Hkv, n2, D]
        missing = -self.norm_keys.shape[1] % NORM_STEP
        self.norm_keys = pad(self.norm_keys, (0, 0, 0, missing))

    def block_scores(self, head: int, q: Tensor, last: Tensor, own: Tensor) -> Tensor:
        """Scores of the blocks that are candidates but not forced.

        Args:
            head: KV head.
            q: ``[G, n, D]``; whole tiles of ``query_block``, except for the first and the last.
            last: int64 ``[n]``, the position of the last query of each query's tile.
            own: int64 ``[n]``, the block of that position.

        Returns:
            ``[tiles, blocks - init_blocks]``, from block ``init_blocks`` on; ``-inf`` where a block is
            forced or no compressed key of it is visible.
        """
        g = self.geometry
        group, tokens, dim = q.shape
        x = q.transpose(0, 1).to(self.keys.dtype).mul(self.scale * LOG2E).reshape(tokens * group, dim)
        low, high = g.init_blocks, int(own[-1]) - g.local_blocks
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
            first = torch.searchsorted(tile, torch.arange(scores.shape[0], device=tile.device))
            last, own = last[first], own[first]
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
        candidates = torch.arange(low, high, device=q.device)
        return best.masked_fill_(candidates >= own[:, None] - g.local_blocks, -torch.inf)

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
