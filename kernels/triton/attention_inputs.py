"""What the kernels of prefill attention and of its gradients take alike, and how they are launched with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..geometry import BlockGeometry
from .configs import LaunchConfig
from .launch import fixed_token_stride, precision
from .score_terms import score_unit
from .tile_ops import UNBOUNDED
from .tile_tables import TileLists, TilePlan, padded_dim


@dataclass(frozen=True)
class AttentionInputs:
    """One call of attention.

    Attributes:
        q: ``[B, Hq, Lq, D]``, any strides with the last one 1, as for `k` and `v`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        lists: the selection; None where all sequences are dense.
        plan: the tiles.
        geometry: the block geometry.
        scale: softmax scale, positive.
        dense_len: sequences with fewer keys are dense, whatever `lists` has for them.
        key_mask: bool ``[B, Lk]``, True where a key is valid.
        window: sliding window: the query at ``p`` sees keys after ``p - window`` only.
        every_query: whether every query belongs to a panel of the plan; if not, results of the others are filled in
            before a kernel runs.
        key_bias: floating ``[B or 1, Hkv or 1, Lk]``, added to the capped scores; no part of the selection.
        sinks: floating ``[Hq]``: logits without a value that join every row's softmax.
        softcap: scores ``x`` become ``softcap * tanh(x / softcap)``; 0: no cap.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lists: TileLists | None
    plan: TilePlan
    geometry: BlockGeometry
    scale: float
    dense_len: int
    key_mask: Tensor | None = None
    window: int | None = None
    every_query: bool = False
    key_bias: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0

    @property
    def dims(self) -> tuple[int, int]:
        """``D`` and ``Dv``."""
        return int(self.k.shape[3]), int(self.v.shape[3])

    @property
    def padded(self) -> int:
        """What products pad the larger of them to: launch configurations go by it."""
        return padded_dim(max(self.dims))

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Arguments ``panels``, ``blocks``, ``tokens`` and ``counts``, then those of keys; any tensor where none is."""
        none, lists = self.plan.panels, self.lists
        listed = (none, none, none) if lists is None else (lists.blocks, lists.tokens, lists.counts)
        return none, *listed, *self.of_keys

    @property
    def of_keys(self) -> tuple[Tensor, Tensor]:
        """Arguments ``key_mask`` and ``key_bias``; any tensor where there is none."""
        none = self.plan.panels
        return none if self.key_mask is None else self.key_mask, none if self.key_bias is None else self.key_bias

    @property
    def strides(self) -> tuple[int, ...]:
        """Three of each of `q`, `k` and `v`."""
        return *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]

    @property
    def mask_strides(self) -> tuple[int, ...]:
        """Those of `key_mask`."""
        return (0, 0) if self.key_mask is None else self.key_mask.stride()

    @property
    def bias_strides(self) -> tuple[int, ...]:
        """Those of `key_bias`, 0 along a dimension that it is broadcast over."""
        return (0, 0, 0) if self.key_bias is None else self.key_bias.expand(self.k.shape[:3]).stride()

    @property
    def sink_logits(self) -> Tensor:
        """Argument ``sinks``, contiguous; any tensor where there is none."""
        return self.plan.panels if self.sinks is None else self.sinks.contiguous()

    @property
    def unit(self) -> tuple[float, float]:
        """Arguments ``scale_log2`` and ``cap_log2``."""
        return score_unit(self.scale, self.softcap)

    @property
    def capacity(self) -> int:
        """Entries of the list of a tile."""
        return 0 if self.lists is None else self.lists.blocks.stride(1)

    @property
    def bound(self) -> int:
        """The sliding window, or one that never ends."""
        return UNBOUNDED if self.window is None else self.window

    def programs(self, rows: int) -> tuple[int, int]:
        """The grid of a kernel whose programs compute so many rows of a tile."""
        shape = self.plan.shape
        return self.plan.num_tiles, self.k.shape[1] * (shape.tokens * shape.padded_group // rows)

    def constants(self, rows: int) -> dict[str, int | bool | str]:
        """What kernels with so many rows to a program or step are compiled for."""
        return {
            **self.plan.shape.constants(self.geometry, *self.dims, rows),
            "HAS_WINDOW": self.window is not None,
            "HAS_KEY_MASK": self.key_mask is not None,
            "HAS_BIAS": self.key_bias is not None,
            "HAS_SOFTCAP": self.softcap != 0.0,
            "K_TOKEN_STRIDE": fixed_token_stride(self.k),
            "V_TOKEN_STRIDE": fixed_token_stride(self.v),
            "PRECISION": precision(self.q),
        }

    def list_constants(self, launch: LaunchConfig) -> dict[str, int | bool | str]:
        """As `constants`, for kernels that walk the lists."""
        steps = {"BLOCK_N": launch.step_keys(self.geometry.block_size), "HAS_LISTS": self.lists is not None}
        return {**self.constants(launch.rows), **steps}
