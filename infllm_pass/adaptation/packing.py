"""Cuts documents to rows of one length: long ones to rows of their own, what is left over packed together."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int]
"""Where a piece of a document begins among all tokens, and where it ends."""

NO_LABEL = -100
"""The label that losses of PyTorch and transformers leave out."""


def packed_rows(documents: Sequence[Span], length: int, prefix: int, draw: random.Random) -> list[tuple[Span, ...]]:
    """Every token of the documents once, in rows that are full.

    A document longer than a row is cut every `length - prefix` tokens from a place on that is drawn: each of these
    pieces is a row. Its head and tail, and shorter documents, follow one another in an order that is drawn; where a row
    ends, a piece is cut and goes on in the next. The last of these rows is dropped if it is not full.

    Args:
        documents: where each document begins and ends.
        length: tokens of a row.
        prefix: tokens that come before every piece.
        draw: what decides; the same state gives the same rows.

    Returns:
        The pieces of each row, in an order that is drawn.
    """
    room = length - prefix
    rows: list[tuple[Span, ...]] = []
    parts: list[Span] = []
    for start, stop in documents:
        if stop - start < room:
            parts.append((start, stop))
            continue
        first = start + draw.randrange(min(room, stop - start - room + 1))
        last = first + (stop - first) // room * room
        rows += [((place, place + room),) for place in range(first, last, room)]
        parts += [part for part in ((start, first), (last, stop)) if part[0] < part[1]]
    draw.shuffle(parts)
    row: list[Span] = []
    left = length
    for start, stop in parts:
        while start < stop:
            taken = min(stop - start, left - prefix)
            row.append((start, start + taken))
            start += taken
            left -= prefix + taken
            if left <= prefix:
                rows.append(tuple(row))
                row, left = [], length
    draw.shuffle(rows)
    return rows


def written_row(ids: Tensor, row: Sequence[Span], length: int, prefix: Tensor) -> dict[str, Tensor]:
    """A row's tokens, labels and positions, int64 ``[length]`` each.

    Positions begin anew at every piece, and the first token of a piece has no label. Where a piece does not fill the
    row because there is room for a part of the prefix only, that part is a piece of its own.

    Args:
        ids: the tokens of all documents.
        row: the row's pieces.
        length: tokens of a row.
        prefix: the tokens before every piece, int64.
    """
    pieces = [torch.cat([prefix, ids[start:stop].long()]) for start, stop in row]
    missing = length - sum(map(len, pieces))
    if missing:
        pieces.append(prefix[:missing])
    return joined(pieces)


def joined(pieces: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pieces, one after the other, as tokens, labels and positions that begin anew at every piece."""
    tokens = torch.cat(list(pieces))
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
    return {"input_ids": tokens, "labels": tokens.masked_fill(positions == 0, NO_LABEL), "position_ids": positions}
