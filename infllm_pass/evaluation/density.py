"""How much of what it sees a query visits."""

from __future__ import annotations

import torch

from infllm_pass.config import SparseAttentionConfig


def density(config: SparseAttentionConfig | None, first: int, length: int, sparse_sites: float = 1.0) -> float:
    """Key blocks visited, as a share of the blocks with visible keys; mean over the queries of a text.

    Args:
        config: what is selected, with a number as ``dense_len``; None: dense attention.
        first: the first query that counts.
        length: tokens of the text; the queries up to its end count.
        sparse_sites: share of the attention sites that are sparse; the others visit everything.
    """
    if config is None or length < config.switch_length:
        return 1.0
    visible = torch.arange(first, length) // config.block_size + 1
    visited = visible.clamp(max=config.selected_blocks)
    share = float((visited / visible).mean())
    return sparse_sites * share + 1 - sparse_sites
