"""The command ``infllm-pass adapt``: what it writes and prints, resuming after a kill, and what it refuses."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from infllm_pass.tools.cli import main
from tests.support.adapting import SPARSE, small_model, write_texts

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCKS = [str(each) for name, value in SPARSE.items() for each in (f"--{name.replace('_', '-')}", value)]
ROWS = (
    "--lengths",
    "512",
    "--tokens-per-step",
    "512",
    "--task-share",
    "0",
    "--backend",
    "eager",
    "--precision",
    "float32",
)
EVALUATION = ("--evaluation-tasks", "perplexity")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, texts, and a text held out."""
    folder = tmp_path_factory.mktemp("adapt")
    model, tokenizer = small_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_texts(folder / "texts")
    (folder / "texts" / "held.txt").rename(folder / "held.txt")
    return folder


@pytest.fixture
def arguments(place, tmp_path):
    """The command's arguments for a folder."""

    def made(folder, *more):
        files = [str(place / "model"), str(place / "texts"), "--held-out", str(place / "held.txt")]
        given = [*files, "--out", str(tmp_path / folder), "--device", "cpu", "--workers", "0"]
        return ["adapt", *given, *ROWS, *EVALUATION, *BLOCKS, *more]

    return made


def losses(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_with_the_losses_of_an_unbroken_one(arguments, tmp_path):
    steps = ("--steps", "40", "--checkpoint-every", "2", "--log-every", "1", "--warmup", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "infllm_pass.tools.cli", *arguments("killed", *steps)]
    last = random.randrange(3, 12)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        file = tmp_path / "killed" / "losses.jsonl"
        while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= last):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert last <= len(losses(tmp_path / "killed")) < 40
    assert not (tmp_path / "killed" / "model").exists()
    assert main(arguments("killed", *steps, "--resume")) == 0
    assert main(arguments("unbroken", *steps)) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken"), f"killed after step {last}"
    assert [each["step"] for each in losses(tmp_path / "unbroken")] == list(range(1, 41))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("killed", "unbroken")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_it_prints_a_table_for_people_and_figures_for_programs(arguments, tmp_path, capfd, form):
    more = [] if form == "table" else [f"--{form}"]
    assert main(arguments("out", "--steps", "1", "--scorer", "pooled", "--checkpoint-every", "0", *more)) == 0
    printed, told = capfd.readouterr()
    lines = printed if form == "table" else told
    for text in ("step 1 of 1, loss by length 512: ", "tokens/s", "evaluation after 0 steps", "written: "):
        assert text in lines
    if form == "table":
        assert "after step" in printed
    elif form == "json":
        data = json.loads(printed)
        assert data["config"]["sparse"]["scorer"] == "pooled"
        assert set(data["evaluations"]) == {"0", "1"}
    else:
        rows = list(csv.DictReader(io.StringIO(printed)))
        assert [(row["step"], row["side"]) for row in rows] == [
            ("0", "dense"),
            ("0", "pooled"),
            ("1", "dense"),
            ("1", "pooled"),
        ]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--shares", "0.5", "0.5"], "a share for each of the 1 lengths"),
        (["--tokens-per-step", "700"], "a multiple of every length"),
        (["--resume"], "no run to resume"),
        (["--distill", "2"], "distill=2.0"),
        (["--extend-to", "4096"], "more than the model's 4096 positions"),
        (["--lengths", "8192", "--tokens-per-step", "8192"], "4096 positions"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, tmp_path, capfd, more, told):
    assert main(arguments("out", *more)) == 2
    err = capfd.readouterr().err
    assert told in " ".join(err.split())
    assert not (tmp_path / "out").exists()
