"""Beginning before the launch before has ended: what a kernel may do until then, and how launches ask for it.

Programmatic dependent launch, from sm_90 on: programs start when all of the kernel before have called
`gdc_launch_dependents`, and wait in `gdc_wait` until that kernel has ended and what it wrote is seen. A kernel here
calls both, in the other order (`await_previous`): what kernels earlier still wrote is complete when its programs start.
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
    """Wait for the launch before, and let the next one begin."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    rows,  # pointers [N] to the first numbers of rows
    LENGTH: tl.constexpr,  # numbers of a row, padded to a power of two
):
    """Ask for rows to be fetched into the L2 cache. Nothing is read: what is written to them meanwhile is seen."""
    STEP: tl.constexpr = LINE_BYTES * 8 // rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (LENGTH + STEP - 1) // STEP
    at = rows[:, None] + STEP * tl.arange(0, LINES)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


def dependent_launch(kernel: Any, tensor: Tensor) -> dict[str, bool]:
    """Arguments of a launch that begins while the kernel before it ends, where the tensor's device can.

    Not where a compiler records the launch, which drops the option. The kernel's constant ``DEPENDENT`` says which.
    """
    if tensor.device.type != "cuda" or not isinstance(kernel, JITFunction) or is_recorded(kernel):
        return {"DEPENDENT": False}
    if torch.cuda.get_device_capability(tensor.device)[0] < 9:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


def recording_drops_overlap(kernel: Any, tensor: Tensor) -> bool:
    """Whether a compiler is recording launches of a kernel which, launched at once, would begin early."""
    if not is_recorded(kernel):
        return False
    with launching_at_once():
        return dependent_launch(kernel, tensor)["DEPENDENT"]
