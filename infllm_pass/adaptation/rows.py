"""The batches of a training run: packed documents and synthetic tasks, in buckets of lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from infllm_pass.adaptation.documents import Documents
from infllm_pass.adaptation.packing import Span, joined, packed_rows, written_row
from infllm_pass.adaptation.tasks import TRAINING_TASKS, Sampler
from infllm_pass.errors import AdaptationError, ConfigError
from infllm_pass.evaluation.samples import Writer

GOLDEN = (math.sqrt(5) - 1) / 2
"""Steps of this size around a circle of circumference 1 leave no gaps: each arc gets its share of any run of steps."""

SILVER = math.sqrt(2) - 1
"""The same for tasks: no rational combination of the two, so that every bucket gets its share of tasks."""

SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Bucket:
    """Rows of one length.

    Attributes:
        length: tokens of a row.
        share: of the training steps, and so of the tokens; more than 0, at most 1.

    Raises:
        ConfigError: a value is out of its range.
    """

    length: int
    share: float

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ConfigError("length", self.length, "at least 2 tokens")
        if not 0 < self.share <= 1:
            raise ConfigError("share", self.share, "more than 0, at most 1")


class TrainingRows(Dataset[dict[str, Tensor]]):
    """The batches of a run, by step: step `i` follows from the arguments, the seed and `i` alone.

    A batch has ``input_ids``, ``labels`` and ``position_ids``, int64 ``[rows, length]``, with the length of one bucket
    and ``rows = tokens_per_step // length``. Buckets and tasks have their shares in every run of steps, not only in the
    whole. Within a bucket every document is read once before any is read again, cut at other places each time.

    A row holds pieces of documents, each after the tokens that the tokenizer puts before a text. ``position_ids`` begin
    at 0 with each piece, of which models of transformers make a mask that keeps pieces apart where they get no
    ``attention_mask``; the label of a piece's first token is -100. A row with a task is one piece, and all its tokens
    have labels.

    Args:
        documents: what to train on.
        buckets: the lengths and their shares, which add up to 1.
        tokens_per_step: tokens of a batch, at least those of the longest row.
        steps: how many batches.
        task_share: share of the rows that hold a synthetic task, 0 to 1.
        tasks: names out of `tasks.TRAINING_TASKS`, drawn alike.
        tokenizer: the tokenizer that the documents were read with.
        seed: any number; another one gives other rows.

    Raises:
        AdaptationError: the documents have fewer tokens than the longest row, or a task does not fit a bucket.
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        documents: Documents,
        buckets: Sequence[Bucket],
        *,
        tokens_per_step: int,
        steps: int,
        task_share: float,
        tasks: Sequence[str],
        tokenizer: Any,
        seed: int,
    ) -> None:
        self.documents = documents
        self.buckets = tuple(buckets)
        self.tokens_per_step = tokens_per_step
        self.steps = steps
        self.task_share = task_share
        self.tasks = tuple(tasks)
        self.seed = seed
        self._check()
        writer = Writer(tokenizer)
        self._prefix = torch.tensor(writer.prefix, dtype=torch.int64)
        self._check_lengths()
        self._sampler = Sampler(writer, documents)
        draw = random.Random(f"phases {seed}")
        self._phases = draw.random(), draw.random()
        self._bounds = [sum(each.share for each in self.buckets[: n + 1]) for n in range(len(self.buckets))]
        self._spans = [documents.span(number) for number in range(len(documents))]
        self._read: dict[int, tuple[int, list[tuple[Span, ...]]]] = {}
        self._rows_of_epoch: dict[int, list[int]] = {number: [] for number in range(len(self.buckets))}
        self._first_rows = self._counted()
        self._check_tasks()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        number = self.bucket_of(step)
        length = self.buckets[number].length
        draw = random.Random(f"step {self.seed} {step}")
        place = self._first_rows[step]
        rows: list[dict[str, Tensor]] = []
        for is_task in self._are_tasks(step):
            if is_task:
                sample = self._sampler.sample(draw.choice(self.tasks), length, draw)
                rows.append(joined([torch.tensor(sample, dtype=torch.int64)]))
            else:
                rows.append(written_row(self.documents.ids, self._packed(number, place), length, self._prefix))
                place += 1
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def bucket_of(self, step: int) -> int:
        """Which bucket a step's rows are of."""
        place = (self._phases[0] + step * GOLDEN) % 1
        return next((n for n, bound in enumerate(self._bounds) if place < bound), len(self._bounds) - 1)

    def _are_tasks(self, step: int) -> list[bool]:
        """Which rows of a step hold tasks."""
        rows = self.tokens_per_step // self.buckets[self.bucket_of(step)].length
        place = self._phases[1] + step * SILVER
        return [(place + row / rows) % 1 < self.task_share for row in range(rows)]

    def _counted(self) -> list[int]:
        """For every step, how many rows of documents its bucket had before."""
        counts = [0] * len(self.buckets)
        found = []
        for step in range(self.steps):
            number = self.bucket_of(step)
            found.append(counts[number])
            counts[number] += self._are_tasks(step).count(False)
        return found

    def _packed(self, number: int, place: int) -> tuple[Span, ...]:
        """The pieces of a bucket's row, counted over all readings of the documents."""
        known = self._rows_of_epoch[number]
        epoch = 0
        while True:
            if epoch == len(known):
                known.append(len(self._epoch(number, epoch)))
            if place < known[epoch]:
                return self._epoch(number, epoch)[place]
            place -= known[epoch]
            epoch += 1

    def _epoch(self, number: int, epoch: int) -> list[tuple[Span, ...]]:
        """The rows of one reading of all documents; those of the last one asked for are kept."""
        kept = self._read.get(number)
        if kept is None or kept[0] != epoch:
            draw = random.Random(f"epoch {self.seed} {number} {epoch}")
            length = self.buckets[number].length
            kept = epoch, packed_rows(self._spans, length, len(self._prefix), draw)
            self._read[number] = kept
        return kept[1]

    def _check(self) -> None:
        """Refuse values out of their range."""
        lengths = [bucket.length for bucket in self.buckets]
        if not lengths or len(set(lengths)) < len(lengths):
            raise ConfigError("buckets", self.buckets, "at least one, each of another length")
        total = sum(bucket.share for bucket in self.buckets)
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ConfigError("buckets", self.buckets, f"shares that add up to 1, not to {total:g}")
        if self.tokens_per_step < max(lengths):
            raise ConfigError("tokens_per_step", self.tokens_per_step, f"at least a row of {max(lengths)} tokens")
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "at least 1")
        if not 0 <= self.task_share <= 1:
            raise ConfigError("task_share", self.task_share, "0 to 1")
        for task in self.tasks:
            if task not in TRAINING_TASKS:
                raise ConfigError("tasks", task, f"one of {', '.join(TRAINING_TASKS)}")
        if self.task_share and not self.tasks:
            raise ConfigError("tasks", self.tasks, f"at least one of {', '.join(TRAINING_TASKS)}, or task_share=0")

    def _check_lengths(self) -> None:
        """Refuse texts that do not fill a row, and rows that the prefix fills."""
        lengths = [bucket.length for bucket in self.buckets]
        if len(self.documents.ids) < max(lengths):
            raise AdaptationError(
                f"the documents have {len(self.documents.ids)} tokens and a row has {max(lengths)}: give more text or "
                "shorter rows"
            )
        if min(lengths) <= len(self._prefix):
            raise ConfigError(
                "buckets", min(lengths), f"rows longer than the {len(self._prefix)} tokens before every text"
            )

    def _check_tasks(self) -> None:
        """Refuse tasks that do not fit the shortest rows."""
        if self.task_share:
            for task in self.tasks:
                self._sampler.check(task, min(bucket.length for bucket in self.buckets))
