"""The ONNX operator ``infllm::InfLLMV2Attention`` and its body of standard operators.

The node is what a runtime with a kernel of that name takes; its attributes say all that the operator computes. Every
other runtime runs the body, a model-local function. The switch is an ``If`` inside it.

Memory: queries go through a loop, a chunk of one key/value head at a time, so that block scores take
``chunk x N / kernel_stride`` and attention ``chunk x keys that the chunk visits`` numbers. Nothing is N x N.

Semantics: arXiv 2509.24663, section 3, as in `kernels.reference`. Arithmetic is float32 whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import FunctionProto, TensorProto

from infllm_pass.kernels.geometry import COARSE_FACTOR

from .graph_builder import Body, Value
from .op_spec import DOMAIN, NAME, AttentionNode

CHUNK_ROWS = 256
"""Query rows (tokens x group) that go through the body at once: 256 x 8k float32 block scores are 8 MB at 128k."""

STEP_TOKENS = 1024
"""Keys that attention takes at once."""

HIDDEN = -1e30
"""Score of a key that a query does not see. Finite, so that a row of nothing else has no NaN."""

FORCED, HIGHEST, UNSCORED, NO_CANDIDATE = 3e38, 1e38, -1.0, -2.0
"""Ranks of blocks that are always taken, and of those that no score makes comparable: scores are not negative."""

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def attention_function(node: AttentionNode, opset: int, overload: str = "") -> FunctionProto:
    """The body of a node as a model-local function.

    Its inputs are q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]``, v ``[B, Hkv, Lk, Dv]``, and, as the node has them,
    key_mask bool ``[B, Lk]`` and offset int64 ``[1]`` or ``[B]``, the key index of the first query; keys after the last
    query then are free slots of a cache. Its output is
    ``[B, Hq, Lq, Dv]`` in q's type; a query that sees no key gives 0.

    Args:
        node: what to compute. The body is written for these numbers.
        opset: version of the default domain, at least 18.
        overload: tells functions of one name apart in one model.
    """
    writer = _Writer(node)
    out = writer.write()
    return writer.body.function(DOMAIN, NAME, out, opset=opset, attributes=tuple(node.attributes), overload=overload)


@dataclass(frozen=True)
class _Windows:
    """Compressed keys ``[R, D, n]``, the last position of each window ``[n]``, and that of the first window."""

    means: Value
    ends: Value
    first_end: int


class _Writer:
    """Writes the body of one node.

    ``R = B x Hkv`` counts sequences of one key/value head, ``T`` tiles of ``query_block`` queries in a chunk of ``C``.
    """

    def __init__(self, node: AttentionNode) -> None:
        self.node = node
        self.geometry = node.geometry
        self.body = Body(node.inputs)

    def write(self) -> Value:
        b, m = self.body, self.geometry.query_block
        inputs = dict(zip(self.node.inputs, b.inputs, strict=True))
        self.q, self.k, self.v = inputs["q"], inputs["k"], inputs["v"]
        self.batch, self.heads = b.size(self.k, 0), b.size(self.k, 1)
        self.group = b.size(self.q, 1) // self.heads
        self.length_q, self.length_k = b.size(self.q, 2), b.size(self.k, 2)
        self._place_sequences(inputs)

        self.queries = self._token_rows(self.q, self.group)  # [R * Lq, G, D]
        self.keys = b.reshape(self.k, -1, b.size(self.k, 3))  # [R * Lk, D]
        self.values = b.reshape(self.v, -1, b.size(self.v, 3))  # [R * Lk, Dv]
        self.blocks = (self.length_k + (self.geometry.block_size - 1)) // self.geometry.block_size
        self.block = b.arange(self.blocks)
        self._compress()

        rows = b.op("Max", b.op("Div", CHUNK_ROWS, self.group), [1]) + (m - 1)
        most = (self.length_q + (2 * m - 2)) // m * m  # what a chunk holds at most, whole tiles
        self.chunk = b.op("Min", rows // m * m, most)
        self.chunks = (self.length_q + (m - 1) + self.chunk - 1) // self.chunk
        out = b.each(self.batch * self.heads * self.chunks, self._attend_chunk, FLOAT)  # [R * chunks, C, G, Dv]
        return self._in_order(out)

    def _place_sequences(self, inputs: dict[str, Value]) -> None:
        """First key, length and position of the first query of every row, int64 ``[B]`` each."""
        b = self.body
        offset = inputs.get("offset", self.length_k - self.length_q)
        self.start = b.op("Expand", offset, self.batch)
        self.key_mask = inputs.get("key_mask")
        end = b.op("Expand", self.length_k, self.batch)
        if self.key_mask is not None:
            index = b.arange(self.length_k)
            ends = b.op("Where", self.key_mask, index + 1, 0)
            first = b.op("ReduceMin", b.op("Where", self.key_mask, index, self.length_k), [1], keepdims=0)
            end = b.op("ReduceMax", ends, [1], keepdims=0)
            self.first = b.op("Min", first, end)
        if self.node.placed:  # what follows the last query are free slots of a cache
            end = b.op("Max", b.op("Min", end, self.start + self.length_q), 0)
            if self.key_mask is not None:
                end = b.op("Max", end, self.first)
        self.lengths = end
        if self.key_mask is not None:
            self.lengths = end - self.first
            self.start = self.start - self.first

    def _token_rows(self, x: Value, heads: Value) -> Value:
        """``[B, H x heads, L, D]`` as ``[B x H x L, heads, D]``: one row for each token of a key/value head."""
        b = self.body
        dim = b.size(x, 3)
        grouped = b.reshape(x, self.batch * self.heads, heads, -1, dim)
        return b.reshape(b.op("Transpose", grouped, perm=[0, 2, 1, 3]), -1, heads, dim)

    def _compress(self) -> None:
        """Compressed keys of whole sequences, ``K1`` and ``K2``, as ``[R, D, n]`` with ``n`` for whole blocks.

        Windows that reach over the end are of no consequence: no query sees them.
        """
        b, g = self.body, self.geometry
        k, dim = self.k, b.size(self.k, 3)
        if self.key_mask is not None:  # sequences begin at their own first key
            index = b.op("Unsqueeze", self.first, [1]) + b.arange(self.length_k)
            index = b.op("Min", index, self.length_k - 1) + b.op("Unsqueeze", b.arange(self.batch), [1]) * self.length_k
            tokens = b.op("Transpose", k, perm=[0, 2, 1, 3])  # [B, Lk, Hkv, D]
            tokens = b.reshape(tokens, self.batch * self.length_k, self.heads, dim)
            k = b.op("Transpose", b.op("Gather", tokens, index, axis=0), perm=[0, 2, 1, 3])
        k = b.cast(b.reshape(k, self.batch * self.heads, self.length_k, dim), FLOAT)
        k = b.op("Transpose", k, perm=[0, 2, 1])  # [R, D, Lk]
        padding = self.blocks * g.block_size + COARSE_FACTOR * g.kernel_size - self.length_k
        k = b.op("Pad", k, b.shape(0, 0, 0, 0, 0, padding), 0.0)
        windows = self.blocks * (g.block_size // g.kernel_stride)
        self.k1 = self._pool(k, 1, windows)
        if g.lse == "coarse":
            self.k2 = self._pool(k, COARSE_FACTOR, (windows + (COARSE_FACTOR - 1)) // COARSE_FACTOR)

    def _pool(self, k: Value, factor: int, count: Value) -> _Windows:
        """Means of windows, rounded to the type of the keys."""
        b, g = self.body, self.geometry
        pooled = b.op("AveragePool", k, kernel_shape=[factor * g.kernel_size], strides=[factor * g.kernel_stride])
        pooled = b.cast(b.op("CastLike", b.op("Slice", pooled, [0], count, [2]), self.k), FLOAT)
        ends = b.arange(count) * (factor * g.kernel_stride) + (factor * g.kernel_size - 1)
        return _Windows(pooled, ends, factor * g.kernel_size - 1)

    def _attend_chunk(self, number: Value) -> Value:
        """The output of one chunk of queries of one key/value head, ``[C, G, Dv]``."""
        b = self.body
        self.row = number // self.chunks
        row_in_batch = self.row // self.heads
        start, self.length = (b.op("Gather", x, row_in_batch, axis=0) for x in (self.start, self.lengths))
        lead = start % self.geometry.query_block  # chunks begin with a tile
        index = number % self.chunks * self.chunk + b.arange(self.chunk) - lead  # [C]
        position = start + index
        at_key = b.op("Clip", position, 0, b.op("Squeeze", b.op("Max", self.length - 1, 0), [0]))
        inside = b.op("Max", b.op("Min", index, self.length_q - 1), 0)
        q = b.op("Gather", self.queries, self.row * self.length_q + inside, axis=0)
        q = b.cast(q, FLOAT) * self.node.scale  # [C, G, D]

        sparse = self.length >= self.node.dense_len
        chosen = b.branch(
            sparse,
            lambda: self._select(q, position, at_key, (index >= 0) & (index < self.length_q)),
            lambda: self._candidates(at_key),
            BOOL,
        )  # [C, n_blocks]
        return self._attend(q, position, at_key, chosen, row_in_batch)

    def _candidates(self, last: Value) -> Value:
        """Blocks that begin at or before a position and do not lie wholly before its window, ``[T, n_blocks]``."""
        b, size = self.body, self.geometry.block_size
        last = b.op("Unsqueeze", last, [1])
        candidates: Value = self.block <= last // size
        if self.node.window:
            candidates = candidates & (self.block * size + (size - 1) > last - self.node.window)
        return candidates

    def _select(self, q: Value, position: Value, at_key: Value, real: Value) -> Value:
        """The blocks that every query of a chunk visits, ``[C, n_blocks]``.

        Args:
            q: scaled queries ``[C, G, D]``.
            position: positions ``[C]`` in the sequence, also outside it.
            at_key: the same, held inside the sequence.
            real: which queries exist, ``[C]``.
        """
        b, g, m = self.body, self.geometry, self.geometry.query_block
        if m == 1:
            last = at_key  # [T]: the position that decides what a tile sees
        else:
            first_of_tile = b.op("Slice", position, [0], self.chunk, [0], [m])
            top = b.op("Squeeze", b.op("Max", self.length - 1, 0), [0])
            last = b.op("Clip", first_of_tile + (m - 1), 0, top)
        rank = b.op("Where", self._candidates(last), self._ranks(q, position, last, real), NO_CANDIDATE)
        budget = b.op("Min", self.blocks, [g.selected_blocks])
        _, best = b.op("TopK", rank, budget, axis=1, outputs=2)  # of equal ranks the lower block comes first
        none = b.op("Expand", 0.0, b.op("Shape", rank))
        taken = b.op("ScatterElements", none, best, b.op("Expand", 1.0, b.op("Shape", best)), axis=1)
        chosen = (taken > 0.5) & self._candidates(last)
        if m > 1:
            chosen = b.op("Expand", b.op("Unsqueeze", chosen, [1]), b.shape(1, m, 1))
            chosen = b.reshape(chosen, self.chunk, self.blocks)
        return chosen

    def _ranks(self, q: Value, position: Value, last: Value, real: Value) -> Value:
        """What candidates are taken by, the highest first, ``[T, n_blocks]``: scores, and `FORCED`."""
        b, g = self.body, self.geometry
        tiles = b.size(last, 0)
        q = b.reshape(q, -1, b.size(q, 2))  # [C * G, D]
        row_shape = (tiles, -1)

        logits, visible = self._window_logits(q, self.k1, last)  # [T, m * G, n1], [T, n1]
        if g.lse == "coarse":
            normaliser, seen = self._window_logits(q, self.k2, last)
            first_end = self.k2.first_end
        else:
            normaliser, seen, first_end = logits, visible, self.k1.first_end
        normaliser = b.op("Where", b.op("Unsqueeze", seen, [1]), normaliser, HIDDEN)
        top = b.op("ReduceMax", normaliser, [2], keepdims=1)
        total = b.op("ReduceSum", b.op("Exp", normaliser - top), [2], keepdims=1)
        scores = b.op("Exp", logits - (top + b.op("Log", total)))  # [T, m * G, n1]
        if g.query_block > 1:
            real = real & (position >= 0) & (position < self.length)
            shares = b.op("Expand", b.op("Unsqueeze", b.cast(real, FLOAT), [1]), b.shape(1, self.group))
            scores = b.op("Where", b.reshape(shares, *row_shape, 1) > 0.5, scores, 0.0)
        scores = b.op("Min", b.op("ReduceSum", scores, [1], keepdims=0), HIGHEST)  # [T, n1]
        scores = b.op("Where", b.op("Unsqueeze", last, [1]) >= first_end, scores, 0.0)
        scores = b.op("Where", visible, scores, UNSCORED)

        per_block, before = g.block_size // g.kernel_stride, g.kernel_size // g.kernel_stride - 1
        ranks = b.op(
            "MaxPool",
            b.op("Unsqueeze", scores, [1]),
            kernel_shape=[per_block + before],
            strides=[per_block],
            pads=[before, 0],
        )  # the windows that overlap a block begin up to `before` windows ahead of it
        ranks = b.op("Squeeze", ranks, [1])
        own = b.op("Unsqueeze", last // g.block_size, [1])
        forced = (self.block < g.init_blocks) | (self.block >= own - g.local_blocks)
        return b.op("Where", forced, FORCED, ranks)

    def _window_logits(self, q: Value, windows: _Windows, last: Value) -> tuple[Value, Value]:
        """Products with compressed keys ``[T, m * G, n]``, and which of these a tile sees, ``[T, n]``."""
        b = self.body
        keys = b.op("Squeeze", b.op("Gather", windows.means, self.row, axis=0), [0])  # [D, n]
        logits = b.reshape(b.op("MatMul", q, keys), b.size(last, 0), -1, b.size(windows.ends, 0))
        return logits, windows.ends <= b.op("Unsqueeze", last, [1])

    def _attend(self, q: Value, position: Value, at_key: Value, chosen: Value, row_in_batch: Value) -> Value:
        """Attention of a chunk over the blocks that any of its queries visits, ``[C, G, Dv]``.

        The blocks come in steps, and softmax is carried from one to the next: ``top`` is the highest score of a row
        so far, ``total`` and ``sums`` are relative to it.
        """
        b, size = self.body, self.geometry.block_size
        visited = b.op("ReduceMax", b.cast(chosen, FLOAT), [0], keepdims=0)  # [n_blocks]
        _, order = b.op("TopK", visited, self.blocks, outputs=2)  # of equal ones the first block comes first
        count = b.cast(b.op("ReduceSum", visited, [0], keepdims=1), INT64)
        width = b.op("Min", self.blocks, [max(1, STEP_TOKENS // size)])  # blocks in a step
        rows = b.reshape(q, -1, b.size(q, 2))  # [C * G, D]
        place = b.op("Unsqueeze", at_key, [1])
        first_row = self.row * self.length_k
        begin = b.op("Gather", self.first, row_in_batch, axis=0) if self.key_mask is not None else None

        def step(number: Value, state: Sequence[Value]) -> Sequence[Value]:
            top, total, sums = state
            slot = number * width + b.arange(width)
            block = b.op("Gather", order, b.op("Min", slot, self.blocks - 1), axis=0)  # [width]
            tokens = b.op("Unsqueeze", block * size, [1]) + b.op("Range", 0, size, 1)  # [width, size]
            index = tokens = b.reshape(tokens, -1)
            if begin is not None:
                index = tokens + begin
            index = b.op("Min", index, self.length_k - 1)
            keys, values = (
                b.cast(b.op("Gather", x, first_row + index, axis=0), FLOAT) for x in (self.keys, self.values)
            )
            visible = b.op("Gather", chosen, block, axis=1) & (slot < count)  # [C, width]
            visible = b.op("Expand", b.op("Unsqueeze", visible, [2]), b.shape(1, 1, size))
            visible = b.reshape(visible, self.chunk, -1) & (tokens <= place)
            if self.node.window:
                visible = visible & (tokens > place - self.node.window)
            if self.key_mask is not None:
                mask = b.op("Gather", b.reshape(self.key_mask, -1), row_in_batch * self.length_k + index, axis=0)
                visible = visible & mask
            logits = b.op("MatMul", rows, b.op("Transpose", keys, perm=[1, 0]))
            logits = b.reshape(logits, self.chunk, self.group, -1)
            logits = b.op("Where", b.op("Unsqueeze", visible, [1]), logits, HIDDEN)
            logits = b.reshape(logits, -1, b.size(tokens, 0))  # [C * G, width * size]
            higher = b.op("Max", top, b.op("ReduceMax", logits, [1], keepdims=1))
            weights, fading = b.op("Exp", logits - higher), b.op("Exp", top - higher)
            total = total * fading + b.op("ReduceSum", weights, [1], keepdims=1)
            return higher, total, sums * fading + b.op("MatMul", weights, values)

        one = b.shape(b.size(rows, 0), 1)
        start = (
            b.op("Expand", HIDDEN, one),
            b.op("Expand", 0.0, one),
            b.op("Expand", 0.0, b.shape(b.size(rows, 0), b.size(self.v, 3))),
        )
        top, total, sums = b.repeat((count + width - 1) // width, start, step)
        # A row that saw no key has weighed hidden ones all alike.
        out = b.op("Where", top > HIDDEN / 2, b.op("Div", sums, total), 0.0)
        out = b.reshape(out, self.chunk, self.group, -1)
        return b.op("Where", b.op("Unsqueeze", position >= 0, [1, 2]), out, 0.0)

    def _in_order(self, out: Value) -> Value:
        """``[B, Hq, Lq, Dv]`` from the outputs of all chunks."""
        b, m = self.body, self.geometry.query_block
        dim = b.size(self.v, 3)
        padded = self.chunks * self.chunk
        if m > 1:  # rows begin where their first tile does
            out = b.reshape(out, self.batch, self.heads * padded, self.group * dim)
            lead = b.op("Unsqueeze", self.start % m, [1, 2])  # [B, 1, 1]
            head = b.op("Unsqueeze", b.arange(self.heads) * padded, [0, 2])  # [1, Hkv, 1]
            index = b.reshape(lead + head + b.arange(self.length_q), self.batch, -1, 1)
            out = b.op("GatherND", out, index, batch_dims=1)  # [B, Hkv * Lq, G * Dv]
            out = b.reshape(out, self.batch, self.heads, self.length_q, self.group, dim)
        else:
            out = b.reshape(out, self.batch, self.heads, padded, self.group, dim)
            out = b.op("Slice", out, [0], self.length_q, [2])
        out = b.op("Transpose", out, perm=[0, 1, 3, 2, 4])  # [B, Hkv, G, Lq, Dv]
        out = b.reshape(out, self.batch, self.heads * self.group, self.length_q, dim)
        return b.op("CastLike", out, self.q)
