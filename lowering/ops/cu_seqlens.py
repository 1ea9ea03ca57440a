"""Segments of packed rows, from ids to the bounds that the operators take."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("infllm::segment_bounds", mutates_args=())
def segment_bounds(segment_ids: Tensor) -> Tensor:
    """Cumulative key numbers of the segments of ``[B, L]`` ids: int32 ``[B * L + 1]``, padded with ``B * L``."""
    batch, length = segment_ids.shape
    total = batch * length
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    flat = starts.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, total + 1)  # the last place takes what starts nothing
    index = torch.arange(total, device=segment_ids.device, dtype=torch.int32)
    bounds = torch.full((total + 2,), total, device=segment_ids.device, dtype=torch.int32)
    return bounds.scatter_(0, place, index)[: total + 1]


@segment_bounds.register_fake
def _segment_bounds_fake(segment_ids: Tensor) -> Tensor:
    batch, length = segment_ids.shape
    return segment_ids.new_empty(batch * length + 1, dtype=torch.int32)
