"""Operators that compiled graphs call and do not look into, for launches whose options Inductor would drop.

Of a launch Inductor keeps ``num_warps`` and ``num_stages``: no limit of registers, and no beginning before the launch
before has ended. Where a measured configuration needs these, a graph that runs under Python calls the stage through
one of these operators, which launch at once. A graph that runs without Python (AOTInductor) contains the kernels
themselves, in the configurations that do without.

``infllm::attend_tiles``
    the attention stage of ``infllm::tiled_attention``.
``infllm::launched_decode_attention``
    the whole of ``infllm::tiled_decode_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.virtualized import V

from infllm_pass.kernels.triton.decode.attention import decode_attend
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState
from infllm_pass.kernels.triton.decode.select import decode_compress_kernel, decode_select
from infllm_pass.kernels.triton.launch import launching_at_once
from infllm_pass.kernels.triton.pdl import recording_drops_overlap
from infllm_pass.kernels.triton.prefill.attention import attention_forward, recording_drops_options
from infllm_pass.kernels.triton.tile_tables import TileLists, TilePlan, TileShape

from .prefill_cpu import static_geometry


def calls_attention_stage(q: Tensor, v: Tensor) -> bool:
    """Whether `attend_tiles` is to be called for `attention_forward`: compiling would drop options of its launches."""
    return not V.aot_compilation and recording_drops_options(q, v)


@torch.library.custom_op("infllm::attend_tiles", mutates_args=())
def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    tokens: Tensor | None,
    counts: Tensor | None,
    sequences: Tensor,
    panels: Tensor,
    key_mask: Tensor | None,
    packed: bool,
    window: int | None,
    scale: float,
    dense_len: int,
    every_query: bool,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the blocks that were selected for it.

    Args:
        q: ``[B, Hq, Lq, D]`` on CUDA, checked, like the other arguments, by ``infllm::tiled_attention``.
        blocks: the selection (`TileLists`), like `tokens` and `counts`; None: every sequence is dense.
        sequences: the tables of `TilePlan`, like `panels` and `packed`.
        every_query: see `attention_forward`, as for the arguments that are not named here.
        kernel_size: see `BlockGeometry`, as for the arguments that follow.

    Returns:
        The output ``[B, Hq, Lq, Dv]``, stored as ``[B, Lq, Hq, Dv]``, and the log-sum-exp, float32 ``[B, Hq, Lq]``.
    """
    geometry = static_geometry(
        *(kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    )
    shape = TileShape.choose(q.shape[1] // k.shape[1], geometry.query_block)
    lists = None
    if blocks is not None and tokens is not None and counts is not None:
        lists = TileLists(blocks, tokens, counts)
    with launching_at_once():
        return attention_forward(
            *(q, k, v, lists, TilePlan(shape, sequences, panels, packed)),
            geometry=geometry,
            scale=scale,
            dense_len=dense_len,
            key_mask=key_mask,
            window=window,
            every_query=every_query,
        )


@attend_tiles.register_fake
def _attend_tiles_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, heads, length = q.shape[:3]
    out = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


def calls_decode_step(q: Tensor) -> bool:
    """Whether `launched_decode_attention` is to be called for `decode`: CUDA graphs are to record a step.

    Without CUDA graphs the launches stay Inductor's: from Python they take the host longer than the GPU gains.
    """
    in_graphs = inductor_config.triton.cudagraphs and not V.aot_compilation
    return in_graphs and recording_drops_overlap(decode_compress_kernel, q)


def decode(
    q: Tensor, k: Tensor, v: Tensor, state: DecodeState, rows: DecodeRows, key_mask: Tensor | None, **numbers: Any
) -> tuple[Tensor, Tensor]:
    """The kernels of a decode step; arguments and results: see `decode_select` and `decode_attend`."""
    blocks = decode_select(q, k, state, rows, **numbers)
    return decode_attend(q, k, v, blocks, rows, key_mask, **numbers)


@torch.library.custom_op("infllm::launched_decode_attention", mutates_args=("k1", "k2", "filled"))
def launched_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    filled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    key_mask: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries of every row over a cache.

    Args:
        q: ``[B, Hq, Lq, D]`` on CUDA, checked, like the other arguments, by ``infllm::tiled_decode_attention``, whose
            arguments and results these are.
    """
    geometry = static_geometry(
        *(kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    )
    fields = (q, k, v, DecodeState(k1, k2, filled), DecodeRows(lengths, starts), key_mask)
    with launching_at_once():
        return decode(*fields, geometry=geometry, scale=scale, dense_len=dense_len, window=window)


@launched_decode_attention.register_fake
def _launched_decode_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _attend_tiles_fake(q, k, v)
