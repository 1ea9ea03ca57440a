"""C++ kernels, compiled on the machine that they run on: by Inductor's compiler and into its cache, once.

``kernels/cpu/csrc/decode_attention.h``
    a decode step.
``kernels/cpu/csrc/switchable_attention.h``
    block selection and attention of whole prompts, called from here; and both in one, which packages contain
    (`lowering.inductor.cpp_extern`).

Each function here takes the place of one in torch operators, and says whether it could.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_pass.compat.inductor import compiled_cpp, cpp_errors
from infllm_pass.errors import UncompiledKernelWarning

from ..geometry import BlockGeometry

DTYPES = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half"}
"""What the kernels compute with, as C++ names it."""

NO_WINDOW = 2**62
"""A window that every key is in."""

_NUMBERS = """
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
using T = {number};
"""

_FUNCTIONS = {
    "decode_attention.h": """
extern "C" void decode_attention(
    const int64_t* numbers, double scale, const T* q, const T* k, const T* v, const T* k1, const T* k2,
    const int64_t* begins, const int64_t* ends, const bool* key_mask, T* out, float* lse) {
  const infllm::DecodeCall call = infllm::call_of<infllm::DecodeCall>(numbers, scale);
  infllm::DecodeStep<T>(call, q, k, v, k1, k2, begins, ends, key_mask).run(out, lse);
}
""",
    "switchable_attention.h": """
extern "C" void compress_keys(const int64_t* numbers, double scale, const T* k, T* fine, T* coarse) {
  infllm::compress_keys(infllm::call_of<infllm::Call>(numbers, scale), k, fine, coarse);
}

extern "C" void select_blocks(
    const int64_t* numbers, double scale, const T* q, const T* fine, const T* coarse, int32_t* blocks) {
  infllm::select_blocks(infllm::call_of<infllm::Call>(numbers, scale), q, fine, coarse, blocks);
}

extern "C" void attend_blocks(
    const int64_t* numbers, double scale, const T* q, const T* k, const T* v, const bool* valid,
    const int32_t* blocks, const int64_t* places, T* out, float* lse) {
  infllm::attend_blocks(
      infllm::call_of<infllm::Call>(numbers, scale), q, k, v, valid, blocks, {places[0], places[1], places[2]}, out,
      lse);
}
""",
}
"""What is called, by the header that computes it."""


@cache
def header(name: str) -> str:
    """The text of a header in ``csrc/``, with those that it includes."""
    text = (Path(__file__).with_name("csrc") / name).read_text()
    return re.sub(r'#include "(\w+\.h)"\n', lambda included: header(included[1]), text)


def call_numbers(
    size_q: Sequence[Any],
    size_k: Sequence[Any],
    size_v: Sequence[Any],
    stride_q: Sequence[Any],
    stride_k: Sequence[Any],
    stride_v: Sequence[Any],
    offset: Any,
    fixed: Sequence[int],
) -> list[Any]:
    """The numbers of ``infllm::Call`` in its order, integers or expressions, as the sizes are."""
    batch, heads_q, length_q, dim = size_q
    sizes = (batch, heads_q, size_k[1], length_q, size_k[2], dim, size_v[3])
    return [*sizes, *stride_q[:3], *stride_k[:3], *stride_v[:3], offset, *fixed]


def fixed_numbers(window: int | None, dense_len: int, geometry: BlockGeometry) -> tuple[int, ...]:
    """Those among the numbers of a call, of a prompt or a step, that do not depend on its tensors: the last ones."""
    numbers = (int(value == "exact") if name == "lse" else int(value) for name, value in vars(geometry).items())
    return (NO_WINDOW if window is None else window, dense_len, *numbers)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    begins: list[int],
    ends: list[int],
    key_mask: Tensor | None,
    *,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    window: int | None,
    out: Tensor,
    lse: Tensor,
) -> bool:
    """Attention of a decode step, the state being up to date.

    Args:
        q: see `kernels.cpu.decode.decode_attention`, as for the arguments that are not named here.
        begins: first valid key of each row, ``0 <= begins <= ends <= C``.
        ends: one past the last one.
        out: ``[B, Lq, Hq, Dv]``, contiguous; written for queries that stand on a key.
        lse: float32 ``[B, Hq, Lq]``, the same.

    Returns:
        Whether it was computed: the kernel takes `DTYPES` and adjacent features, and it has to be compiled.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    if q.stride(3) != 1:
        q = q.contiguous()
    kernels = _kernels("decode_attention.h", q, k, v)
    if kernels is None:
        return False
    batch, heads_q, length_q, dim = q.shape
    heads, dim_v = v.shape[1], v.shape[3]
    strides = [stride for tensor in (q, k, v, k1, k2) for stride in tensor.stride()[:3]]
    numbers = [batch, heads, heads_q // heads, length_q, dim, dim_v, *strides]
    numbers += [0, 0] if key_mask is None else key_mask.stride()
    numbers += fixed_numbers(window, dense_len, geometry)
    numbers += [torch.get_num_threads()]
    kernels.decode_attention(
        _int64s(numbers),
        ctypes.c_double(scale),
        *(_address(tensor) for tensor in (q, k, v, k1, k2)),
        *(_int64s(begins), _int64s(ends)),
        *(_address(tensor) for tensor in (key_mask, out, lse)),
    )
    return True


def compress_sequence(k: Tensor, fine: Tensor, coarse: Tensor, *, geometry: BlockGeometry) -> bool:
    """Means of all complete windows of one sequence ``[Hkv, L, D]``: whether they were written.

    Args:
        fine: ``[Hkv, n1, D]``, written.
        coarse: ``[Hkv, n2, D]``, written.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    kernels = _kernels("switchable_attention.h", k, fine, coarse)
    if kernels is None:
        return False
    numbers = _sequence_numbers(k[:, None], (fine, coarse), k.shape[1], geometry, 0, None)
    kernels.compress_keys(numbers, ctypes.c_double(0.0), *(_address(tensor) for tensor in (k, fine, coarse)))
    return True


def select_sequence(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    length: int,
    offset: int,
    window: int | None,
) -> Tensor | None:
    """`kernels.cpu.selection.select_sequence`, ascending numbers first; None where it was not computed.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    kernels = _kernels("switchable_attention.h", q, k1, k2)
    if kernels is None:
        return None
    blocks = torch.empty(q.shape[0], q.shape[2], geometry.selected_blocks, dtype=torch.int32)
    numbers = _sequence_numbers(q, (k1, k2), length, geometry, offset, window)
    kernels.select_blocks(numbers, ctypes.c_double(scale), *(_address(tensor) for tensor in (q, k1, k2, blocks)))
    return blocks


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    geometry: BlockGeometry,
    scale: float,
    offset: int,
    mask: Tensor | None,
    window: int | None,
) -> bool:
    """`kernels.cpu.attention.attend_sequence`: whether it was computed.

    Args:
        out: a part of ``[B, Lq, Hq, Dv]``, written.
        lse: a part of ``[B, Hq, Lq]``, written.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    kernels = _kernels("switchable_attention.h", q, k, v)
    if kernels is None:
        return False
    mask = None if mask is None else mask.contiguous()
    if blocks is not None and not blocks[0].is_contiguous():
        blocks = blocks.contiguous()
    places = [0, 0] if blocks is None else [blocks.stride(0), blocks.shape[2]]
    kernels.attend_blocks(
        _sequence_numbers(q, (k, v), k.shape[1], geometry, offset, window),
        ctypes.c_double(scale),
        *(_address(tensor) for tensor in (q, k, v, mask, blocks)),
        _int64s([*places, _head_stride(lse)]),
        *(_address(tensor) for tensor in (out, lse)),
    )
    return True


def _sequence_numbers(
    q: Tensor,
    others: tuple[Tensor, Tensor],
    length: int,
    geometry: BlockGeometry,
    offset: int,
    window: int | None,
) -> Any:
    """The numbers of a call for one sequence of `length` keys: queries ``[Hkv, G, n, D]``, two tensors ``[Hkv, m, D]``.

    The two are keys and values, or fine and coarse compressed keys; without queries, keys take their place.
    """
    heads, group, length_q, dim = q.shape
    k, v = others
    sizes = (1, heads * group, length_q, dim), (1, heads, length, dim), (1, *v.shape)
    strides = (0, _head_stride(q), q.stride(2)), (0, *k.stride()), (0, *v.stride())
    return _int64s(call_numbers(*sizes, *strides, offset, fixed_numbers(window, 0, geometry)))


def _head_stride(x: Tensor) -> int:
    """From a query head to the next one in ``[Hkv, G, ...]``: a dimension of size 1 has any stride."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def takes(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device and dtype."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def _kernels(name: str, *tensors: Tensor) -> ctypes.CDLL | None:
    """A library for these tensors, the first of which has the dtype of all; None where they are not taken.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    alike = all(takes(x) and x.dtype == tensors[0].dtype for x in tensors)
    adjacent = all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in tensors)
    return _library(tensors[0].dtype, name) if alike and adjacent else None


def _address(tensor: Tensor | None) -> Any:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _int64s(numbers: list[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@cache
def _library(dtype: torch.dtype, name: str) -> ctypes.CDLL | None:
    """The compiled kernels for a dtype; None where they cannot be compiled."""
    try:
        return compiled_cpp(header(name) + _NUMBERS.format(number=DTYPES[dtype]) + _FUNCTIONS[name])
    except cpp_errors() as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        warnings.warn(
            f"attention on the CPU runs through torch operators, correct but slower, as {name} cannot be compiled: "
            f"{reason}; install g++, or name a C++ compiler in the variable CXX",
            UncompiledKernelWarning,
            stacklevel=2,
        )
        return None
