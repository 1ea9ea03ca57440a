"""Visibility of keys under one mask term: boolean keep, boolean hide, additive numbers, or a flex mask function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.graph.facts import axis, example_of, hidden_axis
from infllm_pass.graph.op_table import Kind, read
from infllm_pass.masks.cases import as_number, negation, pairs, unrounded
from infllm_pass.masks.interpreter import Interpreter, Overwritten, Unknown
from infllm_pass.masks.normal_form import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    KeyBias,
    MaskRole,
    MaskTerm,
    UnprovenMask,
    axes_of,
)
from infllm_pass.masks.rules.registry import shape_of
from infllm_pass.masks.symbolic import NotFollowed, SymbolicTensor

HIDING_NUMBER = -1e9
"""Scores of one row would have to lie this far apart for a key with such a number added to them to be seen.

Scores that large have lost all precision (adjacent float32 numbers are 64 apart there). The lowest float16, -65504,
hides where it is added in float16, which holds no larger scores.
"""


def visible(interpreter: Interpreter, term: MaskTerm) -> sympy.Basic | UnprovenMask:
    """Where one term lets a query see a key, as a Boolean of ``(BATCH, HEAD, QUERY, KEY)``.

    Args:
        interpreter: the interpreter of the graph that the term belongs to.
        term: the term.
    """
    if term.role is MaskRole.BLOCK_MASK:
        return _of_mask_function(interpreter, term)
    example = interpreter.facts.example(term.node)
    if not isinstance(example, torch.Tensor) or (term.index is None and example.dim() > 4):
        return UnprovenMask(term.node, "it is not a tensor of at most four dimensions")
    value = _evaluate(interpreter, term.node)
    if isinstance(value, UnprovenMask):
        return value
    lifted = lift(value) if term.index is None else value.at(term.index)
    if term.role is MaskRole.ADDED:
        return _where_nothing_is_hidden(interpreter, term, lifted, value.dtype)
    if value.dtype != torch.bool:
        return UnprovenMask(term.node, f"it is a {value.dtype} tensor where a boolean one is expected")
    return negation(lifted) if term.role is MaskRole.HIDE else lifted


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


def key_bias(interpreter: Interpreter, term: MaskTerm, described: str) -> KeyBias | None:
    """A term that adds numbers to the scores of keys, the same for all queries; None if it adds others.

    Args:
        interpreter: the interpreter of the graph that the term belongs to.
        term: the term, of which `visible` does not know what it hides.
        described: where the numbers come from, for people.
    """
    found = _plain_key_bias(interpreter, term, described)
    stored = _stored(interpreter, term.node) if found is None and term.role is MaskRole.ADDED else None
    if stored is None:
        return found
    inside = Interpreter(interpreter.facts, frozenset([stored]), outer=interpreter.outer)
    found = _plain_key_bias(inside, term, described)
    interpreter.unknowns.update(inside.unknowns)
    return found


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


def _plain_key_bias(interpreter: Interpreter, term: MaskTerm, described: str) -> KeyBias | None:
    """`key_bias` of a term that is computed from tensors which the interpreter follows."""
    value = _evaluate(interpreter, term.node) if term.role is MaskRole.ADDED else None
    if not isinstance(value, SymbolicTensor) or not value.dtype.is_floating_point:
        return None
    added = lift(value) if term.index is None else value.at(term.index)
    if not isinstance(added, AppliedUndef):
        return None
    unknown = interpreter.unknowns.get(added.func.__name__)
    if unknown is not None and QUERY in added.free_symbols and unknown.facts is interpreter.facts:
        return _by_position(interpreter, unknown.node, added.args, term.factor, described)
    return _bias_of(interpreter, added, (BATCH, HEAD, KEY), term.factor, described)


def _by_position(
    interpreter: Interpreter, node: fx.Node, index: tuple[sympy.Expr, ...], factor: float, described: str
) -> KeyBias | None:
    """A product of a slope with the distance between query and key, which is ``slope * key`` up to a number of the row.

    Args:
        interpreter: the interpreter of the node's graph.
        node: the product, of which the interpreter knows no more than where it is read.
        index: where that is.
        factor: what it is multiplied with before it is added.
        described: where its numbers come from, for people.
    """
    call = read(node)
    if call is None or call.kind is not Kind.MUL or interpreter.facts.is_overwritten(node):
        return None
    places = {axis(dim): at for dim, at in enumerate(index)}
    shape = shape_of(interpreter.facts.example(node))
    operands = [call.args.get("input"), call.args.get("other")]
    try:
        sides = [interpreter.operand(operand).broadcast_to(shape).xreplace(places) for operand in operands]
    except (NotFollowed, Overwritten):
        return None
    for slope, distance, counted in ((*sides, operands[1]), (*sides[::-1], operands[0])):
        share = _share_of_key(distance)
        if share is not None and isinstance(slope, AppliedUndef) and _is_wide(interpreter, counted):
            found = _bias_of(interpreter, slope, (BATCH, HEAD), factor * share, described)
            return None if found is None else replace(found, by_position=True, up_to_rows=True)
    return None


def _is_wide(interpreter: Interpreter, node: Any) -> bool:
    """Whether integers that a node holds are rounded to no dtype narrower than float32 on the way."""
    stack, seen = [node], set()
    while stack:
        each = stack.pop()
        example = interpreter.facts.example(each) if isinstance(each, fx.Node) else None
        if not isinstance(example, torch.Tensor) or not example.dtype.is_floating_point or each in seen:
            continue
        if example.dtype not in (torch.float32, torch.float64) or each.op == "placeholder":
            return False
        seen.add(each)
        stack += each.all_input_nodes
    return True


def _share_of_key(distance: sympy.Basic) -> int | None:
    """How often the number of the key counts in an integer expression of it and of what is the same for a row."""
    if not isinstance(distance, sympy.Expr):
        return None
    plain = sympy.expand(unrounded(distance))
    share = plain.coeff(KEY)
    rest = sympy.expand(plain - share * KEY)
    if not share.is_Integer or share == 0 or KEY in rest.free_symbols or rest.atoms(AppliedUndef):
        return None
    return int(share)


def _bias_of(
    interpreter: Interpreter, added: AppliedUndef, axes: tuple[sympy.Symbol, ...], factor: float, described: str
) -> KeyBias | None:
    """The bias that a tensor's elements make which are read at some axes, once each, and at `KEY` if it is one."""
    unknown = interpreter.unknowns.get(added.func.__name__)
    read = [at for at in added.args if not at.is_Integer]
    symbols = [symbol for at in read for symbol in axes_of(at)]
    known = all(map(axes_of, read)) and len(symbols) == len(set(symbols)) and set(symbols) <= set(axes)
    if unknown is None or not unknown.readable or not known or (KEY in axes and KEY not in symbols):
        return None
    leaf = added.func.__name__, unknown.facts, unknown.node
    return KeyBias(leaf, tuple(added.args), factor, described)


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


def _of_mask_function(interpreter: Interpreter, term: MaskTerm) -> sympy.Basic | UnprovenMask:
    """What a mask function returns, as `flex_attention` calls it for every index."""
    body = term.body
    if body is None:
        return UnprovenMask(term.node, "its mask function is not known")
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in body.graph.nodes if node.op == "output")
    result: Any = output.args[0]
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
    if value.dtype != torch.bool or value.shape:
        return UnprovenMask(term.node, "its mask function does not return one boolean")
    return value.value.xreplace(dict(zip(indices, (BATCH, HEAD, QUERY, KEY), strict=True)))
