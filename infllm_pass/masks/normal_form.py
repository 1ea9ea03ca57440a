"""The normal form of a mask: what the operators can take in linear memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import sympy
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.graph.facts import GraphFacts, axis

BATCH, HEAD, QUERY, KEY = (axis(dim) for dim in range(4))


Leaf = tuple[str, GraphFacts, fx.Node]
"""A graph tensor that an expression reads: its name there, the graph that it belongs to, and its node."""


def home_of(leaves: Iterable[Leaf], facts: GraphFacts) -> GraphFacts:
    """The innermost of the graphs that tensors belong to, in which all of them can be had; without any, `facts`."""
    return max((home for _, home, _ in leaves), key=lambda home: home.depth, default=facts)


@dataclass(frozen=True)
class KeyCondition:
    """A test that a key must pass, whatever the query; `masks.codegen` makes it a tensor again.

    Attributes:
        expression: a Boolean of `BATCH`, `KEY`, sizes and elements of `leaves`, named functions of their index.
        leaves: the graph tensors that it reads, by name, and the graphs that they belong to.
    """

    expression: sympy.Basic
    leaves: tuple[Leaf, ...] = ()


@dataclass(frozen=True)
class HeadFunction:
    """A number that a score function computes of the head alone, element by element.

    Attributes:
        result: the node that holds it, in the function's graph.
        head: the function's placeholder for the head.
    """

    result: fx.Node
    head: fx.Node


@dataclass(frozen=True)
class KeyBias:
    """Numbers added to the scaled scores of a key, whatever the query: made of the elements of one tensor.

    Attributes:
        leaf: the tensor; None: its numbers are all 1, or those of `computed`.
        index: where it is read, an entry for each of its dimensions: `BATCH`, `HEAD` (of queries), ``HEAD // group``,
            ``heads * BATCH + HEAD`` or one of its digits, `KEY`, each of them plus a number of sizes, or a number.
        factor: what its numbers are multiplied with first.
        described: where they come from, for people.
        by_position: whether they are multiplied with the number of the key too.
        up_to_rows: whether the model adds another number to all scores of a row as well, which a softmax of keys alone
            does not see.
        computed: the numbers, for all heads; None: there is a tensor that holds them, or they are all 1.
    """

    leaf: Leaf | None
    index: tuple[sympy.Expr, ...]
    factor: float
    described: str
    by_position: bool = False
    up_to_rows: bool = False
    computed: HeadFunction | None = None

    def is_shared_by(self, heads: int, kv_heads: int) -> bool:
        """Whether the numbers are the same for the query heads of each key/value head, which are adjacent."""
        group = heads // kv_heads
        shared = {sympy.floor(HEAD / group), BATCH + sympy.floor(HEAD / heads)}
        if group == 1:
            shared |= {heads * BATCH + HEAD, sympy.Mod(HEAD, heads)}
        return all(HEAD not in at.free_symbols or without_shift(at)[0] in shared for at in self.index)


def axes_of(at: sympy.Expr) -> tuple[sympy.Symbol, ...]:
    """The axes that an index of a bias counts along, outermost first; none for a number and for other expressions."""
    at, shift = without_shift(at)
    if shift.atoms(AppliedUndef):
        return ()
    if at in (BATCH, HEAD, KEY):
        return (at,)
    if _counts_heads(at) or (isinstance(at, sympy.Mod) and at.args[0] == HEAD and at.args[1].is_Integer):
        return (HEAD,)
    if _counts_heads(at - BATCH):  # a digit of merged batch and heads, 0 for the heads alone
        return (BATCH,)
    rows = sympy.expand(at - HEAD) / BATCH
    return (BATCH, HEAD) if rows.is_Integer and rows > 1 else ()


def without_shift(at: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """An index as one that begins at 0, and the number that it begins at."""
    counted: list[sympy.Expr] = []
    shift: list[sympy.Expr] = []
    for part in sympy.Add.make_args(sympy.expand(at)):
        (counted if part.free_symbols & {BATCH, HEAD, QUERY, KEY} else shift).append(part)
    return sympy.Add(*counted), sympy.Add(*shift)


def _counts_heads(at: sympy.Expr) -> bool:
    return isinstance(at, sympy.floor) and bool((HEAD / at.args[0]).is_Integer)


@dataclass(frozen=True)
class KeyTerms:
    """What a mask does to a key, whatever the query.

    Attributes:
        mask: tests that the key must pass.
        bias: numbers added to its scores.
    """

    mask: tuple[KeyCondition, ...] = ()
    bias: tuple[KeyBias, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.mask or self.bias)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The graph tensors that the terms read."""
        tests = [leaf for condition in self.mask for leaf in condition.leaves]
        return *tests, *(bias.leaf for bias in self.bias if bias.leaf is not None)


@dataclass(frozen=True)
class Segments:
    """Packed sequences: adjacent keys of one number are a sequence, and no number returns later in a row.

    Attributes:
        facts: the graph that `node` belongs to.
        node: the numbers, ``[B, Lk]``, ``[1, Lk]`` or ``[Lk]``.
        offset: query ``i`` belongs to the sequence of key ``i + offset``.
    """

    facts: GraphFacts
    node: fx.Node
    offset: sympy.Expr

    @property
    def leaf(self) -> Leaf:
        """The numbers, as a tensor that the mask reads."""
        return self.node.name, self.facts, self.node


@dataclass(frozen=True)
class MaskPredicate:
    """What a mask lets a query see, proved for all sizes and inputs.

    A query ``i`` sees key ``j`` iff all of these hold:

    - ``j <= i + causal_offset`` (no such limit when it is None);
    - ``j > i + causal_offset - window`` (no such limit when it is None);
    - every test of ``key_terms.mask`` holds for ``j``;
    - key ``j`` is in the sequence of key ``i + segments.offset``, if there are segments.

    The numbers of ``key_terms.bias`` are added to the scores of the keys that it sees.

    Attributes:
        causal_offset: an expression of sizes, 0-d tensors and, for a limit of each row, elements at `BATCH`.
        key_terms: tests of the key, and numbers added to its scores.
        window: keys that a query sees at most, counted back from its causal limit.
        segments: packed sequences.
        offset_leaves: the graph tensors that `causal_offset` reads, by name, and the graphs that they belong to.
    """

    causal_offset: sympy.Expr | None
    key_terms: KeyTerms = KeyTerms()
    window: sympy.Expr | None = None
    segments: Segments | None = None
    offset_leaves: tuple[Leaf, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the causal limit."""
        return not self.key_terms and self.window is None and self.segments is None

    @property
    def sources(self) -> tuple[tuple[GraphFacts, fx.Node], ...]:
        """The tensors that the normal form reads, and the graphs that they belong to."""
        return *self.read_later, *((facts, node) for _, facts, node in self.offset_leaves)

    @property
    def read_later(self) -> tuple[tuple[GraphFacts, fx.Node], ...]:
        """The tensors that the normal form reads where the site is, and the graphs that they belong to."""
        found = [(facts, node) for _, facts, node in self.key_terms.leaves]
        return tuple(found if self.segments is None else [*found, (self.segments.facts, self.segments.node)])

    def __str__(self) -> str:
        parts = ["causal" if self.causal_offset is not None else "not causal"]
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.key_terms.mask:
            parts.append("padded keys")
        if self.key_terms.bias:
            parts.append("biased keys")
        if self.segments is not None:
            parts.append("packed sequences")
        return ", ".join(parts)


class MaskRole(Enum):
    """What a tensor that meets the scores does to them."""

    KEEP = "bool: True lets a query see a key"
    HIDE = "bool: True hides a key from a query"
    ADDED = "numbers added to the scores"
    BLOCK_MASK = "a mask function of (batch, head, query, key): True lets a query see a key"


@dataclass(frozen=True)
class UnprovenMask:
    """Why a mask has no normal form.

    Attributes:
        node: the node at which the proof stopped.
        why: what stopped it, in words.
        role: what the tensor does that it stopped at; None if it stopped at what several do together.
        reads: the tensors that the mask reads, of which nothing is known.
    """

    node: fx.Node
    why: str
    role: MaskRole | None = None
    reads: tuple[fx.Node, ...] = ()

    @property
    def described(self) -> str:
        """Where the proof stopped and why, for people."""
        return f"at node {self.node.name}: {self.why}"


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
        factor: for ADDED, what its numbers are multiplied with before the softmax.
        inside: for ADDED with a body, a score function's, whose first placeholder is the score: the node in it that
            holds the numbers.
    """

    node: fx.Node
    role: MaskRole
    index: tuple[sympy.Expr, ...] | None = None
    body: fx.GraphModule | None = None
    arguments: tuple[fx.Node, ...] = ()
    factor: float = 1.0
    inside: fx.Node | None = None
