"""A decode step on the CPU: a few new queries over a cache, with compressed keys kept from step to step.

Of a sparse row only its compressed keys and the visited blocks are read. Computed in C++ (`kernels.cpu.native`), or in
torch operators (`kernels.cpu.chunked`) where the kernel does not take the tensors or cannot be compiled. Formulas:
arXiv 2509.24663, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..geometry import COARSE_FACTOR, BlockGeometry
from ..params import DecodeParams
from . import chunked, native
from .chunked import pool_keys
from .importance import window_importance
from .prefill import empty_rows, select_sequence
from .sequences import AttentionParams
from .tokens import index_keys, read_index


@torch.no_grad()
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], call: DecodeParams
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries of every row over its valid keys, sparse from ``dense_len`` keys on.

    Args:
        q: ``[B, Hq, Lq, D]``; query ``i`` of a row stands in slot ``lengths - Lq + i``.
        k: ``[B, Hkv, C, D]``, any strides; only slots of valid keys are read.
        v: ``[B, Hkv, C, Dv]``.
        state: what is kept of a row's first `filled` keys, any strides, brought up to date: means of windows
            ``[B, Hkv, n1, D]`` and of coarse ones, from the first key on, and their importance ``[B, Hkv, n1]`` if that
            selects too; or index keys ``[B, Hkv, C, d]`` in their keys' slots and, in 8 bits, scales ``[B, Hkv, C]``;
            then `filled`, int32 ``[B]``, set to the rows' lengths.
        call: the geometry, the scale, and where rows begin and end.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's type, stored as ``[B, Lq, Hq, Dv]``, and the natural log-sum-exp ``[B, Hq, Lq]``,
        sinks counted in, float32 (float64 for float64 inputs); 0 and ``-inf``, or the sink, for a query that sees no
        key.
    """
    *kept, filled = state
    dense_len, key_mask = call.dense_len, call.key_mask
    batch, heads_q, length_q = q.shape[:3]
    capacity, dim_v = v.shape[2:]
    out = q.new_zeros(batch, length_q, heads_q, dim_v)
    lse = empty_rows((batch, heads_q, length_q), q, call.sinks)
    ends = call.lengths.clamp(0, capacity).expand(batch).tolist()
    begins = [0] * batch if call.starts is None else call.starts.clamp(min=0).expand(batch).tolist()
    begins = [min(begin, end) for begin, end in zip(begins, ends, strict=True)]
    bias = call.key_bias
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        old = max(0, min(int(filled[row]), end - begin - length_q))
        parts = [part[row] for part in kept]
        _bring_up_to_date(parts, k[row], (begin, end), old, call.geometry)
        if call.geometry.agnostic_blocks and bias is not None:
            _pool_new(bias[row if bias.shape[0] > 1 else 0, :, begin:end], parts[2], old, call.geometry)
        filled[row] = end - begin
    params = AttentionParams(
        call.geometry, call.scale, window=call.window, key_bias=bias, sinks=call.sinks, softcap=call.softcap
    )
    if not native.decode_attention(q, k, v, kept, (begins, ends), key_mask, params, dense_len, out, lse):
        heads, group = v.shape[1], heads_q // v.shape[1]
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            _attend_row(
                q[row].reshape(heads, group, length_q, q.shape[3]),
                k[row, :, begin:end],
                v[row, :, begin:end],
                _read_row([part[row] for part in kept], (begin, end), params, lse.dtype)
                if end - begin >= dense_len
                else None,
                out[row].view(length_q, heads, group, dim_v).permute(1, 2, 0, 3),
                lse[row].view(heads, group, length_q),
                replace(
                    params,
                    mask=None if key_mask is None else key_mask[row, begin:end],
                    key_bias=None if bias is None else bias[row if bias.shape[0] > 1 else 0, :, begin:end],
                ),
            )
    return out.transpose(1, 2), lse


def _attend_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor] | None,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
) -> None:
    """One row in torch operators, arguments as in `chunked.attend_blocks`; dense without a state."""
    length, length_q = k.shape[1], q.shape[2]
    queries = slice(max(0, length_q - length), length_q)  # those that stand on a key
    if queries.start == length_q:
        return
    q, params = q[:, :, queries], replace(params, offset=max(0, length - length_q))
    blocks = None
    if state is not None and params.geometry.agnostic_blocks:
        windows = state[2][:, : params.geometry.num_compressed(length)]
        blocks = select_sequence(q, tuple(state[:2]), length, params, windows)
    elif state is not None:
        blocks = chunked.select_blocks(q, state, length, params)
    chunked.attend_blocks(q, k, v, blocks, out[:, :, queries], lse[:, :, queries], params)


def _read_row(
    state: Sequence[Tensor], bounds: tuple[int, int], params: AttentionParams, dtype: torch.dtype
) -> Sequence[Tensor]:
    """The state of a row between two slots, in the form of `chunked.select_blocks`."""
    if params.geometry.scorer == "tokens":
        return [read_index([part[:, slice(*bounds)] for part in state], dtype)]
    return state


def _bring_up_to_date(
    state: Sequence[Tensor], k: Tensor, bounds: tuple[int, int], old: int, geometry: BlockGeometry
) -> None:
    """Write what is kept of a row's keys after its first ``old``; it lies between two slots of ``k [Hkv, C, D]``."""
    begin, end = bounds
    if geometry.scorer == "tokens":
        for part, new in zip(state, index_keys(k[:, begin + old : end], geometry), strict=True):
            part[:, begin + old : end] = new
        return
    for compressed, factor in zip(state[:2], (1, COARSE_FACTOR), strict=True):
        sizes = geometry.kernel_size * factor, geometry.kernel_stride * factor
        _compress_new(k[:, begin:end], compressed, old, *sizes)


def _pool_new(key_bias: Tensor, windows: Tensor, old: int, geometry: BlockGeometry) -> None:
    """Write the importance of the windows of ``[Hkv or 1, L]`` that end after its first ``old`` keys, ``[Hkv, n]``."""
    begin, end = geometry.num_compressed(old), geometry.num_compressed(key_bias.shape[1])
    if begin < end:
        windows[:, begin:end] = window_importance(key_bias[:, begin * geometry.kernel_stride :], geometry)


def _compress_new(k: Tensor, compressed: Tensor, old: int, size: int, stride: int) -> None:
    """Write the windows of ``k [Hkv, L, D]`` that end after its first ``old`` keys to ``compressed [Hkv, n, D]``."""
    begin, end = ((max(0, (length - size) // stride + 1)) for length in (old, k.shape[1]))
    if begin < end:
        compressed[:, begin:end] = pool_keys(k[:, begin * stride :], size, stride)
