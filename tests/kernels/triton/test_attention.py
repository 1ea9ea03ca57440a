"""The Triton kernels that walk a tile's blocks: attention forward, and the gradient of the queries."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.backward.dq import output_delta, query_gradient
from infllm_pass.kernels.triton.configs import LaunchConfig, override
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.tile_schedule import plan_packed_tiles, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TilePlan, TileShape
from tests.support.common import relative_error
from tests.support.triton_device import DEVICE, arrange, gpu
from tests.support.triton_support import lists_from_sets

SCALE = 0.3
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that PyTorch does not initialise holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison with the oracle."""

    group: int = 4
    heads_kv: int = 1
    batch: int = 1
    length_q: int = 133
    length_k: int = 133
    dim: int = 16
    value_dim: int = 16
    block_size: int = 16
    selected_blocks: int = 4
    query_block: int = 1
    dense_len: int = 0
    window: int | None = None
    sparse: bool = True
    dtype: torch.dtype = torch.float32
    scale: float = SCALE

    @property
    def geometry(self) -> BlockGeometry:
        return BlockGeometry(4, 2, self.block_size, 1, 1, self.selected_blocks, "coarse", self.query_block)

    @property
    def shape(self) -> TileShape:
        return TileShape.choose(self.group, self.query_block)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v, in memory as [B, L, H, D]."""
        sizes = (
            (self.length_q, self.heads_kv * self.group, self.dim),
            (self.length_k, self.heads_kv, self.dim),
            (self.length_k, self.heads_kv, self.value_dim),
        )
        q, k, v = (torch.randn(self.batch, *size, device=DEVICE, dtype=self.dtype).transpose(1, 2) for size in sizes)
        return 2 * q, k, v

    def plan(self, offset: int, **arguments) -> TilePlan:
        return plan_tiles(
            self.shape,
            batch=self.batch,
            length_q=self.length_q,
            length_k=self.length_k,
            block_size=self.block_size,
            device=DEVICE,
            offset=offset,
            **arguments,
        )

    def packed_plan(self, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor | None = None) -> TilePlan:
        return plan_packed_tiles(
            self.shape,
            cu_seqlens_k,
            cu_seqlens_q,
            batch=self.batch,
            length_q=self.length_q,
            length_k=self.length_k,
            block_size=self.block_size,
        )


@dataclass(frozen=True)
class Sequence:
    """Keys and queries of one sequence, numbered in their row of the batch; `offset`: position of its first query."""

    row: int
    keys: slice
    queries: slice
    offset: int


def oracle(case: Case, q: Tensor, k: Tensor, v: Tensor, sequences: list[Sequence], key_mask: Tensor | None):
    """Output, log-sum-exp and sets, sequence by sequence; queries of no sequence give 0 and -inf."""
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full_like(out[..., 0], float("-inf"))
    chosen = q.new_zeros(q.shape[0], k.shape[1], q.shape[2], case.geometry.num_blocks(k.shape[2]), dtype=torch.bool)
    for sequence in sequences:
        row, keys, queries = slice(sequence.row, sequence.row + 1), sequence.keys, sequence.queries
        parts = q[row, :, queries], k[row, :, keys]
        common = {
            "geometry": case.geometry,
            "scale": case.scale,
            "offset": sequence.offset,
            "key_mask": None if key_mask is None else key_mask[row, keys],
            "window": case.window,
        }
        sets = None
        if case.sparse and keys.stop - keys.start >= case.dense_len:
            sets = reference.select_blocks(*parts, **common)
            chosen[row, :, queries, : sets.shape[-1]] = sets
        out[row, :, queries], lse[row, :, queries] = reference.attention(*parts, v[row, :, keys], sets, **common)
    return out, lse, chosen


def assert_close(actual: Tensor, expected: Tensor, bound: float, *, size: float = 1.0) -> None:
    """Bound the relative Frobenius error; where all that is expected is 0, relative to `size`."""
    assert not actual.isnan().any()
    exact = expected.detach().double()
    error = float((actual.double() - exact).norm())
    assert error <= bound * (float(exact.norm()) or size)


def check(
    case: Case,
    plan: TilePlan,
    sequences: list[Sequence],
    *,
    key_mask: Tensor | None = None,
    every_query: bool = False,
    inputs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Compare output, log-sum-exp and the gradient of q with the oracle."""
    q, k, v = case.inputs() if inputs is None else inputs
    q_exact = q.detach().double().requires_grad_()
    expected, expected_lse, chosen = oracle(case, q_exact, k, v, sequences, key_mask)
    lists = lists_from_sets(chosen, plan, chosen.shape[-1], dense_len=case.dense_len) if case.sparse else None
    common = {
        "geometry": case.geometry,
        "scale": case.scale,
        "dense_len": case.dense_len,
        "key_mask": key_mask,
        "window": case.window,
        "every_query": every_query,
    }
    given = AttentionInputs(q, k, v, lists, plan, **common)
    out, lse = attention_forward(given)
    assert out.dtype == case.dtype
    assert out.transpose(1, 2).is_contiguous()
    bound = BOUND[case.dtype]
    assert_close(out, expected, bound)
    seen = expected_lse != float("-inf")
    assert torch.equal(lse != float("-inf"), seen)
    assert_close(lse[seen], expected_lse[seen], bound)

    grad = torch.randn_like(out)
    delta = output_delta(grad, out)
    assert_close(delta, (grad.double() * expected).sum(-1), 4 * bound)
    grad_q = query_gradient(grad, lse, delta, given)
    assert grad_q.dtype == case.dtype
    assert grad_q.is_contiguous()
    expected.backward(grad.double())
    assert_close(grad_q, q_exact.grad, bound, size=float(grad.norm()))


def last_queries(case: Case) -> list[Sequence]:
    """Every row one sequence, whose last keys are the queries' own."""
    keys, queries = slice(0, case.length_k), slice(0, case.length_q)
    return [Sequence(row, keys, queries, case.length_k - case.length_q) for row in range(case.batch)]


def check_last_queries(case: Case) -> None:
    check(case, case.plan(case.length_k - case.length_q), last_queries(case), every_query=True)


def case(name: str, **sizes):
    return pytest.param(Case(**sizes), id=name)


@pytest.mark.parametrize(
    "case",
    [
        case("group 1, window", group=1, heads_kv=2, window=37),
        case("group 2, two rows, dims 64 and 16", group=2, batch=2, dim=64, value_dim=16),
        case("group 3, two heads, dims 24 and 40", group=3, heads_kv=2, dim=24, value_dim=40),
        case("group 4, long sequence is sparse", group=4, dense_len=133),
        case("group 7", group=7),
        case("group 16", group=16, length_q=70, length_k=70),
        case("group 96", group=96, length_q=5),
        case("dims 144 and 16, tiles in parts", dim=144, group=16, length_q=23),
        case("dims 136 and 16, group 96 in parts", dim=136, group=96, length_q=3),
        case("blocks of 48", block_size=48, length_q=70, length_k=301),
        case("blocks of 128", block_size=128, length_q=5, length_k=1030),
        case("shared by 16 queries", query_block=16, length_q=100),
        case("dense", sparse=False, group=16, length_q=21),
        case("dense window", window=18, sparse=False, length_q=50),
        case("dense by length, window", window=18, dense_len=134, length_q=50),
        case("window of one key", window=1),
        case("one query", length_q=1),
        case("one key", length_q=1, length_k=1),
        case("three keys", length_q=3, length_k=3),
        case("no query", length_q=0),
        case("last queries", length_q=45),
    ],
)
def test_tiles_match_the_oracle(case):
    check_last_queries(case)


@pytest.mark.parametrize(
    "case",
    [
        case("dim 64", dim=64, length_q=60),
        case("dims 40 and 16, short", dim=40, length_q=11, length_k=11),
        case("dims 40 and 16", dim=40, length_q=60, group=3),
    ],
)
def test_queries_in_registers(case):
    config = LaunchConfig(queries_in_registers=True)
    with override(attention_forward=config, query_gradient=config):
        check_last_queries(case)


@pytest.mark.parametrize(("dense_len", "holes"), [(60, False), (0, True)], ids=["short rows dense", "holes"])
def test_padded_rows(dense_len, holes):
    case = Case(batch=5, length_q=97, length_k=117, dense_len=dense_len)
    offset = case.length_k - case.length_q
    bounds = [(0, 117), (31, 117), (9, 53), (60, 69), (40, 40)]
    key_mask = torch.zeros(5, 117, dtype=torch.bool, device=DEVICE)
    sequences = []
    for row, (first, end) in enumerate(bounds):
        key_mask[row, first:end] = True
        queries = slice(max(first - offset, 0), max(end - offset, 0))
        sequences.append(Sequence(row, slice(first, end), queries, offset + queries.start - first))
    if holes:
        key_mask &= torch.rand(5, 117, device=DEVICE) < 0.8
        for row, (first, end) in enumerate(bounds[:4]):
            key_mask[row, [first, end - 1]] = True
    inputs = case.inputs()
    for tensor in inputs[1:]:
        tensor[1, :, :31] = float("nan")
        tensor[2, :, 53:] = float("nan")
    plan = case.plan(offset, key_bounds=torch.tensor(bounds, dtype=torch.int32, device=DEVICE))
    check(case, plan, sequences[:4], key_mask=key_mask if holes else None, inputs=inputs)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_query_that_sees_no_key(sparse):
    case = Case(window=3, sparse=sparse, length_q=50, length_k=50)
    key_mask = torch.ones(1, 50, dtype=torch.bool, device=DEVICE)
    key_mask[0, 20:31] = False
    check(case, case.plan(0), last_queries(case), key_mask=key_mask.expand(2, 50)[:1], every_query=True)


@pytest.mark.parametrize("offsets", [[5, 40], [17]], ids=["one a row", "one for all"])
def test_offset_on_the_device(offsets):
    case = Case(batch=2, length_q=30, length_k=101)
    rows = offsets if len(offsets) == 2 else 2 * offsets
    plan = case.plan(0, offsets=torch.tensor(offsets, device=DEVICE))
    # What lies after the last query is no part of a row.
    sequences = [Sequence(row, slice(0, offset + 30), slice(0, 30), offset) for row, offset in enumerate(rows)]
    check(case, plan, sequences, every_query=True)


def test_packed_rows():
    case = Case(batch=2, length_q=100, length_k=100, dense_len=40, group=2)
    bounds = [0, 37, 37, 100, 101, 200]
    sequences = []
    for begin, end in itertools.pairwise(bounds):
        place = slice(begin % 100, begin % 100 + end - begin)
        sequences.append(Sequence(begin // 100, place, place, 0))
    del sequences[1]
    check(case, case.packed_plan(torch.tensor(bounds, dtype=torch.int32, device=DEVICE)), sequences, every_query=True)


def test_packed_queries_and_keys():
    keys, queries = [0, 37, 90, 170, 175], [0, 1, 54, 54, 58]
    case = Case(length_q=58, length_k=175)
    places = [
        (slice(*k), slice(*q)) for k, q in zip(itertools.pairwise(keys), itertools.pairwise(queries), strict=True)
    ]
    sequences = [Sequence(0, k, q, k.stop - k.start - (q.stop - q.start)) for k, q in places if q.start < q.stop]
    cumulative = (torch.tensor(bounds, dtype=torch.int32, device=DEVICE) for bounds in (keys, queries))
    check(case, case.packed_plan(*cumulative), sequences, every_query=True)


def test_strides():
    """Head-major, token-major and cut out of a joint projection."""
    case = Case(heads_kv=2, batch=2, length_q=40)
    joint = torch.randn(2, 133, 2, 3, 16, device=DEVICE)
    q = torch.randn(2, 8, 40, 32, device=DEVICE)[..., 8:24]
    inputs = (q, joint[:, :, :, 0].transpose(1, 2), joint[:, :, :, 2].transpose(1, 2))
    check(case, case.plan(93), last_queries(case), every_query=True, inputs=inputs)


def long_case(name: str, dim: int, value_dim: int | None = None, **sizes):
    sizes = {"length_q": 901, "length_k": 1301, "block_size": 64, "selected_blocks": 7, **sizes}
    return case(name, dim=dim, value_dim=value_dim or dim, scale=dim**-0.5, **sizes)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        long_case("group 16, dim 128", 128, group=16),
        long_case("group 4, dim 128", 128, heads_kv=2),
        long_case("group 4, dim 64", 64, heads_kv=2),
        long_case("group 2, dim 256", 256, group=2),
        long_case("group 7, dims 72 and 40", 72, 40, group=7),
        long_case("group 96", 64, group=96, length_q=70),
        long_case("blocks of 16", 128, block_size=16),
        long_case("blocks of 48", 64, block_size=48),
        long_case("blocks of 128", 64, block_size=128),
        long_case("window", 64, window=300),
        long_case("dense", 128, sparse=False),
        long_case("dense window", 128, sparse=False, window=100),
    ],
)
def test_long_inputs(case, dtype):
    check_last_queries(replace(case, dtype=dtype))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [4, 16])
def test_no_less_exact_than_dense_attention(group, dtype):
    sizes = {"length_q": 1500, "length_k": 1500, "dim": 128, "value_dim": 128, "block_size": 64}
    case = Case(group=group, selected_blocks=40, dtype=dtype, scale=128**-0.5, **sizes)
    q, k, v = case.inputs()
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    expected, _, chosen = oracle(case, *exact, last_queries(case), None)
    plan = case.plan(0)
    lists = lists_from_sets(chosen, plan, chosen.shape[-1])
    common = {"geometry": case.geometry, "scale": case.scale, "dense_len": 0, "every_query": True}
    given = AttentionInputs(q.clone(), k, v, lists, plan, **common)
    out, lse = attention_forward(given)
    q.requires_grad_()
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative_error(out, expected) <= 2 * relative_error(plain, expected)

    grad = torch.randn_like(out)
    grad_q = query_gradient(grad, lse, output_delta(grad, out), given)
    expected.backward(grad.double())
    plain.backward(grad)
    assert relative_error(grad_q, exact[0].grad) <= 2 * relative_error(q.grad, exact[0].grad)


@gpu
def test_tensors_beyond_32_bit_addresses():
    case = Case(length_q=3, length_k=40_000, dim=64, value_dim=64, sparse=False, dtype=torch.bfloat16, scale=0.125)
    memory = torch.randn(1, 40_000, 1, 1 << 16, device=DEVICE, dtype=torch.bfloat16)
    k, v = memory[..., :64].transpose(1, 2), memory[..., -64:].transpose(1, 2)
    inputs = (case.inputs()[0], k, v)
    check(case, case.plan(39_997), last_queries(case), every_query=True, inputs=inputs)


arrange(globals())
