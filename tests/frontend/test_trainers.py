"""Trainers that people use train a sparsified model as a plain loop does: losses, gradients, and what is trained."""

from __future__ import annotations

import pytest
import torch

import infllm_pass
from tests.support.common import SMALL, llama, relative_error, tokens

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

STEPS = 3
RATE = 1e-3
pytestmark = pytest.mark.filterwarnings("ignore")


def sparsified(model, backend="eager"):
    return infllm_pass.sparsify(torch.compile(model, backend=backend), SMALL, strict="all")


def small(**sizes):
    return llama(num_hidden_layers=1, weights=2, pad_token_id=0, use_cache=False, **sizes).train()


def lora():
    return pytest.importorskip("peft").LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )


def whole(model):
    return model


def with_adapter(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(model, lora()).double().train()


def trainable(model):
    return [each for each in model.parameters() if each.requires_grad]


@pytest.fixture
def rows():
    """Two rows, of which a step takes both; a sequence of the second is dense."""
    torch.manual_seed(4)
    return [tokens(length).clamp(min=1)[0] for length in (80, 56)]


def collate(rows):
    """Rows padded on the right, with a mask."""
    rows = [row["input_ids"] if isinstance(row, dict) else row for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def optimizer_of(model):
    return torch.optim.AdamW(trainable(model), lr=RATE, weight_decay=0.0)


def gradients_of(model):
    return torch.cat([each.grad.detach().flatten() for each in trainable(model)])


def plain_loop(plain, batch):
    """Losses and gradients of some steps of a sparsified copy."""
    model, optimizer = sparsified(plain), optimizer_of(plain)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss))
        gradients.append(gradients_of(plain))
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


class Recording(transformers.TrainerCallback):
    """Keeps losses and gradients of the steps of a trainer."""

    def __init__(self, plain):
        self.plain, self.losses, self.gradients = plain, [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(gradients_of(self.plain))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def settings(folder, **changes):
    """Of a trainer that does what the plain loop does."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    } | changes


def compare(recorded, expected, bound):
    for actual, wanted in zip((recorded.losses, recorded.gradients), expected, strict=True):
        assert len(actual) == len(wanted) == STEPS
        for one, other in zip(actual, wanted, strict=True):
            assert relative_error(torch.as_tensor(one), torch.as_tensor(other)) < bound
    assert expected[0][-1] < expected[0][0]


def check_sparse(model):
    report = infllm_pass.report(model)
    assert report.switchable == len(report.sites) > 0
    assert report.uncompiled_calls == {}


@pytest.mark.parametrize(
    ("adapt", "backend"),
    [(whole, "eager"), (whole, "aot_eager"), (with_adapter, "aot_eager")],
    ids=["whole", "whole checkpointed", "LoRA checkpointed"],
)
def test_trainer_takes_the_steps_of_a_plain_loop(rows, tmp_path, adapt, backend):
    expected = plain_loop(adapt(small()), collate(rows))
    plain = adapt(small())
    model, recorded = sparsified(plain, backend), Recording(plain)
    arguments = transformers.TrainingArguments(**settings(tmp_path, gradient_checkpointing=backend == "aot_eager"))
    data = [{"input_ids": row} for row in rows]
    transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[recorded]).train()
    compare(recorded, expected, 1e-8)
    check_sparse(model)


def test_accelerate_takes_the_steps_of_a_plain_loop(rows):
    accelerate = pytest.importorskip("accelerate")
    expected = plain_loop(small(), collate(rows))
    plain = small()
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(rows * STEPS, batch_size=2, collate_fn=collate)
    sparse = sparsified(plain)
    model, optimizer, loader = accelerator.prepare(sparse, optimizer_of(plain), loader)
    recorded = Recording(plain)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            recorded.losses.append(float(loss))
            recorded.gradients.append(gradients_of(plain))
            optimizer.step()
            optimizer.zero_grad()
    compare(recorded, expected, 1e-12)
    check_sparse(sparse)


def sft_trainer(model, rows, folder, **options):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tests.support.tokenizers import byte_tokenizer

    arguments = trl.SFTConfig(**settings(folder, dataset_kwargs={"skip_prepare_dataset": True}))
    data = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in rows]})
    return trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=byte_tokenizer(), **options)


def test_trl_takes_the_steps_of_a_plain_loop(rows, tmp_path):
    expected = plain_loop(small(vocab_size=512), collate(rows))
    plain = small(vocab_size=512)
    model, recorded = sparsified(plain), Recording(plain)
    sft_trainer(model, rows, tmp_path, callbacks=[recorded]).train()
    compare(recorded, expected, 1e-6)
    check_sparse(model)


def test_trl_puts_adapters_into_a_sparsified_model(rows, tmp_path):
    adapted = with_adapter(small(vocab_size=512))
    initial = [each.detach().clone() for each in trainable(adapted)]
    expected = plain_loop(adapted, collate(rows))
    model = sparsified(small(vocab_size=512))
    trainer = sft_trainer(model, rows, tmp_path, peft_config=lora())
    trainer.model.double()
    with torch.no_grad():
        for parameter, value in zip(trainable(trainer.model), initial, strict=True):
            parameter.copy_(value)
    recorded = Recording(trainer.model)
    trainer.add_callback(recorded)
    trainer.train()
    compare(recorded, expected, 1e-6)
    check_sparse(model)
