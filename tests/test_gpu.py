"""The pass and the operators on a CUDA device."""

from __future__ import annotations

import pytest
import torch

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels import reference
from infllm_pass.lowering import operators

from .conftest import SMALL, llama, oracle_attention, relative_error, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_operators_match_the_oracle(dtype, padded):
    q, k, v = (torch.randn(2, h, 301, 32, device="cuda", dtype=dtype, requires_grad=True) for h in (6, 2, 2))
    key_mask = None
    if padded:
        key_mask = torch.ones(2, 301, dtype=torch.bool, device="cuda")
        key_mask[0, :40] = False
    out = infllm_pass.switchable_attention(q, k, v, SMALL, key_mask=key_mask)
    grad = torch.randn_like(out)
    g = SMALL.geometry
    blocks = operators.select_blocks(q, k, key_mask, None, 32**-0.5, SMALL.dense_len, *operators.selection_arguments(g))
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


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@torch.no_grad()
def test_a_model_equals_the_oracle(mode):
    plain = llama().cuda()
    model = infllm_pass.sparsify(torch.compile(plain, mode=mode), SMALL, strict=True)
    for length in (50, 120, 120):
        ids = tokens(length).cuda()
        with oracle_attention(SMALL):
            expected = plain(ids).logits
        assert relative_error(model(ids).logits.clone(), expected) < 1e-5
    assert {site.device for site in infllm_pass.report(model).sites} == {"cuda:0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_memory_below_the_switch_is_linear_in_the_length(dtype):
    """A compiled model builds an N x N mask and repeats its heads; the pass takes both out, in float32 too."""
    config = SparseAttentionConfig(dense_len=1 << 20)
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
