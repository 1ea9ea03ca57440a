"""What the selection of a decode step computes with: sizes, constants and memory of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from ...geometry import BlockGeometry
from ..configs import DecodeConfig, config_for
from ..launch import precision, wrap_triton
from ..pdl import dependent_launch
from ..score_terms import score_unit
from ..tile_ops import UNBOUNDED
from ..tile_tables import padded_dim
from .rows import DecodeRows, DecodeShape
from .topk import decode_rank_kernel


@dataclass(frozen=True)
class DecodeStep:
    """What the selection of a step computes with, whatever scores its blocks.

    Attributes:
        q: ``[B, Hq, Lq, D]``, last stride 1.
        k: ``[B, Hkv, C, D]``, last stride 1; only valid keys are read.
        rows: where the rows' keys lie.
        geometry: the block geometry.
        scale: softmax scale.
        dense_len: rows with fewer keys select nothing.
        window: sliding window in keys, or None.
        key_mask: bool ``[B, C]``: False hides a key; None: no key is hidden. Pooled scores do not read it.
        softcap: scores ``x`` become ``softcap * tanh(x / softcap)``; 0: no cap.
        key_bias: floats ``[B or 1, Hkv or 1, C]``, the importance of keys, where blocks are chosen by it.
    """

    q: Tensor
    k: Tensor
    rows: DecodeRows
    geometry: BlockGeometry
    scale: float
    dense_len: int
    window: int | None = None
    key_mask: Tensor | None = None
    softcap: float = 0.0
    key_bias: Tensor | None = None

    @cached_property
    def shape(self) -> DecodeShape:
        """Tiles and lines."""
        group = int(self.q.shape[1]) // int(self.k.shape[1])
        return DecodeShape.choose(group, int(self.q.shape[2]), self.geometry.query_block, self.q.element_size())

    @cached_property
    def launch(self) -> DecodeConfig:
        """The configuration of the kernels."""
        return config_for(DecodeConfig, "decode", self.q, padded_dim(int(self.q.shape[3])))

    @property
    def pairs(self) -> int:
        """Rows x key/value heads."""
        return self.k.shape[0] * self.k.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks of the capacity."""
        return self.geometry.num_blocks(self.k.shape[2])

    @property
    def bound(self) -> int:
        """The sliding window, or one that never ends."""
        return UNBOUNDED if self.window is None else self.window

    @property
    def unit(self) -> tuple[float, float]:
        """Arguments ``scale_log2`` and ``cap_log2``."""
        return score_unit(self.scale, self.softcap)

    @property
    def ranks_at_once(self) -> bool:
        """Whether the scoring kernel ranks."""
        return int(self.k.shape[1]) <= self.launch.fused_rank_heads and self.shape.length_q == 1

    @property
    def common(self) -> dict[str, Any]:
        """Constants of all kernels."""
        return {
            "QUERY_BLOCK": self.geometry.query_block,
            "BLOCK": self.geometry.block_size,
            "BUDGET": self.geometry.selected_blocks,
            "HAS_STARTS": self.rows.starts is not None,
        }

    @property
    def products(self) -> dict[str, Any]:
        """Constants of kernels that multiply queries."""
        shape = self.shape
        return {"G": shape.group, "GP": shape.padded_group, "TOKENS": shape.tokens, "PRECISION": precision(self.q)}

    @property
    def scoring(self) -> dict[str, Any]:
        """Constants of kernels that score keys."""
        return {**self.products, "HAS_SOFTCAP": self.softcap != 0.0}

    @property
    def ranking(self) -> dict[str, Any]:
        """Constants of kernels that rank."""
        return {
            "LINES": self.shape.lines,
            "INIT": self.geometry.init_blocks,
            "LOCAL": self.geometry.local_blocks,
            "HAS_WINDOW": self.window is not None,
            "WIDTH": triton.next_power_of_2(self.geometry.selected_blocks),
            "RANKED": self.launch.rank_blocks,
        }

    def parts(self, chunks: int) -> Tensor:
        """Memory for the partial normalisers of so many programs of a pair."""
        # No size of 1 and no two equal shapes: compilers specialise on the one and merge the other.
        count = self.pairs * chunks * self.shape.tiles * self.shape.columns
        return torch.empty(count, 1, dtype=torch.float32, device=self.q.device)

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for keys, arrivals and blocks."""
        lines, device = self.pairs * self.shape.lines, self.q.device
        keys = torch.empty(lines * self.num_blocks, dtype=torch.int32, device=device)
        blocks = torch.empty(lines, self.geometry.selected_blocks, dtype=torch.int32, device=device)
        return keys, torch.empty(self.pairs, 1, 1, dtype=torch.int32, device=device), blocks

    def score_grid(self) -> tuple[int, int, int]:
        """Programs that score blocks."""
        tiles = self.shape.tiles if self.geometry.query_block == 1 else self.shape.lines
        return (self.num_blocks + self.launch.blocks - 1) // self.launch.blocks, self.pairs, tiles

    def rank(self, keys: Tensor, blocks: Tensor, filled: Tensor) -> None:
        """Rank the scored blocks, where the scoring kernel did not."""
        if self.ranks_at_once:
            return
        wrap_triton(decode_rank_kernel)[(self.shape.lines, self.pairs)](
            *self.rows.arguments,
            keys,
            blocks,
            filled,
            self.k.shape[1],
            self.k.shape[2],
            self.num_blocks,
            self.shape.length_q,
            self.dense_len,
            self.bound,
            **self.common,
            **self.ranking,
            **dependent_launch(decode_rank_kernel, self.q),
            num_warps=self.launch.rank_warps,
        )
