"""The sequences of a call: their keys and queries within batch rows, and what attention of one needs to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from infllm_pass.errors import ShapeError

from ..geometry import BlockGeometry
from ..params import PrefillParams


@dataclass(frozen=True)
class AttentionParams:
    """What selection and attention of one sequence read besides its tensors.

    Attributes:
        geometry: the block geometry.
        scale: softmax scale.
        offset: position of the first query.
        window: the query at position ``p`` sees keys after ``p - window`` only; None: all up to its own.
        mask: bool ``[length]``, False where a key is invalid; None if none is.
        key_bias: ``[Hkv or 1, length]``, see `PrefillParams`, as are the two that follow.
        sinks: ``[Hq]``.
        softcap: 0: none.
    """

    geometry: BlockGeometry
    scale: float
    offset: int = 0
    window: int | None = None
    mask: Tensor | None = None
    key_bias: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0


@dataclass(frozen=True)
class Sequence:
    """A sequence: the valid stretch of a batch row, or one of several packed into it.

    Attributes:
        row: the batch row.
        keys: its keys.
        queries: the queries that stand on them.
        offset: position, from the sequence's first key, of the first of these queries.
        mask: bool ``[length]``, False where a key inside the sequence is invalid; None if none is.
    """

    row: int
    keys: slice
    queries: slice
    offset: int
    mask: Tensor | None

    @property
    def length(self) -> int:
        """Keys in the sequence."""
        length: int = self.keys.stop - self.keys.start
        return length

    def params(self, call: PrefillParams) -> AttentionParams:
        """What the call says of this sequence."""
        bias = call.key_bias
        return AttentionParams(
            call.geometry,
            call.scale,
            self.offset,
            call.window,
            self.mask,
            None if bias is None else bias[self.row if bias.shape[0] > 1 else 0, :, self.keys],
            call.sinks,
            call.softcap,
        )


@dataclass(frozen=True)
class _Stretch:
    """Keys ``[start, stop)`` of a row, and its queries ``[begin, end)``, of which ``i`` stands at key ``i + shift``."""

    row: int
    start: int
    stop: int
    begin: int
    end: int
    shift: int


def sequences(q: Tensor, k: Tensor, call: PrefillParams) -> Iterator[Sequence]:
    """The sequences of a batch that some query stands on.

    Args:
        q: ``[B, Hq, Lq, D]``; of it and of k only the sizes are read.
        k: ``[B, Hkv, Lk, D]``.
        call: where sequences lie in rows.

    Raises:
        ShapeError: packed bounds descend, leave the tensors, or let a sequence cross a row.
    """
    key_mask = call.key_mask
    for stretch in (_rows if call.cu_seqlens_k is None else _packed)(q, k, call):
        row, start, stop = stretch.row, stretch.start, stretch.stop
        low = max(stretch.begin, start - stretch.shift)
        high = min(stretch.end, stop - stretch.shift)
        if low < high:
            mask = None if key_mask is None or bool(key_mask[row, start:stop].all()) else key_mask[row, start:stop]
            yield Sequence(row, slice(start, stop), slice(low, high), low + stretch.shift - start, mask)


def _rows(q: Tensor, k: Tensor, call: PrefillParams) -> Iterator[_Stretch]:
    """One stretch a row."""
    batch, length_q, offset = q.shape[0], q.shape[2], call.first_key(q, k)
    shifts = [offset] * batch if call.offsets is None else (call.offsets + offset).expand(batch).tolist()
    for row, shift in enumerate(shifts):
        start, stop = 0, k.shape[2]
        if call.key_mask is not None:
            valid = call.key_mask[row].nonzero()[:, 0]
            start, stop = (int(valid[0]), int(valid[-1]) + 1) if valid.numel() else (0, 0)
        if call.offsets is not None:
            stop = max(start, min(stop, shift + length_q))
        yield _Stretch(row, start, stop, 0, length_q, shift)


def _packed(q: Tensor, k: Tensor, call: PrefillParams) -> Iterator[_Stretch]:
    """The stretches that bounds give, without empty ones."""
    length_q, length_k = q.shape[2], k.shape[2]
    assert call.cu_seqlens_k is not None
    keys = list(pairwise(_bounds("cu_seqlens_k", call.cu_seqlens_k, q.shape[0] * length_k)))
    queries = None
    if call.cu_seqlens_q is not None:
        queries = list(pairwise(_bounds("cu_seqlens_q", call.cu_seqlens_q, length_q)))
    for number, (first, end) in enumerate(keys):
        if first == end:
            continue
        row = first // length_k
        start, stop = first - row * length_k, end - row * length_k
        if stop > length_k:
            raise ShapeError(
                f"cu_seqlens_k has a sequence of keys {first} to {end}: it crosses a row of {length_k} keys"
            )
        if queries is None:
            yield _Stretch(row, start, stop, 0, length_q, call.first_key(q, k))
        else:
            yield _Stretch(row, start, stop, *queries[number], stop - queries[number][1])


def _bounds(name: str, bounds: Tensor, total: int) -> list[int]:
    """The numbers of a tensor of bounds, ascending from 0 to `total` at most."""
    numbers: list[int] = bounds.tolist()
    if any(one > other for one, other in pairwise([0, *numbers, total])):
        raise ShapeError(f"{name} descends or leaves 0 to {total}: expected ascending bounds")
    return numbers
