"""Gradient of the sinks: every row's weight on its sink times what its output would change by."""

from __future__ import annotations

import torch
from torch import Tensor


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sinks, ``-sum(exp(sink - lse) * delta)`` over the rows of a head.

    Args:
        sinks: ``[Hq]``.
        lse: float32 ``[B, Hq, Lq]`` from `attention_forward`, the sinks counted in.
        delta: float32 ``[B, Hq, Lq]`` from `output_delta`.

    Returns:
        ``[Hq]`` in the sinks' dtype.
    """
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)  # a row without a key under a sink of -inf weighs 0
    weights = torch.exp(sinks.to(lse.dtype)[:, None] - finite)
    return -(weights * delta).sum((0, 2)).to(sinks.dtype)
