"""Launching Triton kernels so that compilers see them, and so that the interpreter can run them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.runtime import Autotuner

_at_once = ContextVar("infllm_launching_at_once", default=False)


@contextmanager
def launching_at_once() -> Iterator[None]:
    """Within an operator that compilers call and do not look into: launches run, with all of their options."""
    token = _at_once.set(True)
    try:
        yield
    finally:
        _at_once.reset(token)


def wrap_triton(kernel: Any) -> Any:
    """The kernel in the form that `torch.library.triton_op` records; a kernel under the interpreter as it is.

    The name matters: PyTorch reads the source of an operator for calls of this name, to learn which kernels its compile
    caches have to depend on.
    """
    if _at_once.get() or not isinstance(kernel, JITFunction | Autotuner):
        return kernel
    return torch.library.wrap_triton(kernel)


def is_recorded(kernel: Any) -> bool:
    """Whether a compiler records the launches of a kernel; it keeps no options but ``num_warps`` and ``num_stages``."""
    return isinstance(kernel, JITFunction) and wrap_triton(kernel) is not kernel


def precision(tensor: Tensor) -> str:
    """``input_precision`` of matrix products: tf32 for float32 only where PyTorch's own switch allows it."""
    return "tf32" if tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 under the interpreter, so that programs loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
