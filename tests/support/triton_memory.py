"""Every address that kernels use under Triton's interpreter, held against the tensors that their launch was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor's elements, and one past the last: what a copy of the tensor would hold."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size() * (tensor.numel() > 0)


@contextmanager
def within_tensors() -> Iterator[list[str]]:
    """Fail at the first load or store outside of the launch's tensors; yields the names of the kernels that ran."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launched: list[str] = []
    extents: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any = None) -> None:
        given = np.asarray(pointers.data)
        if mask is not None:
            given = given[np.broadcast_to(np.asarray(mask.data).astype(bool), given.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        inside = np.zeros(given.shape, dtype=bool)
        for begin, end in extents:
            inside |= (given >= begin) & (given + size <= end)
        assert inside.all(), f"{launched[-1]} leaves its tensors at {given[~inside][:3]}: {extents}"

    def arguments(self: Any, positional: Any, named: Any) -> Any:
        hosts = original_arguments(self, positional, named)
        launched.append(self.fn.__name__)
        extents[:] = [extent(x) for x in (*hosts[0], *hosts[1].values()) if isinstance(x, torch.Tensor)]
        return hosts

    def load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return original_load(self, pointers, mask, *others)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return original_store(self, pointers, value, mask, *others)

    def add(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return original_add(self, kind, pointers, value, mask, *others)

    original_arguments, original_load = executor._init_args_hst, builder.create_masked_load
    original_store, original_add = builder.create_masked_store, builder.create_atomic_rmw
    with (
        mock.patch.object(executor, "_init_args_hst", arguments),
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
        mock.patch.object(builder, "create_atomic_rmw", add),
    ):
        yield launched
