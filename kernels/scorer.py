"""Block scorers: what a selection scores key blocks by, and the state that a cache keeps for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .geometry import COARSE_FACTOR, BlockGeometry, ScoreDtype
from .params import compute_dtype

INDEX_DTYPES: dict[ScoreDtype, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What index keys of 8 bits are stored in; "key" stands for k's dtype."""

INDEX_HIGHEST: dict[ScoreDtype, float] = {"int8": 127.0, "fp8": 448.0}
"""The number that a token's largest channel becomes; its scale is that channel's size by this one."""


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a scorer's state, kept beside a cache of keys.

    Attributes:
        name: its name, unique within the scorer.
        shape: the dimensions that follow ``[B, Hkv]``, slots first; sizes may be symbolic.
        dtype: its dtype.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype


class Scorer(Protocol):
    """A way to score key blocks; scores are float32, not negative, and the higher ones are visited."""

    @property
    def name(self) -> str:
        """The scorer's name in configurations and operator arguments."""

    def state(self, geometry: BlockGeometry, capacity: Any, head_dim: int, dtype: torch.dtype) -> list[StateTensor]:
        """The tensors that a cache of so many keys of a dtype keeps, so that a step reads no key that it need not."""


@dataclass(frozen=True)
class PooledScorer:
    """InfLLM-V2's score: softmax weights over means of windows of keys, pooled to blocks (arXiv 2509.24663, 3.2)."""

    name: str = "pooled"

    def state(self, geometry: BlockGeometry, capacity: Any, head_dim: int, dtype: torch.dtype) -> list[StateTensor]:
        """Compressed keys ``K1`` and coarse ones ``K2``, one window at least; their importance if that selects too."""
        size, stride = geometry.kernel_size, geometry.kernel_stride
        slots = [torch.sym_max(1, (capacity - factor * size) // (factor * stride) + 1) for factor in (1, COARSE_FACTOR)]
        kept = [StateTensor(name, (count, head_dim), dtype) for name, count in zip(("k1", "k2"), slots, strict=True)]
        if geometry.agnostic_blocks:
            kept.append(StateTensor("s1", (slots[0],), compute_dtype(dtype)))
        return kept


@dataclass(frozen=True)
class TokenScorer:
    """The largest score of a block's tokens, over a few channels of the head; needs no training."""

    name: str = "tokens"

    def state(self, geometry: BlockGeometry, capacity: Any, head_dim: int, dtype: torch.dtype) -> list[StateTensor]:
        """Index keys: the channels of every key; with 8 bits a channel, a scale for every key."""
        kept = INDEX_DTYPES.get(geometry.score_dtype, dtype)
        tensors = [StateTensor("ki", (capacity, geometry.score_dims), kept)]
        if geometry.score_dtype != "key":
            tensors.append(StateTensor("ki_scale", (capacity,), torch.float32))
        return tensors


SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (PooledScorer(), TokenScorer())}
"""All scorers by name."""


def scorer_of(geometry: BlockGeometry) -> Scorer:
    """The scorer that a geometry names."""
    return SCORERS[geometry.scorer]
