from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infllm_pass.errors import UncompiledKernelWarning
from infllm_pass.kernels import reference
from infllm_pass.kernels.cpu import chunked, native, prefill
from infllm_pass.kernels.cpu.sequences import AttentionParams
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.params import PrefillParams
from tests.support.common import relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LSE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# Relative gap of two scores below which the order of their blocks is a matter of rounding.
SCORE_GAP = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}

SMALL = BlockGeometry(4, 2, 8, init_blocks=1, local_blocks=1, selected_blocks=4)
GEOMETRIES = [
    SMALL,
    BlockGeometry(4, 2, 8, init_blocks=1, local_blocks=2, selected_blocks=6),
    BlockGeometry(8, 4, 8, init_blocks=2, local_blocks=1, selected_blocks=5),
    BlockGeometry(16, 4, 8, init_blocks=1, local_blocks=1, selected_blocks=4),  # windows longer than blocks
    BlockGeometry(32, 16, 64, init_blocks=1, local_blocks=1, selected_blocks=4),
    BlockGeometry(2, 2, 16, init_blocks=0, local_blocks=3, selected_blocks=5),  # windows that do not overlap
]
PROPERTY = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


ENTRIES = ("compress_keys", "select_blocks", "attend_blocks", "attend_blocks_backward")


@pytest.fixture(params=["C++", "torch operators"], autouse=True)
def computed(request, monkeypatch):
    """Everything in either way."""
    if request.param == "torch operators":
        for name in ENTRIES:
            monkeypatch.setattr(native, name, lambda *_: None)
        monkeypatch.setattr(chunked, "CHUNK_LOGITS", 2**15)  # several chunks at the lengths tested
    return request.param


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keywords: dict

    @property
    def geometry(self) -> BlockGeometry:
        return self.keywords["geometry"]


def strided(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]
    return x


def packed(rng: random.Random, batch: int, length_q: int, length_k: int) -> dict:
    """Sequences within the rows, some empty, some shorter than a block, now and then none at the end."""
    cuts = [rng.randint(0, length_k) for _ in range(rng.randint(0, 5))]
    ends = sorted(row * length_k + cut for row in range(batch) for cut in (0, length_k, rng.choice([0, *cuts]), *cuts))
    if rng.random() < 0.3:
        ends = ends[: rng.randint(1, len(ends))]
    bounds = {"cu_seqlens_k": torch.tensor(ends, dtype=torch.int32)}
    if batch == 1 and rng.random() < 0.6:
        inner = sorted(rng.randint(0, length_q) for _ in ends[1:])
        bounds["cu_seqlens_q"] = torch.tensor([0, *inner], dtype=torch.int32)
    return bounds


def by_tokens(rng: random.Random, geometry: BlockGeometry, heads: int, dim: int) -> BlockGeometry:
    """The geometry with token scores over random channels: one set, or one for each head."""
    count = rng.choice([1, 3, dim // 2, dim])
    channels = tuple(tuple(sorted(rng.sample(range(dim), count))) for _ in range(rng.choice([1, heads])))
    sizes = {"block_size": rng.choice([geometry.block_size, 3 * geometry.block_size])}
    kept = rng.choice(["key", "key", "int8", "fp8"])
    return dataclasses.replace(geometry, scorer="tokens", channels=channels, score_dtype=kept, **sizes)


SCORERS = ("pooled", "tokens")


@st.composite
def cases(draw, dtypes=tuple(TOLERANCE), masks=True, placed=True, long=False, scorers=SCORERS) -> Case:
    # One seed decides everything: drawn one by one, most sizes come out too small to leave a block out.
    seed = draw(st.integers(0, 2**32 - 1))
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    group = rng.choice([1, 2, 3, 4, 7, 8, 16])
    heads, batch = rng.randint(1, 2), rng.randint(1, 2)
    dim, dim_v = rng.choice([(16, 16), (8, 24), (20, 12)])
    dtype = rng.choice(dtypes)
    length_k = rng.randint(200, 350) if long or rng.random() < 0.6 else rng.choice([0, 1, 2, 3, rng.randint(4, 200)])
    kind = rng.choice(["prefill", "chunk", "few", "decode", "middle"])
    longest = {"prefill": length_k, "few": 40, "decode": 1}.get(kind, rng.randint(0, length_k))
    length_q = min(longest, length_k)
    offset = rng.randint(0, length_k - length_q) if kind == "middle" else length_k - length_q
    geometry = dataclasses.replace(
        rng.choice(GEOMETRIES), lse=rng.choice(["coarse", "exact"]), query_block=rng.choice([1, 1, 2, 16, 12])
    )
    if scorers != ("pooled",):
        geometry = rng.choice([geometry, by_tokens(rng, geometry, heads, dim)])
    layout = rng.choice(["heads first", "tokens first", "every other"])

    def data(heads, length, dim):
        x = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
        return strided(x.to(dtype), layout)

    key_mask = None
    padding = rng.choice(["none", "none", "left", "right", "both", "holes", "all"]) if masks else "none"
    if padding != "none":
        key_mask = torch.ones(batch, length_k, dtype=torch.bool)
        if padding == "holes":
            key_mask = torch.rand(batch, length_k, generator=generator) < rng.choice([0.2, 0.9])
        for row in range(batch):
            if padding in ("left", "both", "holes"):
                key_mask[row, : rng.randint(0, length_k // 2)] = False
            if padding in ("right", "both"):
                key_mask[row, length_k - rng.randint(0, length_k // 2) :] = False
            if padding == "all" and row == 0:
                key_mask[row] = False
    keywords = {
        "geometry": geometry,
        "scale": rng.choice([dim**-0.5, 1.0]),
        "offset": offset,
        "key_mask": key_mask,
        "dense_len": rng.choice([0, 0, 150]),
        "window": rng.choice([None, None, 1, rng.randint(1, 30), rng.randint(1, 400)]),
    }
    place = rng.choice(["rows", "rows", "offsets", "packed", "packed"]) if placed else "rows"
    if place == "offsets":
        numbers = [rng.randint(-3, length_k) for _ in range(rng.choice([1, batch]))]
        keywords["offsets"] = torch.tensor(numbers, dtype=rng.choice([torch.int32, torch.int64])) - offset
    elif place == "packed":
        keywords |= packed(rng, batch, length_q, length_k)
    return Case(data(heads * group, length_q, dim), data(heads, length_k, dim), data(heads, length_k, dim_v), keywords)


def params(**fields) -> PrefillParams:
    return PrefillParams(**{"dense_len": 0} | fields)


def select(q: torch.Tensor, k: torch.Tensor, **keywords) -> torch.Tensor:
    """Compression and selection."""
    return prefill.select_blocks(q, k, prefill.compress_keys(q, k, params(**keywords)), params(**keywords))


def as_set(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """int32 block numbers, -1 for none -> bool ``[B, Hkv, Lq, count]``; a block twice is an error."""
    index = torch.where(blocks < 0, count, blocks).long()
    times = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.int64)
    times.scatter_add_(3, index, torch.ones_like(index))
    assert (times[..., :count] <= 1).all()
    return times[..., :count] > 0


def as_numbers(chosen: torch.Tensor, slots: int) -> torch.Tensor:
    """A set as int32 numbers in shuffled places among -1."""
    count = chosen.shape[-1]
    numbers = torch.where(chosen, torch.arange(count), -1)
    numbers = F.pad(numbers, (0, max(0, slots - count)), value=-1).sort(-1, descending=True).values[..., :slots]
    return numbers[..., torch.randperm(slots)].int()


def undecided(case: Case) -> torch.Tensor:
    """Queries ``[B, Hkv, Lq]`` whose scores at the cut-off differ by no more than rounding, but do differ."""
    q, k, keywords = case.q, case.k, case.keywords
    g = case.geometry
    unsure = torch.zeros(q.shape[0], k.shape[1], q.shape[2], dtype=torch.bool)
    for row, keys, queries, shift in reference.sequences(q, k, params(**keywords)):
        if queries.stop <= queries.start:
            continue
        length, offset = keys.stop - keys.start, shift + queries.start - keys.start
        scores = reference.block_scores(
            q[row, :, queries],
            k[row, :, keys],
            geometry=g,
            scale=keywords["scale"],
            offset=offset,
            key_mask=None if keywords["key_mask"] is None else keywords["key_mask"][row, keys],
            window=keywords["window"],
        )
        positions = torch.arange(queries.stop - queries.start) + offset
        position = reference.tile_position(positions, g.query_block, length)[:, None]
        own, first = position // g.block_size, torch.zeros_like(position)
        if keywords["window"] is not None:
            first = (position - keywords["window"] + 1).clamp(min=0) // g.block_size
        blocks = torch.arange(scores.shape[-1])
        free = (blocks >= g.init_blocks) & (blocks >= first) & (blocks < own - g.local_blocks)
        slots = g.selected_blocks - (g.init_blocks - first).clamp(min=0) - g.local_blocks - 1  # [n, 1]
        ranked = scores.masked_fill(~free, -torch.inf).sort(-1, descending=True).values
        ranked = F.pad(ranked, (0, g.selected_blocks), value=-torch.inf)
        slots = slots.expand(*ranked.shape[:2], 1)
        last, next_ = ranked.gather(-1, slots - 1)[..., 0], ranked.gather(-1, slots)[..., 0]
        close = (last - next_ <= SCORE_GAP[q.dtype] * last.abs() + 1e-35) & torch.isfinite(next_)
        # Blocks that share their best compressed key tie exactly in any precision: no excuse.
        unsure[row, :, queries] = close & (last != next_)
    return unsure


@PROPERTY
@given(cases())
def test_selects_the_reference_set(case):
    expected = reference.select_blocks(case.q, case.k, **case.keywords)
    blocks = select(case.q, case.k, **case.keywords)
    assert blocks.dtype == torch.int32
    assert blocks.shape == (*expected.shape[:3], case.geometry.selected_blocks)
    wrong = (as_set(blocks, expected.shape[-1]) != expected).any(-1)
    assert not (wrong & ~undecided(case)).any()


@pytest.mark.parametrize(("size", "group", "holes"), [(64, 1, 0.0), (64, 3, 0.3), (128, 2, 0.0), (48, 4, 0.3)])
def test_long_prompts_select_by_tokens(size, group, holes):
    """Blocks of whole panels of the C++ kernels, most of which every query of a tile sees in full."""
    geometry = BlockGeometry(16, 16, size, 1, 1, 5, scorer="tokens", channels=(tuple(range(5, 21)),))
    q, k = torch.randn(1, 2 * group, 900, 32), torch.randn(1, 2, 900, 32)
    mask = torch.rand(1, 900) >= holes if holes else None
    case = Case(q, k, k, {"geometry": geometry, "scale": 0.25, "offset": 0, "key_mask": mask, "window": None})
    expected = reference.select_blocks(q, k, **case.keywords)
    wrong = (as_set(select(q, k, **case.keywords), expected.shape[-1]) != expected).any(-1)
    assert not (wrong & ~undecided(case)).any()


@PROPERTY
@given(cases(), st.sampled_from(["sparse", "sparse", "dense"]))
def test_attends_to_the_reference_set(case, mode):
    chosen = reference.select_blocks(case.q, case.k, **case.keywords) if mode == "sparse" else None
    blocks = None if chosen is None else as_numbers(chosen, case.geometry.selected_blocks)
    q, k, v = (x.double().requires_grad_() for x in (case.q, case.k, case.v))
    expected, expected_lse = reference.attention(q, k, v, chosen, **case.keywords)
    out, lse = prefill.attention_forward(case.q, case.k, case.v, blocks, params(**case.keywords))

    dtype = case.q.dtype
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if not out.numel():
        return
    blind = expected_lse.isinf()
    assert torch.equal(lse.isinf(), blind)
    assert (out[blind] == 0).all()
    seen = ~blind
    assert torch.isfinite(out).all()
    if not seen.any():
        return
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    assert (lse[seen].double() - expected_lse[seen]).abs().max() <= LSE_TOLERANCE[dtype] * (1 + lse[seen].abs().max())

    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    expected.backward(grad.double())
    grads = prefill.attention_backward(grad, case.q, case.k, case.v, out, lse, blocks, params(**case.keywords))
    for actual, source in zip(grads, (q, k, v), strict=True):
        assert actual.dtype == dtype
        # A query that sees one key has no gradient but rounding: measure against what cancels in it.
        cancelled = grad.double().norm() * case.v.double().norm()
        size = source.grad.norm() + (5e-2 if dtype.itemsize > 2 else 2e-1) * cancelled
        assert (actual.double() - source.grad).norm() <= TOLERANCE[dtype] * size


@settings(PROPERTY, max_examples=25)
@given(cases(dtypes=[torch.float32], masks=False, placed=False), st.integers(0, 70), st.integers(0, 70))
def test_padding_never_changes_a_sequence(case, left, right):
    keywords = {**case.keywords, "offset": case.keywords["offset"] + left}
    batch, length = case.q.shape[0], case.k.shape[2]
    keywords["key_mask"] = torch.zeros(batch, left + length + right, dtype=torch.bool)
    keywords["key_mask"][:, left : left + length] = True
    k, v = (F.pad(x, (0, 0, left, right), value=torch.nan) for x in (case.k, case.v))

    alone = select(case.q, case.k, **case.keywords)
    padded = select(case.q, k, **keywords)
    assert torch.equal(alone, padded)
    for chosen in (alone, None):
        one = prefill.attention_forward(case.q, case.k, case.v, chosen, params(**case.keywords))
        two = prefill.attention_forward(case.q, k, v, chosen, params(**keywords))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        grad = torch.randn_like(one[0])
        grads = prefill.attention_backward(grad, case.q, case.k, case.v, *one, chosen, params(**case.keywords))
        padded_grads = prefill.attention_backward(grad, case.q, k, v, *two, chosen, params(**keywords))
        assert torch.equal(grads[0], padded_grads[0])
        for part, whole in zip(grads[1:], padded_grads[1:], strict=True):
            assert torch.equal(part, whole[:, :, left : left + length])
            assert not whole[:, :, :left].any()
            assert not whole[:, :, left + length :].any()


@settings(PROPERTY, max_examples=25)
@given(cases(dtypes=[torch.float64], masks=False, placed=False, long=True), st.lists(st.integers(1, 399), max_size=3))
def test_a_prompt_may_come_in_chunks(case, cuts):
    q, k, v = case.q, case.k, case.v
    length = k.shape[2]
    q = torch.randn(q.shape[0], q.shape[1], length, q.shape[3], dtype=q.dtype)
    keywords = {**case.keywords, "offset": 0, "dense_len": 0}
    m = case.geometry.query_block
    edges = sorted({0, length, *(cut // m * m for cut in cuts if cut < length)})
    blocks = select(q, k, **keywords)
    out, lse = prefill.attention_forward(q, k, v, blocks, params(**keywords))
    for begin, end in itertools.pairwise(edges):
        keywords["offset"] = begin
        part = select(q[:, :, begin:end], k[:, :, :end], **keywords)
        count = case.geometry.num_blocks(length)
        assert torch.equal(as_set(part, count), as_set(blocks[:, :, begin:end], count))
        part_out, part_lse = prefill.attention_forward(
            q[:, :, begin:end], k[:, :, :end], v[:, :, :end], part, params(**keywords)
        )
        torch.testing.assert_close(part_out, out[:, :, begin:end])
        torch.testing.assert_close(part_lse, lse[:, :, begin:end])


@pytest.mark.parametrize("length", [700, 1500])
@pytest.mark.parametrize("group", [1, 3])
def test_several_chunks(length, group):
    """More queries than fit a chunk, and a block with more visitors than the backward holds weights of at once."""
    geometry = BlockGeometry(selected_blocks=6, local_blocks=2)
    q, k, v = (torch.randn(1, h, length, 64) for h in (2 * group, 2, 2))
    keywords = {"geometry": geometry, "scale": 0.125, "offset": 0}
    chosen = reference.select_blocks(q, k, **keywords)
    blocks = as_numbers(chosen, geometry.selected_blocks)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference.attention(*leaves, chosen, **keywords)
    out, lse = prefill.attention_forward(q, k, v, blocks, params(**keywords))
    assert relative_error(out, expected) <= 1e-6
    assert relative_error(lse, expected_lse) <= 1e-6
    grad = torch.randn_like(out)
    expected.backward(grad.double())
    grads = prefill.attention_backward(grad, q, k, v, out, lse, blocks, params(**keywords))
    again = prefill.attention_backward(grad, q, k, v, out, lse, blocks, params(**keywords))
    for actual, repeated, source in zip(grads, again, leaves, strict=True):
        assert relative_error(actual, source.grad) <= 1e-5
        assert torch.equal(actual, repeated)


@pytest.mark.parametrize("sharpness", [30.0, 300.0])
def test_far_logits_that_dwarf_the_band(sharpness):
    """Weights of far blocks overflow relative to the band's maximum; the maximum has to follow."""
    length = 300
    geometry = dataclasses.replace(SMALL, selected_blocks=6)
    q, k, v = (torch.randn(1, h, length, 16) for h in (4, 2, 2))
    q = q.abs()
    k[:, :, 24:32] = sharpness
    k[:, :, 41] = 1.01 * sharpness
    keywords = {"geometry": geometry, "scale": 0.25, "offset": 0}
    own = torch.arange(length)[:, None] // 8
    blocks = torch.arange(geometry.num_blocks(length))
    chosen = (own < 6) | (blocks == 0) | (blocks == 3) | (blocks == 4) | (blocks == 5) | (blocks >= own - 1)
    chosen = (chosen & (blocks <= own)).expand(1, 2, -1, -1)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference.attention(*leaves, chosen, **keywords)
    numbers = as_numbers(chosen, 6)
    out, lse = prefill.attention_forward(q, k, v, numbers, params(**keywords))
    assert relative_error(lse, expected_lse) <= 1e-6
    assert relative_error(out, expected) <= 1e-4 * sharpness / 30  # the rounding of logits of 1e3 and more
    grad = torch.randn_like(out)
    expected.backward(grad.double())
    grads = prefill.attention_backward(grad, q, k, v, out, lse, numbers, params(**keywords))
    assert all(torch.isfinite(x).all() for x in grads)
    assert relative_error(grads[2], leaves[2].grad) <= 1e-3


@pytest.mark.parametrize("length", [20, 200])
def test_queries_that_see_nothing(length):
    q, k, v = (torch.randn(1, h, length, 16) for h in (4, 2, 2))
    keywords = {"geometry": SMALL, "scale": 0.25, "offset": 0}
    chosen = reference.select_blocks(q, k, **keywords)
    chosen[:, :, 5:100:7] = False
    blocks = as_numbers(chosen, 4)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference.attention(*leaves, chosen, **keywords)
    out, lse = prefill.attention_forward(q, k, v, blocks, params(**keywords))
    assert (out[:, :, 5:100:7] == 0).all()
    assert (lse[:, :, 5:100:7] == -torch.inf).all()
    assert relative_error(out, expected) <= 1e-5
    grad = torch.randn_like(out)
    expected.backward(grad.double())
    grads = prefill.attention_backward(grad, q, k, v, out, lse, blocks, params(**keywords))
    for actual, source in zip(grads, leaves, strict=True):
        assert relative_error(actual, source.grad) <= 1e-5


@pytest.mark.parametrize("length_q", [1, 5, 60])
def test_holes_among_the_selected_keys(length_q):
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, length_q), (2, 200), (2, 200)))
    key_mask = torch.ones(1, 200, dtype=torch.bool)
    key_mask[:, 3:190:3] = False
    keywords = {"geometry": SMALL, "scale": 0.25, "offset": 200 - length_q, "key_mask": key_mask}
    chosen = reference.select_blocks(q, k, **keywords)
    blocks = as_numbers(chosen, 4)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference.attention(*leaves, chosen, **keywords)
    out, lse = prefill.attention_forward(q, k, v, blocks, params(**keywords))
    assert relative_error(out, expected) <= 1e-5
    grad = torch.randn_like(out)
    expected.backward(grad.double())
    grads = prefill.attention_backward(grad, q, k, v, out, lse, blocks, params(**keywords))
    for actual, source in zip(grads, leaves, strict=True):
        assert relative_error(actual, source.grad) <= 1e-5


def test_rows_shorter_than_dense_len_are_dense():
    q, k, v = (torch.randn(3, h, 100, 16) for h in (4, 2, 2))
    key_mask = torch.ones(3, 100, dtype=torch.bool)
    key_mask[0, :21] = False  # 79 keys
    key_mask[1, :20] = False  # 80 keys
    keywords = {"geometry": SMALL, "scale": 0.25, "offset": 0, "key_mask": key_mask, "dense_len": 80}
    blocks = select(q, k, **keywords)
    assert (blocks[0] == -1).all()
    assert (blocks[1, :, 20:] >= 0).any(-1).all()
    assert (blocks[2] >= 0).any(-1).all()
    out, _ = prefill.attention_forward(q, k, v, blocks, params(**keywords))
    dense, _ = prefill.attention_forward(q, k, v, None, params(**keywords))
    sparse, _ = prefill.attention_forward(q, k, v, blocks, params(**{**keywords, "dense_len": 0}))
    assert torch.equal(out[0], dense[0])
    assert torch.equal(out[1:], sparse[1:])
    assert not torch.equal(dense[1:], sparse[1:])


def test_half_precision_is_as_good_as_dense():
    q, k, v = (torch.randn(1, h, 500, 32).bfloat16() for h in (6, 2, 2))
    keywords = {"geometry": dataclasses.replace(SMALL, selected_blocks=100), "scale": 32**-0.5, "offset": 0}
    expected, _ = reference.attention(q, k, v, None, **keywords)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    blocks = select(q, k, **keywords)
    out, _ = prefill.attention_forward(q, k, v, blocks, params(**keywords))
    assert relative_error(out, expected) <= 1.05 * relative_error(dense, expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_equal_keys_select_the_lowest_blocks(value, lse):
    geometry = dataclasses.replace(SMALL, lse=lse)
    q, k = torch.randn(1, 3, 200, 8), torch.full((1, 1, 200, 8), value)
    keywords = {"geometry": geometry, "scale": 1.0, "offset": 0}
    blocks = select(q, k, **keywords)
    assert torch.equal(as_set(blocks, 25), reference.select_blocks(q, k, **keywords))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_without_a_score_come_before_blocks_out_of_the_window(dtype):
    """Pooling windows so long that none is visible yet when there are more blocks than may be visited."""
    geometry = BlockGeometry(64, 8, 8, init_blocks=1, local_blocks=1, selected_blocks=4)
    q, k = torch.randn(1, 3, 90, 8, dtype=dtype), torch.randn(1, 1, 90, 8, dtype=dtype)
    keywords = {"geometry": geometry, "scale": 1.0, "offset": 0, "window": 40}
    blocks = select(q, k, **keywords)
    expected = reference.select_blocks(q, k, **keywords)
    assert (expected.sum(-1)[:, :, 48:] == 4).all()
    assert torch.equal(as_set(blocks, 12), expected)


@pytest.mark.parametrize(("size", "stride"), [(4, 2), (16, 4), (2, 2), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_keys(size, stride, dtype):
    for length in (0, size - 1, size, size + stride - 1, size + stride, 101):
        k = torch.randn(2, length, 8).to(dtype)
        geometry = BlockGeometry(size, stride, 16 * stride)
        q = k[None, :, -1:]
        compressed = prefill.compress_keys(q, k[None], params(geometry=geometry, scale=1.0, offset=length - q.shape[2]))
        for windows, factor in zip(compressed, (1, 4), strict=True):
            expected = reference.pool_keys(k, factor * size, factor * stride).to(dtype)
            assert windows.dtype == dtype
            torch.testing.assert_close(windows[0, :, : expected.shape[1]], expected, rtol=1e-2, atol=1e-6)


def test_inputs_are_left_alone():
    q, k, v = (torch.randn(1, h, 200, 16) for h in (4, 2, 2))
    copies = [x.clone() for x in (q, k, v)]
    keywords = {"geometry": SMALL, "scale": 0.25, "offset": 0}
    blocks = select(q, k, **keywords)
    out, lse = prefill.attention_forward(q, k, v, blocks, params(**keywords))
    grad = torch.randn_like(out)
    kept = [x.clone() for x in (grad, out, lse, blocks)]
    prefill.attention_backward(grad, q, k, v, out, lse, blocks, params(**keywords))
    for x, copy in zip((q, k, v, grad, out, lse, blocks), (*copies, *kept), strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize(
    ("place", "computed"),
    [("", "torch operators"), ("window=3000, cu_seqlens_k=torch.tensor([0, 100, 16384])", "C++")],
    ids=["plain", "packed, window"],
    indirect=["computed"],
)
def test_memory_is_linear_in_the_length(place, computed):
    """Scores of 16k tokens against all keys would take 3 GB, against compressed keys 200 MB a head."""
    script = """
import resource, torch
from infllm_pass.kernels.cpu import native, prefill
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.params import PrefillParams
for name in ENTRIES:
    setattr(native, name, lambda *_: None)
q, k, v = (torch.randn(1, h, 16384, 16) for h in (3, 1, 1))
keywords = dict(dense_len=0, geometry=BlockGeometry(local_blocks=2, selected_blocks=6), scale=0.25, offset=0)
prefill.attention_forward(q[:, :, :512], k[:, :, :512], v[:, :, :512], None, PrefillParams(**keywords))
call = PrefillParams(**keywords | dict(PLACE))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
blocks = prefill.select_blocks(q, k, prefill.compress_keys(q, k, call), call)
out, lse = prefill.attention_forward(q, k, v, blocks, call)
prefill.attention_backward(out, q, k, v, out, lse, blocks, call)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    script = script.replace("PLACE", place).replace("ENTRIES", repr(ENTRIES if computed == "torch operators" else ()))
    unit = 1 if sys.platform == "darwin" else 1024
    used = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert used * unit < 150e6


@pytest.mark.parametrize("computed", ["C++"], indirect=True)
@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "every other"])
def test_what_is_computed_in_c_plus_plus(dtype, layout, monkeypatch):
    for name in ENTRIES:
        monkeypatch.setattr(chunked, name, None)
    q, k, v = (strided(torch.randn(1, heads, 100, 8).to(dtype), layout) for heads in (4, 2, 2))
    numbers = {"geometry": SMALL, "scale": 1.0, "offset": 0}
    blocks = select(q, k, **numbers)
    out, lse = prefill.attention_forward(q, k, v, blocks, params(**numbers))
    prefill.attention_backward(out[:, :1, :, :1].expand_as(out), q, k, v, out, lse, blocks, params(**numbers))
    elsewhere = torch.empty(2, 2, 100, 8, device="meta"), *(torch.empty(2, 50, 8, device="meta") for _ in range(2))
    assert native.select_blocks(elsewhere[0], elsewhere[1:], 100, AttentionParams(SMALL, 1.0)) is None


@PROPERTY
@given(cases(scorers=("pooled",)))
def test_compressed_keys_are_those_of_the_reference(case):
    keywords, g = case.keywords, case.geometry
    compressed = prefill.compress_keys(case.q, case.k, params(**keywords))
    for row, keys, queries, _ in reference.sequences(case.q, case.k, params(**keywords)):
        if queries.stop <= queries.start or keys.stop - keys.start < keywords["dense_len"]:
            continue
        for windows, factor in zip(compressed, (1, 4), strict=True):
            assert windows.dtype == case.k.dtype
            expected = reference.pool_keys(case.k[row, :, keys], factor * g.kernel_size, factor * g.kernel_stride)
            first = keys.start // (factor * g.kernel_stride)
            actual = windows[row, :, first : first + expected.shape[1]]
            torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("computed", ["C++"], indirect=True)
@pytest.mark.usefixtures("computed")
def test_the_same_bits_for_any_number_of_threads():
    q, k, v = (torch.randn(1, h, 1500, 16) for h in (6, 2, 2))
    keywords = {"geometry": SMALL, "scale": 0.25, "offset": 0}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            blocks = select(q, k, **keywords)
            out, lse = prefill.attention_forward(q, k, v, blocks, params(**keywords))
            results.append(
                (blocks, out, *prefill.attention_backward(out, q, k, v, out, lse, blocks, params(**keywords)))
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_masks_and_blocks_in_any_layout():
    q, k, v = (torch.randn(2, heads, 300, 8) for heads in (4, 2, 2))
    numbers = {"geometry": SMALL, "scale": 1.0, "offset": 0}
    blocks = select(q, k, **numbers)
    mask = torch.rand(2, 300) < 0.7
    expected = prefill.attention_forward(q, k, v, blocks, params(key_mask=mask, **numbers))
    apart = torch.stack((mask, ~mask), -1)[..., 0], blocks.transpose(1, 2).contiguous().transpose(1, 2)
    assert not apart[0][0].is_contiguous()
    got = prefill.attention_forward(q, k, v, apart[1], params(key_mask=apart[0], **numbers))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("computed", ["C++"], indirect=True)
@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("switchable_attention.h", native.CALL_FIELDS),
        ("decode_attention.h", native.DECODE_FIELDS),
        ("attention_backward.h", native.GRADIENT_FIELDS),
    ],
)
def test_arguments_in_another_order_do_not_compile(name, fields, monkeypatch):
    """The order of a call's integers is written down once in Python, and checked against the C++ struct."""
    first, second = list(fields)[-2:]
    swapped = {key: fields[key] for key in fields if key not in (first, second)}
    swapped |= {second: fields[second], first: fields[first]}
    structs = {header: (struct, swapped if of is fields else of) for header, (struct, of) in native._STRUCTS.items()}
    monkeypatch.setattr(native, "_STRUCTS", structs)
    native.header.cache_clear()
    native._library.cache_clear()
    try:
        with pytest.warns(UncompiledKernelWarning, match="C\\+\\+ compile error"):
            assert native._library(torch.float32, name) is None
    finally:
        native.header.cache_clear()
        native._library.cache_clear()
