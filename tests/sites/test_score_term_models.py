"""Models whose scores have more than a mask: gpt-oss with sinks, Gemma 2 with a cap, a learned key bias, ALiBi."""

from __future__ import annotations

import pytest
import torch

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.rewrite.targets import DEFAULT_TARGETS
from tests.support.common import SMALL, relative_error, tokens
from tests.support.score_terms import TakesTerms

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


def ready(model):
    """A model with random weights large enough that attention matters, in float64."""
    model = model.double().eval()
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
    return ready(Gemma2ForCausalLM(Gemma2Config(**{**sizes, **overrides})))


MODELS = {"gpt-oss": (gpt_oss, "sinks"), "Gemma 2": (gemma2, "scores capped at 5")}


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_terms_of_a_model_reach_the_target(name, padded):
    make, shown = MODELS[name]
    plain, model = make(), make()
    sparse = infllm_pass.sparsify(
        torch.compile(model, backend="aot_eager"),
        SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0, "window_size": 8, "topk": 2}),
        targets=[TakesTerms(), *DEFAULT_TARGETS],
    )
    inputs = {"input_ids": tokens(70, 2)}
    if padded:
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[1, :9] = 0
        inputs["attention_mask"] = mask
    torch._dynamo.reset()
    out, wanted = (m(**inputs, use_cache=False).logits for m in (sparse, plain))
    rows = infllm_pass.report(sparse).sites
    assert [(row.decision, row.target) for row in rows] == [("switchable", "terms")] * 2, rows[0].explanation
    assert all(shown in row.mask for row in rows)
    kept = (slice(None), slice(9, None))
    assert relative_error(out[kept], wanted[kept]) < 1e-9
    out[kept].square().sum().backward()
    wanted[kept].square().sum().backward()
    for (path, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None and expected.grad.norm():
            assert relative_error(actual.grad, expected.grad) < 1e-7, path
