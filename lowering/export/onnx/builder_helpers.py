"""Shapes, branches and loops written with `onnxscript.OpBuilder`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

Value = Any
"""An `onnx_ir.Value`: `OpBuilder` resolves operators at run time, so their results have no static type."""

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def dim_size(op: OpBuilder, x: Value, axis: int) -> Value:
    """The extent of one dimension, int64 ``[1]``."""
    return op.Shape(x, start=axis, end=axis + 1)


def shape_vector(op: OpBuilder, *sizes: Value | int) -> Value:
    """Sizes, numbers or int64 ``[1]``, as one int64 vector."""
    if all(isinstance(size, int) for size in sizes):
        return list(sizes)
    return op.Concat(*([size] if isinstance(size, int) else size for size in sizes), axis=0)


def reshape(op: OpBuilder, x: Value, *sizes: Value | int) -> Value:
    """`x` in another shape; each size is a number, -1 for one to infer, or int64 ``[1]``."""
    return op.Reshape(x, shape_vector(op, *sizes))


def arange(op: OpBuilder, count: Value) -> Value:
    """``0, 1, ..., count - 1``; `count` is int64 ``[1]``."""
    return op.Range(0, op.Squeeze(count, [0]), 1)


def ceil_div(op: OpBuilder, x: Value, divisor: int) -> Value:
    """``x / divisor`` rounded up; `x` is int64 and not negative."""
    return op.Div(op.Add(x, divisor - 1), divisor)


def round_down(op: OpBuilder, x: Value, multiple: int) -> Value:
    """The largest multiple of a number that is at most `x`, int64 and not negative."""
    return op.Mul(op.Div(x, multiple), multiple)


def _subgraph(
    op: OpBuilder, name: str, write: Callable[..., Any], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> ir.Graph:
    """The graph of a branch or a loop. A scope keeps its value names apart from those around it, as ONNX demands."""
    op.builder.push_module(name)
    try:
        return op.builder.subgraph(write, inputs, outputs, name=name)
    finally:
        op.builder.pop_module()


def if_else(
    op: OpBuilder,
    condition: Value,
    then: Callable[[OpBuilder], Value],
    otherwise: Callable[[OpBuilder], Value],
    dtype: ir.DataType,
) -> Value:
    """The result of one of two branches; `condition` is bool ``[1]``, `dtype` the type of both results."""
    branches = {
        f"{name}_branch": _subgraph(op, name, write, [], [ir.val(f"{name}_result", dtype)])
        for name, write in (("then", then), ("else", otherwise))
    }
    return op.If(op.Squeeze(condition, [0]), **branches)


def loop(op: OpBuilder, name: str, count: Value, write: Callable[..., Any], *start: Value, outputs: int) -> Value:
    """The float32 outputs of a ``Loop`` over ``0, 1, ..., count - 1``: its states at the end, then stacked results.

    Args:
        op: builder of the graph around it.
        name: prefix of the names inside it.
        count: number of iterations, int64 ``[1]``.
        write: writes an iteration, given its builder, its number, int64 ``[1]``, and the states.
        start: the states before the first iteration.
        outputs: how many values `write` returns.
    """

    def body(op: OpBuilder, number: ir.Value, _: ir.Value, *states: ir.Value) -> list[Value]:
        going_on = op.Constant(value=ir.tensor(True))
        results = write(op, op.Reshape(number, [1]), *states)
        return [going_on, *([results] if outputs == 1 else results)]

    states = [ir.val(f"{name}_state_{index}", FLOAT) for index in range(len(start))]
    results = [ir.val(f"{name}_result_{index}", FLOAT) for index in range(outputs)]
    number, condition = ir.val(f"{name}_number", INT64, []), ir.val(f"{name}_condition", BOOL, [])
    graph = _subgraph(op, name, body, [number, condition, *states], [ir.val(f"{name}_going_on", BOOL, []), *results])
    return op.Loop(op.Squeeze(count, [0]), None, *start, body=graph, _outputs=outputs)
