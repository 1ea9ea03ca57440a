"""The table of the interpreter's rules: for each kind of operator, the element that it computes.

A rule gets the interpreter, the example of the result and the operator's arguments by name, and returns the element
of the result at ``(axis(0), axis(1), …)``. It is exact or raises `NotFollowed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import sympy
import torch

from infllm_pass.graph.facts import GraphFacts, size
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.cases import Cases, Rounded, as_number, choose, negation, pairs
from infllm_pass.masks.symbolic import NotFollowed, SymbolicTensor

EXACT_INTEGERS = (torch.int64, torch.int32)
"""Dtypes in which positions and sizes are taken not to overflow."""

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)

Rule = Callable[..., Any]
RULES: dict[Kind, Rule] = {}


class Evaluator(Protocol):
    """What rules need of the interpreter that calls them."""

    @property
    def facts(self) -> GraphFacts:
        """What is known of the graph."""
        ...

    def operand(self, argument: Any) -> SymbolicTensor:
        """An argument as a symbolic tensor."""
        ...

    def integer(self, argument: Any) -> sympy.Expr:
        """An argument that must be one integer."""
        ...


def rule(*kinds: Kind) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of kinds of operators."""

    def enter(function: Rule) -> Rule:
        for kind in kinds:
            RULES[kind] = function
        return function

    return enter


def shape_of(example: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The symbolic shape of an example tensor."""
    return tuple(size(extent) for extent in example.shape)


def dim_of(dim: Any, rank: int) -> int:
    """A dimension counted from the front.

    Raises:
        NotFollowed: it is no number.
    """
    if not isinstance(dim, int):
        raise NotFollowed("its dimension is not a number")
    return dim % rank if rank else 0


def boolean(tensor: SymbolicTensor, shape: tuple[sympy.Expr, ...]) -> sympy.Basic:
    """The element of a boolean tensor, broadcast to a shape.

    Raises:
        NotFollowed: the tensor is not boolean.
    """
    if tensor.dtype != torch.bool:
        raise NotFollowed(f"a {_name(tensor.dtype)} tensor is taken as a condition")
    return tensor.broadcast_to(shape)


def numeric(tensor: SymbolicTensor, shape: tuple[sympy.Expr, ...]) -> sympy.Basic:
    """The element of a tensor as numbers that can be computed with: True and False are 1 and 0.

    Raises:
        NotFollowed: the tensor holds data of a dtype that is not computed with.
    """
    value = tensor.broadcast_to(shape)
    if tensor.dtype == torch.bool:
        return choose([(ONE, value), (ZERO, negation(value))])
    if tensor.dtype in EXACT_INTEGERS:
        return value
    for case, _ in pairs(value):
        if not as_number(case) and not case.has(Rounded):
            raise NotFollowed(f"it computes with {_name(tensor.dtype)} data")
    return value


def integer_value(tensor: SymbolicTensor, shape: tuple[sympy.Expr, ...]) -> sympy.Expr:
    """The element of an integer tensor that is one expression, not given by cases.

    Raises:
        NotFollowed: it is not.
    """
    value = tensor.broadcast_to(shape)
    if tensor.dtype not in EXACT_INTEGERS or isinstance(value, Cases):
        raise NotFollowed("its integers are not one expression of their index")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
