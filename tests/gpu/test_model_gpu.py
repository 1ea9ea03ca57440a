"""The pass, the operators and what compilers make of them, on a CUDA device."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import infllm_pass
from infllm_pass import SparseAttentionConfig, switchable_attention, switchable_attention_varlen
from infllm_pass.errors import DeviceError, DtypeError, ShapeError, UntunedDeviceWarning
from infllm_pass.kernels import reference
from infllm_pass.kernels.triton.configs import ScatteredConfig, find_config
from infllm_pass.lowering.ops import prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall
from tests.support.common import SMALL, llama, oracle_attention, relative_error, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TILED = SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=3, init_blocks=1, dense_len=64, scorer="pooled"
)
"""Four blocks of sixteen: sizes that the Triton kernels take; above 64 tokens the selection leaves keys out."""

HALF = [torch.bfloat16, torch.float16]


def qkv(length=200, dtype=torch.bfloat16, batch=1, heads=(8, 2, 2), dim=64, requires_grad=False):
    return [torch.randn(batch, h, length, dim, device="cuda", dtype=dtype, requires_grad=requires_grad) for h in heads]


@contextmanager
def no_warnings() -> Iterator[None]:
    """Every warning of the pass is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntunedDeviceWarning)
        yield


# Torch operators on CUDA: what the Triton kernels refuse.


def test_torch_operators_take_windows_packed_sequences_and_offsets():
    """As on the CPU, which is tested against the oracle."""
    q, k, v = qkv(200, torch.float32, 1, (6, 2, 2), 32)
    bounds = torch.tensor([0, 3, 90, 200], dtype=torch.int32, device="cuda")
    numbers = torch.arange(200, device="cuda")[None] // 80
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    host = [x.cpu() for x in (q, k, v)]
    for arguments in (
        {"window": 50, "offset": torch.tensor([-9], device="cuda")},
        {"window": 70, "segment_ids": numbers},
    ):
        there = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        out = switchable_attention(q, k, v, SMALL, **arguments)
        assert relative_error(out.cpu(), switchable_attention(*host, SMALL, **there)) < 1e-5
    out = switchable_attention_varlen(*rows, bounds, bounds, SMALL)
    expected = switchable_attention_varlen(*(x.cpu() for x in rows), bounds.cpu(), bounds.cpu(), SMALL)
    assert relative_error(out.cpu(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_torch_operators_match_the_oracle(dtype, padded):
    """Blocks of eight are refused by the Triton kernels."""
    q, k, v = qkv(301, dtype, 2, (6, 2, 2), 32, requires_grad=True)
    key_mask = None
    if padded:
        key_mask = torch.ones(2, 301, dtype=torch.bool, device="cuda")
        key_mask[0, :40] = False
    out = switchable_attention(q, k, v, SMALL, key_mask=key_mask)
    grad = torch.randn_like(out)
    g = SMALL.geometry_for(32)
    call = AttentionCall(32**-0.5, SMALL.dense_len, g, key_mask=key_mask).arguments
    (blocks,) = select(q, k, call)
    chosen = (blocks[..., None] == torch.arange(g.num_blocks(301), device="cuda")).any(-2)
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    common = {"geometry": g, "scale": 32**-0.5, "offset": 0, "key_mask": key_mask, "dense_len": SMALL.dense_len}
    expected, _ = reference.attention(*wide, chosen, **common)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    rows = slice(None) if key_mask is None else key_mask
    assert relative_error(out.transpose(1, 2)[rows], expected.transpose(1, 2)[rows]) <= bound
    actual = torch.autograd.grad(out, (q, k, v), grad)
    for a, e in zip(actual, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert relative_error(a, e) <= bound


@pytest.mark.parametrize(
    ("config", "dtype", "refusal"),
    [
        (SMALL, torch.float32, "block_size=8: the Triton kernels take"),
        (TILED, torch.float64, "q is torch.float64: the Triton kernels take"),
    ],
    ids=["block_size", "dtype"],
)
@torch.no_grad()
def test_a_model_that_triton_refuses_equals_the_oracle_and_warns(config, dtype, refusal):
    plain = llama().to("cuda", dtype)
    model = infllm_pass.sparsify(torch.compile(plain), config, strict=True)
    for length in (50, 120):
        ids = tokens(length).cuda()
        with oracle_attention(config):
            expected = plain(ids).logits
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert relative_error(model(ids).logits, expected) < 1e-4
        warned = [str(warning.message) for warning in seen if warning.category is UntunedDeviceWarning]
        assert len(warned) == (length == 120)
        assert all(refusal in message for message in warned)
    sites = infllm_pass.report(model).sites
    assert {(site.device, site.branch, site.kernels) for site in sites} == {
        ("cuda:0", "dense", "SDPA"),
        ("cuda:0", "sparse", "torch operators"),
    }


# Models through the Triton kernels.


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["is_causal", "mask tensor"])
@torch.no_grad()
def test_a_model_equals_the_oracle(mode, use_cache):
    plain = llama().float().cuda()
    model = infllm_pass.sparsify(torch.compile(plain, mode=mode), TILED, strict=True)
    for length in (50, 120, 120):
        ids = tokens(length).cuda()
        with oracle_attention(TILED):
            expected = plain(ids, use_cache=use_cache).logits
        with no_warnings():
            actual = model(ids, use_cache=use_cache).logits.clone()
        assert relative_error(actual, expected) < 1e-4
    sites = infllm_pass.report(model).sites
    assert {(site.branch, site.kernels, site.refusal) for site in sites} == {
        ("dense", "SDPA", ""),
        ("sparse", "triton", ""),
    }
    assert all(site.decision == "switchable" for site in sites)


@pytest.mark.parametrize("length", [50, 120])
@torch.no_grad()
def test_a_padded_batch_equals_the_oracle(length):
    plain = llama().float().cuda()
    mask = torch.ones(3, length, dtype=torch.long, device="cuda")
    mask[0, : length // 5] = 0
    mask[1, -7:] = 0
    ids = tokens(length, 3).cuda()
    model = infllm_pass.sparsify(torch.compile(plain), TILED, strict=True)
    with oracle_attention(TILED, key_mask=mask.bool()):
        expected = plain(ids, attention_mask=mask).logits
    with no_warnings():
        actual = model(ids, attention_mask=mask).logits
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-4
    assert {site.kernels for site in infllm_pass.report(model).sites} == {"triton"}


@pytest.mark.parametrize("length", [50, 120])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_a_training_step_has_the_gradients_of_the_oracle(length, dtype, bound):
    """In bfloat16 the model's own rounding decides: the covering budget leaves no selection to differ in."""
    config = TILED if dtype == torch.float32 else SparseAttentionConfig.from_dict({**TILED.to_dict(), "topk": 40})
    plain = llama()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.div_(3)
    plain = plain.to(dtype).cuda().train()
    ids = tokens(length).cuda()
    model = infllm_pass.sparsify(torch.compile(plain), config, strict=True)
    with no_warnings():
        loss = model(ids, labels=ids).loss
        loss.backward()
    actual = {name: p.grad.clone() for name, p in plain.named_parameters()}
    plain.zero_grad()
    wide = plain.double()
    with oracle_attention(config):
        wide(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in wide.named_parameters()}
    flat = [torch.cat([grads[name].double().flatten() for name in expected]) for grads in (actual, expected)]
    assert relative_error(*flat) < bound


class Attention(nn.Module):
    """Attention with parameters of its own, to be compiled and exported."""

    def __init__(self, config=TILED, dtype=torch.bfloat16, dim=64):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(dim, 12 * 16, device="cuda", dtype=dtype)

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (12, 16)).transpose(1, 2)  # [B, 12, L, 16]
        q, k, v = heads.split([8, 2, 2], 1)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class SwitchableAttention(Attention):
    def attend(self, q, k, v):
        return switchable_attention(q, k, v, self.config)


class Placed(Attention):
    """Packed sequences by positions that start over, in a sliding window of so many keys or without one."""

    def __init__(self, window, device="cuda"):
        super().__init__(dtype=torch.float32)
        self.window = window
        self.to(device)

    def forward(self, x, positions):
        self.mask = self.visible(positions)[:, None]
        return super().forward(x)

    def visible(self, positions):
        index = torch.arange(positions.shape[1], device=positions.device)
        numbers = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        visible = (numbers[:, :, None] == numbers[:, None]) & (index[None, :] <= index[:, None])
        return visible if self.window is None else visible & (index[None, :] > index[:, None] - self.window)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)


class PlacedOracle(Placed):
    """The same by the float64 oracle, a sequence at a time."""

    def attend(self, q, k, v):
        rows = []
        for row, visible in enumerate(self.mask[:, 0]):
            starts = [0, *(i for i in range(1, len(visible)) if not visible[i, i - 1]), len(visible)]
            for begin, end in itertools.pairwise(starts):
                part = [x[row : row + 1, :, begin:end] for x in (q, k, v)]
                common = {"geometry": TILED.geometry_for(16), "scale": 0.25, "offset": 0, "window": self.window}
                sparse = end - begin >= TILED.dense_len
                blocks = reference.select_blocks(*part[:2], **common, dense_len=0) if sparse else None
                rows.append(reference.attention(*part, blocks, **common, dense_len=0)[0].to(q.dtype))
        return torch.cat(rows, 2).unflatten(2, (len(self.mask), -1))[0].transpose(0, 1)


def check_placed_attention(window, firsts, device):
    """A rewritten graph has the outputs and the gradients of the oracle."""
    model = Placed(window, device)
    oracle = PlacedOracle(window, device)
    oracle.load_state_dict(model.state_dict())
    length = 300
    x = torch.randn(len(firsts), length, 64, device=device)
    index = torch.arange(length, device=device)
    positions = torch.stack([torch.where(index < first, index, index - first) for first in firsts])
    compiled = infllm_pass.sparsify(torch.compile(model), TILED, strict=True)
    out, expected = compiled(x, positions), oracle(x, positions)
    out.square().mean().backward()
    expected.square().mean().backward()
    assert relative_error(out, expected) < 1e-4
    assert relative_error(model.qkv.weight.grad, oracle.qkv.weight.grad) < 1e-4
    assert relative_error(out, model(x, positions)) > 1e-3  # the selection does leave keys out
    return infllm_pass.report(compiled).sites


@pytest.mark.parametrize("window", [None, 150], ids=["no window", "window"])
@pytest.mark.parametrize("firsts", [(0, 0), (40, 191)], ids=["rows", "packed"])
def test_windows_and_packed_sequences_of_a_model_reach_the_kernels(window, firsts):
    with no_warnings():
        sites = check_placed_attention(window, firsts, "cuda")
    assert [(site.branch, site.kernels, site.refusal) for site in sites] == [("sparse", "triton", "")]
    assert "packed sequences" in sites[0].mask
    assert ("window 150" in sites[0].mask) == (window is not None)


def test_many_lengths_compile_one_dense_and_one_sparse_graph():
    """And one for the first, static length; Triton's kernels are compiled for no length in particular."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = infllm_pass.sparsify(torch.compile(Attention()), TILED, strict=True)
    lengths = [100, 101, *range(110, 300, 16), 37, 41, 50, 63, 1000, 517]
    compiled = []
    for number, length in enumerate(lengths):
        x = torch.randn(1, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        model(x).float().sum().backward()
        compiled.append(counters["stats"]["unique_graphs"])
        if number == 1:
            assert compiled[-1] <= 2
    assert compiled[-1] <= 3
    assert {site.branch for site in infllm_pass.report(model).sites} == {"dense", "sparse"}


def test_kernels_are_compiled_for_no_length_in_particular():
    triton = pytest.importorskip("triton")
    compiled = []

    def hook(**call):
        compiled.append(call["repr"])

    def run(length):
        q, k, v = qkv(length, requires_grad=True)
        switchable_attention(q, k, v, TILED).sum().backward()

    run(2048)
    run(1999)
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        for length in (65, 100, 128, 333, 1024, 1025, 1600, 2047, 4096, 5000):
            run(length)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    assert not compiled


# Operators in PyTorch's own checks.


def select(q, k, call):
    """Compression and selection."""
    return prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call), *call)


def operator_arguments(case, length=150):
    """q, k and v, and what all operators take after them; the case "dense" is one without a selection."""
    batch, packed = (1, True) if case == "packed" else (2, False)
    q, k, v = qkv(length, torch.float32, batch, (4, 2, 2), 16, requires_grad=True)
    place = {}
    if case == "padded":
        key_mask = torch.ones(batch, length, dtype=torch.bool, device="cuda")
        key_mask[0, :20] = False
        place["key_mask"] = key_mask
    elif case == "window":
        place["window"] = 40
    elif case == "int offset":
        q, place["offset"] = q[:, :, :50].detach().requires_grad_(), 60
    elif case == "device offset":
        q, place["offsets"] = q[:, :, :50].detach().requires_grad_(), torch.tensor([60], device="cuda")
    if packed:
        bounds = torch.tensor([0, 10, 100, length], dtype=torch.int32, device="cuda")
        place |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    geometry = TILED.geometry
    if case == "tokens":
        geometry = replace(TILED, scorer="tokens", score_dtype="int8").geometry_for(16)
    return (q, k, v), AttentionCall(0.25, 64, geometry, **place).arguments


def attend(case, q, k, v, *call):
    """The operators of a site."""
    return prefill.block_attention(q, k, v, [] if case == "dense" else select(q, k, call), *call)


OPERATOR_CASES = ["plain", "tokens", "dense", "padded", "window", "int offset", "device offset", "packed"]


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_opcheck(case):
    (q, k, v), call = operator_arguments(case)
    with initialised_memory():
        # What the tensors hold around the compressed keys is nobody's: no comparison of all of it.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(prefill.compress_keys.default, (q, k, *call), test_utils=checks)
        state = prefill.compress_keys(q, k, *call)
        torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *call))
        selection = [] if case == "dense" else select(q, k, call)
        torch.library.opcheck(prefill.block_attention.default, (q, k, v, selection, *call), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_opcheck_of_the_backward(case):
    tensors, call = operator_arguments(case)
    q, k, v = (x.detach() for x in tensors)
    with initialised_memory():
        selection = [] if case == "dense" else select(q, k, call)
        out, lse = prefill.block_attention(q, k, v, selection, *call)
        backward = (torch.randn_like(out), q, k, v, out, lse, selection, *call)
        torch.library.opcheck(prefill.block_attention_backward.default, backward, rtol=1e-3, atol=1e-3)


@contextmanager
def initialised_memory() -> Iterator[None]:
    """Fill memory that PyTorch does not initialise: opcheck compares lists past their end too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", OPERATOR_CASES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_calls_equal_eager_calls(case, dynamic):
    tensors, call = operator_arguments(case)
    out = attend(case, *tensors, *call)[0]
    expected = (out, *torch.autograd.grad(out.square().sum(), tensors))
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = torch.compile(lambda *a: attend(case, *a)[0], dynamic=dynamic, fullgraph=True)(*leaves, *call)
    actual = (out, *torch.autograd.grad(out.square().sum(), leaves))
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-6


# CUDA graphs.


@pytest.mark.parametrize("heads", [(32, 2, 2), (32, 8, 8)], ids=str)
@pytest.mark.parametrize("graphs", [False, True], ids=["", "CUDA graphs"])
def test_compiled_graphs_call_the_operators(heads, graphs):
    """Inductor generates no launch of theirs; results are those of the call that is not compiled, to the bit."""
    config = SparseAttentionConfig(topk=4, window_size=256, dense_len=1024, scorer="pooled")
    q, k, v = qkv(3001, heads=heads, dim=128)
    options = {"triton.cudagraphs": graphs}
    compiled = torch.compile(lambda q, k, v: switchable_attention(q, k, v, config) + 1, options=options)
    _, (source,) = run_and_get_code(compiled, q, k, v)
    for name in ("compress_keys", "select_blocks", "block_attention"):
        assert f"torch.ops.infllm.{name}.default" in source
    assert "_attention_forward_kernel" not in source
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        assert torch.equal(compiled(q, k, v), switchable_attention(q, k, v, config) + 1)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_cuda_graphs_leave_out_what_reads_data_on_the_host():
    """Torch operators, which take the geometries that the Triton kernels refuse."""
    q, k, v = qkv(300, torch.float32, 1, (6, 2, 2), 32)
    options = {"triton.cudagraphs": True}
    compiled = torch.compile(lambda q, k, v: switchable_attention(q, k, v, SMALL) + 1, options=options)
    with pytest.warns(UntunedDeviceWarning):
        out, (source,) = run_and_get_code(compiled, q, k, v)
    assert "torch.ops.infllm.block_attention.on_host" in source
    with pytest.warns(UntunedDeviceWarning):
        expected = switchable_attention(q, k, v, SMALL) + 1
    for _ in range(3):
        assert torch.equal(compiled(q, k, v), expected)
    assert torch.equal(out, expected)


def test_a_captured_call_replays_on_new_inputs():
    q, k, v = qkv(300, requires_grad=True)
    offset = torch.zeros(1, dtype=torch.int32, device="cuda")
    grad = torch.randn_like(q)

    def step():
        out = switchable_attention(q, k, v, TILED, offset=offset)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (0, -100, -299):
        with torch.no_grad():
            for tensor in (q, k, v, grad):
                tensor.copy_(torch.randn_like(tensor))
            offset.fill_(number)
        graph.replay()
        for one, other in zip(captured, step(), strict=True):
            assert torch.equal(one, other)


def test_captured_decoding_moves_with_its_offset():
    """One query against a cache of fixed size: the position is a number on the device."""
    _, k, v = qkv(512)
    q = torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    offset = torch.zeros(1, dtype=torch.int32, device="cuda")
    switchable_attention(q, k, v, TILED, offset=offset)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = switchable_attention(q, k, v, TILED, offset=offset)
    for position in (511, 300, 64, 0):
        offset.fill_(position)
        graph.replay()
        assert relative_error(out, switchable_attention(q, k, v, TILED, offset=position)) < 1e-6


@torch.no_grad()
def test_reduce_overhead_skips_no_cuda_graph():
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain = Attention().eval()
    model = infllm_pass.sparsify(torch.compile(plain, mode="reduce-overhead"), TILED, strict=True)
    twin = _twin(plain)
    for _ in range(4):
        x = torch.randn(1, 300, 64, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_error(model(x).clone(), twin(x)) < 1e-2
    assert counters["inductor"]["cudagraph_skips"] == 0


@torch.no_grad()
def test_max_autotune_compiles_the_operator():
    plain = Attention().eval()
    model = infllm_pass.sparsify(torch.compile(plain, mode="max-autotune-no-cudagraphs"), TILED, strict=True)
    x = torch.randn(1, 300, 64, device="cuda", dtype=torch.bfloat16)
    assert relative_error(model(x), _twin(plain)(x)) < 1e-2
    assert [site.kernels for site in infllm_pass.report(model).sites] == ["triton"]


def _twin(plain: Attention) -> SwitchableAttention:
    """The same weights, with attention called as a function."""
    twin = SwitchableAttention(plain.config)
    twin.load_state_dict(plain.state_dict())
    return twin.eval()


# Determinism, memory, limits.


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_bitwise_the_same_in_every_run(dtype, compiled):
    q, k, v = qkv(1500, dtype, 2, requires_grad=True)
    attend = torch.compile(switchable_attention) if compiled else switchable_attention
    grad = torch.randn_like(q)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out = attend(q, k, v, TILED)
            runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_memory_below_the_switch_is_linear_in_the_length(dtype):
    """A compiled model builds an N x N mask and repeats its heads; the pass takes both out, in float32 too."""
    config = SparseAttentionConfig(dense_len=1 << 20, scorer="pooled")
    plain = llama(num_attention_heads=4, num_key_value_heads=2, hidden_size=256, max_position_embeddings=1 << 15)
    plain = plain.to(device="cuda", dtype=dtype)
    length = 16384
    ids = tokens(length).cuda()
    model = infllm_pass.sparsify(torch.compile(plain.model), config, strict=True)
    model(ids, use_cache=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(ids, use_cache=False)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < length * length // 2


def peak(function) -> int:
    """Bytes by which memory rises during a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("heads", [32, 8], ids=["group 16", "group 4"])
def test_scratch_of_the_kernels_is_bounded(heads):
    """Beside its output the forward keeps lists, log-sum-exps and the pool of gathering; nothing grows as N x N."""
    length = 16384
    major, minor = torch.cuda.get_device_capability()
    scattered = find_config(ScatteredConfig, "scattered", 10 * major + minor, 2, 128)
    pool = scattered.pool_bytes if scattered and heads == 8 else 0  # offered to small groups only
    q, k, v = qkv(length, heads=(heads, 2, 2), dim=128, requires_grad=True)
    config = SparseAttentionConfig(dense_len=8192, scorer="pooled")
    switchable_attention(q, k, v, config)
    with torch.no_grad():
        used = peak(lambda: switchable_attention(q, k, v, config))
    output = q.numel() * q.element_size()
    assert used - output < pool + (64 << 20)

    def step():
        return torch.autograd.grad(switchable_attention(q, k, v, config).sum(), (q, k, v))

    step()
    assert peak(step) < 5 * output + (512 << 20)


def test_lengths_are_not_read_on_the_host():
    """Device offsets, segments, padding and packed bounds reach the kernels without a synchronisation."""
    q, k, v = qkv(256, batch=2)
    mask = torch.ones(2, 256, dtype=torch.bool, device="cuda")
    segments = torch.arange(256, device="cuda").expand(2, -1) // 100
    offset = torch.zeros(2, dtype=torch.int32, device="cuda")
    bounds = torch.tensor([0, 100, 256], dtype=torch.int32, device="cuda")
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    calls = [
        lambda: switchable_attention(q, k, v, TILED, key_mask=mask),
        lambda: switchable_attention(q, k, v, TILED, segment_ids=segments),
        lambda: switchable_attention(q, k, v, TILED, offset=offset, window=50),
        lambda: switchable_attention_varlen(*rows, bounds, bounds, TILED),
    ]
    for call in calls:
        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Export.


def exported(module, x):
    length = torch.export.Dim("length", min=65, max=4096)
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes={"x": {1: length}})


@torch.no_grad()
def test_exported_modules_keep_the_operator():
    module = SwitchableAttention().eval()
    x = torch.randn(1, 200, 64, device="cuda", dtype=torch.bfloat16)
    program = exported(module, x)
    targets = [node.target for node in program.graph.nodes]
    for operator in (prefill.compress_keys, prefill.select_blocks, prefill.block_attention):
        assert targets.count(operator.default) == 1
    for length in (200, 333):
        x = torch.randn(1, length, 64, device="cuda", dtype=torch.bfloat16)
        assert relative_error(program.module()(x), module(x)) < 1e-3


@pytest.mark.usefixtures("shared_cpp_runtime")
@torch.no_grad()
def test_ahead_of_time_compiled_modules_give_the_same(tmp_path):
    module = SwitchableAttention().eval()
    x = torch.randn(1, 200, 64, device="cuda", dtype=torch.bfloat16)
    path = torch._inductor.aoti_compile_and_package(exported(module, x), package_path=str(tmp_path / "attention.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for length in (200, 333, 1025):
        x = torch.randn(1, length, 64, device="cuda", dtype=torch.bfloat16)
        assert relative_error(loaded(x), module(x)) < 1e-2


# Errors.


def test_bad_calls_are_refused():
    q, k, v = qkv(100)
    with pytest.raises(DtypeError, match="cast them to one dtype"):
        switchable_attention(q, k.float(), v, TILED)
    with pytest.raises(DeviceError, match="move them to one device"):
        switchable_attention(q, k, v.cpu(), TILED)
    with pytest.raises(DeviceError, match="key_mask is on cpu"):
        switchable_attention(q, k, v, TILED, key_mask=torch.ones(1, 100, dtype=torch.bool))
    with pytest.raises(DeviceError, match="offsets is on cpu"):
        switchable_attention(q, k, v, TILED, offset=torch.tensor([0]))
    segments = torch.zeros(1, 100, dtype=torch.int64, device="cuda")
    with pytest.raises(ShapeError, match="give the offset as an int"):
        switchable_attention(q, k, v, TILED, offset=segments[0, :1], segment_ids=segments)


def test_strides_without_a_unit_are_copied_by_the_functions_and_refused_by_the_operator():
    q, k, v = qkv(100)
    strided = k.mT.contiguous().mT
    assert strided.stride(-1) != 1
    assert torch.equal(switchable_attention(q, strided, v, TILED), switchable_attention(q, k, v, TILED))
    call = AttentionCall(0.125, 0, TILED.geometry).arguments
    for operator in (prefill.compress_keys, lambda *given: prefill.block_attention(*given[:2], v, [], *given[2:])):
        with pytest.raises(ShapeError, match=r"k.contiguous\(\) first"):
            operator(q, strided, *call)


def test_checkpointed_layers_select_once_and_save_lists(monkeypatch):
    """Compiled by Inductor, gradients to the bit.

    A token's lists take 32 bytes in each layer: for 2 heads 64 blocks at most, 4 bytes each, shared by 16 tokens.
    """
    ran: dict[str, int] = {}
    launched = prefill._launched

    def counted(function, *arguments):
        ran[function] = ran.get(function, 0) + 1
        return launched(function, *arguments)

    monkeypatch.setattr(prefill, "_launched", counted)
    ids = tokens(4096).cuda()
    gradients, held = {}, {}
    for saves in ("nothing", "selection", "attention"):
        sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
        plain = llama(use_cache=False, weights=1.0, max_position_embeddings=4096, **sizes).to("cuda", torch.bfloat16)
        plain.train().gradient_checkpointing_enable({"use_reentrant": False})
        config = SparseAttentionConfig(window_size=512, topk=18, dense_len=0, checkpoint_saves=saves)
        model = infllm_pass.sparsify(torch.compile(plain), config, strict="all")
        for _ in range(2):
            ran.clear()
            plain.zero_grad()
            before = torch.cuda.memory_allocated()
            loss = model(ids, labels=ids).loss
            held[saves] = torch.cuda.memory_allocated() - before
            loss.backward()
        gradients[saves] = [each.grad.clone() for each in plain.parameters()]
        assert ran["select_blocks"] == (4 if saves == "nothing" else 2)
        assert ran["block_attention"] == (2 if saves == "attention" else 4)
    for saves in ("selection", "attention"):
        pairs = zip(gradients[saves], gradients["nothing"], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    per_token = (held["selection"] - held["nothing"]) / (2 * 4096)
    assert 25 < per_token < 60
    out = (held["attention"] - held["selection"]) / (2 * 4096)
    assert 1000 < out < 1200  # 512 numbers of 2 bytes, 8 of 4
