"""The module that `sparsify` returns: a compiled module whose checkpoints, labels and parts are those of its original.

`torch.compile` puts its own prefix before every name of a state, and has a class whose ``forward`` takes anything.
Checkpoints and trainers look at both.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from infllm_pass.compat.dynamo import OptimizedModule, uncompiled
from infllm_pass.compat.module_state import (
    PREFIX,
    add_compile_prefix,
    asked_for_by_checkpoint,
    drop_compile_prefix,
)
from infllm_pass.frontend.generation import generating_methods
from infllm_pass.frontend.handle import HANDLE, Handle
from infllm_pass.frontend.views import by_itself, seen_in, untraced, view_of


class SparsifiedModule(OptimizedModule):
    """A compiled module that carries a `Handle`; each object has a subclass with the signature of its original."""

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the sparsified model, by its forward or by what was put in that place."""
        handle: Handle = vars(self)[HANDLE]
        call = super().__call__
        if vars(self).get("forward") is handle.forward:
            return call(*args, **kwargs)
        return handle.call_replaced(call, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value if value is vars(self)["_modules"].get(name) else seen_in(vars(self)[HANDLE], value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        handle: Handle = vars(self)[HANDLE]
        return sparsified(copy.deepcopy(handle.original, memo), *handle.arguments)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        handle: Handle = vars(self)[HANDLE]
        return sparsified, (handle.original, *handle.arguments)


def sparsified(original: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """A sparsified model.

    Args:
        original: what to sparsify.
        arguments: the other arguments of `Handle`.
    """
    handle = Handle(original, *arguments)
    if not isinstance(original, nn.Module):
        switchable = by_itself(handle.call, original)
        setattr(switchable, HANDLE, handle)
        return switchable
    model: Any = handle.compiled
    handle.forward = by_itself(handle.call, uncompiled(original.forward))
    members = {
        HANDLE: handle,
        "forward": handle.forward,
        **generating_methods(original, view_of(handle, original), lambda: handle.calls),
        "__class__": type(f"Sparsified{type(original).__name__}", (SparsifiedModule,), {"forward": _signed(original)}),
    }
    for name, member in members.items():
        object.__setattr__(model, name, member)
    model.register_state_dict_post_hook(_drop_prefix)
    model.register_load_state_dict_pre_hook(_add_prefix)
    model.register_load_state_dict_post_hook(_name_without_prefix)
    return model  # type: ignore[no-any-return]


def _signed(original: nn.Module) -> Callable[..., Any]:
    """A ``forward`` for a class, with the signature of the original's, where trainers look for labels."""

    @functools.wraps(type(original).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[HANDLE].forward(*args, **kwargs)

    return forward


def _drop_prefix(_: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if not asked_for_by_checkpoint():
        drop_compile_prefix(state, prefix)


def _add_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *_arguments: Any) -> None:
    """Load a state with the names of the original, or with those of a compiled module."""
    add_compile_prefix(state, prefix)


def _name_without_prefix(_: nn.Module, incompatible: Any) -> None:
    """Let errors name parameters as the original does."""
    for names in (incompatible.missing_keys, incompatible.unexpected_keys):
        names[:] = [name.replace(PREFIX, "", 1) for name in names]
