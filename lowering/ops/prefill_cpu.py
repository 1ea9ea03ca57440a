"""The operators that rewritten graphs call: schema, fake implementation and autograd.

``infllm::select_blocks``
    which key blocks each query visits; nothing is differentiated through it.
``infllm::block_attention``
    causal attention over selected blocks, dense for sequences shorter than ``dense_len`` or without a selection.
``infllm::block_attention_backward``
    its gradient with the selection held fixed.

Semantics: arXiv 2509.24663, section 3. Geometry arguments are those of `kernels.geometry.BlockGeometry`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm_pass.kernels.cpu import prefill
from infllm_pass.kernels.geometry import BlockGeometry

from .checks import check_attention, check_queries_keys, check_sequences

_TAGS = (torch.Tag.cudagraph_unsafe,)
"""Where sequences lie is read on the host, which a CUDA graph cannot record."""


def _offset(q: Tensor, k: Tensor, offsets: Tensor | None, offset: int | None) -> int:
    if offset is not None:
        return offset
    return k.shape[2] - q.shape[2] if offsets is None else 0


def selection_arguments(geometry: BlockGeometry) -> tuple[int | str, ...]:
    """The last arguments of operators that select blocks, from ``kernel_size`` on: `BlockGeometry`, field by field."""
    g = geometry
    return (
        *(g.kernel_size, g.kernel_stride, g.block_size, g.init_blocks, g.local_blocks),
        *(g.selected_blocks, g.lse, g.query_block),
    )


def static_geometry(*numbers: Any) -> BlockGeometry:
    """The geometry that `selection_arguments` gave: plain numbers, although a compiler may have made them dynamic."""
    return BlockGeometry(*(number if isinstance(number, str) else int(number) for number in numbers))


def attention_arguments(geometry: BlockGeometry) -> tuple[int, int, int]:
    """The last arguments of `block_attention` and its backward, from ``block_size`` on."""
    return geometry.block_size, geometry.init_blocks, geometry.local_blocks


def _attention_geometry(blocks: Tensor | None, block_size: int, init_blocks: int, local_blocks: int) -> BlockGeometry:
    """What attention needs of the geometry; how blocks were scored does not matter to it."""
    budget = init_blocks + local_blocks + 1 if blocks is None else blocks.shape[3]
    return BlockGeometry(
        block_size=block_size, init_blocks=init_blocks, local_blocks=local_blocks, selected_blocks=budget
    )


@torch.library.custom_op("infllm::select_blocks", mutates_args=(), tags=_TAGS)
def select_blocks(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
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
) -> Tensor:
    """Blocks visited by every query: int32 ``[B, Hkv, Lq, selected_blocks]``, -1 where fewer are visited.

    Args:
        q: ``[B, Hq, Lq, D]``; query ``i`` stands at key index ``offset + i``.
        k: ``[B, Hkv, Lk, D]``.
        key_mask: bool ``[B, Lk]``, True where a key is valid, or None; a row's sequence runs from its first to its
            last valid key, and its blocks are numbered from its first key.
        offsets: int32 or int64 ``[1]`` or ``[B]``: key index of the first query, added to `offset`, or None. Keys after
            a row's last query, the free slots of a cache, then are no part of its sequence.
        cu_seqlens_q: int32 ``[R + 1]``: packed sequences' query bounds, batch 1; only with `cu_seqlens_k`. The last
            query of a sequence then stands at its last key, and `offset` is not read.
        cu_seqlens_k: int32 ``[R + 1]``: packed sequences' key bounds, counted through all rows of the batch; no
            sequence crosses a row. Sequences then are what these bounds say, and `key_mask` only hides keys.
        offset: key index of the first query; None: ``Lk - Lq``, the queries are the last of the keys (0 with
            `offsets`).
        window: sliding window: the query at ``p`` sees keys after ``p - window`` only, and blocks wholly before that
            are no candidates; or None.
        scale: softmax scale.
        dense_len: shorter sequences select nothing: they are dense.
        kernel_size: see `BlockGeometry`, as for the arguments that follow.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit; raised before anything is computed.
    """
    check_queries_keys(q, k, key_mask)
    check_sequences(q, offsets, cu_seqlens_q, cu_seqlens_k, window)
    geometry = static_geometry(
        *(kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    )
    return prefill.select_blocks(
        q,
        k,
        geometry=geometry,
        scale=scale,
        offset=_offset(q, k, offsets, offset),
        key_mask=key_mask,
        offsets=offsets,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        window=window,
        dense_len=dense_len,
    )


@select_blocks.register_fake
def _select_blocks_fake(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
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
) -> Tensor:
    check_queries_keys(q, k, key_mask)
    check_sequences(q, offsets, cu_seqlens_q, cu_seqlens_k, window)
    return q.new_empty(q.shape[0], k.shape[1], q.shape[2], selected_blocks, dtype=torch.int32)


@torch.library.custom_op("infllm::block_attention", mutates_args=(), tags=_TAGS)
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the selected blocks of each query.

    Args:
        q: ``[B, Hq, Lq, D]``; query ``i`` stands at key index ``offset + i`` and sees no later key.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        blocks: int32 ``[B, Hkv, Lq, S]`` from `select_blocks`; None: every sequence is dense.
        key_mask: as in `select_blocks`, like `offsets`, `cu_seqlens_q`, `cu_seqlens_k`, `offset` and `window`.
        scale: softmax scale.
        dense_len: shorter sequences are dense.
        block_size: tokens in a block.
        init_blocks: blocks at the start of a sequence that `blocks` always holds.
        local_blocks: blocks before a query's own that `blocks` always holds.

    Returns:
        The output ``[B, Hq, Lq, Dv]`` in q's dtype, stored as ``[B, Lq, Hq, Dv]``, and the log-sum-exp of
        each query's scores ``[B, Hq, Lq]`` in float32 (float64 for float64 inputs), which is not
        differentiable. A query that sees no key gives 0 and ``-inf``.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit; raised before anything is computed.
    """
    check_attention(q, k, v, blocks, key_mask)
    check_sequences(q, offsets, cu_seqlens_q, cu_seqlens_k, window)
    return prefill.attention_forward(
        q,
        k,
        v,
        blocks,
        geometry=_attention_geometry(blocks, block_size, init_blocks, local_blocks),
        scale=scale,
        offset=_offset(q, k, offsets, offset),
        key_mask=key_mask,
        offsets=offsets,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        window=window,
        dense_len=dense_len,
    )


@block_attention.register_fake
def _block_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, blocks, key_mask)
    check_sequences(q, offsets, cu_seqlens_q, cu_seqlens_k, window)
    batch, heads, length, _ = q.shape
    accumulated = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=accumulated)


@torch.library.custom_op("infllm::block_attention_backward", mutates_args=(), tags=_TAGS)
def block_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor | None,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block_attention` for q, k and v, with the selected blocks held fixed.

    Args:
        grad_out: gradient of the output, ``[B, Hq, Lq, Dv]``.
        q: as `block_attention`, like the arguments that follow.
        out: the output that `block_attention` gave.
        lse: the log-sum-exp that it gave.

    Returns:
        Gradients with the shapes and dtypes of q, k and v, contiguous.
    """
    dq, dk, dv = prefill.attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        blocks,
        geometry=_attention_geometry(blocks, block_size, init_blocks, local_blocks),
        scale=scale,
        offset=_offset(q, k, offsets, offset),
        key_mask=key_mask,
        offsets=offsets,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        window=window,
        dense_len=dense_len,
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@block_attention_backward.register_fake
def _block_attention_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor | None,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, key_mask, offsets, cu_seqlens_q, cu_seqlens_k, *numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, blocks, key_mask, offsets, cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = block_attention_backward(grad_out, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None for _ in range(5)), *(None for _ in ctx.numbers))


block_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _no_gradient(ctx: Any, _grad_blocks: Tensor | None) -> tuple[None, ...]:
    return (None,) * ctx.inputs


def _count_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)
    ctx.inputs = len(inputs)


select_blocks.register_autograd(_no_gradient, setup_context=_count_inputs)
