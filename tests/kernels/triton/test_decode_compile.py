"""The decode kernels compile for every architecture, fit its shared memory, and do not spill where they are hot."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import sympy
import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from triton.runtime import driver

import infllm_pass
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.configs import DecodeConfig, find_config
from infllm_pass.kernels.triton.decode.attention import MAX_SPLITS, _decode_attention_kernel, _decode_merge_kernel
from infllm_pass.kernels.triton.decode.compress import decode_compress_kernel
from infllm_pass.kernels.triton.decode.rows import DecodeShape
from infllm_pass.kernels.triton.decode.select import _decode_score_kernel
from infllm_pass.kernels.triton.decode.token_scores import _decode_sum_kernel, decode_tokens_kernel
from infllm_pass.kernels.triton.decode.topk import decode_rank_kernel
from infllm_pass.kernels.triton.index_keys import FORMS
from infllm_pass.lowering.ops import checks, decode_triton
from infllm_pass.lowering.ops.attention_args import DecodeCall
from infllm_pass.lowering.ops.decode import decode_attention, new_state
from tests.kernels.triton.test_tracing import Driver, Recorder, _Traced, kernels_of, write_in_place
from tests.lowering.ops.test_checks import TILED
from tests.support.cache_support import CachedAttention, GrowingAttention, caches, tokens
from tests.support.triton_device import INTERPRETED
from tests.support.triton_support import SHARED_MEMORY, capabilities, compile_ahead

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

GEOMETRY = BlockGeometry(8, 4, 16, 1, 1, 4)


@dataclass(frozen=True)
class Variant:
    """Sizes for which the kernels are compiled.

    Attributes:
        hot: a configuration in which no register may spill on sm_90.
    """

    dtype: torch.dtype = torch.bfloat16
    dim: int = 128
    value_dim: int = 128
    group: int = 16
    length_q: int = 1
    block_size: int = 64
    query_block: int = 1
    exact: bool = False
    window: bool = False
    starts: bool = False
    holes: bool = False
    terms: bool = False
    hot: bool = False

    @property
    def name(self) -> str:
        options = [name for name in ("exact", "window", "starts", "holes", "terms", "hot") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = [f"dim{self.dim}", f"group{self.group}", f"queries{self.length_q}", f"block{self.block_size}"]
        return "-".join([dtype, *sizes, f"shared{self.query_block}", *options])


VARIANTS = [
    Variant(hot=True),
    Variant(group=4, hot=True),
    Variant(starts=True, holes=True, hot=True),
    Variant(group=3, dim=64, value_dim=64, hot=True),
    Variant(group=4, length_q=4, hot=True),
    Variant(length_q=16, hot=True),
    Variant(group=4, length_q=16, query_block=16, window=True, starts=True, holes=True),
    Variant(dim=256, value_dim=256, group=2, length_q=16),
    Variant(group=8, starts=True, terms=True),
    Variant(group=1, exact=True, starts=True),
    Variant(group=128, block_size=128, dim=64, value_dim=64, terms=True),
    Variant(torch.float16, group=7, dim=72, value_dim=40, block_size=48, length_q=3),
    Variant(group=8, dim=16, value_dim=16, block_size=16),
    *(Variant(torch.float32, dim, dim, group=4, length_q=16) for dim in (64, 128, 256)),
]


def arguments(variant: Variant, capability: int) -> dict[str, object]:
    """A value for every parameter of the kernels."""
    shape = DecodeShape.choose(variant.group, variant.length_q, variant.query_block, variant.dtype.itemsize)
    padded, padded_value = (max(16, triton.next_power_of_2(size)) for size in (variant.dim, variant.value_dim))
    launch = find_config(DecodeConfig, "decode", 0, variant.dtype.itemsize, max(padded, padded_value))
    owned = launch.chunk * 4
    strides = {f"stride_{name}{axis}": "i32:16" for name in "qkv12" for axis in "bht"}
    strides |= {"stride_mb": "i32:16", "stride_mt": "i32", "stride_bb": "i32", "stride_bh": "i32", "stride_bt": 1}
    return {
        **dict.fromkeys(("q", "k", "v", "k1", "k2", "out"), variant.dtype),
        **dict.fromkeys(("parts", "part_out", "part_lse", "lse"), torch.float32),
        "key_mask": torch.bool,
        **dict.fromkeys(("lengths", "starts", "filled", "keys", "arrivals", "blocks"), torch.int32),
        **dict.fromkeys(("lengths_stride", "starts_stride", "heads", "capacity"), "i32"),
        **dict.fromkeys(("chunks", "num_blocks", "length_q", "tiles", "dense_len", "window", "splits"), "i32"),
        **strides,
        **dict.fromkeys(("scale_log2", "cap_log2"), "fp32"),
        **dict.fromkeys(("key_bias", "sinks"), torch.float32 if variant.terms else torch.int32),
        **dict.fromkeys(("HAS_BIAS", "HAS_SINKS", "HAS_SOFTCAP"), variant.terms),
        "G": shape.group,
        "GP": shape.padded_group,
        "TOKENS": shape.tokens,
        "LINES": shape.lines,
        "QUERY_BLOCK": variant.query_block,
        "D": variant.dim,
        "DP": padded,
        "VALUE_DIM": variant.value_dim,
        "BLOCK_DV": padded_value,
        "KERNEL": 32,
        "STRIDE": 16,
        "BLOCK": variant.block_size,
        "INIT": 1,
        "LOCAL": 32,
        "BUDGET": 64,
        "WIDTH": 64,
        "EXACT": variant.exact,
        "HAS_KEY_MASK": variant.holes,
        "HAS_WINDOW": variant.window,
        "HAS_STARTS": variant.starts,
        "CHUNK": launch.chunk,
        "KEYS": launch.keys,
        "NORM_KEYS": owned if variant.exact else launch.chunk,
        "NORM_SIZE": 32 if variant.exact else 128,
        "NORM_STRIDE": 16 if variant.exact else 64,
        "BLOCKS": launch.blocks,
        "RANKS": variant.length_q == 1,
        "RANKED": launch.rank_blocks,
        "STEP_KEYS": min(variant.block_size & -variant.block_size, launch.step_keys),
        "MOST": MAX_SPLITS,
        "DIMS": min(32, padded_value),
        "PRECISION": "ieee",
        "DEPENDENT": capability >= 90,
        "AHEAD": launch.prefetch_visits,
    }


def kernels(variant: Variant) -> dict[str, tuple[triton.JITFunction, int, int]]:
    """The kernels, each with its warps and stages."""
    dim = max(16, triton.next_power_of_2(max(variant.dim, variant.value_dim)))
    launch = find_config(DecodeConfig, "decode", 0, variant.dtype.itemsize, dim)
    columns = DecodeShape.choose(variant.group, variant.length_q, variant.query_block, variant.dtype.itemsize).columns
    return {
        "compress": (decode_compress_kernel, launch.warps(launch.compress_warps, columns), launch.compress_stages),
        "score": (_decode_score_kernel, launch.warps(launch.score_warps, columns), launch.score_stages),
        "rank": (decode_rank_kernel, launch.rank_warps, 3),
        "attention": (_decode_attention_kernel, launch.warps(launch.attend_warps, columns), launch.attend_stages),
        "merge": (_decode_merge_kernel, 4, 3),
    }


@pytest.mark.parametrize(
    ("variant", "capability"),
    [
        pytest.param(variant, capability, id=f"{variant.name}-sm{capability}")
        for number, variant in enumerate(VARIANTS)
        for capability in capabilities(number, variant.dtype, variant.hot)
    ],
)
def test_decode_kernels_compile(variant, capability, record_property):
    given = arguments(variant, capability)
    for name, (kernel, warps, stages) in kernels(variant).items():
        report = compile_ahead(kernel, given, capability=capability, num_warps=warps, num_stages=stages)
        record_property(name, report)
        print(name, report)
        assert report["shared"] <= SHARED_MEMORY[capability], name
        if variant.hot and capability == 90:
            assert report["spilled"] == 0, name


TOKEN_VARIANTS = [
    ("key", Variant(hot=True)),
    ("key", Variant(group=4, hot=True)),
    ("key", Variant(group=8, terms=True)),
    ("int8", Variant(group=4, length_q=4, starts=True, holes=True, hot=True)),
    ("fp8", Variant(length_q=16, query_block=16, window=True)),
    ("key", Variant(torch.float32, 256, 256, group=4, length_q=16, block_size=48)),
]


@pytest.mark.parametrize(
    ("form", "variant", "capability"),
    [
        pytest.param(form, variant, capability, id=f"{form}-{variant.name}-sm{capability}")
        for form, variant in TOKEN_VARIANTS
        # float8 keys need sm_89, the least of those that have it
        for capability in ([89, 90] if form != "key" else [90] if variant.hot else [86])
    ],
)
def test_decode_kernels_of_token_scores_compile(form, variant, capability, record_property):
    shape = DecodeShape.choose(variant.group, variant.length_q, variant.query_block, variant.dtype.itemsize)
    launch = find_config(DecodeConfig, "decode", 0, variant.dtype.itemsize, variant.dim)
    kept = variant.dim // 4
    given = {
        **arguments(variant, capability),
        "ki": {"key": variant.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[form],
        "ki_scale": variant.dtype if form == "key" else torch.float32,
        "best": torch.float32,
        "channels": torch.int32,
        **{f"stride_{name}{axis}": "i32:16" for name in "is" for axis in "bht"},
        "channel_stride": "i32",
        "KEPT": kept,
        "KP": kept,
        "RUNS": 2,
        "CODE": (16 << 9) | (16 | 32 << 9) << 18,
        "FORM": FORMS[form],
        "OWNED": launch.token_blocks,
        "STEP_TOKENS": min(launch.token_keys // 8, variant.block_size & -variant.block_size),
    }
    for name, kernel, warps, stages in (
        ("tokens", decode_tokens_kernel, launch.compress_warps, launch.token_stages),
        ("sum", _decode_sum_kernel, launch.score_warps, 3),
    ):
        warps = launch.warps(warps, shape.columns)
        report = compile_ahead(kernel, given, capability=capability, num_warps=warps, num_stages=stages)
        record_property(name, report)
        print(name, report)
        assert report["shared"] <= SHARED_MEMORY[capability], name
        if variant.hot and capability == 90:
            assert report["spilled"] == 0, name


TOKENS = replace(GEOMETRY, scorer="tokens", channels=((*range(4, 8), *range(12, 16)),))

WRITTEN = {
    "pooled": (GEOMETRY, [{"k1", "k2", "parts", "arrivals"}, {"keys", "arrivals", "blocks", "filled"}]),
    "agnostic": (
        replace(GEOMETRY, selected_blocks=5, agnostic_blocks=2),
        [
            {"s1"},
            {"k1", "k2", "parts", "arrivals"},
            {"keys", "arrivals", "blocks", "filled"},
            {"keys", "blocks"},
        ],
    ),
    "tokens": (TOKENS, [{"ki", "parts", "best", "arrivals"}, {"keys", "arrivals", "blocks", "filled"}]),
    "int8": (
        replace(TOKENS, score_dtype="int8"),
        [{"ki", "ki_scale", "parts", "best", "arrivals"}, {"keys", "arrivals", "blocks", "filled"}],
    ),
    "fp8": (
        replace(TOKENS, score_dtype="fp8"),
        [{"ki", "ki_scale", "parts", "best", "arrivals"}, {"keys", "arrivals", "blocks", "filled"}],
    ),
}
"""What the kernels of a selection write, by scorer and dtype of index keys."""


def stepping(geometry):
    """A decode step as a rewritten graph has it: the new key and value are written, then attended to."""

    def step(q, k, v, lengths, starts, key_mask, *state):
        k, v = k.index_copy_(2, lengths.long() - 1, q[:, :2]), v.index_copy_(2, lengths.long() - 1, q[:, 2:4])
        bias = k[..., 0] if geometry.agnostic_blocks else None
        call = DecodeCall(lengths, 0.25, 64, geometry, starts, key_mask, key_bias=bias)
        return decode_attention(q, k, v, list(state), *call.arguments)

    return step


@pytest.fixture
def imagined(monkeypatch):
    """Triton compiles for an H100 that is not there, and CPU tensors stand for CUDA tensors."""
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)


@pytest.mark.usefixtures("imagined")
@pytest.mark.parametrize("scored", WRITTEN)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_compilers_see_kernels_that_write_the_state_in_place(padded, scored, caplog):
    """And one graph serves caches of any batch size and capacity."""
    geometry, selection = WRITTEN[scored]
    k, v = torch.randn(3, 2, 100, 16), torch.randn(3, 2, 100, 16)
    state = new_state(k, geometry)
    tensors = [torch.randn(3, 6, 1, 16), k, v, torch.tensor([90]), torch.tensor([0, 3, 5]) if padded else None]
    tensors += [torch.ones(3, 100, dtype=torch.bool) if padded else None, *state]
    dynamic = [[0], [0, 2], [0, 2], [], [0], [0, 1], *([0, 2] for _ in state[:-1]), [0]]
    for tensor, sizes in zip(tensors, dynamic, strict=True):
        for size in sizes if tensor is not None else ():
            torch._dynamo.mark_dynamic(tensor, size)
    recorder = Recorder()
    # As Inductor does: what a graph writes to its inputs stays in the graph.
    backend = aot_autograd(fw_compiler=recorder._keep("fw"), keep_inference_input_mutations=True)
    compiled = torch.compile(stepping(geometry), backend=backend, fullgraph=True)
    with caplog.at_level(logging.WARNING), torch.no_grad(), pytest.raises(_Traced):
        compiled(*tensors)
    assert "identify_mutated_tensors" not in caplog.text
    (module,) = recorder.graphs.values()
    kernels = kernels_of(module)
    assert not [node for node in module.graph.nodes if "infllm" in str(node.target)]
    assert len(kernels) == len(selection) + 2
    written = [set(node.kwargs["tensors_to_clone"]) for node in kernels]
    assert written == [*selection, {"part_out", "part_lse"}, {"out", "lse"}]
    write_in_place(module.graph)
    assert [node.kwargs["tensors_to_clone"] for node in kernels_of(module)] == [[] for _ in kernels]
    # Sizes are compared with each other and with bounds; none is pinned to a number.
    pinned = [guard for guard in recorder.guards if isinstance(guard, sympy.Eq | sympy.Ne) and guard.rhs.is_number]
    assert not pinned


@pytest.mark.usefixtures("imagined")
@pytest.mark.parametrize("graphs", [False, True], ids=["", "CUDA graphs"])
def test_a_rewritten_step_updates_its_state_in_place(graphs, monkeypatch):
    """The pass in front of a compiler: no copy of a cache or of its state.

    Four kernels a site, or, where CUDA graphs record launches that overlap, the operator that launches them.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(decode_triton, "recording_drops_pdl", lambda *_: True)
    recorder = Recorder()
    backend = aot_autograd(fw_compiler=recorder._keep("fw"), keep_inference_input_mutations=True)
    module = CachedAttention().float()
    model = infllm_pass.sparsify(torch.compile(module, backend=backend, fullgraph=True), TILED)
    keys, values = (cache.float() for cache in caches(3))
    with torch.no_grad(), pytest.raises(_Traced), config.patch({"triton.cudagraphs": graphs}):
        model(tokens(3, 1).float(), keys, values, torch.tensor(60), torch.ones(3, 96, dtype=torch.bool))
    (site,) = infllm_pass.report(model).sites
    assert (site.kernels, site.cache_state, site.guard) == ("triton", "carried", "on the device")
    (graph,) = (module.graph for module in recorder.graphs.values())
    write_in_place(graph)
    kernels = kernels_of(recorder.graphs["fw"])
    assert [node.kwargs["tensors_to_clone"] for node in kernels] == [[] for _ in range(0 if graphs else 4)]
    operators = [node for node in graph.nodes if node.args[:1] == (torch.ops.infllm.decode_attention.default,)]
    assert [node.meta["only_clone_these_tensors"] for node in operators] == [[] for _ in range(graphs)]


@pytest.mark.usefixtures("imagined")
def test_a_rewritten_step_of_a_growing_cache_updates_its_state_in_place():
    """One graph for all lengths: the sizes of the compressed keys follow from the number of keys."""
    torch._dynamo.reset()
    recorder = Recorder()
    backend = aot_autograd(fw_compiler=recorder._keep("fw"), keep_inference_input_mutations=True)
    module = GrowingAttention().float()
    model = infllm_pass.sparsify(torch.compile(module, backend=backend, fullgraph=True), TILED)
    keys, values = (cache.float() for cache in caches(3, 70))
    for cache in (keys, values):
        torch._dynamo.mark_dynamic(cache, 2)
    with torch.no_grad(), pytest.raises(_Traced):
        model(tokens(3, 1).float(), keys, values)
    (site,) = infllm_pass.report(model).sites
    assert (site.kernels, site.cache_state, site.guard_dynamic) == ("triton", "carried", True)
    graph = recorder.graphs["fw"].graph
    write_in_place(graph)
    assert [node.kwargs["tensors_to_clone"] for node in kernels_of(recorder.graphs["fw"])] == [[] for _ in range(4)]
    symbols = {symbol for guard in recorder.guards for symbol in guard.free_symbols}
    assert symbols
    for length in (64, 100, 1023, 4096, 131072):
        assert all(bool(guard.subs(dict.fromkeys(symbols, length))) for guard in recorder.guards), length
