"""What a run of the pass leaves beside its report: log lines, structured trace, counters, times."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.compat.logging import counter, is_tracing
from infllm_pass.rewrite.rewriter import Rewriter
from infllm_pass.stages import Stage, StageTimes, each_in, stage
from tests.support.common import SMALL

PASS_STAGES = {"decompose", "find sites", "prove masks", "plan", "rewrite"}


def three_sites(q, k, v):
    """One with a flag, one with a mask, one that is not causal."""
    i = torch.arange(q.shape[2])
    x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = F.scaled_dot_product_attention(x, k, v, attn_mask=(i[None, :] <= i[:, None]) & (i[None, :] >= 3))
    return F.scaled_dot_product_attention(x, k, v)


def qkv(length=100):
    return tuple(torch.randn(1, 2, length, 8) for _ in range(3))


def sparsified(backend="eager", function=three_sites):
    torch.compiler.reset()
    return infllm_pass.sparsify(torch.compile(function, backend=backend), SMALL)


@pytest.fixture
def counts():
    counter("infllm").clear()
    return counter("infllm")


def test_counters_of_a_sparse_graph(counts):
    sparsified()(*qkv())
    assert counts is torch._dynamo.utils.counters["infllm"]
    assert +counts == {
        "graphs": 1,
        "sites": 3,
        "switchable": 2,
        "sparse_branches": 2,
        "dense_bidirectional": 1,
        "masks_elided": 1,
    }


def test_counters_add_up_over_graphs(counts):
    model = sparsified()
    for length in (100, 30, 20):
        model(*qkv(length))
    assert counts["graphs"] >= 2
    assert counts["sites"] == 3 * counts["graphs"]
    assert counts["dense_branches"] + counts["sparse_branches"] == counts["switchable"] == 2 * counts["graphs"]
    assert counts["sparse_branches"] == 2


@pytest.mark.filterwarnings("ignore::infllm_pass.errors.InternalErrorWarning")
def test_failures_are_counted(counts, monkeypatch):
    def rewrite(self, plan, branch):
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(Rewriter, "rewrite", rewrite)
    sparsified()(*qkv())
    assert counts["internal_failures"] == counts["dense_internal"] == 3
    assert counts["switchable"] == counts["masks_elided"] == 0


def test_times_are_in_the_report_and_in_those_of_pytorch():
    def slow(module, inputs):
        time.sleep(0.05)
        return module.forward

    torch._dynamo.utils.compilation_time_metrics.pop("infllm_pass", None)
    model = sparsified(slow)
    model(*qkv())
    (graph,) = infllm_pass.report(model).to_dict()["graphs"]
    assert set(graph) == {"graph", "branches", "sites", "seconds"}
    assert set(graph["seconds"]) == {*PASS_STAGES, "compile behind"}
    assert graph["seconds"]["compile behind"] >= 0.05
    (whole,) = torch._dynamo.utils.compilation_time_metrics["infllm_pass"]
    of_pass = sum(graph["seconds"][name] for name in PASS_STAGES)
    assert 0 < of_pass <= whole
    assert of_pass > 0.5 * whole
    assert "infllm_pass" in torch._dynamo.utils.compile_times()


def test_a_compiler_that_fails_leaves_its_time():
    def broken(module, inputs):
        raise ValueError("no compiler")

    model = sparsified(broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        model(*qkv())
    (graph,) = infllm_pass.report(model).graphs
    assert "compile behind" in graph.seconds


def test_time_in_a_stage_inside_another_counts_once():
    times = StageTimes()

    def items():
        for item in range(2):
            time.sleep(0.02)
            yield item

    begin = time.perf_counter()
    with stage(Stage.FIND):
        pass  # of no run
    with times.collecting():
        for _ in each_in(Stage.FIND, items()):
            with stage(Stage.PLAN):
                time.sleep(0.01)
                with stage(Stage.PROVE):
                    time.sleep(0.03)
                time.sleep(0.01)
    spent = time.perf_counter() - begin
    assert list(times.seconds) == ["find sites", "plan", "prove masks"]
    assert sum(times.seconds.values()) <= spent
    assert times.seconds["find sites"] >= 0.04
    assert times.seconds["plan"] >= 0.04
    assert times.seconds["prove masks"] >= 0.06
    assert sum(times.seconds.values()) > 0.9 * spent


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "infllm_pass"]


def test_debug_log_is_the_graphs_the_proof_and_the_times_in_order(caplog):
    with caplog.at_level(logging.DEBUG, logger="infllm_pass"):
        sparsified()(*qkv())
    lines = messages(caplog)
    begins = (
        "graph 0 before the pass:",
        "site at node ",
        "proof: node i is i0",
        "proof: mask of and_ lets through (i3 >= 3) & (i3 <= i2)",
        "proof: part i3 <= i2: limit towards later keys",
        "proof: part i3 >= 3: test of the key",
        "proof: proved causal, padded keys",
        "graph 0 after the pass:",
        "graph 0, site 0",
        "graph 0: decompose",
    )
    places = [next((at for at, line in enumerate(lines) if line.startswith(begin)), begin) for begin in begins]
    assert all(isinstance(place, int) for place in places), (places, lines)
    assert sorted(places) == places
    before, after = (lines[places[begins.index(f"graph 0 {when} the pass:")]] for when in ("before", "after"))
    assert before.count("scaled_dot_product_attention(") >= 3
    assert "torch.ops.infllm.select_blocks" in after
    assert "torch.ops.infllm" not in before
    assert all(f"{name} 0." in lines[-1] for name in (*PASS_STAGES, "compile behind"))


def test_an_unproven_mask_says_which_part_and_why(caplog):
    def data(q, k, v, seen):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    with caplog.at_level(logging.DEBUG, logger="infllm_pass"):
        sparsified(function=data)(*qkv(), torch.ones(100, 100, dtype=torch.bool))
    lines = messages(caplog)
    assert any("l_seen_" in line and "it is an input of the graph, so it is data" in line for line in lines)
    assert any(line.startswith("proof: part ") and ": refused, " in line for line in lines)
    assert any(line.startswith("proof: unproven at node l_seen_") for line in lines)


def test_info_is_one_line_a_site(caplog):
    with caplog.at_level(logging.INFO, logger="infllm_pass"):
        sparsified()(*qkv())
    lines = messages(caplog)
    assert len(lines) == 3
    assert all(line.startswith(f"graph 0, site {site} ") for site, line in enumerate(lines))


def test_nothing_is_rendered_for_nobody(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("rendered")

    sparsified()(*qkv())  # PyTorch knows after its first record that nobody reads the trace
    assert not is_tracing()
    monkeypatch.setattr("infllm_pass.rewrite.trace.as_code", refuse)
    monkeypatch.setattr("infllm_pass.masks.steps.plain_names", refuse)
    model = sparsified()
    model(*qkv())
    assert infllm_pass.report(model).switchable == 2


PROGRAM = """
import torch
import torch.nn.functional as F
import infllm_pass

def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

config = {"dense_len": 64, "window_size": 64, "topk": 3}
model = infllm_pass.sparsify(torch.compile(attend, backend="eager"), config)
model(*(torch.randn(1, 2, 100, 8) for _ in range(3)))
"""


def run_program(tmp_path, program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torch_logs_and_torch_trace(tmp_path):
    """The variables as a user sets them: they are read when torch is imported, before this package."""
    told = run_program(tmp_path, PROGRAM, TORCH_LOGS="+infllm_pass", TORCH_TRACE=str(tmp_path / "trace"))
    assert told.count("graph 0 before the pass:") == told.count("graph 0 after the pass:") == 1
    assert told.count("graph 0, site 0 ") == 1
    assert "compile behind" in told
    (log,) = (tmp_path / "trace").iterdir()
    artifacts = artifacts_of(log.read_text())
    assert "scaled_dot_product_attention(" in artifacts["infllm_pass_before"]
    assert "torch.ops.infllm" in artifacts["infllm_pass_after"]
    report = json.loads(artifacts["infllm_pass"])
    assert [site["decision"] for site in report["sites"]] == ["switchable"]
    assert set(report["seconds"]) == {"decompose", "find sites", "plan", "rewrite", "compile behind"}
    assert '"name": "infllm_pass"' in artifacts["chromium_event"]


def artifacts_of(text):
    """The payloads of the package's artifacts, and the events of PyTorch's timeline."""
    found = {"chromium_event": ""}
    name = None
    for line in text.splitlines():
        if not line.startswith("\t"):
            head = json.loads(line[line.index("{") :])
            name = head.get("artifact", {}).get("name", "chromium_event" if "chromium_event" in head else None)
            found.setdefault(name, "")
        else:
            found[name] += line[1:] + "\n"
    return found


def test_set_logs_knows_the_name(tmp_path):
    program = PROGRAM.replace(
        "config =", 'import logging\ntorch._logging.set_logs(modules={"infllm": logging.DEBUG})\nconfig ='
    )
    told = run_program(tmp_path, program)
    assert "graph 0 before the pass:" in told
