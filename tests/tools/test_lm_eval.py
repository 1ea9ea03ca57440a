"""lm_eval runs the sparsified model, not the original; these tests run where lm_eval is installed."""

import json
import os
import subprocess
import sys

import pytest
import torch

import infllm_pass
from infllm_pass.errors import ConfigError, MissingDependencyError, NoAttentionSiteError
from infllm_pass.tools.cli import main
from tests.support import ROOT
from tests.support.common import SMALL
from tests.support.tokenizers import byte_llama, byte_tokenizer

pytest.importorskip("transformers")
TEXT = "the quick brown fox jumps over the lazy dog " * 12 + "and"
WORDS = (" again", " 42")
FIELDS = {name: value for name, value in SMALL.to_dict().items() if name not in ("use_nope", "score_dims")}


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "infllm_pass.tools.lm_eval", raising=False)
    with pytest.raises(MissingDependencyError, match=r"infllm-pass\[lm-eval\]"):
        import infllm_pass.tools.lm_eval  # noqa: F401


def test_the_command_without_lm_eval_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "infllm_pass.tools.lm_eval", raising=False)
    monkeypatch.delattr(infllm_pass.tools, "lm_eval", raising=False)
    assert main(["lm-eval", "run", "--model", "infllm"]) == 2
    assert "pip install 'infllm-pass[lm-eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval")
    from infllm_pass.tools import lm_eval

    return lm_eval


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    byte_llama(max_position_embeddings=8192).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, 0) for each in arguments]


def likelihoods(model):
    """What the models say of two continuations: sums of log-likelihoods."""
    found = model.loglikelihood(requests("loglikelihood", *((TEXT, word) for word in WORDS)))
    return [pytest.approx(value, rel=1e-4) for value, _ in found]


def oracle(model, text, continuation):
    """The sum of log-likelihoods that the model itself gives a continuation."""
    tokenizer = byte_tokenizer()
    before, after = (tokenizer(part).input_ids for part in (text, continuation))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(torch.log_softmax(logits, -1)[range(len(after)), after].sum())


def generated(model):
    (text,) = model.generate_until(
        requests("generate_until", (TEXT, {"until": [], "max_gen_toks": 12, "do_sample": False}))
    )
    return text


def test_hflm_runs_a_sparsified_model_sparse():
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    original = byte_llama()
    sparse = infllm_pass.sparsify(torch.compile(original, backend="eager"), SMALL, strict=True)
    plain = HFLM(pretrained=original, tokenizer=byte_tokenizer())
    wrapped = HFLM(pretrained=sparse, tokenizer=byte_tokenizer())
    expected = [oracle(sparse, TEXT, word) for word in WORDS]
    assert likelihoods(wrapped) == expected
    assert likelihoods(plain) == [oracle(original, TEXT, word) for word in WORDS]
    assert likelihoods(plain) != expected
    with infllm_pass.dense_mode(sparse):
        assert likelihoods(wrapped) == [oracle(original, TEXT, word) for word in WORDS]
    assert generated(wrapped) != generated(plain)
    assert {branch for graph in infllm_pass.report(sparse).graphs for branch in graph.branches} == {"sparse"}


def test_the_model_infllm_runs_a_folder_sparse(harness, folder):
    model = harness.InfLLM(pretrained=str(folder), device="cpu", **FIELDS)
    sparse = infllm_pass.sparsify(torch.compile(byte_llama(max_position_embeddings=8192), backend="eager"), SMALL)
    assert likelihoods(model) == [oracle(sparse, TEXT, word) for word in WORDS]
    info = model.get_model_info()
    assert info["infllm_graphs"]["sparse"] > 0 == info["infllm_graphs"]["dense"]
    assert info["infllm_config"] == SMALL.to_dict()
    long = harness.InfLLM(pretrained=str(folder), device="cpu", **FIELDS | {"dense_len": 4096})
    assert likelihoods(long) == [
        oracle(byte_llama(max_position_embeddings=8192), TEXT, word) for word in (" again", " 42")
    ]
    assert long.get_model_info()["infllm_graphs"]["sparse"] == 0


def test_the_model_infllm_takes_models(harness):
    original = byte_llama()
    sparse = infllm_pass.sparsify(torch.compile(original, backend="eager"), SMALL)
    expected = [oracle(sparse, TEXT, word) for word in WORDS]
    assert likelihoods(harness.InfLLM(pretrained=sparse, tokenizer=byte_tokenizer())) == expected
    assert likelihoods(harness.InfLLM(pretrained=original, tokenizer=byte_tokenizer(), **FIELDS)) == expected
    with pytest.raises(ConfigError, match="topk=9 is not valid: expected no field"):
        harness.InfLLM(pretrained=sparse, tokenizer=byte_tokenizer(), topk=9)
    with pytest.raises(ConfigError, match="topk=0"):
        harness.InfLLM(pretrained=original, tokenizer=byte_tokenizer(), topk=0)


def test_a_model_that_cannot_be_sparse_is_refused(harness):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=260, state_size=4)
    model = harness.InfLLM(pretrained=MambaForCausalLM(config).eval(), tokenizer=byte_tokenizer())
    with pytest.raises(NoAttentionSiteError):
        likelihoods(model)


def test_the_command_line_runs_a_ruler_task(harness, folder, tmp_path):
    """A task that lm_eval makes itself, without data: frequent words."""
    for needed in ("nltk", "wonderwords", "scipy"):
        pytest.importorskip(needed)
    arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": folder, **FIELDS}.items())
    command = [sys.executable, "-m", "infllm_pass.tools.cli", "lm-eval", "--model", "infllm", "--model_args", arguments]
    command += ["--tasks", "ruler_fwe", "--limit", "1", "--device", "cpu", "--output_path", str(tmp_path)]
    command += ["--metadata", json.dumps({"max_seq_lengths": [4096], "tokenizer": str(folder)})]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert "ruler_fwe" in results["results"]
    assert results["config"]["infllm_graphs"]["sparse"] > 0 == results["config"]["infllm_graphs"]["dense"]
    assert results["config"]["infllm_config"] == SMALL.to_dict()
