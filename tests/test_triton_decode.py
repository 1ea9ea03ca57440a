"""The decode kernels against the oracle: every step of a growing cache equals the oracle on the whole prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels import reference
from infllm_pass.kernels.decode_attention import decode_attend
from infllm_pass.kernels.decode_rows import DecodeRows, DecodeState
from infllm_pass.kernels.decode_selection import decode_select
from infllm_pass.kernels.geometry import BlockGeometry

from .conftest import relative_error
from .decode_support import SMALL, Cache
from .triton_device import DEVICE, arrange, gpu


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
    "group 1": {"group": 1},
    "group 3": {"group": 3, "heads": 1},
    "group 7": {"group": 7, "heads": 1},
    "group 17": {"group": 17, "heads": 1},
    "dims 24 and 40": {"dim": 24, "value_dim": 40},
    "exact": {"geometry": replace(SMALL, lse="exact")},
    "blocks of 48": {"geometry": replace(SMALL, block_size=48), "capacity": 400},
    "blocks of 128": {"geometry": BlockGeometry(32, 16, 128, 1, 0, 2), "capacity": 450},
    "long windows": {"geometry": replace(SMALL, kernel_size=32, selected_blocks=5)},
    "windows side by side": {"geometry": replace(SMALL, kernel_size=4)},
    "windows that reach ahead": {"geometry": replace(SMALL, kernel_size=64)},
    "no first block": {"geometry": replace(SMALL, init_blocks=0, local_blocks=2, selected_blocks=5)},
    "sliding window": {"window": 100},
    "dense sliding window": {"window": 30, "dense_len": 1000},
    "shared by 16": {"geometry": replace(SMALL, query_block=16)},
    "equal scores": {"level": True},
    "tokens first": {"token_first": True},
    "holes": {"holes": 0.3},
    "holes, shared by 16": {"holes": 0.3, "geometry": replace(SMALL, query_block=16), "token_first": True},
    "holes, sliding window": {"holes": 0.8, "window": 100},
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_steps_equal_the_oracle(sizes):
    steps = cache([400 if sizes.get("capacity") == 450 else 290 if sizes.get("capacity") == 400 else 125], **sizes)
    steps.grow(1, 5, 1)


def test_rows_on_different_sides_of_dense_len():
    cache([64, 80, 130], starts=[0, 17, 3], dense_len=66, heads=1).grow(1, 1, 3)
    cache([64, 80, 130], starts=[0, 17, 3], dense_len=66, heads=1, holes=0.4).grow(1, 1, 3)


def test_many_queries_at_once():
    cache([100], group=4, heads=1).grow(16)
    cache([100], group=4, heads=1, geometry=replace(SMALL, query_block=16), window=90).grow(16)


def test_a_cache_grows_from_nothing():
    cache([0, 9], starts=[0, 9], dense_len=25, heads=1).grow(3, 20, 16, 1)


def test_queries_before_the_first_key_give_nothing():
    steps = cache([0, 3, 40], starts=[0, 3, 40], heads=1)
    q = steps.append(7)
    steps.lengths = [0, 5, 47]
    steps.check(q)


def test_a_prompt_refills_what_single_steps_filled():
    steps = cache([60], heads=1)
    for count in (1, 2, 1, 1, 5, 1, 9, 1, 1):
        steps.attend(steps.append(count))
    grown = [tensor.clone() for tensor in steps.state]
    steps.forget()
    steps.check(torch.randn(1, 2, 1, 16, device=DEVICE))
    for mine, before in zip(steps.state, grown, strict=True):
        torch.testing.assert_close(mine, before, rtol=0, atol=0, equal_nan=True)


def test_more_windows_than_one_program_compresses():
    steps = cache([700], heads=1, capacity=2500, geometry=BlockGeometry(8, 4, 16, 1, 1, 4))
    steps.grow(1)
    steps.write(0, 701, 2400)
    steps.lengths = [2400]
    steps.check(torch.randn(1, 2, 1, 16, device=DEVICE))


def test_a_cache_that_was_cut_back_is_noticed():
    steps = cache([120], heads=1)
    steps.grow(1)
    steps.crop(25)
    steps.grow(3, 1)


GEOMETRY = BlockGeometry(selected_blocks=64)
HOT = [(32, 2, 128, 1), (32, 8, 128, 1), (9, 3, 64, 1), (32, 8, 128, 4), (32, 2, 128, 16), (8, 8, 128, 2)]


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", HOT, ids=str)
def test_half_precision_at_length(sizes, dtype):
    heads_q, heads, dim, queries = sizes
    steps = cache(
        [20000, 16500 - queries, 7000],
        starts=[0, 37, 0],
        geometry=GEOMETRY,
        group=heads_q // heads,
        heads=heads,
        dim=dim,
        value_dim=dim,
        capacity=24000,
        dense_len=8192,
        scale=dim**-0.5,
        dtype=dtype,
    )
    for count in (queries, queries, 17, queries):
        q = steps.append(count)
        given = (steps.window, steps.scale, steps.dense_len, steps.geometry)
        lengths, starts = steps.numbers(steps.lengths), steps.numbers(steps.starts)
        out, lse, blocks = select_and_attend(q, steps.k, steps.v, *steps.state, lengths, starts, None, *given)
        for row, end in enumerate(steps.lengths):
            begin = steps.starts[row]
            part_q, part_k, part_v = (q[row : row + 1], *(x[row : row + 1, :, begin:end] for x in (steps.k, steps.v)))
            common = {"geometry": GEOMETRY, "scale": steps.scale, "offset": end - begin - count, "dense_len": 8192}
            chosen = reference.select_blocks(part_q, part_k, **common)
            if end - begin >= 8192:
                mine = torch.zeros_like(chosen).scatter_(-1, blocks.view(3, heads, count, -1)[row][None].long(), True)
                assert float((mine & chosen).sum() / chosen.sum()) > 0.998
                assert torch.equal(mine.sum(-1), chosen.sum(-1))
                chosen = mine
            expected, expected_lse = reference.attention(part_q, part_k, part_v, chosen, **common)
            assert relative_error(out[row], expected[0]) <= 1e-2
            assert float((lse[row] - expected_lse[0]).abs().max()) <= 1e-2


@gpu
def test_one_cuda_graph_serves_all_lengths_and_both_sides_of_dense_len():
    steps = cache([200, 120], geometry=replace(SMALL, selected_blocks=5), dense_len=190, capacity=400)
    lengths = torch.tensor(steps.lengths, device=DEVICE)
    q = torch.zeros(2, 4, 1, 16, device=DEVICE)
    numbers = (None, None, None, 0.3, steps.dense_len, steps.geometry)
    saved = [tensor.clone() for tensor in steps.state]
    operator(q, steps.k, steps.v, *steps.state, lengths, *numbers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = operator(q, steps.k, steps.v, *steps.state, lengths, *numbers)
    for tensor, before in zip(steps.state, saved, strict=True):
        tensor.copy_(before)
    for _ in range(100):
        q.copy_(steps.append(1))
        lengths += 1
        graph.replay()
        for row in range(2):
            assert relative_error(out[row], steps.expected(q, row)[0][0]) <= 1e-5


arrange(globals())
