"""InfLLM-V2 block selection and sparse attention in torch operators (arXiv 2509.24663).

Made for CPU tensors, where it is faster than dense attention from some 8k keys on; runs on any device.
Memory is linear in the length: nothing of size ``Lq x Lk``, nor ``Lq x Lk / kernel_stride``, exists at
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_pass.kernels.cpu_attention import attend_sequence
from infllm_pass.kernels.cpu_backward import attend_sequence_backward
from infllm_pass.kernels.cpu_linear import compute_dtype
from infllm_pass.kernels.cpu_rows import sequences
from infllm_pass.kernels.cpu_selection import select_sequence
from infllm_pass.kernels.geometry import BlockGeometry

__all__ = ["attention_backward", "attention_forward", "select_blocks"]


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    key_mask: Tensor | None = None,
    dense_len: int = 0,
) -> Tensor:
    """The key blocks that every query visits (section 3.2).

    Args:
        q: ``[B, Hq, Lq, D]``, any strides; query ``i`` has key index ``offset + i``.
        k: ``[B, Hkv, Lk, D]``, any strides; ``Hq`` is a multiple of ``Hkv``.
        geometry: the block geometry.
        scale: softmax scale.
        offset: key index of the first query.
        key_mask: bool ``[B, Lk]``, True where a key is valid. A row's sequence runs from its first to its
            last valid key; positions and blocks count from its first.
        dense_len: rows whose sequence has fewer keys select nothing.

    Returns:
        int32 ``[B, Hkv, Lq, S]``, ``S = geometry.selected_blocks``: block numbers in no particular order,
        -1 in unused places. Queries outside their row's sequence select nothing.
    """
    batch, _, length_q, _ = q.shape
    heads, length_k = k.shape[1], k.shape[2]
    chosen = torch.full((batch, heads, length_q, geometry.selected_blocks), -1, dtype=torch.int32, device=q.device)
    for row in sequences(batch, length_q, length_k, offset, key_mask):
        if row.length >= dense_len:
            chosen[row.row, :, row.queries] = select_sequence(
                _grouped(q, heads)[row.row, :, :, row.queries],
                k[row.row, :, row.keys],
                geometry=geometry,
                scale=scale,
                offset=row.offset,
            )
    return chosen


@torch.no_grad()
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    key_mask: Tensor | None = None,
    dense_len: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over its selected blocks (section 3.1).

    Args:
        q: ``[B, Hq, Lq, D]``, any strides; query ``i`` has key index ``offset + i``.
        k: ``[B, Hkv, Lk, D]``, any strides.
        v: ``[B, Hkv, Lk, Dv]``, any strides.
        blocks: int32 ``[B, Hkv, Lq, S]`` from `select_blocks` with the same geometry; None for dense
            attention in every row.
        geometry: the block geometry.
        scale: softmax scale.
        offset: key index of the first query.
        key_mask: bool ``[B, Lk]``, True where a key is valid; see `select_blocks`.
        dense_len: rows whose sequence has fewer keys attend to every key before the query.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's type, stored as ``[B, Lq, Hq, Dv]``, and the natural log-sum-exp
        ``[B, Hq, Lq]``, float32 (float64 for float64 inputs). A query that sees no key, or stands outside
        its row's sequence, gives 0 and ``-inf``.
    """
    batch, heads_q, length_q, _ = q.shape
    heads, length_k, dim_v = v.shape[1:]
    out = q.new_zeros(batch, length_q, heads_q, dim_v).transpose(1, 2)
    lse = torch.full((batch, heads_q, length_q), -torch.inf, dtype=compute_dtype(q.dtype), device=q.device)
    for row in sequences(batch, length_q, length_k, offset, key_mask):
        sparse = blocks is not None and row.length >= dense_len
        attend_sequence(
            _grouped(q, heads)[row.row, :, :, row.queries],
            k[row.row, :, row.keys],
            v[row.row, :, row.keys],
            blocks[row.row, :, row.queries] if blocks is not None and sparse else None,
            _grouped(out, heads)[row.row, :, :, row.queries],
            _grouped(lse, heads)[row.row, :, :, row.queries],
            geometry=geometry,
            scale=scale,
            offset=row.offset,
            mask=row.mask,
        )
    return out, lse


@torch.no_grad()
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor | None,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    key_mask: Tensor | None = None,
    dense_len: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact gradient of `attention_forward` with the selected blocks held fixed; deterministic.

    Args:
        grad_out: ``[B, Hq, Lq, Dv]``, gradient of the output.
        q: as in `attention_forward`, like ``k``, ``v``, ``blocks`` and the keywords.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        out: ``[B, Hq, Lq, Dv]``, what `attention_forward` returned.
        lse: ``[B, Hq, Lq]``, what `attention_forward` returned.
        blocks: int32 ``[B, Hkv, Lq, S]`` or None.
        geometry: the block geometry.
        scale: softmax scale.
        offset: key index of the first query.
        key_mask: bool ``[B, Lk]``.
        dense_len: rows whose sequence has fewer keys are dense.

    Returns:
        Gradients of ``q``, ``k`` and ``v`` in their shapes and types.
    """
    batch, _, length_q, _ = q.shape
    heads, length_k = k.shape[1], k.shape[2]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for row in sequences(batch, length_q, length_k, offset, key_mask):
        sparse = blocks is not None and row.length >= dense_len
        attend_sequence_backward(
            *(_grouped(x, heads)[row.row, :, :, row.queries] for x in (grad_out, q, out, lse)),
            k=k[row.row, :, row.keys],
            v=v[row.row, :, row.keys],
            blocks=blocks[row.row, :, row.queries] if blocks is not None and sparse else None,
            grad_q=_grouped(grad_q, heads)[row.row, :, :, row.queries],
            grad_k=grad_k[row.row, :, row.keys],
            grad_v=grad_v[row.row, :, row.keys],
            geometry=geometry,
            scale=scale,
            offset=row.offset,
            mask=row.mask,
        )
    return grad_q, grad_k, grad_v


def _grouped(x: Tensor, heads: int) -> Tensor:
    """A view of ``[B, Hq, ...]`` as ``[B, Hkv, G, ...]``."""
    return x.view(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])
