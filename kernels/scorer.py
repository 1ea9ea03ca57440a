"""Block scorers: what a selection scores key blocks by, and the state that a cache keeps for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .geometry import BlockGeometry


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a scorer's state, kept beside a cache of keys.

    Attributes:
        name: its name, unique within the scorer.
        shape: the dimensions that follow ``[B, Hkv]``.
        dtype: its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Scorer(Protocol):
    """A way to score key blocks; scores are float32, not negative, and the higher ones are visited."""

    @property
    def name(self) -> str:
        """The scorer's name in configurations and operator arguments."""

    def state(self, geometry: BlockGeometry, capacity: int, head_dim: int, dtype: torch.dtype) -> list[StateTensor]:
        """The tensors that a cache of so many keys of a dtype keeps, so that a step reads no key that it need not."""


@dataclass(frozen=True)
class PooledScorer:
    """InfLLM-V2's score: softmax weights over means of windows of keys, pooled to blocks (arXiv 2509.24663, 3.2)."""

    name: str = "pooled"

    def state(self, geometry: BlockGeometry, capacity: int, head_dim: int, dtype: torch.dtype) -> list[StateTensor]:
        """Compressed keys ``K1`` and coarse ones ``K2``, one window at least."""
        slots = (max(1, geometry.num_compressed(capacity)), max(1, geometry.num_coarse(capacity)))
        return [StateTensor(name, (count, head_dim), dtype) for name, count in zip(("k1", "k2"), slots, strict=True)]
