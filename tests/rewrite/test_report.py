"""The report: every site, its place, its reason; as a table, as data; and true with warm caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from tests.support.common import SMALL, llama, tokens


class Block(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, x):
        q = x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, q, is_causal=self.causal)  # the call
        return out.transpose(1, 2).reshape(x.shape)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(True), Block(True), Block(False)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model():
    compiled = infllm_pass.sparsify(torch.compile(Model(), backend="eager"), SMALL)
    compiled(torch.randn(1, 100, 16))
    return compiled


def test_rows_say_where_and_why(model):
    report = infllm_pass.report(model)
    rows = report.sites
    assert [row.module for row in rows] == ["blocks.0", "blocks.1", "blocks.2"]
    call = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "# the call" in line)
    assert all(row.source == f"{__file__}:{call}" for row in rows)
    assert [row.decision for row in rows] == ["switchable", "switchable", "dense"]
    assert rows[2].reason == "BIDIRECTIONAL"
    assert "pass is_causal=True or a causal mask" in rows[2].explanation
    assert rows[0].query_shape == (1, 2, 100, 8)
    assert (rows[0].group, rows[0].dtype, rows[0].device) == (1, "float32", "cpu")
    assert (rows[0].branch, rows[0].guard, rows[0].guard_dynamic) == ("sparse", "100 >= 64", False)
    assert report.switchable == 2


def test_tables_and_data_agree(model):
    report = infllm_pass.report(model)
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert [site["module"] for site in data["graphs"][0]["sites"]] == ["blocks.0", "blocks.1", "blocks.2"]
    text = str(report)
    assert "1 graph(s), 3 attention site(s), 2 switchable" in text
    assert "BIDIRECTIONAL" in text
    assert "100 >= 64" in text


def test_a_report_before_the_first_call_says_so():
    compiled = infllm_pass.sparsify(torch.compile(Model(), backend="eager"), SMALL)
    assert "no graph compiled yet" in str(infllm_pass.report(compiled))


def test_dynamic_lengths_show_their_guard(model):
    model(torch.randn(1, 120, 16))
    site = infllm_pass.report(model).sites[-3]
    assert site.guard_dynamic
    assert site.guard == f"{site.query_shape[2]} >= 64"
    assert isinstance(site.query_shape[2], str)


def test_explain_runs_nothing_compiled():
    report = infllm_pass.explain(Model(), torch.randn(1, 100, 16), config=SMALL)
    assert [row.decision for row in report.sites] == ["switchable", "switchable", "dense"]


def test_explain_uses_the_configuration_of_a_sparsified_model(model):
    before = infllm_pass.report(model)
    report = infllm_pass.explain(model, torch.randn(1, 40, 16))
    assert report.sites[0].guard.endswith(" < 64")
    assert infllm_pass.report(model).to_dict() == before.to_dict()


def test_a_padding_mask_outside_a_checkpointed_region_is_proved():
    plain = llama(use_cache=False).float().train()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    mask = torch.ones(1, 80, dtype=torch.long)
    mask[:, :5] = 0
    report = infllm_pass.explain(plain, tokens(80), attention_mask=mask, config=SMALL)
    assert {(site.reason, site.mask) for site in report.sites} == {("SWITCHABLE", "causal, padded keys")}


@torch.no_grad()
def test_warm_compile_caches_still_report_the_truth(tmp_path, monkeypatch):
    """Inductor's caches sit behind the pass: a second process-like run hits them and reports the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(1, 100, 16)
    reports, outputs = [], []
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch._inductor.config.patch(fx_graph_cache=True):
            model = infllm_pass.sparsify(torch.compile(Model()), SMALL)
            outputs.append(model(x))
        reports.append(infllm_pass.report(model).to_dict())
    hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    hits += torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    assert hits > 0, "the second run did not use the cache"
    assert [graph.pop("seconds").keys() for report in reports for graph in report["graphs"]]  # differ from run to run
    assert reports[0] == reports[1]
    assert torch.equal(outputs[0], outputs[1])


class Capped(nn.Module):
    """Attention whose cap is an attribute, which Dynamo traces as a symbolic number."""

    def __init__(self, cap):
        super().__init__()
        self.cap = cap

    def forward(self, x):
        scores = torch.tanh(x @ x.mT / self.cap) * self.cap
        hidden = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ x


def test_a_graph_that_dynamo_traces_again_for_a_number_is_reported_once():
    torch._dynamo.reset()
    model = infllm_pass.sparsify(torch.compile(Capped(5.5), backend="aot_eager", dynamic=True), SMALL)
    model(torch.randn(1, 2, 100, 8))
    (row,) = infllm_pass.report(model).sites
    assert row.mask == "causal, scores capped at 5.5"
