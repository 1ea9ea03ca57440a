"""What one mask term holds, and where it lets a query see a key: booleans, added numbers, functions of flex."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.graph.facts import axis, hidden_axis
from infllm_pass.graph.op_table import Kind, read
from infllm_pass.masks.cases import as_number, negation, pairs
from infllm_pass.masks.interpreter import Interpreter, Overwritten, Unknown
from infllm_pass.masks.normal_form import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    MaskRole,
    MaskTerm,
    UnprovenMask,
)
from infllm_pass.masks.symbolic import SymbolicTensor

HIDING_NUMBER = -1e9
"""Scores of one row would have to lie this far apart for a key with such a number added to them to be seen.

Scores that large have lost all precision (adjacent float32 numbers are 64 apart there). The lowest float16, -65504,
hides where it is added in float16, which holds no larger scores.
"""


@dataclass(frozen=True)
class Value:
    """What a term holds.

    Attributes:
        value: its numbers or Booleans, over ``(BATCH, HEAD, QUERY, KEY)``.
        dtype: their dtype.
        interpreter: that of the graph that computes it: the body's, for a function of flex attention.
        names: what the hidden indices of that graph stand for.
    """

    value: sympy.Basic
    dtype: torch.dtype
    interpreter: Interpreter
    names: Mapping[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)


def visible(interpreter: Interpreter, term: MaskTerm) -> sympy.Basic | UnprovenMask:
    """Where one term lets a query see a key, as a Boolean of ``(BATCH, HEAD, QUERY, KEY)``.

    Args:
        interpreter: the interpreter of the graph that the term belongs to.
        term: the term.
    """
    found = value_of(interpreter, term)
    if isinstance(found, UnprovenMask):
        return found
    if term.role is MaskRole.ADDED:
        return _where_nothing_is_hidden(found.interpreter, term, found.value, found.dtype)
    if found.dtype != torch.bool:
        return UnprovenMask(term.node, f"it is a {found.dtype} tensor where a boolean one is expected")
    return negation(found.value) if term.role is MaskRole.HIDE else found.value


def value_of(interpreter: Interpreter, term: MaskTerm) -> Value | UnprovenMask:
    """What one term holds.

    Args:
        interpreter: the interpreter of the graph that the term belongs to.
        term: the term.
    """
    if term.body is not None or term.role is MaskRole.BLOCK_MASK:
        return _of_function(interpreter, term)
    example = interpreter.facts.example(term.node)
    if not isinstance(example, torch.Tensor) or (term.index is None and example.dim() > 4):
        return UnprovenMask(term.node, "it is not a tensor of at most four dimensions")
    value = _evaluate(interpreter, term.node)
    if isinstance(value, UnprovenMask):
        return value
    lifted = lift(value) if term.index is None else value.at(term.index)
    return Value(lifted, value.dtype, interpreter)


def _evaluate(interpreter: Interpreter, node: fx.Node) -> SymbolicTensor | UnprovenMask:
    try:
        value = interpreter.evaluate(node)
    except Overwritten as stop:
        return UnprovenMask(stop.node, "the graph overwrites its memory, so its value depends on when it is read")
    return UnprovenMask(node, "it is not a tensor") if value is None else value


def lift(mask: SymbolicTensor) -> sympy.Basic:
    """A mask's value over ``(batch, head, query, key)``; a dimension of size 1 does not matter."""
    pad = 4 - len(mask.shape)
    index = [sympy.Integer(0) if extent == 1 else axis(dim + pad) for dim, extent in enumerate(mask.shape)]
    value = mask.at(index)
    if not value.has(sympy.floor):
        return value
    inside = {sympy.floor(at / extent): sympy.Integer(0) for at, extent in zip(index, mask.shape, strict=True)}
    return value.xreplace(inside)  # an index is less than its extent


def _where_nothing_is_hidden(
    interpreter: Interpreter, term: MaskTerm, value: sympy.Basic, dtype: torch.dtype
) -> sympy.Basic | UnprovenMask:
    """Where a term that is added to the scores adds 0, provided that it hides the key everywhere else."""
    kept: list[sympy.Basic] = []
    for number, condition in pairs(value):
        if number == 0:
            kept.append(condition)
        elif not as_number(number):
            origin = first_unknown(interpreter, number)
            if origin is None:
                return UnprovenMask(term.node, "what it adds to the scores depends on the index")
            return UnprovenMask(origin.node, f"its numbers are added to the scores; {origin.why}")
        elif not hides(number * sympy.Float(term.factor), dtype):
            added = float(number) * term.factor
            return UnprovenMask(
                term.node, f"{added:g} is added to the scores, which hides nothing for certain: use -inf"
            )
    return sympy.Or(*kept)


def summands(interpreter: Interpreter, term: MaskTerm) -> list[MaskTerm]:
    """The two terms that an added tensor is the sum or difference of, as a mask with a bias; none if it is neither."""
    call = read(term.node) if term.role is MaskRole.ADDED and term.index is None and term.body is None else None
    if call is None or call.kind not in (Kind.ADD, Kind.SUB) or set(call.args) != {"input", "other"}:
        return []
    first, second = call.args["input"], call.args["other"]
    examples = [interpreter.facts.example(each) if isinstance(each, fx.Node) else None for each in (first, second)]
    if not all(isinstance(each, torch.Tensor) and each.dtype.is_floating_point for each in examples):
        return []
    sign = -1.0 if call.kind is Kind.SUB else 1.0
    return [replace(term, node=first), replace(term, node=second, factor=sign * term.factor)]


def hides(number: sympy.Expr, dtype: torch.dtype) -> bool:
    """Whether a number added to a score takes its key out of the softmax."""
    lowest = torch.finfo(dtype).min if dtype.is_floating_point else HIDING_NUMBER
    return bool(number <= max(HIDING_NUMBER, lowest))


def first_unknown(interpreter: Interpreter, value: sympy.Basic) -> Unknown | None:
    """The first tensor that could not be followed among those a value depends on."""
    names = {atom.func.__name__ for atom in value.atoms(AppliedUndef)}
    names |= {symbol.name for symbol in value.free_symbols}
    found = [name for name in interpreter.unknowns if name in names]
    found.sort(key=lambda name: name in interpreter.scans)  # sums are followed, to some extent
    return interpreter.unknowns[found[0]].origin if found else None


def _of_function(interpreter: Interpreter, term: MaskTerm) -> Value | UnprovenMask:
    """What a mask function returns, or a score function adds, as `flex_attention` calls it for every index."""
    body, added = term.body, term.role is MaskRole.ADDED
    if body is None:
        return UnprovenMask(term.node, "its mask function is not known")
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"][1 if added else 0 :]
    (output,) = (node for node in body.graph.nodes if node.op == "output")
    result: Any = output.args[0] if term.inside is None else term.inside
    result = result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result
    if len(placeholders) != 4 + len(term.arguments) or not isinstance(result, fx.Node):
        return UnprovenMask(term.node, "its mask function does not take batch, head, query and key")
    indices = [hidden_axis(name) for name in ("batch", "head", "query", "key")]
    bindings = {
        inner: (interpreter.facts, outer) for inner, outer in zip(placeholders[4:], term.arguments, strict=True)
    }
    facts = interpreter.facts.nested(body.graph, bindings)
    inside = Interpreter(
        facts,
        seeds=dict(zip(placeholders[:4], indices, strict=True)),
        outer={**interpreter.outer, interpreter.facts: interpreter},
    )
    value = _evaluate(inside, result)
    interpreter.unknowns.update(inside.unknowns)
    interpreter.scans.update(inside.scans)
    if isinstance(value, UnprovenMask):
        return value
    if value.shape or (value.dtype != torch.bool and not added):
        return UnprovenMask(term.node, "its mask function does not return one boolean")
    names = dict(zip(indices, (BATCH, HEAD, QUERY, KEY), strict=True))
    return Value(value.value.xreplace(names), value.dtype, inside, names)
