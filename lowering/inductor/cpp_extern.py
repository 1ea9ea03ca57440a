"""Inductor lowering of ``infllm::switchable_attention`` on the CPU to an extern C++ kernel.

The kernel, ``kernels/cpu/csrc/switchable_attention.h``, takes every size and number when it is called: all sites of a
dtype call one function, which is compiled once. Inductor sees one extern kernel a site, which nothing is fused into.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from infllm_pass.compat.inductor_ir import DTYPE_TO_CPP, ir, register_lowering
from infllm_pass.kernels.cpu.native import call_numbers, channel_numbers, fixed_numbers, header

from ..export import fused_op
from ..ops.attention_args import FUSED, AttentionCall, geometry_of
from ..ops.registry import Operator

INDEX_DTYPES = (torch.int64, torch.int32)
"""Dtypes of offsets."""

HEADER = "switchable_attention.h"


packaged_attention = Operator(
    "switchable_attention.packaged",
    FUSED,
    compute=fused_op.compute,
    fake=fused_op.fake,
    doc="""``infllm::switchable_attention`` as the overload that Inductor writes as a call of the C++ kernel.

An overload of its own, since an overload has one lowering in a process, whoever compiles what at the same time.""",
)

OPERATOR = packaged_attention.default


class SwitchableAttention(ir.ExternKernelOut):
    """A call of the kernel.

    Args:
        tensors: q, k and v, with adjacent features; then, contiguous, the key mask and the offsets, if there are any.
        masked: whether there is a key mask.
        offset: key index of the first query, to which offsets are added.
        call: the geometry, the scale, dense_len and the window.
    """

    def __init__(self, tensors: list[ir.IRNode], masked: bool, offset: sympy.Expr, call: AttentionCall) -> None:
        q, _, v = tensors[:3]
        batch, heads, length, _ = q.get_size()
        dim_v = v.get_size()[3]
        layout = ir.FixedLayout(
            q.get_device(),
            q.get_dtype(),
            [batch, heads, length, dim_v],
            [length * heads * dim_v, dim_v, heads * dim_v, sympy.S.One],
        )
        super().__init__(layout, tensors, (offset,), op_overload=OPERATOR)
        self.masked, self.offset, self.call = masked, offset, call

    def codegen(self, wrapper: Any) -> None:
        """Write the call, and the kernel in front of the first one."""
        q, k, v, *more = (_pointer(wrapper, tensor) for tensor in self.inputs)
        mask = more.pop(0) if self.masked else "nullptr"
        count, offsets, index = "0", "nullptr", torch.int64
        if more:
            (offsets,), tensor = more, self.inputs[-1]
            count, index = wrapper.codegen_sizevar(tensor.get_size()[0]), tensor.get_dtype()
        name = kernel_name(wrapper, self.get_dtype(), index)
        geometry, heads = self.call.geometry, int(self.inputs[1].get_size()[1])
        fixed = fixed_numbers(self.call.window, self.call.dense_len, geometry)
        sizes = (tensor.get_size() for tensor in self.inputs[:3])
        strides = (tensor.get_stride() for tensor in self.inputs[:3])
        numbers = ", ".join(
            wrapper.codegen_sizevar(sympy.sympify(number))
            for number in call_numbers(*sizes, *strides, self.offset, fixed)
        )
        call, out = f"{self.get_name()}_call", _pointer(wrapper, self)
        wrapper.writeline(f"const int64_t {call}[] = {{{numbers}}};")
        channels = "nullptr"
        if geometry.channels:
            channels = f"{call}_channels"
            numbers = ", ".join(map(str, channel_numbers(geometry, heads)))
            wrapper.writeline(f"static const int32_t {channels}[] = {{{numbers}}};")
        arguments = (call, repr(self.call.scale), q, k, v, mask, offsets, count, channels, out)
        wrapper.writeline(f"{name}({', '.join(arguments)});")


@register_lowering(OPERATOR, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower(
    q: ir.TensorBox,
    k: ir.TensorBox,
    v: ir.TensorBox,
    key_mask: ir.TensorBox | None,
    offsets: ir.TensorBox | None,
    offset: sympy.Expr | int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    geometry: str,
) -> ir.TensorBox:
    """The operator in Inductor's representation, with its arguments: see `lowering.export.fused_op`."""
    if offset is None:
        offset = k.get_size()[2] - q.get_size()[2] if offsets is None else 0
    more = (ir.ExternKernel.require_contiguous(x) for x in (key_mask, offsets) if x is not None)
    tensors = [*map(_with_adjacent_features, (q, k, v)), *more]
    call = AttentionCall(scale, dense_len, geometry_of(geometry), window=window)
    return ir.TensorBox.create(SwitchableAttention(tensors, key_mask is not None, sympy.sympify(offset), call))


def _with_adjacent_features(x: ir.TensorBox) -> ir.IRNode:
    realized = ir.ExternKernel.realize_input(x)
    realized.freeze_layout()
    return realized if realized.get_stride()[-1] == 1 else ir.ExternKernel.require_contiguous(realized)


def _pointer(wrapper: Any, tensor: ir.IRNode) -> str:
    """The address of a tensor's first number."""
    start = wrapper.codegen_sizevar(sympy.sympify(tensor.get_layout().offset))
    return f"({DTYPE_TO_CPP[tensor.get_dtype()]}*)({tensor.get_name()}.data_ptr()) + {start}"


def kernel_name(wrapper: Any, dtype: torch.dtype, index: torch.dtype) -> str:
    """The name of the kernel for a dtype and one of offsets; the first time, its source is written too.

    Args:
        wrapper: Inductor's writer of C++.
        dtype: one of `kernels.cpu.native.DTYPES`.
        index: one of `INDEX_DTYPES`.
    """
    name = f"infllm_switchable_attention_{str(dtype).split('.')[1]}_{str(index).split('.')[1]}"
    if name not in wrapper.src_to_kernel.values():
        number, key = DTYPE_TO_CPP[dtype], DTYPE_TO_CPP[index]
        declaration = (
            f'extern "C" void {name}(const int64_t* numbers, double scale, const {number}* q, const {number}* k, '
            f"const {number}* v, const bool* key_mask, const {key}* offsets, int64_t offsets_count, "
            f"const int32_t* channels, {number}* out)"
        )
        source = (
            f"#include <torch/csrc/inductor/cpp_prefix.h>\n{header(HEADER)}\n{declaration} {{\n"
            "  infllm::switchable_attention(\n"
            "      infllm::call_of<infllm::Call>(numbers, scale), q, k, v, key_mask, offsets, offsets_count,\n"
            "      channels, out);\n}\n"
        )
        wrapper.src_to_kernel[source] = name
        wrapper.define_kernel(name, source, gpu=False, cpp_definition=f"{declaration};\n")
    return name
