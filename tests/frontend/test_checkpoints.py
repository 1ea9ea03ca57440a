"""Checkpoints of a sparsified model are those of its original, and transformers' Trainer treats it like one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import infllm_pass
from tests.support.common import SMALL, llama, oracle_attention, relative_error


def sparsified(model, **arguments):
    return infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL, **arguments)


class Norm(nn.Module):
    """Parameters, a buffer, and a module whose state has a version."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.randn(3))


def owned(model):
    return nn.ModuleDict({"inner": model})


@pytest.mark.parametrize("wrap", [lambda model: model, owned], ids=["model", "part of another"])
def test_a_state_has_the_names_of_the_original_and_loads_them(wrap):
    plain = Norm()
    model, other = wrap(sparsified(plain)), wrap(Norm())
    state = model.state_dict()
    assert {name: id(tensor.untyped_storage()) for name, tensor in state.items()}.keys() == other.state_dict().keys()
    assert set(state._metadata) >= set(other.state_dict()._metadata)
    assert state._metadata.get("norm", state._metadata.get("inner.norm")) == {"version": 2}
    other.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    again = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    model.load_state_dict(again)
    assert all(bool((tensor == 1).all()) for tensor in plain.state_dict().values())


def test_a_state_of_a_compiled_model_loads_too():
    first, plain = torch.compile(Norm(), backend="eager"), Norm()
    sparsified(plain).load_state_dict(first.state_dict())
    assert torch.equal(plain.scale, first.scale)


def test_what_is_missing_or_unexpected_has_the_names_of_the_original():
    model = sparsified(Norm())
    state = dict(model.state_dict())
    state["else"] = state.pop("scale")
    found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["scale"], ["else"])


def test_safetensors_save_and_load_a_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = sparsified(Norm()), Norm()
    safetensors.save_model(model, str(tmp_path / "a"))
    safetensors.load_model(other, str(tmp_path / "a"))
    assert torch.equal(other.scale, model.scale)
    safetensors.load_model(sparsified(Norm()), str(tmp_path / "a"))


@pytest.mark.parametrize("wrap", [lambda model: model, owned], ids=["model", "part of another"])
@pytest.mark.parametrize("full", [False, True], ids=["", "full"])
def test_distributed_checkpoints_have_the_names_of_the_original(wrap, full):
    from torch.distributed.checkpoint import state_dict as distributed

    plain = Norm()
    model = wrap(sparsified(plain))
    options = distributed.StateDictOptions(full_state_dict=full)
    state = distributed.get_model_state_dict(model, options=options)
    assert state.keys() == wrap(Norm()).state_dict().keys()
    distributed.set_model_state_dict(model, {name: torch.ones_like(tensor) for name, tensor in state.items()})
    assert bool((plain.scale == 1).all())


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 64, (length,), generator=generator) for length in (90, 40, 70, 80)]
    return [{"input_ids": row, "labels": row} for row in rows]


def collate(rows):
    """Rows padded on the right, with a mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def trained(model, rows, folder, **arguments):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        learning_rate=1e-3,
        disable_tqdm=True,
        **arguments,
    )
    trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:2], data_collator=collate)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", [{}, {"torch_compile_backend": "eager"}], ids=str)
def test_trainer_trains_evaluates_and_saves_a_sparsified_model(rows, tmp_path, arguments):
    """Which its own compilation leaves as it is. Rows of both sides of dense_len; what it saves is what was trained."""

    def small():
        return llama(num_hidden_layers=1, weights=2, pad_token_id=0).train()

    plain = small()
    model = sparsified(plain, strict=True)
    trainer = trained(model, rows, tmp_path / "sparse", **arguments)
    reloaded = type(plain).from_pretrained(tmp_path / "sparse" / "checkpoint-2", dtype=torch.float64)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in reloaded.state_dict().items())
    assert not torch.equal(plain.lm_head.weight, small().lm_head.weight)
    batch = collate(rows[:2])
    mask = torch.zeros(2, 90, dtype=torch.bool)
    mask[0], mask[1, :40] = True, True
    with oracle_attention(SMALL, mask):
        expected = reloaded.eval()(**batch).loss
    assert relative_error(torch.tensor(trainer.evaluate()["eval_loss"]), expected) < 1e-6
    assert infllm_pass.report(model).switchable == len(infllm_pass.report(model).sites) > 0
    assert infllm_pass.report(model).uncompiled_calls == {}
