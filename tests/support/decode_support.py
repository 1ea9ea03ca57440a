"""A cache that grows step by step beside the oracle, for the tests of both decode operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops.decode import new_state

Operator = Callable[..., tuple[Tensor, Tensor]]

SMALL = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, local_blocks=1, selected_blocks=4)


HIDDEN = -1e6
"""Lowers the score of a key that is hidden from attention."""


@dataclass
class Cache:
    """A cache with its state; what holds no valid key is NaN.

    Attributes:
        operator: takes q, k, v, the state, lengths, starts, key_mask, window, scale, dense_len and the
            geometry.
        lengths: keys of each row so far, padding included.
        starts: padding of each row.
        token_first: whether the cache lies in memory as ``[B, C, H, D]``.
        slot_first: whether compressed keys lie in memory as ``[n, B, H, D]``.
        level: whether keys are all zero, so that all scores of a query are equal.
        holes: share of the keys that the key mask hides.
    """

    operator: Operator
    lengths: list[int]
    starts: list[int] | None = None
    geometry: BlockGeometry = SMALL
    group: int = 2
    heads: int = 2
    dim: int = 16
    value_dim: int = 8
    capacity: int = 160
    dense_len: int = 0
    window: int | None = None
    scale: float = 0.3
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    token_first: bool = False
    slot_first: bool = False
    level: bool = False
    holes: float = 0.0

    def __post_init__(self) -> None:
        self.k, self.v = (self._empty(size) for size in (self.dim, self.value_dim))
        self.key_mask = torch.rand(len(self.lengths), self.capacity, device=self.device) >= self.holes
        self.state = self._new_state()
        self.forget()
        for row, length in enumerate(self.lengths):
            self.write(row, self.start(row), length)

    def _empty(self, size: int) -> Tensor:
        shape = [len(self.lengths), self.heads, self.capacity, size]
        if self.token_first:
            shape[1:3] = shape[2:0:-1]
        cache = torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        return cache.transpose(1, 2) if self.token_first else cache

    def _new_state(self) -> list[Tensor]:
        *kept, filled = new_state(self.k, self.geometry)
        if self.slot_first:
            kept = [state.movedim(2, 0).contiguous().movedim(0, 2) for state in kept]
        return [*kept, filled]

    def start(self, row: int) -> int:
        """The row's first valid key."""
        return 0 if self.starts is None else self.starts[row]

    def write(self, row: int, begin: int, end: int) -> None:
        """Write random keys and values."""
        for cache in (self.k, self.v):
            some = torch.randn(self.heads, max(0, end - begin), cache.shape[3], device=self.device)
            cache[row, :, begin : max(begin, end)] = (some * (not (self.level and cache is self.k))).to(self.dtype)

    def forget(self) -> None:
        """Drop the state: nothing is filled, and what there was is poisoned."""
        *kept, filled = self.state
        for state in kept:
            if state.dtype.itemsize == 1:
                state.view(torch.uint8).fill_(0x5B)
            else:
                state.fill_(torch.nan)
        filled.zero_()

    def crop(self, count: int) -> None:
        """Take the last keys of every row back; nobody tells the operator."""
        self.lengths = [max(self.start(row), length - count) for row, length in enumerate(self.lengths)]
        for row, length in enumerate(self.lengths):
            self.k[row, :, length:] = torch.nan
            self.v[row, :, length:] = torch.nan

    def append(self, count: int) -> Tensor:
        """Append keys and values to every row; the queries that go with them."""
        for row, length in enumerate(self.lengths):
            self.write(row, length, length + count)
        self.lengths = [length + count for length in self.lengths]
        shape = (len(self.lengths), self.heads * self.group, count, self.dim)
        return (2 * torch.randn(shape, device=self.device)).to(self.dtype)

    def numbers(self, values: list[int]) -> Tensor:
        """Lengths or starts on the device, one number where all rows have the same."""
        return torch.tensor(values[:1] if len(set(values)) == 1 else values, device=self.device)

    def attend(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """What the operator gives for the last queries."""
        return self.operator(
            *(q, self.k, self.v, *self.state, self.numbers(self.lengths)),
            None if self.starts is None else self.numbers(self.starts),
            self.key_mask if self.holes else None,
            *(self.window, self.scale, self.dense_len, self.geometry),
        )

    def _row(self, q: Tensor, row: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """A row's queries and valid keys and values, and what the oracle takes beside them."""
        keys = slice(self.start(row), self.lengths[row])
        common = {
            "geometry": self.geometry,
            "scale": self.scale,
            "offset": keys.stop - keys.start - q.shape[2],
            "dense_len": self.dense_len,
            "window": self.window,
        }
        return (q[row : row + 1], self.k[row : row + 1, :, keys], self.v[row : row + 1, :, keys]), common

    def selected(self, q: Tensor, row: int) -> Tensor:
        """The set of blocks that the oracle selects in one row, bool ``[1, Hkv, Lq, n_blocks]``."""
        (row_q, row_k, _), common = self._row(q, row)
        if self.geometry.scorer == "pooled" or row_k.shape[2] < max(1, self.dense_len):
            return reference.select_blocks(row_q, row_k, **common)
        del common["dense_len"]
        lead = max(0, -common["offset"])  # queries before the first key
        common |= {"offset": common["offset"] + lead, "key_mask": self._mask(row)}
        chosen = reference.select_sequence(row_q[0, :, lead:], row_k[0], **common)
        return torch.nn.functional.pad(chosen, (0, 0, lead, 0))[None]

    def _mask(self, row: int) -> Tensor:
        """Which of a row's keys are not hidden."""
        return self.key_mask[row, self.start(row) : self.lengths[row]]

    def expected(self, q: Tensor, row: int, selected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the oracle gives for one row, over its valid keys alone; for its own selection unless one is given."""
        (row_q, row_k, row_v), common = self._row(q, row)
        if row_k.shape[2] == 0:
            shape = (1, *q.shape[1:3])
            return row_v.new_zeros(*shape, self.value_dim), row_v.new_full(shape, -torch.inf)
        if selected is None:
            selected = self.selected(q, row)
        # One more feature lowers what is hidden: the oracle's own key mask would move the row's first and last key.
        hidden = ~self._mask(row)[None, None, :, None].expand(-1, self.heads, -1, -1)
        row_q = torch.nn.functional.pad(row_q.double(), (0, 1), value=1.0)
        row_k = torch.cat([row_k.double(), HIDDEN * hidden.double()], -1)
        out, lse = reference.attention(row_q, row_k, row_v, selected, **common)
        seen = lse > HIDDEN * self.scale / 2
        return torch.where(seen[..., None], out, 0.0), torch.where(seen, lse, -torch.inf)

    def compare(self, q: Tensor, bound: float = 1e-5) -> tuple[Tensor, Tensor]:
        """Compare a call with the oracle, row by row; what it gives."""
        out, lse = self.attend(q)
        assert (out.dtype, lse.dtype) == (q.dtype, torch.promote_types(q.dtype, torch.float32))
        assert out.transpose(1, 2).is_contiguous()
        for row, length in enumerate(self.lengths):
            expected, expected_lse = self.expected(q, row)
            seen = expected_lse[0] != -torch.inf
            assert not out[row].isnan().any()
            error = float((out[row].double() - expected[0]).norm())
            assert error <= bound * max(float(expected.norm()), 1e-9), (row, length)
            assert torch.equal(lse[row] != -torch.inf, seen)
            assert not seen.any() or float((lse[row] - expected_lse[0])[seen].abs().max()) <= 20 * bound
            assert int(self.state[-1][row]) == length - self.start(row)
        return out, lse

    def check(self, q: Tensor, bound: float = 1e-5) -> None:
        """Compare a call with the oracle, and a second call with the first, bit by bit."""
        first = self.compare(q, bound)
        assert all(torch.equal(again, before) for again, before in zip(self.attend(q), first, strict=True))

    def grow(self, *counts: int, bound: float = 1e-5) -> None:
        """Append keys step by step; compare every step, and check the last."""
        for count in counts[:-1]:
            self.compare(self.append(count), bound)
        self.check(self.append(counts[-1]), bound)
