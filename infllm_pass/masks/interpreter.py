"""An abstract interpreter: evaluates the nodes that feed a mask into `SymbolicTensor` values.

A value is exact for all sizes and all inputs. What the interpreter does not follow becomes a named function of
its index (`masks.values.element`), so that two uses of one tensor still cancel; only memory that the graph
overwrites has no value at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.masks.values import GraphFacts, SymbolicTensor, axis, element, same, size
from infllm_pass.vocabulary import Kind, read

_EXACT_INTEGERS = (torch.int64, torch.int32)
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


class Overwritten(Exception):
    """A node's memory is overwritten somewhere in the graph, so its value depends on when it is read."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


class _NotFollowed(Exception):
    """A node uses an operator in a way that the interpreter has no exact rule for."""


class Interpreter:
    """Evaluates nodes of one graph, each once.

    Args:
        facts: the graph's facts.
        leaves: nodes to treat as unknown tensors without looking at how they were made.
    """

    def __init__(self, facts: GraphFacts, leaves: frozenset[fx.Node] = frozenset()) -> None:
        self.facts = facts
        self.leaves = leaves
        self.unknowns: dict[str, tuple[GraphFacts, fx.Node]] = {}
        self._values: dict[fx.Node, SymbolicTensor] = {}
        self._outer: dict[GraphFacts, Interpreter] = {}

    def evaluate(self, node: fx.Node) -> SymbolicTensor | None:
        """The symbolic value of a node, or None if it is not a tensor.

        Raises:
            Overwritten: the node, or one that it is computed from, lives in memory the graph overwrites.
        """
        if node in self._values:
            return self._values[node]
        example = self.facts.example(node)
        if not isinstance(example, torch.Tensor):
            return None
        if self.facts.is_overwritten(node):
            raise Overwritten(node)
        value = self._from_outer_graph(node)
        if value is None:
            try:
                value = self._apply_rule(node, example)
            except _NotFollowed:
                value = self._unknown(node, example)
        self._values[node] = value
        return value

    def _from_outer_graph(self, node: fx.Node) -> SymbolicTensor | None:
        """The value of a nested graph's placeholder, from the graph that calls it."""
        binding = self.facts.bindings.get(node)
        if binding is None or node in self.leaves:
            return None
        facts, outer = binding
        interpreter = self._outer.setdefault(facts, Interpreter(facts))
        value = interpreter.evaluate(outer)
        self.unknowns.update(interpreter.unknowns)
        return value

    def _unknown(self, node: fx.Node, example: torch.Tensor) -> SymbolicTensor:
        name = f"{node.name}@{id(self.facts):x}"
        self.unknowns[name] = (self.facts, node)
        return SymbolicTensor(_shape(example), element(name, example.dim(), example.dtype), example.dtype)

    def _apply_rule(self, node: fx.Node, example: torch.Tensor) -> SymbolicTensor:
        call = None if node in self.leaves else read(node)
        rule = None if call is None else _RULES.get(call.kind)
        if call is None or rule is None:
            raise _NotFollowed
        try:
            arguments = inspect.signature(rule).bind(self, example, **call.args)
        except TypeError as error:
            raise _NotFollowed from error
        value = rule(*arguments.args, **arguments.kwargs)
        return SymbolicTensor(_shape(example), value, example.dtype)

    def operand(self, argument: Any) -> SymbolicTensor:
        """An argument as a symbolic tensor: a node, a number or a SymInt."""
        if isinstance(argument, fx.Node):
            example = self.facts.example(argument)
            if isinstance(example, torch.Tensor):
                value = self.evaluate(argument)
                if value is not None:
                    return value
            argument = example
        if isinstance(argument, bool):
            return SymbolicTensor((), sympy.true if argument else sympy.false, torch.bool)
        if isinstance(argument, (int, torch.SymInt)):
            return SymbolicTensor((), size(argument), torch.int64)
        raise _NotFollowed

    def integer(self, argument: Any) -> sympy.Expr:
        """An argument that must be one integer: a number, a SymInt or a node holding either."""
        if isinstance(argument, fx.Node):
            argument = self.facts.example(argument)
        if isinstance(argument, bool) or not isinstance(argument, (int, torch.SymInt)):
            raise _NotFollowed
        return size(argument)


Rule = Callable[..., sympy.Basic]
_RULES: dict[Kind, Rule] = {}


def _rule(*kinds: Kind) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        for kind in kinds:
            _RULES[kind] = function
        return function

    return enter


def _shape(example: torch.Tensor) -> tuple[sympy.Expr, ...]:
    return tuple(size(extent) for extent in example.shape)


def _integer_value(tensor: SymbolicTensor, shape: tuple[sympy.Expr, ...]) -> sympy.Expr:
    value = tensor.broadcast_to(shape)
    if tensor.dtype == torch.bool:
        return sympy.Piecewise((ONE, value), (ZERO, True))
    if tensor.dtype not in _EXACT_INTEGERS:
        raise _NotFollowed
    return value


def _boolean_value(tensor: SymbolicTensor, shape: tuple[sympy.Expr, ...]) -> sympy.Basic:
    if tensor.dtype != torch.bool:
        raise _NotFollowed
    return tensor.broadcast_to(shape)


def _dim(dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        raise _NotFollowed
    return dim % rank if rank else 0


@_rule(Kind.ARANGE)
def _arange(
    run: Interpreter,
    example: torch.Tensor,
    bounds: tuple[Any, ...] = (),
    start: Any = None,
    end: Any = None,
    step: Any = None,
    **_placement: Any,
) -> sympy.Basic:
    if example.dtype not in _EXACT_INTEGERS:
        raise _NotFollowed
    if len(bounds) > 1:
        start = bounds[0]
    if len(bounds) > 2:
        step = bounds[2]
    first = ZERO if start is None else run.integer(start)
    return first + axis(0) * (ONE if step is None else run.integer(step))


@_rule(Kind.FULL)
def _full(
    run: Interpreter,
    example: torch.Tensor,
    fill_value: Any,
    size: Any = None,
    like: Any = None,
    **_placement: Any,
) -> sympy.Basic:
    if example.dtype == torch.bool and isinstance(fill_value, (bool, int)):
        return sympy.true if fill_value else sympy.false
    if example.dtype not in _EXACT_INTEGERS:
        raise _NotFollowed
    return run.integer(fill_value)


@_rule(Kind.NEG)
def _neg(run: Interpreter, example: torch.Tensor, input: Any) -> sympy.Basic:
    return -_integer_value(run.operand(input), _shape(example))


def _arithmetic(combine: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Rule:
    def rule(run: Interpreter, example: torch.Tensor, input: Any, other: Any) -> sympy.Basic:
        if example.dtype not in _EXACT_INTEGERS:
            raise _NotFollowed
        shape = _shape(example)
        return combine(_integer_value(run.operand(input), shape), _integer_value(run.operand(other), shape))

    return rule


_rule(Kind.ADD)(_arithmetic(lambda a, b: a + b))
_rule(Kind.SUB)(_arithmetic(lambda a, b: a - b))
_rule(Kind.MUL)(_arithmetic(lambda a, b: a * b))
_rule(Kind.FLOORDIV)(_arithmetic(lambda a, b: sympy.floor(a / b)))


def _comparison(relation: Callable[[sympy.Expr, sympy.Expr], sympy.Basic]) -> Rule:
    def rule(run: Interpreter, example: torch.Tensor, input: Any, other: Any) -> sympy.Basic:
        shape = _shape(example)
        operands = (_integer_value(run.operand(argument), shape) for argument in (input, other))
        return _compare(relation, *operands)

    return rule


def _compare(relation: Callable[[sympy.Expr, sympy.Expr], sympy.Basic], a: sympy.Expr, b: sympy.Expr) -> sympy.Basic:
    """A comparison in which a value given by cases is compared case by case."""
    if isinstance(b, sympy.Piecewise) and not isinstance(a, sympy.Piecewise):
        return _compare(lambda x, y: relation(y, x), b, a)
    if not isinstance(a, sympy.Piecewise):
        return relation(a, b)
    cases: list[sympy.Basic] = []
    earlier: list[sympy.Basic] = []
    for value, condition in a.args:
        cases.append(sympy.And(*map(sympy.Not, earlier), condition, _compare(relation, value, b)))
        earlier.append(condition)
    return sympy.Or(*cases)


_rule(Kind.EQ)(_comparison(sympy.Eq))
_rule(Kind.NE)(_comparison(sympy.Ne))
_rule(Kind.LT)(_comparison(sympy.Lt))
_rule(Kind.LE)(_comparison(sympy.Le))
_rule(Kind.GT)(_comparison(sympy.Gt))
_rule(Kind.GE)(_comparison(sympy.Ge))


def _logic(combine: Callable[..., sympy.Basic]) -> Rule:
    def rule(run: Interpreter, example: torch.Tensor, input: Any, other: Any) -> sympy.Basic:
        shape = _shape(example)
        return combine(_boolean_value(run.operand(input), shape), _boolean_value(run.operand(other), shape))

    return rule


_rule(Kind.AND)(_logic(sympy.And))
_rule(Kind.OR)(_logic(sympy.Or))


@_rule(Kind.NOT)
def _not(run: Interpreter, example: torch.Tensor, input: Any) -> sympy.Basic:
    return sympy.Not(_boolean_value(run.operand(input), _shape(example)))


@_rule(Kind.WHERE)
def _where(run: Interpreter, example: torch.Tensor, condition: Any, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(example)
    test = _boolean_value(run.operand(condition), shape)
    if example.dtype == torch.bool:
        yes, no = (_boolean_value(run.operand(branch), shape) for branch in (input, other))
        return sympy.Or(sympy.And(test, yes), sympy.And(sympy.Not(test), no))
    yes, no = (_integer_value(run.operand(branch), shape) for branch in (input, other))
    return sympy.Piecewise((yes, test), (no, True))


@_rule(Kind.CAST)
def _cast(
    run: Interpreter, example: torch.Tensor, input: Any, targets: tuple[Any, ...] = (), **_placement: Any
) -> sympy.Basic:
    source = run.operand(input)
    if source.dtype == example.dtype:
        return source.value
    if example.dtype == torch.bool:
        return _compare(sympy.Ne, _integer_value(source, source.shape), ZERO)
    if example.dtype not in _EXACT_INTEGERS:
        raise _NotFollowed
    return _integer_value(source, source.shape)


@_rule(Kind.IDENTITY)
def _identity(run: Interpreter, example: torch.Tensor, input: Any, **_placement: Any) -> sympy.Basic:
    return run.operand(input).value


@_rule(Kind.UNSQUEEZE)
def _unsqueeze(run: Interpreter, example: torch.Tensor, input: Any, dim: Any) -> sympy.Basic:
    new = _dim(dim, example.dim())
    return run.operand(input).at([axis(d) for d in range(example.dim()) if d != new])


@_rule(Kind.EXPAND)
def _expand(
    run: Interpreter, example: torch.Tensor, input: Any, sizes: Any = (), size: Any = None, other: Any = None
) -> sympy.Basic:
    return run.operand(input).broadcast_to(_shape(example))


@_rule(Kind.TRANSPOSE)
def _transpose(run: Interpreter, example: torch.Tensor, input: Any, dim0: Any, dim1: Any) -> sympy.Basic:
    index = [axis(d) for d in range(example.dim())]
    a, b = _dim(dim0, example.dim()), _dim(dim1, example.dim())
    index[a], index[b] = index[b], index[a]
    return run.operand(input).at(index)


@_rule(Kind.PERMUTE)
def _permute(run: Interpreter, example: torch.Tensor, input: Any, dims: tuple[Any, ...]) -> sympy.Basic:
    index = [ZERO] * example.dim()
    for new, old in enumerate(dims):
        index[_dim(old, example.dim())] = axis(new)
    return run.operand(input).at(index)


@_rule(Kind.REPEAT_INTERLEAVE)
def _repeat_interleave(
    run: Interpreter, example: torch.Tensor, input: Any, repeats: Any, dim: Any = None
) -> sympy.Basic:
    along = _dim(dim, example.dim())
    index: list[sympy.Expr] = [axis(d) for d in range(example.dim())]
    index[along] = sympy.floor(axis(along) / run.integer(repeats))
    return run.operand(input).at(index)


@_rule(Kind.RESHAPE)
def _reshape(run: Interpreter, example: torch.Tensor, input: Any, shape: Any = ()) -> sympy.Basic:
    source = run.operand(input)
    if ZERO in (*source.shape, *_shape(example)):
        raise _NotFollowed
    return source.at(_reshaped_index(source.shape, _shape(example)))


def _reshaped_index(old: Sequence[sympy.Expr], new: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """For a reshape, the old tensor's index as expressions of the new one's.

    Dimensions are matched in groups of equal element count from the outside in; inside a group the row-major
    position is put together and taken apart again.
    """
    index: list[sympy.Expr] = []
    i = j = 0
    while i < len(old) or j < len(new):
        group_old, group_new = [i], [j]
        count_old = old[i] if i < len(old) else ONE
        count_new = new[j] if j < len(new) else ONE
        i, j = i + 1, j + 1
        while not same(count_old, count_new):
            if i < len(old) and (j >= len(new) or _divides(count_old, count_new)):
                count_old, i = count_old * old[i], i + 1
                group_old.append(i - 1)
            elif j < len(new):
                count_new, j = count_new * new[j], j + 1
                group_new.append(j - 1)
            else:
                raise _NotFollowed
        position: sympy.Expr = ZERO
        for dim in group_new:
            if dim < len(new):
                position = position * new[dim] + (ZERO if new[dim] == 1 else axis(dim))
        parts: list[sympy.Expr] = []
        inner: sympy.Expr = ONE
        real = [dim for dim in group_old if dim < len(old)]
        for dim in reversed(real):
            part = position if inner == 1 else sympy.floor(position / inner)
            parts.append(part if dim == real[0] else (ZERO if old[dim] == 1 else sympy.Mod(part, old[dim])))
            inner = inner * old[dim]
        index.extend(reversed(parts))
    return index


def _divides(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether `a` is a proper factor of `b`, so that a group starting with `a` has to grow."""
    ratio = sympy.cancel(b / a)
    return bool(ratio.is_polynomial(*ratio.free_symbols)) and ratio.is_integer is not False


@_rule(Kind.GETITEM)
def _getitem(run: Interpreter, example: torch.Tensor, input: Any, index: Any) -> sympy.Basic:
    source = run.operand(input)
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    tensors = [entry for entry in entries if _is_tensor(run, entry)]
    if tensors:
        if len(tensors) != len(entries) or len(entries) != len(source.shape):
            raise _NotFollowed
        return source.at([_gather_index(run, entry, example) for entry in entries])
    consumed = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis not in entries:
        entries.append(Ellipsis)
    place = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
    entries[place : place + 1] = [slice(None)] * (len(source.shape) - consumed)
    picked: list[sympy.Expr] = []
    new = 0
    for entry in entries:
        if entry is None:
            new += 1
        elif isinstance(entry, slice):
            picked.append(axis(new) * _step(entry) + _slice_start(run, entry, source.shape[len(picked)]))
            new += 1
        else:
            position = run.integer(entry)
            if position.is_negative is True:
                position = position + source.shape[len(picked)]
            if position.is_nonnegative is not True:
                raise _NotFollowed
            picked.append(position)
    return source.at(picked)


def _is_tensor(run: Interpreter, entry: Any) -> bool:
    return isinstance(entry, fx.Node) and isinstance(run.facts.example(entry), torch.Tensor)


def _gather_index(run: Interpreter, entry: fx.Node, example: torch.Tensor) -> sympy.Expr:
    """A tensor used as an index: it must be provably non-negative, for negative ones count from the end."""
    value = _integer_value(run.operand(entry), _shape(example))
    if run.operand(entry).dtype == torch.bool or value.is_nonnegative is not True:
        raise _NotFollowed
    return value


def _step(entry: slice) -> sympy.Expr:
    if entry.step is None:
        return ONE
    if not isinstance(entry.step, int) or entry.step < 1:
        raise _NotFollowed
    return sympy.Integer(entry.step)


def _slice_start(run: Interpreter, entry: slice, extent: sympy.Expr) -> sympy.Expr:
    if entry.start is None:
        return ZERO
    start = run.integer(entry.start)
    if start.is_nonnegative is True:
        return start
    from_end = extent + start
    if start.is_negative is True and from_end.is_nonnegative is True:
        return from_end
    raise _NotFollowed


@_rule(Kind.DIFF)
def _diff(
    run: Interpreter, example: torch.Tensor, input: Any, n: Any = 1, dim: Any = -1, prepend: Any = None
) -> sympy.Basic:
    source = run.operand(input)
    along = _dim(dim, example.dim())
    if n != 1:
        raise _NotFollowed
    here = [axis(d) for d in range(example.dim())]
    before: list[sympy.Expr] = list(here)
    current = _integer_value(source, source.shape)
    if prepend is None:
        before[along] = axis(along) + 1
        return SymbolicTensor(source.shape, current, source.dtype).at(before) - current
    first = run.operand(prepend)
    if first.shape[along] != 1:
        raise _NotFollowed
    before[along] = axis(along) - 1
    previous = SymbolicTensor(source.shape, current, source.dtype).at(before)
    head = _integer_value(first, _shape(example))
    if same(previous.xreplace({axis(along): ZERO}), head):
        return sympy.expand(current - previous)
    return current - sympy.Piecewise((head, sympy.Eq(axis(along), 0)), (previous, True))


@_rule(Kind.CUMSUM)
def _cumsum(
    run: Interpreter, example: torch.Tensor, input: Any, dim: Any, dtype: torch.dtype | None = None
) -> sympy.Basic:
    source = run.operand(input)
    if example.dtype not in _EXACT_INTEGERS or source.value not in (sympy.false, ZERO):
        raise _NotFollowed
    return ZERO
