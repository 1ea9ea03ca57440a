"""Block selection by panels: which blocks the scores of any scorer choose, and the lists that attention reads.

A scorer is a kernel of persistent programs (`PanelScorer`): a program takes one panel of queries of one key/value head
at a time, keeps the panel's block scores in a slice of scratch memory of its own, which stays in the L2 cache, and
hands them to `list_panel`. Scratch grows with the number of key blocks, not with queries times key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import BlockGeometry
from ..configs import SelectionConfig, config_for
from ..launch import multiprocessors, precision
from ..score_terms import score_unit
from ..tile_tables import TileLists, TilePlan, TileShape, load_panel, padded_dim
from .topk import (
    LANES,
    SLOTS,
    below,
    bound_keys,
    compact_keys,
    cut_keys,
    fill_keys,
    mark_blocks,
    scored_range,
    write_lists,
)

FETCHED_KEYS = 128
"""Pieces of rows, of 32 keys each, that one step of a scan over keys fetches: they take 32 registers of a thread."""

ROW_MULTIPLE = 32
"""Rows of keys in scratch are a multiple of so many blocks."""

Constants = dict[str, int | bool]


@dataclass(frozen=True)
class PanelScorer:
    """A block scorer as block selection runs it.

    Its kernel's programs loop over panels and heads: `panel_range`, `clear_marks`, a key (`block_keys`) for every row
    and scored block at ``keys_at`` of `panel_scratch`, then `list_panel`. The kernel takes q, the state's tensors, the
    panels, scratch, the tensors of `TileLists`, the strides of q, ``scale_log2`` and ``cap_log2`` of `score_unit`, the
    number of panels and of key/value heads, the slots of each state tensor, the row length of scratch, the lists'
    capacity, dense_len and window; its constants are those of `selection_constants` and of `constants`, HAS_SOFTCAP,
    PROGRAMS and PRECISION.

    Attributes:
        name: as in `kernels.scorer.Scorer`.
        constants: constants of its own, from the tile shape, the geometry and the configuration.
        scratch: from all constants, 32-bit words of scratch of its own: so many, and so many a block.
        tuned: the kernel's name in the tuning tables.
        dim: the padded numbers of a product's row that its configuration goes by; None: those of a head.
    """

    name: str
    constants: Callable[[TileShape, BlockGeometry, SelectionConfig], Constants]
    scratch: Callable[[Constants], tuple[int, int]]
    tuned: str = "select"
    dim: int | None = None


@triton.jit
def panel_scratch(
    scratch,
    num_blocks,
    T: tl.constexpr,
    PANEL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    RG: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FIXED: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    """Scratch of this program: candidates by lane and compacted, 64 bits each, FIXED words of the scorer, keys
    ``[R, num_blocks]``, marks ``[MARKED, num_blocks]`` and PER_BLOCK words a block of the scorer.

    What has a fixed size comes first: one register then addresses all of it.
    """
    R: tl.constexpr = PANEL // QUERY_BLOCK
    MARKED: tl.constexpr = 1 if QUERY_BLOCK > T else PANEL // T
    MASK: tl.constexpr = tl.int64 if T == 64 else tl.int32
    words: tl.constexpr = R + PER_BLOCK + MARKED * (MASK.primitive_bitwidth // 32)
    blocks_wide = tl.cast(num_blocks, tl.int64)
    span = blocks_wide * words + (RG * (SLOTS + CANDIDATES) * LANES * 2 + FIXED)
    slots_at = (scratch + tl.program_id(0) * span).to(tl.pointer_type(tl.int64))
    dense_at = slots_at + RG * SLOTS * LANES
    fixed_at = (dense_at + RG * CANDIDATES * LANES).to(tl.pointer_type(tl.float32))
    keys_at = (fixed_at + FIXED).to(tl.pointer_type(tl.int32))
    marks_at = (keys_at + blocks_wide * R).to(tl.pointer_type(MASK))
    per_block_at = (marks_at + blocks_wide * MARKED).to(tl.pointer_type(tl.float32))
    return slots_at, dense_at, fixed_at, keys_at, marks_at, per_block_at


@triton.jit
def panel_range(
    panels,
    panel,
    dense_len,
    window,
    PANEL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """A panel's row of the table, whether some query leaves blocks out, and the range of all scored blocks.

    Panels without a choice to make get an empty range, and run through the same loops with nothing to do in them: a
    branch around the products lets the assembler of Triton 3.6 reuse matrix descriptors that only the other arm has
    computed.
    """
    rows = tl.arange(0, PANEL // QUERY_BLOCK)
    batch, query, begin, end, position, key_begin, length, _ = load_panel(panels, panel)
    end = tl.where(length < dense_len, 0, end)
    there = (rows * QUERY_BLOCK < end) & ((rows + 1) * QUERY_BLOCK > begin)
    scored_begin, scored_end, wanted = scored_range(
        rows, position, begin, end, length, window, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
    )
    scored = tl.max(scored_end - scored_begin - wanted, 0) > 0
    low = tl.where(scored, tl.min(tl.where(there, scored_begin, 2147483647), 0), INIT)
    high = tl.where(scored, tl.max(scored_end, 0), INIT)
    return batch, query, begin, end, position, key_begin, length, scored, low, high


@triton.jit
def block_keys(scores, block, scored_begin, scored_end, HAS_WINDOW: tl.constexpr):
    """Scores as integers that order as they do: 0 for a negative score (no visible key), -1 for no scored block."""
    keys = tl.where(scores >= 0.0, scores.to(tl.int32, bitcast=True) + 1, 0)
    candidate = block < scored_end
    if HAS_WINDOW:
        candidate = candidate & (block >= scored_begin)
    return tl.where(candidate, keys, -1)


@triton.jit
def clear_marks(
    marks_at,
    num_blocks,
    low,
    high,
    T: tl.constexpr,
    PANEL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Clear the marks of the scored blocks; before the scores, where it costs no register."""
    MARKED: tl.constexpr = 1 if QUERY_BLOCK > T else PANEL // T
    MASK: tl.constexpr = tl.int64 if T == 64 else tl.int32
    for start in range(low, high, LISTED):
        marked = tl.arange(0, MARKED)[:, None] * num_blocks + (start + tl.arange(0, LISTED))[None, :]
        inside = (start + tl.arange(0, LISTED) < high)[None, :] & (marked >= 0)
        tl.store(marks_at + marked, tl.zeros([MARKED, LISTED], MASK), mask=inside)


@triton.jit
def list_panel(
    slots_at,
    dense_at,
    keys_at,
    marks_at,
    num_blocks,
    list_blocks,
    list_tokens,
    list_counts,
    capacity,
    panel,
    head,
    heads_kv,
    begin,
    end,
    position,
    length,
    window,
    scored,
    low,
    high,
    T: tl.constexpr,
    PANEL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    RG: tl.constexpr,
    PEAKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FETCHED: tl.constexpr,
    LISTED: tl.constexpr,
    FILL: tl.constexpr,
    ranks_at=0,
):
    """Rank the panel's scored blocks ``[low, high)`` by their keys, row by row, and write the lists of its tiles.

    With FILL, so many more of a row's blocks are taken by importance, by the ranks from `ranks_at` on.

    Barriers come before and after: all threads have written keys and cleared marks, or read the scratch of this panel.
    """
    R: tl.constexpr = PANEL // QUERY_BLOCK
    TILES: tl.constexpr = PANEL // T
    SHARED: tl.constexpr = QUERY_BLOCK > T  # one row for all tiles of the panel
    MASK: tl.constexpr = tl.int64 if T == 64 else tl.int32
    K: tl.constexpr = TILES if TILES < 2 else 2  # tiles whose lists are written at once
    for group in range(R // RG):
        line = (group * RG + tl.arange(0, RG))[:, None]
        rows_at = keys_at + line * num_blocks
        _line_begin, _line_end, line_wanted = scored_range(
            line + tl.zeros([RG, LANES], tl.int32), position, begin, end, length, window,
            QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW,
        )  # fmt: skip
        bound, top = bound_keys(rows_at, line_wanted, low, high, RG, PEAKS)
        keys, blocks, rest = compact_keys(rows_at, slots_at, dense_at, bound, low, high, RG, CANDIDATES, FETCHED)
        cut, equals = cut_keys(keys, rows_at, line_wanted, bound, top, rest, high, RG, CANDIDATES)
        if SHARED:
            bits = tl.full([RG, LANES], 1, MASK)
            row_marks = marks_at + line * 0
        else:
            line_token = line * QUERY_BLOCK
            bits = (below(tl.full([1, 1], QUERY_BLOCK, tl.int32), MASK) << (line_token % T).to(MASK)) + tl.zeros(
                [RG, LANES], MASK
            )
            row_marks = marks_at + (line_token // T).to(tl.int64) * num_blocks
        mark_blocks(row_marks, bits, keys, blocks, rows_at, cut, equals, rest, high, RG, CANDIDATES)
        if FILL > 0:
            tl.debug_barrier()
            fill_keys(rows_at, row_marks, bits, ranks_at, num_blocks + 1, low, high, RG)
            tl.debug_barrier()
            _all_begin, _all_end, all_wanted = scored_range(
                line + tl.zeros([RG, LANES], tl.int32), position, begin, end, length, window,
                QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET + FILL, HAS_WINDOW,
            )  # fmt: skip
            bound, top = bound_keys(rows_at, all_wanted, low, high, RG, PEAKS)
            keys, blocks, rest = compact_keys(rows_at, slots_at, dense_at, bound, low, high, RG, CANDIDATES, FETCHED)
            cut, equals = cut_keys(keys, rows_at, all_wanted, bound, top, rest, high, RG, CANDIDATES)
            mark_blocks(row_marks, bits, keys, blocks, rows_at, cut, equals, rest, high, RG, CANDIDATES)
            tl.debug_barrier()
    tl.debug_barrier()
    for pair in range(TILES // K):
        tile = pair * K + tl.arange(0, K)[:, None]
        slot = ((panel * TILES + tile) * heads_kv + head).to(tl.int64)
        write_lists(
            list_blocks + slot * capacity,
            list_tokens + slot * capacity,
            list_counts + slot,
            marks_at + (tile * 0 if SHARED else tile).to(tl.int64) * num_blocks,
            tile * T,
            position,
            begin,
            end,
            length,
            window,
            tl.where(scored, LOCAL, length // BLOCK + 1),
            low,
            high,
            T,
            LISTED,
            QUERY_BLOCK,
            BLOCK,
            INIT,
            HAS_WINDOW,
            SHARED,
        )
    tl.debug_barrier()


def selection_constants(
    shape: TileShape, geometry: BlockGeometry, dim: int, has_window: bool, config: SelectionConfig
) -> Constants:
    """What every scorer's kernel is compiled for."""
    g = geometry
    rows = min(shape.panel_tokens // g.query_block, config.rows)
    fetched = min(16, max(4, FETCHED_KEYS // rows))
    budget = g.selected_blocks - g.local_blocks - 1  # blocks of a list that are not local
    return {
        "G": shape.group,
        "GP": shape.padded_group,
        "D": dim,
        "DP": padded_dim(dim),
        "T": shape.tokens,
        "PANEL": shape.panel_tokens,
        "QUERY_BLOCK": g.query_block,
        "BLOCK": g.block_size,
        "INIT": g.init_blocks,
        "LOCAL": g.local_blocks,
        "BUDGET": budget - g.agnostic_blocks,
        "FILL": g.agnostic_blocks,
        "HAS_WINDOW": has_window,
        "RG": rows,
        "PEAKS": max(fetched, 4 if budget <= 48 else 8),
        "CANDIDATES": min(8, triton.cdiv(budget + budget // 4 + 32, 32)),
        "FETCHED": fetched,
        "LISTED": 512 if shape.tokens < 64 else 256,
    }


def list_capacity(plan: TilePlan, geometry: BlockGeometry, length_k: int) -> int:
    """Entries that the list of one tile can need: blocks that its tokens visit, or all that exist."""
    tokens, shared = plan.shape.tokens, geometry.query_block
    # Queries that share a selection begin at multiples of their number, as tiles do.
    selections = tokens // shared if tokens % shared == 0 else 1 if shared % tokens == 0 else tokens
    scored = selections * (geometry.selected_blocks - geometry.local_blocks - 1)
    spread = (tokens + shared - 2) // geometry.block_size + 1  # blocks that tokens stand in
    blocks = torch.sym_min(scored + geometry.local_blocks + 1 + spread, geometry.num_blocks(length_k))
    return torch.sym_max(blocks, 1)


def select_blocks(
    scorer: PanelScorer,
    kernel: Any,
    q: Tensor,
    state: tuple[Tensor, ...],
    slots: tuple[int, ...],
    plan: TilePlan,
    *,
    heads_kv: int,
    geometry: BlockGeometry,
    scale: float,
    dense_len: int,
    length_k: int,
    window: int | None = None,
    softcap: float = 0.0,
) -> TileLists:
    """Blocks that every tile visits, by the scores of a scorer.

    Args:
        scorer: the scorer.
        kernel: its kernel as `wrap_triton` returns it, for the device of its tensors.
        q: ``[B, Hq, Lq, D]``, float16, bfloat16 or float32, unit last stride.
        state: the scorer's tensors.
        slots: how many slots each of them has for a row and key/value head.
        plan: the call's tables, made for the shape ``TileShape.choose(Hq // Hkv, geometry.query_block)``.
        heads_kv: ``Hkv``.
        geometry: the block geometry.
        scale: softmax scale.
        dense_len: sequences with fewer keys select nothing.
        length_k: ``Lk``.
        window: sliding window in keys; blocks wholly before it are no candidates.
        softcap: scores ``x`` become ``softcap * tanh(x / softcap)``; 0: no cap.

    Returns:
        The lists, with the capacity that the geometry and the length bound.
    """
    shape, g = plan.shape, geometry
    dim = q.shape[3]
    capacity = list_capacity(plan, g, length_k)
    list_blocks = torch.empty(plan.num_tiles, heads_kv, capacity, dtype=torch.int16, device=q.device)
    # A tile more than needed: a compiler merges two equal allocations, and then copies one of them.
    list_tokens = torch.empty(plan.num_tiles + 1, heads_kv, capacity, dtype=shape.mask_dtype, device=q.device)
    list_counts = torch.empty(plan.num_tiles, heads_kv, dtype=torch.int32, device=q.device)
    rows = shape.panel_tokens // g.query_block
    config = config_for(SelectionConfig, scorer.tuned, q, scorer.dim or padded_dim(dim)).for_panel(rows)
    constants = selection_constants(shape, g, dim, window is not None, config)
    constants |= scorer.constants(shape, g, config) | {"HAS_SOFTCAP": softcap != 0.0}
    fixed, per_block = scorer.scratch(constants)
    programs = multiprocessors(q.device) * config.programs
    blocks = (g.num_blocks(length_k) + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    marks = (1 if g.query_block > shape.tokens else shape.tiles) * (2 if shape.tokens == 64 else 1)
    candidates = constants["RG"] * (SLOTS.value + constants["CANDIDATES"]) * LANES.value * 2
    scratch = torch.empty(
        programs * (blocks * (rows + marks + per_block) + candidates + fixed), dtype=torch.int32, device=q.device
    )
    kernel[(programs,)](
        q,
        *state,
        plan.panels,
        scratch,
        list_blocks,
        list_tokens,
        list_counts,
        *q.stride()[:3],
        *score_unit(scale, softcap),
        plan.panels.shape[0],
        heads_kv,
        *slots,
        blocks,
        capacity,
        dense_len,
        0 if window is None else window,
        **constants,
        PROGRAMS=programs,
        PRECISION=precision(q),
        **config.options,
    )
    return TileLists(list_blocks, list_tokens[: plan.num_tiles], list_counts)
