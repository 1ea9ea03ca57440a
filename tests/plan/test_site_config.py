"""A configuration for each site: numbers, the report, exports, and functions that fail."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ConfigError
from infllm_pass.rewrite.pipeline import SitePolicy, run_pass
from tests.support import cache_support
from tests.support.cache_support import CachedAttention, caches
from tests.support.common import SMALL, capture, relative_error

WIDER = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 5})
LATER = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 120})


def qkv(length=100):
    return tuple(torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))


def two_sites(q, k, v):
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    return F.scaled_dot_product_attention(first, k, v, is_causal=True)


class Sites(nn.Module):
    def forward(self, q, k, v):
        return two_sites(q, k, v)


def expected(q, k, v, first, second):
    """Both sites with configurations of their own; None: dense."""

    def attend(q, k, v, config, scale):
        if config is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return infllm_pass.switchable_attention(q, k, v, config, scale=scale)

    return attend(attend(q, k, v, first, 0.5), k, v, second, None)


def by_scale(first, second):
    return lambda site: first if site.scale == 0.5 else second


def first_alone(site):
    """As a function of a module, which can be pickled."""
    return {} if site.scale == 0.5 else None


def sparsified(function=two_sites, config=SMALL, **arguments):
    torch._dynamo.reset()
    return infllm_pass.sparsify(torch.compile(function, backend="aot_eager"), config, **arguments)


@pytest.mark.parametrize("length", [50, 100, 130])
def test_each_site_has_its_own_budget_and_its_own_length(length):
    """At 50 keys both are dense, at 100 one of them is, at 130 none."""
    q, k, v = qkv(length)
    for answer, config in [(WIDER, WIDER), ({"topk": 5}, WIDER), (LATER, LATER), ({"dense_len": 120}, LATER)]:
        model = sparsified(site_config=by_scale(answer, {}))
        assert relative_error(model(q, k, v), expected(q, k, v, config, SMALL)) < 1e-12
        rows = infllm_pass.report(model).sites
        assert [row.branch for row in rows] == [
            "sparse" if length >= each.dense_len else "dense" for each in (config, SMALL)
        ]
    assert relative_error(expected(q, k, v, WIDER, SMALL), expected(q, k, v, SMALL, SMALL)) > 1e-3 or length == 50


def test_each_site_guards_on_its_own_length():
    """One dynamic graph for every side that a site changes at: below 64, up to 119, and beyond."""
    model = sparsified(site_config=by_scale(LATER, SMALL))
    for length in (30, 50, 70, 100, 130, 150):
        q, k, v = qkv(length)
        assert relative_error(model(q, k, v), expected(q, k, v, LATER, SMALL)) < 1e-12
    found = {
        tuple(row.guard.split()[1:] for row in graph.sites).__repr__() for graph in infllm_pass.report(model).graphs
    }
    assert len(found) == 3


def test_the_report_shows_what_differs_and_only_then():
    q, k, v = qkv()
    model = sparsified(site_config=by_scale({"topk": 5, "dense_len": 70}, SMALL))
    model(q, k, v)
    rows = infllm_pass.report(model).to_dict()["graphs"][0]["sites"]
    assert [row["config"] for row in rows] == [{"topk": 5, "dense_len": 70}, {}]
    heading = re.compile(r"^config\s|[┃ ] config\s", re.MULTILINE)  # of a block, or of a column
    table = str(infllm_pass.report(model))
    assert heading.search(table)
    assert "topk=5" in table
    plain = sparsified()
    plain(q, k, v)
    assert not heading.search(str(infllm_pass.report(plain)))
    assert infllm_pass.report(plain).to_dict()["graphs"][0]["sites"][0]["config"] == {}


def test_none_leaves_a_site_dense():
    q, k, v = qkv()
    model = sparsified(site_config=by_scale(None, SMALL))
    assert relative_error(model(q, k, v), expected(q, k, v, None, SMALL)) < 1e-12
    assert [row.reason for row in infllm_pass.report(model).sites] == ["EXCLUDED", "SWITCHABLE"]


def test_a_filter_is_asked_before():
    asked = []

    def site_config(site):
        asked.append(site.scale)
        return WIDER

    q, k, v = qkv()
    model = sparsified(filter_fn=lambda site: site.scale == 0.5, site_config=site_config)
    assert relative_error(model(q, k, v), expected(q, k, v, WIDER, None)) < 1e-12
    assert asked == [0.5]


def test_a_window_is_compared_with_the_budget_of_its_site():
    """40 keys are visited with the default budget, 56 with the wider one."""

    def attend(q, k, v):
        index = torch.arange(k.shape[2])
        seen = (index <= index[:, None]) & (index > index[:, None] - 50)
        return F.scaled_dot_product_attention(q, k, v, seen)

    def reasons(answer):
        return [row.reason for row in run_pass(capture(attend, *qkv()), SitePolicy(SMALL, lambda site: answer)).sites]

    assert reasons({}) == ["SWITCHABLE"]
    assert reasons({"topk": 5}) == ["WINDOW_WITHIN_BUDGET"]


class OwnError(Exception):
    pass


def fails(_site):
    raise OwnError("the user's own")


@pytest.mark.parametrize(
    ("site_config", "error", "message"),
    [
        (fails, OwnError, "the user's own"),
        (
            lambda site: 3,
            ConfigError,
            "site_config=3 is not valid: expected a function that returns a Sparse",
        ),
        (lambda site: {"topkk": 3}, ConfigError, "did you mean 'topk'"),
        (lambda site: {"topk": 0}, ConfigError, "topk=0"),
    ],
)
@pytest.mark.parametrize("way", ["sparsify", "explain", "export"])
def test_what_the_function_does_wrong_is_raised_as_it_is(site_config, error, message, way):
    ways = {
        "sparsify": lambda: sparsified(site_config=site_config)(*qkv()),
        "explain": lambda: infllm_pass.explain(two_sites, *qkv(), config=SMALL, site_config=site_config),
        "export": lambda: infllm_pass.export(Sites(), qkv(), config=SMALL, site_config=site_config),
    }
    with pytest.raises(error, match=message):
        ways[way]()


@pytest.mark.parametrize("way", [infllm_pass.sparsify, infllm_pass.explain])
def test_something_else_than_a_function_is_refused_at_once(way):
    with pytest.raises(ConfigError, match="site_config="):
        way(Sites(), site_config={"topk": 5})


def test_explain_uses_the_models_own_function():
    q, k, v = qkv()
    model = sparsified(site_config=by_scale(WIDER, None))
    report = infllm_pass.explain(model, q, k, v)
    assert [(row.reason, row.config) for row in report.sites] == [("SWITCHABLE", {"topk": 5}), ("EXCLUDED", {})]
    report = infllm_pass.explain(model, q, k, v, site_config=lambda site: {})
    assert [row.reason for row in report.sites] == ["SWITCHABLE", "SWITCHABLE"]


def test_the_named_backend_takes_it_as_an_option():
    torch._dynamo.reset()
    q, k, v = qkv()
    options = {**SMALL.to_dict(), "site_config": by_scale(WIDER, None), "backend": "aot_eager"}
    model = torch.compile(two_sites, backend="infllm", options=options)
    assert relative_error(model(q, k, v), expected(q, k, v, WIDER, None)) < 1e-12
    torch._dynamo.reset()
    broken = torch.compile(two_sites, backend="infllm", options={**options, "site_config": fails})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="OwnError: the user's own"):
        broken(q, k, v)


def test_copies_and_pickles_keep_it():
    q, k, v = qkv()
    model = sparsified(Sites(), site_config=first_alone, filter_fn=is_site)
    copied = pickle.loads(pickle.dumps(model))
    assert relative_error(copied(q, k, v), expected(q, k, v, SMALL, None)) < 1e-12


def is_site(site):
    return isinstance(site, infllm_pass.AttentionSite)


def test_an_exported_program_holds_both_configurations():
    length = torch.export.Dim("length", min=20, max=512)
    shapes = {name: {2: length} for name in "qkv"}
    settings = {"dynamic_shapes": shapes, "config": SMALL, "site_config": by_scale(LATER, {"topk": 5})}
    program = infllm_pass.export(Sites(), qkv(), **settings)
    for size in (50, 100, 130):
        q, k, v = qkv(size)
        assert relative_error(program.module()(q, k, v), expected(q, k, v, LATER, WIDER)) < 1e-12


def test_an_onnx_file_holds_both_configurations(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "sites.onnx"
    inputs = tuple(x.float() for x in qkv())
    report = infllm_pass.export_onnx(
        Sites(), path, inputs, config=SMALL, site_config=by_scale({"topk": 5}, {}), input_names=["q", "k", "v"]
    )
    assert [row.config for row in report.sites] == [{"topk": 5}, {}]
    kind = [node for node in onnx.load(path).graph.node if node.op_type == "InfLLMV2Attention"]
    assert len(kind) == 2
    session = runtime.InferenceSession(path)
    out = session.run(None, {name: x.numpy() for name, x in zip("qkv", inputs, strict=True)})[0]
    assert relative_error(torch.from_numpy(out), expected(*(x.double() for x in inputs), WIDER, SMALL)) < 1e-5


@torch.no_grad()
def test_two_budgets_over_one_cache_keep_states_of_their_own():
    """Two sites read one cache with compressed keys of other windows each."""

    class Twice(CachedAttention):
        def forward(self, x, keys, values, position):
            places = torch.arange(x.shape[1]) + position
            q, k, v = (self.heads(project, x) for project in (self.q, self.k, self.v))
            keys.index_copy_(2, places, k)
            values.index_copy_(2, places, v)
            mask = torch.arange(keys.shape[2]) <= places[:, None]
            k, v = (tensor.repeat_interleave(3, dim=1) for tensor in (keys, values))
            attend = F.scaled_dot_product_attention
            return attend(q, k, v, mask), attend(q, k, v, mask, scale=cache_support.DIM**-0.5)

    config = cache_support.CONFIG
    finer = SparseAttentionConfig.from_dict({**config.to_dict(), "kernel_size": 4, "kernel_stride": 2})
    module = Twice()
    model = sparsified(module, config, site_config=lambda site: config if site.scale is None else finer)
    keys, values = caches(1, 96)
    position = 0
    for count in (60, 1, 1, 1, 8):
        x = cache_support.tokens(1, count)
        found = model(x, keys, values, torch.tensor(position))
        for out, used in zip(found, (config, finer), strict=True):
            assert relative_error(out, cache_support.expected(module, x, keys, values, position, None, used)) < 1e-12
        position += count
    assert len(model._infllm_handle.store) == 2
