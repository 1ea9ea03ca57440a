"""How the sparse attention of one sequence is cut into dense pieces on the CPU.

Most visits fall into a band: a query's own block and the local blocks before it, or everything before it
while it has no more blocks than it may visit. The band runs tile by tile of queries. The other visits, the
far ones, run block by block: all queries that chose a block meet its keys in one product, so that the work
is exactly what was selected however scattered the choices are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infllm_pass.kernels.geometry import BlockGeometry

BAND_ROWS = 256
"""Most query rows (tokens x group) of a band tile, unless one token has more."""

BAND_KEY_STEP = 512
"""The number of keys of a band tile that sees all keys is a multiple of this, for few shapes of products."""

FAR_ROWS = 3072
"""Most query rows that meet a far block at once: 768 KB of logits over 64 keys."""

FAR_STEP_ROWS = 192
"""Visitors of a block are filled up to a multiple of about this many rows, for few shapes of products."""


@dataclass(frozen=True)
class BandTile:
    """Queries ``[begin, end)``, all of one block, that see keys ``[first_key, end)`` causally."""

    begin: int
    end: int
    first_key: int


def includes_band(blocks: Tensor, begin: int, geometry: BlockGeometry) -> bool:
    """Whether every query visits all blocks of its band.

    A selection forces these blocks, except where tiles of ``query_block`` queries straddle blocks: the
    forced blocks are then those of a tile's last query.

    Args:
        blocks: int32 ``[n, S]``, distinct but for -1, the blocks of the queries at ``begin, begin + 1, ...``.
        begin: position of the first query.
        geometry: the block geometry.
    """
    own, first = _band(blocks, begin, geometry)
    inside = (blocks >= first[:, None]) & (blocks <= own[:, None])
    return bool((inside.sum(1) == own - first + 1).all())


def _band(blocks: Tensor, begin: int, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
    """Every query's own block and the first block of its band, ``[n]`` each."""
    own = torch.arange(begin, begin + blocks.shape[0], device=blocks.device) // geometry.block_size
    return own, torch.where(own < geometry.selected_blocks, 0, own - geometry.local_blocks)


def first_band_block(position: int, geometry: BlockGeometry, dense: bool) -> int:
    """The first block of the band of the query at ``position``."""
    own = position // geometry.block_size
    return 0 if dense or own < geometry.selected_blocks else own - geometry.local_blocks


def band_tiles(begin: int, end: int, group: int, geometry: BlockGeometry, dense: bool) -> Iterator[BandTile]:
    """Tiles that cover the positions ``[begin, end)``.

    Args:
        begin: first position.
        end: one past the last position.
        group: query heads per KV head.
        geometry: the block geometry.
        dense: whether every query sees every key before it.
    """
    size = geometry.block_size
    tokens = max(1, min(size, BAND_ROWS // group))
    while begin < end:
        block_end = (begin // size + 1) * size
        stop = min(end, block_end, begin + tokens)
        yield BandTile(begin, stop, first_band_block(begin, geometry, dense) * size)
        begin = stop


def far_visits(
    blocks: Tensor, begin: int, count: int, group: int, geometry: BlockGeometry, *, beyond_band: bool
) -> Iterator[tuple[int, Tensor]]:
    """Visits block by block, in pieces of few different sizes.

    Args:
        blocks: int32 ``[n, S]``, the blocks of the queries at ``begin, begin + 1, ...``; -1 is none.
        begin: position of the first query.
        count: blocks in the sequence.
        group: query heads per KV head.
        geometry: the block geometry.
        beyond_band: leave out every query's band.

    Yields:
        A block and the ascending int64 numbers of queries that visit it (0 for the one at ``begin``), filled
        up with ``n``, the number of no query. A block with many visitors comes more than once.
    """
    queries = blocks.shape[0]
    chosen = torch.zeros(count + 1, queries, dtype=torch.bool, device=blocks.device)
    chosen.scatter_(0, torch.where(blocks < 0, count, blocks).long().t(), True)
    if beyond_band:
        _, first = _band(blocks, begin, geometry)
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
