"""Switchable attention as a function, for models that call it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import DeviceError, DtypeError, ShapeError
from infllm_pass.lowering import operators
from infllm_pass.lowering.checks import check_attention, check_tiled, refused_by_tiled


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
) -> Tensor:
    """Causal attention that is dense for short sequences and block-sparse for long ones.

    InfLLM-V2, arXiv 2509.24663, section 3. Differentiable in q, k and v; no gradient flows through the
    selection of blocks. Each sequence of a padded or packed batch takes its own side of the switch. On CUDA the
    Triton kernels run where they take the call (float16, bfloat16, float32; block_size a multiple of 16); device
    tensors are never read on the host.

    Args:
        q: queries after position encoding, ``[B, Hq, Lq, D]``; float32, bfloat16, float16 or float64.
        k: keys, ``[B, Hkv, Lk, D]``, ``Hq % Hkv == 0``, D at most 256.
        v: values, ``[B, Hkv, Lk, Dv]``.
        config: a `SparseAttentionConfig`, a dict of its fields, or None for the defaults.
        key_mask: bool ``[B, Lk]``, True where a key is valid; a row's sequence runs from its first to its last
            valid key.
        offset: key index of the first query; None: the queries are the last of the keys. An integer tensor, of one
            number or one a row, is read on the device (CUDA).
        scale: softmax scale; None: ``D ** -0.5``.
        window: sliding window: the query at ``p`` sees keys after ``p - window`` only (CUDA).
        segment_ids: integers ``[B, Lk]``; a row's adjacent keys of one number are a sequence of their own, and
            query ``i`` belongs to the sequence of key ``offset + i`` (CUDA).

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError: before anything is computed.
    """
    chosen = SparseAttentionConfig.coerce(config)
    check_attention(q, k, v, None, key_mask)
    factor = float(q.shape[3]) ** -0.5 if scale is None else scale
    sparse = bool(k.shape[2] >= chosen.dense_len)
    refusal = refused_by_tiled(q, v, factor, chosen.geometry)
    if refusal is None:
        return _tiled(q, k, v, chosen, key_mask, offset, factor, window, segment_ids, sparse)
    for name, value in (("window", window), ("segment_ids", segment_ids)):
        if value is not None:
            raise DeviceError(f"{name} is only supported by the Triton kernels, which refuse this call: {refusal}")
    if isinstance(offset, Tensor):
        raise DeviceError(f"a tensor offset needs the Triton kernels, which refuse this call: {refusal}; give an int")
    blocks = None
    if sparse:
        blocks = operators.select_blocks(
            q,
            k,
            key_mask,
            offset,
            factor,
            chosen.dense_len,
            *operators.selection_arguments(chosen.geometry),
        )
    out: Tensor = operators.block_attention(
        q,
        k,
        v,
        blocks,
        key_mask,
        offset,
        factor,
        chosen.dense_len,
        *operators.attention_arguments(chosen.geometry),
    )[0]
    return out


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
) -> Tensor:
    """`switchable_attention` of sequences packed one after the other, on CUDA.

    Each sequence is causal with its last query at its last key, and takes its own side of the switch.

    Args:
        q: ``[total_q, Hq, D]``, float16, bfloat16 or float32.
        k: ``[total_k, Hkv, D]``.
        v: ``[total_k, Hkv, Dv]``.
        cu_seqlens_q: int32 ``[R + 1]`` on the device: sequence ``r`` has queries ``cu_seqlens_q[r]`` up to
            ``cu_seqlens_q[r + 1]``.
        cu_seqlens_k: int32 ``[R + 1]``: the same for keys.
        config: a `SparseAttentionConfig`, a dict of its fields, or None for the defaults.
        scale: softmax scale; None: ``D ** -0.5``.
        window: sliding window in keys, or None.

    Returns:
        ``[total_q, Hq, Dv]`` in q's dtype.

    Raises:
        ConfigError, ShapeError, DtypeError, DeviceError: before anything is computed.
    """
    chosen = SparseAttentionConfig.coerce(config)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: expected three dimensions [total, H, D]")
    rows = [_unit_stride(x.transpose(0, 1)[None]) for x in (q, k, v)]  # [1, H, total, D]
    factor = float(q.shape[2]) ** -0.5 if scale is None else scale
    check_tiled(*rows, None, None, cu_seqlens_q, cu_seqlens_k, window, factor, chosen.geometry)
    from infllm_pass.lowering import tiled

    sparse = bool(k.shape[0] >= chosen.dense_len)
    numbers = (None, window, factor, chosen.dense_len, sparse, *tiled.tiled_arguments(chosen.geometry))
    out: Tensor = tiled.tiled_attention(*rows, None, None, cu_seqlens_q, cu_seqlens_k, *numbers)[0]
    return out[0].transpose(0, 1)


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SparseAttentionConfig,
    key_mask: Tensor | None,
    offset: int | Tensor | None,
    scale: float,
    window: int | None,
    segment_ids: Tensor | None,
    sparse: bool,
) -> Tensor:
    from infllm_pass.lowering import tiled

    plain = key_mask is None and offset is None and window is None and segment_ids is None
    if not sparse and plain and q.shape[2] == k.shape[2]:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    bounds = None
    if segment_ids is not None:
        if segment_ids.shape != (k.shape[0], k.shape[2]):
            raise ShapeError(f"segment_ids has shape {tuple(segment_ids.shape)}: expected [B, Lk]")
        if segment_ids.is_floating_point():
            raise DtypeError(f"segment_ids is {segment_ids.dtype}: expected an integer dtype")
        bounds = segment_bounds(segment_ids)
    offsets = offset.reshape(-1) if isinstance(offset, Tensor) else None
    number = None if isinstance(offset, Tensor) else offset
    operands = [_unit_stride(x) for x in (q, k, v)]
    numbers = (number, window, scale, config.dense_len, sparse, *tiled.tiled_arguments(config.geometry))
    out: Tensor = tiled.tiled_attention(*operands, key_mask, offsets, None, bounds, *numbers)[0]
    return out


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def segment_bounds(segment_ids: Tensor) -> Tensor:
    """Cumulative key numbers of the segments of ``[B, L]`` ids: int32 ``[B * L + 1]``, padded with ``B * L``."""
    batch, length = segment_ids.shape
    total = batch * length
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    flat = starts.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, total + 1)  # the last place takes what starts nothing
    index = torch.arange(total, device=segment_ids.device, dtype=torch.int32)
    bounds = torch.full((total + 2,), total, device=segment_ids.device, dtype=torch.int32)
    return bounds.scatter_(0, place, index)[: total + 1]
