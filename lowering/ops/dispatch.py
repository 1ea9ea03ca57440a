"""Selection and attention of tensors at hand."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from infllm_pass.errors import UntunedDeviceWarning

from .attention_args import AttentionCall
from .checks import refused_by_tiled
from .prefill import block_attention, compress_keys, select_blocks


def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *, select: bool) -> Tensor:
    """Attention by the operators of `prefill`.

    Args:
        q: ``[B, Hq, Lq, D]``, any strides, as for `k` and `v`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        call: the other arguments.
        select: whether sequences of ``dense_len`` keys and more select blocks; if not, every sequence is dense.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype.

    Warns:
        UntunedDeviceWarning: a call that selects blocks is on a GPU and the Triton kernels do not take it.
    """
    refusal = refused_by_tiled(q, v, call.scale, call.geometry)
    if refusal is None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    elif select and q.is_cuda:
        warn_untuned(q.device, refusal)
    arguments = call.arguments
    selection = []
    if select:
        selection = select_blocks.default(q, k, compress_keys.default(q, k, *arguments), *arguments)
    out: Tensor = block_attention.default(q, k, v, selection, *arguments)[0]
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
