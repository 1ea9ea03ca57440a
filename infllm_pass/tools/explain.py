"""The command ``infllm-pass explain``: which attention sites of a model become switchable, and why others do not."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

import infllm_pass
from infllm_pass.compat.tensors import FakeTensorMode
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CheckpointError, InfLLMError
from infllm_pass.tools.checkpoint import load_local
from infllm_pass.tools.output import OutputFormat, print_data

_TRACING_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a model that is given the wrong inputs raises."""


EXPLAINED_TOKENS = 32768
"""Length that a model is traced at where neither the command nor ``dense_len`` says one."""


@dataclass(frozen=True)
class _Target:
    """A model to explain.

    Attributes:
        model: the model, its weights without data.
        args: positional inputs that came with it; None: it takes token ids.
        kwargs: keyword inputs that came with it.
    """

    model: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = None


def explain(
    options: argparse.Namespace, configured: Callable[[SparseAttentionConfig], SparseAttentionConfig], console: Console
) -> None:
    """Build a model without weights, trace it at one length and print the report.

    Args:
        options: path, length, batch, layers, calibration and format.
        configured: puts the fields that were given as options into a configuration.
        console: where a table goes.

    Raises:
        CheckpointError: the model cannot be built, or not be traced on token ids.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    target = _build(str(options.path), options.layers, mode)
    # Fake tensors have shapes and no data: a model of any size is analysed in seconds.
    with mode, torch.no_grad():
        own: Any = getattr(target.model, "config", None)
        base = (
            SparseAttentionConfig.from_model_config(own)
            if getattr(own, "sparse_config", None) is not None
            else SparseAttentionConfig()
        )
        config = configured(base)
        known = config.visited_tokens if config.dense_len == 0 else config.dense_len
        length = options.length or (EXPLAINED_TOKENS if isinstance(known, str) else known)
        args, kwargs, described = _inputs(target, own, options.batch, length)
        try:
            found = infllm_pass.explain(target.model, *args, config=config, calibration=options.calibration, **kwargs)
        except _TRACING_ERRORS as error:
            if isinstance(error, InfLLMError):
                raise
            first = str(error).strip().splitlines()[:1]
            raise CheckpointError(
                f"{type(target.model).__name__} of {options.path} could not be traced on {described}: {''.join(first)}"
            ) from error
    if options.format is not OutputFormat.TABLE:
        facts = {
            "model": type(target.model).__name__,
            "path": str(options.path),
            "batch": options.batch,
            "length": length,
            "config": config.to_dict(),
        }
        print_data(options.format, facts | found.to_dict(), found.to_rows())
        return
    console.print(
        f"{type(target.model).__name__}, built without weights, on {described}, dense_len {config.dense_len}",
        markup=False,
        highlight=False,
    )
    console.print(found)


def _inputs(target: _Target, own: Any, batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """What the model is called with: the inputs that came with it, or token ids."""
    if target.args is not None:
        return target.args, target.kwargs or {}, "the inputs that came with it"
    described = f"token ids [{batch}, {length}]"
    ids = torch.zeros(batch, length, dtype=torch.int64)
    if own is None:
        return (ids,), {}, described
    inputs = {"input_ids": ids}
    if getattr(own, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return (), inputs, described


def _build(name: str, layers: int | None, mode: FakeTensorMode) -> _Target:
    """A model without data: built so, or built with data that it then loses, for constructors that read values."""
    module, colon, attribute = name.partition(":")
    by_name = bool(colon) and not os.path.exists(name)

    def build() -> _Target:
        return _call(module, attribute) if by_name else _Target(load_local(name, layers=layers))

    try:
        with mode, torch.no_grad():
            return build()
    except CheckpointError:
        target = build()
    _lose_data(target.model, mode)
    args = None if target.args is None else tuple(_without_data(value, mode) for value in target.args)
    kwargs = {key: _without_data(value, mode) for key, value in (target.kwargs or {}).items()}
    return _Target(target.model, args, kwargs)


def _call(module: str, attribute: str) -> _Target:
    """The model that ``module:callable`` gives, alone or with its inputs: a tuple, or a dict of keywords."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
        made = function if isinstance(function, nn.Module) else function()
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"{module}:{attribute} gives no model: {type(error).__name__}: {''.join(first)}"
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # the model's module may have changed the path
            sys.path.remove(folder)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{module}:{attribute} gives a {type(model).__name__}: expected a torch.nn.Module, or one and its inputs"
        )
    model.eval()
    if isinstance(inputs, dict):
        return _Target(model, (), inputs)
    if inputs is None:
        return _Target(model)
    return _Target(model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def _lose_data(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's parameters and buffers by tensors without data."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, _without_data(buffer, mode))


def _without_data(value: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
