"""`calibrate`: which channels, scorers and budgets suit a model, measured on text."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from infllm_pass.calibration.measure import Observer, run_calibration
from infllm_pass.calibration.record import Calibration, describe_model
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CalibrationError, CarriedError
from infllm_pass.frontend.api import ConfigLike, original_of
from infllm_pass.frontend.compile_settings import CompileSettings, compile_with

Tell = Callable[[str, int, int], None]

LONGEST = 8192
"""Tokens of a text that a calibration runs at once, unless it is told otherwise."""

_SAVINGS: Mapping[str, Any] = {"use_cache": False, "logits_to_keep": 1}
"""Arguments of language models in transformers that leave out what a calibration does not need."""


def calibrate(
    model: Callable[..., Any],
    input_ids: Tensor,
    *,
    config: ConfigLike = None,
    length: int | None = None,
    progress: bool | Tell = True,
    **model_kwargs: Any,
) -> Calibration:
    """Measure which channels of the keys token scores should read at each attention site of a model.

    The model runs dense, as it is, without gradients. Candidates are the channels of largest variance, in whole rotary
    pairs, and those of the lowest rotary frequencies. Where texts are longer than the budget, passages are repeated at
    their ends, and for the queries of these repetitions it is measured which share of the attention the published score
    and token scores miss: heads and sites are judged by the worst rows, since a few heads with rare, sharp hits matter
    and means do not show them. From shorter texts the channels of largest variance are taken, and nothing is
    recommended.

    Args:
        model: a module or function, plain, compiled or sparsified, that takes token ids ``[B, L]``.
        input_ids: integers ``[N]`` or ``[B, N]``: text like the model's later input, some thousand tokens.
        config: the configuration that will be used, as for `sparsify`; its scorer may be either.
        length: tokens of a text that run at once; None: all of a row, at most 8192. What is left of a row is dropped.
        progress: whether to show a bar on the terminal; or a function that is told of a stage, the steps done, and
            their number.
        model_kwargs: further arguments of the model.

    Returns:
        A `Calibration`, for ``sparsify(model, config, calibration=...)``; `Calibration.save` keeps it in a file.

    Raises:
        CalibrationError: the text is empty or shorter than `length`, holds no token ids, or no site is switchable.
        ConfigError: the configuration is invalid, or its `score_dims` larger than a head.
        UnsupportedModelError: `model` is no module or function.
    """
    chosen = replace(SparseAttentionConfig.coerce(config), scorer="tokens")
    texts = _texts(input_ids, length)
    original, _ = original_of(model)
    device = next((p.device for p in original.parameters()), None) if isinstance(original, nn.Module) else None
    known = inspect.signature(original.forward if isinstance(original, nn.Module) else original).parameters
    arguments = {name: value for name, value in _SAVINGS.items() if name in known} | model_kwargs
    observer = Observer(chosen)
    compiled = compile_with(original, observer, CompileSettings(observer))
    entry = compiled.forward if isinstance(compiled, nn.Module) else compiled
    failure: Exception | None = None
    with torch.no_grad(), evaluation_mode(original), _told(progress) as tell:
        try:
            sites = run_calibration(
                lambda ids: entry(ids if device is None else ids.to(device), **arguments), observer, texts, tell
            )
        except CarriedError as carried:
            failure = carried.error
    if failure is not None:
        raise failure
    name, parameters = describe_model(original) if isinstance(original, nn.Module) else (_name(original), 0)
    return Calibration(name, parameters, sum(text.numel() for text in texts), sites)


def _texts(input_ids: object, length: int | None) -> list[Tensor]:
    """Texts ``[1, L]`` of equal length.

    Raises:
        CalibrationError: see `calibrate`.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        what = f"a tensor of {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise CalibrationError(f"input_ids is {what}: expected token ids, int64 [N] or [B, N]")
    if input_ids.dim() not in (1, 2) or input_ids.numel() == 0:
        raise CalibrationError(f"input_ids has shape {list(input_ids.shape)}: expected [N] or [B, N], not empty")
    rows = input_ids.reshape(-1, input_ids.shape[-1])
    size = min(rows.shape[1], LONGEST) if length is None else length
    if isinstance(size, bool) or not isinstance(size, int) or not 16 <= size <= rows.shape[1]:
        raise CalibrationError(f"texts of {size} tokens cannot be cut from rows of {rows.shape[1]}: give 16 to as many")
    count = rows.shape[1] // size
    return [row[None, number * size : (number + 1) * size] for row in rows for number in range(count)]


@contextlib.contextmanager
def evaluation_mode(model: Callable[..., Any]) -> Iterator[None]:
    """The model without dropout, and as it was afterwards."""
    training = [each for each in model.modules() if each.training] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


@contextlib.contextmanager
def _told(progress: bool | Tell) -> Iterator[Tell]:
    """The function that is told of steps: the caller's, one that moves a bar, or one that does nothing."""
    if callable(progress):
        yield progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("calibration")
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
