"""Inductor lowering of ``infllm::switchable_attention`` on the CPU to an extern C++ kernel.

The kernel, ``kernels/cpu/csrc/switchable_attention.h``, takes every size and number when it is called: all sites of a
dtype call one function, which is compiled once. Inductor sees one extern kernel a site, which nothing is fused into.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from infllm_pass.compat.inductor_ir import DTYPE_TO_CPP, ir, register_lowering, to_dtype
from infllm_pass.kernels.cpu.native import call_numbers, channel_numbers, fixed_numbers, header
from infllm_pass.kernels.params import compute_dtype

from ..export import fused_op
from ..ops.attention_args import FUSED, SCORE_TERMS, AttentionCall
from ..ops.registry import Operator

INDEX_DTYPES = (torch.int64, torch.int32)
"""Dtypes of offsets."""

HEADER = "switchable_attention.h"

OPTIONAL = ("key_mask", "offsets", "key_bias", "sinks")
"""Tensors that a call may lack."""


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
        tensors: q, k and v, with adjacent features; then, contiguous, those of `more`.
        more: names of the arguments that are given of the key mask, the offsets, the bias of keys and the sinks.
        offset: key index of the first query, to which offsets are added.
        call: the geometry, the scale, the cap, dense_len and the window.
    """

    def __init__(
        self, tensors: list[ir.IRNode], more: tuple[str, ...], offset: sympy.Expr, call: AttentionCall
    ) -> None:
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
        self.more, self.offset, self.call = more, offset, call

    def codegen(self, wrapper: Any) -> None:
        """Write the call, and the kernel in front of the first one."""
        given = dict(zip(self.more, self.inputs[3:], strict=True))
        tensors = [_pointer(wrapper, tensor) for tensor in self.inputs[:3]]
        mask, offsets, bias, sinks = (_pointer(wrapper, given.get(name)) for name in OPTIONAL)
        count, index = "0", torch.int64
        if "offsets" in given:
            count, index = wrapper.codegen_sizevar(given["offsets"].get_size()[0]), given["offsets"].get_dtype()
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
        bias_strides = "nullptr"
        if "key_bias" in given:
            bias_strides = f"{call}_bias"
            rows, of_heads, keys = given["key_bias"].get_size()
            steps = (0 if rows == 1 else of_heads * keys, 0 if of_heads == 1 else keys)
            numbers = ", ".join(wrapper.codegen_sizevar(sympy.sympify(number)) for number in steps)
            wrapper.writeline(f"const int64_t {bias_strides}[] = {{{numbers}}};")
        scores = repr(self.call.scale), repr(self.call.softcap)
        arguments = (call, *scores, *tensors, mask, offsets, count, channels, bias, bias_strides, sinks, out)
        wrapper.writeline(f"{name}({', '.join(arguments)});")


@register_lowering(OPERATOR, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower(*arguments: Any) -> ir.TensorBox:
    """The operator in Inductor's representation, with its arguments: see `lowering.export.fused_op`."""
    (q, k, v), call = FUSED.read(arguments)
    offset: Any = call.offset
    if offset is None:
        offset = k.get_size()[2] - q.get_size()[2] if call.offsets is None else 0
    wide = compute_dtype(q.get_dtype())
    given = {}
    for name in OPTIONAL:
        x: Any = getattr(call, name)
        if x is not None:
            given[name] = ir.ExternKernel.require_contiguous(to_dtype(x, wide) if name in SCORE_TERMS else x)
    tensors = [*map(_with_adjacent_features, (q, k, v)), *given.values()]
    return ir.TensorBox.create(SwitchableAttention(tensors, tuple(given), sympy.sympify(offset), call))


def _with_adjacent_features(x: ir.TensorBox) -> ir.IRNode:
    realized = ir.ExternKernel.realize_input(x)
    realized.freeze_layout()
    return realized if realized.get_stride()[-1] == 1 else ir.ExternKernel.require_contiguous(realized)


def _pointer(wrapper: Any, tensor: ir.IRNode | None) -> str:
    """The address of a tensor's first number; of none the null pointer."""
    if tensor is None:
        return "nullptr"
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
        real = DTYPE_TO_CPP[compute_dtype(dtype)]
        declaration = (
            f'extern "C" void {name}(const int64_t* numbers, double scale, double softcap, const {number}* q, '
            f"const {number}* k, const {number}* v, const bool* key_mask, const {key}* offsets, "
            f"int64_t offsets_count, const int32_t* channels, const {real}* key_bias, "
            f"const int64_t* bias_strides, const {real}* sinks, {number}* out)"
        )
        source = (
            f"#include <torch/csrc/inductor/cpp_prefix.h>\n{header(HEADER)}\n{declaration} {{\n"
            "  infllm::switchable_attention(\n"
            "      infllm::call_of<infllm::Call>(numbers, scale, softcap), q, k, v, key_mask, offsets, offsets_count,\n"
            "      channels, {key_bias, bias_strides, sinks}, out);\n}\n"
        )
        wrapper.src_to_kernel[source] = name
        wrapper.define_kernel(name, source, gpu=False, cpp_definition=f"{declaration};\n")
    return name
