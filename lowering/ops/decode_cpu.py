"""Attention of a decode step over a cache: the operator for the CPU, and the checks that its Triton twin shares.

``infllm::decode_attention``
    attention of a few new queries over a cache whose capacity exceeds its valid length, with the compressed keys that
    selection needs kept from step to step. Made for the CPU, in C++; in torch operators on any device.

Semantics: arXiv 2509.24663, section 3. Geometry arguments are those of `kernels.geometry.BlockGeometry`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_pass.errors import DeviceError, DtypeError, ShapeError
from infllm_pass.kernels.cpu import decode
from infllm_pass.kernels.geometry import COARSE_FACTOR, BlockGeometry

from .checks import check_attention
from .prefill_cpu import static_geometry


def new_state(k: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed keys of a cache that nothing was compressed of yet: `k1`, `k2` and `filled`.

    Args:
        k: the cache, ``[B, Hkv, C, D]``.
        geometry: the block geometry.

    Returns:
        Uninitialised ``[B, Hkv, n1, D]`` and ``[B, Hkv, n2, D]``, one window at least, and int32 ``[B]`` zeros.
    """
    batch, heads, capacity, dim = k.shape
    fine, coarse = state_slots(capacity, geometry)
    k1, k2 = (torch.empty(batch, heads, slots, dim, dtype=k.dtype, device=k.device) for slots in (fine, coarse))
    return k1, k2, torch.zeros(batch, dtype=torch.int32, device=k.device)


def state_slots(capacity: int, geometry: BlockGeometry) -> tuple[int, int]:
    """Windows of `k1` and `k2` for a cache: those of its capacity, at least one; sizes may be symbolic."""
    size, stride = geometry.kernel_size, geometry.kernel_stride
    fine = torch.sym_max(1, (capacity - size) // stride + 1)
    coarse = torch.sym_max(1, (capacity - COARSE_FACTOR * size) // (COARSE_FACTOR * stride) + 1)
    return fine, coarse


def check_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    filled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    key_mask: Tensor | None,
    window: int | None,
    geometry: BlockGeometry,
) -> None:
    """Check all arguments of a decode step, before anything is written.

    Raises:
        ShapeError: a shape or a number does not fit.
        DtypeError: a dtype is not supported, or dtypes differ.
        DeviceError: tensors are on different devices.
    """
    check_attention(q, k, v, None, key_mask)
    if q.shape[2] < 1 or q.shape[2] > k.shape[2]:
        raise ShapeError(
            f"q has {q.shape[2]} tokens and the cache k {k.shape[2]} slots: expected at least one token, and a slot "
            "for each; raise the cache's capacity"
        )
    for name, state, slots in zip(("k1", "k2"), (k1, k2), state_slots(k.shape[2], geometry), strict=True):
        if state.dtype != k.dtype:
            raise DtypeError(f"{name} is {state.dtype} and k {k.dtype}: make the state for the cache's dtype")
        if state.device != k.device:
            raise DeviceError(f"{name} is on {state.device} and k on {k.device}: make the state on the cache's device")
        expected = (k.shape[0], k.shape[1], k.shape[3])
        if state.dim() != 4 or (state.shape[0], state.shape[1], state.shape[3]) != expected or state.shape[2] < slots:
            raise ShapeError(
                f"{name} has shape {tuple(state.shape)}: expected [{k.shape[0]}, {k.shape[1]}, n, {k.shape[3]}] with "
                f"n at least {slots}, the windows of the cache's capacity {k.shape[2]}; make a new state"
            )
        if state.stride(3) != 1:
            raise ShapeError(f"{name} has strides {tuple(state.stride())}: expected 1 for the last, and any others")
    if filled.dtype != torch.int32:
        raise DtypeError(f"filled is {filled.dtype}: expected torch.int32")
    if filled.dim() != 1 or filled.shape[0] != k.shape[0]:
        raise ShapeError(f"filled has shape {tuple(filled.shape)}: expected one number a row, [{k.shape[0]}]")
    if not filled.is_contiguous():
        raise ShapeError(f"filled has stride {filled.stride(0)}: expected a contiguous tensor")
    for name, numbers in (("lengths", lengths), ("starts", starts)):
        if numbers is None:
            continue
        if numbers.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name} is {numbers.dtype}: expected torch.int32 or torch.int64")
        if numbers.dim() != 1 or numbers.shape[0] not in (1, k.shape[0]):
            raise ShapeError(
                f"{name} has shape {tuple(numbers.shape)}: expected one number, [1], or one a row, [{k.shape[0]}]"
            )
    for name, tensor in (("filled", filled), ("lengths", lengths), ("starts", starts)):
        if tensor is not None and tensor.device != k.device:
            raise DeviceError(f"{name} is on {tensor.device} and k on {k.device}: move them to one device")
    if window is not None and window < 1:
        raise ShapeError(f"window={window}: expected at least 1 key")


@torch.library.custom_op("infllm::decode_attention", mutates_args=("k1", "k2", "filled"))
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    filled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    key_mask: Tensor | None,
    window: int | None,
    scale: float,
    dense_len: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries of every row over a cache, sparse from ``dense_len`` keys on.

    `k1` and `k2` hold the means of the windows that are complete among the row's first `filled` keys, counted from its
    first valid one. The operator writes those that became complete since, and sets `filled` to the row's length. What
    the caller has to keep: a key that changes after it was compressed, other than those of this call's queries, lowers
    `filled` to its position (0 for another sequence, or another first key). A cache that was cut back needs nothing:
    the queries' own keys count as new in every call. Nothing is differentiated through the operator.

    Args:
        q: ``[B, Hq, Lq, D]``; query ``i`` of a row stands in slot ``lengths - Lq + i``.
        k: the cache ``[B, Hkv, C, D]``, the queries' keys written; slots without a valid key are never read.
        v: ``[B, Hkv, C, Dv]``.
        k1: ``[B, Hkv, n1, D]``, last stride 1; written.
        k2: ``[B, Hkv, n2, D]``, the same; written.
        filled: int32 ``[B]``, written.
        lengths: int32 or int64 ``[B]`` or ``[1]``: one past the row's last valid key.
        starts: the same, the row's first valid key; None: 0. Positions, windows and blocks count from there.
        key_mask: bool ``[B, C]``, any strides: False hides a slot from attention; its key still counts in windows and
            blocks. Slots outside ``[start, length)`` are not read. None: every key of the row is seen.
        window: sliding window in keys, or None.
        scale: softmax scale.
        dense_len: rows with fewer keys are dense.
        kernel_size: see `BlockGeometry`, as for the arguments that follow.

    Returns:
        The output ``[B, Hq, Lq, Dv]``, stored as ``[B, Lq, Hq, Dv]``, and the log-sum-exp ``[B, Hq, Lq]``, float32
        (float64 for float64). A query that sees no key gives 0 and ``-inf``.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit; raised before anything is written.
    """
    geometry = static_geometry(
        *(kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    )
    check_decode(q, k, v, k1, k2, filled, lengths, starts, key_mask, window, geometry)
    return decode.decode_attention(
        *(q, k, v, k1, k2, filled, lengths, starts, key_mask),
        geometry=geometry,
        scale=scale,
        dense_len=dense_len,
        window=window,
    )


@decode_attention.register_fake
def _decode_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    filled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    key_mask: Tensor | None,
    window: int | None,
    scale: float,
    dense_len: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
) -> tuple[Tensor, Tensor]:
    geometry = BlockGeometry(kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size)
    check_decode(q, k, v, k1, k2, filled, lengths, starts, key_mask, window, geometry)
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(batch, heads, length, dtype=wide)
