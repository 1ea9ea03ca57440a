"""What each stage cannot avoid: matrix products and memory traffic, and the time they take at the ceilings.

``floor = max(flops / measured matrix rate, bytes / measured copy rate)``, where

* attention: 4 D flops a query head and visited (query, key) pair, with causal pairs counted exactly; bytes: q, k, v
  and the output once each;
* selection: 2 D flops a query head and score of a compressed key: fine ones of blocks that are candidates but not
  forced, coarse ones that are visible, both only for queries with more blocks than they visit. By token scores 2 d
  flops a query head and visible token, d the channels, for the same queries. Bytes: q and k once;
* forward: both of the above; backward: 10 D flops a query head and visited pair (five products); bytes: q, the output,
  its gradient and dq, k, v, dk and dv once each.

Exponentials, top-k and everything read twice come on top, so that no implementation reaches the floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _data import Heads

from infllm_pass.kernels.geometry import COARSE_FACTOR, BlockGeometry

ELEMENT = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of the machine.

    Attributes:
        flops: of a bfloat16 matrix product, a second.
        bandwidth: bytes read and written by a copy, a second.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, and bytes of memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_ms(self, ceilings: Ceilings) -> float:
        """The least time in ms that the ceilings allow."""
        return 1e3 * max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth)


def visited_pairs(length: int, geometry: BlockGeometry) -> int:
    """Pairs of a query and a key that sparse attention computes, for one head."""
    position = torch.arange(length)
    own = position // geometry.block_size
    before = (own + 1).clamp(max=geometry.selected_blocks) - 1
    return int((before * geometry.block_size + position % geometry.block_size + 1).sum())


def scored_keys(length: int, geometry: BlockGeometry) -> int:
    """Pairs of a query and a compressed key whose scores selection needs, for one head."""
    g = geometry
    position = torch.arange(length)
    own = position // g.block_size
    chooses = own >= g.selected_blocks
    begin, end = g.init_blocks * g.block_size, (own - g.local_blocks) * g.block_size
    first = max((begin - g.kernel_size) // g.kernel_stride + 1, 0)
    fine = (end + g.kernel_stride - 1) // g.kernel_stride - first
    size, stride = COARSE_FACTOR * g.kernel_size, COARSE_FACTOR * g.kernel_stride
    coarse = (position + 1 - size) // stride + 1
    return int(torch.where(chooses, fine.clamp(min=0) + coarse.clamp(min=0), 0).sum())


def attention_work(heads: Heads, length: int, geometry: BlockGeometry) -> Work:
    """Attention over the visited blocks."""
    return Work(
        4.0 * heads.queries * heads.dim * visited_pairs(length, geometry),
        2.0 * ELEMENT * length * heads.dim * (heads.queries + heads.keys),
    )


def scored_tokens(length: int, geometry: BlockGeometry) -> int:
    """Pairs of a query and a token whose scores selection needs, for one head."""
    first = min(length, geometry.selected_blocks * geometry.block_size)  # the first query that chooses
    return (length * (length + 1) - first * (first + 1)) // 2


def selection_work(heads: Heads, length: int, geometry: BlockGeometry) -> Work:
    """Compressing keys, or copying their channels, and scoring blocks."""
    if geometry.scorer == "tokens":
        products = geometry.score_dims * scored_tokens(length, geometry)
    else:
        products = heads.dim * scored_keys(length, geometry)
    return Work(
        2.0 * heads.queries * products,
        1.0 * ELEMENT * length * heads.dim * (heads.queries + heads.keys),
    )


def backward_work(heads: Heads, length: int, geometry: BlockGeometry) -> Work:
    """Gradients of attention over the visited blocks."""
    return Work(
        10.0 * heads.queries * heads.dim * visited_pairs(length, geometry),
        4.0 * ELEMENT * length * heads.dim * (heads.queries + heads.keys),
    )
