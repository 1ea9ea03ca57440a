"""Dynamo: how something was compiled, what its graphs note on their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import OptimizedModule, eval_frame
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.eval_frame import OptimizeContext, _TorchDynamoContext, innermost_backend
from torch._dynamo.exc import RestartAnalysis, UserError
from torch._dynamo.utils import graph_break_reasons

__all__ = [
    "OptimizedModule",
    "RestartAnalysis",
    "UserError",
    "add_input",
    "add_static_input",
    "backend_of",
    "bound_backend",
    "compile_context",
    "compile_plain",
    "compile_seconds",
    "compiled_call",
    "copy_source",
    "graph_breaks",
    "hits_of_recompile_limit",
    "in_dispatch_mode",
    "input_example",
    "is_compiled",
    "is_disabled",
    "is_held_by_module",
    "is_off",
    "latest_break",
    "recompile_limit",
    "repeated_arguments",
    "repeats",
    "source_name",
    "stance",
    "uncompiled",
    "without_compiled_call",
]


def uncompiled(model: Any) -> Any:
    """What ``torch.compile`` was called on; anything else as it is.

    ``OptimizedModule._orig_mod`` of modules, ``_torchdynamo_orig_callable`` of functions; the same in torch 2.11 to
    2.15. Nothing public.
    """
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    return model._torchdynamo_orig_callable if compile_context(model) is not None else model


def compile_context(model: object) -> object | None:
    """What ``torch.compile`` wrapped a module or function in; None for one that is not compiled.

    ``OptimizedModule.dynamo_ctx`` of modules; the variable ``self`` that a compiled function closes over. The same in
    torch 2.11 to 2.15. Nothing public says how something was compiled.
    """
    if isinstance(model, OptimizedModule):
        context: object = model.dynamo_ctx
        return context
    if not hasattr(model, "_torchdynamo_orig_callable") or not inspect.isfunction(model):
        return None
    held = inspect.getclosurevars(model).nonlocals.get("self")
    return held if isinstance(held, _TorchDynamoContext) else None


def repeats(context: object) -> bool:
    """Whether a context is that of ``torch.compile``, not of ``torch.compiler.disable`` or ``torch.export``.

    ``OptimizeContext.export``, the same in torch 2.11 to 2.15.
    """
    return isinstance(context, OptimizeContext) and not context.export


def backend_of(context: Any) -> Callable[..., Any]:
    """The backend of a context, with its mode and options bound.

    ``OptimizeContext.callback`` and ``innermost_backend``, the same in torch 2.11 to 2.15.
    """
    backend: Callable[..., Any] = innermost_backend(context.callback)
    return backend


def repeated_arguments(context: Any) -> dict[str, Any]:
    """The arguments of ``torch.compile`` that made a context, but for the backend, its mode and its options.

    ``_dynamic`` and ``_hooks`` of the context in torch 2.11 to 2.15. Which sizes are dynamic is ``_shapes_spec`` in
    2.13, for the argument ``shapes_spec``, and ``_dynamic_shapes`` in 2.15, for ``dynamic_shapes``. From 2.13 on a
    layer around the backend keeps ``_recompile_limit``. Nothing public.
    """
    arguments: dict[str, Any] = {"fullgraph": bool(getattr(context, "fullgraph", False)), "dynamic": context._dynamic}
    for name in ("shapes_spec", "dynamic_shapes"):
        shapes = getattr(context, f"_{name}", None)
        if shapes is not None:
            arguments[name] = shapes
    layer = context.callback
    while layer is not None:
        limit = getattr(layer, "_recompile_limit", None)
        if isinstance(limit, int):
            arguments["recompile_limit"] = limit
            break
        layer = getattr(layer, "_torchdynamo_orig_backend", None)
    hooks = getattr(context, "_hooks", None)
    if hooks is not None and hooks.guard_filter_fn is not None:
        arguments["options"] = {"guard_filter_fn": hooks.guard_filter_fn}
    return arguments


def is_disabled(function: object) -> bool:
    """Whether a function is marked with ``torch.compiler.disable``.

    The attribute ``_torchdynamo_disable``, the same in torch 2.11 to 2.15. Nothing public.
    """
    return bool(getattr(function, "_torchdynamo_disable", False))


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What a module runs instead of its own forward: the function of ``module.compile()`` or a compiled ``forward``.

    ``Module._compiled_call_impl``, the same in torch 2.11 to 2.15. Nothing public.
    """
    if module._compiled_call_impl is not None:
        return module._compiled_call_impl
    forward = vars(module).get("forward")
    return None if isinstance(module, OptimizedModule) or compile_context(forward) is None else forward


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled by itself, by ``torch.compile``, ``module.compile()`` or a compiled ``forward``."""
    return isinstance(module, OptimizedModule) or compiled_call(module) is not None


def without_compiled_call(module: nn.Module) -> nn.Module:
    """A module without its `compiled_call`: an object of a subclass of the same name that shares all attributes.

    The module itself stays as it is for whoever else calls it. Properties of a class come before attributes of an
    object, so that the subclass hides what the object holds.
    """
    if compiled_call(module) is None:
        return module
    kind = type(module)
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "_compiled_call_impl": property(lambda _: None),
    }
    forward = vars(module).get("forward")
    if compile_context(forward) is not None:
        plain = uncompiled(forward)
        if inspect.ismethod(plain) and isinstance(plain.__self__, kind):
            plain = plain.__func__.__get__(module)  # a copied module holds the function of the one it was copied from
        members["forward"] = property(lambda _: plain)
    twin: nn.Module = object.__new__(type(kind.__name__, (kind,), members))
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


def compile_plain(original: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    """``torch.compile`` of a function, or of a module `without_compiled_call`, which the result still holds as it is.

    Setting ``OptimizedModule._orig_mod`` registers the module; the same in torch 2.11 to 2.15.
    """
    plain = without_compiled_call(original) if isinstance(original, nn.Module) else original
    compiled: Any = torch.compile(plain, **arguments)
    if plain is not original:
        compiled._orig_mod = original
    return compiled  # type: ignore[no-any-return]


def stance() -> str:
    """The stance of ``torch.compiler.set_stance``.

    ``torch._dynamo.eval_frame._stance``, the same in torch 2.11 to 2.15. The public function sets it only.
    """
    return str(eval_frame._stance.stance)


def is_off() -> bool:
    """Whether Dynamo is turned off: ``torch._dynamo.config.disable``, the same in torch 2.11 to 2.15."""
    return bool(torch._dynamo.config.disable)


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` is active, under which Dynamo skips all frames.

    ``torch.utils._python_dispatch.is_in_torch_dispatch_mode``, the same in torch 2.11 to 2.15.
    """
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    return bool(is_in_torch_dispatch_mode())


def hits_of_recompile_limit() -> int:
    """How often Dynamo hit its recompile limit in this process, as far as it counts.

    ``torch._dynamo.utils.counters``: a graph break whose text begins with its kind, in torch 2.11 to 2.15.
    """
    breaks = torch._dynamo.utils.counters["unimplemented"]
    return sum(count for text, count in list(breaks.items()) if "limit exceeded" in text.partition("\n")[0])


def bound_backend(name: str, mode: str | None = None, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """A registered backend with mode and options bound, the way ``torch.compile`` binds them.

    ``torch._TorchCompileInductorWrapper`` and ``torch._TorchCompileWrapper``: from torch 2.13 on they have an
    argument more, ``name``, with a default. ``torch._dynamo.lookup_backend`` is public in name, but binds nothing.
    """
    wrappers: Any = torch
    if name == "inductor":
        return wrappers._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-any-return]
    return wrappers._TorchCompileWrapper(lookup_backend(name), mode, options, None)  # type: ignore[no-any-return]


def recompile_limit() -> int:
    """Graphs that Dynamo makes of one function before it runs it uncompiled.

    ``torch._dynamo.config.recompile_limit``, the same in torch 2.11 to 2.15, and an argument of ``torch.compile`` from
    2.13 on, whose default this is.
    """
    return int(torch._dynamo.config.recompile_limit)


def _traced_input(node: fx.Node) -> Any:
    """What Dynamo notes on an input of a graph: source and example; None outside of Dynamo's graphs.

    ``node.meta["grapharg"]``, the same in torch 2.11 to 2.15. Nothing public.
    """
    return node.meta.get("grapharg")


def input_example(node: fx.Node) -> object:
    """The real value that an input had in the traced call; see `_traced_input`."""
    return getattr(_traced_input(node), "example", None)


def is_held_by_module(node: fx.Node) -> bool:
    """Whether Dynamo reached an input through a module; an argument may be another tensor at every call.

    ``Source.guard_source``, an enum whose names contain ``NN_MODULE`` for what modules hold; the same in torch 2.11 to
    2.15.
    """
    source = getattr(_traced_input(node), "source", None)
    return "NN_MODULE" in getattr(getattr(source, "guard_source", None), "name", "")


def source_name(node: fx.Node) -> str | None:
    """The expression that Dynamo reaches an input by, as ``L['past_key_values'].layers[0].keys``; None without one.

    ``Source.name``: a property in torch 2.11 to 2.15, a method in releases before.
    """
    source = getattr(_traced_input(node), "source", None)
    if source is None:
        return None
    return str(source.name() if callable(source.name) else source.name)


def add_input(node: fx.Node, example: torch.Tensor) -> None:
    """Give a new placeholder of a Dynamo graph what Dynamo notes on those of its own.

    ``example_value`` and ``_dynamo_source``, the same in torch 2.11 to 2.15. Nothing public.
    """
    node.meta["example_value"] = example
    node._dynamo_source = None


def add_static_input(node: fx.Node, example: torch.Tensor) -> None:
    """Mark a new placeholder of a Dynamo graph as an input whose address stays, so that CUDA graphs may write to it.

    ``tensor_dict`` and ``_dynamo_source`` as Dynamo notes them for tensors under ``mark_static_address``; the same in
    torch 2.11 to 2.15. ``torch._dynamo.mark_static_address`` does so for tensors that Dynamo traces itself.
    """
    add_input(node, example)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def graph_breaks() -> int:
    """How often a trace was broken off so far in this process, or since ``torch._dynamo.reset``; see `latest_break`."""
    return len(graph_break_reasons)


def latest_break(since: int) -> str:
    """Where and why the latest trace was broken off, as ``file:line: reason``; "" if none was.

    ``torch._dynamo.utils.graph_break_reasons``, the same in torch 2.11 to 2.15. Nothing public keeps the lines.

    Args:
        since: what `graph_breaks` was before.
    """
    if len(graph_break_reasons) <= since:
        return ""
    ended = graph_break_reasons[-1]
    place = f"{ended.user_stack[-1].filename}:{ended.user_stack[-1].lineno}: " if ended.user_stack else ""
    return place + str(ended.reason).strip().split("\n", 1)[0]


def copy_source(node: fx.Node, twin: fx.Node) -> None:
    """Copy what Dynamo notes on a placeholder as an attribute, which copying a graph loses.

    ``Node._dynamo_source``, the same in torch 2.11 to 2.15.
    """
    if hasattr(node, "_dynamo_source"):
        twin._dynamo_source = node._dynamo_source


def compile_seconds() -> float:
    """Seconds that this process has spent compiling, from tracing to loaded code.

    ``torch._dynamo.utils.calculate_time_spent``, the same in torch 2.11 to 2.15. ``torch.compiler`` reports no times.
    """
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))
