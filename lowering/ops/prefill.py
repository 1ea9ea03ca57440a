"""The operators of attention over whole prompts.

``infllm::compress_keys``
    what selection reads of the keys: means of windows.
``infllm::select_blocks``
    which blocks every query visits; nothing is differentiated through it.
``infllm::block_attention``
    causal attention over selected blocks, dense for sequences shorter than ``dense_len`` or without a selection.
``infllm::block_attention_backward``
    its gradient with the selection held fixed.

One set for all devices. What computes is decided in one place, `refused_by_tiled`, for tensors and for fake ones: the
Triton kernels on CUDA, else kernels in C++ or torch operators. State and selection are what it wants them to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from infllm_pass.compat.inductor import compiles_ahead_of_time
from infllm_pass.kernels.cpu import prefill as torch_kernels
from infllm_pass.kernels.params import compute_dtype

from . import checks
from .attention_args import ATTEND, BACKWARD, COMPRESS, DIFFERENTIABLE_TERMS, SELECT, AttentionCall
from .registry import Operator, Seen

Selection = Sequence[Tensor]


def _triton() -> ModuleType:
    from . import prefill_triton  # needs Triton, which CPU installations lack

    return prefill_triton


def _is_tiled(q: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Whether the Triton kernels compute a call."""
    return checks.refused_by_tiled(q, v, call.scale, call.geometry) is None


def _launched(function: str, *arguments: Any) -> Any:
    """One of the Triton kernels' functions, whose launches run at once, with all of their options."""
    from infllm_pass.kernels.triton.launch import launching_at_once

    with launching_at_once():
        return getattr(_triton(), function)(*arguments)


def _allocated(function: str, *arguments: Any) -> Any:
    """One of the Triton kernels' functions without its launches: results as they are allocated."""
    from infllm_pass.kernels.triton.launch import launching_nothing

    with launching_nothing():
        return getattr(_triton(), function)(*arguments)


def _recorded(function: str) -> Callable[..., Any]:
    """One of the Triton kernels' functions, for a compiler that records its launches."""
    return lambda *arguments: getattr(_triton(), function)(*arguments)


def _seen(q: Tensor, v: Tensor, call: AttentionCall) -> Seen:
    """What compilers see of a call."""
    if _is_tiled(q, v, call):
        return Seen.KERNELS if compiles_ahead_of_time() else Seen.CALL
    return Seen.HOST_CALL if q.is_cuda else Seen.CALL


def _compress(q: Tensor, k: Tensor, call: AttentionCall) -> list[Tensor]:
    if checks.check_call(q, k, k, call):
        return _launched("compress_keys", q, k, call)  # type: ignore[no-any-return]
    return torch_kernels.compress_keys(q, k, call)


def _compress_fake(q: Tensor, k: Tensor, call: AttentionCall) -> list[Tensor]:
    if checks.check_call(q, k, k, call):
        return _allocated("compress_keys", q, k, call)  # type: ignore[no-any-return]
    return torch_kernels.new_state(k, call.geometry)


compress_keys = Operator(
    "compress_keys",
    COMPRESS,
    compute=_compress,
    fake=_compress_fake,
    kernels=_recorded("compress_keys"),
    seen=lambda q, k, call: _seen(q, k, call),
    doc="""What `select_blocks` reads of the keys: the state.

Returns the tensors of the state, whose form is that of the device. For pooled scores they are compressed keys: means of
windows of keys, fine and coarse, taken in float32 (float64 for float64) and stored in k's dtype; a window that is not
complete has none. For token scores they are index keys: some channels of every key, in k's dtype or in 8 bits.

Raises ShapeError, DtypeError, DeviceError: the tensors do not fit; before anything is computed.""",
)


def _select(q: Tensor, k: Tensor, state: Selection, call: AttentionCall) -> list[Tensor]:
    tiled = checks.check_call(q, k, k, call)
    if tiled:
        checks.check_state_count(q, state, _triton().state_count(call.geometry))
        return _launched("select_blocks", q, k, state, call)  # type: ignore[no-any-return]
    checks.check_state(q, k, state, torch_kernels.state_of(k, call.geometry))
    return [torch_kernels.select_blocks(q, k, state, call)]


def _select_fake(q: Tensor, k: Tensor, state: Selection, call: AttentionCall) -> list[Tensor]:
    if checks.check_call(q, k, k, call):
        return _allocated("select_blocks", q, k, state, call)  # type: ignore[no-any-return]
    return [q.new_empty(q.shape[0], k.shape[1], q.shape[2], call.geometry.selected_blocks, dtype=torch.int32)]


select_blocks = Operator(
    "select_blocks",
    SELECT,
    compute=_select,
    fake=_select_fake,
    kernels=_recorded("select_blocks"),
    seen=lambda q, k, state, call: _seen(q, k, call),
    doc="""The blocks that every query visits. Of k only the sizes are read.

Returns the selection. In torch operators and in C++ it is one tensor of block numbers, int32 ``[B, Hkv, Lq, S]``, -1
where fewer are visited; the Triton kernels' are the lists and tables of their tiles.

Raises ShapeError, DtypeError, DeviceError: the tensors do not fit; before anything is computed.""",
)


def _attend(q: Tensor, k: Tensor, v: Tensor, selection: Selection, call: AttentionCall) -> tuple[Tensor, Tensor]:
    if checks.check_call(q, k, v, call):
        checks.check_selection(q, selection, _triton().SELECTION)
        return _launched("block_attention", q, k, v, selection, call)  # type: ignore[no-any-return]
    checks.check_blocks(q, k, selection)
    return torch_kernels.attention_forward(q, k, v, selection[0] if selection else None, call)


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, selection: Selection, call: AttentionCall) -> tuple[Tensor, Tensor]:
    if not checks.check_call(q, k, v, call):
        checks.check_blocks(q, k, selection)
    return new_output(q, v)


def new_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """An output ``[B, Hq, Lq, Dv]``, stored as ``[B, Lq, Hq, Dv]``, and a log-sum-exp ``[B, Hq, Lq]``, unwritten."""
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=compute_dtype(q.dtype))


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    if _is_tiled(q, v, call):
        checks.check_selection(q, selection, _triton().SELECTION)
        fields = (grad_out, q, k, v, out, lse, selection, call)
        gradients = _launched("block_attention_backward", *fields)
    else:
        blocks = selection[0] if selection else None
        gradients = torch_kernels.attention_backward(grad_out, q, k, v, out, lse, blocks, call)
    dq, dk, dv, *terms = (gradient.contiguous() for gradient in gradients)
    return dq, dk, dv, terms


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *given, call = arguments
    terms = [term for name in DIFFERENTIABLE_TERMS if (term := getattr(call, name)) is not None]
    dq, dk, dv, *rest = (x.new_empty(x.shape) for x in (*given[1:4], *terms))
    return dq, dk, dv, rest


block_attention_backward = Operator(
    "block_attention_backward",
    BACKWARD,
    compute=_backward,
    fake=_backward_fake,
    seen=lambda grad_out, q, k, v, out, lse, selection, call: _seen(q, v, call),
    doc="""Gradients of `block_attention` for q, k, v, key_bias and sinks, with the selection held fixed.

Returns gradients with the shapes and dtypes of q, k and v, contiguous, and a list of those of `key_bias` and `sinks`,
of the ones that are given.""",
)

block_attention = Operator(
    "block_attention",
    ATTEND,
    compute=_attend,
    fake=_attend_fake,
    kernels=_recorded("block_attention"),
    seen=lambda q, k, v, selection, call: _seen(q, v, call),
    backward=block_attention_backward,
    doc="""Causal attention over the selected blocks of each query.

Returns the output ``[B, Hq, Lq, Dv]`` in q's dtype, stored as ``[B, Lq, Hq, Dv]``, and the log-sum-exp of each query's
scores, sinks counted in, ``[B, Hq, Lq]`` in float32 (float64 for float64), which is not differentiable. A query that
sees no key gives 0 and ``-inf``, or its sink.

Raises ShapeError, DtypeError, DeviceError: the tensors do not fit; before anything is computed.""",
)
