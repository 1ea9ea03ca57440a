"""Device functions shared by the attention kernels: tile lookup, block iteration, addressing, masking, softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_tables import PANEL_BATCH, PANEL_BEGIN, PANEL_END, PANEL_LENGTH, PANEL_QUERY, TABLE_COLUMNS, load_panel

LOG2_E = 1.4426950408889634

UNBOUNDED = 2**30
"""A sliding window, or a dense_len, that never ends."""

LN_2 = tl.constexpr(0.6931471805599453)

LOWEST_SCORE = tl.constexpr(-1e30)  # start of a running maximum: finite, so that differences are never NaN


@triton.jit
def load_attention_tile(panels, tile, TOKENS: tl.constexpr, TILES: tl.constexpr):
    """A tile's batch row, query and position of its token 0, range of valid tokens, first key and number of keys."""
    batch, query, begin, end, position, key_begin, length, _ = load_panel(panels, tile // TILES)
    skip = (tile % TILES) * TOKENS
    return batch, query + skip, begin - skip, tl.minimum(end - skip, TOKENS), position + skip, key_begin, length


@triton.jit
def reload_rows(panels, tile, token, FEWEST: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr):
    """Row of the batch and query numbers, in 64 bits, and whether tokens exist whose sequence has FEWEST keys at least.

    The compiler cannot know them equal to what a program read at its start, so no register holds them through the loop.
    """
    panel = panels + tile // TILES * TABLE_COLUMNS
    token += (tile % TILES) * TOKENS
    query = tl.load(panel + PANEL_QUERY, volatile=True).to(tl.int64) + token
    begin = tl.load(panel + PANEL_BEGIN, volatile=True)
    length = tl.load(panel + PANEL_LENGTH, volatile=True)
    end = tl.where(length < FEWEST, 0, tl.load(panel + PANEL_END, volatile=True))
    return tl.load(panel + PANEL_BATCH, volatile=True).to(tl.int64), query, (token >= begin) & (token < end)


@triton.jit
def count_visits(counts, row, position, begin, end, dense, window, BLOCK_SIZE: tl.constexpr, HAS_LISTS: tl.constexpr):
    """Blocks that a tile visits, and the first of them where they are all from there on."""
    first = tl.maximum(position + begin - window + 1, 0) // BLOCK_SIZE
    visits = (position + end - 1) // BLOCK_SIZE + 1 - first
    if HAS_LISTS:
        visits = tl.where(dense, visits, tl.load(counts + row))
    return tl.where(begin < end, visits, 0), first


@triton.jit
def forced_visits(
    position,
    begin,
    end,
    window,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
):
    """Forced blocks of a tile: their number, the number of initial ones, `first` and `later`.

    Visit ``e`` is of block ``first + e`` if it is initial, else of ``later + e``. The tokens share their own block.
    """
    first = tl.maximum(position + begin - window + 1, 0) // BLOCK_SIZE
    own = (position + end - 1) // BLOCK_SIZE
    local = tl.maximum(own - LOCAL_BLOCKS, first)
    initial = tl.maximum(tl.minimum(local, INIT_BLOCKS) - first, 0)
    return initial + own - local + 1, initial, first, local - initial


@triton.jit
def start_visits(
    counts,
    is_scattered,
    row,
    position,
    begin,
    end,
    dense,
    window,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    SCATTERED_OFFERED: tl.constexpr,
):
    """Blocks that a tile visits, whether by rule, and what says which they are; see `forced_visits`.

    If SCATTERED_OFFERED and `is_scattered` holds a 1, tiles of sparse sequences visit their forced blocks alone.
    """
    visits, first = count_visits(counts, row, position, begin, end, dense, window, BLOCK_SIZE, HAS_LISTS)
    by_rule = dense
    initial = 0
    later = first
    if SCATTERED_OFFERED:
        left = (tl.load(is_scattered) != 0) & (visits > 0) & (dense == 0)
        if left:
            visits, initial, first, later = forced_visits(
                position, begin, end, window, BLOCK_SIZE, INIT_BLOCKS, LOCAL_BLOCKS
            )
        by_rule = dense | left
    return visits, by_rule, initial, first, later


@triton.jit
def load_visit(blocks, tokens, entry, first, dense, HAS_LISTS: tl.constexpr):
    """A block that a tile visits, and the mask of the tokens that do."""
    block = first + entry
    bits = -1
    if HAS_LISTS:
        listed = tl.load(blocks + entry, mask=dense == 0, other=0).to(tl.int32) & 0xFFFF
        bits = tl.load(tokens + entry, mask=dense == 0, other=-1)
        block = tl.where(dense, block, listed)
    return block, bits


@triton.jit
def mask_scores(scores, keys, queries, window, valid, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Scores with -inf where the key is not `valid`, later than the query (CAUSAL) or before its sliding window.

    Positions of `keys` and of `queries` lie along one axis of the scores each; `valid` broadcasts, True: all are.
    """
    seen = valid
    if CAUSAL:
        seen = (keys <= queries) & seen
    if HAS_WINDOW:
        seen = (keys > queries - window) & seen
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def mask_step(
    scores,  # [BM, BN]
    keys,  # [BN] positions
    start,  # the first key position that the step is for
    position,  # of the tile's token 0
    positions,  # [BM]
    last,  # position of the tile's last token
    window,
    key_mask,  # [BN] addresses
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    """Scores of a tile and a step of keys, masked; causality and window cost something only in steps at an edge."""
    if start + scores.shape[1] > position + 1:
        scores = mask_scores(scores, keys[None, :], positions[:, None], window, (keys >= start)[None, :], True, False)
    if HAS_WINDOW and start <= last - window:
        scores = mask_scores(scores, keys[None, :], positions[:, None], window, True, False, True)
    if HAS_KEY_MASK:
        scores = mask_scores(scores, 0, 0, 0, (tl.load(key_mask) != 0)[None, :], False, False)
    return scores


@triton.jit
def softmax_weights(scores, scale_log2, lowest, AXIS: tl.constexpr):
    """Weights ``2 ** (scores * scale_log2 - m)`` and ``m``, the scores' maximum along an axis, at least `lowest`."""
    highest = tl.max(scores, AXIS) * scale_log2
    if lowest is not None:
        highest = tl.maximum(highest, lowest)
    return tl.exp2(scores * scale_log2 - tl.expand_dims(highest, AXIS)), highest


@triton.jit
def online_softmax(scores, scale_log2, highest, total, rows, SOME: tl.constexpr, AXIS: tl.constexpr):
    """One step of an online softmax along an axis: weights, running maximum and sum, and what earlier sums decay by.

    The maximum starts at `LOWEST_SCORE`, the sum at 0, and they stay so while all scores are -inf. SOME: only `rows`
    take the step, the others get weights of 0.
    """
    raised = tl.maximum(highest, tl.max(scores, AXIS) * scale_log2)
    shift = raised
    if SOME:
        shift = tl.where(rows, raised, float("inf"))
        raised = tl.where(rows, raised, highest)
    weights = tl.exp2(scores * scale_log2 - tl.expand_dims(shift, AXIS))
    decay = tl.exp2(highest - raised)
    return weights, raised, total * decay + tl.sum(weights, AXIS), decay


@triton.jit
def row_addresses(tensor, batch, batch_stride, head, head_stride, query, token_stride, SIZE: tl.constexpr):
    """Addresses of one vector a row, ``[BM, SIZE]``: heads and queries are `[BM]`, in 64 bits."""
    vectors = tensor + batch * batch_stride + head * head_stride + query * token_stride
    return vectors[:, None] + tl.arange(0, SIZE)[None, :]


@triton.jit
def row_mask(exists, DIM: tl.constexpr, SIZE: tl.constexpr):
    """Which elements of one vector a row there are, ``[BM, SIZE]`` or ``[BM, 1]``."""
    mask = exists[:, None]
    if DIM != SIZE:
        mask = mask & (tl.arange(0, SIZE) < DIM)[None, :]
    return mask


@triton.jit
def load_keys(addresses, numbers, dims, count, DIM: tl.constexpr, FULL: tl.constexpr, SHORT: tl.constexpr):
    """Vectors of keys or values: all that a step numbers, or 0 from `count` on if SHORT; FULL: no `dims` pass DIM.

    `numbers` of the step's keys and `dims` of the vectors' elements are a row and a column, either way round.
    """
    if SHORT:
        vectors = tl.load(addresses, mask=(numbers < count) & (dims < DIM), other=0.0)
    elif FULL:
        vectors = tl.load(addresses)
    else:
        vectors = tl.load(addresses, mask=dims < DIM, other=0.0)
    return vectors


@triton.jit
def in_registers(vectors, PRECISION: tl.constexpr):
    """The same vectors, ``[BM, SIZE]``, in the layout of a product's result, so that the next product takes registers.

    A loaded operand is kept in shared memory instead, which the products of a loop read in every step.
    """
    numbers = tl.arange(0, vectors.shape[1])
    unit = (numbers[:, None] == numbers[None, :]).to(vectors.dtype)
    return tl.dot(vectors, unit, input_precision=PRECISION).to(vectors.dtype)
