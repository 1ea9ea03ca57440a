"""Products that contract one dimension: ``matmul``, ``bmm``, ``baddbmm`` and ``einsum`` as index maps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from infllm_pass.graph.facts import axis
from infllm_pass.graph.op_table import Kind, read
from infllm_pass.sites.layouts import Index, Layouts
from infllm_pass.sites.scalars import read_number

CONTRACTED = sympy.Symbol("contracted", integer=True, nonnegative=True)
"""The index that a product sums over."""


@dataclass(frozen=True)
class Product:
    """``result[…] = factor * sum over CONTRACTED of left[…] * right[…] + added[…]``.

    Attributes:
        node: the result.
        operands: left and right.
        indices: where each is read, in terms of ``axis(d)`` of the result and of `CONTRACTED`.
        factor: a number.
        added: a tensor added to the product, which broadcasts to the result; None without one.
    """

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    indices: tuple[Index, Index]
    factor: float = 1.0
    added: fx.Node | None = None


def read_product(layouts: Layouts, node: fx.Node) -> Product | None:
    """Read a node as a product, or answer None for one that is none or not of two matrices."""
    call = read(node)
    if call is None or not layouts.is_tensor(node):
        return None
    if call.kind is Kind.MATMUL:
        return _matmul(layouts, node, call.args.get("input"), call.args.get("other"))
    if call.kind is Kind.BADDBMM:
        return _baddbmm(layouts, node, call.args)
    if call.kind is Kind.EINSUM:
        return _einsum(layouts, node, call.args)
    return None


def _matmul(layouts: Layouts, node: fx.Node, left: Any, right: Any) -> Product | None:
    if not (layouts.is_tensor(left) and layouts.is_tensor(right)):
        return None
    shape = layouts.shape(node)
    ranks = [len(layouts.shape(operand)) for operand in (left, right)]
    if min(ranks) < 2 or max(ranks) != len(shape):
        return None
    place = tuple(axis(dim) for dim in range(len(shape)))
    indices = []
    for operand, matrix in ((left, (place[-2], CONTRACTED)), (right, (CONTRACTED, place[-1]))):
        own = layouts.shape(operand)[:-2]
        outer = place[len(shape) - 2 - len(own) : -2]
        wanted = shape[len(shape) - 2 - len(own) : -2]
        read_at = [sympy.Integer(0) if e == 1 and w != 1 else i for e, w, i in zip(own, wanted, outer, strict=True)]
        indices.append((*read_at, *matrix))
    return Product(node, (left, right), (indices[0], indices[1]))


def _baddbmm(layouts: Layouts, node: fx.Node, args: dict[str, Any]) -> Product | None:
    product = _matmul(layouts, node, args.get("batch1"), args.get("batch2"))
    factor = read_number(layouts.facts, args.get("alpha", 1))
    share = read_number(layouts.facts, args.get("beta", 1))
    added = args.get("input")
    if product is None or factor is None or share not in (0.0, 1.0) or not layouts.is_tensor(added):
        return None
    return Product(node, product.operands, product.indices, factor, added if share else None)


def _einsum(layouts: Layouts, node: fx.Node, args: dict[str, Any]) -> Product | None:
    equation, operands = args.get("equation"), args.get("operands", ())
    if not isinstance(equation, str) or len(operands) != 2 or not all(map(layouts.is_tensor, operands)):
        return None
    shapes = [layouts.shape(operand) for operand in operands]
    letters = _letters(equation.replace(" ", ""), [len(shape) for shape in shapes])
    if letters is None:
        return None
    *inputs, output = letters
    shared = [letter for letter in dict.fromkeys(inputs[0]) if letter not in output]
    lost = set(inputs[0] + inputs[1]) - set(output)
    if len(shared) != 1 or lost != set(shared) or any(shared[0] not in part for part in inputs):
        return None
    place = {letter: axis(dim) for dim, letter in enumerate(output)} | {shared[0]: CONTRACTED}
    extents = dict(zip(output, layouts.shape(node), strict=True))
    zero = sympy.Integer(0)
    indices = [
        tuple(zero if e == 1 and extents.get(x, e) != 1 else place[x] for x, e in zip(part, shape, strict=True))
        for part, shape in zip(inputs, shapes, strict=True)
    ]
    return Product(node, (operands[0], operands[1]), (indices[0], indices[1]))


def _letters(equation: str, ranks: list[int]) -> list[list[str]] | None:
    """The letters of both operands and of the result, an ellipsis written out; None for a repeated letter."""
    inputs, arrow, output = equation.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        return None
    if not arrow:
        counts = Counter(letter for letter in inputs if letter.isalpha())
        output = ("..." if "..." in inputs else "") + "".join(sorted(x for x, n in counts.items() if n == 1))
    widths = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True) if "..." in part]
    widest = max(widths, default=0)
    found = []
    for part, rank in zip([*parts, output], [*ranks, None], strict=True):
        named = part.replace("...", "")
        width = widest if rank is None else rank - len(named)
        dots = [f"...{number}" for number in range(widest - width, widest)]
        before, found_dots, after = part.partition("...")
        letters = [*before, *(dots if found_dots else []), *after]
        if len(set(letters)) != len(letters) or (rank is not None and len(letters) != rank):
            return None
        found.append(letters)
    return found
