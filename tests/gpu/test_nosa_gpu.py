"""NOSA on a CUDA device: prompts, steps over caches and training, against torch operators on the CPU."""

from __future__ import annotations

import pytest
import torch

import infllm_pass
from infllm_pass import SparseAttentionConfig
from tests.frontend.test_nosa import Cached, example  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = SparseAttentionConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    window_size=32,
    topk=8,
    dense_len=0,
    lse="exact",
    scorer="pooled",
    agnostic_topk=3,
)


def test_gradients_are_those_of_torch_operators():
    """Of q, k, v and the importance; float32, in which both select the same blocks."""
    torch.manual_seed(0)
    draw = [torch.randn(2, heads, 400, 64) for heads in (8, 2, 2)] + [torch.randn(2, 2, 400)]
    grad = torch.randn(2, 8, 400, 64)
    found = {}
    for device in ("cuda", "cpu"):
        *qkv, bias = leaves = [x.to(device, torch.float32 if device == "cuda" else torch.float64) for x in draw]
        for leaf in leaves:
            leaf.requires_grad_()
        out = infllm_pass.switchable_attention(*qkv, CONFIG, key_bias=bias)
        found[device] = [out, *torch.autograd.grad(out, leaves, grad.to(out))]
    for mine, exact in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(mine.cpu().double(), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("place", ["with keys", "apart"])
def test_steps_continue_the_prompt(place, compiler):
    """Over a static cache whose importance lies beside the keys, or in a buffer of its own."""
    torch.manual_seed(0)
    module = Cached(place).float().cuda()
    model = infllm_pass.sparsify(torch.compile(module, backend=compiler, dynamic=False), CONFIG)
    draw = [torch.randn(2, 2, 160, size, device="cuda") for size in (16, 16, 16, 1)]
    whole = infllm_pass.switchable_attention(*draw[:3], CONFIG, scale=0.25, key_bias=draw[3][..., 0])
    with torch.no_grad(), torch.device("cuda"):
        for begin, end in ((0, 150), *((at, at + 1) for at in range(150, 160))):
            out = model(*(x[:, :, begin:end] for x in draw), torch.tensor(begin))
            torch.testing.assert_close(out, whole[:, :, begin:end], atol=1e-4, rtol=1e-4)
    sites = infllm_pass.report(model).sites
    assert {site.kernels for site in sites} == {"triton"}


def test_the_example_generates(example):  # noqa: F811
    """In float32: each token is the likeliest of the text up to it, computed without a cache."""
    torch.manual_seed(0)
    model = example.tiny_model().cuda().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.normal_()
    sparse = infllm_pass.sparsify(torch.compile(model), CONFIG)
    text = example.texts(1).cuda()
    cache = example.static_cache(model, 1, 224)
    tokens = sparse.generate(text[:, :200], max_new_tokens=24, do_sample=False, cache=cache, pad_token_id=0)
    with torch.no_grad():
        likeliest = sparse(input_ids=tokens[:, :-1], use_cache=False).logits.argmax(-1)[:, 199:]
    assert int((likeliest == tokens[:, 200:]).sum()) >= 23  # of two equally likely ones rounding decides
