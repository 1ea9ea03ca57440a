"""InfLLM-V2 block selection and sparse attention of whole prompts, forward and backward (arXiv 2509.24663).

The sequences of a call are computed one by one: in C++ (`kernels.cpu.native`), or in torch operators on any device
(`kernels.cpu.chunked`) where the kernels do not take the tensors or cannot be compiled. Memory is linear in the
length: nothing of size ``Lq x Lk``, nor ``Lq x Lk / kernel_stride``, exists at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..geometry import COARSE_FACTOR, BlockGeometry
from ..params import PrefillParams, compute_dtype
from ..scorer import StateTensor, scorer_of
from . import chunked, native
from .importance import block_importance, fill_blocks, window_importance
from .native import adjacent
from .sequences import AttentionParams, Sequence, sequences
from .tokens import index_keys, read_index

__all__ = ["attention_backward", "attention_forward", "compress_keys", "new_state", "select_blocks", "state_of"]


def state_of(k: Tensor, geometry: BlockGeometry) -> list[StateTensor]:
    """The tensors of a call's state for keys ``[B, Hkv, Lk, D]``.

    Compressed keys are ``K1`` ``[B, Hkv, Lk // s + 2, D]``, ``K2`` with ``Lk // (4 s) + 2``: two more than needed, as
    sizes that can be 1 would make ``torch.export`` guard on dynamic lengths. Index keys are those of all ``Lk``.
    """
    length, dim = k.shape[2:]
    kept = scorer_of(geometry).state(geometry, length, dim, k.dtype)
    if geometry.scorer == "tokens":
        return kept
    strides = geometry.kernel_stride, COARSE_FACTOR * geometry.kernel_stride
    return [replace(each, shape=(length // by + 2, dim)) for each, by in zip(kept[:2], strides, strict=True)]


def new_state(k: Tensor, geometry: BlockGeometry) -> list[Tensor]:
    """The same, of nothing but zeros."""
    return [k.new_zeros(k.shape[:2] + each.shape, dtype=each.dtype) for each in state_of(k, geometry)]


@torch.no_grad()
def compress_keys(q: Tensor, k: Tensor, call: PrefillParams) -> list[Tensor]:
    """What `select_blocks` reads of the keys: means of all complete windows (section 3.2), or index keys.

    The index key of key ``j`` of a row lies in slot ``j``. Window ``c`` of a sequence whose first key is number ``f``
    lies in slot ``f // s + c`` of ``K1``, and in slot ``f // (4 s) + c`` of ``K2``: windows of different sequences of a
    row never meet in one slot.

    Args:
        q: the queries; only their number is read.
        k: ``[B, Hkv, Lk, D]``, any strides.
        call: the geometry, and where sequences lie.

    Returns:
        As `new_state`; means are in k's dtype, taken in float32 (float64 for float64). Slots without a window hold 0,
        as do sequences that no query stands on, or that are shorter than ``dense_len``.

    Raises:
        ShapeError: packed bounds descend, leave the tensors, or let a sequence cross a row.
    """
    if call.geometry.scorer == "tokens":
        return index_keys(k, call.geometry)
    k, (fine, coarse) = adjacent(k), new_state(k, call.geometry)
    for one in sequences(q, k, call):
        if one.length >= call.dense_len:
            arguments = k[one.row, :, one.keys], *_windows(fine, coarse, one, call.geometry), call.geometry
            if not native.compress_keys(*arguments):
                chunked.compress_keys(*arguments)
    return [fine, coarse]


def _windows(fine: Tensor, coarse: Tensor, one: Sequence, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
    """The compressed keys of one sequence, ``[Hkv, n, D]`` from its first window on, all of them complete."""
    stride = geometry.kernel_stride
    begins = one.keys.start // stride, one.keys.start // (COARSE_FACTOR * stride)
    counts = geometry.num_compressed(one.length), geometry.num_coarse(one.length)
    k1, k2 = (
        keys[one.row, :, begin : begin + count]
        for keys, begin, count in zip((fine, coarse), begins, counts, strict=True)
    )
    return k1, k2


def _read_state(state: list[Tensor], one: Sequence, geometry: BlockGeometry, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The state of one sequence in the form of `chunked.select_blocks`."""
    if geometry.scorer == "tokens":
        return (read_index([part[one.row, :, one.keys] for part in state], compute_dtype(dtype)),)
    return _windows(state[0], state[1], one, geometry)


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, state: list[Tensor], call: PrefillParams) -> Tensor:
    """The key blocks that every query visits (section 3.2).

    Args:
        q: ``[B, Hq, Lq, D]``, any strides.
        k: ``[B, Hkv, Lk, D]``; ``Hq`` is a multiple of ``Hkv``. Only the sizes are read.
        state: from `compress_keys` of the same call.
        call: the geometry, the scale, and where sequences lie.

    Returns:
        int32 ``[B, Hkv, Lq, S]``, ``S = geometry.selected_blocks``: block numbers in no particular order,
        -1 in unused places. Queries outside every sequence, or in one shorter than ``dense_len``, select nothing.

    Raises:
        ShapeError: packed bounds descend, leave the tensors, or let a sequence cross a row.
    """
    q, geometry = adjacent(q), call.geometry
    heads, size = k.shape[1], (q.shape[0], k.shape[1], q.shape[2], geometry.selected_blocks)
    chosen = torch.full(size, -1, dtype=torch.int32, device=q.device)
    for one in sequences(q, k, call):
        if one.length >= call.dense_len:
            queries = _grouped(q, heads)[one.row, :, :, one.queries]
            kept = _read_state(state, one, geometry, q.dtype)
            chosen[one.row, :, one.queries] = select_sequence(queries, kept, one.length, one.params(call))
    return chosen


def select_sequence(
    q: Tensor, state: tuple[Tensor, ...], length: int, params: AttentionParams, windows: Tensor | None = None
) -> Tensor:
    """The blocks that every query of one sequence visits, arguments as in `chunked.select_blocks`.

    Args:
        q: ``[Hkv, G, n, D]``.
        state: of the sequence.
        length: keys in the sequence.
        params: the geometry, and what queries see.
        windows: `window_importance` of the sequence's keys, where it is known.

    Returns:
        int32 ``[Hkv, n, S]``; -1 in unused places.
    """
    geometry, by_query = params.geometry, replace(params, geometry=params.geometry.query_aware)
    blocks = native.select_blocks(q, state, length, by_query)
    blocks = chunked.select_blocks(q, state, length, by_query) if blocks is None else blocks
    if not geometry.agnostic_blocks or params.key_bias is None:
        return blocks
    windows = window_importance(params.key_bias, geometry) if windows is None else windows
    importance = block_importance(windows, geometry.num_blocks(length), geometry)
    _, first, own = chunked.visible_blocks(torch.arange(q.shape[2], device=q.device), length, params)
    return fill_blocks(blocks, importance, first, own, geometry)


@torch.no_grad()
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, call: PrefillParams
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over its selected blocks (section 3.1).

    Args:
        q: ``[B, Hq, Lq, D]``, any strides.
        k: ``[B, Hkv, Lk, D]``, any strides.
        v: ``[B, Hkv, Lk, Dv]``, any strides.
        blocks: int32 ``[B, Hkv, Lq, S]`` from `select_blocks` of the same call; None for dense attention in every
            sequence.
        call: the geometry, the scale, and where sequences lie.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's type, stored as ``[B, Lq, Hq, Dv]``, and the natural log-sum-exp
        ``[B, Hq, Lq]``, sinks counted in, float32 (float64 for float64 inputs). A query that sees no key, or stands
        outside every sequence, gives 0 and ``-inf``, or its sink.
    """
    q, k, v = map(adjacent, (q, k, v))
    batch, heads_q, length_q, _ = q.shape
    heads, dim_v = v.shape[1], v.shape[3]
    out = q.new_zeros(batch, length_q, heads_q, dim_v).transpose(1, 2)
    lse = empty_rows((batch, heads_q, length_q), q, call.sinks)
    for one in sequences(q, k, call):
        queries, result, log = (_grouped(x, heads)[one.row, :, :, one.queries] for x in (q, out, lse))
        keys, values = (x[one.row, :, one.keys] for x in (k, v))
        arguments = queries, keys, values, _listed(blocks, one, call), result, log, one.params(call)
        if not native.attend_blocks(*arguments):
            chunked.attend_blocks(*arguments)
    return out, lse


@torch.no_grad()
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor | None,
    call: PrefillParams,
) -> tuple[Tensor, ...]:
    """Exact gradient of `attention_forward` with the selected blocks held fixed; deterministic.

    Args:
        grad_out: ``[B, Hq, Lq, Dv]``, gradient of the output.
        q: as in `attention_forward`, like all arguments that follow but ``out`` and ``lse``.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        out: ``[B, Hq, Lq, Dv]``, what `attention_forward` returned.
        lse: ``[B, Hq, Lq]``, what `attention_forward` returned.
        blocks: int32 ``[B, Hkv, Lq, S]`` or None.
        call: the geometry, the scale, and where sequences lie.

    Returns:
        Gradients of ``q``, ``k`` and ``v``, and of ``key_bias`` and ``sinks`` where the call has them, in their shapes
        and types.
    """
    grad_out, q, k, v, out = map(adjacent, (grad_out, q, k, v, out))
    heads = k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    bias = call.key_bias
    grad_bias = None if bias is None else torch.zeros(k.shape[:3], dtype=lse.dtype, device=k.device)
    for one in sequences(q, k, call):
        grad, queries, result, log, grad_queries = (
            _grouped(x, heads)[one.row, :, :, one.queries] for x in (grad_out, q, out, lse, grad_q)
        )
        keys, values, grad_keys, grad_values = (x[one.row, :, one.keys] for x in (k, v, grad_k, grad_v))
        arguments = (
            (grad, queries, keys, values, result, log),
            _listed(blocks, one, call),
            (grad_queries, grad_keys, grad_values),
            one.params(call),
        )
        biases = None if grad_bias is None else grad_bias[one.row, :, one.keys]
        if not native.attend_blocks_backward(*arguments, biases):
            chunked.attend_blocks_backward(*arguments, biases)
    terms = []
    if bias is not None and grad_bias is not None:
        terms.append(grad_bias.sum_to_size(bias.shape).to(bias.dtype))
    if call.sinks is not None:
        terms.append(_sink_gradient(grad_out, out, lse, call.sinks))
    return grad_q, grad_k, grad_v, *terms


def empty_rows(size: tuple[int, int, int], q: Tensor, sinks: Tensor | None) -> Tensor:
    """The log-sum-exp ``[B, Hq, Lq]`` of queries that see no key: their sinks, or ``-inf``."""
    lse = torch.full(size, -torch.inf, dtype=compute_dtype(q.dtype), device=q.device)
    return lse if sinks is None else lse.copy_(sinks[:, None])


def _sink_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks: each row's weight on its sink times what the output would change by."""
    delta = torch.linalg.vecdot(grad_out.to(lse.dtype), out.to(lse.dtype))
    lowest = torch.finfo(lse.dtype).min  # a row of a sink of -inf that sees no key: its weight is 0
    weights = (sinks.to(lse.dtype)[:, None] - lse.clamp(min=lowest)).exp_()
    return -weights.mul_(delta).sum((0, 2)).to(sinks.dtype)


def _listed(blocks: Tensor | None, one: Sequence, call: PrefillParams) -> Tensor | None:
    """The blocks that one sequence's queries visit; None where it is dense."""
    return None if blocks is None or one.length < call.dense_len else blocks[one.row, :, one.queries]


def _grouped(x: Tensor, heads: int) -> Tensor:
    """A view of ``[B, Hq, ...]`` as ``[B, Hkv, G, ...]``."""
    return x.view(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])
