"""Sites with query-agnostic blocks: the example's model, and where a bias may lie for a step to keep what it pooled."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

import infllm_pass
from tests.support import ROOT
from tests.support.common import SMALL, llama, relative_error

CONFIG = replace(SMALL, topk=7, agnostic_topk=3, lse="exact", dense_len=0)


@pytest.fixture(scope="module")
def example():
    """The module ``examples/nosa.py``."""
    llama_attention = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaAttention
    if "cache" not in inspect.signature(llama_attention.forward).parameters:
        pytest.skip("the example is written for transformers 5.24")
    spec = importlib.util.spec_from_file_location("nosa", ROOT / "examples" / "nosa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_exports_and_generates(example):
    found = example.main(6, layers=1)
    assert found["losses"][-1] < found["losses"][0]
    assert min(found["amplitudes"]) > 0.0
    assert found["error"] <= 1e-5
    assert found["agreed"] == {"dynamic": 24, "static": 24}
    sites = found["report"].sites
    assert {site.reason for site in sites} == {"SWITCHABLE"}
    assert {site.scores for site in sites} == {"pooled, 3 of 10 blocks by the keys' bias"}
    steps = [site for site in sites if site.query_shape[2] == 1]
    assert len(steps) >= 2
    assert {site.cache_state for site in steps} == {"carried"}


def test_released_checkpoints_fit_the_example(example):
    """Names and shapes of the tensors of openbmb/NOSA-8B, beside a Llama's."""
    sizes = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 2, "vocab_size": 73448}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = example.NosaForCausalLM(example.NosaConfig(**sizes, **heads))
        plain = example.LlamaForCausalLM(example.LlamaConfig(**sizes, **heads))
    own = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    more = {name: shape for name, shape in own.items() if name not in plain.state_dict()}
    assert more == {
        f"model.layers.{layer}.self_attn.{name}": shape
        for layer in range(2)
        for name, shape in (("A", (2,)), ("delta.weight", (2, 256)))
    }
    assert {name: own[name] for name in plain.state_dict()} == {
        n: tuple(x.shape) for n, x in plain.state_dict().items()
    }


def test_importance_is_as_published(example):
    """One number a token and key/value head, of the values of all heads, which are not rotated; 0 at first."""
    model = example.tiny_model()
    attention = model.model.layers[0].self_attn
    values = torch.randn(2, 2, 5, 16)
    assert not attention.importance(values).any()
    with torch.no_grad():
        attention.A.copy_(torch.tensor([0.5, -2.0]))
    joined = torch.cat([values[:, 0], values[:, 1]], -1)  # [B, L, Hkv * D]
    expected = torch.log1p((joined @ attention.delta.weight.T).exp()) * attention.A
    torch.testing.assert_close(attention.importance(values), expected.mT)


def test_a_site_without_a_bias_stays_dense():
    model = infllm_pass.sparsify(torch.compile(llama(), backend="eager"), CONFIG)
    ids = torch.randint(64, (1, 100))
    with torch.no_grad():
        out, expected = (each(ids, use_cache=False).logits for each in (model, llama()))
    torch.testing.assert_close(out, expected)
    sites = infllm_pass.report(model).sites
    assert {site.reason for site in sites} == {"NO_KEY_BIAS"}
    with pytest.raises(infllm_pass.errors.NoAttentionSiteError, match="NO_KEY_BIAS: agnostic_topk=3"):
        infllm_pass.sparsify(torch.compile(llama(), backend="eager"), CONFIG, strict=True)(ids)


class Cached(nn.Module):
    """A step of one token over a static cache; `place`: where the importance of keys lies, and what is done to it."""

    def __init__(self, place: str, rows: int = 2) -> None:
        super().__init__()
        self.place = place
        self.keys, self.values, self.own = (
            nn.Buffer(torch.zeros(rows, 2, 160, size, dtype=torch.float64)) for size in (24, 16, 1)
        )

    def forward(self, q, k, v, s, position):
        longer = torch.cat([k, s, k.new_zeros(*k.shape[:3], 7)], -1)
        places = position + torch.arange(k.shape[2], device=k.device)
        self.keys.index_copy_(2, places, longer)
        self.values.index_copy_(2, places, v)
        self.own.index_copy_(2, places, s)
        bias = self.own[..., 0] if self.place in ("apart", "late") else self.keys[..., 16]
        if self.place == "shifted":
            bias = torch.roll(bias, 1, -1)
        bias = bias[:, :, None]
        if self.place == "late":
            self.own.mul_(1.5)
        mask = torch.where(torch.arange(160, device=k.device) <= places[:, None], 0.0, -torch.inf)
        scores = 0.25 * (q @ self.keys[..., :16].mT) + bias + mask
        return scores.softmax(-1) @ self.values


@pytest.mark.parametrize(("place", "state"), [("with keys", True), ("apart", False), ("shifted", False)])
def test_steps_pool_what_cannot_change_once(place, state):
    """A bias in other memory than the keys may change with nobody knowing: it is pooled anew at every call."""
    torch.manual_seed(0)
    module = Cached(place)
    model = infllm_pass.sparsify(torch.compile(module, backend="eager", dynamic=False), CONFIG)
    draw = [torch.randn(2, 2, 150, size, dtype=torch.float64) for size in (16, 16, 16, 1)]
    for begin, end in ((0, 120), *((at, at + 1) for at in range(120, 126))):
        if begin == 124 and place != "with keys":
            module.own[:, :, :100] = -module.own[:, :, :100]
        with torch.no_grad():
            out = model(*(x[:, :, begin:end] for x in draw), torch.tensor(begin))
        bias = module.own[..., 0] if place == "apart" else module.keys[..., 16]
        bias = torch.roll(bias, 1, -1) if place == "shifted" else bias
        keys = module.keys[:, :, :end, :16], module.values[:, :, :end]
        expected = infllm_pass.switchable_attention(
            draw[0][:, :, begin:end], *keys, CONFIG, scale=0.25, key_bias=bias[..., :end]
        )
        assert relative_error(out, expected) <= 1e-12, begin
    sites = [site for site in infllm_pass.report(model).sites if site.query_shape[2] == 1]
    assert {site.reason for site in sites} == {"SWITCHABLE"}
    assert {site.cache_state.startswith("carried") for site in sites} == {state}


def test_a_bias_that_the_graph_writes_to_after_it_is_read_stays_dense():
    module = Cached("late")
    model = infllm_pass.sparsify(torch.compile(module, backend="eager", dynamic=False), CONFIG)
    plain = Cached("late")
    draw = [torch.randn(2, 2, 130, size, dtype=torch.float64) for size in (16, 16, 16, 1)]
    for begin, end in ((0, 128), (128, 129), (129, 130)):
        given = *(x[:, :, begin:end] for x in draw), torch.tensor(begin)
        with torch.no_grad():
            torch.testing.assert_close(model(*given), plain(*given))
    assert {site.reason for site in infllm_pass.report(model).sites} == {"ADDITIVE_BIAS"}
