"""What launches depend on: the device of their tensors, PyTorch's precision, strides. No GPU, no interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses import FakeTensorMode

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton import configs, launch, tile_schedule
from infllm_pass.kernels.triton.backward import block_to_query, dkv, dq, scattered, split_work
from infllm_pass.kernels.triton.configs import ScatteredConfig, find_config, override
from infllm_pass.kernels.triton.prefill import attention, choose, compress, pooled, token_scores
from infllm_pass.kernels.triton.prefill.scattered import persistent
from infllm_pass.lowering.ops import checks, prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall
from tests.support.triton_device import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about kernels that are compiled")

GEOMETRY = BlockGeometry(8, 4, 16, 1, 1, 4)
MODULES = (
    attention,
    block_to_query,
    choose,
    compress,
    dkv,
    dq,
    persistent,
    pooled,
    scattered,
    split_work,
    tile_schedule,
    token_scores,
)


@dataclass
class Stand:
    """As much of a CUDA tensor as is asked."""

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cuda", 1)  # noqa: RUF009
    is_cuda: bool = True


@pytest.fixture
def precisions():
    """PyTorch's settings, put back as they were."""
    places = (torch.backends, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def newer(generic, matmul=None):
    def choose():
        torch.backends.fp32_precision = generic
        if matmul is not None:
            torch.backends.cuda.matmul.fp32_precision = matmul

    return choose


SETTINGS = {
    "default": (lambda: None, "ieee"),
    "all devices": (newer("tf32"), "tf32"),
    "matrix products": (newer("none", "tf32"), "tf32"),
    "all devices but matrix products": (newer("tf32", "ieee"), "ieee"),
    "older": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "older, off": (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_precision_is_read_whichever_way_it_was_set(case, precisions):
    choose, expected = SETTINGS[case]
    choose()
    assert launch.precision(Stand()) == expected
    assert launch.precision(Stand(torch.bfloat16)) == launch.precision(Stand(torch.float16)) == "ieee"
    assert launch.precision(torch.empty(1)) == "ieee"


def test_launches_of_another_device_make_it_the_current_one(monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    for number in (1, 0):
        with launch.device_guard(Stand(device=torch.device("cuda", number))):
            assert current[-1] == number
        assert current == [0]
    monkeypatch.delattr(torch.cuda, "device")
    with FakeTensorMode():
        traced = torch.empty(2, device="cuda:1")
    for tensor in (torch.empty(2), traced):
        with launch.device_guard(tensor):
            assert current == [0]


def memory(order, batch, heads, length, dim=16):
    """``[B, H, L, D]`` in memory of some order of its dimensions."""
    sizes = dict(zip("BHLD", (batch, heads, length, dim), strict=True))
    tensor = torch.randn([sizes[name] for name in order])
    return tensor.permute([order.index(name) for name in "BHLD"])


@pytest.mark.parametrize(
    ("order", "batch", "expected"),
    [("BHLD", 2, 16), ("BLHD", 2, 32), ("LBHD", 1, 32), ("LBHD", 2, 0), ("LHBD", 3, 0), ("HLBD", 3, 0)],
)
def test_kernels_are_compiled_for_strides_without_the_batch_in_them(order, batch, expected):
    assert launch.fixed_token_stride(memory(order, batch, 2, 100)) == expected


def test_the_stride_of_a_broadcast_batch_is_known():
    assert launch.fixed_token_stride(torch.empty(1, 2, 100, 16).expand(4, -1, -1, -1)) == 16


def specialised(batch, order, monkeypatch):
    """For what kernels of forward and backward are compiled, by name and number of the launch."""
    found = {}

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, **named):
            names = self.kernel.arg_names
            known = {**dict(zip(names, arguments, strict=False)), **named}
            kept = {"num_warps": known.get("num_warps")}
            computes = "attention" in self.kernel.fn.__name__ or "gradient" in self.kernel.fn.__name__
            for parameter in self.kernel.params:
                value = known[parameter.name]
                if parameter.is_constexpr:
                    kept[parameter.name] = value
                elif computes and isinstance(value, int) and not parameter.do_not_specialize:
                    # Triton also compiles for numbers that are 1, and for multiples of 16.
                    kept[parameter.name] = (value == 1, value % 16 == 0)
            found[self.kernel.fn.__name__, sum(name == self.kernel.fn.__name__ for name, _ in found)] = kept

    for module in MODULES:
        monkeypatch.setattr(module, "wrap_triton", Recorded)
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)
    monkeypatch.setattr(configs, "is_recorded", lambda _: False)
    q, k, v = (memory(order, batch, heads, 100) for heads in (8, 2, 2))
    call = AttentionCall(0.25, 0, GEOMETRY).arguments
    selection = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call), *call)
    measured = {name: find_config(ScatteredConfig, name, 90, 2, 128) for name in ("scattered", "scattered_gradient")}
    with override(**measured):
        out, log_sum = prefill.block_attention(q, k, v, selection, *call)
        prefill.block_attention_backward(torch.randn_like(out), q, k, v, out, log_sum, selection, *call)
    return found


@pytest.mark.parametrize("order", ["LBHD", "BLHD", "BHLD"])
def test_batch_sizes_share_their_kernels(order, monkeypatch):
    one, other = (specialised(batch, order, monkeypatch) for batch in (2, 3))
    assert len(one) > 9
    assert {("_scattered_kernel", 0), ("_scattered_gradient_kernel", 0)} <= set(one)
    assert one == other


@pytest.mark.parametrize("group", [1, 2, 16])
@pytest.mark.parametrize("shape", [(0, 40, 40), (2, 0, 40), (2, 40, 0)], ids=["rows", "queries", "keys"])
def test_an_empty_call_gives_the_types_of_any_other(group, shape, monkeypatch):
    """Selected or not."""
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)
    monkeypatch.setattr(launch, "wrap_triton", lambda _: pytest.fail("nothing is launched"))
    batch, length_q, length_k = shape
    q = torch.randn(batch, group, length_q, 16)
    k, v = (torch.randn(batch, 1, length_k, 16) for _ in range(2))
    call = AttentionCall(0.25, 0, GEOMETRY).arguments
    selection = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call), *call)
    expected = {1: torch.int64, 2: torch.int32, 16: torch.int16}[group]
    assert [each.dtype for each in selection] == [torch.int16, expected, *[torch.int32] * 3]
    for chosen in (selection, []):
        out, lse = prefill.block_attention(q, k, v, chosen, *call)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
