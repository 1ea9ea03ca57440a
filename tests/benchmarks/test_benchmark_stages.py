"""The stages that the GPU benchmarks time compute switchable attention, one after the other."""

import importlib
from dataclasses import replace

import pytest
import torch

from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels import reference
from tests.support import ROOT
from tests.support.common import relative_error
from tests.support.triton_device import DEVICE, arrange

POOLED = SparseAttentionConfig(block_size=16, window_size=16, topk=3, dense_len=0, scorer="pooled")
TOKENS = replace(POOLED, scorer="tokens", score_dims=16, score_dtype="int8", query_block=4)


@pytest.mark.parametrize(("heads", "heads_kv"), [(8, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("config", [POOLED, TOKENS], ids=["pooled", "tokens"])
def test_stages_match_the_oracle(monkeypatch, heads, heads_kv, config):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stages, baselines, gpu = (importlib.import_module(name) for name in ("_stages", "_baselines", "_gpu"))
    length, dim = 170, 32
    q, k, v = (torch.randn(1, count, length, dim, device=DEVICE) for count in (heads, heads_kv, heads_kv))
    geometry = gpu.geometry_of(config, dim)
    assert geometry.channels == (() if config is POOLED else ((*range(8, 16), *range(24, 32)),))
    common = {"geometry": geometry, "scale": dim**-0.5, "offset": 0}
    selected = reference.select_blocks(q, k, **common)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference.attention(*wide, selected, **common)

    selection = stages.select(q, k, config)
    assert torch.equal(baselines.chosen_blocks(selection, length, selected.shape[-1]), selected[0])
    out, lse = stages.attend(q, k, v, selection, config)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(lse, expected_lse) < 1e-5
    assert torch.equal(stages.forward(q, k, v, config), out)
    grad = torch.randn_like(out)
    gradients = stages.backward(grad, q, k, v, out, lse, selection, config)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert relative_error(actual, wanted) < 1e-5


arrange(globals())
