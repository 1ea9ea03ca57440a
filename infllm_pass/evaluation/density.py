"""How much of what it sees a query visits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from infllm_pass.config import SparseAttentionConfig


def density(config: SparseAttentionConfig | None, first: int, length: int) -> float:
    """Key blocks visited, as a share of the blocks with visible keys; mean over the queries of a text.

    Args:
        config: what is selected, with a number as ``dense_len``; None: dense attention.
        first: the first query that counts.
        length: tokens of the text; the queries up to its end count.
    """
    if config is None or length < config.switch_length:
        return 1.0
    visible = torch.arange(first, length) // config.block_size + 1
    visited = visible.clamp(max=config.selected_blocks)
    return float((visited / visible).mean())


def mean_density(sites: Mapping[SparseAttentionConfig | None, int], first: int, length: int) -> float:
    """The mean of `density` over attention sites.

    Args:
        sites: how many sites have which configuration.
        first: see there, as the next.
        length: see there.
    """
    return sum(count * density(config, first, length) for config, count in sites.items()) / sum(sites.values())
