"""Device functions of the score terms: soft cap, key bias and attention sink.

A score is what the softmax takes the exponential of. Kernels keep scores in a unit in which ``scale_log2`` times a
score is its base-2 logarithm: products of queries and keys, or, where there is a cap, the hyperbolic tangent, so that
a cap costs no multiplication of its own. Each term is a switch of the program: without it nothing is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..params import LEAST_BIAS
from .tile_ops import LN_2, LOG2_E

_LEAST_BIAS = tl.constexpr(LEAST_BIAS)


def score_unit(scale: float, softcap: float) -> tuple[float, float]:
    """``scale_log2``, the base-2 logarithm that a score of 1 stands for, and ``cap_log2`` of `cap_products`."""
    return (softcap or scale) * LOG2_E, 2.0 * LOG2_E * scale / softcap if softcap else 0.0


@triton.jit
def cap_products(products, cap_log2):
    """``tanh(products * scale / softcap)`` with ``cap_log2 = 2 * log2(e) * scale / softcap``.

    As ``1 - 2 / (1 + exp(2 x))``, the quotient as a square of the reciprocal root, which is one instruction where a
    division is seven. A power that overflows is infinite and gives 1, one that underflows gives -1. The error is that
    of a few units in the last place of a 1 in float32, about ``softcap * 2 ** -21`` of a score.
    """
    root = tl.rsqrt(0.5 * tl.exp2(products * cap_log2) + 0.5)
    return 1.0 - root * root


@triton.jit
def load_key_bias(addresses, scale_log2, mask):
    """Biases of keys, in the unit of scores, -inf below `LEAST_BIAS`; `mask`: which keys there are, None for all."""
    bias = tl.load(addresses, mask=mask).to(tl.float32)
    return tl.where(bias < _LEAST_BIAS, float("-inf"), bias * (1.0 / (scale_log2 * LN_2)))


@triton.jit
def score_products(
    products,  # [BM, BN]
    key_bias,  # [BN] addresses
    scale_log2,
    cap_log2,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Scores of products: capped, then biased by key."""
    scores = products
    if HAS_SOFTCAP:
        scores = cap_products(scores, cap_log2)
    if HAS_BIAS:
        scores += load_key_bias(key_bias, scale_log2, None)[None, :]
    return scores


@triton.jit
def add_sink(sinks, highest, total):
    """A softmax's maximum and sum, base 2, with the sinks' weights in the sum; and what the outputs' sums decay by."""
    sinks = sinks.to(tl.float32) * (1.0 / LN_2)
    raised = tl.maximum(highest, sinks)
    decay = tl.exp2(highest - raised)
    return raised, total * decay + tl.exp2(sinks - raised), decay
