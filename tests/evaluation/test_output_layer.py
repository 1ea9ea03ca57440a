"""Logits in pieces: the figures of the whole, with few logits at once, whatever a model does with its logits."""

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.compat.tensors import TorchDispatchMode
from infllm_pass.errors import EvaluationError
from infllm_pass.evaluation import output_layer
from infllm_pass.evaluation.output_layer import OutputLayer
from infllm_pass.evaluation.scoring import Scorer
from tests.support.common import SMALL
from tests.support.tokenizers import byte_llama

pytest.importorskip("transformers")

VOCABULARY = 997
LENGTH = 400
AT_ONCE = 40  # more than the hidden size: transposed weights have the vocabulary for a last dimension too
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def llama():
    return byte_llama(**SIZES)


def tied():
    return byte_llama(**SIZES, tie_word_embeddings=True)


def soft_capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.05)).eval()


def divided():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.2)).eval()


def ids_of(length=LENGTH):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()


class LogitsAtOnce(TorchDispatchMode):
    """The most logits in one tensor, over all operators: those whose last dimension is the vocabulary."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == VOCABULARY:
            self.most = max(self.most, out.numel())
        return out


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(output_layer, "PIECE_LOGITS", AT_ONCE * VOCABULARY)


@pytest.mark.parametrize("make", [llama, tied, soft_capped, divided])
def test_losses_are_those_of_the_whole_with_few_logits_at_once(make, in_pieces):
    model, ids = make(), ids_of()
    with LogitsAtOnce() as seen:
        losses = Scorer(model, model).losses(ids)
    assert seen.most == AT_ONCE * VOCABULARY
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    expected = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert sum(losses.counts) == LENGTH - 1
    assert sum(losses.sums) == pytest.approx(float(expected.double().sum()), rel=1e-6)
    assert losses.last_half == pytest.approx(float(expected[LENGTH // 2 - 1 :].mean().exp()), rel=1e-5)
    places = torch.tensor([3, 17, LENGTH - 1])
    torch.testing.assert_close(Scorer(model, model).logits(ids, places), logits[places], rtol=1e-5, atol=1e-6)


def test_a_sparsified_model_that_ran_before_is_scored_in_pieces(in_pieces):
    model, ids = llama(), ids_of()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL.with_dense_len(0), strict=True)
    with torch.no_grad():
        logits = sparse(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        dense = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert float((logits - dense).abs().max()) > 1e-2
    expected = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    found = Scorer(sparse, model)
    assert sum(found.losses(ids).sums) == pytest.approx(float(expected), rel=1e-6)
    with torch.no_grad():
        again = sparse(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(again, logits)
    sites = infllm_pass.report(sparse).sites
    own, scored = ([site.module for site in sites if site.graph == graph] for graph in (0, 1))
    assert len(own) == 2
    assert own == scored  # by which calibrations know the sites


class MeanTaken(torch.nn.Module):
    """A model whose logits depend on the number of places: they are not made place by place."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, input_ids, use_cache):
        out = self.model(input_ids=input_ids, use_cache=use_cache)
        out.logits = out.logits - out.logits.mean(1, keepdim=True)
        return out


class WeightsRead(MeanTaken):
    """A model that reads its output layer's weights and does not call it."""

    def forward(self, input_ids, use_cache):
        hidden = self.model.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return type("Output", (), {"logits": F.linear(hidden, self.model.lm_head.weight)})


@pytest.mark.parametrize("kind", [MeanTaken, WeightsRead])
def test_other_models_are_scored_by_their_own_logits(kind):
    model, ids = kind(llama()), ids_of(64)
    assert OutputLayer.of(model) is None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    expected = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    assert sum(Scorer(model, model).losses(ids).sums) == pytest.approx(float(expected), rel=1e-6)


def test_the_layer_is_in_its_place_after_a_pass_that_failed():
    model = llama()
    layer, found = model.lm_head, OutputLayer.of(model)

    def failing(**_):
        assert model.lm_head is not layer
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        found.hidden(failing, [1, 2])
    assert model.lm_head is layer
    with pytest.raises(EvaluationError, match="did not call its output layer lm_head on every token"):
        found.hidden(lambda **_: None, [1, 2])
    assert model.lm_head is layer
