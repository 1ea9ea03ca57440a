"""The decode kernels against the oracle: every step of a growing cache equals the oracle on the whole prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.decode.attention import decode_attend
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState, IndexState
from infllm_pass.kernels.triton.decode.select import decode_select
from infllm_pass.kernels.triton.decode.step import DecodeStep
from infllm_pass.kernels.triton.decode.token_scores import decode_select_tokens
from tests.support.decode_support import SMALL, Cache
from tests.support.triton_device import DEVICE, arrange


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that PyTorch does not initialise holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def select_and_attend(q, k, v, *rest):
    """The two stages of the operator, and the lists between them."""
    *state, lengths, starts, key_mask, window, scale, dense_len, geometry = rest
    rows = DecodeRows(lengths, starts)
    common = {"geometry": geometry, "scale": scale, "dense_len": dense_len, "window": window}
    step = DecodeStep(q, k, rows, **common, key_mask=key_mask)
    if geometry.scorer == "tokens":
        blocks = decode_select_tokens(step, IndexState.of(state))
    else:
        blocks = decode_select(step, DecodeState.of(state))
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


TOKENS = replace(SMALL, scorer="tokens", channels=((*range(4, 8), *range(12, 16)),))
"""The lowest frequencies of a rotary embedding whose halves are split, of 16 channels."""

BY_HEAD = (tuple(range(0, 16, 2)), tuple(range(8)))

CASES |= {
    f"tokens: {name}": sizes
    for name, sizes in {
        "group 1, no first block, a slot's keys together": {
            "group": 1,
            "slot_first": True,
            "geometry": replace(TOKENS, init_blocks=0, local_blocks=2, selected_blocks=5),
        },
        "group 3, channels by head, tokens first": {
            "group": 3,
            "heads": 2,
            "value_dim": 40,
            "token_first": True,
            "geometry": replace(TOKENS, channels=BY_HEAD),
        },
        "group 7, blocks of 48": {"group": 7, "geometry": replace(TOKENS, block_size=48)},
        "group 17, int8, all channels": {
            "group": 17,
            "dim": 24,
            "geometry": replace(TOKENS, channels=(tuple(range(24)),), score_dtype="int8"),
        },
        "float8, a slot's keys together": {"slot_first": True, "geometry": replace(TOKENS, score_dtype="fp8")},
        "blocks of 128": {"geometry": replace(TOKENS, block_size=128, local_blocks=0, selected_blocks=2)},
        "shared by 16": {"geometry": replace(TOKENS, query_block=16)},
        "equal scores": {"level": True, "geometry": TOKENS},
        "holes, shared by 16": {
            "holes": 0.3,
            "geometry": replace(TOKENS, query_block=16),
            "token_first": True,
        },
        "many holes, int8": {"holes": 0.9, "geometry": replace(TOKENS, score_dtype="int8")},
        "holes, sliding window": {"holes": 0.3, "window": 66, "heads": 2, "geometry": TOKENS},
        "narrow sliding window": {"window": 35, "geometry": TOKENS},
    }.items()
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_steps_equal_the_oracle(sizes):
    length = {128: 450, 48: 290}.get(sizes.get("geometry", SMALL).block_size, 125)
    cache([length], **{"heads": 1, "capacity": length + 35, **sizes}).grow(5, 1)


SCORERS = pytest.mark.parametrize("geometry", [SMALL, TOKENS], ids=["pooled", "tokens"])


@SCORERS
def test_rows_on_different_sides_of_dense_len(geometry):
    cache([62, 80, 130], starts=[0, 17, 3], dense_len=66, heads=1, holes=0.4, geometry=geometry).grow(3, 1)


@SCORERS
def test_many_queries_of_two_lists(geometry):
    steps = cache([107], group=4, heads=1, geometry=replace(geometry, query_block=16), window=90)
    steps.compare(steps.append(9))


@SCORERS
def test_a_cache_grows_from_nothing(geometry):
    cache([0, 9], starts=[0, 9], dense_len=25, heads=1, geometry=geometry).grow(3, 20, 16, 1)


@SCORERS
def test_queries_before_the_first_key_give_nothing(geometry):
    steps = cache([0, 3, 40], starts=[0, 3, 40], heads=1, geometry=geometry)
    q = steps.append(7)
    steps.lengths = [0, 5, 47]
    steps.check(q)


@pytest.mark.parametrize(
    "geometry", [SMALL, TOKENS, replace(TOKENS, score_dtype="fp8")], ids=["pooled", "tokens", "float8"]
)
def test_a_prompt_refills_what_single_steps_filled(geometry):
    steps = cache([60], heads=1, geometry=geometry)
    for count in (1, 2, 1, 5, 9, 2):
        steps.attend(steps.append(count))
    grown = [tensor.clone() for tensor in steps.state]
    steps.forget()
    steps.compare(torch.randn(1, 2, 1, 16, device=DEVICE))
    for mine, before in zip(steps.state, grown, strict=True):
        assert torch.equal(mine.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))


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


def test_more_blocks_than_one_program_scores():
    steps = cache([700], group=4, heads=1, capacity=1100, geometry=replace(TOKENS, selected_blocks=12))
    steps.compare(steps.append(1))
    steps.write(0, 701, 1040)
    steps.k[:, :, 900:1040] *= 3  # what the last of these programs owns weighs most
    steps.lengths = [1040]
    steps.compare(torch.randn(1, 4, 1, 16, device=DEVICE))


@SCORERS
def test_a_cache_that_was_cut_back_is_noticed(geometry):
    steps = cache([120], heads=1, geometry=geometry)
    steps.compare(steps.append(1))
    steps.crop(25)
    steps.grow(3, 1)


arrange(globals())
