"""Constants in a graph: literals, Dynamo's symbolic floats, and tensors filled with one value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from infllm_pass.compat.shapes import free_unbacked_symbols
from infllm_pass.graph.facts import GraphFacts
from infllm_pass.graph.op_table import Kind, read

_ARITHMETIC = {Kind.ADD, Kind.SUB, Kind.MUL, Kind.DIV, Kind.POW, Kind.SQRT, Kind.NEG}
_FORWARDED = {Kind.IDENTITY, Kind.EXPAND, Kind.RESHAPE, Kind.UNSQUEEZE}


def number_of(value: Any) -> float | None:
    """A number, or one that tracing made symbolic (reading it guards on its value); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        return None
    return None if free_unbacked_symbols(value) else float(value)


def read_number(facts: GraphFacts, argument: Any) -> float | None:
    """The number that an argument stands for, if it does not depend on the graph's inputs; else None.

    Args:
        facts: the graph's facts.
        argument: a number, or a node that holds one or a tensor filled with one.
    """
    if not isinstance(argument, fx.Node):
        return number_of(argument)
    example = facts.example(argument)
    if not isinstance(example, torch.Tensor):
        return number_of(example)
    value = _uniform(facts, argument)
    return None if value is None else float(value)


def _uniform(facts: GraphFacts, node: fx.Node) -> torch.Tensor | None:
    """The value, of the tensor's own dtype, that all elements of a tensor have."""
    call = read(node)
    if call is None or facts.is_overwritten(node):
        return None
    dtype = facts.example(node).dtype
    if call.kind is Kind.FULL:
        return _as_scalar(read_number(facts, call.args.get("fill_value")), dtype)
    if call.kind is Kind.SCALAR_TENSOR:
        return _as_scalar(read_number(facts, call.args.get("data")), dtype)
    if call.kind is Kind.CAST or call.kind in _FORWARDED:
        return _as_scalar(read_number(facts, call.args.get("input")), dtype)
    if call.kind in _ARITHMETIC and not set(call.args) - {"input", "other"}:
        operands = [_operand(facts, call.args[name]) for name in ("input", "other") if name in call.args]
        if all(operand is not None for operand in operands):
            result = _COMPUTE[call.kind](*operands)
            return result.to(dtype) if isinstance(result, torch.Tensor) else None
    return None


_COMPUTE: dict[Kind, Any] = {
    Kind.ADD: lambda a, b: a + b,
    Kind.SUB: lambda a, b: a - b,
    Kind.MUL: lambda a, b: a * b,
    Kind.DIV: lambda a, b: a / b,
    Kind.POW: lambda a, b: a**b,
    Kind.SQRT: torch.sqrt,
    Kind.NEG: lambda a: -a,
}


def _operand(facts: GraphFacts, argument: Any) -> torch.Tensor | float | None:
    if isinstance(argument, fx.Node) and isinstance(facts.example(argument), torch.Tensor):
        return _uniform(facts, argument)
    return read_number(facts, argument)


def _as_scalar(value: float | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float64).to(dtype)
