"""C++ kernels, compiled on the machine that they run on: by Inductor's compiler and into its cache, once.

``kernels/decode_attention.h``
    a decode step, called from here.
``kernels/switchable_attention.h``
    whole prompts, which packages contain: see `lowering.cpp`.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable
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

_DECODE = """
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
extern "C" void decode_attention(
    const int64_t* numbers, double scale, const {number}* q, const {number}* k, const {number}* v, const {number}* k1,
    const {number}* k2, const int64_t* begins, const int64_t* ends, const bool* key_mask, {number}* out, float* lse) {{
  const infllm::DecodeCall call = infllm::decode_call_of(numbers, scale);
  infllm::DecodeStep<{number}>(call, q, k, v, k1, k2, begins, ends, key_mask).run(out, lse);
}}
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
    if q.dtype not in DTYPES or k.stride(3) != 1 or v.stride(3) != 1:
        return False
    kernel = _decode_kernel(q.dtype)
    if kernel is None:
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
    kernel(
        _int64s(numbers),
        scale,
        *(tensor.data_ptr() for tensor in (q, k, v, k1, k2)),
        *(_int64s(begins), _int64s(ends)),
        None if key_mask is None else key_mask.data_ptr(),
        *(out.data_ptr(), lse.data_ptr()),
    )
    return True


def _int64s(numbers: list[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@cache
def _decode_kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """The compiled kernel for a dtype; None where it cannot be compiled."""
    from torch._inductor import exc
    from torch._inductor.codecache import CppCodeCache

    code = header("decode_attention.h") + _DECODE.format(number=DTYPES[dtype])
    try:
        kernel = CppCodeCache.load(code).decode_attention
    except (exc.InvalidCxxCompiler, exc.CppCompileError, OSError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        warnings.warn(
            f"decode steps on the CPU run through torch operators, correct but several times slower, as their kernel "
            f"cannot be compiled: {reason}; install g++, or name a C++ compiler in the variable CXX",
            UncompiledKernelWarning,
            stacklevel=2,
        )
        return None
    address, numbers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)
    kernel.argtypes = [numbers, ctypes.c_double, *[address] * 5, numbers, numbers, *[address] * 3]
    kernel.restype = None
    return kernel  # type: ignore[no-any-return]
