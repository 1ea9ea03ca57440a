"""Inductor's own classes, for operators that are lowered to calls of a C++ kernel: what they are built of.

``ir.ExternKernelOut``, ``ir.FixedLayout``, ``ir.TensorBox``, ``ir.ExternKernel`` and the lowering of casts as in torch
2.11 to 2.15, and the writer of C++ that hands itself to ``codegen``. A custom operator with a C++ kernel in
``torch.library`` would replace them if packages could hold its source.
"""

from __future__ import annotations

from torch._inductor import ir
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.lowering import register_lowering, to_dtype

__all__ = ["DTYPE_TO_CPP", "ir", "register_lowering", "to_dtype"]
