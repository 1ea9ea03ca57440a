"""Finding sites in every argument form, seeing through repeated heads, and the reasons of sites left dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from infllm_pass import Reason, SparseAttentionConfig
from infllm_pass.graph.subgraphs import all_graphs
from infllm_pass.plan.planner import plan_graph
from infllm_pass.plan.site_config import site_config_of
from infllm_pass.rewrite.pipeline import run_pass
from infllm_pass.sites import find_sites
from tests.support.common import SMALL, capture, count_calls, relative_error

ALWAYS_SPARSE = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})
sdpa = F.scaled_dot_product_attention


def qkv(batch=2, heads=6, heads_kv=2, length=50, dim=8):
    return (
        torch.randn(batch, heads, length, dim),
        torch.randn(batch, heads_kv, length, dim),
        torch.randn(batch, heads_kv, length, dim),
    )


def plans(function, *inputs, filter_fn=None, **capture_options):
    module = capture(function, *inputs, **capture_options)
    return [
        plan for view in all_graphs(module) for plan in plan_graph(view, ALWAYS_SPARSE, site_config_of(filter_fn, None))
    ]


def call(module, **inputs):
    """Run a captured graph, whose placeholders stand in the order of their first use."""
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    return module(*(inputs[name.lower().strip("l_")] for name in names))[0]


def causal(length):
    index = torch.arange(length)
    return index[None, :] <= index[:, None]


FORMS = {
    "keyword flag": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "all keywords": lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True),
    "scale": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.25),
    "mask": lambda q, k, v: sdpa(q, k, v, causal(q.shape[2])),
    "mask keyword": lambda q, k, v: sdpa(q, k, v, attn_mask=causal(q.shape[2])[None, None]),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
def test_every_argument_form_is_found(form, dynamic):
    q, k, v = qkv(heads_kv=6)
    (plan,) = plans(FORMS[form], q, k, v, dynamic=dynamic)
    assert plan.reason is Reason.SWITCHABLE
    assert plan.scale == (0.25 if form == "scale" else 8**-0.5)


REPETITIONS = {
    "expand and reshape": lambda k: k[:, :, None].expand(-1, -1, 3, -1, -1).reshape(k.shape[0], 6, k.shape[2], 8),
    "unsqueeze, expand, flatten by view": lambda k: (
        k.unsqueeze(2).expand(-1, -1, 3, -1, -1).contiguous().view(k.shape[0], -1, k.shape[2], 8)
    ),
    "repeat_interleave": lambda k: k.repeat_interleave(3, dim=1),
    "repeat_interleave function": lambda k: torch.repeat_interleave(k, repeats=3, dim=1),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("repetition", REPETITIONS)
def test_repeated_heads_are_seen_through(repetition, dynamic):
    repeat = REPETITIONS[repetition]
    (plan,) = plans(lambda q, k, v: sdpa(q, repeat(k), repeat(v), is_causal=True), *qkv(), dynamic=dynamic)
    assert plan.reason is Reason.SWITCHABLE
    assert int(plan.site.kv_heads) == 2
    assert plan.site.value_heads.node.op == "placeholder"


OTHER_REPETITIONS = {
    "tiled heads": lambda k: k.repeat(1, 3, 1, 1),
    "expanded on the other side": lambda k: k[:, None].expand(-1, 3, -1, -1, -1).reshape(k.shape[0], 6, k.shape[2], 8),
}


@pytest.mark.parametrize("repetition", OTHER_REPETITIONS)
def test_other_orders_of_heads_are_not_mistaken_for_groups(repetition):
    repeat = OTHER_REPETITIONS[repetition]
    function = lambda q, k, v: sdpa(q, repeat(k), repeat(v), is_causal=True)  # noqa: E731
    q, k, v = qkv()
    module = capture(function, q, k, v)
    (site,) = find_sites(all_graphs(module)[0].facts)
    assert site.kv_heads == 6
    expected = function(q, k, v)
    run_pass(module, SparseAttentionConfig.from_dict({**ALWAYS_SPARSE.to_dict(), "topk": 40}))
    assert relative_error(call(module, q=q, k=k, v=v), expected) < 1e-5


def test_heads_repeated_before_the_cache_is_written_are_kept_as_they_were():
    """The repeated copy was taken before the write: looking through it would read the new keys."""

    def function(q, k, v):
        repeated = k.repeat_interleave(3, dim=1)
        k.mul_(0)
        return sdpa(q, repeated, v.repeat_interleave(3, dim=1), is_causal=True)

    q, k, v = qkv()
    expected = function(q, k.clone(), v)
    module = capture(function, q, k.clone(), v)
    report = run_pass(module, SparseAttentionConfig.from_dict({**ALWAYS_SPARSE.to_dict(), "topk": 40}))
    assert report.sites[0].key_shape[1] == 6
    assert relative_error(call(module, q=q, k=k, v=v), expected) < 1e-5


class Dropout(nn.Module):
    def forward(self, q, k, v):
        return sdpa(q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True)


REFUSED = {
    "no mask": (lambda q, k, v: sdpa(q, k, v), Reason.BIDIRECTIONAL),
    "float mask": (
        lambda q, k, v: sdpa(q, k, v, torch.zeros(q.shape[2], q.shape[2]).masked_fill(~causal(q.shape[2]), -1e4)),
        Reason.ADDITIVE_BIAS,
    ),
    "strict mask": (lambda q, k, v: sdpa(q, k, v, causal(q.shape[2] + 1)[:-1, 1:]), Reason.PARTIAL_KEYS),
    "window": (
        lambda q, k, v: sdpa(q, k, v, causal(q.shape[2]) & ~causal(q.shape[2]).roll(8, 0)),
        Reason.UNPROVEN_MASK,
    ),
    "cross attention": (lambda q, k, v: sdpa(q[:, :, :20], k, v), Reason.CROSS_ATTENTION),
    "flag with more queries than keys": (
        lambda q, k, v: sdpa(q, k[:, :, :20], v[:, :, :20], is_causal=True),
        Reason.PARTIAL_KEYS,
    ),
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.5, is_causal=True), Reason.DROPOUT),
    "seven dimensions": (
        lambda q, k, v: sdpa(*(x.view(2, 1, 2, 3, 5, 10, 8) for x in (q, k, v)), is_causal=True),
        Reason.SHAPES,
    ),
    "key padding only": (lambda q, k, v: sdpa(q, k, v, (k[:, 0, :, 0] > 0)[:, None, None]), Reason.BIDIRECTIONAL),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sites_left_dense_say_why_and_stay_as_they_were(case):
    function, reason = REFUSED[case]
    q, k, v = qkv(heads_kv=6)
    module = capture(function, q, k, v)
    before = module.code
    report = run_pass(module, ALWAYS_SPARSE)
    (site,) = report.sites
    assert (site.decision, site.reason) == ("dense", reason.name), site.explanation
    assert reason.value in site.explanation
    assert module.code == before


def test_dropout_depends_on_the_mode_of_the_module():
    q, k, v = qkv(heads_kv=6)
    assert plans(Dropout().train(), q, k, v)[0].reason is Reason.DROPOUT
    assert plans(Dropout().eval(), q, k, v)[0].reason is Reason.SWITCHABLE


def test_large_heads_stay_dense_without_their_mask():
    q, k, v = qkv(heads=2, heads_kv=2, dim=272)
    module = capture(lambda q, k, v: sdpa(q, k, v, causal(q.shape[2])), q, k, v)
    (site,) = run_pass(module, ALWAYS_SPARSE).sites
    assert (site.reason, site.mask_elided) == ("HEAD_DIM", True)
    assert count_calls(module, torch.arange) == 0
    assert relative_error(call(module, q=q, k=k, v=v), sdpa(q, k, v, is_causal=True)) < 1e-5


def test_the_filter_turns_sites_down():
    def two(q, k, v):
        return sdpa(sdpa(q, k, v, is_causal=True), k, v, is_causal=True)

    seen = []
    q, k, v = qkv(heads_kv=6)
    results = plans(two, q, k, v, filter_fn=lambda site: not seen.append(site) and len(seen) > 1)
    assert [plan.reason for plan in results] == [Reason.EXCLUDED, Reason.SWITCHABLE]


def test_a_scale_that_is_data_stays_dense():
    """Fused attention takes numbers only, so the graph is edited to hold a tensor there."""

    def function(q, k, v, factor):
        return sdpa(q * factor, k, v, is_causal=True, scale=0.5)

    module = capture(function, *qkv(heads_kv=6), torch.tensor(0.3))
    view = all_graphs(module)[0]
    (site,) = find_sites(view.facts)
    factor = next(node for node in module.graph.nodes if "factor" in node.name)
    site.node.kwargs = {**site.node.kwargs, "scale": factor}
    assert [plan.reason for plan in plan_graph(view, ALWAYS_SPARSE)] == [Reason.SCALE_IS_DATA]


def test_graphs_without_attention_pass_through():
    q, _, _ = qkv()
    module = capture(lambda x: torch.softmax(x, -1).sum(), q)
    before = module.code
    assert run_pass(module, ALWAYS_SPARSE).sites == ()
    assert module.code == before


def test_activation_checkpointing_is_seen_into():
    from torch.utils.checkpoint import checkpoint

    def function(q, k, v):
        mask = causal(q.shape[2])
        return checkpoint(lambda a, b, c, m: sdpa(a, b, c, m), q, k, v, mask, use_reentrant=False)

    q, k, v = (t.requires_grad_() for t in qkv(heads_kv=6))
    module = capture(function, q, k, v)
    report = run_pass(module, ALWAYS_SPARSE)
    assert [site.decision for site in report.sites] == ["switchable"]
    assert count_calls(module, torch.ops.infllm.block_attention.default) == 1


def test_the_body_of_a_custom_autograd_function_is_left_alone():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return sdpa(q, k, v, is_causal=True)

        @staticmethod
        def backward(ctx, grad):
            return grad, grad, grad

    q, k, v = (t.requires_grad_() for t in qkv(heads_kv=6))
    results = plans(Attention.apply, q, k, v)
    assert [plan.reason for plan in results] == [Reason.NESTED_GRAPH]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_views_that_rely_on_the_strides_of_fused_attention_stay_valid(dynamic):
    """Fused attention returns memory in the order of the queries, here [L, B, H, D]; the operators need not."""

    def function(q, k, v):
        out = sdpa(q, k, v, is_causal=True).permute(2, 0, 1, 3)
        return out.view(out.shape[0] * out.shape[1], -1)

    q, k, v = (torch.randn(50, 2, 6, 8).permute(1, 2, 0, 3) for _ in range(3))
    expected = function(q, k, v)
    rows = []

    def backend(module, _example_inputs):
        rows.extend(run_pass(module, SparseAttentionConfig.from_dict({**ALWAYS_SPARSE.to_dict(), "topk": 40})).sites)
        return module.forward

    actual = torch.compile(function, backend=backend, dynamic=dynamic)(q, k, v)
    assert [row.branch for row in rows] == ["sparse"]
    assert relative_error(actual, expected) < 1e-5


def zeroed(x):
    x[:, :, 2] = 0
    return x


COPIES = {
    "repeated keys": lambda q, k, v: (q, zeroed(k.repeat_interleave(3, 1)), v.repeat_interleave(3, 1)),
    "repeated values": lambda q, k, v: (q, k.repeat_interleave(3, 1), zeroed(v.repeat_interleave(3, 1))),
    "copied queries": lambda q, k, v: (zeroed(q.clone()).mT.mT, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)),
    "copied keys, repeated": lambda q, k, v: (q, *(zeroed(part.clone()).repeat_interleave(3, 1) for part in (k, v))),
}


@pytest.mark.parametrize("copies", COPIES.values(), ids=COPIES)
def test_a_copy_that_is_written_to_is_not_what_it_was_copied_from(copies):
    def function(q, k, v):
        return sdpa(*copies(q, k, v), is_causal=True)

    q, k, v = (part.double() for part in qkv(length=20))
    module = capture(function, q, k, v)
    (site,) = run_pass(module, ALWAYS_SPARSE).sites
    assert site.decision == "switchable"
    assert relative_error(call(module, q=q, k=k, v=v), function(q, k, v)) < 1e-12
