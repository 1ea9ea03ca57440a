"""Reads the arguments a model was compiled with, and compiles it again with another backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.eval_frame import OptimizeContext, _TorchDynamoContext, innermost_backend

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
    if isinstance(model, OptimizedModule):
        return model._orig_mod, _read_context(model.dynamo_ctx)
    context = _context_of_function(model)
    if context is not None:
        return model._torchdynamo_orig_callable, _read_context(context)  # type: ignore[attr-defined]
    if getattr(model, "_torchdynamo_disable", False):
        raise UnsupportedModelError("the function is marked with torch.compiler.disable: pass the plain function")
    if isinstance(model, nn.Module) and model._compiled_call_impl is not None:
        raise UnsupportedModelError(
            "the module was compiled in place by module.compile(): pass torch.compile(module), made from a "
            "module on which compile() was not called"
        )
    return model, CompileSettings(bound_compiler("inductor"))


def bound_compiler(name: str, mode: str | None = None, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """A registered backend with mode and options bound, the way ``torch.compile`` binds them."""
    wrappers: Any = torch
    if name == "inductor":
        return wrappers._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-any-return]
    return wrappers._TorchCompileWrapper(lookup_backend(name), mode, options, None)  # type: ignore[no-any-return]


def _context_of_function(function: Callable[..., Any]) -> _TorchDynamoContext | None:
    """The context that ``torch.compile`` closed over when it wrapped a function; None for a plain one."""
    if not hasattr(function, "_torchdynamo_orig_callable") or not inspect.isfunction(function):
        return None
    context = inspect.getclosurevars(function).nonlocals.get("self")
    return context if isinstance(context, _TorchDynamoContext) else None


def _read_context(context: object) -> CompileSettings:
    if not isinstance(context, OptimizeContext) or context.export:
        raise UnsupportedModelError(
            f"the model was wrapped by {type(context).__name__} (torch.compiler.disable, torch.export or "
            "torch.compile(disable=True)): pass the plain model or torch.compile(model)"
        )
    callback: Any = context.callback
    arguments: dict[str, Any] = {
        "fullgraph": bool(getattr(context, "fullgraph", False)),
        "dynamic": context._dynamic,
    }
    shapes = getattr(context, "_shapes_spec", None)
    if shapes is not None:
        arguments["shapes_spec"] = shapes
    limit = _recompile_limit(callback)
    if limit is not None:
        arguments["recompile_limit"] = limit
    hooks = getattr(context, "_hooks", None)
    if hooks is not None and hooks.guard_filter_fn is not None:
        arguments["options"] = {"guard_filter_fn": hooks.guard_filter_fn}
    return CompileSettings(innermost_backend(callback), arguments)


def _recompile_limit(callback: Any) -> int | None:
    """The model's own recompilation limit, kept by one of the layers around its backend."""
    while callback is not None:
        limit = getattr(callback, "_recompile_limit", None)
        if isinstance(limit, int):
            return limit
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return None


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
    if "isolate_recompiles" in known:
        arguments["isolate_recompiles"] = True
    if "recompile_limit" in known:
        limit = arguments.get("recompile_limit") or torch._dynamo.config.recompile_limit
        arguments["recompile_limit"] = 4 * limit
    return torch.compile(original, backend=backend, **arguments)
