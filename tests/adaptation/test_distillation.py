"""Distillation in chunks: losses and gradients of the whole computation in float64, and a run with it."""

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.adaptation import distillation
from infllm_pass.errors import AdaptationError
from infllm_pass.evaluation import read_texts
from tests.support.adapting import small_config, small_model, write_texts

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_chunks_have_the_losses_and_gradients_of_the_whole(share, bias, monkeypatch):
    monkeypatch.setattr(distillation, "MOST_LOGITS", 5 * 37)  # five tokens at a time, of twice eleven
    torch.manual_seed(0)
    hidden = torch.randn(2, 12, 8, dtype=torch.float64)
    taught = torch.randn(2, 12, 8, dtype=torch.float64)
    labels = torch.randint(37, (2, 12))
    labels[0, 3] = labels[1, 0] = -100
    output = torch.nn.Linear(8, 37, bias=bias, dtype=torch.float64)

    def whole():
        s, t = (F.log_softmax(output(each[:, :-1]), -1) for each in (mine, taught))
        target = labels[:, 1:]
        loss = F.nll_loss(s.transpose(1, 2), target, ignore_index=-100)
        kl = F.kl_div(s, t.detach(), log_target=True, reduction="none").sum(-1)
        divergence = kl[target != -100].mean()
        return (1 - share) * loss + share * divergence, loss, divergence

    def chunked():
        return distillation.chunked_losses(mine, taught, output, labels, share)

    found = []
    for compute in (whole, chunked):
        output.zero_grad()
        mine = hidden.clone().requires_grad_()
        values = compute()
        (3 * values[0]).backward()
        found.append(
            [*(each.detach().double() for each in values), mine.grad, *(p.grad.clone() for p in output.parameters())]
        )
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


def test_a_run_learns_from_its_dense_mode(tmp_path):
    """Long rows differ from the dense mode, and less so in the end; short ones are the dense mode."""
    files = write_texts(tmp_path / "texts")
    model, tokenizer = small_model()
    config = small_config(
        distill=1.0, steps=8, learning_rate=3e-3, checkpoint_every=0, gradient_checkpointing=True, precision="bfloat16"
    )
    held_out = read_texts([tmp_path / "texts" / "held.txt"])
    run = infllm_pass.adapt(model, tokenizer, files, tmp_path / "out", config, held_out=held_out, device="cpu")
    long = [each.divergence for each in run.losses if each.length == 512]
    short = [each.divergence for each in run.losses if each.length == 128]
    assert min(long) > 1e-3
    assert long[-1] < 0.9 * long[0]
    assert max(short) < 1e-3


def test_a_model_that_changes_its_logits_is_refused():
    model, _ = small_model()
    forward = model.forward

    def capped(*args, **keywords):
        out = forward(*args, **keywords)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    model.forward = capped
    with pytest.raises(AdaptationError, match="changes its logits after the output layer"):
        distillation.Distilled(model, model, 0.5)
