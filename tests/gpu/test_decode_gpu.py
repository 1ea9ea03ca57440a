"""The decode operator on a CUDA device: against the oracle, in CUDA graphs, and compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.decode import attention, select, token_scores
from infllm_pass.kernels.triton.decode.compress import decode_compress_kernel
from infllm_pass.kernels.triton.launch import launching_at_once
from infllm_pass.kernels.triton.pdl import dependent_launch
from infllm_pass.lowering.ops import decode_triton
from infllm_pass.lowering.ops.attention_args import DecodeCall
from infllm_pass.lowering.ops.decode import decode_attention, new_state
from tests.kernels.triton.test_decode import select_and_attend
from tests.support.common import relative_error
from tests.support.decode_support import SMALL, Cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that PyTorch does not initialise holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operator(*arguments):
    q, k, v, *state, lengths, starts, key_mask, window, scale, dense_len, geometry = arguments
    call = DecodeCall(lengths, scale, dense_len, geometry, starts, key_mask, window)
    return decode_attention(q, k, v, state, *call.arguments)


def cache(*arguments, **sizes):
    return Cache(operator, *arguments, device=DEVICE, **sizes)


SIZES = [
    {"group": 1, "dim": 32, "value_dim": 32},
    {"group": 2, "dim": 64, "value_dim": 64, "token_first": True},
    {"group": 4, "dim": 128, "value_dim": 128},
    {"group": 7, "dim": 80, "value_dim": 96, "heads": 1},
    {"group": 16, "dim": 128, "value_dim": 128},
    {"group": 16, "dim": 256, "value_dim": 256, "heads": 1},
]


def tokens(kept, score_dtype="key", query_block=1, geometry=SMALL):
    """Token scores over the first channels."""
    scored = {"scorer": "tokens", "channels": (tuple(range(kept)),), "score_dtype": score_dtype}
    return replace(geometry, **scored, query_block=query_block)


OPTIONS = {
    "whole": {},
    "padded, holes": {"starts": [0, 17, 3, 40, 0], "holes": 0.3},
    "window": {"window": 100, "starts": [0, 17, 3, 40, 0]},
    "exact": {"geometry": replace(SMALL, lse="exact")},
    "tokens": {"geometry": tokens(16)},
    "tokens, padded, holes": {"geometry": tokens(16, "int8"), "starts": [0, 17, 3, 40, 0], "holes": 0.3},
    "tokens, window": {"geometry": tokens(16, "fp8", 16), "window": 100, "starts": [0, 17, 3, 40, 0]},
}
LENGTHS = [120, 80, 140, 55, 61]


def name_of(sizes):
    return f"G{sizes['group']}-D{sizes['dim']}"


@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
@pytest.mark.parametrize("option", OPTIONS)
def test_single_precision_equals_the_oracle(sizes, option):
    """Rows of one batch on both sides of ``dense_len``, one of which crosses it."""
    steps = cache(LENGTHS, dense_len=62, **{**sizes, **OPTIONS[option]})
    steps.grow(*((1, 2, 3, 5, 1) if option == "whole" else (1, 4, 1)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
def test_half_precision_equals_the_oracle(sizes, dtype):
    steps = cache(LENGTHS, [0, 17, 3, 40, 0], dense_len=62, dtype=dtype, holes=0.2, **sizes)
    for count in (1, 3):
        check_rounded(steps, steps.append(count), least=0.8)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_batches(rows):
    cache([40 + 13 * row for row in range(rows)], dense_len=70, group=4, dim=64).grow(1, 4, 1)


HOT = [(32, 2, 128, 1), (32, 8, 128, 1), (9, 3, 64, 1), (32, 8, 128, 4), (32, 2, 128, 16), (8, 8, 128, 2)]
GEOMETRY = BlockGeometry(selected_blocks=64)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sizes", HOT, ids=str)
@pytest.mark.parametrize(
    "geometry",
    [GEOMETRY, *(tokens(32, form, geometry=GEOMETRY) for form in ("key", "int8", "fp8"))],
    ids=["pooled", "tokens", "int8", "fp8"],
)
def test_half_precision_at_length(sizes, dtype, geometry):
    heads_q, heads, dim, queries = sizes
    steps = cache(
        [20000, 16500 - queries, 7000],
        starts=[0, 37, 0],
        geometry=geometry,
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
        check_rounded(steps, steps.append(count), least=0.998)


def check_rounded(steps: Cache, q: Tensor, least: float) -> None:
    """Compare with the oracle's attention on the operator's own lists, which agree with the oracle's to that share."""
    numbers = (steps.window, steps.scale, steps.dense_len, steps.geometry)
    starts = None if steps.starts is None else steps.numbers(steps.starts)
    mask = steps.key_mask if steps.holes else None
    out, lse, blocks = select_and_attend(
        *(q, steps.k, steps.v, *steps.state, steps.numbers(steps.lengths), starts, mask, *numbers)
    )
    for row, end in enumerate(steps.lengths):
        selected = steps.selected(q, row)
        if end - steps.start(row) >= steps.dense_len:
            lists = blocks.view(len(steps.lengths), steps.heads, q.shape[2], -1)[row]
            count = selected[0].sum(-1, keepdim=True)
            lists = torch.where(torch.arange(lists.shape[-1], device=DEVICE) < count, lists, lists[..., :1])
            mine = torch.zeros_like(selected).scatter_(-1, lists[None].long(), True)
            assert torch.equal(mine.sum(-1), selected.sum(-1))
            assert float((mine & selected).sum() / selected.sum()) > least
            selected = mine
        expected, expected_lse = steps.expected(q, row, selected)
        assert relative_error(out[row], expected[0]) <= 1e-2
        seen = expected_lse[0] != -torch.inf
        assert torch.equal(lse[row] != -torch.inf, seen)
        assert float((lse[row] - expected_lse[0])[seen].abs().max()) <= 1e-2


class Attention(nn.Module):
    """A layer's cache, state and rows as a decoding model holds them: in buffers that a step changes in place."""

    def __init__(self, steps: Cache) -> None:
        super().__init__()
        self.steps = steps
        self.k, self.v = (nn.Buffer(x.nan_to_num()) for x in (steps.k, steps.v))
        *kept, self.filled = (nn.Buffer(x) for x in new_state(steps.k, steps.geometry))
        self.kept = [f"kept{number}" for number in range(len(kept))]
        for name, buffer in zip(self.kept, kept, strict=True):
            self.register_buffer(name, buffer)
        self.lengths = nn.Buffer(torch.tensor(steps.lengths, device=DEVICE))
        self.rows = nn.Buffer(torch.arange(len(steps.lengths), device=DEVICE))

    def forward(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A step of one token: ``q [B, Hq, 1, D]``, ``key`` and ``value [B, Hkv, D]``."""
        self.k[self.rows, :, self.lengths] = key
        self.v[self.rows, :, self.lengths] = value
        self.lengths.add_(1)
        state = [*(getattr(self, name) for name in self.kept), self.filled]
        steps = self.steps
        call = DecodeCall(self.lengths, steps.scale, steps.dense_len, steps.geometry)
        return decode_attention(q, self.k, self.v, state, *call.arguments)[0]

    def check(self, q: Tensor, out: Tensor) -> None:
        """Compare a step with the oracle on the whole prefix."""
        self.steps.k, self.steps.v, self.steps.lengths = self.k, self.v, self.lengths.tolist()
        for row in range(len(self.steps.lengths)):
            assert relative_error(out[row], self.steps.expected(q, row)[0][0]) <= 1e-5


SCORERS = pytest.mark.parametrize("geometry", [SMALL, tokens(8)], ids=["pooled", "tokens"])


def growing(geometry: BlockGeometry) -> tuple[Attention, list[Tensor]]:
    """A layer whose two rows cross ``dense_len`` while they grow, and tensors for the inputs of a step."""
    steps = cache([30, 150], geometry=replace(geometry, selected_blocks=5), dense_len=190, capacity=512, value_dim=16)
    inputs = [torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 16), torch.zeros(2, 2, 16)]
    return Attention(steps), [x.to(DEVICE) for x in inputs]


@SCORERS
def test_one_cuda_graph_serves_300_steps_and_both_sides_of_dense_len(geometry):
    """Nothing is read on the host, in no step."""
    layer, inputs = growing(geometry)
    begin = layer.lengths.clone()
    layer(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(*inputs)
        layer.lengths.copy_(begin)
        layer.filled.zero_()
        for number in range(300):
            for x in inputs:
                x.normal_()
            graph.replay()
            if number % 37 == 0:
                torch.cuda.set_sync_debug_mode("default")
                layer.check(inputs[0], out)
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.lengths.tolist() == [330, 450]
    layer.check(inputs[0], out)


@torch.no_grad()
@SCORERS
def test_a_compiled_step_runs_as_one_cuda_graph_for_300_steps(geometry):
    layer, inputs = growing(geometry)
    counters.clear()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for number in range(300):
        torch.compiler.cudagraph_mark_step_begin()
        for x in inputs:
            x.normal_()
        out = compiled(*inputs)
        if number % 37 == 0:
            layer.check(inputs[0], out)
    layer.check(inputs[0], out)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90")
@pytest.mark.parametrize("heads", [(32, 2), (32, 8), (12, 4)], ids=str)
@pytest.mark.parametrize("length", [5000, 9000], ids=["dense", "sparse"])
@pytest.mark.parametrize("geometry", [GEOMETRY, tokens(32, geometry=GEOMETRY)], ids=["pooled", "tokens"])
def test_launches_that_overlap_give_the_same_bits(heads, length, geometry, monkeypatch):
    """Layer after layer in one CUDA graph: every kernel begins while the one before ends, also the next layer's."""
    lengths = torch.tensor([length, length + 2000], device=DEVICE)
    shape = (2, heads[1], length + 3000, 128)
    caches = [[torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)] for _ in range(6)]
    states = [new_state(k, geometry) for k, _ in caches]
    q = torch.randn(2, heads[0], 1, 128, device=DEVICE, dtype=torch.bfloat16)
    numbers = DecodeCall(lengths, 128**-0.5, 8192, geometry).arguments

    def layers() -> Tensor:
        x = q
        for (k, v), state in zip(caches, states, strict=True):
            state[-1].zero_()
            x = q + 30 * decode_attention(x, k, v, state, *numbers)[0]
        return x

    with monkeypatch.context() as one_by_one:
        for module in (attention, select, token_scores):
            one_by_one.setattr(module, "dependent_launch", lambda *_: {"DEPENDENT": False})
        expected = layers()
    with launching_at_once():
        assert dependent_launch(decode_compress_kernel, q)["DEPENDENT"]
    assert torch.equal(layers(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers()
    for _ in range(50):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("recorded", [False, True], ids=["", "in CUDA graphs"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@SCORERS
def test_opcheck(padded, recorded, geometry, monkeypatch):
    """Whether compilers see the kernels or the operator."""
    monkeypatch.setattr(decode_triton, "is_recorded_in_graphs", lambda _: recorded)
    steps = cache([60, 50], [0, 9] if padded else None, holes=0.2 if padded else 0.0, dense_len=55, geometry=geometry)
    q = steps.append(2)
    starts = steps.numbers([0, 9]) if padded else None
    state = [each.zero_() for each in steps.state]
    lengths, key_mask = steps.numbers(steps.lengths), steps.key_mask if padded else None
    call = DecodeCall(lengths, 0.25, 55, steps.geometry, starts, key_mask).arguments
    given = (q, steps.k.nan_to_num(), steps.v.nan_to_num(), state, *call)
    torch.library.opcheck(decode_attention.default, given)
