"""transformers' `Trainer` over batches that are whole steps, with losses that no step waits for.

Imports transformers: whoever imports this module knows that it is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from infllm_pass.adaptation.config import AdaptationConfig
from infllm_pass.adaptation.losses import LossLog, StepLoss
from infllm_pass.adaptation.progress import LogLine
from infllm_pass.adaptation.run_folder import COMPLETE, RunFolder
from infllm_pass.compat.transformers import checkpoint_hooks, stay_on_one_gpu
from infllm_pass.errors import AdaptationError

WEIGHTS = "weights.safetensors"
"""What is trained, in a checkpoint."""


Losses = Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor | None]]
"""What is minimised, the loss on the text, and the divergence from the teacher if there is one, of a batch."""


def text_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
    """The model's own loss on its labels; without a cache, so that packed rows are told apart by their positions."""
    loss = model(**batch, use_cache=False).loss
    return loss, loss, None


@checkpoint_hooks
class AdaptationTrainer(Trainer):
    """Trains a model on batches by their number.

    Args:
        model: the model, sparsified.
        original: the plain model inside.
        rows: a batch for each place, which follows from the place alone.
        config: the run.
        folder: where checkpoints go.
        log: where losses go.
        device: "cpu" or "cuda".
        losses: what is minimised.
        tell: called every `log_every` steps.
        evaluate_at: called with the number of every step that is evaluated at.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        rows: Dataset[dict[str, Tensor]],
        config: AdaptationConfig,
        folder: RunFolder,
        log: LossLog,
        *,
        device: str,
        losses: Losses = text_loss,
        tell: Callable[[LogLine], None],
        evaluate_at: Callable[[int], None],
    ) -> None:
        self._original = original
        self._rows = rows
        self._config = config
        self._folder = folder
        self._log = log
        self._losses = losses
        self._tell = tell
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16")
        self._untold: list[StepLoss] = []
        self._begin = time.perf_counter()
        self._aside = 0.0
        super().__init__(model, _arguments(config, folder, device), data_collator=_only, train_dataset=rows)
        self.model_accepts_loss_kwargs = False  # losses are means of a batch: the trainer averages what is accumulated
        self.remove_callback(PrinterCallback)
        if config.evaluate_every:
            self.add_callback(_Evaluating(config, self._apart(evaluate_at)))

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The batches in order."""
        loader: DataLoader[dict[str, Tensor]] = DataLoader(
            self._rows,
            batch_size=1,
            sampler=SequentialSampler(self._rows),  # type: ignore[arg-type]
            collate_fn=_only,
            num_workers=self._config.workers,
            pin_memory=self.args.device.type == "cuda",
            persistent_workers=self._config.workers > 0,
            worker_init_fn=_one_thread,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """The loss of a batch, which is also kept for the file."""
        with self._autocast:
            minimised, loss, divergence = self._losses(model, inputs)
        optimizer: Any = self.optimizer
        rate = optimizer.param_groups[0]["lr"]
        self._log.add(self.state.global_step + 1, inputs["input_ids"].shape[1], float(rate), loss, divergence)
        return minimised

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the losses since the last time to the file, and tell of them."""
        super().log(logs, start_time)
        self.flush()
        if not self._untold:
            return
        now = time.perf_counter()
        told, self._untold = tuple(self._untold), []
        tokens = self._config.tokens_per_step * len(told)
        self._tell(
            LogLine(
                step=told[-1].step,
                steps=self._config.steps,
                losses=told,
                grad_norm=logs.get("grad_norm"),
                tokens_per_second=tokens / max(now - self._begin - self._aside, 1e-9),
            )
        )
        self._begin, self._aside = time.perf_counter(), 0.0

    def flush(self) -> None:
        """Write the losses that are still on the device.

        Raises:
            AdaptationError: one of them is not finite; its batch is saved.
        """
        found = self._log.flush()
        self._untold += found
        broken = next((each for each in found if not each.finite), None)
        if broken is not None:
            raise AdaptationError(
                f"the loss of step {broken.step} is {broken.loss}: its rows are in {self._save_batch(broken)}; resume "
                "from the last checkpoint with a lower learning rate, or look at these rows and the weights before"
            )

    def _save_batch(self, step: StepLoss) -> Path:
        first = (step.step - 1) * self._config.accumulation
        parts = [self._rows[place] for place in range(first, first + self._config.accumulation)]
        tensors = {f"{name}.{number}": part[name] for number, part in enumerate(parts) for name in part}
        name = f"loss-of-step-{step.step}"
        file = self._folder.path / f"{name}.safetensors"
        save_file(tensors, file)
        self._folder.write_json(
            f"{name}.json",
            {
                "step": step.step,
                "loss": str(step.loss),
                "length": step.length,
                "learning_rate": step.learning_rate,
                "losses_before": [each.loss for each in self._log.steps if each.step < step.step][-20:],
                "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
            },
        )
        return file

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """A checkpoint, marked as whole at its end; what could not be finished is removed."""
        self.flush()
        begin = time.perf_counter()
        folder = self._folder.checkpoints / f"checkpoint-{self.state.global_step}"
        try:
            write()
            (folder / COMPLETE).write_text(json.dumps({"step": self.state.global_step}) + "\n", encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise AdaptationError(
                f"the checkpoint {folder} cannot be written ({error}): free some space and resume"
            ) from error
        self._aside += time.perf_counter() - begin

    def save_trained(self, folder: Path) -> None:
        """What is trained; the model itself is saved once, at the end."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: each.detach().contiguous() for name, each in self._trained().items()}, folder / WEIGHTS)

    def load_trained(self, folder: Path) -> None:
        """Put what was trained back in its place."""
        own = self._trained()
        kept = load_file(folder / WEIGHTS)
        if kept.keys() != own.keys():
            raise AdaptationError(f"{folder} holds other parameters than those that are trained")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(kept[name])

    def _trained(self) -> dict[str, Tensor]:
        """Parameters that are trained, and buffers that training may change, by name; tied ones once."""
        saved = self._original.state_dict().keys()
        trained = {name: each for name, each in self._original.named_parameters() if each.requires_grad}
        return trained | {name: each for name, each in self._original.named_buffers() if name in saved}

    def _apart(self, evaluate_at: Callable[[int], None]) -> Callable[[int], None]:
        """An evaluation that draws no random numbers of the training's, and whose time is not counted."""

        def run(step: int) -> None:
            begin = time.perf_counter()
            devices = [torch.cuda.current_device()] if self.args.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                evaluate_at(step)
            self._aside += time.perf_counter() - begin

        return run


class _Evaluating(TrainerCallback):
    """Evaluates between steps; the last step's evaluation is the one after the training."""

    def __init__(self, config: AdaptationConfig, evaluate_at: Callable[[int], None]) -> None:
        self._config = config
        self._evaluate_at = evaluate_at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if step % self._config.evaluate_every == 0 and step < self._config.steps:
            self._evaluate_at(step)


def _arguments(config: AdaptationConfig, folder: RunFolder, device: str) -> TrainingArguments:
    arguments = TrainingArguments(
        str(folder.checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it waits for every loss
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or config.steps,
        save_total_limit=config.keep,
        seed=config.seed,
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"non_blocking": device == "cuda"},
    )
    stay_on_one_gpu(arguments)
    return arguments


def _one_thread(_: int) -> None:
    """Tokenizers that used threads before a process was forked would warn of it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _only(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The one item of a batch, which has all rows already."""
    (item,) = batch
    return item
