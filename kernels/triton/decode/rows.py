"""Layout of a decode step, shared by its kernels: rows, lines (lists of blocks), tiles, and what a list contains.

A *row* of the batch has its valid keys in slots ``[start, start + length)`` of the cache; its queries are the last of
them. A *line* is one list of blocks: of a query, or of the queries in one group of QUERY_BLOCK positions. A *tile* is
a few adjacent queries (TOKENS) with all heads of a group, PADDED_GROUP columns or rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import COARSE_FACTOR

DECODE_FACTOR = tl.constexpr(COARSE_FACTOR)

TILE_COLUMNS = 64
"""Tokens x heads of one product, at most, unless one token's heads are more."""

LEAST_COLUMNS = 16
"""Fewest rows or columns of a matrix product."""


@dataclass(frozen=True)
class DecodeShape:
    """Sizes that follow from the heads and from the number of queries.

    Attributes:
        group: query heads per key/value head, ``G``.
        padded_group: the next power of two.
        tokens: queries of a tile, a power of two.
        length_q: queries of a row.
        lines: lists of blocks of a row and key/value head.
    """

    group: int
    padded_group: int
    tokens: int
    length_q: int
    lines: int

    @classmethod
    def choose(cls, group: int, length_q: int, query_block: int, element_size: int = 2) -> DecodeShape:
        """Tiles of 16 to 64 columns; of 16 for float32, whose products have no matrix unit."""
        padded = triton.next_power_of_2(group)
        wanted = min(triton.next_power_of_2(length_q), TILE_COLUMNS // padded) if element_size < 4 else 1
        tokens = max(1, LEAST_COLUMNS // padded, wanted)
        lines = length_q if query_block == 1 else (length_q + query_block - 2) // query_block + 1
        return cls(group, padded, tokens, length_q, lines)

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return -(-self.length_q // self.tokens)

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.tokens * self.padded_group


@dataclass(frozen=True)
class DecodeRows:
    """Where the rows' keys lie in the cache; integer tensors on the device, ``[B]`` or ``[1]``.

    Attributes:
        lengths: one past the last valid key.
        starts: the first valid key; None: 0.
    """

    lengths: Tensor
    starts: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """The first arguments of every kernel that asks where a row lies."""
        starts = self.lengths if self.starts is None else self.starts
        return self.lengths, starts, _row_stride(self.lengths), _row_stride(starts)


@dataclass(frozen=True)
class DecodeState:
    """Compressed keys of a cache, kept from step to step.

    Attributes:
        k1: ``[B, Hkv, n1, D]``, last stride 1; ``n1`` at least the windows of the cache's capacity.
        k2: ``[B, Hkv, n2, D]``, last stride 1.
        filled: int32 ``[B]``: so many keys of the row, from its first, have not changed since their windows were
            written to `k1`, `k2` and `s1`.
        s1: float32 ``[B, Hkv, n1]``, importance of the windows, where blocks are chosen by it; else None.
    """

    k1: Tensor
    k2: Tensor
    filled: Tensor
    s1: Tensor | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> DecodeState:
        """From the tensors of a state: `k1`, `k2`, `s1` if there is one, `filled`."""
        return cls(tensors[0], tensors[1], tensors[-1], tensors[2] if len(tensors) > 3 else None)


@dataclass(frozen=True)
class IndexState:
    """Index keys of a cache, kept from step to step.

    Attributes:
        ki: ``[B, Hkv, n, d]``, last stride 1: channels of the keys, each in its slot; ``n`` at least the capacity.
        ki_scale: float32 ``[B, Hkv, n]`` for keys of 8 bits; None: they have none.
        filled: int32 ``[B]``: so many keys of the row, from its first, have not changed since they were stored.
    """

    ki: Tensor
    ki_scale: Tensor | None
    filled: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> IndexState:
        """From the tensors of a state: `ki`, `ki_scale` if there is one, `filled`."""
        return cls(tensors[0], tensors[1] if len(tensors) > 2 else None, tensors[-1])


def _row_stride(tensor: Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


@triton.jit
def clip_row(end, start, capacity, HAS_STARTS: tl.constexpr):
    """Slot of a row's first key, and how many keys it has, from what the caller gave.

    The kernels load these two numbers themselves: where an address depends on what a called function loads, PyTorch
    takes the tensor for one that the kernel writes, and copies it.
    """
    end = tl.minimum(tl.maximum(end.to(tl.int32), 0), capacity)
    first = end * 0
    if HAS_STARTS:
        first = tl.minimum(tl.maximum(start.to(tl.int32), 0), end)
    return first, end - first


@triton.jit
def count_windows(length, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Complete windows among the first ``length`` keys."""
    return tl.where(length >= SIZE, (length - SIZE) // STRIDE + 1, 0)


@triton.jit
def line_of(position, length, length_q, QUERY_BLOCK: tl.constexpr):
    """Number, within its row, of the list of the query at a position."""
    return position // QUERY_BLOCK - tl.maximum(length - length_q, 0) // QUERY_BLOCK


@triton.jit
def last_of_line(line, length, length_q, QUERY_BLOCK: tl.constexpr):
    """Position that decides what the queries of a list see and which block is their own."""
    number = tl.maximum(length - length_q, 0) // QUERY_BLOCK + line
    return tl.minimum(number * QUERY_BLOCK + (QUERY_BLOCK - 1), length - 1)


@triton.jit
def first_block(last, window, BLOCK: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first block that a sliding window touches."""
    reach = last * 0
    if HAS_WINDOW:
        reach = tl.maximum(last - window + 1, 0) // BLOCK
    return reach


@triton.jit
def scored_range(
    last,
    window,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The blocks that compete by score as a range, and how many are taken; an empty range where all are."""
    reach = first_block(last, window, BLOCK, HAS_WINDOW)
    begin = tl.maximum(reach, INIT)
    end = last // BLOCK - LOCAL
    taken = BUDGET - (LOCAL + 1) - tl.maximum(INIT - reach, 0)
    return begin, tl.where(end - begin > taken, end, begin), taken


@triton.jit
def forced_block(
    entry,
    last,
    window,
    begin,  # of the blocks that compete by score, as `end`
    end,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The block at an entry of a list, and whether the list has it there whatever the scores.

    The first entries are the initial and the local blocks, or all candidates where none is scored.
    """
    own = last // BLOCK
    reach = first_block(last, window, BLOCK, HAS_WINDOW)
    chooses = end > begin
    initial = tl.maximum(INIT - reach, 0)
    block = entry + tl.where(chooses & (entry >= initial), own - LOCAL - initial, reach)
    return block, entry < tl.where(chooses, initial + LOCAL + 1, own - reach + 1)


@triton.jit
def tile_visits(
    length,
    length_q,
    tile,
    dense_len,
    window,
    TOKENS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """What a tile of queries visits: sparse or not, first line, first block of a dense row, blocks a line, visits."""
    base = length - length_q
    begin = tl.maximum(base + tile * TOKENS, 0)
    end = base + tl.minimum(tile * TOKENS + TOKENS, length_q) - 1
    sparse = length >= dense_len
    first_line = tl.where(sparse, line_of(begin, length, length_q, QUERY_BLOCK), 0)
    lines = tl.where(sparse, line_of(tl.maximum(end, 0), length, length_q, QUERY_BLOCK) - first_line + 1, 1)
    # Of the lists' lengths the largest: shorter ones end with visits of nothing.
    low = tl.where(sparse, last_of_line(first_line, length, length_q, QUERY_BLOCK), begin)
    high = tl.where(sparse, last_of_line(first_line + lines - 1, length, length_q, QUERY_BLOCK), end)
    first = first_block(low, window, BLOCK, HAS_WINDOW)
    width = high // BLOCK - first + 1
    width = tl.maximum(tl.where(sparse, tl.minimum(width, BUDGET), width), 1)
    return sparse, first_line, first, width, tl.where(end >= begin, lines * width, 0)
