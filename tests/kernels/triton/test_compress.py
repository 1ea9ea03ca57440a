"""Compressed keys from Triton against the oracle's means."""

import itertools

import pytest
import torch

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.reference import pool_keys
from infllm_pass.kernels.triton.prefill.compress import compress_keys
from infllm_pass.kernels.triton.tile_schedule import plan_packed_tiles, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileShape
from tests.support.triton_device import DEVICE, arrange, gpu

GEOMETRY = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=8)
SHAPE = TileShape.choose(4)


@pytest.fixture(autouse=True)
def _poisoned():
    """Deterministic mode fills what was never written with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def plan_for(k, bounds=None):
    key_bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    batch, length = k.shape[0], k.shape[2]
    return plan_tiles(
        SHAPE, batch=batch, length_q=length, length_k=length, block_size=8, device=k.device, key_bounds=key_bounds
    )


def expected_slots(k, sequences, size, stride):
    """Means in their slots; `sequences` holds (row, first key, one past the last key)."""
    batch, heads, length, dim = k.shape
    slots = torch.zeros(batch, heads, max(length // stride, 1), dim, dtype=torch.float64, device=k.device)
    for row, begin, end in sequences:
        means = pool_keys(k[row, :, begin:end], size, stride)
        slots[row, :, begin // stride : begin // stride + means.shape[1]] = means
    return slots


def check(k, plan, geometry, sequences, tolerance=1e-6):
    size, stride = geometry.kernel_size, geometry.kernel_stride
    fine, coarse = compress_keys(k, plan, geometry=geometry).windows()
    assert fine.dtype == coarse.dtype == k.dtype
    for actual, factor in ((fine, 1), (coarse, 4)):
        expected = expected_slots(k, sequences, factor * size, factor * stride)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def rows(k):
    return [(row, 0, k.shape[2]) for row in range(k.shape[0])]


@pytest.mark.parametrize("length", [1, 3, 4, 15, 16, 17, 101, 230])
def test_lengths_odd_and_shorter_than_a_window(length):
    k = torch.randn(2, 2, length, 16, device=DEVICE)
    check(k, plan_for(k), GEOMETRY, rows(k))


@pytest.mark.parametrize(
    ("size", "stride"), [(2, 2), (6, 2), (12, 3), (32, 16), (48, 16)], ids=lambda number: str(number)
)
def test_window_sizes(size, stride):
    k = torch.randn(1, 2, 331, 16, device=DEVICE)
    check(k, plan_for(k), BlockGeometry(kernel_size=size, kernel_stride=stride, block_size=48), rows(k))


@pytest.mark.parametrize("dim", [16, 24, 100, 256])
def test_head_dims(dim):
    k = torch.randn(1, 1, 60, dim, device=DEVICE)
    check(k, plan_for(k), GEOMETRY, rows(k))


def test_padding_moves_no_window():
    k = torch.randn(4, 1, 97, 16, device=DEVICE)
    bounds = [(0, 97), (13, 97), (0, 50), (31, 34)]
    for row, (begin, end) in enumerate(bounds):
        k[row, :, :begin] = torch.nan
        k[row, :, end:] = torch.nan
    check(k, plan_for(k, bounds), GEOMETRY, [(row, *bound) for row, bound in enumerate(bounds)])


def test_a_row_without_keys_has_no_window():
    k = torch.randn(2, 1, 40, 16, device=DEVICE)
    check(k, plan_for(k, [(0, 0), (5, 40)]), GEOMETRY, [(1, 5, 40)])


@pytest.mark.parametrize(
    ("length", "ends"),
    [
        (150, [0, 21, 22, 22, 87, 150, 157, 290, 300]),
        (150, [0, 150, 233]),
        (64, [0, 9, 64, 64, 64, 128, 128]),
    ],
    ids=["many", "unused tail", "empty ones"],
)
def test_packed_sequences_keep_to_themselves(length, ends):
    k = torch.randn(2, 2, length, 16, device=DEVICE)
    bounds = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    plan = plan_packed_tiles(SHAPE, bounds, None, batch=2, length_q=length, length_k=length, block_size=8)
    sequences = [
        (begin // length, begin % length, begin % length + end - begin)
        for begin, end in itertools.pairwise(ends)
        if end > begin
    ]
    check(k, plan, GEOMETRY, sequences)


def test_strided_keys():
    flat = torch.randn(2, 75, 3, 40, device=DEVICE)
    k = flat.transpose(1, 2)[:, 1:, 3:, 8:24]
    check(k, plan_for(k), GEOMETRY, rows(k))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_long_keys(dtype, dim):
    """Two roundings of nearly the same mean differ by one unit in the last place at most."""
    k = torch.randn(2, 2, 5003, dim, device=DEVICE, dtype=dtype)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
    check(k, plan_for(k), BlockGeometry(), rows(k), tolerance)


arrange(globals())
