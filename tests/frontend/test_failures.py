"""Failures of the pass and of a user's filter: who hears of them, as what, and what ``strict`` refuses."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass.errors import (
    ConfigError,
    DenseSiteError,
    InternalError,
    InternalErrorWarning,
    NoAttentionSiteError,
)
from infllm_pass.rewrite.targets import BlockSparse
from tests.support.common import SMALL, llama, tokens


def two_sites(q, k, v):
    """The second has twice the scale."""
    x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(x, k, v, is_causal=True, scale=0.7)


def qkv(length=100):
    return tuple(torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))


def sparsified(function=two_sites, **arguments):
    return infllm_pass.sparsify(torch.compile(function, backend="eager"), SMALL, **arguments)


def _raise(error):
    raise error


@pytest.fixture
def failing_site(monkeypatch):
    """The pass fails at the sites with scale 0.7; what it raised."""
    raised, emitted = [], BlockSparse.emit

    def emit(self, request, builder):
        if request.scale != 0.7:
            return emitted(self, request, builder)
        raised.append(ZeroDivisionError("injected"))
        return _raise(raised[-1])

    monkeypatch.setattr(BlockSparse, "emit", emit)
    return raised


def internal_warnings(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if each.category is InternalErrorWarning]


@pytest.mark.usefixtures("failing_site")
def test_a_failure_beside_a_switchable_site_is_warned_about_once():
    """With its traceback, for the graphs of all lengths."""
    model = sparsified()
    (text,) = internal_warnings(lambda: [model(*qkv(100)), model(*qkv(120)), model(*qkv(30))])
    assert "please report" in text
    assert "stays as it was" in text
    assert "Traceback (most recent call last)" in text
    assert "in _raise" in text
    assert "ZeroDivisionError: injected" in text


@pytest.mark.usefixtures("failing_site")
def test_equal_failures_of_layers_are_one_warning():
    def layers(q, k, v):
        return two_sites(two_sites(q, k, v), k, v)

    (text,) = internal_warnings(lambda: sparsified(layers)(*qkv()))
    assert "site 1" in text
    assert "site 3" in text


@pytest.mark.usefixtures("failing_site")
def test_the_report_keeps_the_traceback_as_data():
    model = sparsified()
    internal_warnings(lambda: model(*qkv()))
    report = infllm_pass.report(model)
    good, failed = report.sites
    assert (good.decision, good.traceback) == ("switchable", "")
    assert (failed.decision, failed.reason) == ("dense", "INTERNAL")
    assert failed.traceback.startswith("Traceback (most recent call last)")
    assert failed.traceback.endswith("ZeroDivisionError: injected\n")
    data = json.loads(report.to_json())
    assert [site["traceback"] for site in data["graphs"][0]["sites"]] == ["", failed.traceback]
    assert "Traceback" not in str(report)


@pytest.mark.usefixtures("failing_site")
def test_a_failure_of_a_site_that_is_not_read_has_a_traceback(monkeypatch):
    monkeypatch.setattr("infllm_pass.sites.fused._shapes", lambda *_: _raise(KeyError("injected")))
    model = sparsified(lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True))
    (text,) = internal_warnings(lambda: model(*qkv()))
    assert "KeyError: 'injected'" in text
    assert "KeyError: 'injected'" in infllm_pass.report(model).sites[0].traceback


@pytest.mark.parametrize("strict", [True, "all"])
def test_strict_raises_on_a_failure_beside_a_switchable_site(strict, failing_site):
    model = sparsified(strict=strict)
    for _ in range(2):
        with pytest.raises(InternalError, match=r"graph \d, site 1.*ZeroDivisionError: injected") as caught:
            model(*qkv())
        assert caught.value.__cause__ is failing_site[-1]
    assert infllm_pass.report(model).graphs == []


@pytest.mark.usefixtures("failing_site")
def test_strict_raises_also_where_dynamo_suppresses_errors():
    model = sparsified(strict=True)
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(InternalError):
        model(*qkv())


@pytest.mark.usefixtures("failing_site")
def test_explaining_warns():
    (text,) = internal_warnings(lambda: infllm_pass.explain(two_sites, *qkv(), config=SMALL))
    assert "ZeroDivisionError: injected" in text


class Sites(nn.Module):
    def forward(self, q, k, v):
        return two_sites(q, k, v)


@pytest.mark.usefixtures("failing_site")
def test_exporting_warns():
    (text,) = internal_warnings(lambda: infllm_pass.export(Sites(), qkv(), config=SMALL))
    assert "ZeroDivisionError: injected" in text


def causal_and_not(q, k, v):
    return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v)


def test_strict_about_all_sites_names_those_that_stay_dense():
    sparsified(causal_and_not, strict=True)(*qkv())
    with pytest.raises(DenseSiteError, match=r"1 attention site.*\n.*site 1 .*BIDIRECTIONAL: ") as caught:
        sparsified(causal_and_not, strict="all")(*qkv())
    assert len(caught.value.sites) == 1
    sparsified(two_sites, strict="all")(*qkv())


def test_strict_about_all_sites_leaves_out_what_the_filter_turns_down():
    """Sites that could not be proved among them."""
    model = sparsified(causal_and_not, strict="all", filter_fn=lambda site: site.is_causal is True)
    model(*qkv())
    assert [site.reason for site in infllm_pass.report(model).sites] == ["SWITCHABLE", "BIDIRECTIONAL"]
    model = sparsified(two_sites, strict="all", filter_fn=lambda site: site.scale is None)
    model(*qkv())
    assert [site.reason for site in infllm_pass.report(model).sites] == ["SWITCHABLE", "EXCLUDED"]


def test_strict_raises_at_every_call_of_a_model_without_a_switchable_site():
    model = sparsified(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), strict=True)
    for _ in range(2):
        with pytest.raises(NoAttentionSiteError):
            model(*qkv())


@pytest.mark.parametrize("strict", ["every", 1, 0, None, ["all"]])
def test_other_values_of_strict_are_refused(strict):
    with pytest.raises(ConfigError, match=r"^strict=.* is not valid: expected True, False or 'all'"):
        sparsified(strict=strict)


class Mine(Exception):
    pass


ERRORS = [Mine("mine"), RuntimeError("mine"), IndexError("mine"), TypeError("mine"), NotImplementedError("mine")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
def test_what_a_filter_raises_is_raised_as_it_is(error, fullgraph):
    """At every call that compiles, with the filter's own traceback and cause."""

    def filter_fn(site):
        raise error from KeyError("its cause")

    model = infllm_pass.sparsify(
        torch.compile(two_sites, backend="eager", fullgraph=fullgraph), SMALL, filter_fn=filter_fn
    )
    for _ in range(2):
        with pytest.raises(type(error), match=r"^mine$") as caught:
            model(*qkv())
        assert caught.value is error
        assert caught.traceback[-1].name == "filter_fn"
        assert isinstance(error.__cause__, KeyError)
    assert infllm_pass.report(model).graphs == []


@torch.no_grad()
def test_a_filter_that_fails_once_compiles_at_the_next_call():
    answers = iter([None, True, True])

    def filter_fn(site):
        return next(answers) or _raise(Mine("not yet"))

    model = sparsified(filter_fn=filter_fn)
    with pytest.raises(Mine):
        model(*qkv())
    model(*qkv())
    assert infllm_pass.report(model).switchable == 2


@torch.no_grad()
@pytest.mark.parametrize("way", ["call", "generate", "explain", "export", "export_onnx", "package"])
def test_every_way_to_a_filter_raises_its_exception(way, tmp_path):
    def filter_fn(site):
        raise Mine

    plain, ids = llama(num_hidden_layers=1), tokens(80).clamp(min=1)
    model = infllm_pass.sparsify(torch.compile(plain, backend="eager"), SMALL, filter_fn=filter_fn)
    calls = {
        "call": lambda: model(ids),
        "generate": lambda: model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0),
        "explain": lambda: infllm_pass.explain(model, ids),
        "export": lambda: infllm_pass.export(Sites(), qkv(), config=SMALL, filter_fn=filter_fn),
        "export_onnx": lambda: infllm_pass.export_onnx(Sites(), tmp_path / "a.onnx", qkv(), filter_fn=filter_fn),
        "package": lambda: infllm_pass.package(Sites(), qkv(), tmp_path / "a.pt2", filter_fn=filter_fn),
    }
    with pytest.raises(Mine):
        calls[way]()


@pytest.mark.parametrize("answer", [None, 0, 1, "yes", torch.tensor(True)])
def test_a_filter_that_returns_no_bool_is_refused(answer):
    with pytest.raises(ConfigError, match=r"filter_fn=.* a function that returns True or False"):
        sparsified(filter_fn=lambda site: answer)(*qkv())


def test_a_filter_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match="filter_fn='layers' is not valid"):
        sparsified(filter_fn="layers")


def test_a_composite_that_cannot_be_traced_says_why(monkeypatch, caplog):
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()

    def attend(x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    monkeypatch.setattr(
        "infllm_pass.graph.decompose.make_fx", lambda *_a, **_k: lambda *_: _raise(LookupError("no operator"))
    )
    model = infllm_pass.sparsify(torch.compile(attend, backend="eager"), SMALL)
    with caplog.at_level("DEBUG", logger="infllm_pass"), pytest.warns(infllm_pass.errors.NoAttentionSiteWarning):
        model(torch.randn(1, 80, 16))
    (site,) = infllm_pass.report(model).sites
    assert site.reason == "PARTIAL_MATCH"
    assert "not spelled out: LookupError: no operator" in site.explanation
    (record,) = (each for each in caplog.records if each.levelname == "DEBUG" and each.exc_info)
    assert isinstance(record.exc_info[1], LookupError)
