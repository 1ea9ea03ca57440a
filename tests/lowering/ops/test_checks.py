"""What the Triton kernels refuse, and in which words; and when the pass chooses them. Needs no GPU."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import infllm_pass
from infllm_pass import SparseAttentionConfig, switchable_attention, switchable_attention_varlen
from infllm_pass.errors import CachePositionError, DeviceError, DtypeError, ShapeError, UntunedDeviceWarning
from infllm_pass.frontend.backend import SwitchableBackend
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops import checks
from infllm_pass.lowering.ops.attention_args import ATTEND, AttentionCall, geometry_of
from infllm_pass.lowering.ops.positions import checked_positions
from infllm_pass.rewrite.pipeline import Switch, run_pass
from infllm_pass.runtime.position_checks import take_checks
from tests.support.common import SMALL, capture, count_calls

TILED = SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=3, init_blocks=1, dense_len=64, scorer="pooled"
)
"""Four blocks of sixteen: sizes that the Triton kernels take."""


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch):
    monkeypatch.setattr(checks, "HAS_TRITON", True)


@pytest.fixture
def fake():
    """Tensors made inside have a device and no data, so that CUDA tensors exist everywhere."""
    with FakeTensorMode():
        yield


def cuda(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


class Refused(Exception):
    """The Triton kernels leave a call to others."""


def refuse(config=TILED, scale=0.25, **changes):
    """Check a call that is right but for the changes."""
    right = {name: cuda(2, heads, 40, 16) for name, heads in (("q", 6), ("k", 2), ("v", 2)) if name not in changes}
    given = right | changes
    q, k, v = (given.pop(name) for name in "qkv")
    if not checks.check_call(q, k, v, AttentionCall(scale, 0, config.geometry, **given)):
        raise Refused(checks.refused_by_tiled(q, v, scale, config.geometry))


def int32(*shape, device="cuda"):
    return torch.empty(*shape, dtype=torch.int32, device=device)


def packed(batch=1, **changes):
    """Tensors of one row, for packed sequences."""
    return {name: cuda(batch, heads, 40, 16) for name, heads in (("q", 6), ("k", 2), ("v", 2))} | changes


def test_calls_in_range_pass(fake):
    refuse()
    refuse(offsets=int32(1), window=1, key_mask=torch.empty(2, 40, dtype=torch.bool, device="cuda"))
    refuse(offsets=torch.empty(2, dtype=torch.int64, device="cuda"))
    refuse(cu_seqlens_k=int32(81))
    refuse(**packed(cu_seqlens_q=int32(4), cu_seqlens_k=int32(4)))


CASES = {
    "float64": (lambda: {n: cuda(2, 2, 40, 16, dtype=torch.float64) for n in "qkv"}, Refused, "take torch.float16"),
    "mixed dtypes": (lambda: {"v": cuda(2, 2, 40, 16, dtype=torch.float16)}, DtypeError, "cast them to one dtype"),
    "head_dim": (lambda: {"v": cuda(2, 2, 40, 257)}, ShapeError, "v has head_dim 257"),
    "strides": (
        lambda: {"k": torch.empty_strided((2, 2, 40, 16), (1280, 640, 1, 40), device="cuda")},
        ShapeError,
        r"k has strides \(1280, 640, 1, 40\).*k.contiguous\(\)",
    ),
    "too many keys": (
        lambda: {n: cuda(1, 1, (1 << 20) + 1, 16) for n in "qkv"},
        ShapeError,
        "at most 1048576 are supported; raise block_size",
    ),
    "window": (lambda: {"window": 0}, ShapeError, "window=0: expected at least 1"),
    "float offsets": (lambda: {"offsets": cuda(1)}, DtypeError, "offsets is torch.float32"),
    "long bounds": (
        lambda: {"cu_seqlens_k": torch.empty(3, dtype=torch.int64, device="cuda")},
        DtypeError,
        "cu_seqlens_k is torch.int64: expected torch.int32",
    ),
    "offsets elsewhere": (lambda: {"offsets": int32(1, device="cpu")}, DeviceError, "move them to one device"),
    "offsets in rows": (lambda: {"offsets": int32(2, 1)}, ShapeError, "expected one dimension"),
    "too few offsets": (lambda: {"offsets": int32(3)}, ShapeError, "expected 1 or one a row, 2"),
    "offsets of packed sequences": (
        lambda: {"offsets": int32(1), "cu_seqlens_k": int32(4)},
        ShapeError,
        "give the offset as an int",
    ),
    "query bounds alone": (lambda: {"cu_seqlens_q": int32(4)}, ShapeError, "packed sequences need both"),
    "bounds of different numbers": (
        lambda: packed(cu_seqlens_q=int32(3), cu_seqlens_k=int32(4)),
        ShapeError,
        "equally many numbers and batch size 1",
    ),
    "bounds of a batch": (
        lambda: packed(2, cu_seqlens_q=int32(4), cu_seqlens_k=int32(4)),
        ShapeError,
        "equally many numbers and batch size 1",
    ),
    "block_size not of 16": (
        lambda: {
            "config": SparseAttentionConfig(
                block_size=24, kernel_size=8, kernel_stride=4, window_size=24, scorer="pooled"
            )
        },
        Refused,
        "block_size=24",
    ),
    "large block_size": (
        lambda: {"config": SparseAttentionConfig(block_size=256, scorer="pooled")},
        Refused,
        "multiples of 16 from 16 to 128",
    ),
    "query_block not of two": (
        lambda: {"config": SparseAttentionConfig(query_block=3, scorer="pooled")},
        Refused,
        "powers of two",
    ),
    "large query_block": (
        lambda: {"config": SparseAttentionConfig(query_block=256, scorer="pooled")},
        Refused,
        "powers of two",
    ),
    "negative scale": (lambda: {"scale": -0.25}, Refused, "scale=-0.25: the Triton kernels take positive"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_out_of_range_is_refused(fake, case):
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        refuse(**change())


def test_only_cuda_devices_with_triton_for_nvidia(monkeypatch, fake):
    with pytest.raises(Refused, match="q is on cpu: the Triton kernels run on CUDA devices"):
        refuse(**{name: torch.empty(1, 1, 4, 16) for name in "qkv"})
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        with pytest.raises(Refused, match="built for ROCm"):
            refuse()
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    with pytest.raises(Refused, match="triton is not installed: pip install triton"):
        refuse()


@pytest.mark.parametrize(
    ("capability", "taken"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True), (None, True)]
)
def test_devices_before_ampere_are_refused(capability, taken, monkeypatch, fake):
    monkeypatch.setattr(checks, "compute_capability", lambda _: capability)
    with contextlib.nullcontext() if taken else pytest.raises(Refused) as raised:
        refuse()
    if not taken:
        found = ".".join(map(str, capability))
        assert str(raised.value) == f"cuda:0 has compute capability {found}: the Triton kernels need 8.0 or later"


def test_float8_index_keys_need_ada(monkeypatch, fake):
    geometry = BlockGeometry(scorer="tokens", channels=(tuple(range(16)),), score_dtype="fp8")
    q = cuda(2, 6, 40, 16)
    monkeypatch.setattr(checks, "compute_capability", lambda _: (8, 9))
    assert checks.refused_by_tiled(q, q, 0.25, geometry) is None
    monkeypatch.setattr(checks, "compute_capability", lambda _: (8, 6))
    assert checks.refused_by_tiled(q, q, 0.25, replace(geometry, score_dtype="int8")) is None
    assert 'score_dtype="fp8"' in checks.refused_by_tiled(q, q, 0.25, geometry)


def test_the_device_of_the_tensors_is_asked(monkeypatch):
    devices = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: devices[device.index])
    assert checks.compute_capability(torch.device("cuda", 1)) is None  # no driver here: nobody to ask
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [checks.compute_capability(torch.device("cuda", number)) for number in devices] == [(9, 0), (7, 5)]


def test_sites_on_devices_before_ampere_fall_back_and_say_why(monkeypatch):
    monkeypatch.setattr(checks, "compute_capability", lambda _: (7, 5))
    report, (message,) = compile_refused(TILED)
    (site,) = report.sites
    assert (site.branch, site.kernels) == ("sparse", "torch operators")
    assert site.refusal == "cuda:0 has compute capability 7.5: the Triton kernels need 8.0 or later"
    assert site.refusal in message


BAD_BOUNDS = {
    "descending": ([0, 30, 20, 80], "cu_seqlens_k descends or leaves 0 to 80"),
    "negative": ([-1, 30, 80], "cu_seqlens_k descends or leaves 0 to 80"),
    "too many keys": ([0, 40, 81], "cu_seqlens_k descends or leaves 0 to 80"),
    "crossing rows": ([0, 30, 50, 80], "a sequence of keys 30 to 50: it crosses a row of 40 keys"),
}


@pytest.mark.parametrize("case", BAD_BOUNDS)
def test_bounds_are_read_where_that_costs_nothing(case, monkeypatch):
    """By the checks of the Triton operators, too."""
    numbers, message = BAD_BOUNDS[case]
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)
    tensors = {name: torch.empty(2, heads, 40, 16) for name, heads in (("q", 6), ("k", 2), ("v", 2))}
    bounds = torch.tensor(numbers, dtype=torch.int32)
    with pytest.raises(ShapeError, match=message):
        refuse(**tensors, cu_seqlens_k=bounds)
    refuse(**tensors, cu_seqlens_k=torch.tensor([0, 40, 40, 77], dtype=torch.int32))
    if "crossing" not in case:
        rows = {name: tensor[:1] for name, tensor in tensors.items()}
        rows["k"] = rows["v"] = torch.empty(1, 2, 80, 16)
        with pytest.raises(ShapeError, match="cu_seqlens_q descends or leaves 0 to 40"):
            refuse(**rows, cu_seqlens_q=bounds, cu_seqlens_k=torch.arange(len(numbers), dtype=torch.int32))


def test_bounds_on_a_device_are_read_on_demand_only(monkeypatch):
    class Bounds:
        is_cuda, device = True, torch.device("cuda", 1)

    captured, asked = [False], []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    monkeypatch.delenv("INFLLM_DEBUG_CHECKS", raising=False)
    assert not checks._may_read(Bounds())
    assert not asked
    monkeypatch.setenv("INFLLM_DEBUG_CHECKS", "1")
    assert checks._may_read(Bounds())
    assert asked == [Bounds.device]
    captured[0] = True
    assert not checks._may_read(Bounds())
    assert checks._may_read(torch.tensor([0, 1]))
    with FakeTensorMode():
        traced = int32(4)
        assert not checks._may_read(torch.tensor([0, 1]))
    assert not checks._may_read(traced)


@pytest.mark.parametrize(
    ("segment_ids", "error", "message"),
    [
        (torch.zeros(1, 39, dtype=torch.int64), ShapeError, r"segment_ids has shape \(1, 39\): expected \[B, Lk\]"),
        (torch.zeros(1, 40), DtypeError, "segment_ids is torch.float32: expected an integer dtype"),
    ],
    ids=["shape", "dtype"],
)
def test_bad_segment_ids(segment_ids, error, message):
    pytest.importorskip("triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [cuda(1, 2, 40, 16) for _ in "qkv"]
        with pytest.raises(error, match=message):
            infllm_pass.switchable_attention(*tensors, TILED, segment_ids=segment_ids)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_padded(q, k, v, padding):
    length = q.shape[2]
    causal = torch.arange(length)[None, :] <= torch.arange(length)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & padding[:, None, None, :].bool(), enable_gqa=True)


def heads(length, batch=1):
    return [torch.randn(batch, count, length, 16) for count in (6, 2, 2)]


def calls(module: fx.GraphModule) -> list[fx.Node]:
    """The calls of attention in a graph."""
    target = torch.ops.infllm.block_attention.default
    return [node for node in module.graph.nodes if node.target is target]


@pytest.fixture
def anywhere(monkeypatch):
    """Let the Triton kernels take CPU tensors, for graphs that are looked at and not run."""
    pytest.importorskip("triton")
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_sparse_sites_become_three_operators(anywhere, dynamic):
    module = capture(attend, *heads(100), dynamic=dynamic)
    (site,) = run_pass(module, TILED).sites
    (call,) = calls(module)
    assert (site.branch, site.kernels, site.refusal) == ("sparse", "triton", "")
    (q, k, v, selection, *rest), given = call.args, ATTEND.named(call)
    assert [node.meta["example_value"].shape[1] for node in (q, k, v)] == [6, 2, 2]
    others = {"scale": 0.25, "softcap": 0.0, "dense_len": 64, "geometry": given["geometry"]}
    assert rest == [others.get(name) for name in ATTEND.names[4:]]
    assert geometry_of(given["geometry"]) == TILED.geometry_for(16)
    select, compress = torch.ops.infllm.select_blocks.default, torch.ops.infllm.compress_keys.default
    assert (selection.target, selection.args[2].target) == (select, compress)
    assert selection.args == (q, k, selection.args[2], *call.args[4:])
    assert selection.args[2].args == (q, k, *call.args[4:])
    (first,) = call.users
    assert first.meta["example_value"].shape == (1, 6, 100, 16)
    assert [count_calls(module, target) for target in (compress, select)] == [1, 1]


@pytest.mark.parametrize("length", [40, 100])
def test_padded_sites_pass_their_keys_on_both_sides(anywhere, length):
    module = capture(attend_padded, *heads(length, batch=2), torch.ones(2, length, dtype=torch.int64))
    (site,) = run_pass(module, TILED).sites
    (call,) = calls(module)
    assert (site.branch, site.kernels, site.mask_elided) == ("sparse" if length > 64 else "dense", "triton", True)
    assert call.args[4].meta["example_value"].dtype == torch.bool
    assert (call.args[3] != []) == (length > 64)


def test_dense_sites_stay_with_sdpa(anywhere):
    module = capture(attend, *heads(40))
    (site,) = run_pass(module, TILED).sites
    assert (site.branch, site.kernels) == ("dense", "SDPA")
    module = capture(attend, *heads(100))
    (site,) = run_pass(module, TILED, switch=Switch.ALWAYS_DENSE).sites
    assert (site.branch, site.kernels) == ("dense", "SDPA")
    assert not calls(module)


def test_operands_are_copied_where_their_last_stride_is_not_1(anywhere):
    q, k, v = heads(100)
    module = capture(attend, q, k.mT.contiguous().mT, v)
    run_pass(module, TILED)
    (call,) = calls(module)
    assert [node.meta["example_value"].stride(-1) for node in call.args[:3]] == [1, 1, 1]
    assert count_calls(module, "contiguous") == 1


def test_cpu_sites_never_see_the_triton_kernels():
    module = capture(attend, *heads(100))
    (site,) = run_pass(module, TILED).sites
    assert (site.kernels, site.refusal) == ("C++", "")
    (call,) = calls(module)
    assert len(call.args[3].meta["example_value"]) == 1  # block numbers, and no tiles
    (site,) = run_pass(capture(attend, *(x.double() for x in heads(100))), TILED).sites
    assert (site.kernels, site.refusal) == ("C++", "")


def compile_refused(config, dtype=torch.bfloat16, length=100):
    """Compile a CUDA site without a GPU, and give the report with the warnings."""
    backend = SwitchableBackend(lambda module, _: module.forward, config)
    with warnings.catch_warnings(record=True) as seen, FakeTensorMode():
        warnings.simplefilter("always")
        q = cuda(1, 2, length, 16, dtype=dtype)
        torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend=backend)(q)
    return backend.log.report(), [str(w.message) for w in seen if w.category is UntunedDeviceWarning]


@pytest.mark.parametrize(
    ("config", "dtype", "refusal"),
    [(SMALL, torch.bfloat16, "block_size=8: the Triton"), (TILED, torch.float64, "q is torch.float64: the Triton")],
    ids=["block_size", "dtype"],
)
def test_cuda_sites_that_triton_refuses_fall_back_and_say_why(config, dtype, refusal):
    report, warned = compile_refused(config, dtype)
    (site,) = report.sites
    assert (site.device, site.branch, site.kernels) == ("cuda:0", "sparse", "torch operators")
    assert site.refusal.startswith(refusal)
    assert "not triton:" in str(report)
    assert report.to_dict()["graphs"][0]["sites"][0]["refusal"] == site.refusal
    (message,) = warned
    assert "sparse attention on cuda:0 runs through torch operators tuned for the CPU" in message
    assert refusal in message


def call_refused(length, config, *, packed=False, compiled=False):
    """Call the functions with a geometry that is refused, and give the warnings."""

    def attend(q, k, v, bounds):
        if packed:
            return switchable_attention_varlen(
                *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), bounds, bounds, config
            )
        return switchable_attention(q, k, v, config)

    torch._dynamo.reset()
    call = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
    with warnings.catch_warnings(record=True) as seen, FakeTensorMode():
        warnings.simplefilter("always")
        out = call(cuda(1, 6, length, 16), cuda(1, 2, length, 16), cuda(1, 2, length, 16), int32(3))
    assert out.shape == ((length, 6, 16) if packed else (1, 6, length, 16))
    return [str(w.message) for w in seen if w.category is UntunedDeviceWarning]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_functions_say_that_triton_refuses_and_why(packed, compiled):
    (message,) = call_refused(100, SMALL, packed=packed, compiled=compiled)
    assert "sparse attention on cuda:0 runs through torch operators tuned for the CPU" in message
    assert "block_size=8: the Triton kernels take" in message


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_functions_below_the_switch_do_not_warn(packed):
    assert not call_refused(40, SMALL, packed=packed)


def test_cuda_sites_below_the_switch_do_not_warn():
    report, warned = compile_refused(SMALL, length=40)
    assert [site.kernels for site in report.sites] == ["SDPA"]
    assert not warned


class Cached(nn.Module):
    def forward(self, x, keys, position):
        places = torch.arange(x.shape[2], device=keys.device) + position
        keys.index_copy_(2, places, x)
        later = torch.arange(keys.shape[2], device=keys.device) > places.unsqueeze(1)
        return (x @ keys.mT).masked_fill(later, float("-inf")).softmax(-1) @ keys


def checks_of(position, monkeypatch, dynamic=None):
    """The checks of the positions in a CUDA cache, and examples of the graph's inputs."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # moving a tensor without data needs no driver
    monkeypatch.setattr(checks, "HAS_TRITON", False)  # the kernels ask the device how large it is
    with FakeTensorMode():
        module = capture(Cached(), cuda(1, 2, 3, 16), cuda(1, 2, 200, 16), position(), dynamic=dynamic)
        inputs = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        report = run_pass(module, TILED)
        taken = take_checks(module, len(inputs))
    assert [site.reason for site in report.sites] == ["SWITCHABLE"], report.sites
    assert count_calls(module, checked_positions._opoverload) == 0
    assert all(node.users for node in module.graph.nodes if node.target is torch.full)
    (call,) = (node for node in module.graph.nodes if node.target is torch.ops.infllm.block_attention.default)
    assert ATTEND.named(call)["offsets"].meta["example_value"].device.type == "cuda"
    return taken, inputs


@pytest.mark.parametrize("what", ["a number", "a tensor on the CPU"])
def test_positions_that_the_host_knows_are_checked_for_cuda_caches_too(what, monkeypatch):
    """Without a word to the device: the graph of checks makes CPU tensors only."""
    taken, inputs = checks_of(
        (lambda: 190) if what == "a number" else (lambda: torch.tensor(190)), monkeypatch, dynamic=True
    )
    made = [node.meta["example_value"] for node in taken.graph.nodes if node.op not in ("placeholder", "output")]
    assert {value.device.type for value in made if isinstance(value, torch.Tensor)} == {"cpu"}

    def real(value, first):
        """An input like an example, the position replaced; other tensors are of sizes only."""
        if isinstance(value, torch.SymInt):
            return first if value.node.hint == 190 else value.node.hint
        if value.dim() == 0:
            return torch.tensor(first)
        return torch.empty([getattr(getattr(n, "node", None), "hint", n) for n in value.shape], device="meta")

    for first, fits in ((190, True), (197, True), (198, False), (-1, False)):
        with contextlib.nullcontext() if fits else pytest.raises(CachePositionError, match="to get 3 tokens"):
            taken(*(real(value, first) for value in inputs))


def test_positions_on_a_device_are_not_read(monkeypatch):
    taken, _ = checks_of(lambda: torch.tensor(190, device="cuda"), monkeypatch)
    assert taken is None


def test_cuda_sites_without_triton_say_what_to_install(monkeypatch):
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    report, (message,) = compile_refused(TILED)
    assert report.sites[0].refusal == "triton is not installed: pip install triton"
    assert "pip install triton" in message
