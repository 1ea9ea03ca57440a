"""Where every batch row's sequence lies, and which of its queries stand on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """One batch row's sequence: from its first to its last valid key.

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


def sequences(batch: int, length_q: int, length_k: int, offset: int, key_mask: Tensor | None) -> Iterator[Sequence]:
    """The sequences of a batch that some query stands on.

    Args:
        batch: rows.
        length_q: queries in a row.
        length_k: keys in a row.
        offset: key index of the first query.
        key_mask: bool ``[batch, length_k]``, True where a key is valid; None if all are.
    """
    for row in range(batch):
        start, stop, mask = 0, length_k, None
        if key_mask is not None:
            valid = key_mask[row].nonzero()[:, 0]
            start, stop = (int(valid[0]), int(valid[-1]) + 1) if valid.numel() else (0, 0)
            if valid.numel() < stop - start:
                mask = key_mask[row, start:stop]
        low = max(0, start - offset)
        high = min(length_q, stop - offset)
        if low < high:
            yield Sequence(row, slice(start, stop), slice(low, high), offset + low - start, mask)
