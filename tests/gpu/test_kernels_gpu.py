"""Selection, attention and gradients through the public functions, against the oracle.

Every call is taken apart into its sequences, and each sequence is compared with the oracle on its own. Attention is
compared on the blocks that the kernels selected, and these with the oracle's in float32, wherever the scores at the
cut-off differ by more than rounding. Without a GPU the float32 cases that are small run in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_pass import SparseAttentionConfig, switchable_attention, switchable_attention_varlen
from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.tile_tables import TilePlan, TileShape
from infllm_pass.lowering.ops import checks, prefill_triton
from tests.support.common import relative_error
from tests.support.triton_device import DEVICE, arrange, gpu

BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
POISON = (1 << 26, *(1 << bits for bits in (7, 11, 14, 17) for _ in range(32)))
"""Sizes of float tensors of NaN: PyTorch keeps small and large tensors in pools of their own."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        lengths: keys of each sequence of a packed row, for `segment_ids` and packed tensors; () for whole rows.
        offset: key number of the first query as an "int" or a "tensor"; None: queries are the last of the keys.
        key_mask: whether rows are padded on both sides and have holes.
    """

    group: int = 4
    heads_kv: int = 2
    batch: int = 2
    length_q: int = 301
    length_k: int = 301
    dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    query_block: int = 1
    lse: str = "coarse"
    scorer: str = "pooled"
    score_dtype: str = "key"
    dense_len: int = 0
    window: int | None = None
    offset: str | None = None
    key_mask: bool = False
    lengths: tuple[int, ...] = ()
    packed: bool = False
    scale: float | None = None

    @property
    def config(self) -> SparseAttentionConfig:
        """Four blocks of which one is initial and two are local; windows of half a block."""
        block = self.block_size
        return SparseAttentionConfig(
            kernel_size=block // 2,
            kernel_stride=block // 4,
            block_size=block,
            window_size=block,
            topk=3,
            dense_len=self.dense_len,
            lse=self.lse,  # type: ignore[arg-type]
            query_block=self.query_block,
            scorer=self.scorer,  # type: ignore[arg-type]
            score_dtype=self.score_dtype,  # type: ignore[arg-type]
        )

    @property
    def geometry(self) -> BlockGeometry:
        """Its geometry; token scores read all channels, as where no rotary embedding is known."""
        return self.config.geometry_for(self.dim)


def names(cases: list[Case]) -> list[str]:
    """Test ids: what each case changes of the first."""
    fields = list(Case.__dataclass_fields__)
    changes = [
        [(name, getattr(case, name)) for name in fields if getattr(case, name) != getattr(cases[0], name)]
        for case in cases
    ]
    return [" ".join(f"{name}={value}".replace("torch.", "") for name, value in pairs) or "plain" for pairs in changes]


@dataclass
class Call:
    """Inputs of a case, and how it falls into sequences.

    Attributes:
        arguments: keyword arguments of `switchable_attention`, or the two bounds of packed tensors.
        sequences: batch row, keys, queries, and position of the first of these queries.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    arguments: dict[str, Any] = field(default_factory=dict)
    sequences: list[tuple[int, slice, slice, int]] = field(default_factory=list)

    def run(self) -> Tensor:
        case = self.case
        common = {"scale": case.scale, "window": case.window}
        if case.packed:
            rows = [x[0].transpose(0, 1) for x in (self.q, self.k, self.v)]
            out = switchable_attention_varlen(*rows, config=case.config, **self.arguments, **common)
            return out.transpose(0, 1)[None]
        return switchable_attention(self.q, self.k, self.v, case.config, **self.arguments, **common)


def make(case: Case) -> Call:
    sizes = (
        (case.length_q, case.heads_kv * case.group, case.dim),
        (case.length_k, case.heads_kv, case.dim),
        (case.length_k, case.heads_kv, case.value_dim),
    )
    q, k, v = (
        torch.randn(case.batch, *size, device=DEVICE, dtype=case.dtype).transpose(1, 2).requires_grad_()
        for size in sizes
    )
    call = Call(case, q, k, v)
    offset = case.length_k - case.length_q
    if case.offset is not None:
        offset //= 2
        numbers = torch.full((case.batch,), offset, dtype=torch.int32, device=DEVICE)
        call.arguments["offset"] = offset if case.offset == "int" else numbers
    if case.packed:
        ends = torch.tensor([0, *case.lengths]).cumsum(0).to(DEVICE, torch.int32)
        call.arguments |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    elif case.lengths:
        numbers = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))
        call.arguments["segment_ids"] = numbers.expand(case.batch, -1).to(DEVICE)
    bounds = [(0, case.length_k)] * case.batch
    if case.key_mask:
        mask = torch.rand(case.batch, case.length_k, device=DEVICE) > 0.2
        bounds = []
        for row in range(case.batch):
            begin, end = row * case.length_k // 5, max(case.length_k - 3 * (row + 1), 0)
            mask[row, :begin] = mask[row, end:] = False
            mask[row, begin : begin + 1] = mask[row, end - 1 : end] = True
            bounds.append((begin, end))
        call.arguments["key_mask"] = mask
    for row in range(case.batch):
        ends = [0]
        for length in case.lengths:
            ends.append(ends[-1] + length)
        for begin, end in itertools.pairwise(ends) if case.lengths else [bounds[row]]:
            low = min(max(begin - offset, 0), case.length_q)
            high = min(max(end - offset, low), case.length_q)
            if high > low:
                call.sequences.append((row, slice(begin, end), slice(low, high), low + offset - begin))
    return call


def visited(case: Case, plan: TilePlan, blocks: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """The lists as a set, bool ``[B, Hkv, Lq, n_blocks]``, blocks numbered within the query's sequence."""
    shape, count = plan.shape, case.geometry.num_blocks(case.length_k)
    panels = plan.panels.repeat_interleave(shape.tiles, 0)  # [n_tiles, 8]
    part = torch.arange(plan.num_tiles, device=panels.device) % shape.tiles
    size = (case.batch, case.heads_kv, case.length_q, count)
    chosen = torch.zeros(size, dtype=torch.bool, device=panels.device)
    listed = torch.arange(blocks.shape[2], device=panels.device) < counts[..., None]  # [n_tiles, Hkv, capacity]
    for token in range(shape.tokens):
        index = part * shape.tokens + token
        exists = (panels[:, 2] <= index) & (index < panels[:, 3])  # [n_tiles]
        mine = listed & ((tokens >> token) & 1).bool()
        assert not (mine & ~exists[:, None, None]).any()
        tile, head, entry = mine.nonzero(as_tuple=True)
        block = blocks[tile, head, entry].long() & 0xFFFF
        chosen[panels[tile, 0].long(), head, (panels[tile, 1] + index[tile]).long(), block] = True
    return chosen


def doubtful(scores: Tensor, positions: Tensor, geometry: BlockGeometry, window: int | None, length: int) -> Tensor:
    """Queries for which rounding may decide, bool ``[Hkv, Lq]``: a far score lies next to the last that is taken."""
    g = geometry
    last = reference.tile_position(positions, g.query_block, length)[:, None]  # [Lq, 1]
    own = last // g.block_size
    block = torch.arange(scores.shape[-1], device=scores.device)
    inside = block <= own
    if window is not None:
        inside = inside & ((block + 1) * g.block_size - 1 > last - window)
    forced = inside & ((block < g.init_blocks) | (block >= own - g.local_blocks))
    far = scores.masked_fill(~(inside & ~forced), -torch.inf)
    wanted = (g.selected_blocks - forced.sum(-1)).clamp(min=0).expand(far.shape[:2])  # [Hkv, Lq]
    ranked = far.sort(-1, descending=True).values
    cut = ranked.gather(-1, (wanted - 1).clamp(0, far.shape[-1] - 1)[..., None])
    near = cut.isfinite() & far.isfinite() & ((far - cut).abs() <= 1e-4 * cut.abs())
    return (wanted > 0) & (near & (far != cut)).any(-1)


def poison() -> None:
    """Leave NaN in memory that is free, so that what nobody writes does not happen to hold zeros."""
    _ = [torch.full((size,), torch.nan, device=DEVICE) for size in POISON]


def check(case: Case, monkeypatch) -> None:
    call = make(case)
    seen = []
    kernels = prefill_triton.select_blocks

    def recording(q, k, state, given):
        seen.append((given, kernels(q, k, state, given)))
        return seen[-1][1]

    monkeypatch.setattr(prefill_triton, "select_blocks", recording)
    if DEVICE.type == "cuda":
        poison()
    out = call.run()
    assert out.shape == (case.batch, case.heads_kv * case.group, case.length_q, case.value_dim)
    assert out.dtype == case.dtype
    assert torch.isfinite(out).all()
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (call.q, call.k, call.v), grad)

    geometry = case.geometry
    chosen = None
    if seen and call.sequences:
        given, (*lists, sequences, panels) = seen[0]
        shape = TileShape.choose(case.group, geometry.query_block)
        plan = TilePlan(sequences, given.cu_seqlens_k is not None, shape, panels)
        chosen = visited(case, plan, *lists)
    wide = [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v)]
    expected = torch.zeros_like(out, dtype=torch.float64)
    key_mask = call.arguments.get("key_mask")
    for row, keys, queries, position in call.sequences:
        q, k, v = wide[0][row, :, queries], wide[1][row, :, keys], wide[2][row, :, keys]
        length = keys.stop - keys.start
        common = {"geometry": geometry, "scale": case.scale or case.dim**-0.5, "offset": position}
        selected = None
        if length >= max(case.dense_len, 1):
            selected = chosen[row, :, queries, : geometry.num_blocks(length)]
            check_selection(case, call, (row, keys, queries, position), selected, common)
        holes = None if key_mask is None else key_mask[row : row + 1, keys]
        part, _ = reference.attention(
            q[None],
            k[None],
            v[None],
            None if selected is None else selected[None],
            key_mask=holes,
            window=case.window,
            **common,
        )
        expected[row, :, queries] = part[0]
    bound = BOUND[case.dtype]
    if not call.sequences:
        assert out.abs().sum() == 0
        return
    assert relative_error(out, expected) <= bound
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for name, one, other in zip("qkv", actual, wanted, strict=True):
        assert torch.isfinite(one).all(), name
        if other.norm() > 1e-6 * grad.double().norm():
            assert relative_error(one, other) <= bound, name
        else:
            assert one.double().norm() <= bound * grad.double().norm(), name


def check_selection(case: Case, call: Call, sequence, selected: Tensor, common) -> None:
    """A budget in every row that has one, the tile's last block, and, in float32, the oracle's sets."""
    row, keys, queries, position = sequence
    geometry = common["geometry"]
    length = keys.stop - keys.start
    positions = position + torch.arange(queries.stop - queries.start, device=selected.device)
    q, k = call.q.detach()[row, :, queries], call.k.detach()[row, :, keys]
    mask = call.arguments.get("key_mask")
    common = common | {"window": case.window, "key_mask": None if mask is None else mask[row, keys]}
    wanted = reference.select_sequence(q, k, **common)
    assert torch.equal(selected.sum(-1), wanted.sum(-1))
    own = reference.tile_position(positions, geometry.query_block, length) // geometry.block_size
    assert selected.gather(-1, own.expand(case.heads_kv, -1)[..., None]).all()
    if case.dtype == torch.float32:
        scores = reference.block_scores(q, k, **common)
        unsure = doubtful(scores, positions, geometry, case.window, length)
        assert unsure.double().mean() < 0.05
        assert torch.equal(selected[~unsure], wanted[~unsure])


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    """Let the interpreter take CPU tensors, and let memory that PyTorch does not initialise hold NaN."""
    if DEVICE.type == "cuda":
        yield
        return
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


TINY = Case(group=2, heads_kv=1, batch=1, length_q=113, length_k=113, dim=16, value_dim=16, dtype=torch.float32)
PACKED = {"batch": 1, "lengths": (40, 1, 150, 10, 100), "length_q": 301, "length_k": 301}

SMALL_CASES = [
    TINY,
    replace(TINY, group=3, heads_kv=2, value_dim=24, lse="exact", length_q=90, length_k=90),
    replace(TINY, batch=2, key_mask=True, dense_len=100, query_block=16, group=1),
    replace(TINY, length_q=40, offset="int", window=40),
    replace(TINY, length_q=40, offset="tensor", dim=8, value_dim=8, group=3),
    replace(TINY, lengths=(3, 1, 20), length_q=24, length_k=24, group=4),
    replace(TINY, lengths=(20, 1, 80, 12), packed=True, dense_len=30),
    replace(TINY, scorer="tokens"),
    replace(TINY, scorer="tokens", group=3, heads_kv=2, value_dim=24, length_q=90, length_k=90, score_dtype="int8"),
    replace(TINY, scorer="tokens", batch=2, key_mask=True, dense_len=100, query_block=16, group=1, score_dtype="fp8"),
    replace(TINY, scorer="tokens", length_q=40, offset="int", window=40),
    replace(TINY, scorer="tokens", length_q=40, offset="tensor", dim=8, value_dim=8, group=3),
    replace(TINY, scorer="tokens", lengths=(20, 1, 80, 12), packed=True, dense_len=30),
    replace(TINY, scorer="tokens", length_q=0, length_k=0, key_mask=True),
    replace(TINY, length_q=0, length_k=0),
    replace(TINY, length_q=0, length_k=0, key_mask=True),
    replace(TINY, length_q=0, length_k=50),
    replace(TINY, batch=0),
    replace(TINY, length_q=1, length_k=1),
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=names(SMALL_CASES))
def test_small_calls(case, monkeypatch):
    check(case, monkeypatch)


def grid() -> list[Case]:
    cases = [Case()]
    both = (torch.float32, torch.bfloat16)
    for dtype in both:
        cases += [Case(group=group, heads_kv=1 if group > 16 else 2, dtype=dtype) for group in (1, 2, 3, 4, 7, 8)]
        cases += [Case(group=group, heads_kv=1, batch=1, dtype=dtype) for group in (16, 32, 80)]
        cases += [Case(dim=dim, value_dim=dim, dtype=dtype) for dim in (16, 40, 80, 96, 128, 256)]
        cases += [Case(dim=d, value_dim=dv, dtype=dtype) for d, dv in ((64, 128), (128, 64), (40, 72), (192, 128))]
        for size in (32, 48, 64, 128):
            length = 9 * size - 5
            cases.append(Case(block_size=size, length_q=length, length_k=length, batch=1, dtype=dtype))
        cases += [Case(query_block=16, group=group, dtype=dtype) for group in (1, 4, 16)]
        tokens = Case(scorer="tokens", dtype=dtype)
        cases += [replace(tokens, group=group, heads_kv=1 if group > 7 else 2) for group in (1, 3, 4, 16, 80)]
        cases += [
            replace(tokens, dim=dim, score_dtype=form) for dim, form in ((40, "int8"), (128, "fp8"), (256, "key"))
        ]
        cases += [replace(tokens, query_block=size, score_dtype="fp8") for size in (16, 64)]
        cases += [
            replace(tokens, window=150, key_mask=True),
            replace(tokens, key_mask=True, dense_len=200, score_dtype="int8"),
            replace(tokens, **PACKED, score_dtype="int8"),
            replace(tokens, block_size=48, length_q=427, length_k=427, batch=1),
            replace(tokens, length_q=77, offset="tensor"),
        ]
        cases += [
            Case(lse="exact", dtype=dtype),
            Case(window=40, dtype=dtype),
            Case(window=1, dtype=dtype),
            Case(window=150, key_mask=True, dtype=dtype),
            Case(key_mask=True, dtype=dtype),
            Case(key_mask=True, dense_len=240, dtype=dtype),
            Case(key_mask=True, dense_len=1000, dtype=dtype),
            Case(key_mask=True, query_block=16, group=1, dtype=dtype),
            Case(length_q=77, dtype=dtype),
            Case(length_q=77, offset="int", dtype=dtype),
            Case(length_q=77, offset="tensor", dtype=dtype),
            Case(length_q=1, dtype=dtype),
            Case(length_q=77, offset="tensor", key_mask=True, window=90, dtype=dtype),
            Case(lengths=PACKED["lengths"], dtype=dtype),
            Case(lengths=PACKED["lengths"], dense_len=60, window=50, dtype=dtype),
            Case(**PACKED, packed=True, dtype=dtype),
            Case(**PACKED, packed=True, dense_len=60, dtype=dtype),
            Case(**PACKED, packed=True, window=50, query_block=16, group=1, dtype=dtype),
            Case(scale=0.5, dtype=dtype),
            Case(dense_len=301, dtype=dtype),
            Case(dense_len=302, dtype=dtype),
            Case(dense_len=302, window=40, dtype=dtype),
        ]
    cases += [Case(dtype=torch.float16), Case(dtype=torch.float16, group=16, heads_kv=1, dim=128, value_dim=128)]
    cases += [Case(length_q=n, length_k=n) for n in (0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257)]
    cases += [Case(length_q=n, length_k=n, dtype=torch.float32, group=7) for n in (1, 17, 65, 129)]
    cases += [Case(length_q=0, length_k=50), Case(batch=0)]
    return cases


GRID = list(dict.fromkeys(grid()))


@gpu
@pytest.mark.parametrize("case", GRID, ids=names(GRID))
def test_calls(case, monkeypatch):
    check(case, monkeypatch)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_default_configuration_on_long_sequences(dtype, monkeypatch):
    """The published sizes: up to 6144 tokens all blocks are visited, and later queries do not depend on the call."""
    config = SparseAttentionConfig(dense_len=0)
    q, k, v = (torch.randn(1, heads, 8000, 128, device=DEVICE, dtype=dtype) for heads in (8, 2, 2))
    out = switchable_attention(q, k, v, config)
    rows = torch.tensor([0, 63, 64, 6143, 6144, 7777, 7999], device=DEVICE)
    for row in rows.tolist():
        one = switchable_attention(q[:, :, row : row + 1], k, v, config, offset=row)
        assert relative_error(out[:, :, row : row + 1], one) <= BOUND[dtype]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative_error(out[:, :, :6144], dense[:, :, :6144]) <= BOUND[dtype]


arrange(globals())
