"""Masks read by value: what a mask tensor that nothing is known of lets queries see, checked against every element.

A mask that is made where no graph shows it, in eager code, in another graph or by the user, comes as a tensor. Its rows
are read for their first, last and number of visible keys, and its columns for keys that nobody sees. If rows are the
valid keys of one stretch each, and the stretches are those of a causal limit, a window and packed sequences, these
few vectors say all that the tensor says.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from infllm_pass.compat.tensors import version_of, without_modes

_ELEMENTS_AT_ONCE = 1 << 26
"""Elements of a mask that are looked at together: bounds the memory that reading takes."""


@dataclass(frozen=True)
class MaskForm:
    """What masks that one graph can be compiled for have in common.

    Query ``i`` sees key ``j`` iff all of these hold: ``j <= i + offset``; ``j > i + offset - window``, if there is a
    window; the key is valid; the key is in the sequence of key ``i + offset``.

    Attributes:
        kept: what stands where a query sees a key.
        hidden: what stands elsewhere.
        offset: the key that query 0 stands at, 0; None: queries are the last of the keys.
        window: keys that a query sees at most; None: no limit.
        padded: whether some keys may be hidden from all queries.
        packed: whether rows may hold several sequences.
    """

    kept: bool | float
    hidden: bool | float
    offset: int | None
    window: int | None
    padded: bool
    packed: bool

    def covers(self, other: MaskForm) -> bool:
        """Whether what is compiled for this form is right for masks of another one."""
        extended = replace(other, padded=other.padded or self.padded, packed=other.packed or self.packed)
        return self == extended

    def joined(self, other: MaskForm) -> MaskForm:
        """A form that covers another one, and this one where both can be covered."""
        return replace(other, padded=self.padded or other.padded, packed=self.packed or other.packed)


@dataclass(frozen=True)
class MaskValue:
    """What a mask tensor was found to hold.

    Attributes:
        form: its form.
        valid: keys that some query sees, bool ``[B, Lk]``.
        sequences: numbers of the sequences that keys are in, int32 ``[B, Lk]``, ascending; zeros if there is one.
    """

    form: MaskForm
    valid: Tensor
    sequences: Tensor


@dataclass(frozen=True)
class RunsForm:
    """Numbers of sequences: along the last dimension, no number returns once another one has followed it."""

    def covers(self, other: object) -> bool:
        """Whether what is compiled for this form is right for numbers of another one."""
        return self == other


@dataclass(frozen=True)
class PositionsForm:
    """Numbers that grow by one from key to key as long as the numbers of sequences in another tensor stay the same."""

    def covers(self, other: object) -> bool:
        """Whether what is compiled for this form is right for numbers of another one."""
        return self == other


@dataclass(frozen=True)
class NumbersValue:
    """Numbers that were found to be those of sequences, or of positions in them."""

    form: RunsForm | PositionsForm


InputForm = MaskForm | RunsForm | PositionsForm
InputValue = MaskValue | NumbersValue


def joined(first: InputForm | None, form: InputForm) -> InputForm:
    """A form that covers another one, and the first where both can be covered."""
    return first.joined(form) if isinstance(first, MaskForm) and isinstance(form, MaskForm) else form


class MaskReader:
    """Reads masks, each tensor once as long as nothing is written to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def read(self, tensor: object, sequences: Sequence[object] = ()) -> InputValue | None:
        """What a tensor holds, None if it is no mask that can be said in vectors.

        Tensors of inference mode do not count what is written to them and are read anew.

        Args:
            tensor: what to read.
            sequences: tensors of numbers of sequences that it is to hold the positions of; none: it is to hold a mask
                or numbers of sequences itself.
        """
        if not may_be_read(tensor):
            return None
        if sequences:
            positions = all(are_positions(tensor, numbers) for numbers in sequences)
            return NumbersValue(PositionsForm()) if positions else None
        state = None if tensor.is_inference() else (version_of(tensor), tensor.data_ptr(), tensor.shape)
        with self._lock:
            known = self._known.get(tensor, None)  # type: ignore[no-untyped-call]
        if known is not None and state is not None and known[0] == state:
            value: InputValue | None = known[1]
            return value
        value = read_value(tensor)
        with self._lock:
            self._known[tensor] = (state, value)
        return value


READER = MaskReader()
"""The reader of this process: one mask is read once for all graphs that it is handed to."""


def may_be_read(tensor: object) -> TypeGuard[Tensor]:
    """Whether a value is a plain tensor of data that may be a mask, or numbers of sequences."""
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.layout != torch.strided or tensor.is_complex():
        return False
    return tensor.device.type in ("cpu", "cuda") and 1 <= tensor.dim() <= 4 and tensor.numel() > 0


def read_value(tensor: Tensor) -> InputValue | None:
    """What a tensor holds: numbers of sequences for integers of at most two dimensions, else a mask."""
    with without_modes(), torch.no_grad():
        if tensor.dim() <= 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            return NumbersValue(RunsForm()) if _is_in_runs(tensor) else None
        return _mask_value(tensor)


def are_positions(numbers: object, sequences: object) -> bool:
    """Whether numbers grow by one from key to key of a sequence.

    Args:
        numbers: integers ``[L]`` or ``[B, L]``.
        sequences: the numbers of the sequences, ``[L]`` or ``[B, L]``.
    """
    if not (may_be_read(numbers) and may_be_read(sequences)) or numbers.dim() > 2 or sequences.dim() > 2:
        return False
    if numbers.dtype != torch.int64 or numbers.shape[-1] != sequences.shape[-1] or numbers.device != sequences.device:
        return False
    with without_modes(), torch.no_grad():
        same = sequences[..., 1:] == sequences[..., :-1]
        return bool((~same | (numbers[..., 1:] - numbers[..., :-1] == 1)).all())


def _is_in_runs(numbers: Tensor) -> bool:
    """Whether no number of a row returns once another one has followed it."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    ordered = rows.sort(dim=1).values
    different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    return bool((starts.sum(1) == different).all())


def _mask_value(mask: Tensor) -> MaskValue | None:
    """What a mask of ``[..., Lq, Lk]`` holds, the dimensions before being batch and heads."""
    if mask.dim() < 2 or mask.shape[-2] < 2:
        return None
    batch = mask.shape[0] if mask.dim() > 2 else 1
    if mask.dim() == 4:
        if mask.shape[1] > 1 and mask.stride(1) != 0:
            return None  # heads may see different keys
        mask = mask[:, 0]
    elif mask.dim() == 2:
        mask = mask[None]
    if batch > 1 and mask.stride(0) == 0:
        mask = mask[:1]
    for kept in (True, False) if mask.dtype == torch.bool else (0.0, 1.0):
        hidden = _other_value(mask, kept)
        found = None if hidden is None else _vectors(mask, kept, hidden)
        if found is not None:
            rows = (batch, mask.shape[-1])
            return replace(found, valid=found.valid.expand(rows), sequences=found.sequences.expand(rows))
    return None


def _other_value(mask: Tensor, kept: bool | float) -> bool | float | None:
    """The one value that a mask has beside `kept`; None if there is none, or several."""
    if mask.dtype == torch.bool:
        return not kept
    lowest = mask.amin().item()
    other = mask.amax().item() if lowest == kept else lowest
    if other == kept or other != other:
        return None
    either = ((part == kept) | (part == other) for part in _parts(mask))
    return float(other) if all(bool(test.all()) for test in either) else None


def _parts(mask: Tensor) -> Iterator[Tensor]:
    """The rows of a mask ``[B, Lq, Lk]``, those of some queries at a time."""
    step = max(1, _ELEMENTS_AT_ONCE // (mask.shape[0] * mask.shape[2]))
    for first in range(0, mask.shape[1], step):
        yield mask[:, first : first + step]


def _vectors(mask: Tensor, kept: bool | float, hidden: bool | float) -> MaskValue | None:
    """The normal form of ``mask == kept``, ``[B, Lq, Lk]``; None if it has none."""
    queries, keys = mask.shape[1:]
    valid = mask.new_zeros((mask.shape[0], keys), dtype=torch.bool)
    firsts, lasts, counts = [], [], []
    for part in _parts(mask):
        seen = (part == kept).view(torch.uint8)
        valid |= seen.amax(1).bool()
        counts.append(seen.sum(2, dtype=torch.int32))
        firsts.append(seen.argmax(2))
        lasts.append(keys - 1 - seen.flip(2).argmax(2))
    first, last, count = (torch.cat(rows, 1) for rows in (firsts, lasts, counts))
    some = count > 0
    if not bool(some.any()):
        return None
    query = torch.arange(queries, device=mask.device)
    offset = int((last - query).masked_fill(~some, -keys).max())
    if offset not in (0, keys - queries):
        return None  # queries see what comes after them, or stand in a cache at a place that changes with every call
    place = query + offset
    starts = _sequence_starts(mask, kept, valid, place, offset)
    sequences = starts.cumsum(1, dtype=torch.int32)
    total = valid.cumsum(1, dtype=torch.int32)
    before = torch.cat([total.new_zeros((len(total), 1)), total], 1)  # valid keys before each key, and all of them
    key = torch.arange(keys, device=mask.device)
    stretch = torch.where(starts, key, 0).cummax(1).values[:, offset : offset + queries]
    following = torch.where(valid, key, keys).flip(1).cummin(1).values.flip(1)  # the next valid key
    unlimited = first == following.gather(1, stretch)
    window = None
    if not bool((unlimited | ~some).all()):
        window = int((place - first + 1).masked_fill(~some, 0).max())
        stretch = torch.maximum(stretch, place - window + 1)
    expected = before.gather(1, (place + 1).expand_as(stretch)) - before.gather(1, stretch)
    # A row's visible keys are valid and lie between its first and last: as many as expected means just those expected.
    within = (first >= stretch) & (last <= place)
    if not bool((torch.where(some, within, True) & (count == expected)).all()):
        return None
    form = MaskForm(
        kept,
        hidden,
        None if offset == keys - queries else offset,
        window,
        padded=not bool(valid[:, : offset + queries].all()),
        packed=bool(starts.any()),
    )
    return MaskValue(form, valid, sequences)


def _sequence_starts(mask: Tensor, kept: bool | float, valid: Tensor, place: Tensor, offset: int) -> Tensor:
    """The keys, other than the first, that are hidden from no query of theirs but hide the valid key before them."""
    starts = torch.zeros_like(valid)
    own = place[1:] if offset == 0 else place
    if len(own) == 0:
        return starts
    query = own - offset
    neighbour = mask[:, query, own - 1] == kept
    starts[:, own] = ~neighbour & valid[:, own - 1] & valid[:, own]
    return starts
