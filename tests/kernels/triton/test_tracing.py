"""What compilers see of the operators on CUDA: calls, or kernels where graphs leave Python. Needs no GPU."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._inductor.fx_passes import reinplace
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import infllm_pass
from infllm_pass.compat.inductor import kernel_readers
from infllm_pass.kernels.triton.configs import ScatteredConfig, find_config, override
from infllm_pass.lowering.ops import checks
from infllm_pass.lowering.ops.attention_args import name_of
from tests.lowering.ops.test_checks import TILED
from tests.support.triton_device import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter traces nothing")

LENGTHS = [64, 65, 100, 127, 128, 1000, 4096, 8191, 131072, 1 << 20]
TOKENS = replace(TILED, scorer="tokens", score_dtype="int8")

KERNELS = 5
"""Kernels of a forward, at least."""

CALLS = {"fw": ["compress_keys", "select_blocks", "block_attention"], "bw": ["block_attention_backward"]}
"""Operators of the same."""


class _Traced(Exception):
    """Raised instead of running a graph of kernels without a GPU."""


class Driver:
    """As much of a Triton driver as reading a kernel's source needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _sm_90(monkeypatch):
    """Triton compiles for an H100 that is not there, and CPU tensors stand for CUDA tensors."""
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)


class Recorder:
    """A backend that traces forward and backward, keeps the graphs and the guards on sizes, and runs nothing."""

    def __init__(self) -> None:
        self.graphs: dict[str, torch.fx.GraphModule] = {}
        self.guards: list = []
        # Inductor's partitioner, which merges equal calls: of allocations too.
        self.compile = aot_autograd(
            fw_compiler=self._keep("fw"),
            bw_compiler=self._keep("bw"),
            partition_fn=min_cut_rematerialization_partition,
        )

    def _keep(self, name):
        def compiler(module, _example_inputs):
            self.graphs[name] = module
            self.guards = [g.expr for g in torch._guards.TracingContext.get().fake_mode.shape_env.guards]

            def run(*_):
                raise _Traced

            return make_boxed_func(run)

        return compiler


def trace(function, *inputs, sparsified=False, packaged=True) -> Recorder:
    """The graphs that a compiler gets; `packaged`: for AOTInductor."""
    recorder = Recorder()
    compiled = torch.compile(function, backend=recorder.compile, fullgraph=True)
    if sparsified:
        compiled = infllm_pass.sparsify(compiled, TILED)
    with pytest.raises(_Traced), V.set_aot_compilation(packaged):
        compiled(*inputs)
    return recorder


def packed_heads(length=100, differentiable=False):
    """Queries, keys and values of one dynamic length."""
    x = torch.randn(1, 10, length, 16, requires_grad=differentiable)
    torch._dynamo.mark_dynamic(x, 2)
    return x


def attend(x):
    q, k, v = x.split([6, 2, 2], 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def call(named=(), config=TILED, **others):
    def function(x, *tensors):
        q, k, v = x.split([6, 2, 2], 1)
        given = dict(zip(named, tensors, strict=True))
        return infllm_pass.switchable_attention(q, k, v, config, **others, **given)

    return function


def key_mask(length=100):
    mask = torch.ones(1, length, dtype=torch.bool)
    torch._dynamo.mark_dynamic(mask, 1)
    return mask


CASES = {
    "rewritten": (attend, [], True),
    "padded, window": (call(named=("key_mask",), window=40), [key_mask()], False),
    "device offset": (call(named=("offset",)), [torch.tensor([0], dtype=torch.int32)], False),
    "token scores, padded": (call(named=("key_mask",), config=TOKENS), [key_mask()], False),
    "token scores": (call(config=replace(TOKENS, score_dtype="key")), [], False),
    "token scores, float8": (call(config=replace(TOKENS, score_dtype="fp8")), [], False),
}


@pytest.mark.parametrize("case", CASES)
def test_graphs_under_python_call_the_operators(case):
    """No kernel of a site is Inductor's business; one graph serves all lengths, forward and backward."""
    function, tensors, sparsified = CASES[case]
    recorder = trace(function, packed_heads(differentiable=True), *tensors, sparsified=sparsified, packaged=False)
    assert recorder.graphs.keys() == CALLS.keys()
    for name, module in recorder.graphs.items():
        assert not kernels_of(module)
        assert [each for each in map(name_of, module.graph.nodes) if each] == CALLS[name]
    assert_serves_all_lengths(recorder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gathered", [False, True], ids=["", "gathering offered"])
def test_compilers_see_kernels_that_write_only_their_results(case, gathered, caplog):
    """And one graph serves all lengths; Inductor writes in place, and copies no buffer."""
    config = find_config(ScatteredConfig, "scattered", 90, 2, 128) if gathered else None
    function, tensors, sparsified = CASES[case]
    with override(scattered=config), caplog.at_level(logging.WARNING):
        recorder = trace(function, packed_heads(), *tensors, sparsified=sparsified)
    assert "identify_mutated_tensors" not in caplog.text
    (module,) = recorder.graphs.values()
    assert not [node for node in module.graph.nodes if "infllm" in str(node.target)]
    kernels = kernels_of(module)
    assert len(kernels) >= KERNELS + 2 * gathered
    written = {argument for node in kernels for argument in node.kwargs["tensors_to_clone"]}
    assert not written & {"q", "k", "v", "key_mask", "offsets"}
    write_in_place(module.graph)
    assert [node.kwargs["tensors_to_clone"] for node in kernels_of(module)] == [[] for _ in kernels]
    assert_serves_all_lengths(recorder)


def assert_serves_all_lengths(recorder):
    symbols = {symbol for guard in recorder.guards for symbol in guard.free_symbols}
    for length in LENGTHS:
        sizes = dict.fromkeys(symbols, length)
        assert all(bool(guard.subs(sizes)) for guard in recorder.guards), length


def kernels_of(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return list(module.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional))


def write_in_place(graph: torch.fx.Graph) -> None:
    """Inductor's pass that finds out which results need no copy first."""
    fakes = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    with V.set_fake_mode(detect_fake_mode(fakes)):
        reinplace.canonicalize_view_scatter_ops(graph)
        reinplace.reinplace_inplaceable_ops_core(graph)


def two_layers(x):
    for _ in range(2):
        out = attend(x)
        x = torch.cat([out, out[:, :4]], 1)
    return x


def recording(reader, read):
    """A reader that notes which kernels it reads."""

    def note(kernel, arguments, descriptors):
        read.append(getattr(kernel, "fn", kernel).__name__)
        return reader(kernel, arguments, descriptors)

    return note


def test_a_kernel_is_read_once_for_all_layers(monkeypatch):
    """And says the same of the second layer as of the first."""
    read = []
    module, names = kernel_readers()
    for name in names:
        reader = getattr(module, name)
        reader = getattr(reader, "__wrapped__", reader)  # PyTorch's own, whatever was compiled before
        monkeypatch.setattr(module, name, recording(reader, read))
    trace(attend, packed_heads(), sparsified=True)
    once = read.copy()
    read.clear()
    recorder = trace(two_layers, packed_heads(), sparsified=True)
    assert len(once) >= KERNELS
    assert read == once
    first, second = (kernels_of(recorder.graphs["fw"])[part] for part in (slice(0, 5), slice(5, 10)))
    for one, other in zip(first, second, strict=True):
        assert one.kwargs["tensors_to_clone"] == other.kwargs["tensors_to_clone"]


def test_sizes_that_a_compiler_made_dynamic_become_numbers():
    """Heads, head dimension and every number of the configuration, with ``dynamic=True``."""
    recorder = Recorder()
    compiled = torch.compile(infllm_pass.switchable_attention, backend=recorder.compile, dynamic=True, fullgraph=True)
    q, k, v = (torch.randn(2, heads, 100, 16) for heads in (6, 2, 2))
    with pytest.raises(_Traced), V.set_aot_compilation(True):
        compiled(q, k, v, TILED, window=40, offset=0)
    assert len(kernels_of(recorder.graphs["fw"])) >= KERNELS
