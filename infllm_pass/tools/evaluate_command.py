"""The command ``infllm-pass evaluate``: what a model loses by sparse attention."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import ConfigError, DeviceError
from infllm_pass.evaluation import Evaluation, TaskSettings, default_config, evaluate, read_texts
from infllm_pass.evaluation.evaluate import Tell, positions_of
from infllm_pass.evaluation.plots import draw_depths, draw_locality, draw_perplexity, require_matplotlib
from infllm_pass.lowering.export.atomic_file import written_whole
from infllm_pass.tools.checkpoint import SMOLLM2, load_folder, load_folder_tokenizer, load_model, load_tokenizer
from infllm_pass.tools.output import OutputFormat, print_data

QUICK = TaskSettings()
"""Some minutes on two CPU cores with the public checkpoint."""

FULL = TaskSettings(lengths=(2048, 4096, 8192), depths=(0.0, 0.25, 0.5, 0.75, 1.0), samples=4)
"""What ``--full`` runs: an hour on a CPU."""


def evaluate_command(
    options: argparse.Namespace,
    configured: Callable[[SparseAttentionConfig], Sequence[SparseAttentionConfig]],
    console: Console,
) -> None:
    """Evaluate a model, print the tables, and write figures and pictures.

    Args:
        options: model, tokenizer, texts, settings, device, out and format.
        configured: the configurations that options give, from what is not given.
        console: where lines for people go.

    Raises:
        InfLLMError: as `infllm_pass.evaluate`, and where a file or folder is not what it should be.
    """
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise ConfigError("out", str(out), "a folder, or a path where one can be made")
    require_matplotlib()
    device = _device(options.device)
    settings = _settings(options)
    texts = read_texts(options.text) if options.text else None
    public = options.model == SMOLLM2.name
    # GGUF files make the tokenizer put a token before every text that the model was not trained with.
    prefix = () if public else None
    tokenizer = load_tokenizer() if public else load_folder_tokenizer(options.tokenizer or options.model)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars and ours would mix
        model = load_model(dtype) if public else load_folder(options.model, dtype)
    positions = positions_of(model)
    if options.lengths is None and positions is not None:
        fitting = tuple(dict.fromkeys(min(length, positions) for length in settings.lengths))
        settings = replace(settings, lengths=fitting)
    configs = configured(default_config(max(settings.lengths)))
    with _progress(console) as tell:
        found = evaluate(
            model.to(device),
            tokenizer,
            configs,
            settings=settings,
            texts=texts,
            prefix=prefix,
            calibration=options.calibration,
            backend=options.backend,
            generate=options.generate,
            tell=tell,
        )
    written = _write(out, options.model, found)
    if options.format is not OutputFormat.TABLE:
        print_data(options.format, {"path": options.model, **found.to_dict()}, found.to_rows())
    else:
        for table in found.tables():
            console.print(table)
        console.print(
            "blocks: visited key blocks, of those that a query sees; change: against dense; right: answers whose "
            "tokens are all the likeliest ones; nll: mean negative log-likelihood of an answer's tokens; kept: visited "
            "blocks that the token before visited too, in the second half of the longest texts; least: of one token; "
            "bound: what query-agnostic blocks guarantee"
        )
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, and torch sees no GPU: use --device cpu")
    return "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")


def _settings(options: argparse.Namespace) -> TaskSettings:
    """The settings that options give."""
    names = ("tasks", "lengths", "depths", "samples", "digits", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in given.items()}
    return replace(FULL if options.full else QUICK, **values)


@contextmanager
def _progress(console: Console) -> Iterator[Tell]:
    """A bar over the passes; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield tell


def _write(folder: Path, model: str, found: Evaluation) -> list[Path]:
    """Figures and pictures as files."""
    figures: dict[str, Any] = {"path": model, **found.to_dict()}
    files = {
        "evaluation.json": (json.dumps(figures, indent=2) + "\n").encode(),
        "needles.png": draw_depths(found),
        "perplexity.png": draw_perplexity(found),
        "locality.png": draw_locality(found),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in files.items():
        if content is not None:
            with written_whole(folder / name) as file:
                file.write_bytes(content)
            written.append(folder / name)
    return written
