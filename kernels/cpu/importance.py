"""Query-agnostic blocks on the CPU: importance of key blocks, and the selection filled up with the most important.

A key's importance is its bias, a block's the largest mean of the complete windows that overlap it; no query takes part
(NOSA, arXiv 2510.13602). Torch operators, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..geometry import BlockGeometry
from ..params import LEAST_BIAS, compute_dtype

CHUNK_RANKS = 2**21
"""Ranks of a chunk of queries: 8 MB in float32."""


def window_importance(key_bias: Tensor, geometry: BlockGeometry) -> Tensor:
    """Mean bias of every complete window: ``[..., L]`` -> ``[..., n]`` in float32, or float64 for float64.

    A window with a hidden key, one whose bias is below `LEAST_BIAS`, is ``-inf``.
    """
    size = geometry.kernel_size
    wide = key_bias.to(compute_dtype(key_bias.dtype))
    if wide.shape[-1] < size:
        return wide[..., :0]
    return wide.masked_fill(wide < LEAST_BIAS, -torch.inf).unfold(-1, size, geometry.kernel_stride).mean(-1)


def block_importance(windows: Tensor, blocks: int, geometry: BlockGeometry) -> Tensor:
    """Largest importance among the windows that overlap each of so many blocks: ``[..., n]`` -> ``[..., blocks]``."""
    per_block, overhang = geometry.block_size // geometry.kernel_stride, geometry.kernel_size // geometry.kernel_stride
    room = blocks * per_block - windows.shape[-1]
    return pad(windows, (overhang - 1, room), value=-torch.inf).unfold(-1, per_block + overhang - 1, per_block).amax(-1)


def fill_blocks(chosen: Tensor, importance: Tensor, first: Tensor, own: Tensor, geometry: BlockGeometry) -> Tensor:
    """Fill up the selection of every query of a sequence with its most important blocks; of equal ones the lower.

    Args:
        chosen: int32 ``[Hkv, n, S']``, blocks that the query chose, forced ones among them; -1 in unused places.
        importance: ``[Hkv or 1, blocks]``.
        first: ``[n]``, the first block that a query may visit.
        own: ``[n]``, the last one.
        geometry: the block geometry.

    Returns:
        int32 ``[Hkv, n, S]``, ``S = geometry.selected_blocks``; -1 in unused places.
    """
    heads, tokens, _ = chosen.shape
    blocks = torch.arange(importance.shape[-1], device=chosen.device)
    filled = torch.full((heads, tokens, geometry.selected_blocks), -1, dtype=torch.int32, device=chosen.device)
    lowest = torch.finfo(importance.dtype).min  # a candidate of no importance comes before what is none
    step = max(1, CHUNK_RANKS // (heads * blocks.shape[0]))
    for begin in range(0, tokens, step):
        some = slice(begin, begin + step)
        candidate = (blocks >= first[some, None]) & (blocks <= own[some, None])
        rank = importance[:, None].clamp(min=lowest).masked_fill(~candidate, -torch.inf)
        rank = pad(rank.expand(heads, -1, -1), (0, 1))
        listed = chosen[:, some].long()
        rank = rank.scatter(-1, torch.where(listed < 0, blocks.shape[0], listed), torch.inf)[..., :-1]
        best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : geometry.selected_blocks]
        taken = candidate.expand_as(rank).gather(-1, best)
        filled[:, some, : best.shape[-1]] = torch.where(taken, best, -1).int()
    return filled
