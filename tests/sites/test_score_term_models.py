"""Models whose scores have more than a mask: gpt-oss with sinks, Gemma 2 with a cap, a learned key bias, ALiBi."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.rewrite.targets import DEFAULT_TARGETS
from tests.support.common import SMALL, relative_error, tokens
from tests.support.score_terms import TakesTerms

NARROW = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0, "window_size": 8, "topk": 2})
"""A budget below the window of 30 keys."""

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0, "topk": 40})
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
    "attn_implementation": "eager",
}


def ready(model, dtype=torch.float64):
    """A model with random weights large enough that attention matters."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_() if name.endswith("sinks") else parameter.mul_(6)
    return model


def gpt_oss(**overrides):
    """A full layer and a sliding one, whose window is longer than the configuration's budget."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(1)
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 30, "layer_types": kinds}
    sizes["experts_implementation"] = "batched_mm"
    return ready(GptOssForCausalLM(GptOssConfig(**{**sizes, **overrides})))


def gemma2(**overrides):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    sizes = {**SIZES, "sliding_window": 30, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}
    return ready(Gemma2ForCausalLM(Gemma2Config(**{**sizes, **overrides})), torch.float32)  # as its softmax is


class Biased(nn.Module):
    """Two layers of attention with numbers added to the scores of keys.

    Args:
        kind: "learned": the bias of a key and key/value head is computed from the key's token; "alibi": it is the
            distance to the key, with a slope for each head.
    """

    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(64, 48)
        self.layers = nn.ModuleList(BiasedAttention(kind) for _ in range(2))

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask)
        return SimpleNamespace(logits=x @ self.embedding.weight.T)


class BiasedAttention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.heads_kv = 2 if kind == "learned" else 6
        self.q, self.k, self.v, self.out = (nn.Linear(48, n * 8) for n in (6, self.heads_kv, self.heads_kv, 6))
        self.importance = nn.Linear(48, self.heads_kv) if kind == "learned" else None
        self.slopes = None if kind == "learned" else nn.Parameter(2.0 ** -torch.arange(1.0, 7.0))

    def forward(self, x, attention_mask):
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(6 // self.heads_kv, 1) for t in (k, v))
        scores = q @ k.mT * 8**-0.5
        place = torch.arange(length, device=x.device)
        if self.importance is not None:
            bias = F.logsigmoid(self.importance(x)).transpose(1, 2)
            scores = scores + bias.repeat_interleave(3, 1)[:, :, None]
        else:
            scores = scores - self.slopes[:, None, None] * (place[:, None] - place)
        seen = place <= place[:, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None].bool()
        weights = scores.masked_fill(~seen, torch.finfo(x.dtype).min).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def biased(kind):
    def make():
        torch.manual_seed(1)
        return Biased(kind).double().eval()

    return make


WINDOWED = ("gpt-oss", "Gemma 2")
"""Models with a layer whose window is within the covering budget: dense, but without a tensor of N x N."""

MODELS = {
    "gpt-oss": (gpt_oss, "sinks"),
    "Gemma 2": (gemma2, "scores capped at 5"),
    "a learned bias": (biased("learned"), "biased keys"),
    "ALiBi": (biased("alibi"), "biased keys"),
}


@pytest.mark.parametrize(
    ("name", "padded", "target"),
    [
        pytest.param(name, (number + shift) % 2 == 1, target, id=f"{name}-{target}")
        for number, name in enumerate(MODELS)
        for shift, target in enumerate(["terms", "block-sparse"])
    ],
)
def test_terms_of_a_model_reach_the_target(name, padded, target):
    make, shown = MODELS[name]
    plain, model = make(), make()
    targets = [TakesTerms(), *DEFAULT_TARGETS] if target == "terms" else DEFAULT_TARGETS
    config = NARROW if target == "terms" else COVERING
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), config, targets=targets)
    inputs = {"input_ids": tokens(70, 2)}
    if padded:
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[1, :9] = 0
        inputs["attention_mask"] = mask
    torch._dynamo.reset()
    out, wanted = (m(**inputs, use_cache=False).logits for m in (sparse, plain))
    rows = infllm_pass.report(sparse).sites
    window = ("dense", "block-sparse") if name in WINDOWED and target != "terms" else ("switchable", target)
    assert len(rows) == 2
    assert {(row.decision, row.target) for row in rows} <= {("switchable", target), window}, [
        row.explanation for row in rows
    ]
    assert all(shown in row.mask for row in rows)
    kept = (slice(None), slice(9, None))
    exact = wanted.dtype == torch.float64
    assert relative_error(out[kept], wanted[kept]) < (1e-9 if exact else 1e-4)
    out[kept].square().sum().backward()
    wanted[kept].square().sum().backward()
    tolerance = 1e-8 if exact else 1e-4
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (path, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            assert torch.allclose(actual.grad, expected.grad, rtol=tolerance, atol=tolerance * largest), path


def falcon(implementation):
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 64}
    options = {"alibi": True, "multi_query": False, "attn_implementation": implementation}
    return FalconForCausalLM(FalconConfig(**sizes, **options)).eval()


def mpt(implementation):
    from transformers import MptConfig, MptForCausalLM

    sizes = {"d_model": 48, "n_layers": 2, "n_heads": 6, "vocab_size": 64, "max_seq_len": 128}
    return MptForCausalLM(MptConfig(**sizes, attn_implementation=implementation)).eval()


@pytest.mark.parametrize(("make", "implementation"), [(falcon, "eager"), (falcon, "sdpa"), (mpt, "eager")])
def test_models_of_transformers_with_alibi(make, implementation):
    torch.manual_seed(1)
    model = make(implementation)
    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), COVERING)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :9] = 0
    inputs = {"input_ids": tokens(70, 2), "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        out, wanted = (m(**inputs).logits[:, 9:] for m in (sparse, model))
    assert [row.mask for row in infllm_pass.report(sparse).sites] == ["causal, padded keys, biased keys"] * 2
    assert infllm_pass.report(sparse).switchable == 2
    assert relative_error(out, wanted) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_lengths_on_both_sides_of_the_switch(name):
    """One graph a side; a covering budget, so that the model itself is what is right."""
    make = MODELS[name][0]
    plain, model = make(), make()
    torch._dynamo.reset()
    config = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager", dynamic=True), config)
    for length in (30, 90, 50, 130):
        ids = tokens(length, 2)
        out, wanted = (m(input_ids=ids, use_cache=False).logits for m in (sparse, plain))
        assert relative_error(out, wanted) < (1e-9 if wanted.dtype == torch.float64 else 1e-5), length
    whole = [row for row in infllm_pass.report(sparse).sites if row.decision == "switchable"]
    assert {row.branch for row in whole} == {"dense", "sparse"}
    assert {row.kernels for row in whole} == {"C++"}


@torch.no_grad()
def test_packed_sequences_of_a_model_with_a_cap():
    plain, model = gemma2(), gemma2()
    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), COVERING)
    ids, places = tokens(90, 1), torch.cat([torch.arange(40), torch.arange(50)])[None]
    out = sparse(input_ids=ids, position_ids=places, use_cache=False).logits
    alone = [plain(input_ids=part, use_cache=False).logits for part in ids.split([40, 50], 1)]
    assert relative_error(out, torch.cat(alone, 1)) < 1e-5
    rows = infllm_pass.report(sparse).sites
    assert ("switchable", "block-sparse", "C++") in {(row.decision, row.target, row.kernels) for row in rows}
    assert all("packed sequences" in row.mask for row in rows)
