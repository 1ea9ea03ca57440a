"""C++ kernels for the CPU: compiled by Inductor's compiler when first called, and kept in its cache.

``csrc/decode_attention.h``
    a decode step.
``csrc/switchable_attention.h``
    compression of keys, block selection and block-sparse attention of one sequence; and all of them in one call, which
    AOTInductor packages compile in (`lowering.inductor.cpp_extern`).
``csrc/attention_backward.h``
    the gradient of block-sparse attention.

Each function here computes what its namesake in `kernels.cpu.chunked` does, and returns whether it could.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_pass.compat.inductor import compiled_cpp, cpp_errors
from infllm_pass.errors import UncompiledKernelWarning

from ..geometry import BlockGeometry, ScoreDtype
from .sequences import AttentionParams

DTYPES = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half", torch.float64: "double"}
"""What the kernels compute with, as C++ names it."""

INDEX_KINDS: tuple[ScoreDtype, ...] = ("key", "int8", "fp8")
"""What index keys are stored in, in the order of ``infllm::IndexKind``."""

NO_WINDOW = 2**62
"""A window that every key is in."""


def _fields(text: str) -> dict[str, int]:
    """Fields and how many integers each has, in order: one, or what follows a colon."""
    return {name: int(count or 1) for name, _, count in (word.partition(":") for word in text.split())}


_FIXED = (
    "window dense_len kernel_size kernel_stride block_size init_blocks local_blocks selected_blocks exact query_block "
    "index_dims index_kind"
)

CALL_FIELDS = _fields(
    f"batch heads_q heads length_q length_k dim dim_v stride_q:3 stride_k:3 stride_v:3 offset {_FIXED}"
)
"""Integers of ``infllm::Call``."""

DECODE_FIELDS = _fields(
    "batch heads group length_q dim dim_v stride_q:3 stride_k:3 stride_v:3 stride_k1:3 stride_k2:3 stride_mask:2 "
    f"{_FIXED} threads"
)
"""Integers of ``infllm::DecodeCall``."""

GRADIENT_FIELDS = _fields("grad_out:2 out:2 lse grad_q:2 grad_k:2 grad_v:2 grad_bias")
"""Integers of ``infllm::GradientStrides``."""

_STRUCTS = {
    "query_chunk.h": ("Call", CALL_FIELDS),
    "decode_attention.h": ("DecodeCall", DECODE_FIELDS),
    "attention_backward.h": ("GradientStrides", GRADIENT_FIELDS),
}

_PRELUDE = """
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
using T = {number};
using R = infllm::Real<T>;
"""

_FUNCTIONS = {
    "decode_attention.h": """
extern "C" void decode_attention(
    const int64_t* numbers, double scale, double softcap, const T* q, const T* k, const T* v, const void* k1,
    const void* k2, const int32_t* channels, const int64_t* begins, const int64_t* ends, const R* key_bias,
    const int64_t* bias_strides, const R* sinks, const bool* key_mask, T* out, R* lse) {
  const auto call = infllm::call_of<infllm::DecodeCall>(numbers, scale, softcap);
  const infllm::TermTensors<R> terms(key_bias, bias_strides, sinks);
  infllm::DecodeStep<T>(call, q, k, v, k1, k2, channels, begins, ends, key_mask, terms).run(out, lse);
}
""",
    "switchable_attention.h": """
extern "C" void compress_keys(
    const int64_t* numbers, const T* k, T* k1, T* k2, const int64_t* strides1, const int64_t* strides2) {
  const auto call = infllm::call_of<infllm::Call>(numbers, 1.0, 0.0);
#pragma omp parallel for schedule(dynamic)
  for (int64_t head = 0; head < call.heads; head++)
    infllm::compress_keys<T>(
        call, k + head * call.stride_k[1], call.stride_k[2], call.length_k,
        {k1 + head * strides1[0], strides1[1]}, {k2 + head * strides2[0], strides2[1]});
}

extern "C" void select_blocks(
    const int64_t* numbers, double scale, double softcap, const T* q, T* k1, T* k2, const int64_t* strides1,
    const int64_t* strides2, int32_t* blocks) {
  infllm::select_blocks<T>(
      infllm::call_of<infllm::Call>(numbers, scale, softcap), q, {k1, strides1[1]}, strides1[0], {k2, strides2[1]},
      strides2[0], blocks);
}

extern "C" void select_by_tokens(
    const int64_t* numbers, double scale, double softcap, const T* q, const R* index, const int64_t* strides,
    const bool* valid, const int32_t* channels, int32_t* blocks) {
  infllm::select_by_tokens<T>(
      infllm::call_of<infllm::Call>(numbers, scale, softcap), q, index, strides, valid, channels, blocks);
}

extern "C" void attend_blocks(
    const int64_t* numbers, double scale, double softcap, const T* q, const T* k, const T* v, const R* key_bias,
    const int64_t* bias_strides, const R* sinks, const bool* valid, const int32_t* blocks, const int64_t* strides,
    T* out, R* lse) {
  infllm::attend_blocks<T>(
      infllm::call_of<infllm::Call>(numbers, scale, softcap), q, k, v, valid, {key_bias, bias_strides, sinks},
      {blocks, strides[0], strides[1]}, out, lse, strides[2]);
}
""",
    "attention_backward.h": """
extern "C" void attend_blocks_backward(
    const int64_t* numbers, double scale, double softcap, const T* q, const T* k, const T* v, const R* key_bias,
    const int64_t* bias_strides, const R* sinks, const bool* valid, const int32_t* blocks, const int64_t* strides,
    const infllm::GradientStrides* gradient_strides, const T* grad_out, const T* out, const R* lse, T* grad_q,
    T* grad_k, T* grad_v, R* grad_bias) {
  infllm::attend_blocks_backward<T>(
      infllm::call_of<infllm::Call>(numbers, scale, softcap), q, k, v, valid, {key_bias, bias_strides, sinks},
      {blocks, strides[0], strides[1]}, {grad_out, out, lse, grad_q, grad_k, grad_v, grad_bias}, *gradient_strides);
}
""",
}
"""What is called, by the header that computes it."""


@cache
def header(name: str) -> str:
    """The text of a header in ``csrc/``, with those that it includes, and checks that structs are as declared here."""
    text = (Path(__file__).with_name("csrc") / name).read_text()
    text = re.sub(r'#include "(\w+\.h)"\n', lambda included: header(included[1]), text)
    if name not in _STRUCTS:
        return text
    struct, fields = _STRUCTS[name]
    checks, at = "", 0
    for field, count in fields.items():
        checks += f"static_assert(offsetof(infllm::{struct}, {field}) == {8 * at} && "
        checks += f'sizeof(infllm::{struct}::{field}) == {8 * count}, "{struct}.{field}");\n'
        at += count
    scores = 16 * (name != "attention_backward.h")  # scale and softcap
    return text + f'{checks}static_assert(sizeof(infllm::{struct}) == {8 * at + scores}, "{struct}");\n'


def integers(fields: Mapping[str, int], **values: Any) -> list[Any]:
    """The integers of a struct in its order, from the values of all its fields."""
    if values.keys() != fields.keys():
        raise TypeError(f"expected the fields {', '.join(fields)}; got {', '.join(values)}")
    return [x for name, count in fields.items() for x in ([values[name]] if count == 1 else values[name])]


def call_numbers(
    size_q: Sequence[Any],
    size_k: Sequence[Any],
    size_v: Sequence[Any],
    stride_q: Sequence[Any],
    stride_k: Sequence[Any],
    stride_v: Sequence[Any],
    offset: Any,
    fixed: Mapping[str, int],
) -> list[Any]:
    """The integers of ``infllm::Call`` in its order, numbers or expressions, as the sizes are."""
    batch, heads_q, length_q, dim = size_q
    return integers(
        CALL_FIELDS,
        batch=batch,
        heads_q=heads_q,
        heads=size_k[1],
        length_q=length_q,
        length_k=size_k[2],
        dim=dim,
        dim_v=size_v[3],
        offset=offset,
        stride_q=stride_q[:3],
        stride_k=stride_k[:3],
        stride_v=stride_v[:3],
        **fixed,
    )


def fixed_numbers(window: int | None, dense_len: int, geometry: BlockGeometry) -> dict[str, int]:
    """Those integers of a call, of a prompt or a step, that do not depend on its tensors."""
    sizes = {name: int(value) for name, value in vars(geometry).items() if name in CALL_FIELDS}
    words = {
        "exact": int(geometry.lse == "exact"),
        "index_dims": geometry.score_dims,
        "index_kind": INDEX_KINDS.index(geometry.score_dtype),
    }
    return {"window": NO_WINDOW if window is None else window, "dense_len": dense_len, **words, **sizes}


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    bounds: tuple[list[int], list[int]],
    key_mask: Tensor | None,
    params: AttentionParams,
    dense_len: int,
    out: Tensor,
    lse: Tensor,
) -> bool:
    """Attention of a decode step, the state being up to date.

    Args:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, C, D]``.
        v: ``[B, Hkv, C, Dv]``.
        state: K1 and K2, ``[B, Hkv, n, D]``; or index keys ``[B, Hkv, C, d]`` and, in 8 bits, scales ``[B, Hkv, C]``.
        bounds: first valid key of each row, and one past the last one: ``0 <= begin <= end <= C``.
        key_mask: bool ``[B, C]``, any strides; False hides a key.
        params: its offset and mask are not read.
        dense_len: rows with fewer keys are dense.
        out: ``[B, Lq, Hq, Dv]``, contiguous; written for queries that stand on a key.
        lse: ``[B, Hq, Lq]``, contiguous, float32 or float64; the same.

    Returns:
        Whether it was computed: the kernel takes `DTYPES` and adjacent features, and it has to be compiled.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    q, geometry = adjacent(q), params.geometry
    alike = [x for x in state if geometry.score_dtype == "key" or geometry.scorer == "pooled"]
    library = _library_for("decode_attention.h", q, k, v, *alike)
    if library is None or geometry.agnostic_blocks:
        return False
    k1, k2 = state[0], state[-1]
    batch, heads_q, length_q, dim = q.shape
    numbers = integers(
        DECODE_FIELDS,
        batch=batch,
        heads=v.shape[1],
        group=heads_q // v.shape[1],
        length_q=length_q,
        dim=dim,
        dim_v=v.shape[3],
        threads=torch.get_num_threads(),
        **{f"stride_{name}": x.stride()[:3] for name, x in (("q", q), ("k", k), ("v", v), ("k1", k1), ("k2", k2))},
        stride_mask=(0, 0) if key_mask is None else key_mask.stride(),
        **fixed_numbers(params.window, dense_len, params.geometry),
    )
    terms, _held = _terms(params, lse.dtype)
    library.decode_attention(
        _int64s(numbers),
        ctypes.c_double(params.scale),
        ctypes.c_double(params.softcap),
        *map(_address, (q, k, v, k1, k2)),
        channel_numbers(geometry, v.shape[1]) if geometry.scorer == "tokens" else None,
        *map(_int64s, bounds),
        *terms,
        *map(_address, (key_mask, out, lse)),
    )
    return True


def compress_keys(k: Tensor, k1: Tensor, k2: Tensor, geometry: BlockGeometry) -> bool:
    """Compressed keys of one sequence.

    Args:
        k: ``[Hkv, L, D]``.
        k1: ``[Hkv, n, D]``, its first complete windows are written.
        k2: the same for coarse windows.
        geometry: the block geometry.
    """
    library = _library_for("switchable_attention.h", k, k1, k2)
    if library is None:
        return False
    numbers = _sequence_numbers(k[:, None], k, k, AttentionParams(geometry, 1.0))
    strides = (_int64s(x.stride()[:2]) for x in (k1, k2))
    library.compress_keys(numbers, *map(_address, (k, k1, k2)), *strides)
    return True


def select_blocks(q: Tensor, state: Sequence[Tensor], length: int, params: AttentionParams) -> Tensor | None:
    """`kernels.cpu.chunked.select_blocks`, blocks ascending and -1 last; None where it was not computed."""
    library = _library_for("switchable_attention.h", q, *(state if params.geometry.scorer == "pooled" else ()))
    if library is None:
        return None
    keys = q.new_empty(()).expand(q.shape[0], length, q.shape[3])  # for its shape
    blocks = torch.empty(q.shape[0], q.shape[2], params.geometry.selected_blocks, dtype=torch.int32)
    scores = ctypes.c_double(params.scale), ctypes.c_double(params.softcap)
    call = _sequence_numbers(q, keys, keys, params), *scores, _address(q)
    strides = [_int64s(x.stride()[:2]) for x in state]
    if params.geometry.scorer == "tokens":
        mask, _ = _contiguous(params.mask, None)
        channels = channel_numbers(params.geometry, q.shape[0])
        library.select_by_tokens(*call, _address(state[0]), *strides, _address(mask), channels, _address(blocks))
    else:
        library.select_blocks(*call, *map(_address, state), *strides, _address(blocks))
    return blocks


@cache
def channel_numbers(geometry: BlockGeometry, heads: int) -> Any:
    """The channels of each key/value head, ``int32_t [heads][index_dims]``."""
    sets = geometry.channels * (heads if len(geometry.channels) == 1 else 1)
    numbers = [channel for channels in sets for channel in channels]
    return (ctypes.c_int32 * len(numbers))(*numbers)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, out: Tensor, lse: Tensor, params: AttentionParams
) -> bool:
    """`kernels.cpu.chunked.attend_blocks`; ``out`` is a part of ``[B, Lq, Hq, Dv]``, ``lse`` of ``[B, Hq, Lq]``."""
    library = _library_for("switchable_attention.h", q, k, v)
    if library is None:
        return False
    mask, blocks = _contiguous(params.mask, blocks)
    terms, _held = _terms(params, lse.dtype)
    library.attend_blocks(
        _sequence_numbers(q, k, v, params),
        ctypes.c_double(params.scale),
        ctypes.c_double(params.softcap),
        *map(_address, (q, k, v)),
        *terms,
        *map(_address, (mask, blocks)),
        _int64s([*_list_strides(blocks), _head_stride(lse)]),
        *map(_address, (out, lse)),
    )
    return True


def attend_blocks_backward(
    forward: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    blocks: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    params: AttentionParams,
    grad_bias: Tensor | None = None,
) -> bool:
    """`kernels.cpu.chunked.attend_blocks_backward`; the same bits for any number of threads."""
    grad_out, q, k, v, out, lse = forward
    library = _library_for("attention_backward.h", q, k, v, grad_out, out)
    if library is None:
        return False
    grad_q, grad_k, grad_v = gradients
    mask, blocks = _contiguous(params.mask, blocks)
    strides = integers(
        GRADIENT_FIELDS,
        **{
            name: (_head_stride(x), x.stride(2))
            for name, x in (("grad_out", grad_out), ("out", out), ("grad_q", grad_q))
        },
        lse=_head_stride(lse),
        grad_k=grad_k.stride()[:2],
        grad_v=grad_v.stride()[:2],
        grad_bias=0 if grad_bias is None else grad_bias.stride(0),
    )
    terms, _held = _terms(params, lse.dtype)
    library.attend_blocks_backward(
        _sequence_numbers(q, k, v, params),
        ctypes.c_double(params.scale),
        ctypes.c_double(params.softcap),
        *map(_address, (q, k, v)),
        *terms,
        *map(_address, (mask, blocks)),
        _int64s(_list_strides(blocks)),
        _int64s(strides),
        *map(_address, (grad_out, out, lse, *gradients, grad_bias)),
    )
    return True


def _terms(params: AttentionParams, wide: torch.dtype) -> tuple[tuple[Any, Any, Any], tuple[Tensor | None, ...]]:
    """The bias of keys ``[..., heads, keys]``, its strides, and the sinks as arguments; and the tensors to be kept."""
    bias, sinks = params.key_bias, params.sinks
    if bias is None and sinks is None:
        return (None, None, None), ()
    strides = None
    if bias is not None:
        bias = adjacent(bias.to(wide))
        steps = [step if size > 1 else 0 for size, step in zip(bias.shape[:-1], bias.stride(), strict=False)]
        strides = _int64s([*[0] * (2 - len(steps)), *steps])  # one sequence has no batch
    sinks = None if sinks is None else sinks.to(wide).contiguous()
    return (_address(bias), strides, _address(sinks)), (bias, sinks)


def _contiguous(mask: Tensor | None, blocks: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if blocks is not None and not blocks[0].is_contiguous():
        blocks = blocks.contiguous()
    return None if mask is None else mask.contiguous(), blocks


def _list_strides(blocks: Tensor | None) -> list[int]:
    return [0, 0] if blocks is None else [blocks.stride(0), blocks.shape[2]]


def _sequence_numbers(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Any:
    """The integers of a call for one sequence: ``[Hkv, G, n, D]``, ``[Hkv, L, D]`` and ``[Hkv, L, Dv]``."""
    heads, group, length_q, dim = q.shape
    sizes = (1, heads * group, length_q, dim), (1, *k.shape), (1, *v.shape)
    strides = (0, _head_stride(q), q.stride(2)), (0, *k.stride()), (0, *v.stride())
    fixed = fixed_numbers(params.window, 0, params.geometry)
    return _int64s(call_numbers(*sizes, *strides, params.offset, fixed))


def _head_stride(x: Tensor) -> int:
    """From a query head to the next one in ``[Hkv, G, ...]``: a dimension of size 1 has any stride."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def adjacent(x: Tensor) -> Tensor:
    """A tensor whose features are adjacent in memory, copied where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def takes(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device and dtype."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def _library_for(name: str, *tensors: Tensor) -> ctypes.CDLL | None:
    """A library for these tensors; None where they are not taken, or nothing can be compiled.

    Warns:
        UncompiledKernelWarning: there is no compiler, or it failed; once.
    """
    alike = all(takes(x) and x.dtype == tensors[0].dtype for x in tensors)
    adjacent = all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in tensors)
    return _library(tensors[0].dtype, name) if alike and adjacent else None


def _address(tensor: Tensor | None) -> Any:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _int64s(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@cache
def _library(dtype: torch.dtype, name: str) -> ctypes.CDLL | None:
    """The compiled kernels of a header for a dtype; None where they cannot be compiled."""
    try:
        return compiled_cpp(header(name) + _PRELUDE.format(number=DTYPES[dtype]) + _FUNCTIONS[name])
    except cpp_errors() as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        warnings.warn(
            f"attention on the CPU runs through torch operators, correct but slower, as {name} cannot be compiled: "
            f"{reason}; install g++, or name a C++ compiler in the variable CXX",
            UncompiledKernelWarning,
            stacklevel=2,
        )
        return None
