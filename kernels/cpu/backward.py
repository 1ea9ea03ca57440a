"""Gradient of the sparse attention of one sequence on the CPU, cut into the same pieces as the forward.

With the weights ``P`` rebuilt from the log-sum-exp, ``dV = P' dO``, ``dS = P * (dO V' - delta)`` with
``delta = sum(dO * O)``, ``dQ = scale * dS K`` and ``dK = scale * dS' Q``. Pieces are added one after
another, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import BlockGeometry
from .attention import (
    CHUNK_TOKENS,
    GATHER_TOKENS,
    band_logits,
    far_logits,
    gathered_keys,
    hidden_keys,
    key_ranges,
    padded_keys,
    padded_rows,
)
from .gemm import LN2, LOG2E, row_product
from .layout import Sight, band_tiles, far_visits, includes_band


class _Gradients:
    """The sums of one KV head and one chunk of queries, and what every piece needs.

    Attributes:
        x: ``[n + 1, G, D + 1]``; scaled queries, then minus the binary log-sum-exp.
        grad_out: ``[n + 1, G, Dv + 1]``; output gradients, then minus ``delta``.
        k: ``[L', D + 1]``, a column of ones last, so that ``x k'`` are the logarithms of the weights.
        v: ``[L', Dv + 1]``, the same, so that ``grad_out v'`` is ``dP - delta``.
        keys: ``[L', D]``, without the ones.
        grad_x: ``[n + 1, G, D]``.
        grad_k: ``[D, L']``, of all chunks.
        grad_v: ``[Dv, L']``, of all chunks.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = padded_keys(k, ones=True), padded_keys(v, ones=True)
        self.keys = padded_keys(k, ones=False)
        self.grad_k = self.keys.new_zeros(k.shape[1], self.keys.shape[0])
        self.grad_v = self.keys.new_zeros(v.shape[1], self.keys.shape[0])

    def start(self, q: Tensor, grad_out: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
        """Take up a chunk: ``q [G, n, D]``, ``grad_out`` and ``out [G, n, Dv]``, ``lse [G, n]``."""
        self.x = padded_rows(q, scale * LOG2E)
        # Infinite where a query saw nothing; all it meets is masked after the product.
        self.x[:-1, :, -1] = (lse / -LN2).t()
        self.grad_out = padded_rows(grad_out)
        delta = (self.grad_out[:-1, :, :-1] * out.transpose(0, 1)).sum(-1)  # [n, G]
        self.grad_out[:-1, :, -1] = -delta
        self.grad_x = torch.zeros_like(self.x[..., :-1])

    def piece(self, logits: Tensor, rows: Tensor, grad: Tensor, keys: slice | Tensor) -> Tensor:
        """Add one piece's part of the key and value gradients.

        Args:
            logits: ``[R, keys]``, masked; overwritten.
            rows: ``[R, D + 1]``.
            grad: ``[R, Dv + 1]``.
            keys: distinct keys.

        Returns:
            ``[R, D]``, the gradient of the rows.
        """
        weights = logits.exp2_()
        slope = row_product(grad, self.v[keys]).mul_(weights)  # [R, keys]
        grad_k = row_product(rows[:, :-1].t().contiguous(), slope.t())  # [D, keys]
        grad_v = row_product(grad[:, :-1].t().contiguous(), weights.t())  # [Dv, keys]
        if isinstance(keys, slice):
            self.grad_k[:, keys] += grad_k
            self.grad_v[:, keys] += grad_v
        else:
            self.grad_k.index_add_(1, keys, grad_k)
            self.grad_v.index_add_(1, keys, grad_v)
        grad_rows: Tensor = row_product(slope, self.keys[keys].t())
        return grad_rows


def attend_sequence_backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    mask: Tensor | None,
    window: int | None,
) -> None:
    """Gradient of one sequence.

    Args:
        grad_out: ``[Hkv, G, n, Dv]``.
        q: ``[Hkv, G, n, D]``.
        out: ``[Hkv, G, n, Dv]``.
        lse: ``[Hkv, G, n]``.
        k: ``[Hkv, L, D]``.
        v: ``[Hkv, L, Dv]``.
        blocks: int32 ``[Hkv, n, S]``, or None for attention to all keys that a query may see.
        grad_q: ``[Hkv, G, n, D]``, written.
        grad_k: ``[Hkv, L, D]``, written.
        grad_v: ``[Hkv, L, Dv]``, written.
        geometry: the block geometry.
        scale: softmax scale.
        offset: position of the first query.
        mask: bool ``[L]``, False where a key is invalid; None if none is.
        window: the query at position ``p`` sees keys after ``p - window`` only; None: all up to its own.
    """
    length_q, length_k = q.shape[2], k.shape[1]
    sight = Sight(geometry, window, hidden_keys(mask))
    for head in range(q.shape[0]):
        sums = _Gradients(k[head], v[head])
        for begin in range(0, length_q, CHUNK_TOKENS):
            part = slice(begin, min(length_q, begin + CHUNK_TOKENS))
            start = offset + begin
            sums.start(q[head, :, part], grad_out[head, :, part], out[head, :, part], lse[head, :, part], scale)
            if blocks is None:
                _add_band(sums, start, sight, dense=True)
            elif length_q <= GATHER_TOKENS:
                _add_gathered(sums, blocks[head], start, sight)
            else:
                visits = blocks[head, part]
                banded = includes_band(visits, start, sight)
                if banded:
                    _add_band(sums, start, sight, dense=False)
                _add_far(sums, visits, start, sight, banded=banded)
            grad_q[head, :, part] = sums.grad_x[:-1].mul_(scale).transpose(0, 1)
        # Rows carry scale * log2(e): taking log2(e) back leaves the scale of dK.
        grad_k[head] = sums.grad_k[:, :length_k].t() / LOG2E
        grad_v[head] = sums.grad_v[:, :length_k].t()


def _add_band(sums: _Gradients, offset: int, sight: Sight, *, dense: bool) -> None:
    """Add the keys of every query's band."""
    tokens, group, dim = sums.grad_x[1:].shape
    for tile in band_tiles(offset, offset + tokens, group, sight, dense=dense):
        part = slice(tile.begin - offset, tile.end - offset)
        rows, grad = sums.x[part].flatten(0, 1), sums.grad_out[part].flatten(0, 1)
        grad_rows = sums.grad_x[part].view(-1, dim)
        for low, high in key_ranges(tile):
            logits = band_logits(rows, sums.k, tile, low, high, sight)
            grad_rows += sums.piece(logits, rows, grad, slice(low, high))


def _add_far(sums: _Gradients, blocks: Tensor, offset: int, sight: Sight, *, banded: bool) -> None:
    """Add the blocks outside the band, or all blocks."""
    tokens, group, dim = sums.x.shape
    dim_v, size = sums.v.shape[1], sight.geometry.block_size
    x, grad_out = sums.x.view(tokens, -1), sums.grad_out.view(tokens, -1)
    grad_x = sums.grad_x.view(tokens, -1)
    count = sight.geometry.num_blocks(sums.k.shape[0])
    for block, visitors in far_visits(blocks, offset, count, group, sight, beyond_band=banded):
        rows = x.index_select(0, visitors).view(-1, dim)
        grad = grad_out.index_select(0, visitors).view(-1, dim_v)
        logits = far_logits(rows, sums.k, visitors, block, offset, sight, causal=not banded)
        grad_rows = sums.piece(logits, rows, grad, slice(block * size, (block + 1) * size))
        grad_x.index_add_(0, visitors, grad_rows.view(visitors.shape[0], -1))


def _add_gathered(sums: _Gradients, blocks: Tensor, offset: int, sight: Sight) -> None:
    """Add every query's selected blocks, query by query."""
    keys, unseen = gathered_keys(blocks, offset, sums.k.shape[0], sight)
    for token in range(blocks.shape[0]):
        seen = keys[token][~unseen[token]]  # distinct
        rows = sums.x[token]
        logits = row_product(rows, sums.k[seen])
        sums.grad_x[token] = sums.piece(logits, rows, sums.grad_out[token], seen)
