"""How the sparse attention of one sequence is cut into dense pieces on the CPU.

Most visits fall into a band: a query's own block and the local blocks before it, or everything that it may see
while that is no more blocks than it may visit. The band runs tile by tile of queries. The other visits, the
far ones, run block by block: all queries that chose a block meet its keys in one product, so that the work
is exactly what was selected however scattered the choices are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import BlockGeometry

BAND_ROWS = 256
"""Most query rows (tokens x group) of a band tile, unless one token has more."""

BAND_KEY_STEP = 512
"""The number of keys of a band tile that sees all keys is a multiple of this, for few shapes of products."""

FAR_ROWS = 3072
"""Most query rows that meet a far block at once: 768 KB of logits over 64 keys."""

FAR_STEP_ROWS = 192
"""Visitors of a block are filled up to a multiple of about this many rows, for few shapes of products."""


@dataclass(frozen=True)
class Sight:
    """Which keys up to its own position a query of one sequence may see.

    Attributes:
        geometry: the block geometry.
        window: the query at ``p`` sees keys after ``p - window`` only; None: all.
        hidden: bool ``[L']``, True where a key is invalid, which no query sees; None if none is.
    """

    geometry: BlockGeometry
    window: int | None
    hidden: Tensor | None

    def first_block(self, position: int) -> int:
        """The first block that the window of the query at ``position`` touches."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.geometry.block_size

    def first_band_block(self, position: int, *, dense: bool) -> int:
        """The first block of the band of the query at ``position``; all queries are `dense` or none is."""
        g = self.geometry
        own, first = position // g.block_size, self.first_block(position)
        takes_all = dense or own < g.selected_blocks or self._window_blocks <= g.selected_blocks
        return first if takes_all else max(first, own - g.local_blocks)

    def bands(self, begin: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First block of the band, if sparse, and own block of each of the queries ``[begin, end)``: int64 ``[n]``."""
        g = self.geometry
        positions = torch.arange(begin, end, device=device)
        own = positions // g.block_size
        first = torch.zeros_like(own)
        if self.window is not None:
            first = (positions - self.window + 1).clamp_(min=0) // g.block_size
        if self._window_blocks <= g.selected_blocks:
            return first, own
        return torch.where(own < g.selected_blocks, first, torch.maximum(first, own - g.local_blocks)), own

    @property
    def _window_blocks(self) -> float:
        """The most blocks that a window touches."""
        return math.inf if self.window is None else (self.window - 2) // self.geometry.block_size + 2


@dataclass(frozen=True)
class BandTile:
    """Queries ``[begin, end)``, all of one block, that see keys from ``first_key`` on, causally."""

    begin: int
    end: int
    first_key: int


def includes_band(blocks: Tensor, begin: int, sight: Sight) -> bool:
    """Whether every query visits all blocks of its band.

    A selection forces these blocks, except where tiles of ``query_block`` queries straddle blocks or the start of a
    window: the forced blocks are then those of a tile's last query.

    Args:
        blocks: int32 ``[n, S]``, distinct but for -1, the blocks of the queries at ``begin, begin + 1, ...``.
        begin: position of the first query.
        sight: what the queries see.
    """
    first, own = sight.bands(begin, begin + blocks.shape[0], blocks.device)
    inside = (blocks >= first[:, None]) & (blocks <= own[:, None])
    return bool((inside.sum(1) == own - first + 1).all())


def band_tiles(begin: int, end: int, group: int, sight: Sight, *, dense: bool) -> Iterator[BandTile]:
    """Tiles that cover the positions ``[begin, end)``.

    Args:
        begin: first position.
        end: one past the last position.
        group: query heads per KV head.
        sight: what the queries see.
        dense: whether every query sees all that it may see.
    """
    size = sight.geometry.block_size
    tokens = max(1, min(size, BAND_ROWS // group))
    while begin < end:
        block_end = (begin // size + 1) * size
        stop = min(end, block_end, begin + tokens)
        yield BandTile(begin, stop, sight.first_band_block(begin, dense=dense) * size)
        begin = stop


def far_visits(
    blocks: Tensor, begin: int, count: int, group: int, sight: Sight, *, beyond_band: bool
) -> Iterator[tuple[int, Tensor]]:
    """Visits block by block, in pieces of few different sizes.

    Args:
        blocks: int32 ``[n, S]``, the blocks of the queries at ``begin, begin + 1, ...``; -1 is none.
        begin: position of the first query.
        count: blocks in the sequence.
        group: query heads per KV head.
        sight: what the queries see.
        beyond_band: leave out every query's band.

    Yields:
        A block and the ascending int64 numbers of queries that visit it (0 for the one at ``begin``), filled
        up with ``n``, the number of no query. A block with many visitors comes more than once.
    """
    queries = blocks.shape[0]
    chosen = torch.zeros(count + 1, queries, dtype=torch.bool, device=blocks.device)
    chosen.scatter_(0, torch.where(blocks < 0, count, blocks).long().t(), True)
    if beyond_band:
        first, _ = sight.bands(begin, begin + queries, blocks.device)
        chosen &= torch.arange(count + 1, device=blocks.device)[:, None] < first
    chosen = chosen[:count]
    visits = chosen.nonzero()  # [visits, 2]
    counts = chosen.sum(1)
    step = max(1, FAR_STEP_ROWS // group)
    piece = max(1, FAR_ROWS // FAR_STEP_ROWS) * step
    padded = (counts + step - 1) // step * step
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # [count]
    visitors = visits.new_full((int(padded.sum()),), queries)
    visitors[torch.arange(visits.shape[0], device=blocks.device) + shift[visits[:, 0]]] = visits[:, 1]
    for block, part in enumerate(torch.split(visitors, padded.tolist())):
        if part.numel():
            for some in torch.split(part, piece):
                yield block, some
