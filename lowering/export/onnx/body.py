"""Body of the ONNX operator ``infllm::InfLLMV2Attention`` in standard operators, as a model-local function.

Runtimes without a kernel for the operator run this body. The sparse/dense switch is an ``If`` inside it.

Memory: a ``Loop`` takes the queries in chunks, one key/value head at a time. Block scores take
``chunk x N / kernel_stride`` numbers, or ``chunk x N`` by tokens, and attention ``chunk x visited keys``; no tensor is
N x N.

Semantics: arXiv 2509.24663, section 3, as in `kernels.reference`. Arithmetic is float32 for all input dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder, build_function

from infllm_pass.kernels.geometry import COARSE_FACTOR
from infllm_pass.kernels.params import LEAST_BIAS
from infllm_pass.kernels.scorer import INDEX_HIGHEST

from .builder_helpers import (
    BOOL,
    FLOAT,
    INT64,
    Value,
    arange,
    ceil_div,
    dim_size,
    if_else,
    loop,
    reshape,
    round_down,
    shape_vector,
)
from .op_spec import DOMAIN, NAME, AttentionNode

CHUNK_ROWS = 256
"""Query rows (tokens x group) of a chunk: 256 x 8k float32 block scores are 8 MB at 128k."""

TOKEN_CHUNK_ROWS = 64
"""The same for token scores: 64 x 128k float32 logits are 32 MB at 128k."""

STEP_TOKENS = 1024
"""Keys in one step of the online softmax."""

HIDDEN = -1e30
"""Score of a masked key. Finite, so that a row without a visible key has no NaN."""

FORCED, HIGHEST, UNSCORED, NO_CANDIDATE = 3e38, 1e38, -1.0, -2.0
"""Ranks: initial and local blocks, cap of a score, blocks without a score, blocks out of reach. Scores are >= 0."""


def attention_function(node: AttentionNode, opset: int, overload: str = "") -> ir.Function:
    """The body of a node as a model-local function.

    Its inputs are q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]``, v ``[B, Hkv, Lk, Dv]``, and, as the node has them,
    key_mask bool ``[B, Lk]``, offset int64 ``[1]`` or ``[B]``, the key index of the first query (keys after the last
    query then are free slots of a cache), key_bias ``[B or 1, Hkv or 1, Lk]`` and sinks ``[Hq]``. Its output is
    ``[B, Hq, Lq, Dv]`` in q's type; a query that sees no key gives 0.

    Args:
        node: what to compute; geometry, scale and thresholds become constants of the body.
        opset: version of the default domain, at least 18.
        overload: tells functions of one name apart in one model.
    """
    # The builder types constants after the operands beside them; the function itself is generic over q's dtype.
    dtypes = {"key_mask": BOOL, "offset": INT64}
    function = build_function(
        _Writer(node).write,
        [ir.val(name, dtypes.get(name, FLOAT)) for name in node.inputs],
        domain=DOMAIN,
        name=NAME,
        attributes=[ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in node.attributes],
        opset_imports={"": opset},
    )
    function.overload = overload
    _drop_annotations(function)
    return function


def _drop_annotations(function: ir.Function) -> None:
    """Remove inferred types, which hold for float32 only, and the builder's metadata."""
    for value in function.inputs:
        value.type = None
    for node in function.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            if value.graph is function.graph or not value.is_graph_output():
                value.type = value.shape = None


@dataclass(frozen=True)
class _Windows:
    """Compressed keys ``[R, D, n]``, the last position of each window ``[n]``, and that of the first window."""

    means: Value
    ends: Value
    first_end: int


class _Writer:
    """Writes the body of one node.

    ``R = B x Hkv`` counts sequences of one key/value head, ``T`` tiles of ``query_block`` queries in a chunk of ``C``.
    Methods take the builder `op` of the graph that they write to; values of enclosing graphs are attributes.
    """

    def __init__(self, node: AttentionNode) -> None:
        self.node = node
        self.geometry = node.geometry

    def write(self, op: OpBuilder, *inputs: Value) -> Value:
        m = self.geometry.query_block
        given = dict(zip(self.node.inputs, inputs, strict=True))
        self.q, self.k, self.v = given["q"], given["k"], given["v"]
        self.batch, self.heads = dim_size(op, self.k, 0), dim_size(op, self.k, 1)
        self.group = op.Div(dim_size(op, self.q, 1), self.heads)
        self.length_q, self.length_k = dim_size(op, self.q, 2), dim_size(op, self.k, 2)
        self._place_sequences(op, given)
        self._prepare_terms(op, given)

        self.queries = self._token_rows(op, self.q, self.group)  # [R * Lq, G, D]
        self.keys = reshape(op, self.k, -1, dim_size(op, self.k, 3))  # [R * Lk, D]
        self.values = reshape(op, self.v, -1, dim_size(op, self.v, 3))  # [R * Lk, Dv]
        self.blocks = ceil_div(op, self.length_k, self.geometry.block_size)
        self.block = arange(op, self.blocks)
        self._prepare_scores(op)

        chunk_rows = CHUNK_ROWS if self.geometry.scorer == "pooled" else TOKEN_CHUNK_ROWS
        rows = op.Add(op.Max(op.Div(chunk_rows, self.group), [1]), m - 1)
        most = round_down(op, op.Add(self.length_q, 2 * m - 2), m)  # what a chunk holds at most, whole tiles
        self.chunk = op.Min(round_down(op, rows, m), most)
        self.chunks = op.Div(op.Sub(op.Add(op.Add(self.length_q, m - 1), self.chunk), 1), self.chunk)
        count = op.Mul(op.Mul(self.batch, self.heads), self.chunks)
        out = loop(op, "chunk", count, self._attend_chunk, outputs=1)  # [R * chunks, C, G, Dv]
        result = self._in_order(op, out)
        result.name = "out"
        return result

    def _place_sequences(self, op: OpBuilder, given: dict[str, Value]) -> None:
        """First key, length and position of the first query of every row, int64 ``[B]`` each."""
        offset = given["offset"] if self.node.placed else op.Sub(self.length_k, self.length_q)
        self.start = op.Expand(offset, self.batch)
        self.key_mask = given.get("key_mask")
        end = op.Expand(self.length_k, self.batch)
        if self.key_mask is not None:
            index = arange(op, self.length_k)
            ends = op.Where(self.key_mask, op.Add(index, 1), 0)
            first = op.ReduceMin(op.Where(self.key_mask, index, self.length_k), [1], keepdims=0)
            end = op.ReduceMax(ends, [1], keepdims=0)
            self.first = op.Min(first, end)
        if self.node.placed:  # what follows the last query are free slots of a cache
            end = op.Max(op.Min(end, op.Add(self.start, self.length_q)), 0)
            if self.key_mask is not None:
                end = op.Max(end, self.first)
        self.lengths = end
        if self.key_mask is not None:
            self.lengths = op.Sub(end, self.first)
            self.start = op.Sub(self.start, self.first)

    def _prepare_terms(self, op: OpBuilder, given: dict[str, Value]) -> None:
        """Biases of all keys ``[R * Lk]`` and sinks ``[Hkv, 1, G]``, float32; None where there are none."""
        self.bias = self.sinks = None
        if self.node.biased:
            bias = op.Cast(given["key_bias"], to=FLOAT)
            shape = op.Concat(self.batch, self.heads, self.length_k, axis=0)
            self.bias = reshape(op, op.Expand(bias, shape), -1)
        if self.node.sunk:
            self.sinks = reshape(op, op.Cast(given["sinks"], to=FLOAT), self.heads, 1, self.group)

    def _capped(self, op: OpBuilder, logits: Value) -> Value:
        """Scaled scores under the node's cap."""
        cap = self.node.softcap
        return op.Mul(op.Tanh(op.Div(logits, cap)), cap) if cap else logits

    def _token_rows(self, op: OpBuilder, x: Value, heads: Value) -> Value:
        """``[B, H x heads, L, D]`` as ``[B x H x L, heads, D]``: one row for each token of a key/value head."""
        dim = dim_size(op, x, 3)
        grouped = reshape(op, x, op.Mul(self.batch, self.heads), heads, -1, dim)
        return reshape(op, op.Transpose(grouped, perm=[0, 2, 1, 3]), -1, heads, dim)

    def _prepare_scores(self, op: OpBuilder) -> None:
        """What scores read of the keys of whole sequences.

        Compressed keys, ``K1`` and ``K2``, as ``[R, D, n]`` with ``n`` for whole blocks: windows that reach over the
        end are of no consequence, as no query sees them. Or index keys ``[R, d, N]`` of whole blocks.
        """
        g = self.geometry
        if g.scorer == "tokens":
            self.tokens = op.Mul(self.blocks, g.block_size)
            self._prepare_index(op, self._aligned(op, self.tokens))
            return
        k = self._aligned(op, op.Add(op.Mul(self.blocks, g.block_size), COARSE_FACTOR * g.kernel_size))
        windows = op.Mul(self.blocks, g.block_size // g.kernel_stride)
        self.k1 = self._pool(op, k, 1, windows)
        if g.lse == "coarse":
            self.k2 = self._pool(op, k, COARSE_FACTOR, ceil_div(op, windows, COARSE_FACTOR))

    def _aligned(self, op: OpBuilder, room: Value) -> Value:
        """Keys float32 ``[R, D, room]`` from each sequence's own first key on."""
        k, dim = self.k, dim_size(op, self.k, 3)
        if self.key_mask is not None:
            index = self._in_rows(op, self.length_k)
            tokens = op.Transpose(k, perm=[0, 2, 1, 3])  # [B, Lk, Hkv, D]
            tokens = reshape(op, tokens, op.Mul(self.batch, self.length_k), self.heads, dim)
            k = op.Transpose(op.Gather(tokens, index, axis=0), perm=[0, 2, 1, 3])
        k = op.Cast(reshape(op, k, op.Mul(self.batch, self.heads), self.length_k, dim), to=FLOAT)
        k = op.Transpose(k, perm=[0, 2, 1])  # [R, D, Lk]
        return op.Pad(k, shape_vector(op, 0, 0, 0, 0, 0, op.Sub(room, self.length_k)), 0.0)

    def _in_rows(self, op: OpBuilder, count: Value) -> Value:
        """Where the first tokens of each sequence stand among all rows' keys, the last key for more: ``[B, count]``."""
        index = op.Add(op.Unsqueeze(self.first, [1]), arange(op, count))
        row = op.Mul(op.Unsqueeze(arange(op, self.batch), [1]), self.length_k)
        return op.Add(op.Min(index, op.Sub(self.length_k, 1)), row)

    def _prepare_index(self, op: OpBuilder, k: Value) -> None:
        """Index keys ``[R, d, N]`` as they are stored and read again, and which of these tokens are valid."""
        g = self.geometry
        if len(g.channels) == 1:
            index = op.Gather(k, list(g.channels[0]), axis=1)
        else:
            dim, heads = dim_size(op, self.k, 3), len(g.channels)
            of_head = [head for head in range(heads) for _ in g.channels[0]]
            places = op.Add(op.Mul(of_head, dim), [channel for channels in g.channels for channel in channels])
            index = op.Gather(reshape(op, k, self.batch, op.Mul(dim, heads), self.tokens), places, axis=1)
            index = reshape(op, index, -1, g.score_dims, self.tokens)
        if g.score_dtype != "key":
            scale = op.Div(op.ReduceMax(op.Abs(index), [1], keepdims=1), INDEX_HIGHEST[g.score_dtype])
            parts = op.Div(index, op.Where(op.Greater(scale, 0.0), scale, 1.0))
            if g.score_dtype == "fp8":  # three bits of mantissa, exponents from -6 on
                exponent = op.Floor(op.Div(op.Log(op.Max(op.Abs(parts), 2.0**-6)), math.log(2.0)))
                step = op.Pow(2.0, op.Sub(exponent, 3.0))
                parts = op.Mul(op.Round(op.Div(parts, step)), step)
            index = op.Mul(op.Round(parts) if g.score_dtype == "int8" else parts, scale)
        self.index = index
        if self.key_mask is not None:
            self.valid = op.Gather(reshape(op, self.key_mask, -1), self._in_rows(op, self.tokens), axis=0)  # [B, N]

    def _pool(self, op: OpBuilder, k: Value, factor: int, count: Value) -> _Windows:
        """Means of windows, rounded to the type of the keys."""
        size, stride = factor * self.geometry.kernel_size, factor * self.geometry.kernel_stride
        pooled = op.Slice(op.AveragePool(k, kernel_shape=[size], strides=[stride]), [0], count, [2])
        pooled = op.Cast(op.CastLike(pooled, self.k), to=FLOAT)
        ends = op.Add(op.Mul(arange(op, count), stride), size - 1)
        return _Windows(pooled, ends, size - 1)

    def _attend_chunk(self, op: OpBuilder, number: Value) -> Value:
        """The output of one chunk of queries of one key/value head, ``[C, G, Dv]``."""
        self.row = op.Div(number, self.chunks)
        row_in_batch = op.Div(self.row, self.heads)
        start, self.length = (op.Gather(x, row_in_batch, axis=0) for x in (self.start, self.lengths))
        lead = op.Mod(start, self.geometry.query_block)  # chunks begin with a tile
        index = op.Mul(op.Mod(number, self.chunks), self.chunk)
        index = op.Sub(op.Add(index, arange(op, self.chunk)), lead)  # [C]
        position = op.Add(start, index)
        at_key = op.Clip(position, 0, self._last_key(op))
        inside = op.Max(op.Min(index, op.Sub(self.length_q, 1)), 0)
        q = op.Gather(self.queries, op.Add(op.Mul(self.row, self.length_q), inside), axis=0)
        q = op.Mul(op.Cast(q, to=FLOAT), self.node.scale)  # [C, G, D]

        def select(op: OpBuilder) -> Value:
            real = op.And(op.GreaterOrEqual(index, 0), op.Less(index, self.length_q))
            return self._select(op, q, position, at_key, real)

        sparse = op.GreaterOrEqual(self.length, self.node.dense_len)
        chosen = if_else(op, sparse, select, lambda op: self._candidates(op, at_key), BOOL)  # [C, n_blocks]
        return self._attend(op, q, position, at_key, chosen, row_in_batch)

    def _last_key(self, op: OpBuilder) -> Value:
        """Position of the last key of the sequence, a scalar; 0 if there is none."""
        return op.Squeeze(op.Max(op.Sub(self.length, 1), 0), [0])

    def _candidates(self, op: OpBuilder, last: Value) -> Value:
        """Blocks that begin at or before a position and do not lie wholly before its window, ``[T, n_blocks]``."""
        size = self.geometry.block_size
        last = op.Unsqueeze(last, [1])
        candidates = op.LessOrEqual(self.block, op.Div(last, size))
        if self.node.window:
            block_end = op.Add(op.Mul(self.block, size), size - 1)
            candidates = op.And(candidates, op.Greater(block_end, op.Sub(last, self.node.window)))
        return candidates

    def _select(self, op: OpBuilder, q: Value, position: Value, at_key: Value, real: Value) -> Value:
        """The blocks that every query of a chunk visits, ``[C, n_blocks]``.

        Args:
            op: builder of the branch.
            q: scaled queries ``[C, G, D]``.
            position: positions ``[C]`` in the sequence, also outside it.
            at_key: the same, clipped to the sequence.
            real: which queries exist, ``[C]``.
        """
        g, m = self.geometry, self.geometry.query_block
        if m == 1:
            last = at_key  # [T]: the position that decides what a tile sees
        else:
            first_of_tile = op.Slice(position, [0], self.chunk, [0], [m])
            last = op.Clip(op.Add(first_of_tile, m - 1), 0, self._last_key(op))
        rank = op.Where(self._candidates(op, last), self._ranks(op, q, position, last, real), NO_CANDIDATE)
        budget = op.Min(self.blocks, [g.selected_blocks])
        _, best = op.TopK(rank, budget, axis=1, _outputs=2)  # of equal ranks the lower block comes first
        none = op.Expand(0.0, op.Shape(rank))
        taken = op.ScatterElements(none, best, op.Expand(1.0, op.Shape(best)), axis=1)
        chosen = op.And(op.Greater(taken, 0.5), self._candidates(op, last))
        if m > 1:
            chosen = op.Expand(op.Unsqueeze(chosen, [1]), [1, m, 1])
            chosen = reshape(op, chosen, self.chunk, self.blocks)
        return chosen

    def _ranks(self, op: OpBuilder, q: Value, position: Value, last: Value, real: Value) -> Value:
        """What candidates are taken by, the highest first, ``[T, n_blocks]``: scores, and `FORCED`."""
        g = self.geometry
        shares = None
        if g.query_block > 1:
            inside = op.And(op.GreaterOrEqual(position, 0), op.Less(position, self.length))
            shares = op.Unsqueeze(op.Cast(op.And(real, inside), to=FLOAT), [1])
            shares = op.Expand(shares, shape_vector(op, 1, self.group))
            shares = reshape(op, shares, dim_size(op, last, 0), -1, 1)
        q = reshape(op, q, -1, dim_size(op, q, 2))  # [C * G, D]
        ranks = (self._window_ranks if g.scorer == "pooled" else self._token_ranks)(op, q, last, shares)
        own = op.Unsqueeze(op.Div(last, g.block_size), [1])
        local = op.GreaterOrEqual(self.block, op.Sub(own, g.local_blocks))
        return op.Where(op.Or(op.Less(self.block, g.init_blocks), local), FORCED, ranks)

    def _window_ranks(self, op: OpBuilder, q: Value, last: Value, shares: Value | None) -> Value:
        """Scores of blocks by compressed keys, `UNSCORED` where none is visible, ``[T, n_blocks]``."""
        g = self.geometry
        logits, visible = self._window_logits(op, q, self.k1, last)  # [T, m * G, n1], [T, n1]
        if g.lse == "coarse":
            normaliser, seen = self._window_logits(op, q, self.k2, last)
            first_end = self.k2.first_end
        else:
            normaliser, seen, first_end = logits, visible, self.k1.first_end
        normaliser = op.Where(op.Unsqueeze(seen, [1]), normaliser, HIDDEN)
        scores = self._weights(op, logits, normaliser, shares)  # [T, n1]
        scores = op.Where(op.GreaterOrEqual(op.Unsqueeze(last, [1]), first_end), scores, 0.0)
        scores = op.Where(visible, scores, UNSCORED)
        per_block, before = g.block_size // g.kernel_stride, g.kernel_size // g.kernel_stride - 1
        ranks = op.MaxPool(
            op.Unsqueeze(scores, [1]), kernel_shape=[per_block + before], strides=[per_block], pads=[before, 0]
        )  # the windows that overlap a block begin up to `before` windows ahead of it
        return op.Squeeze(ranks, [1])

    def _token_ranks(self, op: OpBuilder, q: Value, last: Value, shares: Value | None) -> Value:
        """Scores of blocks by their largest token, `UNSCORED` where none is visible, ``[T, n_blocks]``."""
        g = self.geometry
        if len(g.channels) == 1:
            q = op.Gather(q, list(g.channels[0]), axis=1)
        else:
            table = op.Constant(value=ir.tensor(g.channels, ir.DataType.INT64))
            q = op.Gather(q, op.Squeeze(op.Gather(table, op.Mod(self.row, self.heads), axis=0), [0]), axis=1)
        tiles, token, last = dim_size(op, last, 0), arange(op, self.tokens), op.Unsqueeze(last, [1])
        visible = op.LessOrEqual(token, last)  # [T, N]
        if self.node.window:
            visible = op.And(visible, op.Greater(token, op.Sub(last, self.node.window)))
        if self.key_mask is not None:
            visible = op.And(visible, op.Gather(self.valid, op.Div(self.row, self.heads), axis=0))
        logits = self._capped(op, op.MatMul(q, op.Squeeze(op.Gather(self.index, self.row, axis=0), [0])))
        logits = op.Where(op.Unsqueeze(visible, [1]), reshape(op, logits, tiles, -1, self.tokens), HIDDEN)
        maxima = op.ReduceMax(reshape(op, logits, tiles, -1, self.blocks, g.block_size), [3], keepdims=0)
        seen = op.Greater(op.ReduceMax(maxima, [1], keepdims=0), HIDDEN / 2)  # [T, n_blocks]
        return op.Where(seen, self._weights(op, maxima, maxima, shares), UNSCORED)

    def _weights(self, op: OpBuilder, logits: Value, normaliser: Value, shares: Value | None) -> Value:
        """Sums ``[T, n]`` over a tile's queries and heads of the weights of logits ``[T, m * G, n]``.

        Args:
            op: builder of the branch.
            logits: the logits.
            normaliser: what they are normalised over, in the last dimension.
            shares: 1 for each row of a tile that is a query, else 0, ``[T, m * G, 1]``; None: all are.
        """
        top = op.ReduceMax(normaliser, [2], keepdims=1)
        total = op.ReduceSum(op.Exp(op.Sub(normaliser, top)), [2], keepdims=1)
        weights = op.Exp(op.Sub(logits, op.Add(top, op.Log(total))))
        if shares is not None:
            weights = op.Where(op.Greater(shares, 0.5), weights, 0.0)
        return op.Min(op.ReduceSum(weights, [1], keepdims=0), HIGHEST)

    def _window_logits(self, op: OpBuilder, q: Value, windows: _Windows, last: Value) -> tuple[Value, Value]:
        """Products with compressed keys ``[T, m * G, n]``, and which of these a tile sees, ``[T, n]``."""
        keys = op.Squeeze(op.Gather(windows.means, self.row, axis=0), [0])  # [D, n]
        logits = self._capped(op, op.MatMul(q, keys))
        logits = reshape(op, logits, dim_size(op, last, 0), -1, dim_size(op, windows.ends, 0))
        return logits, op.LessOrEqual(windows.ends, op.Unsqueeze(last, [1]))

    def _attend(
        self, op: OpBuilder, q: Value, position: Value, at_key: Value, chosen: Value, row_in_batch: Value
    ) -> Value:
        """Attention of a chunk over the blocks that any of its queries visits, ``[C, G, Dv]``.

        Online softmax over steps of some blocks: ``top`` is the highest score of a row so far, ``total`` and ``sums``
        are relative to it.
        """
        size = self.geometry.block_size
        visited = op.ReduceMax(op.Cast(chosen, to=FLOAT), [0], keepdims=0)  # [n_blocks]
        _, order = op.TopK(visited, self.blocks, _outputs=2)  # of equal ones the first block comes first
        count = op.Cast(op.ReduceSum(visited, [0], keepdims=1), to=INT64)
        width = op.Min(self.blocks, [max(1, STEP_TOKENS // size)])  # blocks in a step
        rows = reshape(op, q, -1, dim_size(op, q, 2))  # [C * G, D]
        place = op.Unsqueeze(at_key, [1])
        first_row = op.Mul(self.row, self.length_k)
        begin = op.Gather(self.first, row_in_batch, axis=0) if self.key_mask is not None else None

        def step(op: OpBuilder, number: Value, top: Value, total: Value, sums: Value) -> Sequence[Value]:
            slot = op.Add(op.Mul(number, width), arange(op, width))
            block = op.Gather(order, op.Min(slot, op.Sub(self.blocks, 1)), axis=0)  # [width]
            tokens = op.Add(op.Unsqueeze(op.Mul(block, size), [1]), op.Range(0, size, 1))  # [width, size]
            index = tokens = reshape(op, tokens, -1)
            if begin is not None:
                index = op.Add(tokens, begin)
            index = op.Min(index, op.Sub(self.length_k, 1))
            at_row = op.Add(first_row, index)
            keys, values = (op.Cast(op.Gather(x, at_row, axis=0), to=FLOAT) for x in (self.keys, self.values))
            visible = op.And(op.Gather(chosen, block, axis=1), op.Less(slot, count))  # [C, width]
            visible = op.Expand(op.Unsqueeze(visible, [2]), [1, 1, size])
            visible = op.And(reshape(op, visible, self.chunk, -1), op.LessOrEqual(tokens, place))
            if self.node.window:
                visible = op.And(visible, op.Greater(tokens, op.Sub(place, self.node.window)))
            if self.key_mask is not None:
                at_mask = op.Add(op.Mul(row_in_batch, self.length_k), index)
                visible = op.And(visible, op.Gather(reshape(op, self.key_mask, -1), at_mask, axis=0))
            logits = self._capped(op, op.MatMul(rows, op.Transpose(keys, perm=[1, 0])))
            if self.bias is not None:
                bias = op.Gather(self.bias, at_row, axis=0)
                visible = op.And(visible, op.Greater(bias, LEAST_BIAS))
                logits = op.Add(logits, bias)
            logits = reshape(op, logits, self.chunk, self.group, -1)
            logits = op.Where(op.Unsqueeze(visible, [1]), logits, HIDDEN)
            logits = reshape(op, logits, -1, dim_size(op, tokens, 0))  # [C * G, width * size]
            higher = op.Max(top, op.ReduceMax(logits, [1], keepdims=1))
            weights, fading = op.Exp(op.Sub(logits, higher)), op.Exp(op.Sub(top, higher))
            total = op.Add(op.Mul(total, fading), op.ReduceSum(weights, [1], keepdims=1))
            return higher, total, op.Add(op.Mul(sums, fading), op.MatMul(weights, values))

        column = shape_vector(op, dim_size(op, rows, 0), 1)
        sums = op.Expand(0.0, shape_vector(op, dim_size(op, rows, 0), dim_size(op, self.v, 3)))
        start = op.Expand(HIDDEN, column), op.Expand(0.0, column), sums
        if self.sinks is not None:  # a row begins with its sink, which has no value
            sink = op.Gather(self.sinks, op.Mod(self.row, self.heads), axis=0)  # [1, 1, G]
            sink = reshape(op, op.Expand(sink, shape_vector(op, 1, self.chunk, 1)), -1, 1)
            first = op.Max(sink, HIDDEN)
            start = first, op.Exp(op.Sub(sink, first)), sums
        steps = op.Div(op.Sub(op.Add(count, width), 1), width)
        top, total, sums = loop(op, "step", steps, step, *start, outputs=3)
        # A row that saw no key has weighed hidden ones all alike.
        out = op.Where(op.Greater(top, HIDDEN / 2), op.Div(sums, total), 0.0)
        out = reshape(op, out, self.chunk, self.group, -1)
        return op.Where(op.Unsqueeze(op.GreaterOrEqual(position, 0), [1, 2]), out, 0.0)

    def _in_order(self, op: OpBuilder, out: Value) -> Value:
        """``[B, Hq, Lq, Dv]`` from the outputs of all chunks."""
        m = self.geometry.query_block
        dim = dim_size(op, self.v, 3)
        padded = op.Mul(self.chunks, self.chunk)
        if m > 1:  # rows begin where their first tile does
            out = reshape(op, out, self.batch, op.Mul(self.heads, padded), op.Mul(self.group, dim))
            lead = op.Unsqueeze(op.Mod(self.start, m), [1, 2])  # [B, 1, 1]
            head = op.Unsqueeze(op.Mul(arange(op, self.heads), padded), [0, 2])  # [1, Hkv, 1]
            index = op.Add(op.Add(lead, head), arange(op, self.length_q))
            index = reshape(op, index, self.batch, -1, 1)
            out = op.GatherND(out, index, batch_dims=1)  # [B, Hkv * Lq, G * Dv]
            out = reshape(op, out, self.batch, self.heads, self.length_q, self.group, dim)
        else:
            out = reshape(op, out, self.batch, self.heads, padded, self.group, dim)
            out = op.Slice(out, [0], self.length_q, [2])
        out = op.Transpose(out, perm=[0, 1, 3, 2, 4])  # [B, Hkv, G, Lq, Dv]
        out = reshape(op, out, self.batch, op.Mul(self.heads, self.group), self.length_q, dim)
        return op.CastLike(out, self.q)
