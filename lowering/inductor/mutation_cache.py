"""What PyTorch reads off the source of Triton kernels while it compiles a graph, remembered for that graph.

To learn which tensors a kernel writes to, PyTorch translates its source, for every launch anew and several times in
the course of a compilation. Layers launch the same kernels, and the answer depends on nothing but the kernel, the types
of its arguments and the numbers among them: without remembering, compiling takes seconds longer for every layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap

Reader: TypeAlias = Callable[[Any, dict[str, Any], Mapping[str, Any]], Any]

READERS = ("identify_accessed_tensors", "identify_mutated_tensors")
"""PyTorch's functions of kernel, arguments and tensor descriptors that read a kernel: torch 2.13, torch 2.11."""

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Basic)


@contextmanager
def remembered_accesses() -> Iterator[None]:
    """Within the context PyTorch reads each kernel once for each combination of argument types."""
    readers: dict[str, Reader] = {
        name: getattr(triton_kernel_wrap, name) for name in READERS if hasattr(triton_kernel_wrap, name)
    }
    for name, reader in readers.items():
        setattr(triton_kernel_wrap, name, _remembering(reader))
    try:
        yield
    finally:
        for name, reader in readers.items():
            setattr(triton_kernel_wrap, name, reader)


def _remembering(reader: Reader) -> Reader:
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def read(kernel: Any, arguments: dict[str, Any], descriptors: Mapping[str, Any]) -> Any:
        # A launch with options is an autotuner of its own around the kernel, whose first configuration is read.
        configurations = getattr(kernel, "configs", None)
        function = kernel if configurations is None else kernel.fn
        values = arguments if not configurations else {**arguments, **configurations[0].kwargs}
        kinds = {name: _kind(value) for name, value in values.items()}
        if descriptors or None in kinds.values():
            return reader(kernel, arguments, descriptors)
        key = (id(function), *sorted(kinds.items(), key=operator.itemgetter(0)))
        if key not in known:
            known[key] = (function, reader(kernel, arguments, descriptors))  # kept: the id stays the function's
        return known[key][1]

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
