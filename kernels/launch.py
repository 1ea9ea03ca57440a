"""Launching Triton kernels so that compilers see them, and so that the interpreter can run them on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from triton import JITFunction
from triton.runtime import Autotuner


def traced(kernel: Any) -> Any:
    """The kernel in the form that `torch.library.triton_op` records; a kernel under the interpreter as it is."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction | Autotuner) else kernel
