"""Continues the training of a causal language model with sparse attention: data, loop, evaluations, saved model."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infllm_pass.adaptation.adapters import whole_model, with_adapters
from infllm_pass.adaptation.config import AdaptationConfig
from infllm_pass.adaptation.curves import draw_curves
from infllm_pass.adaptation.documents import Documents, read_documents
from infllm_pass.adaptation.losses import LossLog, StepLoss
from infllm_pass.adaptation.progress import Progress, Silent
from infllm_pass.adaptation.rotary import extend_positions
from infllm_pass.adaptation.rows import TrainingRows
from infllm_pass.adaptation.run_folder import RunFolder, bytes_written, fingerprint
from infllm_pass.errors import AdaptationError, DeviceError, MissingDependencyError, UnsupportedModelError
from infllm_pass.evaluation.evaluate import evaluate, positions_of
from infllm_pass.evaluation.plots import require_matplotlib
from infllm_pass.evaluation.samples import Writer
from infllm_pass.evaluation.tasks import PERPLEXITY, draw_samples, haystacks, windows
from infllm_pass.evaluation.texts import Text, standard_texts
from infllm_pass.frontend.api import dense_mode, original_of, sparsify
from infllm_pass.lowering.export.atomic_file import written_whole

Paths = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Adapted:
    """A finished run.

    Attributes:
        model: the folder of the adapted model, for ``from_pretrained``.
        losses: every step's loss.
        evaluations: what was evaluated, as `Evaluation.to_dict`, by the step after which; 0 is before the training.
        facts: sizes of text and model, steps and tokens.
    """

    model: Path
    losses: tuple[StepLoss, ...]
    evaluations: dict[int, dict[str, Any]]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single losses, as plain data."""
        last = self.losses[-50:]
        return {
            **self.facts,
            "model": str(self.model),
            "last_loss": sum(each.loss for each in last) / len(last),
            "evaluations": {str(step): found for step, found in self.evaluations.items()},
        }


def adapt(
    model: Any,
    tokenizer: Any,
    files: Paths,
    output_dir: str | os.PathLike[str],
    config: AdaptationConfig | None = None,
    *,
    held_out: Sequence[Text] | None = None,
    prefix: Sequence[int] | None = None,
    resume: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Adapted:
    """Continue the training of a causal language model with sparse attention, on long text files.

    Trains ``sparsify(torch.compile(model))`` by the `Trainer` of transformers, on documents packed to rows of some
    lengths and on synthetic tasks among them; rows shorter than ``dense_len`` are dense, as is every document in a row
    that is shorter. Whatever can be refused is, before anything is written. The folder gets ``run.json`` (what the run
    depends on), ``losses.jsonl`` (a line for each step), ``checkpoints/``, ``evaluations/``, ``curves.png``,
    ``adaptation.json``, and at the end ``model/``, whose configuration carries ``sparse_config`` (none after a dense
    control).

    Args:
        model: a causal language model of transformers, with weights in float32; it is trained in place, or
            its weights are where its positions are extended.
        tokenizer: its tokenizer.
        files: text files and folders of text files, see `documents.read_documents`.
        output_dir: a folder for everything that is written; a new one, unless the run is resumed.
        config: what to do; None: the defaults.
        held_out: texts of evaluations, which are not to be trained on; None: `evaluation.standard_texts`.
        prefix: token ids before every text of an evaluation; None: those that the tokenizer puts there.
        resume: go on from the folder's last checkpoint, with the same arguments; the losses are those of an unbroken
            run.
        device: "cpu" or "cuda"; None: a GPU if there is one.
        progress: is told what is going on.

    Returns:
        What came of it.

    Raises:
        AdaptationError: the text, the tokenizer or a length does not fit the model, the folder is another run's, the
            disk has no room, or a loss is not finite, whose batch is then saved.
        ConfigError: a value is out of its range.
        EvaluationError: a held-out text is too short for what evaluations ask for.
        UnsupportedModelError: `model` is no plain causal language model of transformers.
        MissingDependencyError: transformers, accelerate, matplotlib or, with adapters, peft is not installed.
        NoAttentionSiteError: nothing in the model became switchable.
    """
    chosen = config or AdaptationConfig()
    require_packages(chosen)
    device = _device(device)
    told = progress or Silent()
    original = _plain(model)
    folder = RunFolder(Path(output_dir))
    folder.check(resume=resume)
    vocabulary = _checked_vocabulary(original, tokenizer)
    if chosen.extend_to is not None:
        original = _extended(original, chosen.extend_to, chosen.extend_kind)
    _check_positions(original, chosen)
    _check_evaluations(tokenizer, chosen, held_out, prefix)
    documents = read_documents(files, tokenizer, vocabulary=vocabulary, tell=told.stage)
    rows = _rows(documents, tokenizer, chosen)
    found = fingerprint(chosen, original, tokenizer, documents, device)
    run = _Run(original.to(device), tokenizer, chosen, folder, told, held_out=held_out, prefix=prefix)
    checkpoint = folder.begin(found, needed=bytes_written(run.trained, chosen), resume=resume)
    last = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    told.note(
        f"{len(documents)} documents, {len(documents.ids)} tokens; {chosen.steps} steps of {chosen.tokens_per_step} "
        f"tokens on {device}" + (f", from step {last + 1} on" if resume else "")
    )
    run.evaluate_at(0)
    losses = run.train(rows, device, checkpoint, last)
    run.evaluate_at(chosen.steps)
    facts = {
        "documents": len(documents),
        "text_tokens": len(documents.ids),
        "trained_tokens": chosen.steps * chosen.tokens_per_step,
        "parameters": sum(each.numel() for each in original.parameters()),
        "config": chosen.to_dict(),
        "versions": {name: metadata.version(name) for name in ("infllm-pass", "torch", "transformers", "accelerate")},
    }
    adapted = Adapted(run.save(), tuple(losses), run.evaluations, facts)
    run.draw(losses)
    folder.write_json("adaptation.json", adapted.to_dict())
    return adapted


class _Run:
    """A model in training, its evaluations, and what is written of it."""

    def __init__(
        self,
        original: Any,
        tokenizer: Any,
        config: AdaptationConfig,
        folder: RunFolder,
        told: Progress,
        *,
        held_out: Sequence[Text] | None,
        prefix: Sequence[int] | None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.told = told
        self.evaluations: dict[int, dict[str, Any]] = _kept_evaluations(folder)
        self._tokenizer = tokenizer
        self._use_cache = original.config.use_cache
        self.trained = with_adapters(original, config) if config.lora else original
        self._evaluated = sparsify(torch.compile(self.trained, backend="eager"), config.sparse_config, strict=True)
        self._evaluate = partial(
            evaluate, self._evaluated, tokenizer, settings=config.task_settings, texts=held_out, prefix=prefix
        )

    def evaluate_at(self, step: int) -> None:
        """Evaluate in both modes, unless that was done before the run was broken off."""
        if step in self.evaluations:
            return

        def tell(what: str, done: int, total: int) -> None:
            self.told.stage(f"evaluation after {step} steps, {what}", done, total)

        with self._precision():
            found = self._evaluate(locality=False, tell=tell)
        self.evaluations[step] = found.to_dict()
        self.folder.write_json(f"evaluations/step-{step:06}.json", self.evaluations[step])
        self.told.note(f"evaluation after {step} steps\n{found}")

    def train(self, rows: TrainingRows, device: str, checkpoint: Path | None, last: int) -> list[StepLoss]:
        """Train to the last step, from a checkpoint on if there is one; the losses of all steps."""
        from infllm_pass.adaptation.trainer import AdaptationTrainer, Losses, text_loss

        config, trained = self.config, self.trained
        if config.gradient_checkpointing:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Rows come in a few shapes, for each of which a graph of fixed sizes is the fastest.
        compiled = torch.compile(trained, backend=config.backend, dynamic=False)
        sparse: Any = sparsify(compiled, config.sparse_config, strict=True)
        losses: Losses = text_loss
        if config.distill:
            from infllm_pass.adaptation.distillation import Distilled

            losses = Distilled(sparse, trained, config.distill)
        log = LossLog(self.folder.losses, last)
        trainer = AdaptationTrainer(
            sparse,
            trained,
            rows,
            config,
            self.folder,
            log,
            device=device,
            losses=losses,
            tell=self.told.line,
            evaluate_at=self.evaluate_at,
        )
        with dense_mode(sparse) if config.attention == "dense" else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if config.gradient_checkpointing:
            trained.gradient_checkpointing_disable()
        return log.steps

    def save(self) -> Path:
        """The adapted model and its tokenizer, whole or not at all."""
        model = whole_model(self.trained)
        model.config.use_cache = self._use_cache
        if self.config.attention == "sparse":
            model.config.sparse_config = self.config.sparse_config.to_dict()
        if self.folder.model.exists():
            return self.folder.model
        with written_whole(self.folder.model) as whole:
            model.eval().save_pretrained(whole)
            self._tokenizer.save_pretrained(whole)
        return self.folder.model

    def draw(self, losses: Sequence[StepLoss]) -> None:
        """The picture of the run."""
        self.folder.write("curves.png", draw_curves(losses, self.evaluations))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        device = next(self.trained.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            yield


def require_packages(config: AdaptationConfig) -> None:
    """Find out whether what a run needs is installed.

    Raises:
        MissingDependencyError: something is not.
    """
    require_matplotlib()
    purpose = "training a model"
    needed = [("transformers", "hf"), ("accelerate", "hf"), *([("peft", "peft")] if config.lora else [])]
    for package, extra in needed:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise MissingDependencyError(package, extra, purpose) from None


def _plain(model: Any) -> Any:
    """The model as it was given, once it is known to be one that can be trained."""
    original, _ = original_of(model) if isinstance(model, nn.Module) else (model, None)
    if original is not model or not isinstance(model, nn.Module):
        raise UnsupportedModelError("adapt compiles and sparsifies the model itself: pass the plain model")
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"adapt takes a causal language model of transformers, not a {type(model).__name__}"
        )
    return model


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} was asked for: name 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, and torch sees no GPU: train on the CPU")
    return device


def _checked_vocabulary(model: Any, tokenizer: Any) -> int:
    """How many token ids the model knows.

    Raises:
        AdaptationError: the tokenizer has more.
    """
    known = int(model.get_input_embeddings().weight.shape[0])
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= known:
        raise AdaptationError(
            f"the tokenizer has token ids up to {largest}, and the model knows ids below {known}: take the model's own "
            "tokenizer, or resize its embeddings first"
        )
    return known


def _check_positions(model: Any, config: AdaptationConfig) -> None:
    positions = positions_of(model)
    longest = max(config.longest, *config.task_settings.lengths)
    if positions is not None and longest > positions:
        raise AdaptationError(
            f"rows or evaluations have {longest} tokens, and {type(model).__name__} has {positions} positions: take "
            "shorter ones, or extend its positions (extend_to)"
        )


def _check_evaluations(
    tokenizer: Any, config: AdaptationConfig, held_out: Sequence[Text] | None, prefix: Sequence[int] | None
) -> None:
    """Draw what evaluations ask for, which refuses what does not fit."""
    settings, writer = config.task_settings, Writer(tokenizer, prefix)
    texts = haystacks(writer, standard_texts() if held_out is None else held_out)
    if PERPLEXITY in settings.tasks:
        windows(writer, texts, settings.lengths)
    draw_samples(writer, texts, settings)


def _extended(model: Any, length: int, kind: str) -> Any:
    """A model with more positions and the same weights, which are not copied."""
    extended = type(model)(extend_positions(model.config, length, kind))
    extended.load_state_dict(model.state_dict(), assign=True)
    extended.tie_weights()
    extended.generation_config = model.generation_config
    return extended


def _rows(documents: Documents, tokenizer: Any, config: AdaptationConfig) -> TrainingRows:
    return TrainingRows(
        documents,
        config.buckets,
        tokens_per_step=config.tokens_per_step // config.accumulation,
        steps=config.micro_batches,
        task_share=config.task_share,
        tasks=config.tasks,
        tokenizer=tokenizer,
        seed=config.seed,
    )


def _kept_evaluations(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """What was evaluated before a run was broken off."""
    files = sorted((folder.path / "evaluations").glob("step-*.json"))
    return {int(file.stem.rpartition("-")[2]): json.loads(file.read_text(encoding="utf-8")) for file in files}
