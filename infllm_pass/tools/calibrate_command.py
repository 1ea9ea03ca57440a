"""The command ``infllm-pass calibrate``: which channels of the keys token scores should read, in a file."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import infllm_pass
from infllm_pass.calibration.record import Calibration
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CalibrationError
from infllm_pass.tables import Column, FittedTable
from infllm_pass.tools.checkpoint import (
    SMOLLM2,
    corpus,
    load_folder,
    load_folder_tokenizer,
    load_model,
    load_tokenizer,
)
from infllm_pass.tools.output import OutputFormat, print_data

COLUMNS = (
    Column("module", "module", right=False),
    Column("channels", "channels", right=False),
    Column("chosen_by", "chosen by", folds=True, right=False),
    Column("pooled", "missed, pooled", ".3f"),
    Column("tokens", "missed, tokens", ".3f"),
    Column("scorer", "recommended", right=False),
    Column("topk", "topk", "d"),
)


def calibrate_command(
    options: argparse.Namespace, configured: Callable[[SparseAttentionConfig], SparseAttentionConfig], console: Console
) -> None:
    """Calibrate a model on a text, print what was found at every site, and write the file.

    Args:
        options: model, tokenizer, text, tokens, length, out and format.
        configured: puts the fields that were given as options into a configuration.
        console: where lines for people go.

    Raises:
        InfLLMError: as `infllm_pass.calibrate`, and where a file or folder is not what it should be.
    """
    out: Path = options.out
    if out.is_dir() or not out.parent.is_dir():
        raise CalibrationError(f"{out} cannot be written: give a file in a folder that exists")
    config = configured(SparseAttentionConfig())
    public = options.model == SMOLLM2.name
    tokenizer = load_tokenizer() if public else load_folder_tokenizer(options.tokenizer or options.model)
    ids = _ids(tokenizer, options.text, options.tokens)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars and ours would mix
        model = load_model() if public else load_folder(options.model)
    if torch.cuda.is_available():
        model = model.to("cuda")
    found = infllm_pass.calibrate(model, ids, config=config, length=options.length)
    found.save(out)
    if options.format is not OutputFormat.TABLE:
        print_data(options.format, {"path": options.model, **found.to_dict()}, rows_of(found))
    else:
        title = f"{found.model}, {found.tokens} tokens; missed: share of the attention that the worst rows lose"
        console.print(FittedTable(COLUMNS, rows_of(found), title))
        scorers = Counter(site.scorer for site in found.sites if site.scorer is not None)
        if scorers:
            counts = ", ".join(f"{name} at {count}" for name, count in sorted(scorers.items()))
            console.print(f"recommended scorers: {counts} of {len(found.sites)} sites")
        else:
            console.print("the text is no longer than the budget: channels only, nothing is recommended")
    console.print(f"written: {out}", soft_wrap=True)


def rows_of(calibration: Calibration) -> list[dict[str, Any]]:
    """A flat row for each site."""
    return [
        {
            "module": site.module,
            "order": site.order,
            "channels": f"{len(site.channels[0])} of {site.head_dim}",
            "chosen_by": site.chosen_by,
            "pooled": site.missed.get("pooled"),
            "tokens": site.missed.get("tokens"),
            "scorer": site.scorer,
            "topk": site.topk,
        }
        for site in calibration.sites
    ]


def _ids(tokenizer: Any, file: Path | None, tokens: int) -> Tensor:
    """Token ids of a text, int64 ``[1, N]``, at most so many.

    Raises:
        CalibrationError: the file cannot be read, or holds no text.
    """
    if file is None:
        return corpus(tokenizer, tokens)
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file} cannot be read as text: {error}") from error
    if not text.strip():
        raise CalibrationError(f"{file} is empty: give a text like the model's later input, some thousand tokens")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids[:tokens]], dtype=torch.int64)
