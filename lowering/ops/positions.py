"""Positions in a cache, checked where reading them costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_pass.errors import CachePositionError


@torch.library.custom_op("infllm::checked_positions", mutates_args=())
def checked_positions(positions: Tensor, tokens: int, capacity: int, cache: str) -> Tensor:
    """A copy of the slots that the rows' first new tokens go to, ``[1]`` or ``[B]``, if all new tokens fit.

    Args:
        positions: integers on the CPU.
        tokens: new tokens of a row.
        capacity: slots of a row.
        cache: the cache's name in its graph.

    Raises:
        CachePositionError: a row begins before slot 0, or ends after the last slot.
    """
    for row, first in enumerate(positions.tolist()):
        if first < 0 or first + tokens > capacity:
            raise CachePositionError(cache, row, first, tokens, capacity)
    return positions.clone()


@checked_positions.register_fake
def _checked_positions_fake(positions: Tensor, tokens: int, capacity: int, cache: str) -> Tensor:
    return torch.empty_like(positions)


CHECKED_POSITIONS = torch.ops.infllm.checked_positions.default
"""The overload of `checked_positions` that graphs call."""
