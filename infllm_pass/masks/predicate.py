"""From the symbolic value of a mask to a normal form that the operators can take in linear memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import sympy
import torch
from torch import fx

from infllm_pass.masks.interpreter import Interpreter, Overwritten
from infllm_pass.masks.values import GraphFacts, SymbolicTensor, axis, same

BATCH, HEAD, QUERY, KEY = (axis(dim) for dim in range(4))


@dataclass(frozen=True)
class KeyCondition:
    """A test that a key must pass, read off a graph tensor: ``relation(source[b, k], constant)``.

    Attributes:
        facts: the graph that `source` belongs to.
        source: a node of shape ``[B, Lk]``, ``[1, Lk]`` or ``[Lk]``.
        relation: "eq", "ne", "lt", "le", "gt" or "ge".
        constant: what `source` is compared with.
    """

    facts: GraphFacts
    source: fx.Node
    relation: str
    constant: int


@dataclass(frozen=True)
class MaskPredicate:
    """What a mask lets a query see, proved for all sizes and inputs.

    A query ``i`` sees key ``j`` iff ``j <= i + causal_offset`` (no such limit when it is None) and every key
    condition holds for ``j``.
    """

    causal_offset: sympy.Expr | None
    key_conditions: tuple[KeyCondition, ...] = ()


@dataclass(frozen=True)
class UnprovenMask:
    """Why a mask has no normal form, and the node at which the proof stopped."""

    node: fx.Node
    why: str


class MaskRole(Enum):
    """What a tensor that meets the scores does to them."""

    KEEP = "bool: True lets a query see a key"
    HIDE = "bool: True hides a key from a query"
    ADDED = "numbers added to the scores"
    BLOCK_MASK = "a mask function of (batch, head, query, key): True lets a query see a key"


@dataclass(frozen=True)
class MaskTerm:
    """One tensor that masks a site; a query sees what all terms of its site let it see.

    Attributes:
        node: the tensor; for BLOCK_MASK the node that holds `body`.
        role: what it does.
        index: where the tensor is read for ``(BATCH, HEAD, QUERY, KEY)``, one expression for a dimension; None: it
            broadcasts to ``[B, H, Lq, Lk]``.
        body: for BLOCK_MASK, the mask function's graph: its placeholders are batch, head, query and key index, all
            0-d, and then what stands in `arguments`.
        arguments: for BLOCK_MASK, the nodes that the body's further placeholders stand for.
    """

    node: fx.Node
    role: MaskRole
    index: tuple[sympy.Expr, ...] | None = None
    body: fx.GraphModule | None = None
    arguments: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _CausalLimit:
    offset: sympy.Expr


def prove_mask(interpreter: Interpreter, mask: fx.Node) -> MaskPredicate | UnprovenMask:
    """Prove what one boolean attention mask computes, True where a query sees a key; see `prove_terms`."""
    return prove_terms(interpreter, [MaskTerm(mask, MaskRole.KEEP)])


def prove_terms(interpreter: Interpreter, terms: Sequence[MaskTerm]) -> MaskPredicate | UnprovenMask:
    """Prove what the tensors that mask a site compute together.

    Args:
        interpreter: the interpreter of the graph that they belong to.
        terms: at least one.

    Returns:
        The normal form, or the reason why there is none.
    """
    conjuncts: list[tuple[fx.Node, sympy.Basic]] = []
    for term in terms:
        values = _visible(interpreter, term)
        if isinstance(values, UnprovenMask):
            return values
        conjuncts += [(term.node, conjunct) for conjunct in sympy.And.make_args(values)]
    offset: sympy.Expr | None = None
    conditions: list[KeyCondition] = []
    for mask, conjunct in conjuncts:
        if conjunct == sympy.true:
            continue
        found = _causal_limit(conjunct) or _key_condition(interpreter, conjunct)
        if isinstance(found, _CausalLimit):
            if offset is not None and not same(offset, found.offset):
                return UnprovenMask(mask, f"it has two causal limits, offsets {offset} and {found.offset}")
            offset = found.offset
        elif found is not None:
            conditions.append(found)
        else:
            return UnprovenMask(_first_unknown(interpreter, conjunct) or mask, f"it tests {_readable(conjunct)}")
    return MaskPredicate(offset, tuple(conditions))


def _visible(interpreter: Interpreter, term: MaskTerm) -> sympy.Basic | UnprovenMask:
    """Where one term lets a query see a key, over ``(batch, head, query, key)``."""
    mask = term.node
    example = interpreter.facts.example(mask)
    if term.role in (MaskRole.ADDED, MaskRole.BLOCK_MASK):
        return UnprovenMask(mask, "it is no tensor of booleans")
    too_deep = term.index is None and isinstance(example, torch.Tensor) and example.dim() > 4
    if too_deep or not isinstance(example, torch.Tensor) or example.dtype != torch.bool:
        return UnprovenMask(mask, "it is not a boolean tensor of at most four dimensions")
    try:
        value = interpreter.evaluate(mask)
    except Overwritten as stop:
        return UnprovenMask(stop.node, "the graph overwrites its memory, so its value depends on when it is read")
    if value is None:
        return UnprovenMask(mask, "it is not a tensor")
    lifted = _lift_to_four_dimensions(value) if term.index is None else value.at(term.index)
    return sympy.Not(lifted) if term.role is MaskRole.HIDE else lifted


def _lift_to_four_dimensions(mask: SymbolicTensor) -> sympy.Basic:
    """The mask's value over ``(batch, head, query, key)``; a dimension of size 1 does not matter."""
    pad = 4 - len(mask.shape)
    index = [sympy.Integer(0) if extent == 1 else axis(dim + pad) for dim, extent in enumerate(mask.shape)]
    return mask.at(index)


def _causal_limit(conjunct: sympy.Basic) -> _CausalLimit | None:
    """Read ``key <= query + offset`` off an inequality between integers, whichever way it is written."""
    if isinstance(conjunct, (sympy.Ge, sympy.Gt)):
        small, large = conjunct.rhs, conjunct.lhs
    elif isinstance(conjunct, (sympy.Le, sympy.Lt)):
        small, large = conjunct.lhs, conjunct.rhs
    else:
        return None
    slack = sympy.expand(large - small)  # the conjunct says slack >= 0, or > 0 when strict
    if isinstance(conjunct, (sympy.Gt, sympy.Lt)):
        slack = slack - 1
    offset = sympy.expand(slack - QUERY + KEY)
    if offset.free_symbols & {BATCH, HEAD, QUERY, KEY} or offset.atoms(sympy.core.function.AppliedUndef):
        return None
    return _CausalLimit(offset)


_RELATIONS = {
    sympy.Eq: "eq",
    sympy.Ne: "ne",
    sympy.StrictLessThan: "lt",
    sympy.LessThan: "le",
    sympy.StrictGreaterThan: "gt",
    sympy.GreaterThan: "ge",
}


def _key_condition(interpreter: Interpreter, conjunct: sympy.Basic) -> KeyCondition | None:
    """Read a test of one tensor element that depends on batch and key alone."""
    relation = _RELATIONS.get(type(conjunct))
    if relation is None:
        return None
    element, constant = conjunct.args
    if isinstance(element, sympy.Integer):
        return _key_condition(interpreter, conjunct.reversed)
    if not isinstance(element, sympy.core.function.AppliedUndef) or not isinstance(constant, sympy.Integer):
        return None
    facts, source = interpreter.unknowns[element.func.__name__]
    index = element.args
    if index[-1] != KEY or (len(index) == 2 and index[0] not in (BATCH, sympy.Integer(0))) or len(index) > 2:
        return None
    return KeyCondition(facts, source, relation, int(constant))


def _first_unknown(interpreter: Interpreter, conjunct: sympy.Basic) -> fx.Node | None:
    """The earliest node that the interpreter could not follow among those a conjunct still depends on."""
    names = {atom.func.__name__ for atom in conjunct.atoms(sympy.core.function.AppliedUndef)}
    names |= {symbol.name for symbol in conjunct.free_symbols}
    return next((node for name, (_, node) in interpreter.unknowns.items() if name in names), None)


def _readable(conjunct: sympy.Basic) -> str:
    """A conjunct in words a user can place: index symbols become batch, head, query and key."""
    names = dict(zip((BATCH, HEAD, QUERY, KEY), sympy.symbols("batch head query key"), strict=True))
    return str(conjunct.xreplace(names)).split("@")[0] if "@" in str(conjunct) else str(conjunct.xreplace(names))
