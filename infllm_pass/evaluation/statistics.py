"""Confidence intervals: Wilson's for shares, bootstrap for means and for differences of perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

CONFIDENCE = 0.95

RESAMPLES = 2000

Interval = tuple[float, float]


def wilson(hits: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share (E. B. Wilson, 1927): it holds for few trials and for shares near 0 or 1.

    Args:
        hits: successes.
        trials: how many were tried, at least 1.
        confidence: how often such intervals hold the true share.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits of {trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_mean(groups: Sequence[Sequence[float]], *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Percentile interval of the mean of group means; values are redrawn within each group.

    Args:
        groups: values that stand for one another, such as those of one text; each group counts alike.
        confidence: how often such intervals hold the true mean.
        seed: seed of the draws.
    """
    draw = torch.Generator().manual_seed(seed)
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for group in groups:
        means += _resampled(torch.tensor(group, dtype=torch.float64), draw) / len(groups)
    low, high = torch.quantile(means, torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64))
    return float(low), float(high)


def _resampled(values: Tensor, draw: torch.Generator) -> Tensor:
    """Means of redrawn values: ``[n] -> [RESAMPLES]``."""
    places = torch.randint(len(values), (RESAMPLES, len(values)), generator=draw)
    return values[places].mean(1)


def relative_perplexity(losses: Sequence[float]) -> float:
    """What a mean difference of log-likelihoods makes of a perplexity: 0.01 for one hundredth more."""
    return math.expm1(math.fsum(losses) / len(losses))
