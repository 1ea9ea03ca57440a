"""The operator of a decode step over a cache.

``infllm::decode_attention``
    attention of a few new queries over a cache whose capacity exceeds its valid length, with the compressed keys that
    selection needs kept from step to step.

One operator for all devices, as in `prefill`: the Triton kernels on CUDA (`decode_triton`), else kernels in C++ or
torch operators. Semantics: arXiv 2509.24663, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infllm_pass.errors import DeviceError, DtypeError, ShapeError
from infllm_pass.kernels.cpu import decode as torch_kernels
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.scorer import StateTensor, scorer_of

from . import checks
from .attention_args import DECODE, DecodeCall
from .checks import check_attention
from .prefill import new_output
from .registry import Operator, Seen

State = Sequence[Tensor]


def new_state(k: Tensor, geometry: BlockGeometry) -> list[Tensor]:
    """The state of a cache of which nothing is kept yet.

    Args:
        k: the cache, ``[B, Hkv, C, D]``.
        geometry: the block geometry, whose scorer says what is kept.

    Returns:
        The scorer's tensors, ``[B, Hkv, ...]`` each, uninitialised, and `filled`, int32 ``[B]`` zeros.
    """
    kept = [torch.empty(k.shape[:2] + each.shape, dtype=each.dtype, device=k.device) for each in _kept(k, geometry)]
    return [*kept, torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)]


def _kept(k: Tensor, geometry: BlockGeometry) -> list[StateTensor]:
    return scorer_of(geometry).state(geometry, k.shape[2], k.shape[3], k.dtype)


def check_decode(q: Tensor, k: Tensor, v: Tensor, state: State, call: DecodeCall) -> None:
    """Check all arguments of a decode step, before anything is written.

    Raises:
        ShapeError: a shape or a number does not fit.
        DtypeError: a dtype is not supported, or dtypes differ.
        DeviceError: tensors are on different devices.
    """
    check_attention(q, k, v, call.key_mask)
    checks.check_channels(k, call.geometry)
    checks.check_terms(q, k, call)
    described = _kept(k, call.geometry)
    if len(state) != len(described) + 1:
        names = ", ".join(each.name for each in described)
        raise ShapeError(f"state has {len(state)} tensors: expected {names} and filled, as new_state makes them")
    *kept, filled = state
    if q.shape[2] < 1 or q.shape[2] > k.shape[2]:
        raise ShapeError(
            f"q has {q.shape[2]} tokens and the cache k {k.shape[2]} slots: expected at least one token, and a slot "
            "for each; raise the cache's capacity"
        )
    for each, tensor in zip(described, kept, strict=True):
        name, (slots, *width) = each.name, each.shape
        if tensor.dtype != each.dtype:
            raise DtypeError(f"{name} is {tensor.dtype} and k {k.dtype}: make the state for the cache's dtype")
        if tensor.device != k.device:
            raise DeviceError(f"{name} is on {tensor.device} and k on {k.device}: make the state on the cache's device")
        expected = (*k.shape[:2], *width)
        if (
            tensor.dim() != 3 + len(width)
            or (*tensor.shape[:2], *tensor.shape[3:]) != expected
            or tensor.shape[2] < slots
        ):
            sizes = ", ".join(map(str, (*k.shape[:2], "n", *width)))
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}: expected [{sizes}] with n at least {slots}, what is kept of "
                f"the cache's capacity {k.shape[2]}; make a new state"
            )
        if width and tensor.stride(3) != 1:
            raise ShapeError(f"{name} has strides {tuple(tensor.stride())}: expected 1 for the last, and any others")
    if filled.dtype != torch.int32:
        raise DtypeError(f"filled is {filled.dtype}: expected torch.int32")
    if filled.dim() != 1 or filled.shape[0] != k.shape[0]:
        raise ShapeError(f"filled has shape {tuple(filled.shape)}: expected one number a row, [{k.shape[0]}]")
    if not filled.is_contiguous():
        raise ShapeError(f"filled has stride {filled.stride(0)}: expected a contiguous tensor")
    for name, numbers in (("lengths", call.lengths), ("starts", call.starts)):
        if numbers is None:
            continue
        if numbers.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name} is {numbers.dtype}: expected torch.int32 or torch.int64")
        if numbers.dim() != 1 or numbers.shape[0] not in (1, k.shape[0]):
            raise ShapeError(
                f"{name} has shape {tuple(numbers.shape)}: expected one number, [1], or one a row, [{k.shape[0]}]"
            )
    for name, tensor in (("filled", filled), ("lengths", call.lengths), ("starts", call.starts)):
        if tensor is not None and tensor.device != k.device:
            raise DeviceError(f"{name} is on {tensor.device} and k on {k.device}: move them to one device")
    if call.window is not None and call.window < 1:
        raise ShapeError(f"window={call.window}: expected at least 1 key")


def _is_tiled(q: Tensor, v: Tensor, call: DecodeCall) -> bool:
    """Whether the Triton kernels compute a step."""
    return checks.refused_by_tiled(q, v, call.scale, call.geometry) is None


def _check(q: Tensor, k: Tensor, v: Tensor, state: State, call: DecodeCall) -> bool:
    """Check all arguments; whether the Triton kernels compute the step."""
    check_decode(q, k, v, state, call)
    tiled = _is_tiled(q, v, call)
    if tiled:
        checks.check_tiled(q, k, v, call.geometry)
    return tiled


def _decode(q: Tensor, k: Tensor, v: Tensor, state: State, call: DecodeCall) -> tuple[Tensor, Tensor]:
    if _check(q, k, v, state, call):
        from . import decode_triton  # needs Triton, which CPU installations lack

        return decode_triton.launched(q, k, v, state, call)
    return torch_kernels.decode_attention(q, k, v, state, call)


def _decode_fake(q: Tensor, k: Tensor, v: Tensor, state: State, call: DecodeCall) -> tuple[Tensor, Tensor]:
    _check(q, k, v, state, call)
    return new_output(q, v)


def _kernels(q: Tensor, k: Tensor, v: Tensor, state: State, call: DecodeCall) -> tuple[Tensor, Tensor]:
    from . import decode_triton

    return decode_triton.decode_attention(q, k, v, state, call)


def _seen(q: Tensor, k: Tensor, v: Tensor, state: State, call: DecodeCall) -> Seen:
    """What compilers see of a step.

    Where CUDA graphs record it they see the operator, whose launches overlap. Otherwise the launches are Inductor's:
    from Python they take the host longer than the GPU gains.
    """
    if not _is_tiled(q, v, call):
        return Seen.HOST_CALL if q.is_cuda else Seen.CALL
    from . import decode_triton

    return Seen.CALL if decode_triton.is_recorded_in_graphs(q) else Seen.KERNELS


decode_attention = Operator(
    "decode_attention",
    DECODE,
    compute=_decode,
    fake=_decode_fake,
    kernels=_kernels,
    seen=_seen,
    doc="""Attention of the last queries of every row over a cache, sparse from ``dense_len`` keys on.

The state is what the scorer keeps of a row's first `filled` keys, counted from its first valid one, and `filled`, int32
``[B]``. Pooled scores keep `k1` and `k2`, ``[B, Hkv, n, D]``, the means of the windows that are complete; token scores
keep `ki`, ``[B, Hkv, n, d]``, some channels of each key, in its slot, and, in 8 bits, `ki_scale`, ``[B, Hkv, n]``. The
operator writes what came since, and sets `filled` to the row's length. What the caller has to keep: a key that changes
later, other than those of this call's queries, lowers `filled` to its position (0 for another sequence, or another
first key). A cache that was cut back needs nothing: the queries' own keys count as new in every call. Nothing is
differentiated through it.

Query ``i`` of a row stands in slot ``lengths - Lq + i`` of the cache, of which only slots of valid keys are read.

Returns the output ``[B, Hq, Lq, Dv]``, stored as ``[B, Lq, Hq, Dv]``, and the log-sum-exp ``[B, Hq, Lq]``, float32
(float64 for float64). A query that sees no key gives 0 and ``-inf``, or its sink.

Raises ShapeError, DtypeError, DeviceError: the tensors do not fit; raised before anything is written.""",
)
