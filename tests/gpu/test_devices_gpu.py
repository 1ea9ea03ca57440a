"""Tensors on another CUDA device than the current one. Needs two GPUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass import SparseAttentionConfig, switchable_attention, switchable_attention_varlen
from infllm_pass.kernels.triton.launch import multiprocessors
from infllm_pass.lowering.ops.attention_args import DecodeCall
from infllm_pass.lowering.ops.decode import decode_attention, new_state
from tests.support.common import llama, oracle_attention, relative_error, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

CONFIG = SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=3, init_blocks=1, dense_len=64, scorer="pooled"
)
"""Four blocks of sixteen: above 64 tokens the selection leaves keys out."""

SCORED = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _first_device_is_current():
    with torch.cuda.device(0):
        yield
        assert torch.cuda.current_device() == 0


def pairs(*shapes):
    """The same tensors on the first and on the second device, differentiable."""
    near = [torch.randn(shape, device="cuda:0", requires_grad=True) for shape in shapes]
    return near, [x.detach().to(SCORED).requires_grad_() for x in near]


def compare(function, near, far):
    """Results and gradients on the second device are those of the first."""
    outs = [function(*inputs) for inputs in (near, far)]
    assert outs[1].device == SCORED
    grad = torch.randn_like(outs[0])
    expected = torch.autograd.grad(outs[0], near, grad)
    actual = torch.autograd.grad(outs[1], far, grad.to(SCORED))
    torch.cuda.synchronize(SCORED)
    for mine, other in zip((outs[1], *actual), (outs[0], *expected), strict=True):
        assert torch.equal(mine.cpu(), other.cpu())


def test_attention():
    near, far = pairs((2, 8, 300, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    compare(lambda q, k, v: switchable_attention(q, k, v, CONFIG), near, far)


def test_attention_of_packed_sequences():
    near, far = pairs((300, 8, 64), (300, 2, 64), (300, 2, 64))

    def attend(q, k, v):
        bounds = torch.tensor([0, 40, 210, 300], dtype=torch.int32, device=q.device)
        return switchable_attention_varlen(q, k, v, bounds, bounds, CONFIG)

    compare(attend, near, far)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend):
    near, far = pairs((2, 8, 300, 64), (2, 2, 300, 64), (2, 2, 300, 64))

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    compiled = infllm_pass.sparsify(torch.compile(attend, backend=backend), CONFIG, strict=True)
    compare(compiled, near, far)
    assert {site.kernels for site in infllm_pass.report(compiled).sites} == {"triton"}


def test_a_decode_step():
    outs = []
    near = [torch.randn(2, heads, size, 64, device="cuda:0") for heads, size in ((8, 1), (2, 300), (2, 300))]
    for device in ("cuda:0", SCORED):
        q, k, v = (x.to(device) for x in near)
        lengths = torch.tensor([290, 70], device=device)
        state = new_state(k, CONFIG.geometry)
        outs.append(
            decode_attention(q, k, v, state, *DecodeCall(lengths, 0.125, 80, CONFIG.geometry).arguments)[0].cpu()
        )
        assert state[2].tolist() == [290, 70]
    assert torch.equal(*outs)
    assert multiprocessors(SCORED) > 2


def split(model, devices):
    """Put a Llama's layers on devices, one each; inputs are moved there, and results back to the first."""

    def move(value, device):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(move(each, device) for each in value) if isinstance(value, tuple) else value

    for layer, device in zip(model.model.layers, devices, strict=True):
        layer.to(device)

        def enter(_, args, kwargs, device=device):
            return move(args, device), {name: move(value, device) for name, value in kwargs.items()}

        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(lambda _, args, out: move(out, devices[0]))
    return model


@pytest.fixture
def split_llama():
    plain = llama(hidden_size=96, num_attention_heads=6, num_key_value_heads=2).float().to("cuda:0")
    return split(plain, ("cuda:0", "cuda:1"))


@pytest.mark.parametrize("use_cache", [True, False], ids=["is_causal", "mask tensor"])
@torch.no_grad()
def test_a_model_on_two_devices(split_llama, use_cache):
    model = infllm_pass.sparsify(torch.compile(split_llama), CONFIG, strict=True)
    for length in (50, 200):
        ids = tokens(length).to("cuda:0")
        with oracle_attention(CONFIG):
            expected = split_llama(ids, use_cache=use_cache).logits
        assert relative_error(model(ids, use_cache=use_cache).logits, expected) < 1e-4
    sites = infllm_pass.report(model).sites
    assert {site.device for site in sites} == {"cuda:0", "cuda:1"}
    assert {site.kernels for site in sites} == {"SDPA", "triton"}


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@torch.no_grad()
def test_generation_on_two_devices(split_llama, cache):
    """Every token is the oracle's choice, but for rounding."""
    model = infllm_pass.sparsify(torch.compile(split_llama), CONFIG, strict=True)
    ids = tokens(100).to("cuda:0")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    if cache is not None:
        options["cache_implementation"] = cache
    found = model.generate(ids, **options)
    with oracle_attention(CONFIG):
        logits = split_llama(found[:, :-1], use_cache=False).logits[0, 99:]
    chosen = logits.gather(1, found[0, 100:, None])[:, 0]
    assert bool((logits.max(-1).values - chosen <= 1e-3 * logits.abs().max()).all())
    assert {(site.device, site.decision) for site in infllm_pass.report(model).sites} == {
        ("cuda:0", "switchable"),
        ("cuda:1", "switchable"),
    }
