"""Chooses the algorithm for the scored blocks on the device, call by call: by tiles, or key-stationary.

Tiles suit neighbouring queries that select much the same blocks, `prefill.scattered` scattered selections. The
lengths of the tiles' lists decide; the host does not wait for the result.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..configs import ScatteredConfig
from ..launch import wrap_triton
from ..tile_ops import forced_visits
from ..tile_tables import PANEL_BEGIN, PANEL_END, PANEL_POSITION, TABLE_COLUMNS
from .scattered.schedule import max_scored_blocks


@triton.jit(do_not_specialize=["num_tiles", "heads", "window"])
def _choose_kernel(
    state,
    panels,
    counts,
    num_tiles,
    heads,
    window,
    above,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SCORED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    visits = tl.zeros([WIDTH], tl.int64)
    wanted = tl.zeros([WIDTH], tl.int64)
    for start in range(0, num_tiles * heads, WIDTH):
        at = start + tl.arange(0, WIDTH)
        count = tl.load(counts + at, mask=at < num_tiles * heads, other=0)
        tile = at // heads
        row = panels + tile // TILES * TABLE_COLUMNS
        ok = count > 0
        skip = tile % TILES * TOKENS
        begin = tl.maximum(tl.load(row + PANEL_BEGIN, mask=ok, other=0) - skip, 0)
        end = tl.minimum(tl.load(row + PANEL_END, mask=ok, other=0) - skip, TOKENS)
        position = tl.load(row + PANEL_POSITION, mask=ok, other=0) + skip
        forced, _, _, _ = forced_visits(position, begin, end, window, BLOCK_SIZE, INIT_BLOCKS, LOCAL_BLOCKS)
        scored = tl.minimum(tl.maximum(position // BLOCK_SIZE - LOCAL_BLOCKS - INIT_BLOCKS, 0), SCORED)
        visits += tl.where(ok, tl.maximum(count - forced, 0), 0)
        wanted += tl.where(ok, (end - begin) * scored, 0)
    scattered = tl.sum(visits, 0).to(tl.float32) > tl.sum(wanted, 0).to(tl.float32) * tl.cast(above, tl.float32)
    tl.store(state, scattered.to(tl.int32))


def choose_variant(state: Tensor, launch: ScatteredConfig, given: AttentionInputs) -> None:
    """Decide on the device whether key-stationary attention beats the union of a tile's blocks.

    Args:
        state: from `offer_scattered`; its first number becomes 1 where `attend_scattered` is to run, else 0.
        launch: from it, too.
        given: the call.
    """
    plan, geometry = given.plan, given.geometry
    shape = plan.shape
    panels, _, _, counts, *_ = given.tables
    wrap_triton(_choose_kernel)[(1,)](
        state,
        panels,
        counts,
        plan.num_tiles,
        counts.shape[1],
        given.bound,
        launch.threshold * shape.padded_group,
        TOKENS=shape.tokens,
        TILES=shape.tiles,
        BLOCK_SIZE=geometry.block_size,
        INIT_BLOCKS=geometry.init_blocks,
        LOCAL_BLOCKS=geometry.local_blocks,
        SCORED=max_scored_blocks(geometry, given.window is not None),
        WIDTH=2048,
        num_warps=8,
    )
