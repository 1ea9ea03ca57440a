"""InfLLM-V2 block selection and sparse attention of whole prompts, forward and backward (arXiv 2509.24663).

The sequences of a call are computed one by one: in C++ (`kernels.cpu.native`), or in torch operators on any device
(`kernels.cpu.chunked`) where the kernels do not take the tensors or cannot be compiled. Memory is linear in the
length: nothing of size ``Lq x Lk``, nor ``Lq x Lk / kernel_stride``, exists at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import COARSE_FACTOR, BlockGeometry
from . import chunked, native
from .chunked import compute_dtype
from .native import adjacent
from .sequences import AttentionParams, Placement, Sequence, sequences

__all__ = ["attention_backward", "attention_forward", "compress_keys", "new_windows", "select_blocks"]


def new_windows(k: Tensor, geometry: BlockGeometry) -> list[Tensor]:
    """Compressed keys without any window: ``K1`` ``[B, Hkv, Lk // s + 2, D]``, ``K2`` with ``Lk // (4 s) + 2``.

    Two more than needed: sizes that can be 1 would make ``torch.export`` guard on dynamic lengths.

    Args:
        k: ``[B, Hkv, Lk, D]``.
        geometry: the block geometry.
    """
    batch, heads, length, dim = k.shape
    strides = geometry.kernel_stride, COARSE_FACTOR * geometry.kernel_stride
    return [k.new_zeros(batch, heads, length // stride + 2, dim) for stride in strides]


@torch.no_grad()
def compress_keys(
    q: Tensor,
    k: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    key_mask: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    dense_len: int = 0,
) -> list[Tensor]:
    """Means of all complete windows of keys (section 3.2).

    Window ``c`` of a sequence whose first key is number ``f`` lies in slot ``f // s + c`` of ``K1``, and in slot
    ``f // (4 s) + c`` of ``K2``: windows of different sequences of a row never meet in one slot.

    Args:
        q: the queries; only their number is read.
        k: ``[B, Hkv, Lk, D]``, any strides.
        geometry: the block geometry; see `select_blocks`, as for the arguments that follow.

    Returns:
        As `new_windows`, in k's dtype, means taken in float32 (float64 for float64). Slots without a window hold 0, as
        do sequences that no query stands on, or that are shorter than `dense_len`.

    Raises:
        ShapeError: packed bounds descend, leave the tensors, or let a sequence cross a row.
    """
    k, (fine, coarse) = adjacent(k), new_windows(k, geometry)
    placement = Placement(offset, key_mask, offsets, cu_seqlens_q, cu_seqlens_k)
    for one in sequences(k.shape[0], q.shape[2], k.shape[2], placement):
        if one.length >= dense_len:
            arguments = k[one.row, :, one.keys], *one_sequence(fine, coarse, one, geometry), geometry
            if not native.compress_keys(*arguments):
                chunked.compress_keys(*arguments)
    return [fine, coarse]


def one_sequence(fine: Tensor, coarse: Tensor, one: Sequence, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
    """The compressed keys of one sequence, ``[Hkv, n, D]`` from its first window on, all of them complete."""
    stride = geometry.kernel_stride
    begins = one.keys.start // stride, one.keys.start // (COARSE_FACTOR * stride)
    counts = geometry.num_compressed(one.length), geometry.num_coarse(one.length)
    k1, k2 = (
        keys[one.row, :, begin : begin + count]
        for keys, begin, count in zip((fine, coarse), begins, counts, strict=True)
    )
    return k1, k2


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    fine: Tensor,
    coarse: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    key_mask: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    dense_len: int = 0,
) -> Tensor:
    """The key blocks that every query visits (section 3.2).

    Args:
        q: ``[B, Hq, Lq, D]``, any strides; query ``i`` has key index ``offset + i``.
        k: ``[B, Hkv, Lk, D]``; ``Hq`` is a multiple of ``Hkv``. Only the sizes are read.
        fine: ``K1`` from `compress_keys` with the same arguments.
        coarse: ``K2`` from it.
        geometry: the block geometry.
        scale: softmax scale.
        offset: key index of the first query.
        key_mask: bool ``[B, Lk]``, True where a key is valid. A row's sequence runs from its first to its
            last valid key; positions and blocks count from its first.
        offsets: integers ``[1]`` or ``[B]``, added to `offset`. Keys after a row's last query, the free slots of a
            cache, then are no part of its sequence.
        cu_seqlens_q: int32 ``[R + 1]``, batch 1: packed sequences' query bounds; the last query of a sequence
            stands at its last key.
        cu_seqlens_k: int32 ``[R + 1]``: packed sequences' key bounds, counted through all rows.
        window: sliding window; blocks that lie wholly before a query's are no candidates.
        dense_len: sequences of fewer keys select nothing.

    Returns:
        int32 ``[B, Hkv, Lq, S]``, ``S = geometry.selected_blocks``: block numbers in no particular order,
        -1 in unused places. Queries outside every sequence select nothing.

    Raises:
        ShapeError: packed bounds descend, leave the tensors, or let a sequence cross a row.
    """
    q = adjacent(q)
    batch, _, length_q, _ = q.shape
    heads, length_k = k.shape[1], k.shape[2]
    chosen = torch.full((batch, heads, length_q, geometry.selected_blocks), -1, dtype=torch.int32, device=q.device)
    placement = Placement(offset, key_mask, offsets, cu_seqlens_q, cu_seqlens_k)
    for one in sequences(batch, length_q, length_k, placement):
        if one.length >= dense_len:
            windows = one_sequence(fine, coarse, one, geometry)
            params = AttentionParams(geometry, scale, one.offset, window)
            arguments = _grouped(q, heads)[one.row, :, :, one.queries], *windows, one.length, params
            blocks = native.select_blocks(*arguments)
            chosen[one.row, :, one.queries] = chunked.select_blocks(*arguments) if blocks is None else blocks
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
    offsets: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    dense_len: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over its selected blocks (section 3.1).

    Args:
        q: ``[B, Hq, Lq, D]``, any strides; query ``i`` has key index ``offset + i``.
        k: ``[B, Hkv, Lk, D]``, any strides.
        v: ``[B, Hkv, Lk, Dv]``, any strides.
        blocks: int32 ``[B, Hkv, Lq, S]`` from `select_blocks` with the same geometry; None for dense
            attention in every sequence.
        geometry: the block geometry.
        scale: softmax scale.
        offset: key index of the first query; see `select_blocks`, also for the arguments that follow.
        key_mask: bool ``[B, Lk]``, True where a key is valid.
        offsets: integers ``[1]`` or ``[B]``.
        cu_seqlens_q: int32 ``[R + 1]``.
        cu_seqlens_k: int32 ``[R + 1]``.
        window: sliding window: the query at ``p`` sees keys after ``p - window`` only.
        dense_len: in sequences of fewer keys a query attends to every key that it sees.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's type, stored as ``[B, Lq, Hq, Dv]``, and the natural log-sum-exp
        ``[B, Hq, Lq]``, float32 (float64 for float64 inputs). A query that sees no key, or stands outside
        every sequence, gives 0 and ``-inf``.
    """
    q, k, v = map(adjacent, (q, k, v))
    batch, heads_q, length_q, _ = q.shape
    heads, length_k, dim_v = v.shape[1:]
    out = q.new_zeros(batch, length_q, heads_q, dim_v).transpose(1, 2)
    lse = torch.full((batch, heads_q, length_q), -torch.inf, dtype=compute_dtype(q.dtype), device=q.device)
    placement = Placement(offset, key_mask, offsets, cu_seqlens_q, cu_seqlens_k)
    for one in sequences(batch, length_q, length_k, placement):
        sparse = blocks is not None and one.length >= dense_len
        arguments = (
            _grouped(q, heads)[one.row, :, :, one.queries],
            k[one.row, :, one.keys],
            v[one.row, :, one.keys],
            blocks[one.row, :, one.queries] if blocks is not None and sparse else None,
            _grouped(out, heads)[one.row, :, :, one.queries],
            _grouped(lse, heads)[one.row, :, :, one.queries],
            AttentionParams(geometry, scale, one.offset, window, one.mask),
        )
        if not native.attend_blocks(*arguments):
            chunked.attend_blocks(*arguments)
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
    offsets: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    dense_len: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact gradient of `attention_forward` with the selected blocks held fixed; deterministic.

    Args:
        grad_out: ``[B, Hq, Lq, Dv]``, gradient of the output.
        q: as in `attention_forward`, like all arguments that follow but ``out`` and ``lse``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        out: ``[B, Hq, Lq, Dv]``, what `attention_forward` returned.
        lse: ``[B, Hq, Lq]``, what `attention_forward` returned.
        blocks: int32 ``[B, Hkv, Lq, S]`` or None.
        geometry: the block geometry.
        scale: softmax scale.
        offset: key index of the first query.
        key_mask: bool ``[B, Lk]``.
        offsets: integers ``[1]`` or ``[B]``.
        cu_seqlens_q: int32 ``[R + 1]``.
        cu_seqlens_k: int32 ``[R + 1]``.
        window: sliding window.
        dense_len: sequences of fewer keys are dense.

    Returns:
        Gradients of ``q``, ``k`` and ``v`` in their shapes and types.
    """
    grad_out, q, k, v, out = map(adjacent, (grad_out, q, k, v, out))
    batch, _, length_q, _ = q.shape
    heads, length_k = k.shape[1], k.shape[2]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    placement = Placement(offset, key_mask, offsets, cu_seqlens_q, cu_seqlens_k)
    for one in sequences(batch, length_q, length_k, placement):
        sparse = blocks is not None and one.length >= dense_len
        grad, queries, result, log, grad_queries = (
            _grouped(x, heads)[one.row, :, :, one.queries] for x in (grad_out, q, out, lse, grad_q)
        )
        keys, values, grad_keys, grad_values = (x[one.row, :, one.keys] for x in (k, v, grad_k, grad_v))
        arguments = (
            (grad, queries, keys, values, result, log),
            blocks[one.row, :, one.queries] if blocks is not None and sparse else None,
            (grad_queries, grad_keys, grad_values),
            AttentionParams(geometry, scale, one.offset, window, one.mask),
        )
        if not native.attend_blocks_backward(*arguments):
            chunked.attend_blocks_backward(*arguments)
    return grad_q, grad_k, grad_v


def _grouped(x: Tensor, heads: int) -> Tensor:
    """A view of ``[B, Hq, ...]`` as ``[B, Hkv, G, ...]``."""
    return x.view(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])
