"""How queries are cut into tiles, and the tables that tell a Triton program which tile is its own.

A *panel* holds adjacent queries of one sequence whose blocks are scored together, one column of a matrix
product per token and head. A *tile* is the part of a panel that one attention program computes: tokens times
heads of one key/value head, which share the keys that they visit. Panels start at positions that are
multiples of their length, counted from the sequence's first key, so neither a call's split nor padding moves
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import BlockGeometry

PANEL_COLUMNS = 128
"""Columns (tokens x heads) of one product in block scoring: 128 keeps Hopper's matrix unit fed from shared memory."""

TILE_ROWS = 64
"""Rows (tokens x heads) of one tile: one warp group's matrix instruction."""

TABLE_WIDTH = 8
"""Columns of the tables below."""

TABLE_COLUMNS = tl.constexpr(TABLE_WIDTH)


def padded_dim(size: int) -> int:
    """What products pad a head dimension to: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(int(size)))  # a number also where compilers trace with symbols


@dataclass(frozen=True)
class TileShape:
    """Sizes that follow from the group of query heads per key/value head and from ``query_block``.

    Attributes:
        group: query heads per key/value head, ``G``.
        padded_group: the next power of two, which column and row numbers use.
        tokens: tokens of a tile, a power of two.
        panel_tokens: tokens of a panel, a multiple of `tokens` and of ``query_block``.
    """

    group: int
    padded_group: int
    tokens: int
    panel_tokens: int

    @classmethod
    def choose(cls, group: int, query_block: int = 1) -> TileShape:
        """Tiles of at most 64 rows, panels of at least 128 columns."""
        padded = triton.next_power_of_2(group)
        tokens = max(1, TILE_ROWS // padded)
        return cls(group, padded, tokens, max(1, PANEL_COLUMNS // padded, query_block))

    @property
    def tiles(self) -> int:
        """Tiles of one panel."""
        return self.panel_tokens // self.tokens

    def constants(self, geometry: BlockGeometry, dim: int, value_dim: int, rows: int) -> dict[str, int]:
        """Sizes that the attention kernels are compiled for, with so many rows of a tile to a program or step."""
        return {
            "GROUP": self.group,
            "PADDED_GROUP": self.padded_group,
            "TOKENS": self.tokens,
            "TILES": self.tiles,
            "BLOCK_M": rows,
            "BLOCK_SIZE": geometry.block_size,
            "HEAD_DIM": dim,
            "BLOCK_D": padded_dim(dim),
            "VALUE_DIM": value_dim,
            "BLOCK_DV": padded_dim(value_dim),
        }

    @property
    def mask_dtype(self) -> torch.dtype:
        """An integer with a bit for every token of a tile."""
        return torch.int64 if self.tokens == 64 else torch.int32 if self.tokens == 32 else torch.int16


@dataclass(frozen=True)
class TileLists:
    """The selection, in the form that attention reads: which blocks a tile visits, and which tokens each block.

    Attributes:
        blocks: int16 ``[n_tiles, Hkv, capacity]``, ascending block numbers (read them ``& 0xFFFF``).
        tokens: `TileShape.mask_dtype` ``[n_tiles, Hkv, capacity]``; bit ``t``: token ``t`` of the tile visits it.
        counts: int32 ``[n_tiles, Hkv]``; entries past the count are not written.

    A tile of a dense sequence has count 0: attention enumerates its blocks itself. Every entry has at least one
    bit set; only bits of valid tokens are set.
    """

    blocks: Tensor
    tokens: Tensor
    counts: Tensor


@dataclass(frozen=True)
class SequenceTable:
    """Where the sequences of a call lie; its columns are named below.

    Attributes:
        sequences: int32 ``[R, 8]``, one row a sequence.
        packed: whether a row of the batch may hold several sequences; if not, sequence ``b`` is row ``b``.
    """

    sequences: Tensor
    packed: bool


@dataclass(frozen=True)
class TilePlan(SequenceTable):
    """The tables of one call; their columns are named below.

    Attributes:
        shape: the tile sizes.
        panels: int32 ``[n_panels, 8]``, one row a panel; rows past the last panel are empty (END = 0).
    """

    shape: TileShape
    panels: Tensor

    @property
    def num_tiles(self) -> int:
        """Tiles, empty ones included: panel ``p`` holds tiles ``p * shape.tiles`` and on."""
        return self.panels.shape[0] * self.shape.tiles


# Columns of `TilePlan.sequences`. Key and query numbers index the tensors of their batch row.
SEQ_BATCH = tl.constexpr(0)
SEQ_KEY_BEGIN = tl.constexpr(1)
SEQ_KEY_END = tl.constexpr(2)
SEQ_QUERY_BEGIN = tl.constexpr(3)
SEQ_QUERY_END = tl.constexpr(4)
SEQ_SHIFT = tl.constexpr(5)  # key number minus query number of the same token
SEQ_PANEL_BASE = tl.constexpr(6)  # first row in `TilePlan.panels`
SEQ_BLOCK_BASE = tl.constexpr(7)  # number of the sequence's block 0 among all blocks of the call

# Columns of `TilePlan.panels`. Tokens of a panel are numbered from 0; token ``i`` is query ``QUERY + i``, stands
# at ``POSITION + i`` in its sequence, and exists iff ``BEGIN <= i < END``.
PANEL_BATCH = tl.constexpr(0)
PANEL_QUERY = tl.constexpr(1)  # may be negative: tokens before the first query do not exist
PANEL_BEGIN = tl.constexpr(2)
PANEL_END = tl.constexpr(3)
PANEL_POSITION = tl.constexpr(4)  # a multiple of the panel's length
PANEL_KEY_BEGIN = tl.constexpr(5)  # number of the sequence's first key: position 0
PANEL_LENGTH = tl.constexpr(6)  # keys of the sequence; below dense_len the sequence is dense
PANEL_BLOCK_BASE = tl.constexpr(7)


@triton.jit
def load_panel(panels, panel):
    """The row of a panel, column by column."""
    row = panels + panel * TABLE_COLUMNS
    return (
        tl.load(row + PANEL_BATCH).to(tl.int64),
        tl.load(row + PANEL_QUERY),
        tl.load(row + PANEL_BEGIN),
        tl.load(row + PANEL_END),
        tl.load(row + PANEL_POSITION),
        tl.load(row + PANEL_KEY_BEGIN),
        tl.load(row + PANEL_LENGTH),
        tl.load(row + PANEL_BLOCK_BASE),
    )
