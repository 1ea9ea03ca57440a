"""Writing the body of an ONNX function: tensors with operators, branches, loops and constants.

A `Body` collects nodes; a `Value` is a tensor of it. Arithmetic on values emits nodes into whatever part of the body
is being written at that moment, so that a branch or a loop may read the tensors around it, as ONNX allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from onnx import FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper


class Value:
    """A tensor of a `Body`. Python numbers beside it become constants: int64, or float32 for floats."""

    def __init__(self, body: Body, name: str) -> None:
        self.body = body
        self.name = name

    def __add__(self, other: Value | float) -> Value:
        return self.body.op("Add", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self.body.op("Sub", self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self.body.op("Mul", self, other)

    def __floordiv__(self, other: Value | int) -> Value:
        """Division of integers; it rounds towards zero, so that it is a floor where both are not negative."""
        return self.body.op("Div", self, other)

    def __mod__(self, other: Value | int) -> Value:
        """Remainder of integers with the sign of the divisor, as in Python."""
        return self.body.op("Mod", self, other)

    def __le__(self, other: Value | float) -> Value:
        return self.body.op("LessOrEqual", self, other)

    def __lt__(self, other: Value | float) -> Value:
        return self.body.op("Less", self, other)

    def __ge__(self, other: Value | float) -> Value:
        return self.body.op("GreaterOrEqual", self, other)

    def __gt__(self, other: Value | float) -> Value:
        return self.body.op("Greater", self, other)

    def __and__(self, other: Value) -> Value:
        return self.body.op("And", self, other)

    def __or__(self, other: Value) -> Value:
        return self.body.op("Or", self, other)


Operand = Value | bool | int | float | Sequence[int]


class _Part:
    """Nodes under construction, the constants that they already hold, and what they are nested in."""

    def __init__(self, outer: _Part | None) -> None:
        self.outer = outer
        self.inputs: list[ValueInfoProto] = []
        self.nodes: list[NodeProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def constant(self, key: tuple[str, tuple[int, ...], bytes]) -> Value | None:
        part: _Part | None = self
        while part is not None:
            if key in part.constants:
                return part.constants[key]
            part = part.outer
        return None


class Body:
    """The nodes of a function, in order.

    Args:
        inputs: names of the function's inputs.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self.inputs = [Value(self, name) for name in inputs]
        self._part = _Part(None)
        self._count = 0

    def op(self, kind: str, *operands: Operand | None, outputs: int = 1, **attributes: Any) -> Any:
        """Emit a node of the default domain.

        Args:
            kind: the operator.
            operands: values, numbers, lists of integers (int64 vectors), or None for an input left out.
            outputs: how many outputs; a tuple is returned for more than one.
            attributes: the node's attributes.
        """
        names = ["" if operand is None else self._value(operand).name for operand in operands]
        values = [Value(self, self._name(kind)) for _ in range(outputs)]
        self._part.nodes.append(helper.make_node(kind, names, [value.name for value in values], **attributes))
        return values[0] if outputs == 1 else tuple(values)

    def size(self, x: Value, axis: int) -> Value:
        """The extent of one dimension, int64 ``[1]``."""
        value: Value = self.op("Shape", x, start=axis, end=axis + 1)
        return value

    def arange(self, count: Value) -> Value:
        """``0, 1, ..., count - 1``; `count` is int64 ``[1]``."""
        value: Value = self.op("Range", 0, self.op("Squeeze", count, [0]), 1)
        return value

    def reshape(self, x: Value, *sizes: Value | int) -> Value:
        """`x` with another shape; sizes are numbers, -1 for one to infer, or int64 ``[1]``."""
        value: Value = self.op("Reshape", x, self.shape(*sizes))
        return value

    def shape(self, *sizes: Value | int) -> Value:
        """Sizes as one int64 vector."""
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) == len(sizes):
            return self._value(numbers)
        value: Value = self.op("Concat", *([size] if isinstance(size, int) else size for size in sizes), axis=0)
        return value

    def cast(self, x: Value, dtype: int) -> Value:
        """`x` in another type, a number of ``TensorProto``."""
        value: Value = self.op("Cast", x, to=dtype)
        return value

    def branch(self, condition: Value, then: Callable[[], Value], otherwise: Callable[[], Value], dtype: int) -> Value:
        """The result of one of two bodies; `dtype` is that of both results."""
        graphs = {}
        for name, write in (("then_branch", then), ("else_branch", otherwise)):
            with self._nested() as part:
                result = self.op("Identity", write())
            graphs[name] = helper.make_graph(part.nodes, name, [], [_typed(result, dtype)])
        value: Value = self.op("If", self.op("Squeeze", condition, [0]), **graphs)
        return value

    def each(self, count: Value, write: Callable[[Value], Value], dtype: int) -> Value:
        """Results of a body for ``0, 1, ..., count - 1``, stacked along a new first dimension.

        Args:
            count: how many, int64 ``[1]``.
            write: writes the body for a number, int64 ``[1]``.
            dtype: type of the results.
        """
        with self._nested() as part:
            result = self.op("Identity", write(self._counter()))
        value: Value = self._loop(count, part, (), [_typed(result, dtype)])
        return value

    def repeat(
        self, count: Value, start: Sequence[Value], write: Callable[[Value, Sequence[Value]], Sequence[Value]]
    ) -> Sequence[Value]:
        """What float32 values have become after a body ran for ``0, 1, ..., count - 1``, each keeping its shape.

        Args:
            count: how many, int64 ``[1]``.
            start: the values before.
            write: writes the body for a number, int64 ``[1]``, and the values so far.
        """
        with self._nested() as part:
            number = self._counter()
            part.inputs += [_typed(Value(self, self._name("state")), TensorProto.FLOAT) for _ in start]
            states = [Value(self, each.name) for each in part.inputs[2:]]
            results = [self.op("Identity", result) for result in write(number, states)]
        values: Sequence[Value] = self._loop(count, part, start, [_typed(x, TensorProto.FLOAT) for x in results])
        return values

    def _counter(self) -> Value:
        """Begin the body of a loop: its inputs and the condition to go on; gives the number, int64 ``[1]``."""
        number, going_on = Value(self, self._name("number")), Value(self, self._name("going_on"))
        again = self.op("Constant", value=numpy_helper.from_array(np.array(True)))
        self._part.inputs += [_typed(number, TensorProto.INT64, ()), _typed(going_on, TensorProto.BOOL, ())]
        self._part.outputs.append(_typed(again, TensorProto.BOOL, ()))
        value: Value = self.op("Reshape", number, [1])
        return value

    def _loop(self, count: Value, part: _Part, start: Sequence[Value], results: list[ValueInfoProto]) -> Any:
        body: GraphProto = helper.make_graph(part.nodes, "body", part.inputs, [*part.outputs, *results])
        return self.op("Loop", self.op("Squeeze", count, [0]), None, *start, outputs=len(results), body=body)

    def function(
        self, domain: str, name: str, output: Value, *, opset: int, attributes: Sequence[str], overload: str
    ) -> FunctionProto:
        """The finished function with one output."""
        self._part.nodes.append(helper.make_node("Identity", [output.name], ["out"]))
        return helper.make_function(
            domain,
            name,
            [value.name for value in self.inputs],
            ["out"],
            self._part.nodes,
            [helper.make_opsetid("", opset)],
            attributes=list(attributes),
            overload=overload,
        )

    @contextmanager
    def _nested(self) -> Iterator[_Part]:
        self._part = _Part(self._part)
        try:
            yield self._part
        finally:
            assert self._part.outer is not None
            self._part = self._part.outer

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    def _value(self, operand: Operand) -> Value:
        if isinstance(operand, Value):
            return operand
        array = np.asarray(operand, dtype=np.float32 if isinstance(operand, float) else None)
        if array.dtype != np.float32 and array.dtype != np.bool_:
            array = array.astype(np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        known = self._part.constant(key)
        if known is None:
            known = self.op("Constant", value=numpy_helper.from_array(array))
            self._part.constants[key] = known
        return known


def _typed(value: Value, dtype: int, shape: tuple[int, ...] | None = None) -> ValueInfoProto:
    return helper.make_tensor_value_info(value.name, dtype, shape)
