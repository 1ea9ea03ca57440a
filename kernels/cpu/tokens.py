"""Token scores on the CPU: index keys, and blocks by their largest token score in torch operators.

A block's score is the largest logit of its visible tokens over some channels of the head, normalised over all blocks
and added up over the heads of a group (`kernels.scorer.TokenScorer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..geometry import BlockGeometry, channel_runs
from ..scorer import INDEX_DTYPES, INDEX_HIGHEST
from .sequences import AttentionParams

LOG2E = math.log2(math.e)

HIDDEN = -1e30
"""Logit of a hidden token: finite, so that no difference is a NaN."""


def cap_scores(scores: Tensor, softcap: float) -> Tensor:
    """Scores in units of log 2, overwritten where a cap changes them; 0: no cap."""
    cap = softcap * LOG2E
    return scores.div_(cap).tanh_().mul_(cap) if softcap else scores


def cap_slopes(scores: Tensor, softcap: float) -> Tensor | None:
    """What `cap_scores` multiplies gradients by, from the scores that it gave; None without a cap."""
    return 1.0 - (scores / (softcap * LOG2E)) ** 2 if softcap else None


def channels_of(x: Tensor, geometry: BlockGeometry, dim: int) -> Tensor:
    """A copy of the channels that token scores read of ``[..., D]``, whose key/value heads are dimension `dim`."""
    heads = [x] if len(geometry.channels) == 1 else x.unbind(dim)
    parts = [
        torch.cat([head[..., run[0] : run[-1] + 1] for run in channel_runs(channels)], -1)
        for head, channels in zip(heads, geometry.channels, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim)


def index_keys(k: Tensor, geometry: BlockGeometry) -> list[Tensor]:
    """The state of token scores for keys ``[..., Hkv, L, D]``: ``[..., Hkv, L, d]`` and, in 8 bits, scales without d.

    Numbers are rounded to the nearest, ties to even; the scale of a token is its largest channel by `INDEX_HIGHEST`.
    """
    keys = channels_of(k, geometry, k.dim() - 3)
    if geometry.score_dtype == "key":
        return [keys]
    keys = keys.float()
    largest = keys.abs().amax(-1)
    # By a number of the host CUDA multiplies with its reciprocal, and the last bit decides halves.
    scale = largest / largest.new_full((), INDEX_HIGHEST[geometry.score_dtype])
    keys = keys / scale.masked_fill(scale == 0, 1.0)[..., None]
    return [(keys.round() if geometry.score_dtype == "int8" else keys).to(INDEX_DTYPES[geometry.score_dtype]), scale]


def read_index(state: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Index keys of a state as numbers of a dtype."""
    keys = state[0].to(dtype)
    return keys if len(state) == 1 else keys * state[1].to(dtype)[..., None]


def token_logits(rows: Tensor, index: Tensor, last: Tensor, begin: int, end: int, params: AttentionParams) -> Tensor:
    """Logits of the tokens from `begin` to `end`, `HIDDEN` for those that are not visible.

    Args:
        rows: scaled queries ``[Hkv, G, n, d]``.
        index: ``[Hkv, L, d]`` in their dtype.
        last: ``[n]``, the position up to which each query's shared selection sees tokens.
        begin: the first token.
        end: one past the last.
        params: the mask, the window and the cap.

    Returns:
        ``[Hkv, G, n, end - begin]``.
    """
    tokens = torch.arange(begin, end, device=rows.device)
    seen = tokens <= last[:, None]
    if params.mask is not None:
        seen = seen & params.mask[begin:end]
    if params.window is not None:
        seen = seen & (tokens > last[:, None] - params.window)
    heads, group, count, width = rows.shape
    logits = (rows.reshape(heads, group * count, width) @ index[:, begin:end].mT).view(heads, group, count, -1)
    logits = cap_scores(logits, params.softcap)
    return logits.masked_fill_(~seen, HIDDEN)


def token_block_scores(q: Tensor, index: Tensor, last: Tensor, length: int, params: AttentionParams) -> Tensor:
    """Scores ``[Hkv, n, blocks]`` of queries, each by its own heads; ``-inf`` where no token of a block is visible.

    Args:
        q: ``[Hkv, G, n, D]`` in the type of `index`, times the scale and the logarithm of e to the base 2.
        index: ``[Hkv, L, d]``.
        last: ``[n]``.
        length: keys in the sequence.
        params: as in `token_logits`.
    """
    g = params.geometry
    rows = channels_of(q, g, 0)
    logits = token_logits(rows, index, last, 0, int(last[-1]) + 1, params)
    room = g.num_blocks(length) * g.block_size - logits.shape[-1]
    best = pad(logits, (0, room), value=HIDDEN).unflatten(-1, (-1, g.block_size)).amax(-1)
    hidden = (best <= 0.5 * HIDDEN).all(1)  # the same for all heads
    norm = best.amax(-1, keepdim=True)
    norm = norm + (best - norm).exp2_().sum(-1, keepdim=True).log2_()
    return best.sub_(norm).exp2_().sum(1).masked_fill_(hidden, -torch.inf)
