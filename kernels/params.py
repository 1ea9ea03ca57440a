"""What a call of attention says beside its tensors: records that kernels, operators and the oracle take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import BlockGeometry

LEAST_BIAS = -1e29
"""A key with a bias below this one, such as ``-inf``, is hidden as by a mask."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums run in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class PrefillParams:
    """A call over whole prompts.

    Attributes:
        scale: softmax scale.
        dense_len: sequences of fewer keys are dense: they select nothing.
        geometry: the block geometry.
        key_mask: bool ``[B, Lk]``, True where a key is valid; None if all are. Without packed bounds a row's sequence
            runs from its first to its last valid key; positions and blocks count from its first.
        offsets: integers ``[1]`` or ``[B]``, added to `offset`; a row's sequence then ends at its last query's key at
            the latest.
        cu_seqlens_q: integers ``[R + 1]``, batch 1: packed sequences' query bounds; the last query of a sequence
            stands at its last key.
        cu_seqlens_k: integers ``[R + 1]``: packed sequences' key bounds, counted through all rows.
        offset: key index of query 0; None: ``Lk - Lq`` (0 with `offsets`).
        window: the query at ``p`` sees keys after ``p - window`` only, and blocks wholly before are no candidates;
            None: no sliding window.
        key_bias: floats ``[B or 1, Hkv or 1, Lk]``, added to the capped scores of keys. What is below `LEAST_BIAS`
            hides its key. No part of the selection.
        sinks: floats ``[Hq]``, logits that join the sum of each row's softmax and have no value. No part of the
            selection.
        softcap: scaled scores ``x`` become ``softcap * tanh(x / softcap)``, in the selection too; 0: no cap.
    """

    scale: float
    dense_len: int
    geometry: BlockGeometry
    key_mask: Tensor | None = None
    offsets: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    offset: int | None = None
    window: int | None = None
    key_bias: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0

    def first_key(self, q: Tensor, k: Tensor) -> int:
        """Key index of query 0, to which `offsets` are added."""
        if self.offset is not None:
            return self.offset
        return k.shape[2] - q.shape[2] if self.offsets is None else 0


@dataclass(frozen=True)
class DecodeParams:
    """A decode step over a cache.

    Attributes:
        lengths: integers ``[B]`` or ``[1]``: slot after a row's last valid key.
        scale: softmax scale.
        dense_len: rows of fewer keys are dense.
        geometry: the block geometry.
        starts: integers ``[B]`` or ``[1]``: slot of a row's first valid key; None: 0.
        key_mask: bool ``[B, C]``; False hides a key, and moves none.
        window: as in `PrefillParams`.
        key_bias: floats ``[B or 1, Hkv or 1, C]``, as in `PrefillParams`.
        sinks: as in `PrefillParams`.
        softcap: as in `PrefillParams`.
    """

    lengths: Tensor
    scale: float
    dense_len: int
    geometry: BlockGeometry
    starts: Tensor | None = None
    key_mask: Tensor | None = None
    window: int | None = None
    key_bias: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0
