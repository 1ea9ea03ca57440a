"""Attention over a static cache, in the ways that models update one, beside the oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.kernels import reference

HIDDEN, HEADS, KV_HEADS, DIM = 24, 6, 2, 8

CONFIG = SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=8, init_blocks=1, window_size=8, topk=3, dense_len=40, scorer="pooled"
)
"""Four blocks are visited, of which the scores choose one; from 40 keys on, ten candidates at 96."""


def index_copy(cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
    cache.index_copy_(2, places, new)
    return cache


def subscript(cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
    cache[:, :, places] = new
    return cache


def index_put(cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
    rows = torch.arange(cache.shape[0])[:, None, None]
    heads = torch.arange(cache.shape[1])[:, None]
    return cache.index_put_((rows, heads, places), new)


def scatter(cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
    cache.scatter_(2, places[:, None, :, None].expand_as(new), new)
    return cache


def copied(cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy(2, places, new)


UPDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_copy_": index_copy,
    "subscript": subscript,
    "index_put_": index_put,
    "scatter_": scatter,
    "index_copy": copied,
}


class CachedAttention(nn.Module):
    """Projections around attention over a cache ``[B, KV_HEADS, C, DIM]``, in float64: no ranking hangs on rounding.

    Args:
        update: writes new keys or values at places, ``[T]`` or, for `scatter`, ``[B, T]``; gives the cache to read.
    """

    def __init__(self, update: Callable[[Tensor, Tensor, Tensor], Tensor] = index_copy) -> None:
        super().__init__()
        self.update = update
        self.q = nn.Linear(HIDDEN, HEADS * DIM)
        self.k = nn.Linear(HIDDEN, KV_HEADS * DIM)
        self.v = nn.Linear(HIDDEN, KV_HEADS * DIM)
        self.double()
        with torch.no_grad():
            self.q.weight.mul_(4)

    def heads(self, project: nn.Linear, x: Tensor) -> Tensor:
        return project(x).unflatten(2, (-1, DIM)).transpose(1, 2)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor | int, valid: Tensor | None = None
    ) -> Tensor:
        """Append tokens and attend.

        Args:
            x: ``[B, T, HIDDEN]``.
            keys: the cache, written.
            values: the same.
            position: slot of the first token: a number, 0-d, ``[1]`` or ``[B]``.
            valid: bool ``[B, C]``, or None.
        """
        places = torch.arange(x.shape[1]) + (
            position[:, None] if self._is_by_row(position) else position
        )  # [T], [B, T]
        q, k, v = (self.heads(project, x) for project in (self.q, self.k, self.v))
        rows = places if places.dim() == 2 else places[None]
        into = rows.expand(x.shape[0], -1) if self.update is scatter else places
        k, v = self.update(keys, into, k), self.update(values, into, v)
        mask = torch.arange(keys.shape[2]) <= rows[:, None, :, None]  # [B or 1, 1, T, C]
        if valid is not None:
            mask = mask & valid[:, None, None]
        k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask)

    @staticmethod
    def _is_by_row(position: Tensor | int) -> bool:
        return isinstance(position, Tensor) and position.dim() == 1 and position.shape[0] > 1


class GrowingAttention(CachedAttention):
    """The same over keys and values of earlier calls, to which a call's own are appended."""

    def forward(  # type: ignore[override]
        self, x: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append tokens and attend; the result, and all keys and values.

        Args:
            x: ``[B, T, HIDDEN]``.
            keys: ``[B, KV_HEADS, L - T, DIM]``.
            values: the same.
            valid: bool ``[B, L]``, or None.
        """
        q, k, v = (self.heads(project, x) for project in (self.q, self.k, self.v))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        length, count = keys.shape[2], x.shape[1]
        mask = torch.arange(length) <= torch.arange(count)[:, None] + (length - count)
        if valid is not None:
            mask = mask & valid[:, None, None]
        k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (keys, values))
        return F.scaled_dot_product_attention(q, k, v, mask), keys, values


def caches(batch: int = 1, capacity: int = 96) -> tuple[Tensor, Tensor]:
    """A cache's keys and values, full of what nobody may read."""
    k, v = (torch.randn(batch, KV_HEADS, capacity, DIM, dtype=torch.float64) * 100 for _ in range(2))
    return k, v


def expected(
    module: CachedAttention,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor | int,
    valid: Tensor | None = None,
    config: SparseAttentionConfig = CONFIG,
) -> Tensor:
    """What the oracle gives over the tokens that the rows hold: ``[B, HEADS, T, DIM]``; the caches hold `x` already."""
    q = module.heads(module.q, x)
    positions = torch.as_tensor(position).reshape(-1).expand(x.shape[0])
    rows = []
    for row, first in enumerate(positions.tolist()):
        part, seen = slice(row, row + 1), slice(0, first + x.shape[1])
        common = {"geometry": config.geometry_for(DIM), "scale": DIM**-0.5, "dense_len": config.dense_len}
        common |= {"offset": first} if valid is None else {"offset": 0, "offsets": positions[part]}
        if valid is not None:
            seen, common["key_mask"] = slice(None), valid[part]  # a row ends at its last query, in a hole or not
        k, v = keys[part, :, seen], values[part, :, seen]
        selected = reference.select_blocks(q[part], k, **common)
        rows.append(reference.attention(q[part], k, v, selected, **common)[0])
    return torch.cat(rows)


def tokens(batch: int, count: int) -> Tensor:
    """``[batch, count, HIDDEN]``."""
    return torch.randn(batch, count, HIDDEN, dtype=torch.float64)
