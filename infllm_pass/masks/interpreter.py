"""An abstract interpreter: evaluates the nodes that feed a mask into `SymbolicTensor` values.

A value is exact for all sizes and all inputs. What the interpreter does not follow becomes a named function of
its index (`graph.facts.element`), so that two uses of one tensor still cancel; only memory that the graph
overwrites before it is read has no value at all. What operators compute is in the files of rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.compat.shapes import free_unbacked_symbols
from infllm_pass.graph.facts import GraphFacts, size
from infllm_pass.graph.kinds import Call, Kind
from infllm_pass.graph.mask_values import MaskForm
from infllm_pass.graph.op_table import read, read_in_place
from infllm_pass.graph.subgraphs import input_name
from infllm_pass.masks.cases import exact
from infllm_pass.masks.normal_form import Leaf
from infllm_pass.masks.rules import arithmetic, indexing, scans, shapes, vmap, where
from infllm_pass.masks.rules.registry import RULES, shape_of
from infllm_pass.masks.steps import tell_value
from infllm_pass.masks.symbolic import NotFollowed, SymbolicTensor, element

__all__ = ["Interpreter", "Overwritten", "Unknown", "names_in"]

RULE_FILES = (arithmetic, indexing, scans, where, shapes, vmap)
"""Importing them fills the table of rules."""


class Overwritten(Exception):
    """A node's memory is overwritten somewhere in the graph, so its value depends on when it is read."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass(frozen=True)
class Unknown:
    """A tensor of which nothing is known but its name.

    Attributes:
        facts: the graph that it belongs to.
        node: its node.
        why: what could not be followed, in words.
        readable: whether other code of the graph can read it; not what lives inside ``vmap`` or a mask function.
        cause: another tensor, computed by the graph, that is unknown as well and that this one is computed from.
    """

    facts: GraphFacts
    node: fx.Node
    why: str
    readable: bool
    cause: Unknown | None = None

    @property
    def origin(self) -> Unknown:
        """The first tensor that could not be followed on the way to this one."""
        return self if self.cause is None else self.cause.origin


class Interpreter:
    """Evaluates nodes of one graph, each once.

    Args:
        facts: the graph's facts.
        leaves: nodes to treat as unknown tensors without looking at how they were made.
        seeds: values of placeholders, 0-d tensors whose value is an index that no tensor of the graph shows.
        outer: interpreters of other graphs, which nested graphs share; this one is added to them.
    """

    def __init__(
        self,
        facts: GraphFacts,
        leaves: frozenset[fx.Node] = frozenset(),
        seeds: Mapping[fx.Node, sympy.Symbol] | None = None,
        outer: dict[GraphFacts, Interpreter] | None = None,
    ) -> None:
        self.facts = facts
        self.leaves = leaves
        self.unknowns: dict[str, Unknown] = {}
        self.scans: dict[str, scans.Scan] = {}
        self.proofs: dict[tuple[sympy.Basic, bool], Any] = {}
        self.seeds = dict(seeds or {})
        self._values: dict[fx.Node, SymbolicTensor] = {}
        self._readers: list[fx.Node] = []
        self.outer = {} if outer is None else outer
        if not leaves and not self.seeds:
            self.outer.setdefault(facts, self)

    def evaluate(self, node: fx.Node) -> SymbolicTensor | None:
        """The symbolic value of a node, or None if it is not a tensor.

        Raises:
            Overwritten: the node, or one that it is computed from, lives in memory that the graph may have
                overwritten by the time it is read.
        """
        example = self.facts.example(node)
        if not isinstance(example, torch.Tensor):
            return None
        reader = self._readers[-1] if self._readers else None
        if node not in self.leaves and not self.facts.is_settled(node, reader):
            raise Overwritten(node)
        if node in self._values:
            return self._values[node]
        value, why = self._given(node, example) or self._from_outer_graph(node), ""
        if value is None:
            self._readers.append(node)
            try:
                value = self._apply_rule(node, example)
            except NotFollowed as stop:
                why = str(stop)
                value = self._unknown(node, example, why)
            finally:
                self._readers.pop()
        self._values[node] = value
        tell_value(node, value.value, why)
        return value

    def read_input(self, node: fx.Node) -> bool:
        """Read an input of the root graph by value, so that masks computed from it may be proved after all.

        Args:
            node: where a proof stopped.

        Returns:
            Whether anything was read; what was evaluated before is forgotten then.
        """
        if node.graph is not self.facts.graph:
            others = (each for each in self.outer.values() if each.facts.graph is node.graph)
            return any(other.read_input(node) for other in others)
        if node in self.facts.bindings:
            facts, outer = self.facts.bindings[node]
            return self.interpreter_of(facts).read_input(outer)
        if node.op != "placeholder" or self.facts.is_overwritten(node):
            return False
        return self._forget_if(self.facts.held.inputs.add(node, input_name(node)))

    def _forget_if(self, read: bool) -> bool:
        for each in (self, *self.outer.values()) if read else ():
            each._values.clear()
            each.proofs.clear()
        return read

    def _given(self, node: fx.Node, example: torch.Tensor) -> SymbolicTensor | None:
        """The value of a placeholder that stands for an index, or of a tensor that is read by value."""
        if node in self.seeds:
            return SymbolicTensor((), self.seeds[node], torch.int64)
        inputs = self.facts.held.inputs
        if node in inputs.numbered:
            positions = [self.operand(other) for other in inputs.numbered[node]]
            numbers = self._unknown(node, example, "it numbers sequences")
            return self._scan(node, example, scans.numbered(numbers, positions))
        reading = inputs.read.get(node)
        if reading is not None and isinstance(reading.form, MaskForm):
            valid, sequences = (n if n is None else self.evaluate(n) for n in (reading.valid, reading.sequences))
            value = where.mask_value(reading.form, shape_of(example), example.dtype, valid, sequences)
            return SymbolicTensor(shape_of(example), value, example.dtype)
        if node.op not in ("placeholder", "get_attr") or node in self.leaves or self.facts.is_overwritten(node):
            return None
        form = self.facts.held.read(node)
        if form is None:
            return None
        return SymbolicTensor(shape_of(example), where.held_value(form, example.dtype), example.dtype)

    def _from_outer_graph(self, node: fx.Node) -> SymbolicTensor | None:
        """The value of a nested graph's placeholder, from the graph that calls it."""
        binding = self.facts.bindings.get(node)
        places = self.facts.given.get(node, ()) if binding is None else (binding,)
        if not places or node in self.leaves:
            return None
        values = [self._value_at(facts, outer) for facts, outer in places]
        return values[0] if all(value == values[0] for value in values) else None

    def _value_at(self, facts: GraphFacts, node: fx.Node) -> SymbolicTensor | None:
        """The value of a node of an outer graph."""
        interpreter = self.interpreter_of(facts)
        value = interpreter.evaluate(node)
        self.unknowns.update(interpreter.unknowns)
        self.scans.update(interpreter.scans)
        return value

    def interpreter_of(self, facts: GraphFacts) -> Interpreter:
        """The interpreter of an outer graph."""
        if facts not in self.outer:
            Interpreter(facts, outer=self.outer)
        return self.outer[facts]

    def _unknown(self, node: fx.Node, example: torch.Tensor, why: str) -> SymbolicTensor:
        name, hidden = self._name(node, why)
        return SymbolicTensor(shape_of(example), element(name, example.dim(), example.dtype, hidden), example.dtype)

    def _scan(self, node: fx.Node, example: torch.Tensor, found: scans.Scan) -> SymbolicTensor:
        """A cumulative sum: a named function of its index, remembered as a scan."""
        name, hidden = self._name(node, "it numbers sequences")
        self.scans[name] = found
        return SymbolicTensor(shape_of(example), element(name, example.dim(), example.dtype, hidden), example.dtype)

    def _name(self, node: fx.Node, why: str) -> tuple[str, Sequence[sympy.Symbol]]:
        """A name for a node's element, and the hidden indices that it may depend on."""
        name = self._name_of(node)
        under = self.facts.hidden_axes.get(node, ())
        hidden = () if node.op in ("placeholder", "get_attr") else (*under, *self.seeds.values())
        inputs = (self._name_of(source) for source in node.all_input_nodes if source in self._values)
        causes = (self.unknowns[source] for source in inputs if source in self.unknowns and source not in self.scans)
        cause = next((unknown for unknown in causes if unknown.node.op not in ("placeholder", "get_attr")), None)
        readable = not hidden and not self.facts.hidden_axes.get(node)
        self.unknowns[name] = Unknown(self.facts, node, why, readable, cause)
        return name, hidden

    def _name_of(self, node: fx.Node) -> str:
        return f"{node.name}@{id(self.facts):x}"

    def _apply_rule(self, node: fx.Node, example: torch.Tensor) -> SymbolicTensor:
        if node in self.facts.held.tensors:
            raise NotFollowed("a module holds it, and its values are none of the forms that the prover knows")
        if node in self.facts.given and node not in self.leaves:
            raise NotFollowed("the calls of the nested graph hand it different values")
        if node in self.leaves or node.op == "placeholder":
            raise NotFollowed("it is an input of the graph, so it is data")
        call = read(node) or _read_filled(node)
        rule = None if call is None else RULES.get(call.kind)
        if call is None or rule is None:
            raise NotFollowed("the prover has no rule for this operator")
        try:
            arguments = inspect.signature(rule).bind(self, example, **call.args)
        except TypeError as error:
            raise NotFollowed("the operator is called with arguments that the prover does not know") from error
        value = rule(*arguments.args, **arguments.kwargs)
        if isinstance(value, scans.Scan):
            return self._scan(node, example, value)
        return SymbolicTensor(shape_of(example), value, example.dtype)

    def tensors_in(self, expression: sympy.Basic) -> tuple[Leaf, ...]:
        """The graph tensors that an expression made by this interpreter reads."""
        found = ((name, self.unknowns.get(name)) for name in sorted(names_in(expression)))
        return tuple((name, unknown.facts, unknown.node) for name, unknown in found if unknown is not None)

    def operand(self, argument: Any) -> SymbolicTensor:
        """An argument as a symbolic tensor: a node, or a number that may be symbolic.

        Raises:
            NotFollowed: it is neither.
        """
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
        if isinstance(argument, torch.SymFloat) and not free_unbacked_symbols(argument):
            argument = float(argument)  # guards on its value
        if isinstance(argument, float):
            return SymbolicTensor((), exact(argument), torch.float64)
        raise NotFollowed("one of its arguments is neither a tensor nor a number")

    def integer(self, argument: Any) -> sympy.Expr:
        """An argument that must be one integer: a number, a SymInt or a node holding either.

        Raises:
            NotFollowed: it is not.
        """
        if isinstance(argument, fx.Node):
            argument = self.facts.example(argument)
        if isinstance(argument, bool) or not isinstance(argument, (int, torch.SymInt)):
            raise NotFollowed("one of its arguments is not a number")
        return size(argument)


def _read_filled(node: fx.Node) -> Call | None:
    """What a node computes that fills places of a tensor in place."""
    call = read_in_place(node)
    return call if call is not None and call.kind is Kind.MASKED_FILL else None


def names_in(value: sympy.Basic) -> set[str]:
    """The names of the functions and symbols of an expression."""
    return {atom.func.__name__ for atom in value.atoms(AppliedUndef)} | {symbol.name for symbol in value.free_symbols}
