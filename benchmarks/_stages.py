"""The stages of sparse attention on the GPU, one call each, for rows of one unpadded sequence.

Everything the benchmarks know about the kernels is here. Kernels are launched with the options that they have in
compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from _gpu import geometry_of
from torch import Tensor

from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.index_keys import IndexKeys, index_keys
from infllm_pass.kernels.triton.launch import launching_at_once
from infllm_pass.kernels.triton.prefill import pooled, token_scores
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.prefill.compress import CompressedKeys, compress_keys
from infllm_pass.kernels.triton.tile_schedule import plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileLists, TilePlan, TileShape


@dataclass(frozen=True)
class Selection:
    """The blocks that each tile of queries visits, and which tile holds which queries."""

    lists: TileLists
    plan: TilePlan


def plan(q: Tensor, k: Tensor, config: SparseAttentionConfig) -> TilePlan:
    """The tiles of a call: queries ``[B, Hq, Lq, D]`` are the last of the keys ``[B, Hkv, Lk, D]``."""
    with launching_at_once():
        return plan_tiles(
            TileShape.choose(q.shape[1] // k.shape[1], config.query_block),
            batch=q.shape[0],
            length_q=q.shape[2],
            length_k=k.shape[2],
            block_size=config.block_size,
            device=q.device,
            offset=k.shape[2] - q.shape[2],
        )


def select(q: Tensor, k: Tensor, config: SparseAttentionConfig) -> Selection:
    """What is kept of the keys, the blocks' scores and the choice; the tiles' tables included."""
    tiles = plan(q, k, config)
    keys = compress(k, tiles, config)
    numbers = {
        "geometry": geometry_of(config, k.shape[3]),
        "scale": q.shape[3] ** -0.5,
        "dense_len": config.dense_len,
        "length_k": k.shape[2],
    }
    with launching_at_once():
        if isinstance(keys, IndexKeys):
            lists = token_scores.select_tiles(q, keys, tiles, heads_kv=k.shape[1], **numbers)
        else:
            lists = pooled.select_tiles(q, keys, tiles, **numbers)
    return Selection(lists, tiles)


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, config: SparseAttentionConfig
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks: output ``[B, Hq, Lq, Dv]`` and log-sum-exp ``[B, Hq, Lq]``."""
    with launching_at_once():
        return attention_forward(_inputs(q, k, v, selection, config))


def _inputs(q: Tensor, k: Tensor, v: Tensor, selection: Selection, config: SparseAttentionConfig) -> AttentionInputs:
    numbers = (geometry_of(config, q.shape[3]), q.shape[3] ** -0.5, config.dense_len)
    return AttentionInputs(q, k, v, selection.lists, selection.plan, *numbers, every_query=True)


def forward(q: Tensor, k: Tensor, v: Tensor, config: SparseAttentionConfig) -> Tensor:
    """Selection and attention."""
    return attend(q, k, v, select(q, k, config), config)[0]


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    config: SparseAttentionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what the forward pass left."""
    from infllm_pass.kernels.triton.backward.dkv import key_gradients
    from infllm_pass.kernels.triton.backward.dq import output_delta, query_gradient

    with launching_at_once():
        saved = grad, lse, output_delta(grad, out), _inputs(q, k, v, selection, config)
        return query_gradient(*saved), *key_gradients(*saved)[:2]


def gradient_of_queries(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    config: SparseAttentionConfig,
) -> Callable[[], Tensor]:
    """A function that computes the gradient of q alone, from what the forward pass left."""
    from infllm_pass.kernels.triton.backward.dq import output_delta, query_gradient

    with launching_at_once():
        saved = grad, lse, output_delta(grad, out), _inputs(q, k, v, selection, config)

    def compute() -> Tensor:
        with launching_at_once():
            return query_gradient(*saved)

    return compute


def compress(k: Tensor, tiles: TilePlan, config: SparseAttentionConfig) -> CompressedKeys | IndexKeys:
    """Compressed keys or index keys alone, which `select` computes first."""
    geometry = geometry_of(config, k.shape[3])
    with launching_at_once():
        if geometry.scorer == "tokens":
            return index_keys(k, geometry=geometry)
        return compress_keys(k, tiles, geometry=geometry)
