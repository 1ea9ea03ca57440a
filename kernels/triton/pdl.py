"""Programmatic dependent launch (sm_90 and later): launch option, wait and trigger helper, L2 prefetch before the wait.

Programs start once all programs of the previous kernel have called `gdc_launch_dependents`; `gdc_wait` returns once
that kernel has ended and its writes are visible. Kernels here wait first and trigger then (`await_previous`), so that
what kernels before the previous one wrote is complete when their programs start.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import is_recorded, launching_at_once

LINE_BYTES = tl.constexpr(128)
"""A line of the L2 cache."""


@triton.jit
def await_previous():
    """Wait for the previous kernel, then allow the next one to start."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    rows,  # pointers [N] to the first numbers of rows
    LENGTH: tl.constexpr,  # numbers of a row, padded to a power of two
):
    """Prefetch rows into the L2 cache, which stays coherent: later writes to them are seen."""
    STEP: tl.constexpr = LINE_BYTES * 8 // rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (LENGTH + STEP - 1) // STEP
    at = rows[:, None] + STEP * tl.arange(0, LINES)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


def dependent_launch(kernel: Any, tensor: Tensor) -> dict[str, bool]:
    """Launch arguments for programmatic dependent launch, where the tensor's device has it.

    Not where a compiler records the launch, which drops the option; the kernel's constant ``DEPENDENT`` says which.
    """
    if tensor.device.type != "cuda" or not isinstance(kernel, JITFunction) or is_recorded(kernel):
        return {"DEPENDENT": False}
    if torch.cuda.get_device_capability(tensor.device)[0] < 9:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


def recording_drops_pdl(kernel: Any, tensor: Tensor) -> bool:
    """Whether a compiler is recording launches of a kernel that would otherwise use programmatic dependent launch."""
    if not is_recorded(kernel):
        return False
    with launching_at_once():
        return dependent_launch(kernel, tensor)["DEPENDENT"]
