"""The flex_attention operator: its mask function is read as a mask, its score function as a scale or a reason."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from infllm_pass.rewrite.pipeline import SitePolicy
from infllm_pass.rewrite.targets import DEFAULT_TARGETS
from tests.sites.test_sites_handwritten import ALWAYS, COVERING, capture, compiled, oracle, run, run_pass
from tests.support import score_terms
from tests.support.common import count_calls, relative_error

SCALE = 8**-0.5


def qkv(heads_kv=2, length=57):
    """In float32: flex attention itself computes in no more."""
    return tuple(torch.randn(3, heads, length, 8) for heads in (6, heads_kv, heads_kv))


def causal(batch, head, query, key):
    return query >= key


def attend(q, k, v, *, mask=causal, **options):
    blocks = None if mask is None else create_block_mask(mask, None, None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, **options)


SWITCHABLE = {
    "causal": lambda q, k, v: attend(q, k, v),
    "scale": lambda q, k, v: attend(q, k, v, scale=SCALE),
    "scale as a score function": lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s * SCALE, scale=1.0),
}


@pytest.mark.parametrize("form", SWITCHABLE)
def test_causal_masks_are_rewritten(form):
    q, k, v = qkv()
    expected = {COVERING: SWITCHABLE[form](q, k, v), ALWAYS: oracle(q, k, v)}
    for config, wanted in expected.items():
        torch._dynamo.reset()
        module = capture(SWITCHABLE[form], q, k, v)
        (row,) = run_pass(module, config).sites
        assert (row.decision, row.key_shape[1]) == ("switchable", 2), row.explanation
        assert count_calls(module, torch.ops.higher_order.flex_attention) == 0
        assert relative_error(run(module, (q, k, v)), wanted) < 1e-5


def noncausal(batch, head, query, key):
    return query <= key


REFUSED = {
    "no mask": (lambda q, k, v: attend(q, k, v, mask=None), "BIDIRECTIONAL"),
    "other mask": (lambda q, k, v: attend(q, k, v, mask=noncausal), None),
    "capped twice": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, *_: torch.tanh(torch.tanh(s / 5) * 5) * 5),
        "SOFT_CAP",
    ),
    "shifted before the cap": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, *_: torch.tanh(s / 5 + 1) * 5),
        "SOFT_CAP",
    ),
    "bias of the square": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + (j - i) * (j - i)),
        "ADDITIVE_BIAS",
    ),
    "bias of pairs": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + q[b, h, i, 0] * k[b, 0, j, 0]),
        "ADDITIVE_BIAS",
    ),
    "bias of the query": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + q[b, h, i, 0]),
        "ADDITIVE_BIAS",
    ),
    "bias of each head of a group": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + q[b, h, j, 0]),
        "ADDITIVE_BIAS",
    ),
    "bias before the cap": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh((s + k[b, 0, j, 0]) / 5) * 5),
        "SOFT_CAP",
    ),
    "number of the head": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + torch.exp2(h * -1.0)),
        "ADDITIVE_BIAS",
    ),
    "slope of the head for each query": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + torch.exp2(-(h + i) * 1.0) * j),
        "ADDITIVE_BIAS",
    ),
    "slope of the head within a group": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + torch.exp2(h * -1.0) * (j - i)),
        "ADDITIVE_BIAS",
    ),
    "subtracted from a bias": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: k[b, 0, j, 0] - s),
        "ADDITIVE_BIAS",
    ),
    "multiplied with a bias": (
        lambda q, k, v: attend(q, k, v, score_mod=lambda s, b, h, i, j: s * k[b, 0, j, 0]),
        "ADDITIVE_BIAS",
    ),
    "log-sum-exp": (lambda q, k, v: attend(q, k, v, return_lse=True), "RETURNED_WEIGHTS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_functions_stay_as_they_were(case):
    function, reason = REFUSED[case]
    module = capture(function, *qkv())
    before = str(module.graph)
    (row,) = run_pass(module, ALWAYS).sites
    assert row.decision == "dense"
    assert reason in (None, row.reason), row.explanation
    assert str(module.graph) == before


def test_a_rewritten_model_runs():
    q, k, v = qkv(heads_kv=6)
    out, (row,) = compiled(attend, COVERING, q, k, v)
    assert row.decision == "switchable"
    assert relative_error(out, attend(q, k, v)) < 1e-5


CAPS = {
    "divided": lambda s, *_: 2.0 * torch.tanh(s / 2.0),
    "scaled before": lambda s, *_: torch.tanh(s * SCALE / 0.5) * 0.5,
    "of both signs": lambda s, *_: -2.0 * torch.tanh(s / -2.0),
}


@pytest.mark.parametrize("form", CAPS)
def test_a_cap_is_read_off_the_score_function(form):
    def capped(q, k, v):
        return attend(q, k, v, score_mod=CAPS[form])

    q, k, v = qkv()
    score_terms.taken.clear()
    torch._dynamo.reset()
    module = capture(capped, q, k, v)
    expected = capped(q, k, v)
    (row,) = run_pass(module, SitePolicy(ALWAYS, targets=(score_terms.TakesTerms(), *DEFAULT_TARGETS))).sites
    assert (row.decision, row.target) == ("switchable", "terms"), row.explanation
    assert score_terms.taken == [("softcap",)]
    assert count_calls(module, torch.ops.higher_order.flex_attention) == 0
    assert relative_error(run(module, (q, k, v)), expected) < 1e-5


TERMS = {
    "bias of row, head and key": (lambda s, b, h, i, j, x: s + x[b, h, j, 0], ("key_bias",)),
    "bias of the key": (lambda s, b, h, i, j, x: s - x[0, 1, j, 2], ("key_bias",)),
    "slope times distance": (lambda s, b, h, i, j, x: s + x[0, h, 0, 0] * (j - i), ("key_bias",)),
    "slope times distance of both sides": (lambda s, b, h, i, j, x: s - x[0, h, 0, 0] * (i - j).abs(), ("key_bias",)),
    "slope of the head times distance": (
        lambda s, b, h, i, j, x: s + torch.exp2(-((h + 1) * 8.0 / 6)) * (j - i),
        ("key_bias",),
    ),
    "number times distance": (lambda s, b, h, i, j, x: (s + 0.125 * (j - i)) * 2, ("key_bias",)),
    "cap and bias": (lambda s, b, h, i, j, x: 5 * torch.tanh(s / 5) + x[b, h, j, 0], ("key_bias", "softcap")),
}


@pytest.mark.parametrize("form", TERMS)
def test_biases_of_keys_are_read_off_the_score_function(form):
    score, terms = TERMS[form]

    def biased(q, k, v, x):
        return attend(q, k, v, score_mod=lambda s, b, h, i, j: score(s, b, h, i, j, x))

    inputs = (*qkv(heads_kv=6), torch.rand(3, 6, 57, 8))
    out, (row,) = score_terms.rewritten(biased, *inputs)
    assert (row.decision, row.target) == ("switchable", "terms"), row.explanation
    assert score_terms.taken == [terms]
    assert relative_error(out, biased(*inputs)) < 1e-5


def test_a_bias_of_key_value_heads_is_read_off_the_score_function():
    def biased(q, k, v, x):
        return attend(q, k, v, score_mod=lambda s, b, h, i, j: s + x[b, h // 3, j])

    inputs = (*qkv(), torch.rand(3, 2, 57))
    out, (row,) = compiled(biased, COVERING, *inputs)
    assert row.decision == "switchable", row.explanation
    assert relative_error(out, biased(*inputs)) < 1e-5


def as_a_sum(lse, s):
    """As transformers joins sinks to flex attention."""
    sinks = s.view(1, -1, 1, 1).expand(lse.shape[0], -1, lse.shape[2], 1)
    column = lse.to(s.dtype).unsqueeze(-1)
    return torch.exp(column - torch.logsumexp(torch.cat([column, sinks], -1), -1, keepdim=True))


LATE_SINKS = {
    "log of a sum": as_a_sum,
    "log of a sum, less a dimension": lambda lse, s: torch.exp(
        lse - torch.logsumexp(torch.cat([s[None, None, :, None].expand(1, *lse.shape), lse[None]]), 0)
    )[..., None],
    "logaddexp": lambda lse, s: torch.exp(lse - torch.logaddexp(lse, s[:, None]))[..., None],
    "sigmoid": lambda lse, s: torch.sigmoid(lse - s[None, :, None])[..., None],
    "sigmoid of a part": lambda lse, s: torch.sigmoid(lse - torch.cat([s, s])[3:9, None])[..., None],
}


def with_late_sinks(share):
    def attend_with_sinks(q, k, v, s):
        out, lse = attend(q, k, v, return_lse=True)
        return out * share(lse, s)

    return attend_with_sinks


@pytest.mark.parametrize("form", LATE_SINKS)
def test_sinks_that_join_after_the_softmax_are_read_off_its_log_sum_exp(form):
    function = with_late_sinks(LATE_SINKS[form])
    inputs = (*qkv(), torch.randn(6))
    out, (row,) = score_terms.rewritten(function, *inputs)
    assert (row.decision, row.target) == ("switchable", "terms"), row.explanation
    assert score_terms.taken == [("sinks",)]
    assert relative_error(out, function(*inputs)) < 1e-5


NO_SINKS = {
    "of the other sign": lambda lse, s: torch.sigmoid(s[:, None] - lse)[..., None],
    "of another row": lambda lse, s: torch.sigmoid(lse.flip(2) - s[:, None])[..., None],
    "of another head": lambda lse, s: torch.sigmoid(lse.roll(1, 1) - s[:, None])[..., None],
    "to the base 2": lambda lse, s: torch.sigmoid(lse / 0.6931471805599453 - s[:, None])[..., None],
    "of each query": lambda lse, s: torch.sigmoid(lse - torch.arange(57) * s[:, None])[..., None],
    "and another": lambda lse, s: torch.sigmoid(lse - s[:, None] - 1)[..., None],
    "beside another use": lambda lse, s: torch.sigmoid(lse - s[:, None])[..., None] + lse[..., None],
    "three columns": lambda lse, s: torch.exp(
        lse - torch.logsumexp(torch.cat([lse[None], lse[None], s[None, None, :, None].expand(1, *lse.shape)]), 0)
    )[..., None],
}


@pytest.mark.parametrize("form", NO_SINKS)
def test_other_uses_of_a_log_sum_exp_stay_as_they_were(form):
    function = with_late_sinks(NO_SINKS[form])
    inputs = (*qkv(), torch.randn(6))
    out, (row,) = score_terms.rewritten(function, *inputs)
    assert (row.decision, row.reason in ("RETURNED_WEIGHTS", "SINK")) == ("dense", True), row.explanation
    assert relative_error(out, function(*inputs)) == 0.0
