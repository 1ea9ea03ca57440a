"""What a run tells while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from infllm_pass.adaptation.losses import StepLoss


@dataclass(frozen=True)
class LogLine:
    """What is told every `log_every` steps.

    Attributes:
        step: the last step.
        steps: of how many.
        losses: the steps since the last line.
        grad_norm: of the last step, before it was scaled.
        tokens_per_second: since the last line, evaluations and checkpoints left out.
    """

    step: int
    steps: int
    losses: tuple[StepLoss, ...]
    grad_norm: float | None
    tokens_per_second: float


class Progress(Protocol):
    """Takes what a run tells."""

    def stage(self, what: str, done: int, total: int) -> None:
        """A part of the run that is not training: what is being done, how much is done, and out of how much."""

    def line(self, line: LogLine) -> None:
        """Steps of training."""

    def note(self, text: str) -> None:
        """A remark."""


class Silent:
    """Tells nobody."""

    def stage(self, what: str, done: int, total: int) -> None:
        """Nothing."""

    def line(self, line: LogLine) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
