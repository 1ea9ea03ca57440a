"""The locality benchmark's own logic: the same model until it is trained, and only what was added trained."""

import importlib

import pytest
import torch

from tests.support import ROOT

transformers = pytest.importorskip("transformers")


def test_added_tensors_are_trained_beside_fixed_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("nosa_locality")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, tie_word_embeddings=True)
    )
    ids = torch.randint(50, (2, 40))
    model = script.with_importance(plain)
    torch.testing.assert_close(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = script.train_importance(model, script.random_batches(torch.arange(50).int(), 2, 20, "cpu"), 3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(losses) == 3
    assert changed == {f"model.layers.{layer}.{name}" for layer in range(2) for name in script.ADDED}


def test_selections_have_one_budget(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    chosen = importlib.import_module("nosa_locality").selections(2048)
    assert len({config.selected_blocks for config in chosen}) == 1
    assert [config.agnostic_topk for config in chosen] == [0, 0, 2]
