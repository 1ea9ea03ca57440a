"""Reads the arguments a model was compiled with, and compiles it again with another backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from infllm_pass.compat import dynamo
from infllm_pass.errors import UnsupportedModelError


@dataclass(frozen=True)
class CompileSettings:
    """How a model is compiled.

    Attributes:
        compiler: the backend, with its mode and options bound.
        arguments: the other arguments of ``torch.compile``.
    """

    compiler: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def settings_of(model: object) -> tuple[Callable[..., Any], CompileSettings]:
    """The uncompiled original of a model or function, and how it was compiled; defaults if it was not.

    Raises:
        UnsupportedModelError: `model` is no module or function, or was compiled in a way that a second
            ``torch.compile`` cannot repeat.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "a TorchScript module has no Python code to trace: pass the module it was scripted from"
        )
    if isinstance(model, type) or not callable(model):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module or a function, plain or from torch.compile, got "
            f"{'the class ' + model.__name__ if isinstance(model, type) else type(model).__name__}"
        )
    context = dynamo.compile_context(model)
    if context is not None:
        return dynamo.uncompiled(model), _read_context(context)
    if dynamo.is_disabled(model):
        raise UnsupportedModelError("the function is marked with torch.compiler.disable: pass the plain function")
    call = dynamo.compiled_call(model) if isinstance(model, nn.Module) else None
    if call is not None:
        return model, _read_context(dynamo.compile_context(call))
    return model, CompileSettings(dynamo.bound_backend("inductor"))


def _read_context(context: object) -> CompileSettings:
    if not dynamo.repeats(context):
        raise UnsupportedModelError(
            f"the model was wrapped by {type(context).__name__} (torch.compiler.disable, torch.export or "
            "torch.compile(disable=True)): pass the plain model or torch.compile(model)"
        )
    return CompileSettings(dynamo.backend_of(context), dynamo.repeated_arguments(context))


def recompiles_are_isolated() -> bool:
    """Whether this version of torch (from 2.13 on) counts the recompilations of each ``torch.compile`` for itself.

    Where not, all compilations of one model share `torch._dynamo.config.recompile_limit`.
    """
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def compile_with(
    original: Callable[..., Any], backend: Callable[..., Any], settings: CompileSettings
) -> Callable[..., Any]:
    """``torch.compile`` with a backend of our own in front of the settings' compiler.

    Dynamo stops compiling, and runs the plain model, after a number of recompilations. Where torch can do so
    they are counted for this compilation alone, not together with the original's or another configuration's,
    and the number is four times as large: every graph may exist for both sides of the length switch, and a model that
    generates makes graphs for prompts and for steps.
    """
    arguments: dict[str, Any] = {
        key: dict(value) if isinstance(value, dict) else value for key, value in settings.arguments.items()
    }
    known = inspect.signature(torch.compile).parameters
    if recompiles_are_isolated():
        arguments["isolate_recompiles"] = True
    if "recompile_limit" in known:
        limit = arguments.get("recompile_limit") or dynamo.recompile_limit()
        arguments["recompile_limit"] = 4 * limit
    return dynamo.compile_plain(original, backend=backend, **arguments)
