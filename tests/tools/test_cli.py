"""The command line: exit codes, one-line messages, and the parts of the demo that need no model."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import infllm_pass
from infllm_pass.errors import CheckpointError, ConfigError
from infllm_pass.tools import demo, demo_worker, export_command
from infllm_pass.tools.cli import main
from infllm_pass.tools.demo import DemoOptions
from infllm_pass.tools.export_command import TARGETS
from tests.support import ROOT
from tests.support.common import tiny_config

transformers = pytest.importorskip("transformers")


@pytest.fixture
def run(capfd):
    """Runs the command in this process: exit code, standard output, standard error."""

    def run_command(*arguments):
        code = main([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    return run_command


@pytest.fixture
def folder(tmp_path):
    """A model folder without weights."""
    tiny_config().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("command", [(), ("demo",), ("explain",), ("bench",)], ids=str)
def test_help_is_an_answer_not_an_error(run, command):
    code, out, err = run(*command, "--help")
    assert code == 0
    assert out.startswith("usage: infllm-pass")
    assert err == ""


def test_version(run):
    assert run("--version")[:2] == (0, f"infllm-pass {infllm_pass.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("explain",), "PATH"),
        (("explain", "/no/such/folder"), "/no/such/folder is not a Hugging Face model folder"),
        (("explain", ".", "--length", "0"), "at least 1"),
        (("explain", ".", "--topk", "many"), "expected a whole number, got 'many'"),
        (("demo", "--tokens", "-5"), "--tokens"),
        (("demo", "--tokens", "100000"), "tokens=100000 is not valid: expected 256 to 8192"),
        (("demo", "--layer", "30"), "layer=30 is not valid: expected 0 to 29"),
        (("demo", "--window-size", "100"), "window_size=100 is not valid: expected a multiple of block_size=64"),
        (("demo", "--lse", "fine"), "invalid choice: 'fine'"),
        (("demo", "--tokens", "512", "--dense-len", "600"), "dense_len=600"),
        (("demo", "--device", "tpu"), "invalid choice: 'tpu'"),
        (("demo", "--out", __file__), "a folder"),
        (("bench", "no-such-script"), "no-such-script"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_answered_in_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("infllm-pass")
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_demo_without_the_gpu_asked_for(run):
    code, _, err = run("demo", "--device", "cuda")
    assert code == 2
    assert "--device cpu" in err


def test_explain_prints_every_site(run, folder):
    code, out, err = run("explain", folder, "--dense-len", 512)
    assert code == 0
    assert "without weights" in out
    assert "[1, 512]" in out
    assert "3 switchable" in out
    assert err == ""


@pytest.mark.parametrize(
    ("options", "length", "branch", "sites"),
    [
        (("--dense-len", 512), 512, "sparse", 3),
        (("--dense-len", 512, "--length", 300, "--batch", 2), 300, "dense", 3),
        (("--dense-len", 0, "--length", 64, "--layers", 1), 64, "sparse", 1),
    ],
    ids=["at-dense_len", "below", "one-layer"],
)
def test_explain_as_json(run, folder, options, length, branch, sites):
    code, out, _ = run("explain", folder, "--json", *options)
    found = json.loads(out)
    assert code == 0
    assert found["length"] == length
    rows = [site for graph in found["graphs"] for site in graph["sites"]]
    assert len(rows) == sites
    assert {(row["decision"], row["branch"]) for row in rows} == {("switchable", branch)}
    assert rows[0]["query_shape"] == [found["batch"], 4, length, 8]


def test_explain_as_csv(run, folder):
    code, out, err = run("explain", folder, "--dense-len", 512, "--csv")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["site"], row["decision"], row["branch"]) for row in rows] == [
        (str(site), "switchable", "sparse") for site in range(3)
    ]


def test_json_and_csv_exclude_each_other(run, folder):
    code, out, err = run("explain", folder, "--csv", "--json")
    assert (code, out) == (2, "")
    assert "not allowed with argument" in err


@pytest.mark.parametrize("width", [80, 40])
def test_explain_fits_a_narrow_terminal(run, folder, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run("explain", folder, "--dense-len", 512)
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    for figure in ("1, 4, 512, 8", "switchable", "512 >= 512"):
        assert figure in out


FIGURES = {
    "tokens": 512,
    "dense": dict.fromkeys(("perplexity", "perplexity_last_half", "forward_s", "compile_s", "peak_bytes"), 9.7824),
    "sparse": dict.fromkeys(("perplexity", "perplexity_last_half", "forward_s", "compile_s", "peak_bytes"), 2.5),
    "published": {"perplexity": 3.5, "top1_agreement_last_half": 0.9265, "needles_found": 1},
}


@pytest.mark.parametrize("form", ["json", "csv"])
def test_demo_for_programs_prints_nothing_but_figures(run, monkeypatch, form):
    def run_demo(options, console):
        console.print("model")
        return FIGURES

    monkeypatch.setattr(demo, "run_demo", run_demo)
    code, out, err = run("demo", "--tokens", 512, f"--{form}")
    assert (code, err) == (0, "model\n")
    if form == "json":
        assert json.loads(out) == FIGURES
    else:
        rows = list(csv.DictReader(io.StringIO(out)))
        assert rows[0] == {"figure": "perplexity", "dense": "9.7824", "sparse": "2.5", "published": "3.5"}
        (found,) = [row for row in rows if row["figure"] == "needles_found"]
        assert found == {"figure": "needles_found", "dense": "", "sparse": "", "published": "1"}


def test_explain_uses_the_folder_s_sparse_config(run, folder):
    edit_config(folder, sparse_config={"window_size": 128, "topk": 9, "dense_len": 256})
    _, out, _ = run("explain", folder, "--json", "--topk", 7)
    found = json.loads(out)
    assert found["length"] == 256
    assert (found["config"]["window_size"], found["config"]["topk"]) == (128, 7)


def test_explain_refuses_a_bad_sparse_config(run, folder):
    edit_config(folder, sparse_config={"window": 128})
    code, _, err = run("explain", folder)
    assert code == 2
    assert "did you mean 'window_size'?" in err


def test_explain_says_why_a_model_stays_dense(run, tmp_path):
    transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    code, out, _ = run("explain", tmp_path, "--length", 64)
    assert code == 0
    assert "BIDIRECTIONAL" in out


def test_explain_refuses_a_model_that_takes_no_token_ids(run, tmp_path):
    transformers.CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    code, _, err = run("explain", tmp_path)
    assert code == 2
    assert "could not be traced on token ids" in err
    assert err.count("\n") == 1


MODULE = """
import torch
from torch import nn
import torch.nn.functional as F

class Model(nn.Module):
    def __init__(self, read=False):
        super().__init__()
        self.table = nn.Embedding(8, 16)
        rates = torch.linspace(0, 1, 3)
        self.rates = [rate.item() for rate in rates] if read else None

    def forward(self, ids):
        x = self.table(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        index = torch.arange(x.shape[2])
        scores = (x @ x.mT * 8**-0.5).masked_fill(index > index[:, None], float("-inf"))
        return scores.softmax(-1) @ x

def build():
    return Model()

def reading():
    return Model(True)

def with_inputs():
    return Model(), (torch.zeros(3, 70, dtype=torch.int64),)

def nothing():
    return 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder with functions that return models."""
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    yield
    sys.modules.pop("own_models", None)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("function", "shape"),
    [("build", [1, 2, 64, 8]), ("reading", [1, 2, 64, 8]), ("with_inputs", [3, 2, 70, 8])],
)
def test_explain_takes_a_function_that_returns_a_model(run, function, shape):
    code, out, err = run("explain", f"own_models:{function}", "--length", 64, "--dense-len", 64, "--json")
    assert code == 0, err
    (graph,) = json.loads(out)["graphs"]
    (site,) = graph["sites"]
    assert (site["decision"], site["query_shape"]) == ("switchable", shape)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models:nothing", "gives a int: expected a torch.nn.Module"),
        ("own_models:absent", "has no attribute 'absent'"),
        ("no_such_module:build", "No module named 'no_such_module'"),
    ],
)
def test_explain_refuses_what_is_no_model(run, name, message):
    code, _, err = run("explain", name)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_explain_builds_models_whose_constructor_reads_values(run, tmp_path):
    """Fake tensors have no values: the model is built on the CPU then. This one takes images, and is refused later."""
    transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]).save_pretrained(tmp_path)
    code, _, err = run("explain", tmp_path)
    assert code == 2
    assert "ConvNextModel" in err
    assert "could not be traced on token ids" in err


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A source checkout with benchmarks."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "benchmarks").mkdir()
    script = "import json, sys\nprint(json.dumps([sys.executable, *sys.argv[1:]]))\n"
    (tmp_path / "benchmarks" / "fast.py").write_text(script)
    (tmp_path / "benchmarks" / "failing.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "benchmarks" / "_shared.py").touch()
    monkeypatch.setattr(infllm_pass, "__file__", str(tmp_path / "infllm_pass" / "__init__.py"))
    return tmp_path


@pytest.mark.usefixtures("checkout")
def test_bench_lists_what_there_is(run):
    assert run("bench") == (0, "failing\nfast\n", "")


@pytest.mark.usefixtures("checkout")
def test_bench_lists_for_programs(run):
    assert json.loads(run("bench", "--json")[1]) == ["failing", "fast"]
    assert run("bench", "--csv") == (0, "script\nfailing\nfast\n", "")
    code, out, err = run("bench", "--frobnicate")
    assert (code, out) == (2, "")
    assert "--frobnicate" in err


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("arguments", [("--json", "fast", "--length", 8), ("fast", "--json", "--length", 8)], ids=str)
def test_bench_hands_the_form_on(run, arguments):
    code, out, _ = run("bench", *arguments)
    assert code == 0
    assert json.loads(out) == [sys.executable, "--json", "--length", "8"]


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("separator", [(), ("--",)], ids=["plain", "separated"])
def test_bench_passes_arguments_and_interpreter(run, separator):
    code, out, _ = run("bench", "fast", "fast", *separator, "--length", 8, "x")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == 2 * [[sys.executable, "--length", "8", "x"]]


@pytest.mark.parametrize(("available", "script"), [(True, "decode"), (False, "cpu_decode")], ids=["cuda", "cpu"])
def test_bench_decode_runs_the_benchmark_of_the_machine(run, checkout, monkeypatch, available, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    (checkout / "benchmarks" / f"{script}.py").write_text("import sys\nprint(sys.argv[1:])\n")
    assert run("bench", "--decode", "--lengths", 8) == (0, "['--lengths', '8']\n", "")


@pytest.mark.usefixtures("checkout")
def test_bench_stops_at_a_failure_with_its_code(run):
    assert run("bench", "failing", "fast")[:2] == (3, "")


def test_bench_outside_a_checkout(run, tmp_path, monkeypatch):
    monkeypatch.setattr(infllm_pass, "__file__", str(tmp_path / "infllm_pass" / "__init__.py"))
    code, _, err = run("bench")
    assert code == 2
    assert "checkout" in err


def test_demo_refuses_a_switch_that_never_goes_sparse():
    with pytest.raises(ConfigError, match="dense_len"):
        DemoOptions(infllm_pass.SparseAttentionConfig(dense_len=513), tokens=512)


def double_slowly(value, tell):
    """Stands for a measurement: tells how far it is, and returns its process and a result."""
    tell("doubling", 1, 2)
    return os.getpid(), os.environ["TORCHINDUCTOR_CACHE_DIR"], 2 * value


def refuse(tell):
    """A measurement that is refused."""
    raise CheckpointError("nothing to load")


def die(tell):
    """A measurement whose process is killed."""
    os._exit(9)


@pytest.fixture
def importable_tests(monkeypatch):
    """Lets a process that is started find the functions of this file."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.usefixtures("importable_tests")
def test_measurements_run_in_processes_and_caches_of_their_own():
    told = []
    process, cache, result = demo_worker.run_apart(double_slowly, 21, tell=lambda *args: told.append(args))
    assert result == 42
    assert process != os.getpid()
    assert told == [("doubling", 1, 2)]
    assert not Path(cache).exists()


@pytest.mark.usefixtures("importable_tests")
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [(refuse, CheckpointError, "nothing to load"), (die, demo_worker.MeasurementError, "exit code 9")],
    ids=["refused", "killed"],
)
def test_failures_of_a_process_arrive_as_errors(function, error, message):
    with pytest.raises(error, match=message):
        demo_worker.run_apart(function, tell=lambda *args: None)


@pytest.mark.parametrize("target", ["onnx", "aoti"])
def test_export_writes_a_file(tmp_path, capsys, monkeypatch, target):
    def compile_and_package(program, *, package_path, inductor_configs):
        """In the place of Inductor, which takes half a minute: see test_aoti."""
        with torch.no_grad():
            assert program.module()(torch.zeros(3, 40, dtype=torch.int64)).shape == (3, 40, 64)
        Path(package_path).write_bytes(b"compiled")

    if target == "onnx":
        pytest.importorskip("onnxscript")
    elif shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    folder = tmp_path / "model"
    tiny_config().save_pretrained(folder)
    out = tmp_path / f"tiny{TARGETS[target]}"
    command = ["export", str(folder), "--to", target, "--out", str(out), "--layers", "1", "--dense-len", "16"]
    monkeypatch.setenv("COLUMNS", "40")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "switchable" in printed
    assert str(out) in printed  # whole, however narrow the terminal
    assert out.stat().st_size > 0
    assert main([*command, "--overwrite", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["bytes"], facts["to"]) == (out.stat().st_size, target)
    assert [site["decision"] for graph in facts["graphs"] for site in graph["sites"]] == ["switchable"]
    assert main(command) == 2
    assert "exists: choose another path" in capsys.readouterr().err


def test_an_engine_is_built_from_a_file_beside_it(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    calls = []

    def build(onnx_path, engine_path, profile, *, overwrite):
        calls.append((onnx_path.name, profile, overwrite))
        engine_path.write_bytes(onnx_path.read_bytes()[:8])
        return "1 plugins"

    monkeypatch.setattr(export_command, "export_tensorrt", build)
    folder, out = tmp_path / "model", tmp_path / "tiny.engine"
    tiny_config().save_pretrained(folder)
    command = ["export", str(folder), "--to", "tensorrt", "--out", str(out), "--layers", "1", "--max-length", "640"]
    assert main(command) == 0
    assert calls == [("tiny.onnx", {"ids": ((1, 1), (1, 320), (1, 640))}, False)]
    printed = capsys.readouterr().out
    assert "1 plugins" in printed
    assert "switchable" in printed
    assert (tmp_path / "tiny.onnx").exists()


def test_explaining_a_module_that_changes_the_folder_leaves_the_path_of_modules(tmp_path, monkeypatch, run):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moving_models.py").write_text(MODULE + "\nimport os\nos.chdir('elsewhere')\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    try:
        assert run("explain", "moving_models:build")[0] == 0
        assert sys.path == before
    finally:
        sys.modules.pop("moving_models", None)
