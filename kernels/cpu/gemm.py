"""Row products and the exponential that the CPU kernels are built of.

On the CPU a float32 product goes through oneDNN, which uses AVX-512 on every maker's chips; the BLAS
behind ``torch.matmul`` (MKL) runs at half that speed on AMD ones: 185 against 354 GFLOP/s for
``[3000, 64] x [64, 64]`` and 187 against 383 for ``[192, 64] x [64, 2112]`` on two Zen 5 cores.
``exp2`` is vectorised in torch itself and four times as fast as ``exp`` (11.9 against 3.1 G/s), so
logits are kept in units of ``log 2``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

MASKED = -1e30
"""Logit of a key that may not be seen: finite, so that differences of two never make a NaN."""

MIN_ONEDNN_WORK = 2**20
"""Multiply-adds from which oneDNN is the faster: ``[192, 64] x [64, 64]`` takes 18 us there and 12 us in
MKL, ``[384, 64] x [64, 64]`` 21 and 20. Every new shape costs oneDNN 1.5 ms once, so that callers keep to a
few shapes."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums run in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_up(value: int, multiple: int) -> int:
    """The first multiple of ``multiple`` not below ``value``."""
    return -(-value // multiple) * multiple


def row_product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T``.

    Args:
        x: ``[R, K]``, contiguous, float32 or float64.
        w: ``[N, K]``, x's type; it or its transpose contiguous, for oneDNN is a thousand times slower else.

    Returns:
        ``[R, N]`` in x's type.
    """
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * w.shape[0] >= MIN_ONEDNN_WORK
        and torch.backends.mkldnn.is_available()
    ):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return result
    return x @ w.t()
