"""Adaptation on a GPU: packed rows of both lengths by Inductor and Triton in bfloat16, resumed, and distilled."""

import pytest
import torch

import infllm_pass
from infllm_pass import AdaptationConfig, Bucket, SparseAttentionConfig
from infllm_pass.evaluation import TaskSettings, read_texts
from tests.support.adapting import write_texts
from tests.support.tokenizers import byte_llama, byte_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


def config(**changes):
    fields = {
        "buckets": (Bucket(512, 0.5), Bucket(2048, 0.5)),
        "tokens_per_step": 4096,
        "steps": 8,
        "tasks": ("single_needle",),
        "sparse": SparseAttentionConfig(window_size=128, topk=6, scorer="pooled"),
        "warmup": 1,
        "checkpoint_every": 4,
        "log_every": 4,
        "evaluation": TaskSettings(tasks=("perplexity",), lengths=(2048,)),
    }
    return AdaptationConfig(**{**fields, **changes})


@pytest.fixture
def run(tmp_path):
    files = write_texts(tmp_path / "texts")
    held_out = read_texts([tmp_path / "texts" / "held.txt"])

    def start(folder, resume=False, **changes):
        model = byte_llama(num_key_value_heads=2, **SIZES)
        return infllm_pass.adapt(
            model, byte_tokenizer(), files, tmp_path / folder, config(**changes), held_out=held_out, resume=resume
        )

    return start


@pytest.mark.parametrize("scorer", ["pooled", "tokens"])
def test_losses_in_bfloat16_are_near_those_in_float32(run, scorer):
    sparse = SparseAttentionConfig(window_size=128, topk=6, scorer=scorer)
    low = run("low", sparse=sparse)
    exact = run("exact", sparse=sparse, precision="float32", gradient_checkpointing=True)
    assert [each.length for each in low.losses] == [each.length for each in exact.losses]
    for a, b in zip(low.losses, exact.losses, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-2)
    assert exact.losses[-1].loss < exact.losses[0].loss


def test_a_run_goes_on_where_it_was(run, tmp_path):
    whole = run("whole")
    (tmp_path / "whole" / "checkpoints" / "checkpoint-8" / "complete.json").unlink()
    again = run("whole", resume=True)
    for a, b in zip(again.losses, whole.losses, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)


def test_distillation_is_compiled_with_checkpointed_layers(run):
    found = run("distilled", distill=0.5, gradient_checkpointing=True, checkpoint_every=0)
    long = [each.divergence for each in found.losses if each.length == 2048]
    assert all(value > 0 for value in long)
    assert max(each.divergence for each in found.losses if each.length == 512) < 1e-2


def test_no_step_waits_for_the_device(run, monkeypatch):
    """Between two readings of the losses nothing is synchronised."""
    from infllm_pass.adaptation.trainer import AdaptationTrainer

    waits = []
    step = AdaptationTrainer.compute_loss

    def watched(self, *args, **keywords):
        torch.cuda.set_sync_debug_mode("error" if self.state.global_step > 5 else "default")
        try:
            return step(self, *args, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(self.state.global_step)

    monkeypatch.setattr(AdaptationTrainer, "compute_loss", watched)
    run("watched", checkpoint_every=0, log_every=8)
    assert waits == list(range(8))
