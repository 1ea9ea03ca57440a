"""The folder that a run writes to: which run it belongs to, its checkpoints, and whether the disk has room."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infllm_pass.adaptation.config import AdaptationConfig
from infllm_pass.adaptation.documents import Documents
from infllm_pass.errors import AdaptationError
from infllm_pass.lowering.export.atomic_file import written_whole

COMPLETE = "complete.json"
"""The file of a checkpoint that is written last: without it, the checkpoint is half-written."""

SAMPLED = 4096
"""Numbers of each parameter that tell one model from another."""

SPARE_BYTES = 64 * 2**20
"""What losses, evaluations and pictures take, generously."""

OF_NO_ACCOUNT = ("keep", "log_every", "workers", "checkpoint_every", "evaluate_every", "evaluation")
"""Fields of a configuration that a resumed run may change: they leave every step as it was."""


def fingerprint(
    config: AdaptationConfig, model: nn.Module, tokenizer: Any, documents: Documents, device: str
) -> dict[str, Any]:
    """What a run depends on: its configuration, and digests of model, tokenizer and text.

    Args:
        config: the configuration.
        model: the model before training; of each of its parameters, `SAMPLED` numbers are read.
        tokenizer: its tokenizer.
        documents: what is trained on.
        device: where.
    """
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights.update(_bytes(parameter.detach().flatten()[:SAMPLED]))
    text = hashlib.sha256(_bytes(documents.ids))
    text.update(_bytes(documents.starts))
    words = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    settings: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return {
        "config": {name: value for name, value in settings.items() if name not in OF_NO_ACCOUNT},
        "model": weights.hexdigest(),
        "tokenizer": words.hexdigest(),
        "text": text.hexdigest(),
        "device": device,
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


class RunFolder:
    """A folder that holds one run.

    Args:
        path: the folder; made by `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.losses = path / "losses.jsonl"
        self.model = path / "model"
        self._run = path / "run.json"

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that cannot be written to, or that holds a run where none is resumed, or the other way round.

        Raises:
            AdaptationError: as said.
        """
        if self.path.exists() and not self.path.is_dir():
            raise AdaptationError(f"{self.path} is a file: name a folder, or a path where one can be made")
        if self._run.exists() and not resume:
            raise AdaptationError(f"{self.path} holds a run: resume it, or name another folder")
        if resume and not self._run.exists():
            raise AdaptationError(f"{self.path} holds no run to resume: begin one, or name its folder")
        if self.model.exists() and not resume:
            raise AdaptationError(f"{self.model} exists: name another folder")

    def begin(self, found: Mapping[str, Any], *, needed: int, resume: bool) -> Path | None:
        """Make the folder, or go on in it.

        Args:
            found: the run's `fingerprint`.
            needed: bytes that the run writes.
            resume: whether to go on.

        Returns:
            The last whole checkpoint to go on from; None: begin at the first step.

        Raises:
            AdaptationError: the folder is another run's, or the disk has no room.
        """
        self.check(resume=resume)
        if resume:
            self._check_same(found)
        checkpoint = self._last_checkpoint() if resume else None
        self._check_room(needed)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdaptationError(f"{self.path} cannot be made: {error}") from error
        if not resume:
            self.write_json("run.json", found)
        return checkpoint

    def write_json(self, name: str, data: object) -> Path:
        """Write a file of JSON, whole or not at all."""
        return self.write(name, (json.dumps(data, indent=2) + "\n").encode())

    def write(self, name: str, content: bytes) -> Path:
        """Write a file, whole or not at all; folders in its name are made."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as whole:
            whole.write_bytes(content)
        return file

    def _check_same(self, found: Mapping[str, Any]) -> None:
        try:
            kept = json.loads(self._run.read_text(encoding="utf-8"))
            parts = {name: kept[name] for name in found}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdaptationError(f"{self._run} does not say which run it belongs to: {error!r}") from error
        wrong = [name for name in found if name != "config" and parts[name] != found[name]]
        for name, value in found["config"].items():
            if parts["config"].get(name) != value:
                wrong.append(f"{name} (was {parts['config'].get(name)!r}, is {value!r})")
        if wrong:
            raise AdaptationError(
                f"{self.path} holds another run; these differ: {', '.join(wrong)}: resume with what it was begun with, "
                "or name another folder"
            )

    def _last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; half-written ones are removed."""
        found = {}
        for folder in self.checkpoints.glob("checkpoint-*"):
            number = folder.name.rpartition("-")[2]
            if (folder / COMPLETE).is_file() and number.isdecimal():
                found[int(number)] = folder
            else:
                shutil.rmtree(folder)
        return found[max(found)] if found else None

    def _check_room(self, needed: int) -> None:
        place = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        taken = sum(file.stat().st_size for file in self.checkpoints.rglob("*") if file.is_file())
        free = shutil.disk_usage(place).free + taken  # checkpoints of a run that is resumed are written over
        if free < needed:
            raise AdaptationError(
                f"the run writes up to {needed / 2**30:.2f} GiB to {self.path}, and the disk has {free / 2**30:.2f}: "
                "free some, name a folder elsewhere, or keep no checkpoints (checkpoint_every=0)"
            )


def bytes_written(model: nn.Module, config: AdaptationConfig) -> int:
    """Bytes that a run writes at most: checkpoints of weights and AdamW's two moments, one more than are kept, the
    adapted model, and what is small.
    """
    trained = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
    whole = sum(each.numel() * each.element_size() for each in model.parameters())
    # A checkpoint that cannot be finished leaves the ones before it whole.
    checkpoints = (config.keep + 1) * 3 * trained if config.checkpoint_every else 0
    return checkpoints + whole + SPARE_BYTES
