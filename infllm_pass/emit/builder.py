"""Graph builder: inserts calls with their metadata, as torch functions or as ATen overloads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from infllm_pass.compat.shapes import hint_of
from infllm_pass.graph.facts import example_of
from infllm_pass.graph.op_table import Kind, read
from infllm_pass.graph.subgraphs import fake_mode_of
from infllm_pass.sites import Operand, Step

aten = torch.ops.aten

_OVERLOADS: Mapping[Any, Callable[..., Any]] = {
    **{name: getattr(aten, name).Scalar for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "logical_and": aten.logical_and.default,
    "to": aten.to.dtype,
    "contiguous": aten.contiguous.default,
    "clone": aten.clone.default,
    "reshape": aten.reshape.default,
    "size": aten.sym_size.int,
    "expand": aten.expand.default,
    "unflatten": aten.unflatten.int,
    "flatten": aten.flatten.using_ints,
    "permute": aten.permute.default,
    "squeeze": aten.squeeze.dims,
    "unsqueeze": aten.unsqueeze.default,
    "select": aten.select.int,
    "clamp": aten.clamp.default,
    torch.arange: aten.arange.default,
    torch.full: aten.full.default,
    torch.logical_and: aten.logical_and.default,
    torch.logical_or: aten.logical_or.default,
    torch.logical_not: aten.logical_not.default,
    F.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
}
"""What stands for a method or function of the torch level in an ATen graph, with the same arguments."""

_OPERATORS: Mapping[Any, tuple[Callable[..., Any], Callable[..., Any], Any]] = {
    operator.eq: (aten.eq.Tensor, aten.eq.Scalar, operator.eq),
    operator.ne: (aten.ne.Tensor, aten.ne.Scalar, operator.ne),
    operator.lt: (aten.lt.Tensor, aten.lt.Scalar, operator.gt),
    operator.le: (aten.le.Tensor, aten.le.Scalar, operator.ge),
    operator.gt: (aten.gt.Tensor, aten.gt.Scalar, operator.lt),
    operator.ge: (aten.ge.Tensor, aten.ge.Scalar, operator.le),
    operator.add: (aten.add.Tensor, aten.add.Scalar, operator.add),
    operator.mul: (aten.mul.Tensor, aten.mul.Scalar, operator.mul),
    operator.floordiv: (aten.floor_divide.default, aten.floor_divide.Scalar, None),
    torch.remainder: (aten.remainder.Tensor, aten.remainder.Scalar, None),
}
"""For an operator: its overloads for a tensor and for a number on the right, and what it is with sides exchanged."""

_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack")


class Emitter:
    """Inserts calls that stand for an older node, at the graph's insertion point.

    Args:
        graph: the graph.
        nested: whether another graph calls it, and relies on the memory order of its results.
    """

    def __init__(self, graph: fx.Graph, *, nested: bool = False) -> None:
        self.graph = graph
        self._nested = nested
        self._fresh: list[fx.Node] = []
        self._replaced: dict[fx.Node, fx.Node] = {}

    def keep(self, replaced: Mapping[fx.Node, fx.Node]) -> None:
        """Let the calls stand that were inserted since the last `keep` or `undo`.

        Args:
            replaced: older nodes that are read no more, and what is read in their place.
        """
        self._fresh.clear()
        self._replaced.update(replaced)

    def undo(self) -> None:
        """Erase the calls that were inserted since the last `keep` or `undo`."""
        while self._fresh:
            self.graph.erase_node(self._fresh.pop())

    def call(self, origin: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call, a method for a name, with the metadata that later passes rely on.

        Args:
            origin: the node whose place in the user's model the call takes.
            target: a function, an overload, or the name of a tensor method.
            args: nodes and constants; sizes and dimensions as lists.
            kwargs: the same.
        """
        traced_by_dynamo = "example_value" in origin.meta
        if not traced_by_dynamo:
            target, args = _overload(target, args)
        insert = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = insert(target, args, kwargs)  # type: ignore[arg-type]
        self._fresh.append(node)
        node.meta.update({key: origin.meta[key] for key in _ORIGIN if key in origin.meta})
        values = [_value(arg) for arg in args]
        with fake_mode_of(origin) or nullcontext(), torch.no_grad():
            value = getattr(values[0], target)(*values[1:], **kwargs) if isinstance(target, str) else None
            value = target(*values, **kwargs) if callable(target) else value
        node.meta["example_value" if traced_by_dynamo else "val"] = value
        return node

    def size(self, origin: fx.Node, node: fx.Node, dim: int) -> fx.Node | int:
        """The size of a dimension: a number, or a node where it is dynamic."""
        extent = example_of(node).shape[dim]
        return extent if isinstance(extent, int) else self.call(origin, "size", node, dim)

    def layout(self, origin: fx.Node, node: fx.Node, steps: tuple[Step, ...], batch: Any = None) -> fx.Node:
        """Apply layout operations to a node.

        Args:
            origin: the node whose place they take.
            node: the tensor.
            steps: the operations.
            batch: what "expand" expands the first dimension to: a number or a node.
        """
        for name, numbers in steps:
            if name == "unflatten":
                node = self.call(origin, name, node, numbers[0], [-1, numbers[1]])
            elif name == "flatten" or name == "unsqueeze":
                node = self.call(origin, name, node, *numbers)
            elif name == "expand":
                node = self.call(origin, name, node, [batch, -1, -1, -1])
            else:
                node = self.call(origin, name, node, list(numbers))
        return node

    def strided_as(self, origin: fx.Node, node: fx.Node) -> fx.Node:
        """A tensor in the memory order of the older node that it stands for, where later views rely on that order."""
        if not _is_viewed(origin, self._nested):
            return node
        strides = [_hint(stride) for stride in example_of(origin).stride()]
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        if order == list(range(len(order))):
            return self.call(origin, "contiguous", node)
        moved = self.call(origin, "contiguous", self.call(origin, "permute", node, order))
        return self.call(origin, "permute", moved, [order.index(dim) for dim in range(len(order))])

    def operand(self, origin: fx.Node, operand: Operand, query: Operand) -> fx.Node:
        """A site's tensor as a node ``[B, H, L, D]``."""
        spread = any(name == "expand" for name, _ in operand.steps)
        batch = None
        if spread:
            queries = self.layout(origin, self.current(query.node), query.steps)
            batch = self.size(origin, queries, 0)
        return self.layout(origin, self.current(operand.node), operand.steps, batch)

    def current(self, node: fx.Node) -> fx.Node:
        """What is read in the place of an older node, if anything is."""
        return self._replaced.get(node, node)


def _overload(target: Callable[..., Any] | str, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The overload that stands for a call in an ATen graph; calls on sizes stay what they are."""
    tensors = [isinstance(_value(arg), torch.Tensor) for arg in args[:2]]
    if target == "to" and isinstance(args[1], torch.device):
        return aten.to.device, args
    if target is operator.getitem and isinstance(args[1], tuple):
        return aten.index.Tensor, (args[0], list(args[1]))
    if target not in _OPERATORS or not any(tensors):
        return _OVERLOADS.get(target, target), args
    of_tensor, of_number, exchanged = _OPERATORS[target]
    if all(tensors):
        return of_tensor, args
    if tensors[0]:
        return of_number, args
    return _OPERATORS[exchanged][1], (args[1], args[0])


def _is_viewed(node: fx.Node, nested: bool) -> bool:
    """Whether an operator that needs its input's strides to fit reads a node, or the node moved."""
    for user in node.users:
        if user.target in _STRICT_VIEWS or (nested and user.op == "output"):
            return True
        call = read(user)
        if call is not None and call.kind in _MOVING and _is_viewed(user, nested):
            return True
    return False


_STRICT_VIEWS = ("view", "view_as", "unflatten", aten.view.default, aten.unflatten.int)
_MOVING = (Kind.TRANSPOSE, Kind.PERMUTE, Kind.UNSQUEEZE, Kind.GETITEM)


def _hint(stride: int | torch.SymInt) -> int:
    """A stride as the traced call had it; comparing symbols would guard on them."""
    return stride if isinstance(stride, int) else hint_of(stride) or 0


def _value(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return example_of(argument)
    return type(argument)(map(_value, argument)) if isinstance(argument, (list, tuple)) else argument
