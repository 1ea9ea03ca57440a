"""Code generation for key conditions: a Boolean expression of batch and key index as an ``O(B * Lk)`` tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from infllm_pass.graph.facts import same, size
from infllm_pass.masks.normal_form import BATCH, KEY

_RELATIONS: dict[type, Callable[..., Any]] = {
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.StrictLessThan: operator.lt,
    sympy.LessThan: operator.le,
    sympy.StrictGreaterThan: operator.gt,
    sympy.GreaterThan: operator.ge,
}
_LOGIC = {sympy.And: torch.logical_and, sympy.Or: torch.logical_or}
_ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul}


def is_expressible(expression: sympy.Basic) -> bool:
    """Whether `build` takes an expression."""
    if isinstance(expression, (sympy.Symbol, sympy.Integer)):
        return True
    if isinstance(expression, sympy.Rational):  # only compared with: nothing is computed in floating point
        return False
    if isinstance(expression, sympy.floor):
        return all(map(is_expressible, sympy.fraction(sympy.together(expression.args[0]))))
    known = (*_RELATIONS, *_LOGIC, *_ARITHMETIC, sympy.Not, sympy.Mod, AppliedUndef)
    return isinstance(expression, known) and all(map(is_expressible, expression.args))


@dataclass(frozen=True)
class Site:
    """What a test is computed for, and with: real tensors, or nodes of a graph.

    Attributes:
        call: calls a function, or a tensor method for a name, with values or nodes.
        leaf: the tensor of a name, and its shape.
        size: a dynamic size, or the 0-d tensor of a name.
        batch: number of rows, for calls.
        length: number of keys, for calls.
        extents: both as sizes that can be compared with those of leaves.
        device: where the test is computed.
    """

    call: Callable[..., Any]
    leaf: Callable[[str], tuple[Any, tuple[Any, ...]]]
    size: Callable[[sympy.Symbol], Any]
    batch: Any
    length: Any
    extents: tuple[Any, Any]
    device: torch.device


def build(expression: sympy.Basic, site: Site) -> Any:
    """The value of an expression for every row and key: a number, or something that broadcasts to ``[B, Lk]``.

    Args:
        expression: a Boolean or an integer expression of `BATCH`, `KEY`, sizes and elements of leaves.
        site: what it is computed for.
    """
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if expression in (BATCH, KEY):
        extent = site.batch if expression == BATCH else site.length
        index = site.call(torch.arange, extent, device=site.device)
        return site.call("unsqueeze", index, 1 if expression == BATCH else 0)
    if isinstance(expression, sympy.Symbol):
        return site.size(expression)
    if isinstance(expression, AppliedUndef):
        return _element(expression, site)
    if isinstance(expression, sympy.floor):
        parts = sympy.fraction(sympy.together(expression.args[0]))
        return site.call(operator.floordiv, *(build(part, site) for part in parts))
    parts = [build(part, site) for part in expression.args]
    kind = next(
        kind for kind in (*_RELATIONS, *_LOGIC, *_ARITHMETIC, sympy.Not, sympy.Mod) if isinstance(expression, kind)
    )
    if kind is sympy.Not:
        return site.call(torch.logical_not, *parts)
    if kind is sympy.Mod:
        return site.call(torch.remainder, *parts)
    if kind in _RELATIONS:
        return site.call(_RELATIONS[kind], *parts)
    combine = _LOGIC.get(kind) or _ARITHMETIC[kind]
    return reduce(lambda a, b: site.call(combine, a, b), parts)


def _element(element: AppliedUndef, site: Site) -> Any:
    """An element of a leaf for every row and key.

    Indices that the original program never read, because a condition excludes them, are moved inside the tensor.
    """
    leaf, shape = site.leaf(element.func.__name__)
    index = element.args
    whole = list(zip((BATCH, KEY), site.extents, strict=True))[2 - len(index) :]
    if len(index) <= 2 and all(
        (at == symbol and same(size(extent), size(expected))) or (at == 0 and extent == 1)
        for at, extent, (symbol, expected) in zip(index, shape, whole, strict=True)
    ):
        return leaf if len(index) == 2 else site.call("unsqueeze", leaf, 0)
    positions = []
    for dim in reversed(range(len(index))):
        if index[dim].is_Integer:
            leaf = site.call("select", leaf, dim, int(index[dim]))
        else:
            positions.append(build(index[dim], site))
    if not positions:
        return leaf
    inside = [
        site.call("clamp", position, 0, site.call(operator.sub, site.call("size", leaf, dim), 1))
        for dim, position in enumerate(reversed(positions))
    ]
    return site.call(operator.getitem, leaf, tuple(inside))
