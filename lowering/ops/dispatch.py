"""Selection and attention of tensors at hand, by whichever operators take them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from infllm_pass.errors import UntunedDeviceWarning
from infllm_pass.kernels.geometry import BlockGeometry

from . import prefill_cpu
from .checks import refused_by_tiled


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: tuple[Any, ...], geometry: BlockGeometry, *, scale: float, select: bool
) -> Tensor:
    """Attention through the Triton kernels where they take the call, through torch operators elsewhere.

    Args:
        q: ``[B, Hq, Lq, D]``, any strides, as for `k` and `v`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        call: the operators' arguments from ``key_mask`` to ``dense_len``.
        geometry: the block geometry.
        scale: softmax scale, as in `call`.
        select: whether sequences of ``dense_len`` keys and more select blocks; if not, every sequence is dense.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype.

    Warns:
        UntunedDeviceWarning: a call that selects blocks is on a GPU and the Triton kernels do not take it.
    """
    out: Tensor
    refusal = refused_by_tiled(q, v, scale, geometry)
    if refusal is None:
        from . import prefill_triton  # needs Triton, which CPU installations lack

        operands = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
        out = prefill_triton.tiled_attention(*operands, *call, select, *prefill_triton.tiled_arguments(geometry))[0]
        return out
    if select and q.is_cuda:
        warn_untuned(q.device, refusal)
    blocks = prefill_cpu.select_blocks(q, k, *call, *prefill_cpu.selection_arguments(geometry)) if select else None
    out = prefill_cpu.block_attention(q, k, v, blocks, *call, *prefill_cpu.attention_arguments(geometry))[0]
    return out


@torch.compiler.assume_constant_result  # where a graph is traced: once, and without breaking it
def warn_untuned(device: torch.device | str, refusal: str) -> None:
    """Say that sparse attention runs without the Triton kernels, and why, in the words of `refused_by_tiled`."""
    warnings.warn(
        f"sparse attention on {device} runs through torch operators tuned for the CPU, correct but slower than dense "
        f"attention: {refusal}; change that, or raise dense_len above your lengths",
        UntunedDeviceWarning,
        stacklevel=3,
    )
