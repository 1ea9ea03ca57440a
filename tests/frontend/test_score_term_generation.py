"""``generate`` of models whose scores have more than a mask: gpt-oss with sinks, Gemma 2 with a cap."""

from __future__ import annotations

import pytest
import torch

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels import reference
from tests.sites.test_score_term_models import gemma2, gpt_oss
from tests.support.common import SMALL, relative_error

modeling = (
    pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss"),
    pytest.importorskip("transformers.models.gemma2.modeling_gemma2"),
)

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
SPARSE = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0, "window_size": 8, "topk": 2})
"""24 keys in all: those of a window of 16 are within them."""

GREEDY = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}
CACHES = {"growing": {}, "static": {"cache_implementation": "static"}}
MODELS = {"gpt-oss": gpt_oss, "Gemma 2": gemma2}


def prompts():
    """Rows of 50, 43 and 30 tokens, padded in front; without token 0."""
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[1, :7] = mask[2, :20] = 0
    return torch.randint(1, 64, (3, 50), generator=torch.Generator().manual_seed(3)) * mask, mask


def generated(make, config, cache, steps, **sizes):
    """What a sparsified model generates after the prompts, and the model."""
    torch._dynamo.reset()
    model = infllm_pass.sparsify(torch.compile(make(**sizes), backend="eager"), config)
    ids, mask = prompts()
    return model.generate(ids, attention_mask=mask, max_new_tokens=steps, **GREEDY, **cache), model


def check_steps(model):
    """Layers that see everything decode; those of a sliding cache stay as they are, and say why."""
    steps = [site for site in infllm_pass.report(model).sites if site.query_shape[2] == 1]
    whole = [site for site in steps if site.decision == "switchable"]
    assert "decode" in {site.target for site in whole}
    assert {site.kernels for site in whole} == {"C++"}
    cut = {site.reason for site in steps if site.decision != "switchable"}
    assert cut <= {"PARTIAL_KEYS", "UNPROVEN_MASK"}, cut
    assert not any(site.reason == "INTERNAL" for site in infllm_pass.report(model).sites)


@pytest.mark.parametrize(("name", "cache"), [("gpt-oss", "growing"), ("Gemma 2", "static")])
def test_with_a_covering_budget_the_logits_are_those_of_the_dense_model(name, cache):
    """From below `dense_len` to above it, over a layer with a window of 30 keys."""
    got, model = generated(MODELS[name], COVERING, CACHES[cache], 20)
    ids, mask = prompts()
    wanted = MODELS[name]().generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY, **CACHES[cache])
    assert torch.equal(got.sequences, wanted.sequences)
    for one, other in zip(got.logits, wanted.logits, strict=True):
        assert relative_error(one, other) < 1e-5
    check_steps(model)


def oracle_of(module, query, key, value, _mask, scaling, **settings):
    """A model's attention by the oracle, over whole sequences."""
    fields = {"geometry": SPARSE.geometry_for(query.shape[3]), "scale": scaling, "dense_len": 0}
    fields |= {"softcap": settings.get("softcap") or 0.0, "sinks": getattr(module, "sinks", None)}
    window = getattr(module, "sliding_window", None)
    if window is None:
        selected = reference.select_blocks(query, key, **fields)
    else:
        selected, fields["window"] = None, window
    out = reference.attention(query, key, value, selected, **fields)[0]
    return out.transpose(1, 2).contiguous().to(query.dtype), None


@torch.no_grad()
@pytest.mark.parametrize(("name", "cache"), [("gpt-oss", "static"), ("Gemma 2", "growing")])
def test_sparse_steps_are_the_oracles(name, cache, monkeypatch):
    """Each row alone, without padding and without a cache, gives the logits that its steps gave."""
    got, model = generated(MODELS[name], SPARSE, CACHES[cache], 8, sliding_window=16)
    check_steps(model)
    mask = prompts()[1]
    plain = MODELS[name](sliding_window=16)
    texts = [row[begin:] for row, begin in zip(got.sequences, (1 - mask).sum(1).tolist(), strict=True)]
    dense = [plain(text[None], use_cache=False).logits[0] for text in texts]
    for file in modeling:
        monkeypatch.setattr(file, "eager_attention_forward", oracle_of)
    for row, text in enumerate(texts):
        expected = plain(text[None], use_cache=False).logits[0, -9:-1]
        mine = torch.stack([each[row] for each in got.logits])
        assert relative_error(mine, expected) < 2e-5
        assert relative_error(dense[row][-9:-1], expected) > 1e-2
