"""Proof of a mask: splits the symbolic value of a site's mask terms and reads each part into the normal form.

The value is split at its top-level ``and``. Where a part says that two positions have one number of a cumulative sum,
what follows from it is put into the other parts; then each part must be a causal limit, a window, such an equality
or a test of the key. What is none of them leaves the mask unproven.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.graph.facts import axis
from infllm_pass.masks.cases import negation
from infllm_pass.masks.codegen import is_expressible
from infllm_pass.masks.interpreter import Interpreter, names_in
from infllm_pass.masks.key_biases import AddedToKeys, added_to_keys, key_bias
from infllm_pass.masks.normal_form import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    KeyBias,
    KeyCondition,
    KeyTerms,
    MaskPredicate,
    MaskRole,
    MaskTerm,
    Segments,
    UnprovenMask,
)
from infllm_pass.masks.rules.scans import Scan
from infllm_pass.masks.steps import plain_names, tell_part, tell_proof, tell_terms
from infllm_pass.masks.terms import first_unknown, summands, visible

_MOST_ATOMS = 6
"""Tests in a disjunction up to which it is rewritten as a conjunction; more would grow it exponentially."""


def prove_mask(interpreter: Interpreter, mask: fx.Node) -> MaskPredicate | UnprovenMask:
    """Prove what one boolean attention mask computes, True where a query sees a key; see `prove_terms`."""
    return prove_terms(interpreter, [MaskTerm(mask, MaskRole.KEEP)])


def prove_terms(
    interpreter: Interpreter, terms: Sequence[MaskTerm], *, one_query: bool = False
) -> MaskPredicate | UnprovenMask:
    """Prove what the tensors that mask a site compute together.

    Args:
        interpreter: the interpreter of the graph that they belong to. It keeps proofs, so that sites with the same
            masks share one.
        terms: at least one.
        one_query: whether the site has one query only, whatever the sizes. A limit of the keys that is the same for all
            queries, or one for each row, is then a causal limit.

    Returns:
        The normal form, or the reason why there is none.
    """
    proof, refused = _prove(interpreter, terms, one_query)
    while refused is not None and (parts := summands(interpreter, refused)):
        terms = [each for term in terms for each in (parts if term is refused else [term])]
        proof, refused = _prove(interpreter, terms, one_query)
    return proof


def _prove(
    interpreter: Interpreter, terms: Sequence[MaskTerm], one_query: bool
) -> tuple[MaskPredicate | UnprovenMask, MaskTerm | None]:
    """`prove_terms`, of terms as they are, and the term that was not read."""
    values: list[sympy.Basic] = []
    unread: list[tuple[MaskTerm, AddedToKeys, UnprovenMask]] = []
    for term in terms:
        value = visible(interpreter, term)
        if not isinstance(value, UnprovenMask):
            values.append(value)
            continue
        refused = replace(value, role=term.role)
        added = added_to_keys(interpreter, term) if term.role is MaskRole.ADDED else None
        if added is None:
            tell_proof(refused)
            return refused, term
        values.append(added.visible)
        unread.append((term, added, refused))
    value = sympy.And(*values)
    key = (value.xreplace({QUERY: sympy.Integer(0)}) if one_query else value, one_query)
    known = key in interpreter.proofs
    if not known:
        tell_terms([term.node for term in terms], value)
        found = _Reader(interpreter, terms[0].node, one_query).read(key[0])
        if isinstance(found, UnprovenMask):
            found = replace(found, reads=tuple(node for _, _, node in interpreter.tensors_in(key[0])))
        interpreter.proofs[key] = found
    proof: MaskPredicate | UnprovenMask = interpreter.proofs[key]
    tell_proof(proof, known)
    if not unread:
        return proof, None
    if isinstance(proof, UnprovenMask):
        others = ((refused, term) for term, added, refused in unread if key_bias(added, None, "") is None)
        return next(others, (proof, None))
    biases: list[KeyBias] = []
    for term, added, refused in unread:
        bias = key_bias(added, proof.causal_offset, refused.described)
        if bias is None:
            tell_proof(refused)
            return refused, term
        biases.append(bias)
    return replace(proof, key_terms=KeyTerms(proof.key_terms.mask, tuple(biases))), None


@dataclass
class _Reader:
    """Reads the parts of one mask, see `read`."""

    interpreter: Interpreter
    mask: fx.Node
    one_query: bool
    offset: sympy.Expr | None = None
    first: sympy.Expr | None = None  # a query i sees no key before i + first
    segments: list[tuple[str, tuple[sympy.Expr, ...], sympy.Expr]] = field(default_factory=list)
    conditions: list[KeyCondition] = field(default_factory=list)

    def read(self, value: sympy.Basic) -> MaskPredicate | UnprovenMask:
        """The normal form of a mask's value over ``(BATCH, HEAD, QUERY, KEY)``."""
        parts = list(sympy.And.make_args(value))
        rest = [part for part in parts if not self._read_segments(part)]
        for part in parts:
            if part not in rest:
                tell_part(part, "query and key are of one sequence")
        consequences = self._consequences()
        rest = [part.xreplace(consequences) if QUERY in part.free_symbols else part for part in rest]
        rest = [smaller for part in rest for smaller in sympy.And.make_args(_conjunction(part))]
        known: set[sympy.Basic] = set()
        for part in sorted(rest, key=self._turn):
            smaller = self._without_impossible(part)
            implied = isinstance(smaller, sympy.Or) and not known.isdisjoint(map(_canonical, smaller.args))
            if smaller == sympy.true or implied:
                tell_part(part, "follows from the parts before")
                continue
            before = (self.offset, self.first, len(self.conditions))
            refusal = self._read_part(smaller)
            tell_part(smaller, self._change_since(*before) if refusal is None else f"refused, {refusal.why}")
            if refusal is not None:
                return refusal
            known.add(_canonical(smaller))
        return self._normal_form()

    def _change_since(self, offset: sympy.Expr | None, first: sympy.Expr | None, conditions: int) -> str:
        """What the part read last was, from the limits and the number of conditions before it, for people."""
        if len(self.conditions) > conditions:
            return "test of the key"
        if self.offset != offset:
            return "limit towards later keys"
        return "limit towards earlier keys" if self.first != first else "looser than a limit before"

    def _turn(self, part: sympy.Basic) -> int:
        """When a part is read: limits towards later keys first, and of these ones by data; disjunctions, which they may
        decide, last.
        """
        if isinstance(part, sympy.Or):
            return 3
        limit = self._limit(part)
        if limit is None or not limit.upper:
            return 2
        return 0 if self.interpreter.tensors_in(limit.distance) else 1

    def _without_impossible(self, part: sympy.Basic) -> sympy.Basic:
        """A disjunction without the limits that those read so far rule out, nor those that another one implies.

        True if two of its limits leave no key out.
        """
        if not isinstance(part, sympy.Or):
            return part
        kept: list[tuple[sympy.Basic, _Limit | None]] = []
        for test in part.args:
            limit = self._limit(test)
            if limit is None or not self._is_impossible(limit):
                kept.append((test, limit))
        if any(_cover_all(one, other) for _, one in kept for _, other in kept):
            return sympy.true
        return sympy.Or(
            *(test for test, limit in kept if not any(_is_looser(other, limit) for _, other in kept)), evaluate=False
        )

    def _is_impossible(self, limit: _Limit) -> bool:
        if limit.upper:
            return self.first is not None and sympy.expand(self.first - limit.distance).is_positive is True
        return self.offset is not None and sympy.expand(limit.distance - self.offset).is_positive is True

    def _read_part(self, part: sympy.Basic) -> UnprovenMask | None:
        limit = self._limit(part)
        if limit is not None and limit.upper and self._is_limit_beside_another(limit):
            return self._read_condition(part)
        if limit is not None and limit.upper:
            return self._tighten("offset", limit.distance, lambda new, old: new - old)
        if limit is not None:
            return self._tighten("first", limit.distance, lambda new, old: old - new)
        if part == sympy.false:
            return UnprovenMask(self.mask, "it hides every key")
        if not part.free_symbols & {HEAD, QUERY}:
            return self._read_condition(part)
        unknown = first_unknown(self.interpreter, part)
        if unknown is None:
            return UnprovenMask(self.mask, f"it tests {readable(part)}")
        return UnprovenMask(unknown.node, f"the mask tests {readable(part)}, and of {unknown.node.name} {unknown.why}")

    def _limit(self, part: sympy.Basic) -> _Limit | None:
        """A limit of the distance between query and key; of one query, that of the keys before it."""
        limit = _limit(part)
        if limit is not None or not self.one_query:
            return limit
        limit = _limit_of_keys(part)
        if limit is None or limit.upper:
            return limit
        # Further back, an unrelated limit is the start of a padded row.
        return limit if self.offset is not None and (self.offset - limit.distance).is_Integer else None

    def _is_limit_beside_another(self, limit: _Limit) -> bool:
        """Whether the keys of one query have another limit already, which is not known to be the looser or tighter."""
        if not self.one_query or self.offset is None:
            return False
        excess = sympy.expand(limit.distance - self.offset)
        return excess.is_nonpositive is not True and excess.is_nonnegative is not True

    def _tighten(self, name: str, new: sympy.Expr, looser: object) -> UnprovenMask | None:
        """Keep the tighter of two limits, if one is tighter for all sizes."""
        old = getattr(self, name)
        if old is None:
            setattr(self, name, new)
            return None
        excess = sympy.expand(looser(new, old))  # type: ignore[operator]
        if excess.is_nonpositive is True:
            setattr(self, name, new)
        elif excess.is_nonnegative is not True:
            return UnprovenMask(
                self.mask, f"it has two limits, {old} and {new}, of which neither is always the tighter"
            )
        return None

    def _read_condition(self, part: sympy.Basic) -> UnprovenMask | None:
        leaves = []
        sizes = self.interpreter.facts.size_sources
        for name in sorted(names_in(part)):
            unknown = self.interpreter.unknowns.get(name)
            if unknown is not None and not unknown.readable:
                return UnprovenMask(unknown.node, f"a test of keys reads it, and {unknown.why}")
            if unknown is not None:
                leaves.append((name, unknown.facts, unknown.node))
        named = {name for name, _, _ in leaves}
        free = {symbol for symbol in part.free_symbols - {BATCH, KEY} if symbol.name not in named}
        tests = part.atoms(sympy.core.relational.Relational)
        of_sizes = any(test.free_symbols <= free and not test.atoms(AppliedUndef) for test in tests)
        if of_sizes or not is_expressible(part) or not free <= set(sizes):
            return UnprovenMask(self.mask, f"its test of keys, {readable(part)}, cannot be made of graph inputs")
        self.conditions.append(KeyCondition(part, tuple(leaves)))
        return None

    def _read_segments(self, part: sympy.Basic) -> bool:
        """Whether a part says that query and key have one number of a cumulative sum of a condition."""
        if not isinstance(part, sympy.Eq):
            return False
        terms = sympy.Add.make_args(sympy.expand(part.lhs - part.rhs))
        if len(terms) != 2 or terms[0] + terms[1] == 0:
            return False
        plus = [term for term in terms if isinstance(term, AppliedUndef)]
        minus = [-term for term in terms if isinstance(-term, AppliedUndef)]
        if len(plus) != 1 or len(minus) != 1 or plus[0].func != minus[0].func:
            return False
        name = plus[0].func.__name__
        scan = self.interpreter.scans.get(name)
        if scan is None:
            return False
        for of_query, of_key in ((plus[0].args, minus[0].args), (minus[0].args, plus[0].args)):
            offset = sympy.expand(of_query[scan.dim] - QUERY)
            others = [pair for dim, pair in enumerate(zip(of_query, of_key, strict=True)) if dim != scan.dim]
            aligned = of_key[scan.dim] == KEY and not offset.free_symbols & {BATCH, HEAD, QUERY, KEY}
            if aligned and all(a == b and not a.free_symbols & {HEAD, QUERY, KEY} for a, b in others):
                self.segments.append((name, tuple(of_key), offset))
                return True
        return False

    def _consequences(self) -> dict[sympy.Basic, sympy.Basic]:
        """What equal numbers say of the elements of other tensors, as replacements for elements at the key.

        The packed-sequence theorem: if a cumulative sum steps wherever ``x[t] - x[t - 1] != c``, equal sums at k and q
        mean that no step lies between them, so that ``x[q] - x[k] == c * (q - k)``, whichever of the two is larger.
        """
        found: dict[sympy.Basic, sympy.Basic] = {}
        for name, of_key, offset in self.segments:
            scan = self.interpreter.scans[name]
            for function, index, step in _steady(scan):
                at_key = function(*(_at(expr, scan, of_key, KEY) for expr in index))
                at_query = function(*(_at(expr, scan, of_key, QUERY + offset) for expr in index))
                found[at_key] = at_query - step * (QUERY + offset - KEY)
        return found

    def _normal_form(self) -> MaskPredicate | UnprovenMask:
        window = None
        if self.first is not None:
            if self.offset is None:
                return UnprovenMask(self.mask, "it has a limit towards earlier keys but none towards later ones")
            window = sympy.expand(self.offset - self.first + 1)
            if window.is_positive is not True or window.has(AppliedUndef):
                return UnprovenMask(self.mask, f"its window of {window} keys is not known to be positive")
        segments = None
        for name, of_key, offset in self.segments:
            unknown = self.interpreter.unknowns[name]
            found = Segments(unknown.facts, unknown.node, offset)
            expected = (KEY,) if len(of_key) == 1 else (of_key[0], KEY)
            if not unknown.readable or tuple(of_key) != expected or (len(of_key) == 2 and of_key[0] not in (BATCH, 0)):
                return UnprovenMask(unknown.node, "its sequence numbers are not laid out as [B, L]")
            if segments is not None and segments != found:
                return UnprovenMask(unknown.node, "keys are numbered by more than one tensor of sequence numbers")
            segments = found
        leaves = () if self.offset is None else self.interpreter.tensors_in(self.offset)
        return MaskPredicate(self.offset, KeyTerms(tuple(self.conditions)), window, segments, leaves)


@dataclass(frozen=True)
class _Limit:
    """``KEY <= QUERY + distance`` if `upper`, else ``KEY >= QUERY + distance``."""

    distance: sympy.Expr
    upper: bool


def _slack(part: sympy.Basic) -> sympy.Expr | None:
    """For an inequality between integers, the expression that it says not to be negative."""
    if isinstance(part, (sympy.Ge, sympy.Gt)):
        slack = part.lhs - part.rhs
    elif isinstance(part, (sympy.Le, sympy.Lt)):
        slack = part.rhs - part.lhs
    else:
        return None
    if slack.is_integer is not True:
        return None
    return sympy.expand(slack - 1 if isinstance(part, (sympy.Gt, sympy.Lt)) else slack)


def _limit(part: sympy.Basic) -> _Limit | None:
    """Read a limit of the distance between query and key off an inequality, whichever way it is written."""
    slack = _slack(part)
    if slack is None:
        return None
    weight = slack.coeff(QUERY)
    rest = sympy.expand(slack - weight * QUERY - slack.coeff(KEY) * KEY)
    if slack.coeff(KEY) != -weight or not weight.is_Integer or weight == 0:
        return None
    if rest.free_symbols & {HEAD, QUERY, KEY}:
        return None
    if abs(weight) > 1:
        if not rest.is_Integer:
            return None
        rest = sympy.floor(rest / abs(weight))
    return _Limit(rest, True) if weight > 0 else _Limit(-rest, False)


def _limit_of_keys(part: sympy.Basic) -> _Limit | None:
    """Read a limit of the keys that no index but the row's changes off an inequality, as the limit of query 0."""
    slack = _slack(part)
    if slack is None:
        return None
    weight = slack.coeff(KEY)
    rest = sympy.expand(slack - weight * KEY)
    if weight not in (1, -1) or rest.free_symbols & {HEAD, QUERY, KEY}:
        return None
    return _Limit(rest, True) if weight == -1 else _Limit(-rest, False)


def _is_looser(a: _Limit | None, b: _Limit | None) -> bool:
    """Whether a limit allows all that another one in the same direction allows, and more."""
    if a is None or b is None or a.upper is not b.upper:
        return False
    slack = sympy.expand(a.distance - b.distance)
    return bool((slack if a.upper else -slack).is_positive)


def _cover_all(upper: _Limit | None, lower: _Limit | None) -> bool:
    """Whether every key keeps one of two limits, the first towards later keys and the second towards earlier ones."""
    if upper is None or lower is None or not upper.upper or lower.upper:
        return False
    return bool(sympy.expand(upper.distance + 1 - lower.distance).is_nonnegative)


def _canonical(part: sympy.Basic) -> sympy.Basic:
    """One spelling for the inequalities that say the same of integers."""
    slack = _slack(part)
    return part if slack is None else sympy.Ge(slack, 0, evaluate=False)


def _conjunction(part: sympy.Basic) -> sympy.Basic:
    """A small disjunction as a conjunction of disjunctions, its inequalities spelled one way."""
    if not isinstance(part, sympy.Or):
        return part
    atoms = part.atoms(sympy.core.relational.Relational)
    if len(atoms) > _MOST_ATOMS or not part.free_symbols & {QUERY}:
        return part
    return sympy.to_cnf(part.xreplace({atom: _canonical(atom) for atom in atoms}))


def _steady(scan: Scan) -> Iterable[tuple[type[AppliedUndef], tuple[sympy.Expr, ...], sympy.Expr]]:
    """Tensors that grow by a constant wherever a scan does not step: ``x(index at t) - x(index at t - 1) == c``."""
    here = axis(scan.dim)
    inside = scan.condition.xreplace({sympy.Eq(here, 0): sympy.false, sympy.Ne(here, 0): sympy.true})
    for part in sympy.And.make_args(negation(inside)):
        if not isinstance(part, sympy.Eq):
            continue
        difference = sympy.expand(part.lhs - part.rhs)
        for element in difference.atoms(AppliedUndef):
            before = element.xreplace({here: here - 1})
            for sign in (1, -1):
                step = sympy.expand(element - before - sign * difference)
                if before != element and not step.free_symbols & {axis(dim) for dim in range(8)} and step.is_Integer:
                    yield element.func, element.args, step


def _at(expr: sympy.Expr, scan: Scan, index: Sequence[sympy.Expr], position: sympy.Expr) -> sympy.Expr:
    """An index expression over the scan's dimensions, read at an index with `position` along the scan."""
    return expr.xreplace({axis(dim): position if dim == scan.dim else at for dim, at in enumerate(index)})


def readable(part: sympy.Basic) -> str:
    """A part in words a user can place: index symbols become batch, head, query and key."""
    names = dict(zip((BATCH, HEAD, QUERY, KEY), sympy.symbols("batch head query key"), strict=True))
    spelled = part.xreplace(names)
    return str(plain_names(spelled))
