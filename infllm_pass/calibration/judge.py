"""How much of the attention each score finds, for queries whose attention is known: held mass, worst rows first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry, ChannelSets

WORST_SHARE = 0.01
"""Of the rows, the share that a site is judged by: the mean of the worst. Few heads have rare, sharp hits, and a mean
over all rows does not see them: with 95.4 % of the mass held, a selection can lose 11 % of perplexity."""

NEG_INF = float("-inf")

PUBLISHED = "pooled"
"""Name of the published score among the candidates."""


@dataclass(frozen=True)
class Rows:
    """Queries of one text, and the keys that they may attend to.

    Attributes:
        q: queries ``[Hq, R, D]``, adjacent, the last one at the last key.
        k: keys ``[Hkv, L, D]``.
        scale: softmax scale.
        window: sliding window; None: all keys up to the query's own.
    """

    q: Tensor
    k: Tensor
    scale: float
    window: int | None = None

    @property
    def positions(self) -> Tensor:
        """Where the queries stand, ``[R]``."""
        return torch.arange(self.k.shape[1] - self.q.shape[1], self.k.shape[1], device=self.k.device)

    @property
    def visible(self) -> Tensor:
        """Keys that each query attends to, bool ``[R, L]``."""
        keys, at = torch.arange(self.k.shape[1], device=self.k.device), self.positions[:, None]
        seen = keys <= at
        return seen if self.window is None else seen & (keys > at - self.window)

    def block_scores(self, geometry: BlockGeometry) -> Tensor:
        """The scores of blocks that a geometry asks for, ``[Hkv, R, blocks]``."""
        found: Tensor = reference.block_scores(
            self.q, self.k, geometry=geometry, scale=self.scale, offset=int(self.positions[0]), window=self.window
        )
        return found


def attention_mass(rows: Rows, block_size: int) -> Tensor:
    """Share of each query's attention that lies in each block, ``[Hkv, G, R, blocks]``."""
    queries = rows.q.reshape(rows.k.shape[0], -1, *rows.q.shape[1:])  # [Hkv, G, R, D]
    logits = rows.scale * queries.float() @ rows.k[:, None].float().mT
    probabilities = logits.masked_fill(~rows.visible, NEG_INF).softmax(-1)
    padded = F.pad(probabilities, (0, -probabilities.shape[-1] % block_size))
    mass: Tensor = padded.reshape(*padded.shape[:-1], -1, block_size).sum(-1)
    return mass


def visits(scores: Tensor, rows: Rows, geometry: BlockGeometry) -> Tensor:
    """Blocks in the order in which a growing budget visits them, forced ones first: int64 ``[Hkv, R, blocks]``."""
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    own = rows.positions[:, None] // geometry.block_size
    candidate = blocks <= own
    if rows.window is not None:
        candidate &= (blocks + 1) * geometry.block_size - 1 > rows.positions[:, None] - rows.window
    forced = candidate & ((blocks < geometry.init_blocks) | (blocks >= own - geometry.local_blocks))
    rank = torch.where(forced, torch.inf, scores.clamp(min=-1.0)).masked_fill(~candidate, NEG_INF)
    return torch.sort(rank, dim=-1, descending=True, stable=True).indices


def held(mass: Tensor, order: Tensor) -> Tensor:
    """Mass that the first 1, 2, … visited blocks hold, ``[Hkv, G, R, blocks]``."""
    return mass.gather(-1, order[:, None].expand_as(mass)).cumsum(-1)


def missed(
    rows: Rows, config: SparseAttentionConfig, candidates: Mapping[str, ChannelSets], budgets: Sequence[int]
) -> dict[str, dict[int, Tensor]]:
    """What each score misses: mass that the best choice at the full budget holds, and it does not at a smaller one.

    Args:
        rows: the queries.
        config: the geometry, the full budget, and what index keys are stored in; its scorer is "tokens".
        candidates: channels that token scores may read, by name.
        budgets: blocks in all, ascending; the last one is the full budget.

    Returns:
        For "pooled" and every candidate, for every budget, a value for each head, query of its group and row,
        ``[Hkv, G * R]``.
    """
    geometry, head_dim = config.geometry, rows.k.shape[2]
    mass = attention_mass(rows, geometry.block_size)
    blocks = mass.shape[-1]
    best = held(mass, visits(mass.sum(1), rows, geometry))[..., min(budgets[-1], blocks) - 1]
    asked = {PUBLISHED: geometry} | {name: config.geometry_for(head_dim, sets) for name, sets in candidates.items()}
    found = {}
    for name, each in asked.items():
        holds = held(mass, visits(rows.block_scores(each), rows, geometry))
        found[name] = {budget: (best - holds[..., min(budget, blocks) - 1]).flatten(1) for budget in budgets}
    return found


def worst(values: Tensor) -> float:
    """Mean of the largest values, see `WORST_SHARE`."""
    count = max(1, round(WORST_SHARE * values.numel()))
    return max(0.0, float(values.flatten().topk(count).values.mean()))
