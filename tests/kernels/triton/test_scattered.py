"""Gathering the queries of a block instead of visiting all blocks of a tile: the same numbers, and the choice."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.backward import dq, scattered
from infllm_pass.kernels.triton.configs import ScatteredConfig, override
from infllm_pass.kernels.triton.prefill import attention
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.prefill.choose import choose_variant
from infllm_pass.kernels.triton.prefill.scattered import persistent
from tests.kernels.triton import test_attention as tiles
from tests.kernels.triton.test_attention import Case, Sequence, _poisoned, check, last_queries  # noqa: F401
from tests.support.common import relative_error
from tests.support.triton_device import DEVICE, arrange, gpu
from tests.support.triton_support import lists_from_sets

ALWAYS = ScatteredConfig(threshold=-1.0, pool_bytes=1 << 16)
"""Gather whatever the data, in chunks of few tiles."""


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Whether the device chose to gather, for every forward and every gradient of q that could."""
    made = []

    def noted(original, state):
        def gather(*arguments):
            original(*arguments)
            made.append(int(arguments[state][0]))

        return gather

    monkeypatch.setattr(attention, "attend_scattered", noted(attention.attend_scattered, 3))
    monkeypatch.setattr(dq, "add_scattered_gradient", noted(dq.add_scattered_gradient, 5))
    with override(scattered=ALWAYS, scattered_gradient=ALWAYS):
        yield made


def case(name: str, **sizes):
    sizes = {"selected_blocks": 6, "length_q": 165, "length_k": 165, **sizes}
    return pytest.param(Case(**sizes), id=name)


@pytest.mark.parametrize(
    "case",
    [
        case("group 4"),
        case("group 3, dims 24 and 40", group=3, dim=24, value_dim=40, length_q=77),
        case("group 8, two heads, two rows", group=8, heads_kv=2, batch=2, length_q=21, length_k=117),
        case("group 2, blocks of 32", group=2, block_size=32, length_q=99, length_k=250),
        case("window over several blocks", window=85, length_q=77),
        case("one query, long sequence is sparse", length_q=1, dense_len=165),
    ],
)
def test_gathered_blocks_match_the_oracle(case, calls):
    tiles.check_last_queries(case)
    assert calls == [1, 1]


@pytest.mark.parametrize(
    "case",
    [
        case("group 16", group=16, length_q=20),
        case("blocks of 48", block_size=48, length_q=20),
        case("tokens of a tile in different blocks", group=2, length_q=20),
        case("shared by 16 queries", query_block=16, length_q=20),
        case("all blocks visited by rule", selected_blocks=3, length_q=20),
        case("dense", sparse=False, length_q=20),
    ],
)
def test_tiles_visit_all_blocks(case, calls):
    tiles.check_last_queries(case)
    assert not calls


def test_short_sequences_have_nothing_to_gather(calls):
    tiles.check_last_queries(Case(selected_blocks=6, dense_len=134))
    assert calls == [0, 0]


def test_padded_rows_with_holes(calls):
    offset = 70
    case = Case(batch=3, length_q=157 - offset, length_k=157, selected_blocks=6, dense_len=60)
    bounds = [(0, 157), (31, 157), (9, 53)]
    key_mask = torch.zeros(3, 157, dtype=torch.bool, device=DEVICE)
    sequences = []
    for row, (first, end) in enumerate(bounds):
        key_mask[row, first:end] = torch.rand(end - first, device=DEVICE) < 0.8
        key_mask[row, [first, end - 1]] = True
        key_mask[row, first + 20 : first + 40] = False  # a block without a key
        queries = slice(max(first - offset, 0), max(end - offset, 0))
        sequences.append(Sequence(row, slice(first, end), queries, offset + queries.start - first))
    plan = case.plan(offset, key_bounds=torch.tensor(bounds, dtype=torch.int32, device=DEVICE))
    check(case, plan, sequences, key_mask=key_mask)
    assert calls == [1, 1]


def test_packed_queries_and_keys(calls):
    keys, queries = [0, 7, 140, 290, 295], [0, 1, 104, 144, 148]
    case = Case(length_q=148, length_k=295, selected_blocks=5)
    places = [
        (slice(*k), slice(*q)) for k, q in zip(itertools.pairwise(keys), itertools.pairwise(queries), strict=True)
    ]
    sequences = [Sequence(0, k, q, k.stop - k.start - (q.stop - q.start)) for k, q in places]
    cumulative = (torch.tensor(bounds, dtype=torch.int32, device=DEVICE) for bounds in (keys, queries))
    check(case, case.packed_plan(*cumulative), sequences, every_query=True)
    assert calls == [1, 1]


@pytest.mark.parametrize("local", [True, False], ids=["same blocks", "other blocks"])
def test_the_device_chooses(local):
    """Tiles whose tokens choose the same blocks visit them themselves."""
    case = Case(length_q=320, length_k=320, selected_blocks=5)
    blocks = torch.arange(20, device=DEVICE)
    own = torch.arange(320, device=DEVICE)[:, None] // 16
    rows = torch.zeros(1, 320, dtype=torch.int64, device=DEVICE) if local else torch.arange(320, device=DEVICE)[None]
    far = torch.stack([1 + rows % 15, 1 + (rows + 7) % 15], -1)[..., None] == blocks  # [1, Lq, 2, blocks]
    sets = (far.any(2) | (blocks < 1) | (blocks >= own - 1)) & (blocks <= own)
    plan = case.plan(0)
    lists = lists_from_sets(sets[:, None], plan, 20)
    common = {"geometry": case.geometry, "scale": case.scale, "dense_len": 0}
    given = AttentionInputs(*case.inputs(), lists, plan, **common)
    with override(scattered=ScatteredConfig()):
        offered = persistent.offer_scattered(given)
    assert offered is not None
    choose_variant(*offered, given)
    assert int(offered[0][0]) == (0 if local else 1)


def long_case(name: str, dim: int, **sizes):
    sizes = {"length_q": 1901, "length_k": 2301, "block_size": 64, "selected_blocks": 9, **sizes}
    return pytest.param(Case(dim=dim, value_dim=dim, scale=dim**-0.5, **sizes), id=name)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        long_case("group 4", 64, heads_kv=2),
        long_case("group 1", 64, heads_kv=2, group=1),
        long_case("group 8, blocks of 16, window", 64, group=8, block_size=16, window=300),
    ],
)
def test_long_inputs(case, dtype, calls):
    with override(scattered=replace(ALWAYS, pool_bytes=1 << 23)):
        tiles.check_last_queries(replace(case, dtype=dtype))
    assert calls == [1, 1]


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_dense_attention(dtype, calls):
    tiles.test_no_less_exact_than_dense_attention(4, dtype)
    assert calls == [1, 1]


@gpu
def test_every_run_gives_the_same_bits(calls):
    """Of the output, its log-sum-exp and the gradient of q."""
    given, grad = scattered_call(3000, 8)
    runs = []
    for _ in range(3):
        out, lse = attention_forward(given)
        runs.append((out, lse, dq.query_gradient(grad, lse, dq.output_delta(grad, out), given)))
    assert all(torch.equal(one, other) for run in runs for one, other in zip(run, runs[0], strict=True))
    assert calls == [1, 1] * 3


@gpu
def test_the_gradient_of_q_is_that_of_the_tiles_and_goes_into_a_cuda_graph(calls, monkeypatch):
    """Chosen by the data."""
    given, grad = scattered_call(3000, 8)
    out, lse = attention_forward(given)
    delta = dq.output_delta(grad, out)
    with override(scattered_gradient=ScatteredConfig(threshold=1e9)):
        tiles = dq.query_gradient(grad, lse, delta, given)
    with override(scattered_gradient=ScatteredConfig()):
        gathered = dq.query_gradient(grad, lse, delta, given)
        assert calls == [1, 0, 1]
        monkeypatch.setattr(dq, "add_scattered_gradient", scattered.add_scattered_gradient)  # reads nothing back
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = dq.query_gradient(grad, lse, delta, given)
    assert 0 < relative_error(gathered, tiles) < 5e-3
    for _ in range(2):
        replayed.zero_()
        graph.replay()
        assert torch.equal(replayed, gathered)


def scattered_call(length, selected_blocks, heads_kv=2):
    """A call with random selections, every query covered, and a gradient of its output."""
    case = Case(heads_kv=heads_kv, length_q=length, length_k=length, dim=128, value_dim=128, block_size=64)
    case = replace(case, selected_blocks=selected_blocks, dtype=torch.bfloat16)
    q, k, v = case.inputs()
    plan = case.plan(0)
    number = case.geometry.num_blocks(length)
    own = torch.arange(length, device=DEVICE)[:, None] // 64
    blocks = torch.arange(number, device=DEVICE)
    far = torch.rand(1, heads_kv, length, number, device=DEVICE).masked_fill(blocks >= own - 1, -1.0)
    far[..., 0] = -1.0
    sets = torch.zeros_like(far, dtype=torch.bool)
    sets.scatter_(-1, far.topk(selected_blocks - 3, dim=-1).indices, True)
    sets = (sets | (blocks < 1) | (blocks >= own - 1)) & (blocks <= own)
    lists = lists_from_sets(sets, plan, number)
    common = {"geometry": case.geometry, "scale": 128**-0.5, "dense_len": 0, "every_query": True}
    given = AttentionInputs(q, k, v, lists, plan, **common)
    return given, torch.randn(1, length, 4 * heads_kv, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)


arrange(globals())
