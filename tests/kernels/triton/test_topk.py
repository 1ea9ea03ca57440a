"""Ranking of rows of keys: exactly the largest, of equal ones the first."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from infllm_pass.kernels.triton.prefill.topk import LANES, SLOTS, bound_keys, compact_keys, cut_keys, mark_blocks
from tests.support.triton_device import DEVICE, arrange

LENGTH = 1100
"""Keys of a row in memory; ranked are those from 3 to 1091."""


@triton.jit
def _rank_kernel(
    keys,
    wanted,
    slots,
    dense,
    marks,
    low,
    high,
    length,
    R: tl.constexpr,
    PEAKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FETCHED: tl.constexpr,
):
    row = tl.arange(0, R)[:, None]
    rows_at = keys + row * length
    share = tl.load(wanted + row) + tl.zeros([R, LANES], tl.int32)
    bound, top = bound_keys(rows_at, share, low, high, R, PEAKS)
    held, blocks, rest = compact_keys(rows_at, slots, dense, bound, low, high, R, CANDIDATES, FETCHED)
    cut, equals = cut_keys(held, rows_at, share, bound, top, rest, high, R, CANDIDATES)
    bits = tl.full([R, LANES], 1, tl.int32)
    mark_blocks(marks + row * length, bits, held, blocks, rows_at, cut, equals, rest, high, R, CANDIDATES)


def draw(kind: str, rows: int) -> torch.Tensor:
    """Keys ``[rows, LENGTH]``."""
    scores = torch.rand(rows, LENGTH)
    if kind == "wide":
        scores = torch.exp(30 * torch.randn(rows, LENGTH))
    elif kind == "narrow":
        scores = 1 + 1e-4 * scores
    elif kind == "pairs":
        scores = scores[:, : LENGTH // 2].repeat_interleave(2, 1)
    elif kind == "few_values":
        scores = (5 * scores).floor()
    elif kind == "equal":
        scores = torch.full((rows, LENGTH), 0.25)
    elif kind == "mostly_zero":
        scores = torch.where(scores > 0.99, scores, 0)
    elif kind == "one_lane":
        scores[:, 5::32] += 1
    return scores.contiguous().view(torch.int32) + 1


@pytest.mark.parametrize(("rows", "peaks", "held", "fetched"), [(32, 4, 3, 4), (8, 16, 4, 16), (1, 8, 2, 16)])
@pytest.mark.parametrize(
    "kind", ["even", "wide", "narrow", "pairs", "few_values", "equal", "mostly_zero", "one_lane", "short"]
)
def test_rows_take_their_largest_keys(kind, rows, peaks, held, fetched):
    keys = draw(kind, rows)
    low, high = 3, 1091
    begin = torch.full((rows, 1), low) + torch.arange(rows)[:, None] % 3
    end = torch.full((rows, 1), 90 if kind == "short" else high) - torch.arange(rows)[:, None] % 5
    block = torch.arange(LENGTH)
    keys = torch.where((block >= begin) & (block < end), keys, -1).int()
    keys[:, :low], keys[:, high:] = 2**30, 2**30  # never to be looked at
    wanted = torch.tensor([(31, 63, 5, 0, 1)[row % 5] for row in range(rows)], dtype=torch.int32)
    marks = torch.zeros(rows, LENGTH, dtype=torch.int32, device=DEVICE)
    _rank_kernel[(1,)](
        keys.to(DEVICE),
        wanted.to(DEVICE),
        torch.full((rows * SLOTS.value * LANES.value,), -7, device=DEVICE),
        torch.full((rows * held * LANES.value,), -7, device=DEVICE),
        marks,
        low,
        high,
        LENGTH,
        R=rows,
        PEAKS=peaks,
        CANDIDATES=held,
        FETCHED=fetched,
    )
    order = keys[:, low:high].sort(dim=1, descending=True, stable=True).indices + low
    for row in range(rows):
        expected = order[row, : int(wanted[row])].sort().values
        assert torch.equal(marks[row].cpu().nonzero()[:, 0], expected), f"row {row}"


arrange(globals())
