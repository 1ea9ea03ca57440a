"""The command ``infllm-pass adapt``: continue a model's training with sparse attention."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infllm_pass.adaptation.adapt import Adapted, adapt, require_packages
from infllm_pass.adaptation.config import EVALUATED, AdaptationConfig, default_sparse
from infllm_pass.adaptation.progress import LogLine
from infllm_pass.adaptation.rows import Bucket
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import ConfigError
from infllm_pass.evaluation import TaskSettings, read_texts
from infllm_pass.tables import Column, FittedTable
from infllm_pass.tools.checkpoint import SMOLLM2, load_folder, load_folder_tokenizer, load_model, load_tokenizer
from infllm_pass.tools.output import OutputFormat, print_data

DENSE = "dense"
"""The word of ``--scorer`` for a control that is trained without sparse attention."""

PLAIN = tuple(
    field.name
    for field in fields(AdaptationConfig)
    if field.name not in ("buckets", "attention", "sparse", "evaluation", "tasks")
)
"""Fields of the configuration whose option has their name."""


def adapt_command(
    options: argparse.Namespace,
    configured: Callable[[SparseAttentionConfig], SparseAttentionConfig],
    console: Console,
) -> None:
    """Adapt a model, and print what came of it.

    Args:
        options: model, tokenizer, files, out, what `AdaptationConfig` has, and format.
        configured: the sparse configuration that options give, from what is not given.
        console: where lines for people go.

    Raises:
        InfLLMError: as `infllm_pass.adapt`, and where a file or folder is not what it should be.
    """
    config = config_of(options, configured)
    require_packages(config)
    texts = read_texts(options.held_out) if options.held_out else None
    public = options.model == SMOLLM2.name
    tokenizer = load_tokenizer() if public else load_folder_tokenizer(options.tokenizer or options.model)
    if public:
        # GGUF files make some versions put a token before every text that the model was not trained with.
        tokenizer.add_bos_token = False
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars and ours would mix
        model = load_model(torch.float32) if public else load_folder(options.model, torch.float32)
    with _quiet(), _progress(console) as progress:
        adapted = adapt(
            model,
            tokenizer,
            options.files,
            options.out,
            config,
            held_out=texts,
            resume=options.resume,
            device=None if options.device == "auto" else options.device,
            progress=progress,
        )
    if options.format is not OutputFormat.TABLE:
        print_data(options.format, {"path": options.model, **adapted.to_dict()}, _rows(adapted))
    else:
        console.print(FittedTable(_COLUMNS, _rows(adapted), "answers: share found, all tasks"))
    console.print(f"written: {options.out}, the model in {adapted.model}", soft_wrap=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars, and its remarks on what is as it should be, out of the output."""
    import transformers

    logs: Any = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def config_of(
    options: argparse.Namespace, configured: Callable[[SparseAttentionConfig], SparseAttentionConfig]
) -> AdaptationConfig:
    """The configuration that options give.

    Raises:
        ConfigError: a value is out of its range.
    """
    defaults = AdaptationConfig()
    given = {name: getattr(options, name) for name in PLAIN if getattr(options, name, None) is not None}
    lengths = tuple(options.lengths or (bucket.length for bucket in defaults.buckets))
    shares = options.shares or [1 / len(lengths)] * len(lengths)
    if len(shares) != len(lengths):
        raise ConfigError("shares", options.shares, f"a share for each of the {len(lengths)} lengths")
    longest = max(lengths)
    base = default_sparse(longest)
    if options.scorer != DENSE:
        base = replace(base, scorer=options.scorer)
    given["sparse"] = configured(base)
    if options.tasks is not None:
        given["tasks"] = tuple(options.tasks)
    evaluation: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (
            ("tasks", options.evaluation_tasks or EVALUATED),
            ("lengths", options.evaluation_lengths or [longest]),
            ("samples", options.evaluation_samples),
        )
        if value is not None
    }
    return AdaptationConfig(
        **given,
        buckets=tuple(Bucket(length, share) for length, share in zip(lengths, shares, strict=True)),
        attention="dense" if options.scorer == DENSE else "sparse",
        evaluation=TaskSettings(**evaluation),
    )


_COLUMNS = (
    Column("step", "after step"),
    Column("tokens", "tokens"),
    Column("side", "attention", right=False),
    Column("perplexity", "perplexity", ".3f"),
    Column("answers", "answers", ".3f"),
)


def _rows(adapted: Adapted) -> list[dict[str, Any]]:
    """A row for each evaluation, length and side."""
    rows = []
    for step, found in sorted(adapted.evaluations.items()):
        lengths = dict.fromkeys(row["tokens"] for row in (*found["perplexity"], *found["tasks"]))
        for length in lengths:
            texts = [row for row in found["perplexity"] if row["tokens"] == length]
            tasks = [row for row in found["tasks"] if row["tokens"] == length]
            for side in dict.fromkeys(row["side"] for row in (*texts, *tasks)):
                own = [row["perplexity"] for row in texts if row["side"] == side]
                asked = [row for row in tasks if row["side"] == side]
                answers = sum(row["answers"] for row in asked)
                rows.append(
                    {
                        "step": step,
                        "tokens": length,
                        "side": side,
                        "perplexity": own[-1] if own else None,  # the last row is that of all texts
                        "answers": sum(row["exact"] * row["answers"] for row in asked) / answers if answers else None,
                    }
                )
    return rows


class _Shown:
    """Bars in a terminal, and lines."""

    def __init__(self, console: Console, bars: Progress) -> None:
        self._console = console
        self._bars = bars
        self._task = bars.add_task("", total=None)

    def stage(self, what: str, done: int, total: int) -> None:
        """Move the bar."""
        self._bars.update(self._task, description=what, completed=done, total=total)

    def line(self, line: LogLine) -> None:
        """A line for some steps."""
        self._bars.update(self._task, description="training", completed=line.step, total=line.steps)
        by_length: dict[int, list[float]] = {}
        for step in line.losses:
            by_length.setdefault(step.length, []).append(step.loss)
        losses = ", ".join(f"{length}: {sum(own) / len(own):.4f}" for length, own in sorted(by_length.items()))
        known = [step.divergence for step in line.losses if step.divergence is not None]
        divergence = f", divergence {sum(known) / len(known):.4f}" if known else ""
        norm = "" if line.grad_norm is None else f", gradient {line.grad_norm:.3f}"
        self.note(
            f"step {line.step} of {line.steps}, loss by length {losses}{divergence}, rate "
            f"{line.losses[-1].learning_rate:.2e}{norm}, {line.tokens_per_second:.0f} tokens/s"
        )

    def note(self, text: str) -> None:
        """A remark, at once."""
        self._console.print(text, highlight=False, soft_wrap=True)
        self._console.file.flush()


@contextmanager
def _progress(console: Console) -> Iterator[_Shown]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _Shown(console, bars)
