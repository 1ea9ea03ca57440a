"""Every Triton kernel compiles for every architecture, fits its shared memory, and does not spill where it is hot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import triton

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.backward.block_to_query import _block_table_kernel, _invert_kernel
from infllm_pass.kernels.triton.backward.dkv import _key_gradients_kernel
from infllm_pass.kernels.triton.backward.dq import _output_delta_kernel, _query_gradient_kernel
from infllm_pass.kernels.triton.backward.scattered import _scattered_gradient_kernel
from infllm_pass.kernels.triton.backward.split_work import _add_pieces_kernel, _schedule_kernel
from infllm_pass.kernels.triton.configs import LaunchConfig, ScatteredConfig, SelectionConfig, find_config
from infllm_pass.kernels.triton.decode.importance import _fill_kernel, _pool_kernel
from infllm_pass.kernels.triton.importance import WARPS, WINDOWS, _importance_kernel
from infllm_pass.kernels.triton.index_keys import FORMS, Channels, _channels_kernel, _index_keys_kernel
from infllm_pass.kernels.triton.prefill.attention import _attention_forward_kernel
from infllm_pass.kernels.triton.prefill.choose import _choose_kernel
from infllm_pass.kernels.triton.prefill.compress import _compress_kernel, chunk_keys
from infllm_pass.kernels.triton.prefill.pooled import POOLED, _select_pooled_kernel
from infllm_pass.kernels.triton.prefill.scattered.persistent import _scattered_kernel
from infllm_pass.kernels.triton.prefill.scattered.schedule import scattered_constants
from infllm_pass.kernels.triton.prefill.select import selection_constants
from infllm_pass.kernels.triton.prefill.token_scores import _select_tokens_kernel, token_scorer
from infllm_pass.kernels.triton.tile_tables import TileShape, padded_dim
from tests.support.triton_device import INTERPRETED
from tests.support.triton_support import SHARED_MEMORY, capabilities, compile_ahead

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

RELEASE_SPILLS = {"3.8": {"key_gradients": 16, "select": 24, "scattered": 44}}
"""Bytes that a release of Triton spills beyond what is allowed on sm_90, by kernel.

The releases before and after 3.8 compile the same kernels without; assemblers of CUDA 12.8, 12.9 and 13.0 make no
difference, so it is what 3.8 hands to them.
"""


def spills_allowed(name: str, usual: int) -> int:
    """Bytes that a hot variant of a kernel may spill on sm_90, `usual` with most releases of Triton."""
    return usual + RELEASE_SPILLS.get(".".join(triton.__version__.split(".")[:2]), {}).get(name, 0)


@dataclass(frozen=True)
class Variant:
    """Sizes and options for which a kernel is compiled.

    Attributes:
        terms: whether scores have a cap, keys a bias and softmaxes a sink.
        fixed: whether the kernel is compiled for a number of elements between tokens.
        hot: a configuration that was tuned, in which no register may spill on sm_90.
    """

    dtype: torch.dtype = torch.bfloat16
    dim: int = 128
    value_dim: int = 128
    group: int = 16
    block_size: int = 64
    lists: bool = True
    window: bool = False
    key_mask: bool = False
    terms: bool = False
    fixed: bool = True
    hot: bool = False

    @property
    def name(self) -> str:
        options = [name for name in ("lists", "window", "key_mask", "terms", "hot") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        if not self.fixed:
            options.append("any_stride")
        return "-".join([dtype, f"dim{self.dim}", f"group{self.group}", f"block{self.block_size}", *options])

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(max(self.dim, self.value_dim)))


HOT = [
    Variant(hot=True),
    Variant(group=4, hot=True),
    Variant(dim=64, value_dim=64, hot=True),
    Variant(dim=64, value_dim=64, group=4, hot=True),
    Variant(lists=False, hot=True),
]
ATTENTION = [
    *HOT,
    Variant(torch.float32, 256, 256, group=2, key_mask=True, terms=True),
    Variant(torch.float32, 128, 128, group=4),
    Variant(torch.float32, 64, 64, group=4, block_size=128),
    Variant(dim=256, value_dim=256, group=2),
    Variant(group=4, fixed=False, terms=True),
    Variant(dim=64, value_dim=64, group=8, terms=True),
    Variant(dim=72, value_dim=40, group=7, block_size=48),
    Variant(group=1, block_size=16, window=True, key_mask=True),
    Variant(torch.float16, group=96, block_size=32),
]
COMPRESSION = [
    Variant(hot=True),
    Variant(dim=64, value_dim=64, hot=True),
    Variant(dim=80, value_dim=80),
    *(Variant(torch.float32, dim, dim) for dim in (64, 256)),
]


def tile_arguments(variant: Variant, launch: LaunchConfig) -> dict[str, object]:
    """Arguments of the kernels that compute a tile of queries, whichever of them a kernel has."""
    shape = TileShape.choose(variant.group)
    return {
        **dict.fromkeys(("q", "k", "v", "out", "grad_out", "grad_q"), variant.dtype),
        **dict.fromkeys(("lse", "delta"), torch.float32),
        **dict.fromkeys(("panels", "counts"), torch.int32),
        **dict.fromkeys(("capacity", "dense_len", "window", "length_q"), "i32"),
        **dict.fromkeys(("scale", "scale_log2", "cap_log2", "log2_e"), "fp32"),
        "blocks": torch.int16,
        "tokens": shape.mask_dtype,
        "key_mask": torch.bool,
        "key_mask_token_stride": 1,
        "bias_token_stride": 1,
        **dict.fromkeys(("key_bias", "sinks"), torch.float32 if variant.terms else torch.int32),
        **dict.fromkeys(("bias_batch_stride", "bias_head_stride"), "i32"),
        "K_TOKEN_STRIDE": 2 * variant.dim if variant.fixed else 0,
        "V_TOKEN_STRIDE": 2 * variant.value_dim if variant.fixed else 0,
        **dict.fromkeys((f"{name}_stride" for name in ("lse_batch", "lse_head", "key_mask_batch")), "i32"),
        **dict.fromkeys(("delta_batch_stride", "delta_head_stride"), "i32"),
        "GROUP": variant.group,
        "PADDED_GROUP": shape.padded_group,
        "TOKENS": shape.tokens,
        "TILES": shape.tiles,
        "BLOCK_M": launch.rows,
        "BLOCK_SIZE": variant.block_size,
        "BLOCK_N": launch.step_keys(variant.block_size),
        "HEAD_DIM": variant.dim,
        "BLOCK_D": max(16, triton.next_power_of_2(variant.dim)),
        "VALUE_DIM": variant.value_dim,
        "BLOCK_DV": max(16, triton.next_power_of_2(variant.value_dim)),
        "HAS_LISTS": variant.lists,
        "SCATTERED_OFFERED": variant.lists and variant.group <= 8,
        "INIT_BLOCKS": 1,
        "LOCAL_BLOCKS": 32,
        "is_scattered": torch.int32,
        "HAS_WINDOW": variant.window,
        "HAS_KEY_MASK": variant.key_mask,
        **dict.fromkeys(("HAS_BIAS", "HAS_SINKS", "HAS_SOFTCAP"), variant.terms),
        "SPLIT": launch.queries_in_registers,
        "QUERIES_IN_REGISTERS": launch.queries_in_registers,
        "PRECISION": "ieee",
        "ROWS": 32,
    }


def compression_arguments(variant: Variant, launch: LaunchConfig) -> dict[str, object]:
    """Arguments of the kernel that averages keys, for sequences that fill a row each."""
    return {
        **dict.fromkeys(("k", "fine", "coarse"), variant.dtype),
        "sequences": torch.int32,
        **dict.fromkeys(("count", "length_k", "fine_slots", "coarse_slots", "heads"), "i32"),
        "SIZE": 32,
        "STRIDE": 16,
        "HEAD_DIM": variant.dim,
        "PADDED_DIM": variant.padded,
        "CHUNK": chunk_keys(variant.padded),
        "PACKED": False,
    }


def key_arguments(variant: Variant, launch: LaunchConfig) -> dict[str, object]:
    """Arguments of the kernels of the key gradients and of the transposed selection, whichever of them a kernel has."""
    shape = TileShape.choose(variant.group)
    tile_heads = min(shape.padded_group, launch.rows)
    tables = ["table", "starts", "counts", "queries", "slots", "piece", "sequences", "panels", "cursors"]
    numbers = [
        "count",
        "heads",
        "length_q",
        "length_k",
        "num_units",
        "num_blocks",
        "num_tiles",
        "tiles_per_part",
        "capacity",
        "bound",
        "limit",
        "window",
        "dense_len",
        "key_mask_batch_stride",
        "key_mask_token_stride",
        "bias_batch_stride",
        "bias_head_stride",
        "bias_token_stride",
    ]
    return {
        **dict.fromkeys(("grad_out", "q", "k", "v", "grad_k", "grad_v"), variant.dtype),
        **dict.fromkeys(("lse", "delta", "pool", "grad_bias"), torch.float32),
        "key_bias": torch.float32 if variant.terms else torch.int32,
        **dict.fromkeys(tables, torch.int32),
        **dict.fromkeys(numbers, "i32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
        "key_mask": torch.bool,
        "blocks": torch.int16,
        "tokens": shape.mask_dtype,
        "GROUP": variant.group,
        "TILE_HEADS": tile_heads,
        "HEAD_CHUNKS": shape.padded_group // tile_heads,
        "TOKENS": launch.rows // tile_heads,
        "HEAD_DIM": variant.dim,
        "VALUE_DIM": variant.value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(variant.dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(variant.value_dim)),
        "BLOCK_SIZE": variant.block_size,
        "KEYS": 16,
        "BLOCK_N": launch.step_keys(variant.block_size),
        "QUERY_BLOCK": 1,
        "HAS_LISTS": variant.lists,
        "HAS_KEY_MASK": variant.key_mask,
        "HAS_WINDOW": variant.window,
        **dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP"), variant.terms),
        "PRECISION": "ieee",
        "INIT_BLOCKS": 1,
        "LOCAL_BLOCKS": 32,
        "DENSE": not variant.lists,
        "ROWS": 256,
        "TILES": shape.tiles,
        "WIDTH": max(32, min(128, 2048 // shape.tokens)),
        "FILL": True,
        "SMALLEST": 4096,
        "UNITS": 512,
    }


@dataclass(frozen=True)
class Kernel:
    """A kernel, the variants to compile it for, and the arguments of a variant.

    A parameter whose name has ``stride`` in it and that `arguments` leaves out is a multiple of 16.
    """

    kernel: triton.JITFunction
    name: str
    variants: list[Variant]
    arguments: Callable[[Variant, LaunchConfig], dict[str, object]] = tile_arguments


KERNELS = [
    Kernel(_attention_forward_kernel, "attention_forward", ATTENTION),
    Kernel(_query_gradient_kernel, "query_gradient", ATTENTION),
    Kernel(_output_delta_kernel, "output_delta", [Variant()]),
    Kernel(_block_table_kernel, "block_table", [Variant(window=True)], key_arguments),
    Kernel(_invert_kernel, "transpose", [Variant(group=group) for group in (1, 4, 16)], key_arguments),
    Kernel(_schedule_kernel, "schedule", [Variant()], key_arguments),
    Kernel(_key_gradients_kernel, "key_gradients", ATTENTION, key_arguments),
    Kernel(
        _add_pieces_kernel, "add_pieces", [Variant(key_mask=True), Variant(key_mask=True, terms=True)], key_arguments
    ),
    Kernel(_compress_kernel, "compress", COMPRESSION, compression_arguments),
]


CASES = [
    pytest.param(kernel, variant, capability, id=f"{kernel.name}-{variant.name}-sm{capability}")
    for kernel in KERNELS
    for number, variant in enumerate(kernel.variants)
    for capability in capabilities(number, variant.dtype, variant.hot)
]


@pytest.mark.parametrize(("kernel", "variant", "capability"), CASES)
def test_compiles(kernel, variant, capability, record_property):
    launch = (
        find_config(LaunchConfig, kernel.name, capability, variant.dtype.itemsize, variant.padded) or LaunchConfig()
    )
    known = kernel.arguments(variant, launch)
    arguments = {name: known.get(name, "i32:16") for name in kernel.kernel.arg_names}
    missing = [name for name in arguments if name not in known and "stride" not in name]
    assert not missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        used = compile_ahead(kernel.kernel, arguments, capability=capability, **launch.options)
    for figure, number in used.items():
        record_property(figure, number)
    assert used["shared"] <= SHARED_MEMORY[capability]
    if variant.hot and capability == 90:
        # Where registers are limited, what only a program's start and end need may spill.
        assert used["spilled"] <= spills_allowed(kernel.name, 0 if launch.max_registers is None else 64)


SELECTION = [
    Variant(hot=True),
    Variant(dim=64, value_dim=64, hot=True),
    Variant(group=96, dim=80, value_dim=80, window=True),
    Variant(group=8, dim=256, value_dim=256, terms=True),
    Variant(group=4, dim=256, value_dim=256),
    Variant(group=1, block_size=48),
    *(Variant(torch.float32, dim, dim, group=4) for dim in (128, 256)),
]


@pytest.mark.parametrize(
    ("variant", "capability"),
    [
        pytest.param(variant, capability, id=f"{variant.name}-sm{capability}")
        for number, variant in enumerate(SELECTION)
        for capability in capabilities(number, variant.dtype, variant.hot)
    ],
)
def test_block_selection_compiles(variant, capability, record_property):
    size = variant.dtype.itemsize
    launch = find_config(SelectionConfig, "select", capability, size, variant.padded)
    shape = TileShape.choose(variant.group)
    launch = launch.for_panel(shape.panel_tokens)
    geometry = BlockGeometry(block_size=variant.block_size, agnostic_blocks=31 if variant.terms else 0)
    window = 4096 if variant.window else None
    arguments = {
        **dict.fromkeys(("q", "k1", "k2"), variant.dtype),
        "ranks": torch.int32 if variant.terms else variant.dtype,
        **dict.fromkeys(("panels", "scratch", "list_counts"), torch.int32),
        "list_blocks": torch.int16,
        "list_tokens": shape.mask_dtype,
        **dict.fromkeys(("scale_log2", "cap_log2"), "fp32"),
        "HAS_SOFTCAP": variant.terms,
        **dict.fromkeys(("stride_qb", "stride_qh", "stride_qt"), "i32:16"),
        **dict.fromkeys(("num_panels", "heads_kv", "slots1", "slots2", "slots3", "num_blocks", "capacity"), "i32"),
        **dict.fromkeys(("dense_len", "window"), "i32"),
        **selection_constants(shape, geometry, variant.dim, window is not None, launch),
        **POOLED.constants(shape, geometry, launch),
        "PROGRAMS": 264,
        "PRECISION": "ieee",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        used = compile_ahead(_select_pooled_kernel, arguments, capability=capability, **launch.options)
    for name, value in used.items():
        record_property(name, value)
    assert used["shared"] <= SHARED_MEMORY[capability]
    if variant.hot and capability == 90:
        # What only a panel's start and end need may spill.
        assert used["spilled"] <= spills_allowed("select", 64)


@pytest.mark.parametrize("capability", [80, 90])
def test_importance_compiles(capability):
    """Kernels of query-agnostic blocks, in prompts and in steps."""
    known = {
        **dict.fromkeys(("importance", "s1", "key_bias"), torch.float32),
        **dict.fromkeys(("sequences", "lengths", "starts", "filled", "chosen", "blocks"), torch.int32),
        "keys": torch.int64,
        "SIZE": 32,
        "KERNEL": 32,
        "STRIDE": 16,
        "BLOCK": 64,
        "PADDED_SIZE": 32,
        "PADDED": 32,
        "BLOCKS": WINDOWS,
        "PACKED": True,
        "WINDOWS": WINDOWS,
        "HAS_STARTS": True,
        "HAS_WINDOW": True,
        "LINES": 16,
        "QUERY_BLOCK": 1,
        "INIT": 1,
        "LOCAL": 16,
        "AWARE": 33,
        "BUDGET": 64,
        "WIDTH": 64,
        "RANKED": 1024,
    }
    for kernel, warps in ((_importance_kernel, WARPS), (_pool_kernel, WARPS), (_fill_kernel, 4)):
        arguments = {name: known.get(name, "i32") for name in kernel.arg_names}
        assert compile_ahead(kernel, arguments, capability=capability, num_warps=warps, num_stages=3)["spilled"] == 0


@dataclass(frozen=True)
class TokenVariant:
    """What token scores are compiled for; hot: as a default configuration of a model with heads of 128 has it; terms:
    with a soft cap.
    """

    dtype: torch.dtype = torch.bfloat16
    group: int = 4
    kept: int = 32
    block_size: int = 64
    query_block: int = 1
    form: str = "key"
    runs: int = 2
    window: bool = False
    key_mask: bool = False
    terms: bool = False
    hot: bool = False


TOKEN_SCORES = [
    TokenVariant(hot=True),
    TokenVariant(group=16, hot=True),
    TokenVariant(query_block=16, hot=True),
    TokenVariant(form="int8", hot=True),
    TokenVariant(form="fp8", runs=0),
    TokenVariant(group=8, kept=128, terms=True),
    TokenVariant(group=96, block_size=48, kept=80, query_block=64),
    TokenVariant(group=1, kept=256, window=True, key_mask=True),
    *(TokenVariant(torch.float32, kept=kept) for kept in (128, 256)),
]


@pytest.mark.parametrize(
    ("variant", "capability"),
    [
        pytest.param(variant, capability, id=f"{number}-{variant.form}-{variant.kept}-sm{capability}")
        for number, variant in enumerate(TOKEN_SCORES)
        for capability in capabilities(number, variant.dtype, variant.hot or variant.form == "fp8")
    ],
)
def test_token_scores_compile(variant, capability, record_property):
    padded = padded_dim(variant.kept)
    launch = find_config(SelectionConfig, "select_tokens", capability, variant.dtype.itemsize, padded)
    shape = TileShape.choose(variant.group, variant.query_block)
    launch = launch.for_panel(shape.panel_tokens // variant.query_block)
    geometry = BlockGeometry(
        block_size=variant.block_size, query_block=variant.query_block, scorer="tokens", score_dtype=variant.form
    )
    channels = Channels(torch.empty(0), 0, variant.kept, variant.runs, 32 << 9 | (16 | 32 << 9) << 18)
    window = 4096 if variant.window else None
    stored = {"key": variant.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[variant.form]
    arguments = {
        "q": variant.dtype,
        "ki": stored,
        "scales": torch.float32 if variant.form != "key" else variant.dtype,
        "key_mask": torch.bool if variant.key_mask else torch.int32,
        **dict.fromkeys(("channels", "panels", "scratch", "list_counts"), torch.int32),
        "list_blocks": torch.int16,
        "list_tokens": shape.mask_dtype,
        **dict.fromkeys(("scale_log2", "cap_log2"), "fp32"),
        "HAS_SOFTCAP": variant.terms,
        **dict.fromkeys(("stride_qb", "stride_qh", "stride_qt"), "i32:16"),
        **dict.fromkeys(("num_panels", "heads_kv", "slots", "channel_stride", "num_blocks", "capacity"), "i32"),
        **dict.fromkeys(("mask_batch_stride", "mask_token_stride", "dense_len", "window"), "i32"),
        **selection_constants(shape, geometry, 128, window is not None, launch),
        **token_scorer(channels, variant.key_mask).constants(shape, geometry, launch),
        "PROGRAMS": 264,
        "PRECISION": "ieee",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        used = compile_ahead(_select_tokens_kernel, arguments, capability=capability, **launch.options)
    for name, value in used.items():
        record_property(name, value)
    assert used["shared"] <= SHARED_MEMORY[capability]
    if variant.hot and capability == 90:
        assert used["spilled"] <= 64  # what only a panel's start and end need may spill


@pytest.mark.parametrize(("form", "runs", "capability"), [("key", 2, 80), ("int8", 0, 86), ("fp8", 1, 90)])
def test_index_keys_compile(form, runs, capability):
    stored = {"key": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[form]
    known = {
        "k": torch.bfloat16,
        "ki": stored,
        "scales": torch.bfloat16 if form == "key" else torch.float32,
        **dict.fromkeys(("channels", "table"), torch.int32),
        **Channels(torch.empty(0), 0, 32, runs, (16 << 9) | (16 | 32 << 9) << 18).constants,
        **{f"stride_{axis}": "i32:16" for axis in "bht"},
        "FORM": FORMS[form],
        "ROWS": 64,
    }
    for kernel in (_index_keys_kernel, _channels_kernel):
        arguments = {name: known.get(name, "i32") for name in kernel.arg_names}
        used = compile_ahead(kernel, arguments, capability=capability, num_warps=4, num_stages=3)
        assert used["spilled"] == 0


SCATTERED = find_config(ScatteredConfig, "scattered", 90, 2, 128)

GATHERING = [
    Variant(group=4, hot=True),
    Variant(dim=64, value_dim=64, group=4, hot=True),
    Variant(group=8, terms=True),
    Variant(group=1),
    Variant(dim=72, value_dim=40, group=7, block_size=16, window=True, key_mask=True),
    Variant(group=2, fixed=False),
    Variant(torch.float32, 64, 64, group=4),
]


def gathering_used(kernel, variant: Variant, launch: ScatteredConfig) -> dict[str, int]:
    """What a kernel of scattered selections uses on sm_90, where alone they are offered; all programs are resident."""
    geometry = BlockGeometry(block_size=variant.block_size, selected_blocks=64)
    shape = TileShape.choose(variant.group)
    known = {
        **tile_arguments(variant, launch),
        **dict.fromkeys(("state", "scratch"), torch.int32),
        "pool": variant.dtype,
        "sums": torch.float32,
        **dict.fromkeys(("num_tiles", "num_blocks", "chunk_tiles", "ranges", "heads"), "i32"),
        **scattered_constants(geometry, shape.tokens, variant.window),
        "PADDED_SCORED": 32,
    }
    arguments = {name: known.get(name, "i32:16") for name in kernel.arg_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        used = compile_ahead(kernel, arguments, capability=90, **launch.options)
    if variant.dtype != torch.float32:
        assert launch.programs * (used["shared"] + 1024) <= 228 * 1024
    return used


@pytest.mark.parametrize(
    ("variant", "launch"),
    [
        pytest.param(variant, launch, id=f"{variant.name}-{name}")
        for number, variant in enumerate(GATHERING)
        for name, launch in (("launched", SCATTERED), ("recorded", SCATTERED.recorded))
        if variant.hot or (name == "recorded") == (number % 2 == 0)
    ],
)
def test_gathering_compiles(variant, launch: ScatteredConfig, record_property):
    used = gathering_used(_scattered_kernel, variant, launch)
    for figure, number in used.items():
        record_property(figure, number)
    if variant.hot:
        # Where registers are limited, numbers that outlive a ticket may spill.
        assert used["spilled"] <= spills_allowed("scattered", 0 if launch.max_registers is None else 128)
        assert launch.programs * 128 * used["registers"] <= 1 << 16


@pytest.mark.parametrize(
    "variant",
    [variant for variant in GATHERING if variant.hot or variant.key_mask],
    ids=lambda variant: variant.name,
)
def test_gathering_for_the_gradient_of_queries_compiles(variant, record_property):
    launch = find_config(ScatteredConfig, "scattered_gradient", 90, 2, variant.padded)
    used = gathering_used(_scattered_gradient_kernel, variant, launch)
    for figure, number in used.items():
        record_property(figure, number)
    if variant.hot:
        # Numbers that outlive a ticket may spill.
        assert used["spilled"] <= spills_allowed("scattered_gradient", 64)
        assert launch.programs * 32 * launch.num_warps * used["registers"] <= 1 << 16


def test_the_choice_compiles():
    known = {
        **tile_arguments(Variant(group=4), LaunchConfig()),
        **dict.fromkeys(("num_tiles", "heads"), "i32"),
        "state": torch.int32,
        "above": "fp32",
        "SCORED": 31,
        "WIDTH": 2048,
    }
    arguments = {name: known[name] for name in _choose_kernel.arg_names}
    assert compile_ahead(_choose_kernel, arguments, capability=90, num_warps=8, num_stages=2)["spilled"] == 0
