"""The adaptation benchmark's own logic: what it asks for, and what it says of finished runs."""

import importlib
import json

import pytest

from tests.support import ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("adaptation")


def finished(folder, scorer, perplexity, right):
    """The files of a run whose sparse side is 2 % worse than its dense side and finds half of its answers."""
    sides = ["dense", *(["tokens", "pooled"] if scorer == "dense" else [scorer])]
    texts = [
        {"text": text, "side": side, "density": 0.2, "perplexity": perplexity * (1 if side == "dense" else 1.02)}
        for side in sides
        for text in ("manual", "all")
    ]
    tasks = [
        {"task": task, "side": side, "answers": 8, "exact": right if side == "dense" else right / 2, "nll": 1.0}
        for side in sides
        for task in ("needle_single", "variable_tracking", "chained_lookups")
    ]
    run = {
        "documents": 1,
        "text_tokens": 9,
        "trained_tokens": 20,
        "parameters": 3,
        "config": {"tokens_per_step": 10},
        "versions": {"torch": "2"},
        "evaluations": {step: {"perplexity": texts} for step in ("0", "2")},
    }
    found = {"device": "NVIDIA X", "dtype": "bfloat16", "texts": ["manual"], "settings": {}, "versions": {"torch": "2"}}
    found |= {"perplexity": texts, "tasks": tasks}
    (folder / scorer / "tasks").mkdir(parents=True)
    (folder / scorer / "adaptation.json").write_text(json.dumps(run))
    (folder / scorer / "tasks" / "evaluation.json").write_text(json.dumps(found))


def test_runs_are_compared_with_the_dense_control(script, tmp_path):
    finished(tmp_path, "dense", 10.0, 0.5)
    finished(tmp_path, "tokens", 10.1, 0.75)
    header, rows = script.summarise(tmp_path, ["dense", "tokens"])
    runs = {row["case"]: row for row in rows if row["kind"] == "run"}
    assert list(runs) == ["dense dense", "dense tokens", "dense pooled", "tokens dense", "tokens tokens"]
    assert runs["tokens tokens"]["change"] == pytest.approx(1.01 * 1.02 - 1)
    assert runs["tokens dense"]["score_share"] == pytest.approx(1.5)
    assert runs["dense tokens"]["multi_step_share"] == pytest.approx(0.5)
    assert runs["tokens tokens"]["tasks"]["needle_single"] == {"right": 3, "answers": 8, "nll": 1.0}
    curve = [row for row in rows if row["kind"] == "curve" and row["side"] == "dense" and row["scorer"] == "tokens"]
    assert [(row["trained_tokens"], row["perplexity"]) for row in curve] == [(0, 10.1), (20, 10.1)]
    assert header["device"] == "NVIDIA X"


def test_the_picture_shows_every_run(script, tmp_path):
    pytest.importorskip("matplotlib")
    for scorer in script.SCORERS:
        finished(tmp_path, scorer, 10.0, 0.5)
    header, rows = script.summarise(tmp_path, list(script.SCORERS))
    figure = importlib.import_module("_plot_gpu").draw_adaptation({"header": header, "rows": rows})
    for axes in figure.axes:
        assert len(axes.get_legend_handles_labels()[1]) == 5


def test_only_what_is_missing_is_run(script, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(script, "_infllm_pass", lambda *command: commands.append(command))
    finished(tmp_path, "dense", 10.0, 0.5)
    (tmp_path / "dense" / "tasks" / "evaluation.json").unlink()
    arguments, others = script.parser().parse_known_args(
        ["model", "texts", "--held-out", "a.txt", "--runs", str(tmp_path), "--steps", "7"]
    )
    script.run(arguments, "dense", others)
    script.run(arguments, "pooled", others)
    assert [command[0] for command in commands] == ["evaluate", "adapt", "evaluate"]
    assert commands[1][-2:] == ("--steps", "7")
    assert "--scorer tokens pooled" in " ".join(commands[0])
    assert "--window-size 512 --topk 18" in " ".join(commands[2])
