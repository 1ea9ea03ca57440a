"""Biases of keys: numbers added to scores that no query has a part in, or only up to a number of its whole row.

A softmax does not see what all keys of a row have in common. So of ALiBi's product of a slope with a distance,
``slope * (key - query)``, the bias keeps ``slope * key``; and where no later key is visible, a distance of both sides,
``abs(query - key)``, is ``query - key``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.graph.facts import axis, example_of, hidden_axis
from infllm_pass.graph.op_table import Call, Kind, read
from infllm_pass.masks.cases import Cases, as_number, pairs, unrounded
from infllm_pass.masks.interpreter import Interpreter, Overwritten
from infllm_pass.masks.normal_form import BATCH, HEAD, KEY, QUERY, HeadFunction, KeyBias, MaskTerm, axes_of
from infllm_pass.masks.rules.registry import shape_of
from infllm_pass.masks.symbolic import NotFollowed
from infllm_pass.masks.terms import Value, hides, value_of

_WIDE = (torch.float32, torch.float64)
"""Dtypes that hold positions exactly, up to 16 million."""

_ELEMENTWISE = {Kind.ADD, Kind.SUB, Kind.MUL, Kind.DIV, Kind.NEG, Kind.POW, Kind.EXP, Kind.EXP2, Kind.SQRT, Kind.CAST}
"""What a score function may compute slopes with: what is true of one head holds for a tensor of all."""


@dataclass(frozen=True)
class AddedToKeys:
    """What a term adds to the scores of the keys that it lets a query see.

    Attributes:
        value: the numbers, a real expression of `BATCH`, `HEAD`, `QUERY` and `KEY`.
        visible: where the term hides no key.
        home: the interpreter of the graph in which the numbers are computed.
        names: what the hidden indices of that graph stand for.
        term: the term.
    """

    value: sympy.Basic
    visible: sympy.Basic
    home: Interpreter
    names: Mapping[sympy.Symbol, sympy.Symbol]
    term: MaskTerm


def added_to_keys(interpreter: Interpreter, term: MaskTerm) -> AddedToKeys | None:
    """What an added term adds, provided that it is one expression wherever it does not hide a key; None otherwise.

    Args:
        interpreter: the interpreter of the graph that the term belongs to.
        term: the term.
    """
    found = _added(interpreter, term)
    if found is not None and key_bias(found, None, "") is not None:
        return found
    stored = _stored(interpreter, term.node) if term.body is None else None
    if stored is None:
        return found
    inside = Interpreter(interpreter.facts, frozenset([stored]), outer=interpreter.outer)
    kept = _added(inside, term)
    interpreter.unknowns.update(inside.unknowns)
    return found if kept is None or key_bias(kept, None, "") is None else kept


def _stored(interpreter: Interpreter, node: fx.Node) -> fx.Node | None:
    """The memory of a cache that a term is read from, to be taken as it is: a concatenation, or a tensor that the graph
    has written to before.
    """
    while True:
        call = read(node)
        if interpreter.facts.is_overwritten(node):
            return node if interpreter.facts.is_final(node) else None
        if call is not None and call.kind is Kind.CAT:
            return node
        sources = [each for each in node.all_input_nodes if isinstance(example_of(each), torch.Tensor)]
        if len(sources) != 1:
            return None
        (node,) = sources


def _added(interpreter: Interpreter, term: MaskTerm) -> AddedToKeys | None:
    found = value_of(interpreter, term)
    if not isinstance(found, Value) or found.dtype == torch.bool:
        return None
    kept: list[sympy.Basic] = []
    values: set[sympy.Basic] = set()
    for number, condition in _without_abs(pairs(found.value)):
        if as_number(number) and hides(number * sympy.Float(term.factor), found.dtype):
            continue
        values.add(number)
        kept.append(condition)
    if len(values) != 1:
        return None
    return AddedToKeys(values.pop(), sympy.Or(*kept), found.interpreter, found.names, term)


def _without_abs(cases: list[tuple[sympy.Basic, sympy.Basic]]) -> list[tuple[sympy.Basic, sympy.Basic]]:
    """The cases; those of an absolute value as one, of which the sign is decided later."""
    if len(cases) == 2 and sympy.expand(unrounded(cases[0][0] + cases[1][0])) == 0:
        return [(Cases(*cases[0], *cases[1]), sympy.true)]
    return cases


def key_bias(added: AddedToKeys, offset: sympy.Expr | None, described: str) -> KeyBias | None:
    """The bias that an added term is; None if queries have a part in it.

    Args:
        added: what the term adds.
        offset: no query ``i`` sees a key after ``i + offset``, whatever the term; None: there is no such limit.
        described: where the numbers come from, for people.
    """
    sign, element = _signed(added.value)
    if isinstance(element, AppliedUndef):
        found = _bias_of(added.home, element, (BATCH, HEAD, KEY), sign * added.term.factor, described)
        if found is not None:
            return found
    try:
        sloped = _Reader(added.home, added.names, offset).read(added.value)
    except (NotFollowed, Overwritten):
        return None
    if sloped is None or sloped.share == 0:
        return None
    factor = added.term.factor * sloped.factor * sloped.share
    if sloped.slope is None:
        return KeyBias(None, (), factor, described, by_position=True, up_to_rows=True)
    found = _bias_of(sloped.home, sloped.slope, (BATCH, HEAD), factor, described)
    return None if found is None else replace(found, by_position=True, up_to_rows=True)


@dataclass(frozen=True)
class _Sloped:
    """``factor * slope * (share * KEY + what is the same for a row)``.

    Attributes:
        home: the interpreter that knows the slope.
        slope: an element of a tensor; None: 1.
        share: how often the number of the key counts.
        factor: a number.
    """

    home: Interpreter
    slope: AppliedUndef | None
    share: int
    factor: float = 1.0


@dataclass(frozen=True)
class _Reader:
    """Reads products of slopes with distances.

    Attributes:
        home: the interpreter of the graph that they are computed in.
        names: what the hidden indices of that graph stand for.
        offset: no query ``i`` sees a key after ``i + offset``; None: there is no such limit.
    """

    home: Interpreter
    names: Mapping[sympy.Symbol, sympy.Symbol]
    offset: sympy.Expr | None

    def read(self, value: sympy.Basic) -> _Sloped | None:
        """Read numbers as such a product; None for others.

        Raises:
            NotFollowed, Overwritten: an operand has no value.
        """
        share = self._share_of_key(value)
        if share is not None:
            return _Sloped(self.home, None, share)
        sign, value = _signed(value)
        if sign != 1.0:
            return self._times(value, sign)
        if not isinstance(value, AppliedUndef):
            return None
        unknown = self.home.unknowns.get(value.func.__name__)
        if unknown is None:
            return None
        if unknown.facts is not self.home.facts:
            return replace(self, home=self.home.interpreter_of(unknown.facts)).read(value)
        call = read(unknown.node)
        if call is None or unknown.facts.is_overwritten(unknown.node):
            return None
        return self._of_call(call, unknown.node, value.args)

    def _of_call(self, call: Call, node: fx.Node, index: tuple[sympy.Expr, ...]) -> _Sloped | None:
        """Read the result of an operator at an index."""
        if set(call.args) - {"input", "other", "targets"}:
            return None
        operands = [call.args.get("input"), call.args.get("other")]
        if call.kind in (Kind.CAST, Kind.IDENTITY, Kind.NEG):
            if self.home.facts.example(node).dtype not in _WIDE:
                return None
            return self._times(self._at(operands[0], node, index), -1.0 if call.kind is Kind.NEG else 1.0)
        if call.kind is Kind.ABS and _is_wide(self.home, node):
            value = self._at(operands[0], node, index)
            share = self._share_of_abs([(-value, sympy.Lt(unrounded(value), 0)), (value, sympy.true)])
            return None if share is None else _Sloped(self.home, None, share)
        if call.kind not in (Kind.MUL, Kind.DIV, Kind.ADD, Kind.SUB):
            return None
        values = [self._at(operand, node, index) for operand in operands]
        if call.kind in (Kind.ADD, Kind.SUB):
            return self._sum(call.kind, *values)
        if call.kind is Kind.DIV:
            number = values[1]
            return self._times(values[0], 1 / float(number)) if as_number(number) and number != 0 else None
        for first, second, counted in ((*values, operands[1]), (*values[::-1], operands[0])):
            if as_number(first) and first.is_finite:
                return self._times(second, float(first))
            distance = self.read(second)
            fixed = isinstance(first, AppliedUndef) and KEY not in first.free_symbols
            if distance is not None and distance.slope is None and fixed and _is_wide(self.home, counted):
                return replace(distance, home=self.home, slope=first)
        return None

    def _times(self, value: sympy.Basic, factor: float) -> _Sloped | None:
        found = self.read(value)
        return None if found is None else replace(found, factor=found.factor * factor)

    def _sum(self, kind: Kind, *values: sympy.Basic) -> _Sloped | None:
        """A sum of two products of which one is the same for a row, so that the other one is what counts."""
        first, second = map(self.read, values)
        if first is None or second is None or (first.share and second.share):
            return None
        if second.share and kind is Kind.SUB:
            return replace(second, factor=-second.factor)
        return second if second.share else first

    def _at(self, operand: Any, node: fx.Node, index: tuple[sympy.Expr, ...]) -> sympy.Basic:
        """What an operand of a node is where the node is read."""
        shape = shape_of(self.home.facts.example(node))
        places = {axis(dim): at for dim, at in zip(range(len(shape)), index, strict=False)}
        value = self.home.operand(operand).broadcast_to(shape).xreplace(places).xreplace(dict(self.names))
        if isinstance(value, AppliedUndef) and _of_head(self.home, value) is not None:
            return value.func(HEAD)
        return value

    def _share_of_key(self, distance: sympy.Basic) -> int | None:
        """How often the key's number counts in an integer expression of it and of what is the same for a row."""
        cases = pairs(distance)
        if len(cases) == 2:
            return self._share_of_abs(cases)
        if not isinstance(distance, sympy.Expr):
            return None
        plain = sympy.expand(unrounded(distance))
        share = plain.coeff(KEY)
        rest = sympy.expand(plain - share * KEY)
        if plain.is_integer is not True or not share.is_Integer:
            return None
        return None if KEY in rest.free_symbols or rest.atoms(AppliedUndef) else int(share)

    def _share_of_abs(self, cases: list[tuple[sympy.Basic, sympy.Basic]]) -> int | None:
        """The same for an absolute value of a distance whose sign is that of all visible keys."""
        (value, condition), (other, _) = cases
        share = self._share_of_key(value)
        plain = sympy.expand(unrounded(value))
        if share not in (1, -1) or self.offset is None or sympy.expand(plain + unrounded(other)) != 0:
            return None
        start = sympy.expand(plain - share * (KEY - QUERY))  # value == share * (KEY - QUERY) + start
        last = sympy.expand(self.offset + share * start)  # share * value is at most this for a visible key
        if start.free_symbols & {BATCH, HEAD, QUERY, KEY} or last.is_nonpositive is not True:
            return None
        sign = sympy.Symbol("sign", integer=True)
        tested = condition.xreplace({KEY: QUERY + share * (sign - start)})
        if not isinstance(tested, sympy.core.relational.Relational):
            return None
        slack = sympy.expand(tested.lhs - tested.rhs)
        if slack not in (sign, -sign):
            return None
        return share if tested.func(slack, 0).xreplace({sign: sympy.Integer(-share)}) == sympy.true else -share


def _of_head(interpreter: Interpreter, value: AppliedUndef) -> HeadFunction | None:
    """What a score function computes of the head and of numbers alone; None for all else."""
    unknown = interpreter.unknowns.get(value.func.__name__)
    if unknown is None or unknown.facts is not interpreter.facts or not interpreter.seeds:
        return None
    heads: set[fx.Node] = set()
    stack, seen = [unknown.node], set()
    while stack:
        each = stack.pop()
        if each in seen:
            continue
        seen.add(each)
        if interpreter.seeds.get(each) == hidden_axis("head"):
            heads.add(each)
            continue
        call = read(each)
        if call is None or call.kind not in _ELEMENTWISE or interpreter.facts.is_overwritten(each):
            return None
        stack += each.all_input_nodes
    return HeadFunction(unknown.node, heads.pop()) if len(heads) == 1 else None


def _signed(value: sympy.Basic) -> tuple[float, sympy.Basic]:
    """A value as what it is but for its sign, and the sign."""
    return (-1.0, -value) if isinstance(value, sympy.Mul) and value.args[0] == -1 else (1.0, value)


def _is_wide(interpreter: Interpreter, node: Any) -> bool:
    """Whether integers that a node holds are rounded to no dtype narrower than float32 on the way."""
    stack, seen = [node], set()
    while stack:
        each = stack.pop()
        dtype = getattr(interpreter.facts.example(each), "dtype", None) if isinstance(each, fx.Node) else None
        if dtype is None or not dtype.is_floating_point or each in seen:
            continue
        if dtype not in _WIDE or each.op == "placeholder":
            return False
        seen.add(each)
        stack += each.all_input_nodes
    return True


def _bias_of(
    interpreter: Interpreter, added: AppliedUndef, axes: tuple[sympy.Symbol, ...], factor: float, described: str
) -> KeyBias | None:
    """The bias that a tensor's elements make which are read at some axes, once each, and at `KEY` if it is one."""
    unknown = interpreter.unknowns.get(added.func.__name__)
    computed = _of_head(interpreter, added)
    if computed is not None and KEY not in axes:
        return KeyBias(None, (HEAD,), factor, described, computed=computed)
    read = [at for at in added.args if not at.is_Integer]
    symbols = [symbol for at in read for symbol in axes_of(at)]
    known = all(map(axes_of, read)) and len(symbols) == len(set(symbols)) and set(symbols) <= set(axes)
    if unknown is None or not unknown.readable or not known or (KEY in axes and KEY not in symbols):
        return None
    leaf = added.func.__name__, unknown.facts, unknown.node
    return KeyBias(leaf, tuple(added.args), factor, described)
