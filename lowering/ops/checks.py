"""Checks of operator arguments, run before anything is computed and when fake tensors are traced."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from infllm_pass.compat.tensors import current_mode
from infllm_pass.errors import ConfigError, DeviceError, DtypeError, ShapeError
from infllm_pass.kernels.cpu.sequences import sequences
from infllm_pass.kernels.geometry import BlockGeometry, ChannelSets, format_channels
from infllm_pass.kernels.scorer import StateTensor
from infllm_pass.kernels.tracing import is_traced

from .attention_args import AttentionCall, DecodeCall

MAX_HEAD_DIM = 256

DEBUG_CHECKS = "INFLLM_DEBUG_CHECKS"
"""Environment variable; "1": the Triton operators also check numbers that lie on a GPU, and wait for it to do so."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_queries_keys(q: Tensor, k: Tensor, key_mask: Tensor | None) -> None:
    """Check queries ``[B, Hq, Lq, D]`` against keys ``[B, Hkv, Lk, D]`` and a key mask ``[B, Lk]``.

    Raises:
        ShapeError: a rank, head count, head dimension or batch size does not fit.
        DtypeError: a dtype is not supported, or the tensors' dtypes differ.
        DeviceError: the tensors are on different devices.
    """
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: expected four dimensions [B, H, L, D]")
    if q.dtype not in DTYPES:
        raise DtypeError(f"q is {q.dtype}: expected one of {', '.join(map(str, DTYPES))}")
    _check_match("q", q, "k", k)
    if q.shape[3] != k.shape[3]:
        raise ShapeError(f"q has head_dim {q.shape[3]} and k {k.shape[3]}: they must be equal")
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] < 1:
        raise ShapeError(f"head_dim {q.shape[3]} is not supported: expected 1 to {MAX_HEAD_DIM}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"q has {q.shape[1]} heads and k {k.shape[1]}: the number of query heads must be a multiple of "
            "the number of key/value heads"
        )
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise DtypeError(f"key_mask is {key_mask.dtype}: expected torch.bool, True where a key is valid")
        if key_mask.dim() != 2 or key_mask.shape[0] != k.shape[0] or key_mask.shape[1] != k.shape[2]:
            raise ShapeError(
                f"key_mask has shape {tuple(key_mask.shape)}: expected [B, Lk] = [{k.shape[0]}, {k.shape[2]}]"
            )
        if key_mask.device != q.device:
            raise DeviceError(f"key_mask is on {key_mask.device} and q on {q.device}: move them to one device")


def check_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Check the tensors that queries attend to, beside `check_queries_keys`.

    Raises:
        ShapeError: a shape does not fit.
        DtypeError: a dtype is not supported, or dtypes differ.
        DeviceError: the tensors are on different devices.
    """
    check_queries_keys(q, k, key_mask)
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ShapeError(
            f"v has shape {tuple(v.shape)} and k {tuple(k.shape)}: they must agree in all but the head dimension"
        )
    if v.shape[3] > MAX_HEAD_DIM or v.shape[3] < 1:
        raise ShapeError(f"v has head_dim {v.shape[3]}: expected 1 to {MAX_HEAD_DIM}")
    _check_match("q", q, "v", v)


def check_terms(q: Tensor, k: Tensor, call: AttentionCall | DecodeCall) -> None:
    """Check the score terms of a call.

    Raises:
        ConfigError: blocks are to be chosen by importance, and there is no bias or no such choice.
        ShapeError: a shape does not fit, or the cap is no cap.
        DtypeError: a bias or sinks are not floating.
        DeviceError: they are not on q's device.
    """
    if call.geometry.agnostic_blocks:
        _check_agnostic(call)
    if call.softcap == 0.0 and call.key_bias is None and call.sinks is None:
        return
    if not 0.0 <= call.softcap < float("inf"):
        raise ShapeError(f"softcap={call.softcap}: expected a positive number, or 0 for no cap")
    for name, tensor in (("key_bias", call.key_bias), ("sinks", call.sinks)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise DtypeError(f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if tensor.device != q.device:
            raise DeviceError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device")
    bias, sinks = call.key_bias, call.sinks
    if bias is not None and (
        bias.dim() != 3
        or bias.shape[0] not in (1, k.shape[0])
        or bias.shape[1] not in (1, k.shape[1])
        or bias.shape[2] != k.shape[2]
    ):
        raise ShapeError(
            f"key_bias has shape {tuple(bias.shape)}: expected [B or 1, Hkv or 1, Lk] with B, Hkv, Lk = "
            f"{k.shape[0]}, {k.shape[1]}, {k.shape[2]}"
        )
    if sinks is not None and (sinks.dim() != 1 or sinks.shape[0] != q.shape[1]):
        raise ShapeError(
            f"sinks has shape {tuple(sinks.shape)}: expected one number a query head, [Hq] = [{q.shape[1]}]"
        )


def _check_agnostic(call: AttentionCall | DecodeCall) -> None:
    """Check that blocks can be chosen by importance."""
    g, name = call.geometry, "agnostic_topk"
    if call.key_bias is None:
        expected = "0 without key_bias: the importance of a key is the bias that is added to its scores"
        raise ConfigError(name, g.agnostic_blocks, expected)
    unforced = g.selected_blocks - g.init_blocks - g.local_blocks - 1
    if not 0 <= g.agnostic_blocks <= unforced:
        raise ConfigError(name, g.agnostic_blocks, f"0 to {unforced}, the visited blocks that are not forced")
    if g.scorer != "pooled" or g.kernel_size - g.kernel_stride > g.local_blocks * g.block_size:
        expected = '0, or scorer="pooled" and windows of keys no longer than window_size + kernel_stride'
        raise ConfigError(name, g.agnostic_blocks, expected)


def check_channels(k: Tensor, geometry: BlockGeometry) -> None:
    """Check that the channels of token scores are channels of such keys.

    Raises:
        ShapeError: they are not.
    """
    if geometry.scorer == "tokens":
        reason = _refuse_channels(geometry.channels, int(k.shape[1]), int(k.shape[3]))
        if reason:
            raise ShapeError(f"channels are {format_channels(geometry.channels) or 'none'}: {reason}")


@lru_cache
def _refuse_channels(sets: ChannelSets, heads: int, dim: int) -> str:
    """What is expected of the channels for keys of some heads; "" if it holds."""
    if len(sets) not in (1, heads):
        return f"expected one set, or one for each of the {heads} key/value heads"
    if any(len(channels) != len(sets[0]) or not channels for channels in sets):
        return "expected as many in each set, at least one"
    if any(list(channels) != sorted({*channels}) or channels[0] < 0 or channels[-1] >= dim for channels in sets):
        return f"expected different numbers in ascending order, below head_dim {dim}"
    return ""


def check_state(q: Tensor, k: Tensor, state: Sequence[Tensor], expected: Sequence[StateTensor]) -> None:
    """Check that a state is the one of such keys on this device, where it is not the Triton kernels'.

    Args:
        q: the queries.
        k: the keys ``[B, Hkv, Lk, D]``.
        state: what `compress_keys` is to have given.
        expected: its tensors, as the kernels of this device describe them.

    Raises:
        ShapeError: they are not as many tensors, or of another shape.
        DtypeError: they have another dtype.
        DeviceError: they are on another device.
    """
    check_state_count(q, state, len(expected))
    for tensor, each in zip(state, expected, strict=True):
        _check_kind(each.name, tensor, k, each.dtype)
        shape = (*k.shape[:2], *each.shape)
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{each.name} has shape {tuple(tensor.shape)}: expected {shape}; give infllm::select_blocks the state "
                "that infllm::compress_keys made of the same keys"
            )


def check_state_count(q: Tensor, state: Sequence[Tensor], count: int) -> None:
    """Check that a state has as many tensors as `compress_keys` gives on this device.

    Raises:
        ShapeError: it has not.
    """
    if len(state) != count:
        raise ShapeError(f"state has {len(state)} tensors: expected the {count} of infllm::compress_keys on {q.device}")


def check_selection(q: Tensor, selection: Sequence[Tensor], count: int) -> None:
    """Check that a selection, unless it is empty, is one that `select_blocks` makes on this device.

    Raises:
        ShapeError: it is not of so many tensors.
    """
    if len(selection) not in (0, count):
        raise ShapeError(
            f"selection has {len(selection)} tensors: expected none, or the {count} of infllm::select_blocks on "
            f"{q.device}"
        )


def check_blocks(q: Tensor, k: Tensor, selection: Sequence[Tensor]) -> None:
    """Check a selection in the form of the torch operators: int32 ``[B, Hkv, Lq, S]``, or nothing.

    Raises:
        ShapeError: a shape does not fit.
        DtypeError: they are not int32.
        DeviceError: they are on another device than the queries.
    """
    check_selection(q, selection, 1)
    if not selection:
        return
    (blocks,) = selection
    if blocks.dtype != torch.int32:
        raise DtypeError(f"blocks is {blocks.dtype}: expected torch.int32 block numbers, -1 where unused")
    expected = (q.shape[0], k.shape[1], q.shape[2])
    if blocks.dim() != 4 or tuple(blocks.shape[:3]) != expected:
        raise ShapeError(f"blocks has shape {tuple(blocks.shape)}: expected [B, Hkv, Lq, S] with {expected}")
    _check_kind("blocks", blocks, q, torch.int32)


def check_sequences(q: Tensor, call: AttentionCall) -> None:
    """Check what says which keys a query stands at and sees: offsets, bounds of packed sequences, a window.

    Raises:
        ShapeError: a shape or a number does not fit, or two arguments exclude each other.
        DtypeError: a tensor is not of integers.
        DeviceError: a tensor is not on q's device.
    """
    offsets, cu_seqlens_q, cu_seqlens_k = call.offsets, call.cu_seqlens_q, call.cu_seqlens_k
    if call.window is not None and call.window < 1:
        raise ShapeError(f"window={call.window}: expected at least 1 key")
    for name, tensor in (("offsets", offsets), ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64) or (name != "offsets" and tensor.dtype != torch.int32):
            raise DtypeError(f"{name} is {tensor.dtype}: expected torch.int32")
        if tensor.device != q.device:
            raise DeviceError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device")
        if tensor.dim() != 1:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: expected one dimension")
        if tensor.shape[0] < 1:
            raise ShapeError(f"{name} has no number: expected at least one")
    if offsets is not None and offsets.shape[0] not in (1, q.shape[0]):
        raise ShapeError(f"offsets has {offsets.shape[0]} numbers: expected 1 or one a row, {q.shape[0]}")
    if offsets is not None and cu_seqlens_k is not None:
        raise ShapeError("a tensor offset is given with packed sequences: give the offset as an int")
    if cu_seqlens_q is not None:
        if cu_seqlens_k is None:
            raise ShapeError("cu_seqlens_q is given without cu_seqlens_k: packed sequences need both")
        if q.shape[0] != 1 or cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
            raise ShapeError(
                f"cu_seqlens_q has {cu_seqlens_q.shape[0]} numbers, cu_seqlens_k {cu_seqlens_k.shape[0]}, and q batch "
                f"size {q.shape[0]}: expected equally many numbers and batch size 1"
            )


def _check_kind(name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise DtypeError(f"{name} is {tensor.dtype}: expected {dtype}")
    if tensor.device != like.device:
        raise DeviceError(f"{name} is on {tensor.device} and the tensors on {like.device}: move them to one device")


def _check_match(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise DtypeError(f"{name_a} is {a.dtype} and {name_b} is {b.dtype}: cast them to one dtype")
    if a.device != b.device:
        raise DeviceError(f"{name_a} is on {a.device} and {name_b} on {b.device}: move them to one device")
    if a.shape[0] != b.shape[0]:
        raise ShapeError(f"{name_a} has batch size {a.shape[0]} and {name_b} {b.shape[0]}: they must be equal")


HAS_TRITON = importlib.util.find_spec("triton") is not None
TILED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_BLOCK_NUMBER = 1 << 16
"""Block numbers are stored in 16 bits."""

LEAST_CAPABILITY = (8, 0)
"""Of NVIDIA's devices, Ampere and later."""

FLOAT8_CAPABILITY = (8, 9)
"""Where Triton knows float8_e4m3fn: Ada and later."""


@torch.compiler.assume_constant_result  # where a graph is traced: a property of the device, not of its tensors
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where there is none to ask, as for tensors without data."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def refused_by_tiled(q: Tensor, v: Tensor, scale: float, geometry: BlockGeometry) -> str | None:
    """Why the Triton kernels do not take a call, in words that say what to change; None if they take it.

    Args:
        q: the queries, real or fake: device, dtype and head dimension count.
        v: the values, or the keys: the head dimension counts.
        scale: softmax scale.
        geometry: the block geometry.
    """
    return _refusal(q, v, scale, geometry)


def _refusal(q: Tensor, v: Tensor, scale: float, geometry: BlockGeometry) -> str | None:
    if q.device.type != "cuda":
        return f"q is on {q.device}: the Triton kernels run on CUDA devices"
    if not HAS_TRITON:
        return "triton is not installed: pip install triton"
    if torch.version.hip is not None:
        return "this torch is built for ROCm: the Triton kernels are made for NVIDIA devices"
    capability = compute_capability(q.device)
    if capability is not None and capability < LEAST_CAPABILITY:
        found, least = (f"{major}.{minor}" for major, minor in (capability, LEAST_CAPABILITY))
        return f"{q.device} has compute capability {found}: the Triton kernels need {least} or later"
    if geometry.score_dtype == "fp8" and capability is not None and capability < FLOAT8_CAPABILITY:
        return 'score_dtype="fp8": the Triton kernels need compute capability 8.9 or later for it; set "int8" or "key"'
    if q.dtype not in TILED_DTYPES:
        return f"q is {q.dtype}: the Triton kernels take {', '.join(map(str, TILED_DTYPES))}"
    for name, size in (("q", q.shape[3]), ("v", v.shape[3])):
        if size > MAX_HEAD_DIM:
            return f"{name} has head_dim {size}: the Triton kernels take 1 to {MAX_HEAD_DIM}"
    if scale <= 0.0:
        return f"scale={scale}: the Triton kernels take positive scales"
    if geometry.block_size % 16 or not 16 <= geometry.block_size <= 128:
        return f"block_size={geometry.block_size}: the Triton kernels take multiples of 16 from 16 to 128"
    block = geometry.query_block
    if block & (block - 1) or block > 128:
        return f"query_block={block}: the Triton kernels take powers of two up to 128"
    return None


def check_call(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Check the arguments that all operators over whole prompts take.

    Args:
        q: the queries.
        k: the keys.
        v: the values; where an operator takes none, the keys.
        call: the other arguments.

    Returns:
        Whether the Triton kernels compute the call.

    Raises:
        ShapeError: a shape, a stride or a number does not fit.
        DtypeError: a dtype is not supported, or dtypes differ.
        DeviceError: tensors are on different devices.
    """
    check_attention(q, k, v, call.key_mask)
    check_channels(k, call.geometry)
    check_sequences(q, call)
    check_terms(q, k, call)
    if refused_by_tiled(q, v, call.scale, call.geometry) is not None:
        return False
    check_tiled(q, k, v, call.geometry)
    if call.cu_seqlens_k is not None and _may_read(call.cu_seqlens_k):
        check_bounds(q, k, call)
    return True


def check_tiled(q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry) -> None:
    """Check what the Triton kernels ask of tensors that they do not refuse.

    Raises:
        ShapeError: features are not adjacent, or there are too many keys.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1:
            raise ShapeError(
                f"{name} has strides {tuple(tensor.stride())}: the last must be 1; call {name}.contiguous() first"
            )
    if k.shape[2] > MAX_BLOCK_NUMBER * geometry.block_size:
        raise ShapeError(
            f"k has {k.shape[2]} keys: with block_size={geometry.block_size} at most "
            f"{MAX_BLOCK_NUMBER * geometry.block_size} are supported; raise block_size"
        )


def check_bounds(q: Tensor, k: Tensor, call: AttentionCall) -> None:
    """Read the bounds of packed sequences, and check them.

    Raises:
        ShapeError: bounds descend, leave the tensors, or let a sequence cross a row.
    """
    for _ in sequences(q, k, replace(call, key_mask=None)):
        pass


def _may_read(tensor: Tensor) -> bool:
    """Whether a tensor's numbers may be read to check them: on the CPU, and elsewhere where `DEBUG_CHECKS` asks for it.

    Not where a compiler traces or a CUDA graph is captured, neither of which has them.
    """
    if is_traced(tensor) or current_mode() is not None:
        return False
    if not tensor.is_cuda:
        return True
    if os.environ.get(DEBUG_CHECKS) != "1":
        return False
    with torch.cuda.device(tensor.device):
        return not torch.cuda.is_current_stream_capturing()
