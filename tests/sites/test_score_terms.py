"""Soft caps, sinks and key biases: read off every spelling of them, and nothing that only looks like one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.kernels import reference
from tests.sites.test_sites_handwritten import ALWAYS, COVERING, INF, hidden
from tests.support import score_terms
from tests.support.common import relative_error
from tests.support.score_terms import rewritten

B, L, D = 2, 57, 8
SCALE = D**-0.5


def qkv(heads=6, heads_kv=2):
    torch.manual_seed(0)
    return tuple(torch.randn(B, h, L, D, dtype=torch.float64) * 2 for h in (heads, heads_kv, heads_kv))


def grouped(q, x):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def scores_of(q, k):
    return q @ grouped(q, k).mT


def masked(scores):
    return scores.masked_fill(hidden(L), INF)


def weighted(q, scores, v):
    return scores.softmax(-1) @ grouped(q, v)


def capped(cap):
    """Attention whose scores a function caps."""
    return lambda q, k, v, s: weighted(q, masked(cap(scores_of(q, k))), v)


def with_column(join, left=lambda p: p[..., :-1], mask=masked):
    """Attention with a column joined to the scores, and left out after the softmax."""

    def attend(q, k, v, s):
        scores = join(mask(scores_of(q, k) * SCALE), s, q)
        return left(scores.softmax(-1)) @ grouped(q, v)

    return attend


def column_of(s, q, view=(1, -1, 1, 1)):
    return s.reshape(view).expand(q.shape[0], -1, q.shape[2], -1)


def less_maximum(scores):
    return scores - scores.max(dim=-1, keepdim=True).values


def of_keys(add):
    """Attention with numbers added to its scores."""
    return lambda q, k, v, s: weighted(q, masked(scores_of(q, k) * SCALE + add(q, s)), v)


def in_mask(make):
    """Fused attention with numbers in its mask."""

    def attend(q, k, v, s):
        mask = make(q, torch.zeros(L, L, dtype=q.dtype).masked_fill(hidden(L), INF), s)
        return F.scaled_dot_product_attention(q, grouped(q, k), grouped(q, v), mask)

    return attend


def distance():
    return torch.arange(L)[None] - torch.arange(L)[:, None]


def in_place(scores):
    scores = scores * (SCALE / 5)
    scores.tanh_()
    return scores * 5


def merged_bias(q, k, v, s):
    """As Bloom adds it, to products of three dimensions."""
    k, v = (grouped(q, x).sin() for x in (k, v))
    places = q.detach()[:, 0, :, 0].sigmoid().cumsum(1)[:, None]
    bias = (s[:, None] * places).cos().reshape(B * 6, 1, L)
    scores = bias.baddbmm(q.reshape(B * 6, L, D), k.reshape(B * 6, L, D).mT, alpha=SCALE)
    return masked(scores.view(B, 6, L, L)).softmax(-1).view(B * 6, L, L).bmm(v.reshape(B * 6, L, D)).view(q.shape)


POSITION = torch.arange(L)


def sloped(places):
    """Attention with as many slopes as heads, times places ``[Lq, Lk]``, as ALiBi adds them."""
    return of_keys(lambda q, s: s[:, None, None] * places())


def joined(scores, s, q):
    return torch.cat([scores, column_of(s, q)], -1)


TAKEN = {
    "divided, tanh, multiplied": (capped(lambda x: torch.tanh(x * SCALE / 5.0) * 5.0), ("softcap",)),
    "cap first": (capped(lambda x: 5.0 * (SCALE * x / 5.0).tanh()), ("softcap",)),
    "multiplied by an inverse": (capped(lambda x: torch.tanh(x * (SCALE / 5.0)) / 0.2), ("softcap",)),
    "cap of both signs": (capped(lambda x: -5.0 * torch.tanh(x * SCALE / -5.0)), ("softcap",)),
    "cap of the other sign": (capped(lambda x: -5.0 * torch.tanh(x * SCALE / 5.0)), ("softcap",)),
    "cap as a tensor": (
        capped(lambda x: torch.tanh(x * SCALE / torch.full((), 5.0)) * torch.full((), 5.0)),
        ("softcap",),
    ),
    "cap in place": (capped(in_place), ("softcap",)),
    "capped, less the maximum": (capped(lambda x: less_maximum(torch.tanh(x * SCALE / 5.0) * 5.0)), ("softcap",)),
    "column": (with_column(joined), ("sinks",)),
    "column less the maximum": (with_column(lambda x, s, q: less_maximum(joined(x, s, q))), ("sinks",)),
    "column first": (
        with_column(lambda x, s, q: torch.cat([column_of(s, q), x], -1), lambda p: p[..., 1:]),
        ("sinks",),
    ),
    "column of zeros": (
        with_column(lambda x, s, q: torch.cat([x, torch.zeros(*x.shape[:3], 1, dtype=x.dtype)], -1)),
        ("sinks",),
    ),
    "one number for all heads": (
        with_column(lambda x, s, q: torch.cat([x, s[2].expand(*x.shape[:3], 1)], -1)),
        ("sinks",),
    ),
    "column, all scaled": (with_column(lambda x, s, q: joined(x, s, q) * 0.5), ("sinks",)),
    "computed column": (with_column(lambda x, s, q: joined(x, s.exp() - 1, q)), ("sinks",)),
    "cap and column": (
        with_column(joined, mask=lambda x: masked(torch.tanh(x / 3) * 3)),
        ("sinks", "softcap"),
    ),
    "bias of keys": (of_keys(lambda q, s: q[0, 0, :, 0].detach().exp()), ("key_bias",)),
    "bias of a group": (
        of_keys(lambda q, s: (s[:2, None] * POSITION).sin().repeat_interleave(3, 0)[:, None]),
        ("key_bias",),
    ),
    "bias of keys and heads, keys first": (
        of_keys(lambda q, s: (POSITION[:, None] * s[:2]).sin().repeat_interleave(3, 1).mT[:, None]),
        ("key_bias",),
    ),
    "bias of rows, keys and heads, merged": (merged_bias, ("key_bias",)),
    "mask with a bias": (in_mask(lambda q, m, s: m + q[0, 0, :, 0].detach().exp()), ("key_bias",)),
    "bias with a mask of least numbers": (
        in_mask(lambda q, m, s: s[1].cos() * POSITION.sin() + m.masked_fill(hidden(L), -1e30)),
        ("key_bias",),
    ),
    "mask less a bias, and a bias": (
        in_mask(lambda q, m, s: m - POSITION.to(q.dtype).sin() + q[0, 0, :, 0].detach().exp()),
        ("key_bias",),
    ),
    "mask with slopes": (
        in_mask(lambda q, m, s: m - 0.125 * distance().abs()),
        ("key_bias",),
    ),
    "cap, bias and column": (
        with_column(joined, mask=lambda x: masked(torch.tanh(x / 3) * 3 + POSITION.double().sin() * 2)),
        ("key_bias", "sinks", "softcap"),
    ),
}


ALIBI = {
    "key less query": lambda: torch.arange(L)[None] - torch.arange(L)[:, None],
    "key": lambda: torch.arange(L)[None],
    "key less the last": lambda: torch.arange(1 - L, 1)[None],
    "distance of both sides": lambda: (torch.arange(L)[None] - torch.arange(L)[:, None]).abs(),
    "distance of both sides, from the query": lambda: -(torch.arange(L)[:, None] - torch.arange(L)[None]).abs(),
    "distance of both sides, as floats": lambda: (torch.arange(L)[:, None] - torch.arange(L)[None]).double().abs(),
    "query less key, cast": lambda: -(torch.arange(L)[:, None] - torch.arange(L)[None]).double(),
}

SLOPED_LOOKALIKES = {
    "square of the distance": lambda: (torch.arange(L)[None] - torch.arange(L)[:, None]) ** 2,
    "distance from another key": lambda: (torch.arange(L)[None] - torch.arange(L)[:, None] + 3).abs(),
    "product of query and key": lambda: torch.arange(L)[None] * torch.arange(L)[:, None],
    "half the key": lambda: torch.arange(L)[None] // 2 - torch.arange(L)[:, None],
    "narrow": lambda: (torch.arange(L)[None] - torch.arange(L)[:, None]).bfloat16().double(),
}


def numbers_of_heads(q):
    return torch.tensor([0.5, 0.25, 0.125, 0.3, 0.2, 0.1], dtype=torch.float64)[:, None, None]


def as_mpt(q, s):
    """Of a longer text, integers first, slopes put together from two parts."""
    slopes = torch.cat([s[:4].view(1, 4, 1, 1), s[4:].view(1, 2, 1, 1)], 1)
    return (torch.arange(1 - 100, 1, dtype=torch.int32).view(1, 1, 1, 100) * slopes).squeeze(0)[:, :, -L:]


def as_falcon(q, s):
    """Filled with the least number where a key is hidden."""
    alibi = (s[:, None] * torch.arange(L)).reshape(1, 6, 1, L) / 3
    return torch.masked_fill(alibi, hidden(L), torch.finfo(torch.float64).min)


SLOPED = {
    "negated product": lambda q, s: -(s[:, None, None] * -distance()),
    "product over a number": lambda q, s: s[:, None, None] * distance() / 3.0,
    "key less query, each with its slope": lambda q, s: (
        s[:, None, None] * torch.arange(L)[None, None] - s[:, None, None] * torch.arange(L)[None, :, None]
    ),
    "numbers of a list": lambda q, s: numbers_of_heads(q) * distance(),
    "one number": lambda q, s: 0.125 * distance(),
    "one number, both sides": lambda q, s: -0.125 * distance().abs(),
    "distance itself": lambda q, s: distance(),
    "powers": lambda q, s: torch.pow(2.0, -torch.arange(1, 7))[:, None, None] * distance(),
    "as in MPT": as_mpt,
    "as in Falcon": as_falcon,
}


@pytest.mark.parametrize("form", SLOPED)
def test_products_of_slopes_and_distances_are_read_in_every_spelling(form):
    assert_carried(of_keys(SLOPED[form]), qkv(6, 6))


PARTS = {
    "first keys of more": lambda q, s: (torch.arange(100) * s[0]).sin()[:L],
    "last keys of more": lambda q, s: (torch.arange(100) * s[0]).sin()[-L:],
    "keys from the middle": lambda q, s: (torch.arange(100) * s[0]).sin().narrow(0, 5, L),
    "last heads of more": lambda q, s: (torch.cat([s, s])[:, None] * torch.arange(100)).sin()[5:11, None, :L],
}


@pytest.mark.parametrize("form", PARTS)
def test_a_part_of_a_tensor_is_a_bias(form):
    assert_carried(of_keys(PARTS[form]), qkv(6, 6))


def assert_carried(function, tensors):
    inputs = [x.requires_grad_() for x in (*tensors, torch.rand(6, dtype=torch.float64))]
    expected = function(*inputs)
    out, (row,) = rewritten(function, *inputs)
    assert (row.decision, row.target) == ("switchable", "terms"), row.explanation
    assert score_terms.taken == [("key_bias",)]
    assert relative_error(out, expected) < 1e-12
    for actual, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ALIBI)
def test_slopes_of_distances_are_biases_of_keys(form):
    assert_carried(sloped(ALIBI[form]), qkv(6, 6))


DYNAMIC = {
    "last keys of more": lambda s, n: (torch.arange(300) * s[0]).sin()[-n:],
    "slope and distance": lambda s, n: s[:, None, None] * (torch.arange(n)[None] - torch.arange(n)[:, None]),
    "slope and distance of both sides": lambda s, n: -0.125 * (torch.arange(n)[None] - torch.arange(n)[:, None]).abs(),
}


@pytest.mark.parametrize("form", DYNAMIC)
def test_biases_of_dynamic_lengths(form):
    def attend(q, k, v, s):
        place = torch.arange(q.shape[2])
        scores = q @ k.mT * SCALE + DYNAMIC[form](s, q.shape[2])
        return scores.masked_fill(place > place[:, None], INF).softmax(-1) @ v

    torch._dynamo.reset()
    config = replace(COVERING, dense_len=64)
    model = infllm_pass.sparsify(torch.compile(attend, backend="aot_eager", dynamic=True), config)
    slopes = torch.rand(6, dtype=torch.float64)
    for length in (30, 90, 50, 130):
        tensors = [torch.randn(2, 6, length, D, dtype=torch.float64) for _ in range(3)]
        assert relative_error(model(*tensors, slopes), attend(*tensors, slopes)) < 1e-12
    rows = infllm_pass.report(model).sites
    assert [(row.decision, row.branch) for row in rows] == [("switchable", "dense"), ("switchable", "sparse")]


def test_distances_of_128k_keys_keep_their_precision_in_float32(monkeypatch):
    """Scores are off by less than 0.001, but for one number of the row, and at the very ends by less than 0.002."""
    length, queries, slopes = 131072, 3, 2.0 ** -torch.arange(1.0, 9.0)
    biases = []

    def spy(q, k, v, key_mask, window, key_bias, *rest):
        biases.append(key_bias)
        return torch.zeros_like(q)

    monkeypatch.setattr(score_terms, "attend_with_terms", spy)

    def attend(q, k, v):
        place = torch.arange(length)
        distance = place - place[-queries:, None]
        scores = q @ k.mT + slopes[:, None, None] * distance
        return scores.masked_fill(distance > 0, INF).softmax(-1) @ v

    _, (row,) = rewritten(attend, *(torch.zeros(1, 8, n, 2) for n in (queries, length, length)))
    assert row.decision == "switchable", row.explanation
    bias = biases[-1]  # the first is an example
    scores = torch.rand(length) * 16 - 8
    added = (scores + bias[0]).double() - scores  # as kernels add it
    exact = slopes.double()[:, None] * torch.arange(length)
    off = added - exact
    key = (off.median(1).values / slopes).round()  # the one that is counted from
    off = (off - (key * slopes)[:, None]).abs()
    assert float(off[:, 32:-32].max()) < 1e-3
    assert float(off.max()) < 2e-3


@pytest.mark.parametrize("form", SLOPED_LOOKALIKES)
def test_slopes_of_anything_else_stay_as_they_were(form):
    assert_untouched(sloped(SLOPED_LOOKALIKES[form]), "ADDITIVE_BIAS", qkv(6, 6))


def test_slopes_that_differ_within_a_group_stay_as_they_were():
    assert_untouched(sloped(ALIBI["key less query"]), "ADDITIVE_BIAS", qkv(6, 2))


def test_a_number_of_the_row_beside_sinks_stays_as_it_was():
    def attend(q, k, v, s):
        distance = torch.arange(L)[None] - torch.arange(L)[:, None]
        scores = masked(scores_of(q, k) * SCALE + s[:, None, None] * distance)
        return joined(scores, s, q).softmax(-1)[..., :-1] @ grouped(q, v)

    assert_untouched(attend, "ADDITIVE_BIAS", qkv(6, 6))


def assert_untouched(function, reason, tensors):
    inputs = [*tensors, torch.rand(6, dtype=torch.float64)]
    out, (row,) = rewritten(function, *inputs)
    assert (row.decision, row.reason) == ("dense", reason), row.explanation
    assert score_terms.taken == []
    assert relative_error(out, function(*inputs)) == 0.0


def gradients(out, inputs):
    torch.manual_seed(1)
    found = torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True)]


def leaves():
    return [*(x.requires_grad_() for x in (*qkv(), torch.randn(6, dtype=torch.float64)))]


@pytest.mark.parametrize("form", TAKEN)
def test_terms_are_read_and_carried_to_a_target(form):
    function, terms = TAKEN[form]
    inputs = leaves()
    expected = function(*inputs)
    out, (row,) = rewritten(function, *inputs)
    assert (row.decision, row.target) == ("switchable", "terms"), row.explanation
    assert score_terms.taken == [terms]
    assert relative_error(out, expected) < 1e-12
    for actual, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-9, atol=1e-12)


LOOKALIKES = {
    "cap after the mask": (lambda q, k, v, s: weighted(q, torch.tanh(masked(scores_of(q, k))) * 5, v), "SOFT_CAP"),
    "cap after a bias": (
        capped(lambda x: torch.tanh(x + POSITION.double().sin()) * 5),
        "SOFT_CAP",
    ),
    "cap after a shift": (capped(lambda x: torch.tanh(x + 1.0) * 5), "SOFT_CAP"),
    "cap after the maximum is taken away": (capped(lambda x: torch.tanh(less_maximum(x)) * 5), "SOFT_CAP"),
    "capped twice": (capped(lambda x: torch.tanh(torch.tanh(x) * 5) * 3), "SOFT_CAP"),
    "cap of nothing": (capped(lambda x: torch.tanh(x) * 0.0), "SOFT_CAP"),
    "cap by data": (lambda q, k, v, s: weighted(q, masked(torch.tanh(scores_of(q, k)) * s.mean()), v), "SCALE_IS_DATA"),
    "cap around a column": (
        with_column(lambda x, s, q: torch.tanh(joined(x, s, q)) * 5, mask=lambda x: x),
        "SOFT_CAP",
    ),
    "tanh of something else": (
        lambda q, k, v, s: weighted(q, masked(scores_of(q, k) + torch.tanh(scores_of(q, k))), v),
        None,
    ),
    "tanh of weights": (lambda q, k, v, s: torch.tanh(masked(scores_of(q, k)).softmax(-1)) @ grouped(q, v), None),
    "sigmoid": (capped(lambda x: torch.sigmoid(x) * 5), "PARTIAL_MATCH"),
    "column of the query": (
        with_column(lambda x, s, q: torch.cat([x, q[..., :1]], -1)),
        "SINK",
    ),
    "column of the row": (
        with_column(lambda x, s, q: torch.cat([x, q.mean((2, 3), keepdim=True).expand(-1, -1, L, 1)], -1)),
        "SINK",
    ),
    "column of a key": (with_column(lambda x, s, q: torch.cat([x, x[..., :1].clamp(-1, 1)], -1)), "SINK"),
    "column of the head and, in part, of the query": (
        with_column(lambda x, s, q: torch.cat([x, column_of(s, q) + q[:, :1, :, :1]], -1)),
        "SINK",
    ),
    "two columns": (
        with_column(lambda x, s, q: torch.cat([x, column_of(s, q), column_of(s, q)], -1), lambda p: p[..., :-2]),
        "SINK",
    ),
    "a column of two keys": (
        with_column(lambda x, s, q: torch.cat([x, column_of(s, q).expand(-1, -1, -1, 2)], -1), lambda p: p[..., :-2]),
        "SINK",
    ),
    "column taken away before": (with_column(lambda x, s, q: joined(x, s, q)[..., :-1], lambda p: p), "SINK"),
    "column, a key taken away": (with_column(joined, lambda p: p[..., 1:]), None),
    "column joined to shifted scores": (
        with_column(lambda x, s, q: joined(less_maximum(x), s, q)),
        "SINK",
    ),
    "column that is masked": (
        with_column(lambda x, s, q: joined(x, s, q).masked_fill(hidden(L + 1)[:L], INF), mask=lambda x: x),
        "SINK",
    ),
    "column joined along the queries": (
        with_column(lambda x, s, q: torch.cat([x, x[:, :, :1]], 2), lambda p: p[:, :, :-1]),
        None,
    ),
    "mask with a bias of queries": (in_mask(lambda q, m, s: m + q[0, 0, :, :1].exp()), "ADDITIVE_BIAS"),
    "mask with a mask that hides half": (in_mask(lambda q, m, s: m + m.clamp(min=-3.0)), "ADDITIVE_BIAS"),
    "a bias less a mask": (in_mask(lambda q, m, s: q[0, 0, :, 0].exp() - m.clamp(min=-3.0)), "ADDITIVE_BIAS"),
    "bias of keys beside a mask of data": (
        lambda q, k, v, s: weighted(
            q,
            (scores_of(q, k) * SCALE + q[0, 0, :, 0].detach().exp()).masked_fill(
                hidden(L) | (q[0, 0, :, :1] > q[0, 0, :, 0] + 1), INF
            ),
            v,
        ),
        "UNPROVEN_MASK",
    ),
    "bias of queries": (of_keys(lambda q, s: q[0, 0, :, :1].exp()), "ADDITIVE_BIAS"),
    "bias of queries and keys": (of_keys(lambda q, s: (q[0, 0, :, :1] * POSITION).sin()), "ADDITIVE_BIAS"),
    "bias that differs in one head": (
        of_keys(lambda q, s: (s[:, None] * POSITION).sin()[:, None]),
        "ADDITIVE_BIAS",
    ),
    "bias of the other grouping": (
        of_keys(lambda q, s: (s[:2, None] * POSITION).sin().repeat(3, 1)[:, None]),
        "ADDITIVE_BIAS",
    ),
}


@pytest.mark.parametrize("form", LOOKALIKES)
def test_what_only_looks_like_a_term_stays_as_it_was(form):
    function, reason = LOOKALIKES[form]
    inputs = leaves()
    expected = function(*inputs)
    out, rows = rewritten(function, *inputs)
    assert [row.decision for row in rows] in (["dense"], [])
    assert score_terms.taken == []
    if reason is not None:
        assert [row.reason for row in rows] == [reason], rows[0].explanation
    assert relative_error(out, expected) == 0.0


def all_terms(q, k, v, s, importance):
    """A cap, a bias of rows, keys and key/value heads, and sinks."""
    scores = torch.tanh(scores_of(q, k) * SCALE / 3) * 3 + importance.repeat_interleave(3, 1)[:, :, None]
    return joined(masked(scores), s, q).softmax(-1)[..., :-1] @ grouped(q, v)


def oracle(q, k, v, s, importance, config):
    common = {"geometry": config.geometry_for(D, None), "scale": SCALE, "offset": 0, "softcap": 3.0}
    selected = reference.select_blocks(q, k, **common)
    return reference.attention(q, k, v, selected, **common, key_bias=importance, sinks=s)[0]


@pytest.mark.parametrize("scorer", ["pooled", "tokens"])
def test_sparse_attention_with_every_term_is_the_oracles(scorer):
    config = replace(ALWAYS, scorer=scorer)
    inputs = [*leaves(), torch.randn(B, 2, L, dtype=torch.float64, requires_grad=True)]
    torch._dynamo.reset()
    model = infllm_pass.sparsify(torch.compile(all_terms, backend="aot_eager"), config)
    out = model(*inputs)
    (row,) = infllm_pass.report(model).sites
    assert (row.decision, row.target, row.kernels) == ("switchable", "block-sparse", "C++")
    assert row.mask == "causal, biased keys, scores capped at 3, sinks"
    expected = oracle(*inputs, config)
    assert relative_error(out, expected) < 1e-10
    assert relative_error(expected, all_terms(*inputs)) > 1e-3
    for actual, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert relative_error(actual, wanted) < 1e-9


def test_a_covering_budget_and_dense_lengths_are_the_models_own():
    for config in (COVERING, replace(ALWAYS, dense_len=64)):
        inputs = [*leaves(), torch.randn(B, 2, L, dtype=torch.float64, requires_grad=True)]
        torch._dynamo.reset()
        model = infllm_pass.sparsify(torch.compile(all_terms, backend="aot_eager"), config)
        out, expected = model(*inputs), all_terms(*inputs)
        (row,) = infllm_pass.report(model).sites
        assert (row.decision, row.target) == ("switchable", "block-sparse")
        assert relative_error(out, expected) < 1e-10
        for actual, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert relative_error(actual, wanted) < 1e-9
