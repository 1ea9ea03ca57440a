"""What is attention but stays dense, with its own reason; what is none; and graphs that hold nothing to find."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass import Reason
from infllm_pass.errors import NoAttentionSiteWarning
from infllm_pass.rewrite.pipeline import run_pass
from infllm_pass.rewrite.targets import BlockSparse
from tests.sites.test_sites_handwritten import ALWAYS, COVERING, INF, D, compiled, hidden, matmul_attention, part, qkv
from tests.support.common import SMALL, capture, relative_error


def scores_of(q, k):
    return q @ k.transpose(-1, -2) * D**-0.5


def masked(scores):
    return scores.masked_fill(hidden(scores.shape[-1]), INF)


def returned(q, k, v):
    weights = masked(scores_of(q, k)).softmax(-1)
    return weights @ v, weights


def sinks(q, k, v):
    scores = torch.cat([masked(scores_of(q, k)), q[..., :1]], -1)
    return scores.softmax(-1)[..., :-1] @ v


def overwritten(q, k, v):
    weights = masked(scores_of(q, k)).softmax(-1)
    k.mul_(2)
    return weights @ v


def twice_scaled(q, k, v):
    return (masked(scores_of(q, k)) * k.mean()).softmax(-1) @ v


REFUSED = {
    "no mask": (lambda q, k, v: scores_of(q, k).softmax(-1) @ v, Reason.BIDIRECTIONAL),
    "other lengths": (lambda q, k, v: scores_of(q[:, :, :20], k).softmax(-1) @ v, Reason.CROSS_ATTENTION),
    "bias": (lambda q, k, v: (masked(scores_of(q, k)) + q.new_ones(57, 57).cumsum(0)).softmax(-1) @ v, "ADDITIVE_BIAS"),
    "bias before scaling": (
        lambda q, k, v: masked((q @ k.mT + q[:, :, :, :1]) * 0.3).softmax(-1) @ v,
        Reason.ADDITIVE_BIAS,
    ),
    "soft cap of masked scores": (
        lambda q, k, v: (torch.tanh(masked(scores_of(q, k)) / 5) * 5).softmax(-1) @ v,
        Reason.SOFT_CAP,
    ),
    "sinks of queries": (sinks, Reason.SINK),
    "dropout": (part(softmax=lambda s: F.dropout(s.softmax(-1), 0.2)), Reason.DROPOUT),
    "weights returned": (returned, Reason.RETURNED_WEIGHTS),
    "finite fill": (part(mask=lambda s: s.masked_fill(hidden(57), -1e4)), Reason.SOFT_MASK),
    "least number of a narrower dtype": (
        part(mask=lambda s: s.masked_fill(hidden(57), torch.finfo(torch.float16).min)),
        Reason.SOFT_MASK,
    ),
    "filled before scaling down": (
        part(scale=lambda s: s, mask=lambda s: s.masked_fill(hidden(57), -1e9) / 9),
        Reason.SOFT_MASK,
    ),
    "filled and negated": (
        part(scale=lambda s: s, mask=lambda s: s.masked_fill(hidden(57), INF) * -0.3),
        Reason.SOFT_MASK,
    ),
    "scale is data": (twice_scaled, Reason.SCALE_IS_DATA),
    "keys overwritten on the way": (overwritten, Reason.OVERWRITTEN),
    "weights changed": (part(softmax=lambda s: s.softmax(-1) ** 2), Reason.PARTIAL_MATCH),
    "rows left out": (part(softmax=lambda s: s.softmax(-1)[:, :, :20]), Reason.LAYOUT),
    "rows of the batch left out": (part(output=lambda p, v: p[:2] @ v[:2]), Reason.LAYOUT),
    "heads left out": (part(output=lambda p, v: p[:, :4] @ v[:, :4]), Reason.LAYOUT),
    "keys left out": (part(output=lambda p, v: p[..., :50] @ v[:, :, :50]), Reason.SHAPES),
    "keys moved": (part(output=lambda p, v: p[..., 1:] @ v[:, :, :-1]), None),
    "scores changed": (part(scale=torch.relu), Reason.PARTIAL_MATCH),
    "anti-causal": (part(mask=lambda s: s.masked_fill(hidden(57).T, INF)), None),
    "strict": (part(mask=lambda s: s.masked_fill(hidden(58)[:-1, 1:] | torch.eye(57).bool(), INF)), None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_attention_left_dense_says_why_and_stays_as_it_was(case):
    function, reason = REFUSED[case]
    module = capture(function, *qkv())
    before = str(module.graph)
    rows = run_pass(module, ALWAYS).sites
    assert str(module.graph) == before
    if reason is None and not rows:
        return
    (row,) = rows
    assert row.decision == "dense"
    if reason is not None:
        assert row.reason == (reason if isinstance(reason, str) else reason.name), row.explanation
    assert Reason[row.reason].value in row.explanation


def router(x):
    return torch.einsum("ble,bled->bld", (x @ x.new_ones(24, 4)).softmax(-1), x[:, :, None].expand(-1, -1, 4, -1))


NOT_ATTENTION = {
    "softmax alone": lambda x: x.softmax(-1),
    "loss": lambda x: F.cross_entropy(x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], dtype=torch.long)),
    "weights by hand": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "router": router,
    "linear attention": lambda x: x.softmax(-1) @ (x.softmax(-2).transpose(-1, -2) @ x),
    "softmax over queries": lambda x: (x @ x.transpose(-1, -2)).softmax(-2) @ x,
    "softmax over the batch": lambda x: (x @ x.transpose(-1, -2)).softmax(0) @ x,
    "pooling": lambda x: (x @ x.new_ones(24, 1)).softmax(1).transpose(1, 2) @ x,
    "convolutions": lambda x: F.conv1d(F.relu(F.conv1d(x, x.new_ones(7, 57, 3))), x.new_ones(5, 7, 3)).mean(),
    "identity": lambda x: x,
    "nothing at all": lambda x: torch.zeros(3),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", NOT_ATTENTION)
def test_what_is_no_attention_is_no_site(case, dynamic):
    """A pooling by a learned query is one, though never a causal one."""
    x = torch.randn(2, 57, 24)
    torch._dynamo.reset()
    rows = []

    def backend(module, _example_inputs):
        rows.extend(run_pass(module, ALWAYS).sites)
        return module.forward

    torch.compile(NOT_ATTENTION[case], backend=backend, dynamic=dynamic)(x)
    assert [row.reason for row in rows] in ([], ["CROSS_ATTENTION"] if case == "pooling" else [])


def channels(q, k, v):
    """Attention between channels, as in XCiT: a product over the tokens."""
    return ((q.transpose(-1, -2) @ k).softmax(-1) @ v.transpose(-1, -2)).transpose(-1, -2)


def test_attention_between_channels_stays_dense():
    q, k, _ = qkv()
    module = capture(channels, q, k, k)
    assert [row.decision for row in run_pass(module, ALWAYS).sites] in (["dense"], [])


@pytest.mark.parametrize("config", [ALWAYS, SMALL], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    "attention",
    [matmul_attention, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)],
    ids=["by hand", "fused"],
)
@pytest.mark.parametrize("shape", [(2, 6, 0, 8), (2, 6, 1, 8), (0, 6, 57, 8), (1, 1, 1, 1), (1, 1, 57, 8)], ids=str)
def test_sizes_at_the_edge(shape, attention, config):
    x = torch.randn(shape)
    out, _ = compiled(lambda x: attention(x, x, x), config, x)
    expected = attention(x, x, x)
    assert out.shape == expected.shape
    if x.numel() and shape[2] < 40:
        torch.testing.assert_close(out, expected)


def test_a_graph_without_nodes_passes():
    graph = torch.fx.Graph()
    graph.output(())
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert run_pass(module, ALWAYS).sites == ()


@pytest.mark.parametrize("stage", ["plan", "rewrite"])
def test_a_failure_inside_the_pass_leaves_the_site_as_it_was(stage, monkeypatch):
    def fail(*_args, **_kwargs):
        raise ZeroDivisionError("injected")

    if stage == "plan":
        monkeypatch.setattr("infllm_pass.plan.planner._check_tensors", fail)
    else:
        monkeypatch.setattr(BlockSparse, "emit", fail)
    q, k, v = qkv()
    module = capture(lambda q, k, v: matmul_attention(q.transpose(2, 3).contiguous().transpose(2, 3), k, v), q, k, v)
    before = str(module.graph)
    (row,) = run_pass(module, ALWAYS).sites
    assert row.reason == "INTERNAL"
    assert "ZeroDivisionError: injected" in row.explanation
    assert "please report" in row.explanation
    assert str(module.graph) == before


def test_a_failure_of_a_matcher_is_a_row_and_the_model_runs(monkeypatch):
    def fail(*_args, **_kwargs):
        raise KeyError("injected")

    monkeypatch.setattr("infllm_pass.sites.softmax.follow_scores", fail)
    q, k, v = qkv()
    out, (row,) = compiled(matmul_attention, COVERING, q, k, v)
    assert row.reason == "INTERNAL"
    assert relative_error(out, matmul_attention(q, k, v)) < 1e-12


def test_a_miss_shows_how_far_the_matcher_got():
    module = capture(REFUSED["soft cap of masked scores"][0], *qkv())
    (row,) = run_pass(module, ALWAYS).sites
    assert "softmax and product with values found" in row.explanation
    assert "stopped at node tanh" in row.explanation
    assert "test_site_reasons.py:" in row.explanation


def test_the_warning_names_the_best_partial_match():
    model = infllm_pass.sparsify(torch.compile(REFUSED["sinks of queries"][0], backend="eager"), SMALL)
    with pytest.warns(NoAttentionSiteWarning, match=r"SINK: .*stopped at node .*test_site_reasons.py"):
        model(*qkv())
