"""The losses of a run, step by step, in a file; on the device until they are read, so that no step waits for them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_pass.errors import AdaptationError
from infllm_pass.lowering.export.atomic_file import written_whole


@dataclass(frozen=True)
class StepLoss:
    """One step.

    Attributes:
        step: its number, from 1 on.
        length: tokens of its rows.
        learning_rate: what it was made with.
        loss: mean over its tokens, in nats.
        divergence: from the dense mode, in nats a token; None without distillation.
    """

    step: int
    length: int
    learning_rate: float
    loss: float
    divergence: float | None = None

    @property
    def finite(self) -> bool:
        """Whether training can go on."""
        return math.isfinite(self.loss) and math.isfinite(self.divergence or 0.0)


@dataclass(frozen=True)
class _Pending:
    """A batch whose loss is still on the device."""

    step: int
    length: int
    learning_rate: float
    loss: Tensor
    divergence: Tensor | None


class LossLog:
    """A file of losses, a line of JSON for each step.

    Args:
        file: what is written to.
        last: steps after this one are dropped from the file, which is what a run that is resumed does again.

    Raises:
        AdaptationError: the file of a run that is resumed is damaged.
    """

    def __init__(self, file: Path, last: int = 0) -> None:
        self._file = file
        self._pending: list[_Pending] = []
        self.steps = [each for each in read_losses(file) if each.step <= last] if file.exists() else []
        if [each.step for each in self.steps] != list(range(1, last + 1)):
            raise AdaptationError(f"{file} does not hold the losses of the first {last} steps: the run was changed")
        with written_whole(file) as whole:
            whole.write_text("".join(map(_line, self.steps)), encoding="utf-8")

    def add(self, step: int, length: int, learning_rate: float, loss: Tensor, divergence: Tensor | None) -> None:
        """Take a batch's losses, scalars on any device, without waiting for them."""
        kept = None if divergence is None else divergence.detach()
        self._pending.append(_Pending(step, length, learning_rate, loss.detach(), kept))

    def flush(self) -> list[StepLoss]:
        """Read the losses of all batches since the last call, and append them to the file; one wait for the device."""
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        losses = torch.stack([each.loss.float() for each in pending]).tolist()
        kept = [each.divergence for each in pending if each.divergence is not None]
        divergences = torch.stack([each.float() for each in kept]).tolist() if kept else [None] * len(pending)
        found: dict[int, list[tuple[_Pending, float, float | None]]] = {}
        for batch, loss, divergence in zip(pending, losses, divergences, strict=True):
            found.setdefault(batch.step, []).append((batch, loss, divergence))
        steps = [_mean(parts) for parts in found.values()]
        self.steps += steps
        with self._file.open("a", encoding="utf-8") as stream:
            stream.writelines(map(_line, steps))
        return steps


def _mean(parts: list[tuple[_Pending, float, float | None]]) -> StepLoss:
    """The step that batches are parts of."""
    first = parts[0][0]
    loss = math.fsum(loss for _, loss, _ in parts) / len(parts) if _all_finite(parts) else math.nan
    known = [each for _, _, each in parts if each is not None]
    divergence = sum(known) / len(known) if known else None
    return StepLoss(first.step, first.length, first.learning_rate, loss, divergence)


def _all_finite(parts: list[tuple[_Pending, float, float | None]]) -> bool:
    return all(math.isfinite(loss) for _, loss, _ in parts)


def _line(step: StepLoss) -> str:
    return json.dumps(asdict(step)) + "\n"


def read_losses(file: Path) -> list[StepLoss]:
    """The steps that a file of losses holds; a last line that was cut off is passed over.

    Raises:
        AdaptationError: the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        values: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [StepLoss(**each) for each in values]
    except (OSError, ValueError, TypeError) as error:
        raise AdaptationError(f"{file} holds no losses that can be read: {error}") from error
