"""The operators that rewritten graphs call on CUDA: Triton kernels that Inductor, CUDA graphs and export see.

``infllm::tiled_attention``
    selection and sparse attention in one operator, dense for sequences shorter than ``dense_len``.
``infllm::tiled_attention_backward``
    its gradient with the selection held fixed.

Being `torch.library.triton_op`, they are traced through wherever they are compiled: use them for CUDA tensors only.
Semantics: arXiv 2509.24663, section 3. Geometry arguments are those of `kernels.geometry.BlockGeometry`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import infllm_pass.kernels
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.backward.dkv import key_gradients
from infllm_pass.kernels.triton.backward.dq import output_delta, query_gradient
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.prefill.compress import compress_keys
from infllm_pass.kernels.triton.prefill.select import select_tiles
from infllm_pass.kernels.triton.tile_schedule import plan_packed_tiles, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileLists, TilePlan, TileShape

from . import opaque
from .checks import check_tiled
from .prefill_cpu import selection_arguments, static_geometry


def _sources() -> str:
    """A hash of the source of all kernels and of what launches them."""
    folders = (Path(__file__).parent, Path(infllm_pass.kernels.__path__[0]))
    files = (file for folder in folders for file in sorted(folder.rglob("*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


SOURCES = _sources()
"""An argument of every call, so that compile caches, which know an operator by its name, drop what other code made."""


def tiled_arguments(geometry: BlockGeometry) -> tuple[int | str, ...]:
    """The last arguments of `tiled_attention`, from ``kernel_size`` on."""
    return (*selection_arguments(geometry), SOURCES)


def key_bounds(key_mask: Tensor) -> Tensor:
    """First valid key and one past the last of every row, int32 ``[B, 2]``; both 0 for a row without any."""
    length = key_mask.shape[1]
    index = torch.arange(length, device=key_mask.device)
    end = torch.where(key_mask, index + 1, 0).amax(1)
    first = torch.where(key_mask, index, length).amin(1)
    return torch.stack([torch.minimum(first, end), end], 1).to(torch.int32)


def _plan(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
    geometry: BlockGeometry,
) -> TilePlan:
    heads_q, heads_kv, _ = (int(size) for size in (q.shape[1], k.shape[1], q.shape[3]))  # numbers from here on
    shape = TileShape.choose(heads_q // heads_kv, geometry.query_block)
    start = 0 if offsets is not None else k.shape[2] - q.shape[2]
    sizes = {
        "batch": q.shape[0],
        "length_q": q.shape[2],
        "length_k": k.shape[2],
        "block_size": geometry.block_size,
        "offset": start if offset is None else offset,
    }
    if cu_seqlens_k is not None:
        return plan_packed_tiles(shape, cu_seqlens_k, cu_seqlens_q, **sizes)
    bounds = None if key_mask is None else key_bounds(key_mask)
    return plan_tiles(shape, **sizes, device=q.device, offsets=offsets, key_bounds=bounds)


def _covers_every_query(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
) -> bool:
    """Whether every query is known to stand at a key; if not, the others' results are filled in beforehand."""
    plain = key_mask is None and offsets is None and cu_seqlens_k is None and offset is None
    return plain and bool(q.shape[2] <= k.shape[2])


def _is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is no query or no key; compilers know that a dynamic size is not 0, so nothing is guarded."""
    return q.shape[0] == 0 or q.shape[2] == 0 or k.shape[2] == 0


@torch.library.triton_op("infllm::tiled_attention", mutates_args={})
def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    select: bool,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
    sources: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Causal attention of every query over the blocks that it selects.

    Args:
        q: ``[B, Hq, Lq, D]``, float16, bfloat16 or float32 on CUDA, unit last stride, as `k` and `v`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        key_mask: bool ``[B, Lk]``, True where a key is valid, or None; a row's sequence runs from its first to its
            last valid key, and positions and blocks count from its first.
        offsets: int32 or int64 ``[1]`` or ``[B]``: key number of query 0, read on the device; added to `offset`. Keys
            after a row's last query, the free slots of a cache, then are no part of its sequence.
        cu_seqlens_q: int32 ``[R + 1]``: packed sequences' query bounds, batch 1; only with `cu_seqlens_k`. The last
            query of a sequence stands at its last key.
        cu_seqlens_k: int32 ``[R + 1]``: packed sequences' key bounds, counted through all rows of the batch.
        offset: key number of query 0; None: ``Lk - Lq`` (0 with `offsets`).
        window: sliding window in keys, or None.
        scale: softmax scale.
        dense_len: sequences with fewer keys are dense.
        select: False: every sequence is dense and nothing is selected.
        kernel_size: see `BlockGeometry`, as for the arguments that follow.
        sources: `SOURCES`; nothing is computed from it.

    Returns:
        The output ``[B, Hq, Lq, Dv]``, stored as ``[B, Lq, Hq, Dv]``; the log-sum-exp, float32 ``[B, Hq, Lq]``; and the
        selection (blocks, tokens, counts of `TileLists`), which the gradient reads. Only the output is
        differentiable. A query that sees no key gives 0 and ``-inf``.

    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError: an argument is outside the kernels' range.
    """
    numbers = (kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    geometry = static_geometry(*numbers)
    check_tiled(q, k, v, key_mask, offsets, cu_seqlens_q, cu_seqlens_k, window, scale, geometry)
    if _is_empty(q, k):
        batch, heads, length, _ = q.shape
        log_sum = q.new_full((batch, heads, length), float("-inf"), dtype=torch.float32)
        mask_dtype = TileShape.choose(int(heads) // int(k.shape[1]), geometry.query_block).mask_dtype
        nothing = (q.new_empty(0, dtype=dtype) for dtype in (torch.int16, mask_dtype, torch.int32))
        return q.new_zeros(batch, length, heads, v.shape[3]).transpose(1, 2), log_sum, *nothing
    plan = _plan(q, k, key_mask, offsets, cu_seqlens_q, cu_seqlens_k, offset, geometry)
    lists = None
    if select:
        keys = compress_keys(k, plan, geometry=geometry)
        lists = select_tiles(
            q, keys, plan, geometry=geometry, scale=scale, dense_len=dense_len, length_k=k.shape[2], window=window
        )
    whole = _covers_every_query(q, k, key_mask, offsets, cu_seqlens_k, offset)
    if opaque.calls_attention_stage(q, v):
        selection = (None, None, None) if lists is None else (lists.blocks, lists.tokens, lists.counts)
        fields = (plan.sequences, plan.panels, key_mask, plan.packed, window, scale, dense_len, whole)
        out, log_sum = opaque.attend_tiles(q, k, v, *selection, *fields, *numbers)
    else:
        out, log_sum = attention_forward(
            *(q, k, v, lists, plan),
            geometry=geometry,
            scale=scale,
            dense_len=dense_len,
            key_mask=key_mask,
            window=window,
            every_query=whole,
        )
    if lists is None:
        empty = (q.new_empty(0, dtype=torch.int16), q.new_empty(0, dtype=plan.shape.mask_dtype))
        lists = TileLists(*empty, q.new_empty(0, dtype=torch.int32))
    return out, log_sum, lists.blocks, lists.tokens, lists.counts


@torch.library.triton_op("infllm::tiled_attention_backward", mutates_args={})
def tiled_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    blocks: Tensor,
    tokens: Tensor,
    counts: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    select: bool,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
    sources: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `tiled_attention` for q, k and v; bitwise the same in every run.

    Args:
        grad_out: gradient of the output, ``[B, Hq, Lq, Dv]``.
        q: as `tiled_attention`, like the arguments that follow.
        out: the output that `tiled_attention` gave, like `log_sum`, `blocks`, `tokens` and `counts`.

    Returns:
        Gradients with the shapes and dtypes of q, k and v, contiguous.
    """
    if _is_empty(q, k):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    numbers = (kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    geometry = static_geometry(*numbers)
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    plan = _plan(q, k, key_mask, offsets, cu_seqlens_q, cu_seqlens_k, offset, geometry)
    lists = TileLists(blocks, tokens, counts) if select else None
    whole = _covers_every_query(q, k, key_mask, offsets, cu_seqlens_k, offset)
    delta = output_delta(grad_out, out)
    common: dict[str, Any] = {
        "geometry": geometry,
        "scale": scale,
        "dense_len": dense_len,
        "key_mask": key_mask,
        "window": window,
    }
    dq = query_gradient(grad_out, q, k, v, log_sum, delta, lists, plan, **common, every_query=whole)
    dk, dv = key_gradients(grad_out, q, k, v, log_sum, delta, lists, plan, **common)
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, key_mask, offsets, cu_seqlens_q, cu_seqlens_k, *numbers = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output, key_mask, offsets, cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = tiled_attention_backward(grad_out, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None for _ in range(4)), *(None for _ in ctx.numbers))


tiled_attention.register_autograd(_backward, setup_context=_save_for_backward)
