"""Adapters of PEFT in place of the weights; `make test-wrappers` installs it."""

import pytest
import torch

import infllm_pass
from infllm_pass.adaptation.trainer import WEIGHTS
from infllm_pass.evaluation import read_texts
from tests.support.adapting import small_config, small_model, write_texts

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("distill", [0.0, 0.5], ids=["plain", "distilled"])
def test_adapters_are_trained_resumed_and_merged(tmp_path, distill):
    files = write_texts(tmp_path / "texts")
    config = small_config(lora=4, learning_rate=1e-2, distill=distill)
    held_out = read_texts([tmp_path / "texts" / "held.txt"])

    def run(folder, resume=False):
        model, tokenizer = small_model()
        out = tmp_path / folder
        return infllm_pass.adapt(model, tokenizer, files, out, config, held_out=held_out, device="cpu", resume=resume)

    whole = run("whole")
    kept = safetensors.load_file(tmp_path / "whole" / "checkpoints" / "checkpoint-4" / WEIGHTS)
    assert kept
    assert all("lora_" in name for name in kept)
    first, _ = small_model()
    saved = transformers.AutoModelForCausalLM.from_pretrained(whole.model)
    assert torch.equal(saved.lm_head.weight, first.lm_head.weight)
    changed = saved.model.layers[0].self_attn.q_proj.weight - first.model.layers[0].self_attn.q_proj.weight
    assert torch.linalg.matrix_rank(changed.double(), rtol=1e-5) == 4

    (tmp_path / "whole" / "checkpoints" / "checkpoint-4" / "complete.json").unlink()
    assert run("whole", resume=True).losses == whole.losses
