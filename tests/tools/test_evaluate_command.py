"""The command ``infllm-pass evaluate``: folders, options, what it writes, and what it refuses."""

import csv
import io
import json
import re

import pytest
import torch

import infllm_pass
from infllm_pass.errors import CheckpointError
from infllm_pass.evaluation import TaskSettings, default_config
from infllm_pass.tools import evaluate_command
from infllm_pass.tools.checkpoint import load_folder, load_folder_tokenizer
from infllm_pass.tools.cli import main
from infllm_pass.tools.demo import hidden_numbers
from tests.support.tokenizers import byte_llama, byte_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

BLOCKS = ("--scorer", "pooled", "--kernel-size", 4, "--kernel-stride", 2, "--block-size", 8, "--window-size", 16)


@pytest.fixture
def run(capfd):
    """Runs the command in this process: exit code, standard output, standard error."""

    def run_command(*arguments):
        code = main([str(argument) for argument in ("evaluate", *arguments)])
        return (code, *capfd.readouterr())

    return run_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with weights and a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    byte_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("".join(f"Line {number} of a text says {number * 7919 % 997}.\n" for number in range(200)))
    return file


def test_a_folder_is_evaluated_with_every_combination(run, folder, text, tmp_path):
    out = tmp_path / "made" / "here"
    tasks = ("--tasks", "perplexity", "needle_single", "--lengths", 512, 600, "--depths", 0.5)
    code, printed, err = run(
        folder, "--text", text, *tasks, *BLOCKS, "--topk", 3, 70, "--lse", "coarse", "exact", "--out", out
    )
    assert code == 0, err
    for word in ("words", "needle_single", "pooled topk=3 lse=exact", "written:"):
        assert word in printed
    data = json.loads((out / "evaluation.json").read_text())
    assert len(data["sides"]) == 5
    assert data["settings"]["lengths"] == [512, 600]
    assert {row["tokens"] for row in data["perplexity"]} == {512, 600}
    assert {side["config"]["block_size"] for side in data["sides"][1:]} == {8}
    assert {row["side"] for row in data["locality"]} == {side["side"] for side in data["sides"][1:]}
    for picture in ("locality.png", "needles.png", "perplexity.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation.json",
        "locality.png",
        "needles.png",
        "perplexity.png",
    ]


@pytest.mark.parametrize("form", ["json", "csv"])
def test_for_programs_it_prints_nothing_but_figures(run, folder, text, tmp_path, form):
    options = ("--text", text, "--tasks", "needle_multiquery", "--lengths", 1600, *BLOCKS, "--topk", 3)
    code, out, err = run(folder, *options, "--out", tmp_path, f"--{form}")
    assert code == 0, err
    assert "written:" in err
    if form == "json":
        data = json.loads(out)
        assert data["path"] == str(folder)
        assert [row["side"] for row in data["tasks"]] == ["dense", "pooled"]
        assert data == json.loads((tmp_path / "evaluation.json").read_text())
    else:
        rows = list(csv.DictReader(io.StringIO(out)))
        assert rows[0]["measure"] == "needle_multiquery exact"
        assert {row["side"] for row in rows} == {"dense", "pooled"}


def test_without_options_the_longest_prompt_decides(run, folder, tmp_path, monkeypatch):
    asked = {}

    def evaluate(model, tokenizer, configs, **options):
        asked.update(options, configs=configs, dtype=model.dtype)
        return infllm_pass.Evaluation({})

    monkeypatch.setattr(evaluate_command, "evaluate", evaluate)
    assert run(folder, "--full", "--samples", 2, "--out", tmp_path, "--device", "cpu")[0] == 0
    assert asked["settings"] == TaskSettings(lengths=(2048, 4096), depths=(0.0, 0.25, 0.5, 0.75, 1.0), samples=2)
    assert asked["configs"] == [default_config(4096)]
    assert asked["dtype"] == torch.float32
    assert run(folder, "--out", tmp_path, "--scorer", "tokens", "pooled", "--topk", 9)[0] == 0
    assert [(config.scorer, config.topk) for config in asked["configs"]] == [("tokens", 9), ("pooled", 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "needle"), "tasks='needle' is not valid: expected one of perplexity"),
        (("--text", "/no/such/file"), "/no/such/file cannot be read"),
        (("--lengths", 8192), "has 4096 positions: ask for at most 4096"),
        (("--digits", 900, "--lengths", 512, "--tasks", "needle_single"), "needle_single needs"),
        (("--depths", 2), "depths=2.0"),
        (("--topk", 3, 3), "configurations that differ"),
        (("--scorer", "fast"), "invalid choice: 'fast'"),
        (("--score-dims", 64, "--scorer", "tokens"), "score_dims=64"),
        (("--out", __file__), "a folder"),
        (("--tokenizer", "/no/such/folder"), "/no/such/folder is no folder"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_answered_in_one_line(run, folder, arguments, message):
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_an_empty_text_is_refused(run, folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    code, _, err = run(folder, "--text", tmp_path / "empty.txt")
    assert code == 2
    assert "the text 'empty' is empty" in err


@pytest.mark.parametrize("model", ["/no/such/folder", "SmolLM2"])
def test_what_is_no_folder_is_refused(run, model):
    code, _, err = run(model)
    assert code == 2
    assert f"{model} is no folder: name a Hugging Face model folder, or SmolLM2-135M-Instruct" in err


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    byte_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*--tokenizer"):
        load_folder_tokenizer(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    byte_llama().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no causal language model"):
        load_folder(tmp_path)


def test_a_folder_keeps_its_weights(folder):
    model = load_folder(folder, torch.float64)
    assert torch.equal(model.lm_head.weight, byte_llama().double().lm_head.weight)
    assert load_folder_tokenizer(folder)("abc").input_ids == byte_tokenizer()("abc").input_ids


@pytest.mark.checkpoint
def test_the_public_checkpoint_finds_numbers_dense_and_with_a_budget_that_covers(whole_smollm2, smollm2_tokenizer):
    settings = TaskSettings(lengths=(448,), tasks=("needle_single",), depths=(0.2, 0.7))
    config = {"window_size": 64, "topk": 8, "dense_len": 0}
    found = infllm_pass.evaluate(whole_smollm2, smollm2_tokenizer, config, settings=settings, prefix=())
    dense, sparse = found.tasks
    assert (dense.exact, sparse.exact) == (1.0, 1.0)
    assert dense.nll < 0.2
    assert sparse.nll == pytest.approx(dense.nll, abs=1e-4)


@pytest.mark.checkpoint
@pytest.mark.parametrize(("tokens", "asked"), [(256, 2), (1024, 8)])
def test_the_demo_hides_as_many_numbers_as_there_is_room_for(tokens, asked, smollm2_tokenizer):
    sample = hidden_numbers(smollm2_tokenizer, tokens)
    assert (len(sample.ids), len(sample.answers)) == (tokens, asked)
    hidden = re.findall(r"One of the secret codes is \w+-(\d{7})\.", smollm2_tokenizer.decode(sample.prompt))
    assert sorted(hidden) == sorted(answer.text for answer in sample.answers)
