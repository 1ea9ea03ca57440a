"""Switchable attention as a function of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_pass.compat.tensors import have_tangents
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import DtypeError, ForwardModeError, ShapeError
from infllm_pass.lowering.ops.attention_args import AttentionCall
from infllm_pass.lowering.ops.checks import check_attention, check_sequences, check_terms
from infllm_pass.lowering.ops.cu_seqlens import segment_bounds
from infllm_pass.lowering.ops.dispatch import attend
from infllm_pass.plan.break_even import AttentionPlace, device_name, resolved


def switchable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    *,
    key_mask: Tensor | None = None,
    offset: int | Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention that is dense for short sequences and block-sparse for long ones.

    InfLLM-V2, arXiv 2509.24663, section 3. Differentiable in q, k, v, key_bias and sinks; no gradient flows through
    the selection of blocks. The logit of a query and key is ``x = scale * q.k``, ``softcap * tanh(x / softcap)`` where
    there is a cap, plus the key's bias; the softmax runs over the visible keys' logits and the head's sink. Each
    sequence of a padded or packed batch takes its own side of the switch. On CUDA the Triton kernels run where they
    take the call (float16, bfloat16, float32; block_size a multiple of 16) and read no tensor on the host; on the CPU
    kernels in C++ do. Torch operators run elsewhere, on a GPU with a warning.

    Args:
        q: queries after position encoding, ``[B, Hq, Lq, D]``; float32, bfloat16, float16 or float64.
        k: keys, ``[B, Hkv, Lk, D]``, ``Hq % Hkv == 0``, D at most 256.
        v: values, ``[B, Hkv, Lk, Dv]``.
        config: a `SparseAttentionConfig`, a dict of its fields, or None for the defaults.
        key_mask: bool ``[B, Lk]``, True where a key is valid; a row's sequence runs from its first to its last
            valid key.
        offset: key index of the first query; None: the queries are the last of the keys. An integer tensor, of one
            number or one a row, is read on the device.
        scale: softmax scale; None: ``D ** -0.5``.
        window: sliding window: the query at ``p`` sees keys after ``p - window`` only.
        segment_ids: integers ``[B, Lk]``; a row's adjacent keys of one number are a sequence of their own, and
            query ``i`` belongs to the sequence of key ``offset + i``.
        key_bias: ``[B or 1, Hkv or 1, Lk]``, added to the capped scores, of any of q's dtypes; ``-inf`` hides a key.
            No part of the selection.
        sinks: ``[Hq]``, of any of q's dtypes: logits without a value, one for each query head. No part of the
            selection.
        softcap: largest size of a score, by a hyperbolic tangent, in the selection too; 0: no cap.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype. A query that sees no key gives 0.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError, ForwardModeError: before anything is computed.

    Warns:
        UntunedDeviceWarning: sparse on a GPU, and the Triton kernels do not take the call.
    """
    chosen = SparseAttentionConfig.coerce(config)
    check_attention(q, k, v, key_mask)
    bounds = None
    if segment_ids is not None:
        if segment_ids.shape != (k.shape[0], k.shape[2]):
            raise ShapeError(f"segment_ids has shape {tuple(segment_ids.shape)}: expected [B, Lk]")
        if segment_ids.is_floating_point():
            raise DtypeError(f"segment_ids is {segment_ids.dtype}: expected an integer dtype")
        bounds = segment_bounds(segment_ids)
    offsets, number = (offset.reshape(-1), None) if isinstance(offset, Tensor) else (None, offset)
    place = {"key_mask": key_mask, "offsets": offsets, "cu_seqlens_k": bounds, "offset": number, "window": window}
    terms = {"key_bias": key_bias, "sinks": sinks, "softcap": softcap}
    return _attend(q, k, v, chosen, scale, place, terms)


def switchable_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`switchable_attention` of sequences packed one after the other.

    Each sequence is causal with its last query at its last key, and takes its own side of the switch.

    Args:
        q: ``[total_q, Hq, D]``; float32, bfloat16, float16 or float64.
        k: ``[total_k, Hkv, D]``.
        v: ``[total_k, Hkv, Dv]``.
        cu_seqlens_q: int32 ``[R + 1]`` on q's device: sequence ``r`` has queries ``cu_seqlens_q[r]`` up to
            ``cu_seqlens_q[r + 1]``.
        cu_seqlens_k: int32 ``[R + 1]``: the same for keys. Bounds that descend or leave the tensors raise on the CPU;
            on a GPU they raise if ``INFLLM_DEBUG_CHECKS=1`` is in the environment, which waits for the device, and
            otherwise the result has no meaning.
        config: a `SparseAttentionConfig`, a dict of its fields, or None for the defaults.
        scale: softmax scale; None: ``D ** -0.5``.
        window: sliding window in keys, or None.
        key_bias: ``[Hkv or 1, total_k]``, added to the capped scores, as in `switchable_attention`.
        sinks: ``[Hq]``, as in `switchable_attention`.
        softcap: as in `switchable_attention`.

    Returns:
        ``[total_q, Hq, Dv]`` in q's dtype.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError, ForwardModeError: before anything is computed.

    Warns:
        UntunedDeviceWarning: sparse on a GPU, and the Triton kernels do not take the call.
    """
    chosen = SparseAttentionConfig.coerce(config)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: expected three dimensions [total, H, D]")
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, total, D]
    check_attention(q, k, v, None)
    if key_bias is not None:
        if key_bias.dim() != 2:
            raise ShapeError(f"key_bias has shape {tuple(key_bias.shape)}: expected two dimensions [Hkv or 1, total_k]")
        key_bias = key_bias.unsqueeze(0)
    place = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "window": window}
    terms = {"key_bias": key_bias, "sinks": sinks, "softcap": softcap}
    out = _attend(q, k, v, chosen, scale, place, terms)
    return out.squeeze(0).transpose(0, 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SparseAttentionConfig,
    scale: float | None,
    place: dict[str, Any],
    terms: dict[str, Any],
) -> Tensor:
    """The call by the operators, or by PyTorch's own attention; `place` and `terms`: fields of `AttentionCall`."""
    given = (x for x in (q, k, v, *terms.values()) if isinstance(x, Tensor))
    if not torch.compiler.is_compiling() and have_tangents(given):
        raise ForwardModeError("switchable attention")
    factor = float(q.shape[3]) ** -0.5 if scale is None else scale
    dim = q.shape[3]  # nothing tells which channels matter: token scores read them all
    config = resolved(config, AttentionPlace(device_name(q.device), q.shape[1], k.shape[1], dim, dim))
    call = AttentionCall(factor, config.switch_length, config.geometry_for(k.shape[3]), **place, **terms)
    check_sequences(q, call)
    check_terms(q, k, call)
    # An exported program holds both sides of the switch: the operators compare each sequence's length themselves.
    sparse = torch.compiler.is_exporting() or bool(k.shape[2] >= config.switch_length)
    bare = call.key_bias is None and call.sinks is None and not call.softcap
    plain = bare and all(each is None for each in place.values())
    if q.is_cuda and not sparse and q.shape[2] == k.shape[2] and plain:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=factor, enable_gqa=grouped)
    out: Tensor = attend(q, k, v, call, select=sparse)
    return out
