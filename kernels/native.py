"""C++ kernels, compiled on the machine that they run on: by Inductor's compiler and into its cache, once.

``kernels/decode_attention.h``
    a decode step.
``kernels/switchable_attention.h``
    block selection and attention of whole prompts, called from here; and both in one, which packages contain
    (`lowering.cpp`).

Each function here takes the place of one in torch operators, and says whether it could.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_pass.errors import UncompiledKernelWarning
from infllm_pass.kernels.geometry import BlockGeometry

DTYPES = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half"}
"""What the kernels compute with, as C++ names it."""

NO_WINDOW = 2**62
"""A window that every key is in."""

_NUMBERS = """
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
using T = {number};
"""

_DECODE = """
extern "C" void decode_attention(
    const int64_t* numbers, double scale, const T* q, const T* k, const T* v, const T* k1, const T* k2,
    const int64_t* begins, const int64_t* ends, const bool* key_mask, T* out, float* lse) {
  const infllm::DecodeCall call = infllm::call_of<infllm::DecodeCall>(numbers, scale);
  infllm::DecodeStep<T>(call, q, k, v, k1, k2, begins, ends, key_mask).run(out, lse);
}
"""

_PREFILL = """
extern "C" void select_blocks(const int64_t* numbers, double scale, const T* q, const T* k, int32_t* blocks) {
  infllm::select_blocks(infllm::call_of<infllm::Call>(numbers, scale), q, k, blocks);
}

extern "C" void attend_blocks(
    const int64_t* numbers, double scale, const T* q, const T* k, const T* v, const bool* valid,
    const int32_t* blocks, const int64_t* places, T* out, float* lse) {
  infllm::attend_blocks(
      infllm::call_of<infllm::Call>(numbers, scale), q, k, v, valid, blocks, {places[0], places[1], places[2]}, out,
      lse);
}
"""


@cache
def header(name: str) -> str:
    """The text of a header beside this file, with those that it includes."""
    text = Path(__file__).with_name(name).read_text()
    return re.sub(r'#include "(\w+\.h)"\n', lambda included: header(included[1]), text)


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
        q: see `kernels.cpu_decode.decode_attention`, as for the arguments that are not named here.
        begins: first valid key of each row, ``0 <= begins <= ends <= C``.
        ends: one past the last one.
        out: ``[B, Lq, Hq, Dv]``, contiguous; written for queries that stand on a key.
        lse: float32 ``[B, Hq, Lq]``, the same.

    Returns:
        Whether it was computed: the kernel takes `DTYPES` and adjacent features, and it has to be compiled.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    kernels = _library(q.dtype, _DECODE) if _takes(q, k, v, adjacent=(k, v)) else None
    if kernels is None:
        return False
    if q.stride(3) != 1:
        q = q.contiguous()
    batch, heads_q, length_q, dim = q.shape
    heads, dim_v = v.shape[1], v.shape[3]
    strides = [stride for tensor in (q, k, v, k1, k2) for stride in tensor.stride()[:3]]
    numbers = [batch, heads, heads_q // heads, length_q, dim, dim_v, *strides]
    numbers += [0, 0] if key_mask is None else key_mask.stride()
    numbers += [NO_WINDOW if window is None else window, dense_len]
    numbers += [geometry.kernel_size, geometry.kernel_stride, geometry.block_size, geometry.init_blocks]
    numbers += [geometry.local_blocks, geometry.selected_blocks, geometry.lse == "exact", geometry.query_block]
    numbers += [torch.get_num_threads()]
    kernels.decode_attention(
        _int64s(numbers),
        ctypes.c_double(scale),
        *(_address(tensor) for tensor in (q, k, v, k1, k2)),
        *(_int64s(begins), _int64s(ends)),
        *(_address(tensor) for tensor in (key_mask, out, lse)),
    )
    return True


def select_sequence(
    q: Tensor, k: Tensor, *, geometry: BlockGeometry, scale: float, offset: int, window: int | None
) -> Tensor | None:
    """`kernels.cpu_selection.select_sequence`, ascending numbers first; None where it was not computed.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    kernels = _library(q.dtype, _PREFILL) if _takes(q, k, adjacent=(q, k)) else None
    if kernels is None:
        return None
    blocks = torch.empty(q.shape[0], q.shape[2], geometry.selected_blocks, dtype=torch.int32)
    numbers = _prefill_numbers(q, k, k, geometry, offset, window)
    kernels.select_blocks(numbers, ctypes.c_double(scale), *(_address(tensor) for tensor in (q, k, blocks)))
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
    """`kernels.cpu_attention.attend_sequence`: whether it was computed.

    Args:
        out: a part of ``[B, Lq, Hq, Dv]``, written.
        lse: a part of ``[B, Hq, Lq]``, written.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    kernels = _library(q.dtype, _PREFILL) if _takes(q, k, v, adjacent=(q, k, v)) else None
    if kernels is None:
        return False
    mask = None if mask is None else mask.contiguous()
    if blocks is not None and not blocks[0].is_contiguous():
        blocks = blocks.contiguous()
    places = [0, 0] if blocks is None else [blocks.stride(0), blocks.shape[2]]
    kernels.attend_blocks(
        _prefill_numbers(q, k, v, geometry, offset, window),
        ctypes.c_double(scale),
        *(_address(tensor) for tensor in (q, k, v, mask, blocks)),
        _int64s([*places, _head_stride(lse)]),
        *(_address(tensor) for tensor in (out, lse)),
    )
    return True


def _prefill_numbers(q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, offset: int, window: int | None) -> Any:
    """The numbers of ``infllm::Call`` for one sequence: ``[Hkv, G, n, D]``, ``[Hkv, L, D]`` and ``[Hkv, L, Dv]``."""
    heads, group, length_q, dim = q.shape
    numbers = [1, heads * group, heads, length_q, k.shape[1], dim, v.shape[2], 0, _head_stride(q), q.stride(2)]
    numbers += [0, *k.stride()[:2], 0, *v.stride()[:2], offset, NO_WINDOW if window is None else window, 0]
    numbers += [geometry.kernel_size, geometry.kernel_stride, geometry.block_size, geometry.init_blocks]
    numbers += [geometry.local_blocks, geometry.selected_blocks, geometry.lse == "exact", geometry.query_block]
    return _int64s(numbers)


def _head_stride(x: Tensor) -> int:
    """From a query head to the next one in ``[Hkv, G, ...]``: a dimension of size 1 has any stride."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _takes(*tensors: Tensor, adjacent: tuple[Tensor, ...]) -> bool:
    """Whether the kernels take tensors of this kind; of those in `adjacent` features have to lie side by side."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == tensors[0].dtype for tensor in tensors)
        and tensors[0].dtype in DTYPES
        and all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in adjacent)
    )


def _address(tensor: Tensor | None) -> Any:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _int64s(numbers: list[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@cache
def _library(dtype: torch.dtype, functions: str) -> ctypes.CDLL | None:
    """The compiled kernels for a dtype; None where they cannot be compiled."""
    from torch._inductor import exc
    from torch._inductor.codecache import CppCodeCache

    name = "decode_attention.h" if functions is _DECODE else "switchable_attention.h"
    try:
        return CppCodeCache.load(header(name) + _NUMBERS.format(number=DTYPES[dtype]) + functions)  # type: ignore[no-any-return]
    except (exc.InvalidCxxCompiler, exc.CppCompileError, OSError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        warnings.warn(
            f"attention on the CPU runs through torch operators, correct but slower, as {name} cannot be compiled: "
            f"{reason}; install g++, or name a C++ compiler in the variable CXX",
            UncompiledKernelWarning,
            stacklevel=2,
        )
        return None
