"""The decode kernels against the oracle: every step of a growing cache equals the oracle on the whole prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.decode.attention import decode_attend
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState
from infllm_pass.kernels.triton.decode.select import decode_select
from tests.support.decode_support import SMALL, Cache
from tests.support.triton_device import DEVICE, arrange


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that PyTorch does not initialise holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def select_and_attend(q, k, v, k1, k2, filled, lengths, starts, key_mask, window, scale, dense_len, geometry):
    """The two stages of the operator, and the lists between them."""
    rows = DecodeRows(lengths, starts)
    common = {"geometry": geometry, "scale": scale, "dense_len": dense_len, "window": window}
    blocks = decode_select(q, k, DecodeState(k1, k2, filled), rows, **common)
    return *decode_attend(q, k, v, blocks, rows, key_mask, **common), blocks


def operator(*arguments):
    return select_and_attend(*arguments)[:2]


def cache(*arguments, **sizes):
    return Cache(operator, *arguments, device=DEVICE, **sizes)


CASES = {
    "group 1, exact, no first block, a slot's keys together": {
        "group": 1,
        "slot_first": True,
        "geometry": replace(SMALL, lse="exact", init_blocks=0, local_blocks=2, selected_blocks=5),
    },
    "group 3, dims 24 and 40, tokens first": {"group": 3, "heads": 2, "dim": 24, "value_dim": 40, "token_first": True},
    "group 7, blocks of 48, windows side by side, a slot's keys together": {
        "group": 7,
        "slot_first": True,
        "geometry": replace(SMALL, kernel_size=4, block_size=48),
    },
    "group 17, long windows": {"group": 17, "geometry": replace(SMALL, kernel_size=32, selected_blocks=5)},
    "blocks of 128": {"geometry": BlockGeometry(32, 16, 128, 1, 0, 2)},
    "exact, shared by 16": {"geometry": replace(SMALL, lse="exact", query_block=16)},
    "equal scores": {"level": True},
    "holes, shared by 16": {"holes": 0.3, "geometry": replace(SMALL, query_block=16), "token_first": True},
    "holes, sliding window": {"holes": 0.3, "window": 66, "heads": 2},
    "narrow sliding window": {"window": 35},
    "many holes, dense sliding window": {"holes": 0.8, "window": 30, "dense_len": 2**31 - 1},
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_steps_equal_the_oracle(sizes):
    length = {128: 450, 48: 290}.get(sizes.get("geometry", SMALL).block_size, 125)
    cache([length], **{"heads": 1, "capacity": length + 35, **sizes}).grow(5, 1)


def test_rows_on_different_sides_of_dense_len():
    cache([62, 80, 130], starts=[0, 17, 3], dense_len=66, heads=1, holes=0.4).grow(3, 1)


def test_many_queries_of_two_lists():
    steps = cache([107], group=4, heads=1, geometry=replace(SMALL, query_block=16), window=90)
    steps.compare(steps.append(9))


def test_a_cache_grows_from_nothing():
    cache([0, 9], starts=[0, 9], dense_len=25, heads=1).grow(3, 20, 16, 1)


def test_queries_before_the_first_key_give_nothing():
    steps = cache([0, 3, 40], starts=[0, 3, 40], heads=1)
    q = steps.append(7)
    steps.lengths = [0, 5, 47]
    steps.check(q)


def test_a_prompt_refills_what_single_steps_filled():
    steps = cache([60], heads=1)
    for count in (1, 2, 1, 5, 9, 2):
        steps.attend(steps.append(count))
    grown = [tensor.clone() for tensor in steps.state]
    steps.forget()
    steps.compare(torch.randn(1, 2, 1, 16, device=DEVICE))
    for mine, before in zip(steps.state, grown, strict=True):
        torch.testing.assert_close(mine, before, rtol=0, atol=0, equal_nan=True)


def test_windows_that_reach_ahead_of_a_query():
    steps = cache([125], geometry=replace(SMALL, kernel_size=64, lse="exact"))
    steps.compare(steps.append(14))


@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_more_windows_than_one_program_compresses(lse):
    steps = cache([700], group=4, heads=1, capacity=2500, geometry=BlockGeometry(8, 4, 16, 1, 1, 12, lse))
    steps.compare(steps.append(1))
    steps.write(0, 701, 2400)
    steps.k[:, :, 1500:2400] *= 3  # what the last of these programs owns weighs most
    steps.lengths = [2400]
    steps.compare(torch.randn(1, 4, 1, 16, device=DEVICE))


def test_a_cache_that_was_cut_back_is_noticed():
    steps = cache([120], heads=1)
    steps.compare(steps.append(1))
    steps.crop(25)
    steps.grow(3, 1)


arrange(globals())
