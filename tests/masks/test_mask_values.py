"""Masks read by value: what is read of a tensor says all of its elements, or nothing is read."""

from __future__ import annotations

import random

import pytest
import torch

from infllm_pass.graph.mask_values import MaskForm, MaskReader, MaskValue, are_positions, read_value


def rebuilt(value: MaskValue, shape: torch.Size) -> torch.Tensor:
    """The mask that a form and its vectors say, element by element."""
    form, (queries, keys) = value.form, shape[-2:]
    place = torch.arange(queries)[:, None] + (keys - queries if form.offset is None else form.offset)
    key = torch.arange(keys)
    seen = (key <= place) & value.valid[:, None, :]
    if form.window is not None:
        seen &= key > place - form.window
    seen &= value.sequences[:, place[:, 0]][:, :, None] == value.sequences[:, None, :]
    kept, hidden = (torch.tensor(part, dtype=torch.float64) for part in (form.kept, form.hidden))
    mask = torch.where(seen, kept, hidden)
    return (mask[:, None] if len(shape) == 4 else mask if len(shape) == 3 else mask[0]).expand(shape)


def mask_of(queries, keys, offset, *, padding=(), window=0, starts=()):
    place, key = torch.arange(queries)[:, None] + offset, torch.arange(keys)
    mask = (key <= place).expand(2, 1, queries, keys).clone()
    if padding:
        mask[0, :, :, : padding[0]] = False
        mask[1, :, :, keys - padding[1] :] = False
    if window:
        mask &= key > place - window
    for start in starts:
        mask &= (place >= start) == (key >= start)
    return mask


def written(mask):
    yield mask
    yield ~mask
    yield mask.int()
    for dtype in (torch.float32, torch.bfloat16):
        for lowest in (float("-inf"), torch.finfo(dtype).min, -1e9):
            yield torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)


@pytest.mark.parametrize("padding", [(), (3, 4), (0, 6)])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("starts", [(), (7,), (7, 12)])
@pytest.mark.parametrize(("keys", "offset"), [(17, 0), (23, 6), (23, 0)])
def test_a_mask_has_the_form_that_it_was_made_of(padding, window, starts, keys, offset):
    mask = mask_of(17, keys, offset, padding=padding, window=window, starts=starts)
    for tensor in written(mask):
        value = read_value(tensor)
        if value is None:  # padding between two sequences hides where the second begins
            assert padding
            assert starts
            continue
        assert torch.equal(rebuilt(value, tensor.shape), tensor.double())
        assert value.form.padded >= (not mask[..., : 17 + offset].any(-2).all())
        assert value.form.packed or not starts
        assert not window or value.form.window == window


@pytest.mark.parametrize("part", range(4))
def test_whatever_is_read_says_every_element(part):
    rng = random.Random(part)
    read = 0
    for _ in range(400):
        queries = rng.randrange(2, 9)
        keys = queries + rng.choice((0, 0, 3))
        mask = mask_of(
            *(queries, keys, rng.choice((0, keys - queries))),
            padding=rng.choice(((), (1, 0), (2, 3))),
            window=rng.choice((0, 0, 1, 3)),
            starts=rng.sample(range(1, keys), rng.choice((0, 0, 1, 2)) % keys),
        )
        for _ in range(rng.choice((0, 0, 1, 2, 5))):
            mask[rng.randrange(2), 0, rng.randrange(queries), rng.randrange(keys)] ^= True
        tensor = rng.choice(list(written(mask)))
        tensor = rng.choice((tensor, tensor[:, 0], tensor[0, 0], tensor[:1].expand(3, 4, -1, -1)))
        value = read_value(tensor) if tensor.dtype != torch.int32 or tensor.dim() > 2 else None
        if isinstance(value, MaskValue):
            read += 1
            assert torch.equal(rebuilt(value, tensor.shape), tensor.double())
    assert 50 < read < 350


def test_what_is_no_mask_is_not_read():
    causal = torch.ones(9, 9).tril()
    for tensor in (
        torch.rand(9, 9),
        torch.zeros(9, 9),
        torch.full((9, 9), float("nan")),
        causal.where(causal == 1, float("nan")),
        causal + torch.eye(9),
        torch.ones(9, 9, dtype=torch.bool),
        torch.zeros(9, 9, dtype=torch.bool),
        torch.stack([causal, causal.mT])[None].bool(),
        causal[:1],
    ):
        assert read_value(tensor) is None, tensor


def test_numbers_of_sequences_do_not_return():
    assert read_value(torch.tensor([[3, 3, 1, 1, 2], [0, 0, 0, 0, 0]])) is not None
    assert read_value(torch.tensor([[3, 3, 1, 3, 2], [0, 0, 0, 0, 0]])) is None
    sequences = torch.tensor([0, 0, 1, 1, 1])
    assert are_positions(torch.tensor([[0, 1, 0, 1, 2], [5, 6, 9, 10, 11]]), sequences)
    assert not are_positions(torch.tensor([[0, 1, 0, 2, 3]]), sequences)
    assert not are_positions(torch.tensor([0, 1, 0, 1]), sequences)


def test_a_tensor_is_read_once_until_it_is_written_to(monkeypatch):
    reads = []
    monkeypatch.setattr(
        "infllm_pass.graph.mask_values.read_value", lambda tensor: reads.append(tensor) or read_value(tensor)
    )
    reader, mask = MaskReader(), mask_of(9, 9, 0)
    first = reader.read(mask)
    assert isinstance(first, MaskValue)
    assert reader.read(mask) is first
    assert len(reads) == 1
    mask[:, :, :, 0] = False
    again = reader.read(mask)
    assert isinstance(again.form, MaskForm)
    assert again.form.padded
    mask.data = mask_of(9, 9, 0)
    assert not reader.read(mask).form.padded
    with torch.inference_mode():
        uncounted = mask_of(9, 9, 0)
        reader.read(uncounted)
        reader.read(uncounted)
    assert len(reads) == 5
    assert reader.read(torch.nn.Parameter(torch.ones(9, 9))) is reader.read("mask") is None
