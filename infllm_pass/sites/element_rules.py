"""What operators compute, element by element: the rules of `elements`, by kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sympy
from torch import fx

from infllm_pass.graph.facts import GraphFacts, axis
from infllm_pass.graph.kinds import Kind
from infllm_pass.sites.layouts import Index, Layouts
from infllm_pass.sites.sums import Element, Opaque, Sum, Wave, number_of, plus, single, times

ZERO = sympy.Integer(0)


class Reader(Protocol):
    """What rules ask for the elements of arguments."""

    facts: GraphFacts
    layouts: Layouts

    def element(self, node: fx.Node, index: Index, part: str, before: fx.Node | None) -> Sum:
        """See `elements.Elements.of`."""

    def operand(self, node: fx.Node, argument: Any, index: Index, part: str = "") -> Sum:
        """An element of an argument of an elementwise operator, for one of its result's."""

    def number(self, argument: Any) -> float | None:
        """The number that an argument stands for; None for anything else."""


def tensor_of(run: Reader, argument: Any) -> fx.Node:
    """An argument that has to be a tensor.

    Raises:
        Opaque: it is none.
    """
    if not run.layouts.is_tensor(argument):
        raise Opaque
    node: fx.Node = argument
    return node


def somewhere(node: fx.Node, dim: int, *index: sympy.Expr) -> sympy.Expr:
    """A place along a dimension that only the device knows, the same whenever a node asks for it."""
    name = f"{node.name}_{dim}"
    if index:
        return sympy.Function(name, integer=True, nonnegative=True)(*index)
    return sympy.Symbol(name, integer=True, nonnegative=True)


_Rule = Callable[[Reader, fx.Node, dict[str, Any], Index, str], "Sum | None"]

RULES: dict[Kind, _Rule] = {}
"""For each kind the element of its result at an index; None: an element of its own. A rule may raise `Opaque`.

The last argument is "real" or "imaginary" for a part of a complex element, else "".
"""


def rule(kind: Kind) -> Callable[[_Rule], _Rule]:
    """Enter a rule."""

    def enter(function: _Rule) -> _Rule:
        RULES[kind] = function
        return function

    return enter


@rule(Kind.MUL)
def _mul(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum:
    left, right = args.get("input"), args.get("other")
    if not part:
        return times(run.operand(node, left, index), run.operand(node, right, index))
    a, b = (run.operand(node, left, index, each) for each in ("real", "imaginary"))
    c, d = (run.operand(node, right, index, each) for each in ("real", "imaginary"))
    if part == "real":
        return plus(times(a, c), times(b, d), -1.0)
    return plus(times(a, d), times(b, c))


@rule(Kind.DIV)
def _div(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    if set(args) - {"input", "other"}:
        return None
    above, number = run.operand(node, args.get("input"), index, part), run.number(args.get("other"))
    if number is not None:
        return times(above, number_of(1.0 / number)) if number else None
    by = tensor_of(run, args.get("other"))
    place = run.layouts.broadcast(by, index, run.layouts.shape(node))
    return None if place is None or part else times(above, single(Element(by, place, "inverse")))


@rule(Kind.ADD)
def _add(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return _sum(run, node, args, index, part, 1.0)


@rule(Kind.SUB)
def _sub(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return _sum(run, node, args, index, part, -1.0)


def _sum(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str, sign: float) -> Sum | None:
    if args.get("alpha", 1) != 1 or set(args) - {"input", "other", "alpha"}:
        return None
    left, right = (run.operand(node, args.get(name), index, part) for name in ("input", "other"))
    return plus(left, right, sign)


@rule(Kind.NEG)
def _neg(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum:
    return times(run.operand(node, args.get("input"), index, part), number_of(-1.0))


@rule(Kind.COS)
def _cos(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return None if part else frozenset([((Wave("cos", run.operand(node, args.get("input"), index)),), 1.0)])


@rule(Kind.SIN)
def _sin(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    return None if part else frozenset([((Wave("sin", run.operand(node, args.get("input"), index)),), 1.0)])


@rule(Kind.POLAR)
def _polar(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum:
    wave = Wave("cos" if part == "real" else "sin", run.operand(node, args.get("angle"), index))
    return times(run.operand(node, args.get("abs"), index), frozenset([((wave,), 1.0)]))


@rule(Kind.COMPLEX)
def _complex(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum:
    return run.operand(node, args.get("real" if part == "real" else "imag"), index)


@rule(Kind.VIEW_AS_COMPLEX)
def _view_as_complex(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum:
    return run.element(tensor_of(run, args["input"]), (*index, sympy.Integer(part == "imaginary")), "", node)


@rule(Kind.VIEW_AS_REAL)
def _view_as_real(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    if not index[-1].is_Integer:
        return None
    return run.element(tensor_of(run, args["input"]), index[:-1], "imaginary" if index[-1] == 1 else "real", node)


@rule(Kind.CAT)
def _cat(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    listed = args.get("tensors")
    if not isinstance(listed, (list, tuple)):
        return None
    parts = [tensor_of(run, each) for each in listed]
    dim = args.get("dim", 0) % len(index)
    if not index[dim].is_Integer:
        return _appended(run, node, parts, dim, index, part)
    start: sympy.Expr = ZERO
    for each in parts:
        extent = run.layouts.shape(each)[dim]
        if not extent.is_Integer:
            return None
        if index[dim] < start + extent:
            return run.element(each, (*index[:dim], index[dim] - start, *index[dim + 1 :]), part, node)
        start += extent
    return None


def _appended(run: Reader, node: fx.Node, parts: Sequence[fx.Node], dim: int, index: Index, part: str) -> Sum | None:
    """An element of what a graph appends to a cache: of the one part that is no input of the graph, and not empty."""
    new = [each for each in parts if run.layouts.example(each).numel() != 0 and not _is_input(run.layouts, each)]
    if len(new) != 1:
        return None
    return run.element(new[0], (*index[:dim], somewhere(node, dim), *index[dim + 1 :]), part, node)


def _is_input(layouts: Layouts, node: fx.Node) -> bool:
    """Whether a tensor is an input of the graph, or a view, copy or wider form of one."""
    places = tuple(axis(dim) for dim in range(len(layouts.shape(node))))
    *_, (end, _) = layouts.readings(node, places, scaled=False)
    return end.node.op in ("placeholder", "get_attr") and end.node not in layouts.facts.bindings


@rule(Kind.STACK)
def _stack(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    parts = args.get("tensors")
    dim = args.get("dim", 0) % len(index)
    if not isinstance(parts, (list, tuple)) or not index[dim].is_Integer:
        return None
    return run.element(tensor_of(run, parts[int(index[dim])]), (*index[:dim], *index[dim + 1 :]), part, node)


@rule(Kind.OUTER)
def _outer(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    left, right = (tensor_of(run, args.get(name)) for name in ("input", "vec2"))
    return None if part else times(run.element(left, index[:1], "", node), run.element(right, index[1:], "", node))


@rule(Kind.MATMUL)
def _matmul(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    """A product of matrices of which one has a single column, the other a single row."""
    pair = [tensor_of(run, args.get(name)) for name in ("input", "other")]
    left, right = (run.layouts.shape(each) for each in pair)
    if part or len(left) < 2 or len(right) < 2 or left[-1] != 1:
        return None
    shape, one = run.layouts.shape(node), sympy.Integer(1)
    places: list[Index] = [(*index[:-1], ZERO), (*index[:-2], ZERO, index[-1])]
    wholes: list[Index] = [(*shape[:-1], one), (*shape[:-2], one, shape[-1])]
    found = []
    for each, at, whole in zip(pair, places, wholes, strict=True):
        place = run.layouts.broadcast(each, at, whole)
        if place is None:
            return None
        found.append(run.element(each, place, "", node))
    return times(found[0], found[1])


@rule(Kind.EINSUM)
def _einsum(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    """A product of two tensors that sums over nothing."""
    equation = args.get("equation")
    operands = [tensor_of(run, each) for each in args.get("operands", ())]
    if part or not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").replace("...", "").partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != 2 or set("".join(letters)) - set(output):
        return None
    missing = len(index) - len(output)
    place = dict(zip(output, index[missing:], strict=True))
    found = []
    for each, own in zip(operands, letters, strict=True):
        dots = len(run.layouts.shape(each)) - len(own)
        if dots < 0 or dots > missing:
            return None
        at = (*index[missing - dots : missing], *(place[letter] for letter in own))
        found.append(run.element(each, _within(run, each, at), "", node))
    return times(found[0], found[1])


def _within(run: Reader, node: fx.Node, index: Index) -> Index:
    """An index that is 0 along dimensions of extent 1."""
    return tuple(ZERO if extent == 1 else at for at, extent in zip(index, run.layouts.shape(node), strict=True))


@rule(Kind.GATHER)
def _gather(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    source = tensor_of(run, args.get("input"))
    if not isinstance(args.get("dim"), int):
        return None
    dim = args["dim"] % len(index)
    if index[dim].is_Integer and run.layouts.shape(node)[dim] != 1:
        return None
    return run.element(source, (*index[:dim], somewhere(node, dim, *index), *index[dim + 1 :]), part, node)


@rule(Kind.EMBEDDING)
def _embedding(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum:
    weight = tensor_of(run, args.get("weight"))
    return run.element(weight, (somewhere(node, 0, *index[:-1]), index[-1]), part, node)


@rule(Kind.WHERE)
def _where(run: Reader, node: fx.Node, args: dict[str, Any], index: Index, part: str) -> Sum | None:
    """What a graph puts into a cache: of two tensors the one that is no input of the graph."""
    pair = [tensor_of(run, args.get(name)) for name in ("input", "other")]
    new = [each for each in pair if not _is_input(run.layouts, each)]
    return run.operand(node, new[0], index, part) if len(new) == 1 else None
