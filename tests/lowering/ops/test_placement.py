"""Sliding windows, packed sequences, tensor offsets and key masks, alone and together, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import infllm_pass
from infllm_pass.errors import DeviceError, DtypeError, ShapeError
from infllm_pass.kernels import reference
from infllm_pass.lowering.ops import prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall
from infllm_pass.lowering.ops.cu_seqlens import segment_bounds
from tests.support.common import SMALL, relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = (70, 5, 0, 1, 68, 9)
"""Of packed sequences: sparse ones, some shorter than a block, an empty one."""
TOTAL = sum(LENGTHS)
QUERIES = (30, 5, 0, 3, 68, 0)
"""Of packed queries: fewer than keys, as many, more, none."""


def ends(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ids(lengths, batch=1) -> torch.Tensor:
    """The same numbers come back in segments that do not touch."""
    return (torch.arange(len(lengths)) % 3).repeat_interleave(torch.tensor(lengths).long()).expand(batch, -1)


def holes(batch, length) -> torch.Tensor:
    """Hidden keys at the start, at the end and in between."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) > 0.2
    mask[0, :4] = False
    mask[-1, -3:] = False
    return mask


@dataclass(frozen=True)
class Call:
    """What a call says of its sequences.

    Attributes:
        batch: rows.
        length_q: queries of a row.
        length_k: keys of a row.
        place: keywords of the oracle.
        arguments: keywords of `switchable_attention`, or None for `switchable_attention_varlen`.
    """

    batch: int = 2
    length_q: int = TOTAL
    length_k: int = TOTAL
    place: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] | None = None

    def tensors(self, dtype=torch.float32, requires_grad=False):
        generator = torch.Generator().manual_seed(7)
        shapes = [(6, self.length_q, 16), (2, self.length_k, 16), (2, self.length_k, 24)]
        return [
            torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_(requires_grad)
            for shape in shapes
        ]

    def operands(self) -> tuple[Any, ...]:
        """The operators' arguments from ``key_mask`` on."""
        return AttentionCall(0.25, SMALL.dense_len, SMALL.geometry, **self.place).arguments

    def run(self, q, k, v):
        if self.arguments is not None:
            return infllm_pass.switchable_attention(q, k, v, SMALL, scale=0.25, **self.arguments)
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        bounds = [self.place[name] for name in ("cu_seqlens_q", "cu_seqlens_k")]
        out = infllm_pass.switchable_attention_varlen(
            *rows, *bounds, SMALL, scale=0.25, window=self.place.get("window")
        )
        return out.transpose(0, 1)[None]

    def select(self, q, k):
        """The oracle's selection."""
        return reference.select_blocks(q, k, **self.oracle())

    def oracle(self) -> dict[str, Any]:
        """Keywords for the oracle's functions."""
        start = 0 if "offsets" in self.place else self.length_k - self.length_q
        common = {"geometry": SMALL.geometry, "scale": 0.25, "dense_len": SMALL.dense_len, "offset": start}
        return common | self.place


def select(q, k, call) -> list[torch.Tensor]:
    return prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call), *call)


def rows(length_q=TOTAL, **arguments) -> Call:
    """Whole rows; a tensor offset is the oracle's `offsets`."""
    place = dict(arguments)
    if isinstance(place.get("offset"), torch.Tensor):
        place["offsets"] = place.pop("offset").reshape(-1)
    return Call(2, length_q, TOTAL, place, arguments)


def segments(batch=2, length_q=TOTAL, **arguments) -> Call:
    numbers = ids(LENGTHS, batch)
    place = {"cu_seqlens_k": torch.cat([ends(LENGTHS), *(ends(LENGTHS)[1:] + TOTAL * row for row in range(1, batch))])}
    return Call(batch, length_q, TOTAL, place | arguments, {"segment_ids": numbers, **arguments})


def packed(queries=LENGTHS, **place) -> Call:
    return Call(1, sum(queries), TOTAL, {"cu_seqlens_q": ends(queries), "cu_seqlens_k": ends(LENGTHS), **place})


CALLS = {
    "window": rows(window=50),
    "window of a key": rows(window=1),
    "window of less than a block": rows(window=5, key_mask=holes(2, TOTAL)),
    "window longer than the sequence": rows(window=1000),
    "window, few queries": rows(length_q=3, window=45),
    "window, one query, holes": rows(length_q=1, window=60, key_mask=holes(2, TOTAL)),
    "tensor offset": rows(length_q=60, offset=torch.tensor([40])),
    "tensor offset of no dimension": rows(length_q=60, offset=torch.tensor(85)),
    "offset of each row, holes, window": rows(
        length_q=60, offset=torch.tensor([90, -7], dtype=torch.int32), window=44, key_mask=holes(2, TOTAL)
    ),
    "offset past the keys": rows(length_q=60, offset=torch.tensor([150, 400])),
    "segments": segments(),
    "segments, window": segments(window=43),
    "segments, holes, window": segments(key_mask=holes(2, TOTAL), window=61),
    "segments, offset": segments(length_q=55, offset=31),
    "packed": packed(),
    "packed, few and more queries": packed(QUERIES),
    "packed, few and more queries, window": packed(QUERIES, window=42),
}


@pytest.fixture(params=CALLS)
def call(request) -> Call:
    return CALLS[request.param]


@pytest.mark.parametrize(
    "name",
    ["window", "offset of each row, holes, window", "segments, holes, window", "packed, few and more queries, window"],
)
def test_operators_pass_opcheck(name):
    call = CALLS[name]
    q, k, v = call.tensors(requires_grad=True)
    torch.library.opcheck(prefill.compress_keys.default, (q, k, *call.operands()))
    state = prefill.compress_keys(q, k, *call.operands())
    torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *call.operands()))
    rest = (select(q, k, call.operands()), *call.operands())
    torch.library.opcheck(prefill.block_attention.default, (q, k, v, *rest))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = prefill.block_attention(q, k, v, *rest)
    backward = (torch.randn_like(out), q, k, v, out, lse, *rest)
    torch.library.opcheck(prefill.block_attention_backward.default, backward)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_results_and_gradients_are_those_of_the_oracle(call, dtype):
    q, k, v = call.tensors(dtype, requires_grad=True)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    chosen = call.select(q.detach(), k.detach())
    if dtype != torch.float64:  # scores that rounding makes equal may select otherwise
        (blocks,) = select(q, k, call.operands())
        ours = (blocks[..., None] == torch.arange(chosen.shape[-1])).any(-2)
        assert torch.equal(ours.sum(-1), chosen.sum(-1))
        assert (ours == chosen).double().mean() > 0.99
        chosen = ours
    expected, lse = reference.attention(*wide, chosen, **call.oracle())
    out = call.run(q, k, v)
    assert out.dtype == dtype
    assert (out.transpose(1, 2)[lse.isinf().transpose(1, 2)] == 0).all()
    assert relative_error(out, expected) <= TOLERANCE[dtype] if expected.any() else not out.any()
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    actual = torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(actual, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert one.dtype == dtype
        # Where every query sees one key, q and k have no gradient but rounding.
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * max(float(other.norm()), float(grad.double().norm()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_calls_are_compiled_whole_for_all_lengths(backend):
    compiled = torch.compile(infllm_pass.switchable_attention, backend=backend, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for number, (batch, length) in enumerate([(4, 100), (3, 151), (5, 211)]):
        q, k, v = (torch.randn(batch, h, length, 16) for h in (6, 2, 2))
        numbers = torch.randint(0, 2, (batch, length // 10 + 1)).repeat_interleave(10, 1)[:, :length]
        for arguments in (
            {"segment_ids": numbers, "window": 43, "key_mask": holes(batch, length)},
            {"offset": torch.tensor([number] * batch), "window": 60 + number},
        ):
            expected = infllm_pass.switchable_attention(q, k, v, SMALL, **arguments)
            assert torch.equal(compiled(q, k, v, SMALL, **arguments), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("lengths", [(100, 3, 77), (64,), (1, 1, 1), ()], ids=str)
@pytest.mark.parametrize("window", [None, 41])
def test_packing_never_changes_a_sequence(lengths, window):
    total = sum(lengths)
    q, k, v = (torch.randn(1, h, total, 16) for h in (6, 2, 2))
    bounds = ends(lengths)
    alone = [
        infllm_pass.switchable_attention(*(x[:, :, begin:end] for x in (q, k, v)), SMALL, window=window)
        for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
    ]
    expected = torch.cat(alone, 2) if alone else q
    by_ids = infllm_pass.switchable_attention(q, k, v, SMALL, segment_ids=ids(lengths), window=window)
    assert torch.equal(by_ids, expected)
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    by_bounds = infllm_pass.switchable_attention_varlen(*flat, bounds, bounds, SMALL, window=window)
    assert torch.equal(by_bounds.transpose(0, 1)[None], expected)


def test_blocks_before_the_window_are_not_visited():
    """Four blocks of the window compete with none before it, and the initial block is none of them."""
    q, k, _ = CALLS["window"].tensors()
    (blocks,) = select(q, k, CALLS["window"].operands())
    first = (torch.arange(TOTAL) - 50 + 1).clamp(min=0) // 8
    assert ((blocks == -1) | (blocks >= first[:, None])).all()
    assert ((blocks >= 0).sum(-1)[:, :, 60:] == SMALL.geometry.selected_blocks).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_segment_bounds(batch):
    numbers = torch.randint(0, 3, (batch, 40))
    expected = [
        row * 40 + i for row in range(batch) for i in range(40) if i == 0 or numbers[row, i] != numbers[row, i - 1]
    ]
    bounds = segment_bounds(numbers)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == expected + [40 * batch] * (40 * batch + 1 - len(expected))


def int32(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


BAD = {
    "window": ({"window": 0}, ShapeError, "window=0: expected at least 1 key"),
    "float offset": ({"offset": torch.tensor([1.0])}, DtypeError, "offsets is torch.float32: expected torch.int32"),
    "too few offsets": ({"offset": int32(1, 2, 3)}, ShapeError, "offsets has 3 numbers: expected 1 or one a row, 2"),
    "offset elsewhere": ({"offset": int32(1).to("meta")}, DeviceError, "offsets is on meta and q on cpu: move them"),
    "tensor offset of segments": (
        {"offset": int32(1), "segment_ids": ids((20, 20), 2)},
        ShapeError,
        "give the offset as an int",
    ),
    "shape of ids": ({"segment_ids": ids((20, 19), 2)}, ShapeError, r"segment_ids has shape \(2, 39\): expected \[B"),
    "dtype of ids": ({"segment_ids": torch.zeros(2, 40)}, DtypeError, "segment_ids is torch.float32: expected an int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        infllm_pass.switchable_attention(*(torch.randn(2, h, 40, 16) for h in (6, 2, 2)), SMALL, **arguments)


BAD_BOUNDS = {
    "dtype": ((torch.tensor([0, 40]), int32(0, 40)), DtypeError, "cu_seqlens_q is torch.int64: expected torch.int32"),
    "numbers": ((int32(0, 40), int32(0, 10, 40)), ShapeError, "cu_seqlens_q has 2 numbers, cu_seqlens_k 3"),
    "dimensions": ((int32(0, 40)[None], int32(0, 40)), ShapeError, r"cu_seqlens_q has shape \(1, 2\)"),
    "none": ((int32(), int32()), ShapeError, "cu_seqlens_q has no number"),
    "descending": ((int32(0, 30, 20), int32(0, 20, 40)), ShapeError, "cu_seqlens_q descends or leaves 0 to 40"),
    "past the end": ((int32(0, 40), int32(0, 41)), ShapeError, "cu_seqlens_k descends or leaves 0 to 40"),
    "negative": ((int32(-1, 40), int32(0, 40)), ShapeError, "cu_seqlens_q descends or leaves 0 to 40"),
}


@pytest.mark.parametrize("case", BAD_BOUNDS)
def test_bad_bounds_are_refused(case):
    bounds, error, message = BAD_BOUNDS[case]
    with pytest.raises(error, match=message):
        infllm_pass.switchable_attention_varlen(*(torch.randn(40, h, 16) for h in (6, 2, 2)), *bounds, SMALL)


def test_packed_tensors_have_three_dimensions():
    q, k, v = (torch.randn(40, 2, 16) for _ in range(3))
    with pytest.raises(ShapeError, match=r"k has shape \(1, 40, 2, 16\): expected three dimensions"):
        infllm_pass.switchable_attention_varlen(q, k[None], v, int32(0, 40), int32(0, 40), SMALL)


def test_a_packed_sequence_may_not_cross_rows():
    q, k, _ = (torch.randn(2, 2, 40, 16) for _ in range(3))
    call = AttentionCall(0.25, 0, SMALL.geometry, cu_seqlens_k=int32(0, 30, 50, 80))
    with pytest.raises(ShapeError, match="has a sequence of keys 30 to 50: it crosses a row of 40 keys"):
        select(q, k, call.arguments)


def test_query_bounds_need_key_bounds_and_one_row():
    q, k, v = (torch.randn(2, 2, 40, 16) for _ in range(3))
    call = AttentionCall(0.25, 0, SMALL.geometry, cu_seqlens_q=int32(0, 40))
    with pytest.raises(ShapeError, match="cu_seqlens_q is given without cu_seqlens_k"):
        prefill.block_attention(q, k, v, [], *call.arguments)
    with pytest.raises(ShapeError, match="equally many numbers and batch size 1"):
        prefill.block_attention(q, k, v, [], *replace(call, cu_seqlens_k=int32(0, 40)).arguments)
