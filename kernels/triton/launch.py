"""Launching Triton kernels so that compilers see them, and so that the interpreter can run them on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.runtime import Autotuner

from infllm_pass.compat.shapes import is_concrete_int

from ..tracing import is_traced

_at_once = ContextVar("infllm_launching_at_once", default=False)
_launches = ContextVar("infllm_launches", default=True)


@contextmanager
def launching_at_once() -> Iterator[None]:
    """For the body of an opaque operator: launches run at once, with all of their options."""
    token = _at_once.set(True)
    try:
        yield
    finally:
        _at_once.reset(token)


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Launches do nothing: what is left of a function are the allocations, the shapes and strides of its results."""
    token = _at_once.set(True), _launches.set(False)
    try:
        yield
    finally:
        _at_once.reset(token[0])
        _launches.reset(token[1])


def wrap_triton(kernel: Any) -> Any:
    """The kernel in the form that a compiler records where one traces, launched on the device of its tensors."""
    if not _launches.get():
        return _NOTHING
    if _at_once.get() or not isinstance(kernel, JITFunction | Autotuner):
        return _OnDevice(kernel)
    return _OnDevice(torch.library.wrap_triton(kernel))


class _Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **named: None


_NOTHING = _Nothing()


class _OnDevice:
    """A kernel that runs on the device of its tensors: Triton launches on the current one."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        launch = self.kernel[grid]

        def launch_there(*arguments: Any, **named: Any) -> None:
            with device_guard(next(each for each in arguments if isinstance(each, Tensor))):
                launch(*arguments, **named)

        return launch_there


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within it the tensor's CUDA device is the current one; nothing is done where compilers trace, or on a CPU."""
    if not tensor.is_cuda or is_traced(tensor):
        return nullcontext()
    if tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def is_recorded(kernel: Any) -> bool:
    """Whether a compiler records the launches of a kernel; it keeps no options but ``num_warps`` and ``num_stages``."""
    return isinstance(kernel, JITFunction) and not _at_once.get()


def precision(tensor: Tensor) -> str:
    """``input_precision`` of matrix products: tf32 for float32 only where PyTorch's own switch allows it.

    Read where both of PyTorch's interfaces write to: a setting of matrix products, else of CUDA, else of all devices.
    The older one, ``allow_tf32``, cannot be read once the newer one was used.
    """
    if tensor.dtype != torch.float32 or not tensor.is_cuda:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def fixed_token_stride(tensor: Tensor) -> int:
    """Numbers between two tokens of ``[B, H, L, D]`` for kernels to be compiled for; 0 where it varies with the batch.

    Batch sizes that lie inside of tokens, as in memory ordered ``[L, B, H, D]``, would each compile a kernel.
    """
    stride = tensor.stride(2)
    if all(is_concrete_int(size) for size in (tensor.shape[0], tensor.stride(0), stride)):
        return 0 if tensor.shape[0] > 1 and 0 < tensor.stride(0) < stride else int(stride)
    return int(stride) if is_concrete_int(stride) else 0


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 under the interpreter, so that programs loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
