"""Caches PyTorch's mutation analysis of user Triton kernels during one compilation.

To learn which tensors a kernel writes to, PyTorch translates its source, for every launch anew and several times in
the course of a compilation. Layers launch the same kernels, and the answer depends on nothing but the kernel, the types
of its arguments and the numbers among them: without remembering, compiling takes seconds longer for every layer.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor

from infllm_pass.compat.inductor import kernel_readers

Reader: TypeAlias = Callable[[Any, dict[str, Any], Mapping[str, Any]], Any]

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Basic)


Known: TypeAlias = dict[tuple[Any, ...], tuple[Any, Any]]

_known: ContextVar[Known | None] = ContextVar("infllm_known_accesses", default=None)
"""What was read so far in this thread's context; None outside of `remembered_accesses`."""

_installing = threading.Lock()


@contextmanager
def remembered_accesses() -> Iterator[None]:
    """Within the context PyTorch reads each kernel once for each combination of argument types.

    Only the thread that entered the context remembers, nothing outlives it, and a context inside another one shares
    what that knows. The functions put in the place of PyTorch's own stay there: outside of the context they call them.
    """
    _install()
    if _known.get() is not None:
        yield
        return
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _install() -> None:
    """Put a remembering function in the place of each of PyTorch's readers, once in a process."""
    with _installing:
        module, names = kernel_readers()
        for name in names:
            reader = getattr(module, name)
            if not hasattr(reader, _REMEMBERS):
                setattr(module, name, _remembering(reader))


_REMEMBERS = "_infllm_remembers"
"""Attribute that marks a function made by `_remembering`."""


def _remembering(reader: Reader) -> Reader:
    """A reader that remembers within `remembered_accesses`, and is `reader` outside."""

    @functools.wraps(reader)
    def read(kernel: Any, arguments: dict[str, Any], descriptors: Mapping[str, Any]) -> Any:
        known = _known.get()
        if known is None:
            return reader(kernel, arguments, descriptors)
        # A launch with options is an autotuner of its own around the kernel, whose first configuration is read.
        configurations = getattr(kernel, "configs", None)
        function = kernel if configurations is None else kernel.fn
        values = arguments if not configurations else {**arguments, **configurations[0].kwargs}
        kinds = {name: _kind(value) for name, value in values.items()}
        if descriptors or None in kinds.values():
            return reader(kernel, arguments, descriptors)
        key = (reader, id(function), *sorted(kinds.items(), key=operator.itemgetter(0)))
        if key not in known:
            known[key] = (function, reader(kernel, arguments, descriptors))  # kept: the id stays the function's
        return known[key][1]

    setattr(read, _REMEMBERS, True)
    return read


def _kind(value: object) -> tuple[object, object] | None:
    """What of an argument decides: a type and, of a number, its value; None where that is not known."""
    dtype = getattr(value, "dtype", None)  # of tensors, and of Inductor's boxes of tensors
    if isinstance(dtype, torch.dtype):
        return Tensor, dtype
    if isinstance(value, SYMBOLIC):
        return sympy.Basic, None
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    return None
