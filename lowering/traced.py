"""``infllm::switchable_attention`` in ATen operators and structured loops, for programs that run without this package.

A compiled program must not call back into Python, so that on the CPU the operator is written out: a ``cond`` for the
length switch, a ``while_loop`` over groups of query chunks, and one over the keys that a group visits. No size is read
on the host, and one program serves every length.

Memory: a group's block scores are ``GROUP x CHUNK_ROWS x N / kernel_stride`` numbers, its attention ``GROUP x
CHUNK_ROWS x STEP_TOKENS``; nothing is N x N. Arithmetic is float32. Semantics: arXiv 2509.24663, section 3, as in
`kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from infllm_pass.errors import DtypeError
from infllm_pass.kernels.geometry import COARSE_FACTOR, BlockGeometry

CHUNK_ROWS = 384
"""Query rows (tokens x group) that visit the same blocks: the union of what each of them selects."""

GROUP = 16
"""Chunks in a group, which one iteration computes. A loop hands the output on by copying it, once for each group."""

STEP_TOKENS = 512
"""Keys that attention takes at once."""

HIDDEN = -1e30
"""Logit of a key that a query does not see. Finite, so that a row of nothing else has no NaN."""

FORCED, UNSCORED, NO_CANDIDATE = 2**31 - 1, 0, -1
"""Ranks of blocks that are always taken, and of those that have no score. A score's rank is its bits, plus one."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Size = int | SymInt


class _Call(NamedTuple):
    """What does not change from group to group. ``R = B x Hkv``; keys are aligned to the first of their sequence.

    Attributes:
        queries: ``[R * Lq, G, D]``, scaled, float32.
        keys: ``[R * n_blocks, block_size, D]``; zeros follow the last key.
        values: ``[R * n_blocks, block_size, Dv]``.
        starts: position of the first query, int64 ``[B]``.
        lengths: keys of the sequence, int64 ``[B]``.
        blocks: n_blocks.
        length_q: Lq.
        valid: bool ``[B * n_blocks, block_size]``, which keys of a sequence may be attended to; None: all.
        k1: compressed keys ``[R, n1, D]``, float32, whole blocks of them; None: nothing is selected.
        norm: the keys that the scores' normaliser is summed over, ``[R, n2, D]``.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    starts: Tensor
    lengths: Tensor
    blocks: Size
    length_q: Size
    valid: Tensor | None
    k1: Tensor | None
    norm: Tensor | None


@dataclass(frozen=True)
class _Sizes:
    """Numbers that are the same for all lengths.

    Attributes:
        geometry: the block geometry.
        window: sliding window in keys, or None.
        dense_len: keys from which a sequence is sparse.
        heads: Hkv.
        chunk: tokens in a chunk, C, a multiple of ``query_block``.
        width: blocks in a step of attention.
    """

    geometry: BlockGeometry
    window: int | None
    dense_len: int
    heads: int
    chunk: int
    width: int


def switchable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    offset: Size | None,
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
    """What ``infllm::switchable_attention`` computes, with its arguments: see `lowering.joined`.

    Raises:
        DtypeError: the tensors are neither float32 nor of a 16-bit type.
    """
    if q.dtype not in DTYPES:
        raise DtypeError(f"attention of {q.dtype} cannot be packaged for the CPU: cast the model to float32")
    geometry = BlockGeometry(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        selected_blocks=selected_blocks,
        lse=lse,  # type: ignore[arg-type]
        query_block=query_block,
    )

    def run(*operands: Any, select: bool) -> Tensor:
        return _attend(*operands, geometry=geometry, window=window, scale=scale, dense_len=dense_len, select=select)

    def sparse(*operands: Any) -> Tensor:
        return run(*operands, select=True)

    plain = key_mask is None and offsets is None and offset is None and window is None
    plain = plain and guard_or_false(q.shape[2] == k.shape[2])

    def dense(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        if plain:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return run(q, k, v, *more, select=False)

    operands = (q, k, v, key_mask, offsets, offset)
    reached = k.shape[2] >= dense_len
    if statically_known_true(reached):
        return _token_first(sparse(*operands))
    if statically_known_true(k.shape[2] < dense_len):
        return _token_first(dense(*operands))
    # Inductor reads operands and results of a `cond` by the strides that were traced, yet lays out what it computes as
    # it likes: flat tensors leave it no choice.
    sizes = (q.shape[0], q.shape[2], k.shape[2], offset)
    flat = (None if x is None else x.reshape(-1) for x in (q, k, v, key_mask, offsets))
    given, fill = _operands((*sizes, *flat))

    def side(run: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
        def call(*some: Any) -> tuple[Tensor]:
            batch, length_q, length_k, offset, *flat = fill(some)
            shapes = (
                (batch, q.shape[1], length_q, q.shape[3]),
                (batch, k.shape[1], length_k, k.shape[3]),
                (batch, v.shape[1], length_k, v.shape[3]),
                (batch, length_k),
                (-1,),
            )
            tensors = [None if x is None else x.view(shape) for x, shape in zip(flat, shapes, strict=True)]
            return (run(*tensors, offset).reshape(-1),)

        return call

    out: Tensor = torch.ops.higher_order.cond(reached, side(sparse), side(dense), given)[0]
    return _token_first(out.view(q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _token_first(out: Tensor) -> Tensor:
    """The result ``[B, H, L, D]`` stored as ``[B, L, H, D]``, as the operator's is: programs hold views of it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _operands(values: Sequence[Any]) -> tuple[tuple[Any, ...], Callable[[Sequence[Any]], tuple[Any, ...]]]:
    """Values as operands of a structured operator, and a function that gives the values back inside of it.

    Such an operator takes no None and no number, and every size once.
    """
    given: list[Any] = []
    places: list[int | None] = []
    known: dict[Any, int] = {}
    for value in values:
        dynamic = isinstance(value, SymInt) and not value.node.expr.is_number
        if not dynamic and not isinstance(value, Tensor):
            places.append(None)
            continue
        key = value.node.expr if dynamic else id(value)
        if key not in known:
            known[key] = len(given)
            given.append(value)
        places.append(known[key])

    def fill(some: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(value if place is None else some[place] for value, place in zip(values, places, strict=True))

    return tuple(given), fill


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    offset: Size | None,
    *,
    geometry: BlockGeometry,
    window: int | None,
    scale: float,
    dense_len: int,
    select: bool,
) -> Tensor:
    """Attention of all queries, ``[B, Hq, Lq, Dv]``; without `select` every sequence is dense."""
    g, m = geometry, geometry.query_block
    batch, heads_q, length_q, dim = q.shape
    heads, length_k, dim_v = v.shape[1:]
    group = heads_q // heads
    if offset is None:
        offset = length_k - length_q if offsets is None else 0
    starts = torch.zeros(1, dtype=torch.int64, device=q.device) if offsets is None else offsets.long()
    starts = (starts + offset).expand(batch)  # key of the first query
    end = torch.full((1,), length_k, dtype=torch.int64, device=q.device).expand(batch)
    first = torch.zeros_like(end)
    index = torch.arange(length_k, device=q.device)
    if key_mask is not None:
        end = torch.where(key_mask, index + 1, 0).amax(1)
        first = torch.minimum(torch.where(key_mask, index, length_k).amin(1), end)
    if offsets is not None:  # what follows the last query are free slots of a cache
        end = torch.maximum(torch.minimum(end, starts + length_q), first)
    lengths, starts = end - first, starts - first
    # Tracing takes a size that is 1 in its example to be 1 always: sizes that are derived here are never that.
    blocks = (length_k + g.block_size - 1) // g.block_size + 1
    valid = None
    if key_mask is not None:
        place = (first[:, None] + index).clamp(max=length_k - 1)  # [B, Lk]
        k, v = (x.gather(2, place[:, None, :, None].expand(x.shape)) for x in (k, v))
        valid = key_mask.gather(1, place) & (index < lengths[:, None])
        valid = _in_blocks(valid[:, None, :, None], g, blocks).squeeze(2)
    k1 = norm = None
    if select:
        windows = blocks * (g.block_size // g.kernel_stride)
        k1 = norm = _pool(k, g.kernel_size, g.kernel_stride, windows)
        if g.lse == "coarse":
            coarse = (windows + COARSE_FACTOR - 1) // COARSE_FACTOR + 1
            norm = _pool(k, COARSE_FACTOR * g.kernel_size, COARSE_FACTOR * g.kernel_stride, coarse)
    padded = max(dim, dim_v)  # what computes attention asks for heads of one size
    k, v = (F.pad(x, (0, padded - x.shape[3])) for x in (k, v))
    rows = q.reshape(batch * heads, group, length_q, dim).transpose(1, 2)  # [R, Lq, G, D]
    chunk = -(-max(1, CHUNK_ROWS // group) // m) * m
    if isinstance(length_q, int):
        chunk = min(chunk, (length_q + 2 * m - 2) // m * m)
    chunks = (length_q + m - 1 + chunk - 1) // chunk
    step = STEP_TOKENS * max(1, CHUNK_ROWS // (chunk * group))
    call = _Call(
        queries=F.pad(rows.float() * scale, (0, padded - dim)).reshape(batch * heads * length_q, group, padded),
        keys=_in_blocks(k, g, blocks),
        values=_in_blocks(v, g, blocks),
        starts=starts.contiguous(),
        lengths=lengths.contiguous(),
        blocks=blocks,
        length_q=length_q,
        valid=valid,
        k1=k1,
        norm=norm,
    )
    sizes = _Sizes(g, window, dense_len, heads, chunk, width=max(1, step // g.block_size))
    out = _all_groups(call, sizes, batch * heads * chunks)  # [R * chunks or more, C, G, D]
    lead = (call.starts % m).repeat_interleave(heads)[:, None]  # rows begin where their first tile does
    token = lead + torch.arange(length_q, device=q.device)  # [R, Lq]
    chunk_of = token // chunk * (batch * heads) + torch.arange(batch * heads, device=q.device)[:, None]
    out = out.flatten(0, 1).index_select(0, (chunk_of * chunk + token % chunk).flatten())[..., :dim_v]
    out = out.view(batch, heads, length_q, group, dim_v).transpose(2, 3)
    return out.reshape(batch, heads_q, length_q, dim_v).to(q.dtype)


def _in_blocks(x: Tensor, geometry: BlockGeometry, blocks: Size) -> Tensor:
    """``[B, H, L, D]`` -> ``[B * H * blocks, block_size, D]``, zeros after the last token."""
    batch, heads, length, dim = x.shape
    size = geometry.block_size
    padded = F.pad(x, (0, 0, 0, blocks * size - length))
    return padded.reshape(batch * heads * blocks, size, dim)


def _pool(k: Tensor, size: int, stride: int, count: Size) -> Tensor:
    """Means of windows ``[R, count, D]``, rounded to the type of the keys, float32.

    Windows that reach over the end are of no consequence: no query sees them.
    """
    batch, heads, length, dim = k.shape
    steps = size // stride
    segments = count + steps - 1
    padded = F.pad(k.reshape(batch * heads, length, dim), (0, 0, 0, segments * stride - length))
    sums = padded.float().reshape(batch * heads, segments, stride, dim).sum(2)
    total = sums[:, :count]
    for step in range(1, steps):
        total = total + sums[:, step : step + count]
    return (total * (1.0 / size)).to(k.dtype).float()


def _all_groups(call: _Call, sizes: _Sizes, count: Size) -> Tensor:
    """Outputs of all chunks, of which there are `count`: ``[count or more, C, G, D]``.

    Chunks are numbered row by row, so that those of a group lie at about the same place and visit about as many keys.
    """
    size = min(GROUP, count) if isinstance(count, int) else GROUP
    groups = (count + size - 1) // size + 1  # one more, never computed: see `_attend`
    device = call.queries.device
    given, fill = _operands((count, *call))

    def going_on(number: Tensor, out: Tensor, *_: Any) -> Tensor:
        return number < out.shape[0] - 1

    def append(number: Tensor, out: Tensor, *some: Any) -> tuple[Tensor, Tensor]:
        count, *call = fill(some)
        chunks = (number * size + torch.arange(size, device=device)).clamp(max=count - 1)
        part = _group(_Call(*call), sizes, chunks)
        return number + 1, out.index_copy(0, number[None], part[None])

    out = torch.zeros(groups, size, sizes.chunk, *call.queries.shape[1:2], *call.values.shape[2:], device=device)
    start = (torch.zeros((), dtype=torch.int64, device=device), out)
    _, out = torch.ops.higher_order.while_loop(going_on, append, start, given)
    return out.flatten(0, 1)


def _group(call: _Call, sizes: _Sizes, number: Tensor) -> Tensor:
    """The outputs of some chunks, ``[W, C, G, Dv]``, by their numbers ``[W]``."""
    rows = call.starts.shape[0] * sizes.heads
    row = number % rows
    sequence = row // sizes.heads
    start, length = (x.index_select(0, sequence)[:, None] for x in (call.starts, call.lengths))  # [W, 1]
    index = (number // rows * sizes.chunk)[:, None] + torch.arange(sizes.chunk, device=row.device)
    index = index - start % sizes.geometry.query_block  # [W, C]; chunks begin with a tile
    position = start + index
    at_key = torch.minimum(position.clamp(min=0), (length - 1).clamp(min=0))
    real = (index >= 0) & (index < call.length_q) & (position >= 0) & (position < length)
    inside = row[:, None] * call.length_q + index.clamp(min=0, max=call.length_q - 1)
    q = call.queries.index_select(0, inside.flatten()).view(*inside.shape, *call.queries.shape[1:])
    chosen = _candidates(call, sizes, at_key)
    if call.k1 is not None and call.norm is not None:
        keys, norm = call.k1.index_select(0, row), call.norm.index_select(0, row)
        selected = _select(call, sizes, keys, norm, q, position, real, length)
        chosen = chosen & (selected | (length < sizes.dense_len)[:, :, None])
    out = _visit(call, sizes, row, sequence, q, at_key, chosen)
    return torch.where(real[:, :, None, None], out, 0.0)


def _candidates(call: _Call, sizes: _Sizes, last: Tensor) -> Tensor:
    """Blocks that begin at or before positions and do not lie wholly before their windows, ``[W, n, n_blocks]``."""
    size = sizes.geometry.block_size
    block = torch.arange(call.blocks, device=last.device)
    candidates = block <= (last // size)[:, :, None]
    if sizes.window is not None:
        candidates = candidates & (block * size + (size - 1) > (last - sizes.window)[:, :, None])
    return candidates


def _select(
    call: _Call,
    sizes: _Sizes,
    keys: Tensor,
    norm: Tensor,
    q: Tensor,
    position: Tensor,
    real: Tensor,
    length: Tensor,
) -> Tensor:
    """The blocks that every query visits, bool ``[W, C, n_blocks]``.

    Args:
        call: the call.
        sizes: its sizes.
        keys: compressed keys ``[W, n1, D]``.
        norm: those of the normaliser ``[W, n2, D]``.
        q: scaled queries ``[W, C, G, D]``.
        position: positions ``[W, C]`` in the sequence, also outside it.
        real: which queries exist, bool ``[W, C]``.
        length: keys of the sequence, int64 ``[W, 1]``.
    """
    g, m = sizes.geometry, sizes.geometry.query_block
    width, tiles = q.shape[0], sizes.chunk // m
    last = position.view(width, tiles, m)[:, :, 0] + (m - 1)
    last = torch.minimum(last.clamp(min=0), (length - 1).clamp(min=0))  # [W, T]
    scores = _block_scores(call, sizes, keys, norm, q, real, last)  # [W, T, n_blocks]
    block = torch.arange(call.blocks, device=q.device)
    forced = (block < g.init_blocks) | (block >= (last // g.block_size)[:, :, None] - g.local_blocks)
    # Bits of floats that are not negative are ordered as they are. Of equal scores the lower block comes first.
    bits = torch.where(scores < 0, UNSCORED, scores.clamp(min=0.0).view(torch.int32).long() + 1)
    bits = torch.where(_candidates(call, sizes, last), torch.where(forced, FORCED, bits), NO_CANDIDATE)
    rank = bits * 2**24 - block
    padded = F.pad(rank, (0, g.selected_blocks), value=-(2**62))  # at least as many as are taken
    least = padded.topk(g.selected_blocks, dim=2).values[:, :, -1:]
    return (rank >= least)[:, :, None].expand(width, tiles, m, call.blocks).reshape(width, sizes.chunk, call.blocks)


def _block_scores(
    call: _Call, sizes: _Sizes, keys: Tensor, norm: Tensor, q: Tensor, real: Tensor, last: Tensor
) -> Tensor:
    """Scores of blocks ``[W, T, n_blocks]``, -1 where a tile sees no compressed key of the block; see `_select`."""
    g = sizes.geometry
    factor = COARSE_FACTOR if g.lse == "coarse" else 1
    logits, visible = _window_logits(q, keys, last, g.kernel_size, g.kernel_stride)
    norms, seen = logits, visible
    if g.lse == "coarse":
        norms, seen = _window_logits(q, norm, last, factor * g.kernel_size, factor * g.kernel_stride)
    norms = torch.where(seen[:, :, None], norms, HIDDEN)  # [W, T, m * G, n2]
    top = norms.amax(3, keepdim=True)
    total = (norms - top).exp().sum(3, keepdim=True)
    scores = (logits - (top + total.log())).exp()  # [W, T, m * G, n1]
    if g.query_block > 1:
        shares = real[:, :, None].expand(*real.shape, q.shape[2]).reshape(*last.shape, -1, 1)
        scores = torch.where(shares, scores, 0.0)
    scores = scores.sum(2).clamp(max=1e38)  # [W, T, n1]
    scores = torch.where((last >= factor * g.kernel_size - 1)[:, :, None], scores, 0.0)
    scores = torch.where(visible, scores, -1.0)
    per_block, before = g.block_size // g.kernel_stride, g.kernel_size // g.kernel_stride - 1
    best = scores.view(*last.shape, call.blocks, per_block).amax(3)
    ahead = F.pad(scores, (before, 0), value=-1.0)  # windows that begin before a block overlap it as well
    for shift in range(before):
        shifted = ahead[:, :, shift : shift + call.blocks * per_block]
        best = torch.maximum(best, shifted.reshape(*last.shape, call.blocks, per_block)[:, :, :, 0])
    return best


def _window_logits(q: Tensor, keys: Tensor, last: Tensor, size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Products with compressed keys ``[W, T, m * G, n]``, and which of these a tile sees, bool ``[W, T, n]``."""
    count = keys.shape[1]
    ends = torch.arange(count, device=q.device) * stride + (size - 1)
    logits = torch.bmm(q.flatten(1, 2)[:, :, : keys.shape[2]], keys.transpose(1, 2))
    return logits.view(*last.shape, -1, count), ends <= last[:, :, None]


def _visit(
    call: _Call, sizes: _Sizes, row: Tensor, sequence: Tensor, q: Tensor, at_key: Tensor, chosen: Tensor
) -> Tensor:
    """Attention of chunks, each over the blocks that any of its queries visits, ``[W, C, G, Dv]``.

    The blocks come in steps, and softmax is carried from one to the next: ``top`` is the highest logit of a row so far,
    ``total`` and ``sums`` are relative to it.

    Args:
        call: the call.
        sizes: its sizes.
        row: rows of keys, int64 ``[W]``.
        sequence: rows of the batch, int64 ``[W]``.
        q: scaled queries ``[W, C, G, D]``.
        at_key: position of the last key that each query sees, ``[W, C]``.
        chosen: blocks that each query visits, bool ``[W, C, n_blocks]``.
    """
    size, width = sizes.geometry.block_size, sizes.width
    chunks, tokens, group, dim = q.shape
    visited = chosen.any(1)  # [W, n_blocks]
    order = (~visited).int().sort(stable=True).indices  # the visited ones first, ascending
    steps = (visited.sum(1).amax() + width - 1) // width
    # How many keys of a block a query sees: one number for them all keeps masks out of the innermost loop.
    block = torch.arange(call.blocks, device=q.device)
    seen = (at_key[:, :, None] + 1 - block * size).clamp(min=0, max=size)
    seen = torch.where(chosen, seen, 0).gather(2, order[:, None].expand(chosen.shape)).float()
    seen, order = F.pad(seen, (0, width)), F.pad(order, (0, width))  # the last step may reach over the end

    def going_on(number: Tensor, top: Tensor, total: Tensor, sums: Tensor, steps: Tensor, *_: Any) -> Tensor:
        return number < steps

    def step(number: Tensor, top: Tensor, total: Tensor, sums: Tensor, _: Tensor, *some: Any) -> tuple[Tensor, ...]:
        order, seen, row, sequence, q, at_key, keys, values, blocks, valid = fill(some)
        slot = number * width + torch.arange(width, device=q.device)
        block = order.index_select(1, slot)  # [W, width]
        at = (row[:, None] * blocks + block).flatten()
        keys, values = (x.index_select(0, at).view(chunks, width * size, dim).float() for x in (keys, values))
        index = torch.arange(size, device=q.device, dtype=torch.float32)
        visible = index < seen.index_select(2, slot)[:, :, :, None]  # [W, C, width, size]
        if sizes.window is not None:
            begin = at_key[:, :, None] + 1 - sizes.window - block[:, None] * size  # [W, C, width]
            visible = visible & (index >= begin[:, :, :, None])
        if valid is not None:
            at = (sequence[:, None] * blocks + block).flatten()
            visible = visible & valid.index_select(0, at).view(chunks, 1, width, size)
        hidden = torch.where(visible, 0.0, HIDDEN).view(chunks, 1, tokens, width * size)
        shape = (chunks, group, width * size, dim)
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=hidden, scale=1.0
        )
        higher = torch.maximum(top, lse)
        fading, share = (top - higher).exp(), (lse - higher).exp()
        sums = sums * fading[..., None] + part * share[..., None]
        return number + 1, higher, total * fading + share, sums

    start = (
        torch.zeros((), dtype=torch.int64, device=q.device),
        q.new_full((chunks, group, tokens), HIDDEN),
        q.new_zeros(chunks, group, tokens),
        q.new_zeros(chunks, group, tokens, dim),
    )
    queries = q.transpose(1, 2).contiguous()  # [W, G, C, D]
    operands = (order, seen, row, sequence, queries, at_key, call.keys, call.values, call.blocks, call.valid)
    given, fill = _operands(operands)
    _, top, total, sums = torch.ops.higher_order.while_loop(going_on, step, start, (steps, *given))
    # A row that saw no key has weighed hidden ones all alike.
    out = torch.where((top > HIDDEN / 2)[..., None], sums / total[..., None], 0.0)
    return out.transpose(1, 2)
