"""Views of a sparsified model's parts: calling one runs the part compiled like the whole.

Code that owns a sparsified model does not always call the whole of it: an adapter hands ``generate`` to the model
inside, a trainer calls ``model.base_model`` and computes the loss by itself. `torch.compile` gives such code the
original's parts, which run uncompiled. A view is such a part under another class; it shares the part's attributes,
equals it and says that it is of its class, so that hooks, state and sharding reach the part itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from infllm_pass.compat import dynamo
from infllm_pass.frontend.generation import GeneratingView, generating_members
from infllm_pass.frontend.handle import Handle


def _class_of_original(view: PartView) -> type:
    return type(view.infllm_original)


def _set_class_of_original(view: PartView, kind: type) -> None:
    view.infllm_original.__class__ = kind


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo runs and does not trace."""
    reason = "a sparsified model is compiled by itself"
    return torch.compiler.disable(function, reason=reason)  # type: ignore[no-any-return,no-untyped-call]


def by_itself(call: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the name, signature and docs of `like` that runs `call`, which no other compilation traces.

    A compiled function that calls a sparsified model breaks its graph there: traced, it would be the original.
    """

    def calling(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return functools.wraps(like)(untraced(calling))


class PartView:
    """What a view does differently from the class of its original, which comes after it among its bases.

    Attributes:
        infllm_handle: the handle of the sparsified model.
        infllm_original: the part.
    """

    infllm_handle: Handle
    infllm_original: nn.Module

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled part."""
        return self.infllm_handle.call_part(self.infllm_original, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return seen_in(self.infllm_handle, super().__getattr__(name))  # type: ignore[misc]

    # Sharding gives a module another class: the part's own
    __class__ = property(_class_of_original, _set_class_of_original)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.infllm_original

    def __hash__(self) -> int:
        return hash(self.infllm_original)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.infllm_original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.infllm_original.__reduce_ex__(protocol)


def seen_in(handle: Handle, value: Any) -> Any:
    """What an attribute of a sparsified model, or of a view, is given out as: a view of a part that has parts.

    Layers without parts, such as an embedding, have no attention; containers without a forward are not called; and a
    part that is compiled by itself is what its owner made of it.
    """
    if not isinstance(value, nn.Module) or isinstance(value, (PartView, torch.jit.ScriptModule)):
        return value
    if type(value).forward is nn.Module.forward or not any(True for _ in value.children()):
        return value
    return value if dynamo.is_compiled(value) else view_of(handle, value)


def view_of(handle: Handle, original: nn.Module) -> Any:
    """The view of a part of a sparsified model, or of the whole original; one for each."""
    return handle.kept_view(original, _new_view)


def _new_view(handle: Handle, original: nn.Module) -> Any:
    kind = type(original)
    call = by_itself(functools.partial(handle.call_part, original), dynamo.uncompiled(original.forward))
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "infllm_handle": handle,
        "infllm_original": original,
        "forward": staticmethod(call),
    }
    bases: tuple[type, ...] = (PartView, kind)
    if callable(getattr(kind, "generate", None)):
        bases = (GeneratingView, *bases)
        members |= generating_members(kind, call, functools.partial(handle.compiled_as, original))
    view: Any = object.__new__(type(kind.__name__, bases, members))
    object.__setattr__(view, "__dict__", original.__dict__)
    return view
