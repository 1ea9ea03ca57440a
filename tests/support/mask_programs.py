"""Random mask programs, and brute force over sizes and values of what is proved of them.

A program is a graph over the operators that the interpreter has rules for: positions, comparisons, padding, packed
sequences, windows, buffers, float masks, casts. Most are near to causal masks, so that many can be proved, and many
only nearly. Every eighth has a symbolic length. ``python -m tests.support.mask_programs --programs 20000`` runs many.
"""

from __future__ import annotations

import argparse
import operator
import random
import sys
from collections import Counter
from dataclasses import dataclass

import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from infllm_pass.graph.facts import overwritten_storages
from infllm_pass.masks import GraphFacts, HeldTensors, MaskPredicate, MaskRole, MaskTerm, prove_terms
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.masks.terms import HIDING_NUMBER
from tests.support.mask_support import mask_of

BATCH, EXTENT = 2, 9
LENGTHS = (1, 2, 3, 5, 6, 8)
MIN = torch.finfo(torch.float32).min
DRAWS = 3


class Program:
    """A random graph that ends in one or two masks of a site, ``[BATCH or 1, 1, length, length]`` or smaller.

    Args:
        seed: decides all but the length.
        length: queries and keys; None: symbolic.
    """

    def __init__(self, seed: int, length: int | None) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv()) if length is None else None
        example = self.inputs(LENGTHS[-2] if length is None else length, 0)
        self.names = list(example)
        self.nodes = {name: self.placeholder(name, value) for name, value in example.items()}
        self.buffers = self.held_tensors()
        self.length = self.emit("size", self.nodes["padding"], 1)
        self.held = {}
        for name, tensor in self.buffers.items():
            node = self.placeholder(name, tensor, static=True)
            self.nodes[name] = node
            self.held[node] = tensor
        self.terms = self.site()

    def inputs(self, length: int, draw: int) -> dict[str, torch.Tensor]:
        """Values for the graph's data inputs; different draws stress different things."""
        generator = torch.Generator().manual_seed(self.seed * 101 + length * 7 + draw)

        def integers(low, high):
            return torch.randint(low, high, (BATCH, length), generator=generator)

        positions = torch.arange(length).expand(BATCH, -1) if draw == 0 else (integers(0, 4) == 0).long()
        if draw == 1:  # packed: count from each start
            starts = positions.cumsum(1)
            positions = torch.stack([(row[:, None] == row).tril(-1).sum(1) for row in starts])
        elif draw > 1:
            positions = integers(-2, length + 1)
        return {
            "padding": integers(0, 2) if draw < 2 else integers(-1, 3),
            "positions": positions,
            "ids": integers(0, 2).cumsum(1) if draw == 0 else integers(0, 3),
            "weights": integers(0, 2).float() if draw < 2 else torch.randn(BATCH, length, generator=generator),
            "start": integers(0, 3)[0, 0],
        }

    def held_tensors(self) -> dict[str, torch.Tensor]:
        square = torch.ones(EXTENT, EXTENT)
        scattered = square.tril().clone()
        scattered[EXTENT - 1, 1] = 0.0
        return {
            "lower": square.tril()[None, None],
            "upper": torch.full((EXTENT, EXTENT), float("-inf")).triu(1),
            "band": (square.tril() - square.tril(-3)).bool(),
            "scattered": scattered.bool(),
            "shifted": square.tril(1).to(torch.uint8),
            "numbers": torch.arange(EXTENT)[None],
        }

    def placeholder(self, name: str, value: torch.Tensor, static: bool = False) -> fx.Node:
        node = self.graph.placeholder(name)
        if self.mode is not None:
            dynamic = [DimDynamic.DYNAMIC if d == 1 and not static else DimDynamic.STATIC for d in range(value.dim())]
            context = StatelessSymbolicContext(dynamic)
            value = self.mode.from_tensor(value, symbolic_context=context, source=ConstantSource("length"))
        node.meta["example_value"] = value
        return node

    def emit(self, target, *args, **kwargs) -> fx.Node:
        values, options = fx.node.map_arg((args, kwargs), lambda node: node.meta["example_value"])
        method = isinstance(target, str)
        node = (self.graph.call_method if method else self.graph.call_function)(target, args, kwargs)
        node.meta["example_value"] = getattr(values[0], target)(*values[1:], **options) if method else None
        if not method:
            if self.mode is not None:
                with self.mode:
                    node.meta["example_value"] = target(*values, **options)
            else:
                node.meta["example_value"] = target(*values, **options)
        return node

    def pick(self, *choices):
        """One of the choices, each a function or a pair of a weight and a function, called."""
        weighted = [choice if isinstance(choice, tuple) else (1, choice) for choice in choices]
        return self.random.choices([c for _, c in weighted], [w for w, _ in weighted])[0]()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # Positions

    def index(self) -> fx.Node:
        """Positions ``[length]``, perhaps shifted, scaled or turned around."""
        value = self.pick(
            (6, lambda: self.emit(torch.arange, self.length)),
            lambda: self.emit(operator.getitem, self.nodes["numbers"], (0, slice(None, self.length))),
            lambda: self.emit(operator.sub, self.emit("cumsum", self.ones_long(), 0), 1),
            lambda: self.joined(),
        )
        for _ in range(self.random.choice((0, 0, 0, 0, 1, 2))):
            value = self.pick(
                lambda value=value: self.emit(operator.add, value, self.random.randint(-2, 2)),
                lambda value=value: self.emit(operator.sub, value, self.random.randint(0, 2)),
                lambda value=value: self.emit(operator.mul, value, self.random.choice((0, 1, 2))),
                lambda value=value: self.emit(operator.floordiv, value, self.random.choice((1, 2))),
                lambda value=value: self.emit(operator.neg, value),
                lambda value=value: self.emit(operator.add, value, self.nodes["start"]),
                lambda value=value: self.emit("to", value, self.random.choice((torch.int32, torch.int64, torch.int8))),
                lambda value=value: self.emit(
                    torch.diff, value, prepend=self.emit(operator.sub, self.first(value, 0), 1)
                ),
                lambda value=value: self.emit(operator.getitem, self.emit(torch.arange, self.length), (value,)),
            )
        return value

    def ones_long(self) -> fx.Node:
        return self.emit("new_ones", self.nodes["padding"], (self.length,))

    def joined(self) -> fx.Node:
        """Positions made of two pieces, which may or may not continue each other."""
        head = self.emit(torch.arange, 1)
        rest = self.emit(torch.arange, self.random.choice((1, 1, 2)), self.emit(operator.add, self.length, 0))
        joined = self.emit(torch.cat, [head, rest])
        return self.emit(operator.getitem, joined, (slice(None, self.length),))

    def first(self, value: fx.Node, dim: int) -> fx.Node:
        index = (slice(None, 1),) if dim == 0 else (slice(None), slice(None, 1))
        return self.emit(operator.getitem, value, index)

    def placed(self, value: fx.Node, dim: int) -> fx.Node:
        """A vector ``[length]`` or rows ``[BATCH, length]`` along one of four dimensions."""
        rows = value.meta["example_value"].dim() == 2
        key = (slice(None) if rows else None, None, None, None)
        entries = [*key[:2], None, None]
        entries[dim] = slice(None)
        return self.emit(operator.getitem, value, tuple(entries))

    # Tests of query and key, boolean

    def comparison(self) -> fx.Node:
        near = self.chance(0.7)
        if near:
            relation, dims = self.random.choice(((operator.le, (3, 2)), (operator.ge, (2, 3)), (operator.gt, (2, 3))))
        else:
            relation = self.random.choice((operator.lt, operator.ge, operator.gt, operator.eq, operator.ne))
            dims = self.random.choice(((3, 2), (2, 3), (3, 3), (2, 2)))
        plain = near and self.chance(0.7)
        sides = [self.placed(self.emit(torch.arange, self.length) if plain else self.index(), dim) for dim in dims]
        if relation is operator.gt and plain:
            sides[0] = self.emit(operator.add, sides[0], 1)
        return self.emit(relation, *sides)

    def window(self) -> fx.Node:
        width = self.random.randint(-1, 4)
        query, key = (self.placed(self.emit(torch.arange, self.length), dim) for dim in (2, 3))
        return self.pick(
            lambda: self.emit(operator.lt, self.emit(operator.sub, query, key), width),
            lambda: self.emit(operator.gt, key, self.emit(operator.sub, query, width)),
            lambda: self.emit(operator.invert, self.emit("tril", self.square(torch.bool), -width)),
            lambda: self.buffer("band"),
        )

    def square(self, dtype: torch.dtype) -> fx.Node:
        return self.emit(torch.ones, (self.length, self.length), dtype=dtype)

    def buffer(self, name: str) -> fx.Node:
        start = self.random.choice((None, None, None, 0, 1))
        index = (Ellipsis, slice(start, None), slice(None, self.length))
        rows = self.emit(operator.getitem, self.nodes[name], index)
        rows = self.emit(operator.getitem, rows, (Ellipsis, slice(None, self.length), slice(None)))
        return rows if name in ("band", "scattered") else self.as_bool(rows)

    def as_bool(self, value: fx.Node) -> fx.Node:
        return self.pick(
            lambda: self.emit("bool", value),
            lambda: self.emit(operator.ne, value, 0),
            lambda: self.emit(operator.eq, value, self.random.choice((0, 1))),
            lambda: self.emit(operator.gt, value, 0),
        )

    def triangle(self) -> fx.Node:
        dtype = self.random.choice((torch.bool, torch.float32, torch.int64, torch.uint8))
        name, diagonal = self.random.choice(
            (("tril", 0), ("tril", 0), ("tril", -1), ("tril", 1), ("triu", 1), ("triu", 0))
        )
        value = self.emit(name, self.square(dtype), diagonal)
        return value if dtype == torch.bool else self.as_bool(value)

    def sequences(self) -> fx.Node:
        """Whether query and key are numbered alike."""
        ids = self.ids()
        sides = [self.placed(ids, 2), self.placed(ids if self.chance(0.9) else self.ids(), 3)]
        if self.chance(0.1):
            sides[0] = self.emit(operator.add, sides[0], 1)
        return self.emit(operator.eq if self.chance(0.9) else operator.ge, *sides)

    def ids(self) -> fx.Node:
        positions = self.nodes["positions"]

        def steps() -> fx.Node:
            before = self.emit(operator.sub, self.first(positions, 1), self.random.choice((1, 1, 1, 0)))
            difference = self.emit(torch.diff, positions, prepend=before, dim=-1)
            relation = self.random.choice((operator.ne, operator.ne, operator.ne, operator.eq, operator.lt))
            return self.emit(relation, difference, self.random.choice((1, 1, 1, 2)))

        return self.pick(
            (5, lambda: self.emit("cumsum", steps(), -1)),
            (2, lambda: self.emit("cumsum", self.emit(operator.eq, positions, 0), -1)),
            lambda: self.emit("cumsum", self.emit("to", self.emit("bool", self.nodes["padding"]), torch.int64), -1),
            lambda: self.emit("cumsum", self.nodes["padding"], -1),
            lambda: self.nodes["ids"],
            lambda: positions,
        )

    def packed(self) -> fx.Node:
        """Order of positions within sequences, as transformers writes it."""
        positions = self.nodes["positions"]
        query, key = self.placed(positions, 2), self.placed(positions, 3)
        if self.chance(0.2):
            query = self.emit(operator.sub, query, self.random.choice((1, -1)))
        order = self.emit(self.random.choice((operator.le, operator.le, operator.le, operator.lt)), key, query)
        value = self.emit(operator.and_, self.sequences(), order) if self.chance(0.9) else order
        if self.chance(0.3):
            near = self.emit(operator.gt, key, self.emit(operator.sub, query, self.random.randint(1, 4)))
            value = self.emit(operator.and_, value, near)
        return value

    def keys(self) -> fx.Node:
        """A test of the padding vector, read at keys or, rarely, at queries."""
        dim = self.random.choice((3, 3, 3, 3, 3, 2))
        name = self.random.choice(("padding", "padding", "weights"))
        rows = self.nodes[name]
        if self.chance(0.2):
            rows = self.emit("expand", self.emit(operator.getitem, rows, (slice(None, 1),)), BATCH, -1)
        if self.chance(0.15) and name == "padding":
            ones = self.emit(torch.ones_like, self.first(rows, 1))
            tail = self.emit(operator.getitem, rows, (slice(None), slice(1, None)))
            rows = self.emit(torch.cat, [ones, tail], 1)
        if self.chance(0.15):
            inner = self.emit(operator.getitem, rows, (slice(None), slice(1, None)))
            rows = self.emit(torch.nn.functional.pad, inner, (1, 0), value=self.random.choice((0, 1)))
        if self.chance(0.2):
            batch = self.emit("view", self.emit(torch.arange, BATCH), BATCH, 1, 1, 1)
            read = self.emit(operator.getitem, rows, (batch, self.placed(self.index(), dim)))
        else:
            read = self.placed(rows, dim)
        if name == "padding" and self.chance(0.3):
            number = self.emit("to", read, self.random.choice((torch.float32, torch.float16, torch.bfloat16)))
            read = self.emit(operator.sub, 1.0, number) if self.chance(0.7) else number
        return self.as_bool(read)

    def term(self) -> fx.Node:
        """A boolean tensor over query and key."""
        value = self.pick(
            (6, self.comparison),
            (3, self.keys),
            (2, self.window),
            (2, self.triangle),
            (3, self.packed),
            (2, self.sequences),
            (2, lambda: self.buffer(self.random.choice(("lower", "band", "scattered", "shifted", "lower")))),
            lambda: self.emit(operator.or_, self.comparison(), self.comparison()),
            lambda: self.emit(torch.where, self.comparison(), self.comparison(), self.term()),
            lambda: self.emit(operator.xor, self.comparison(), self.comparison()),
        )
        if self.chance(0.08):
            value = self.emit(operator.invert, value)
        if self.chance(0.1):
            dtype = self.random.choice((torch.int64, torch.uint8, torch.float32, torch.bfloat16))
            value = self.as_bool(self.emit("to", value, dtype))
        if self.chance(0.04):
            value = self.emit("transpose", value, -1, -2)
        return value

    def causal(self) -> fx.Node:
        query, key = (self.placed(self.emit(torch.arange, self.length), dim) for dim in (2, 3))
        return self.emit(operator.le, key, query)

    def conjunction(self) -> fx.Node:
        value = self.causal() if self.chance(0.6) else self.term()
        for _ in range(self.random.choice((0, 1, 1, 2, 3))):
            value = self.emit(operator.and_, value, self.term())
        return value

    # Numbers added to the scores

    def added(self) -> fx.Node:
        hide = self.random.choice((MIN, float("-inf"), -1e9, -1e9, -1e4, 1.0))
        value = self.pick(
            (3, lambda: self.emit(torch.where, self.conjunction(), 0.0, hide)),
            (2, lambda: self.filled(hide)),
            lambda: self.emit(operator.mul, self.emit("float", self.emit(operator.invert, self.conjunction())), hide),
            lambda: self.emit(operator.mul, self.emit(operator.sub, 1.0, self.emit("float", self.conjunction())), hide),
            lambda: self.emit("triu", self.emit(torch.full, (self.length, self.length), float("-inf")), 1),
            lambda: self.emit(
                operator.getitem, self.nodes["upper"], (slice(None, self.length), slice(None, self.length))
            ),
            lambda: self.data_filled(hide),
        )
        if self.chance(0.25):
            value = self.emit(operator.add, value, self.added())
        if self.chance(0.15):
            value = self.emit("to", value, self.random.choice((torch.bfloat16, torch.float16, torch.float64)))
        return value

    def filled(self, hide: float) -> fx.Node:
        zeros = self.emit(torch.zeros, (self.length, self.length))
        return self.emit("masked_fill", zeros, self.emit(operator.invert, self.conjunction()), hide)

    def data_filled(self, hide: float) -> fx.Node:
        number = self.emit(operator.sub, 1.0, self.emit("float", self.placed(self.nodes["padding"], 3)))
        return self.emit("masked_fill", number, self.emit("bool", number), hide)

    def site(self) -> list[MaskTerm]:
        terms = []
        for _ in range(self.random.choice((1, 1, 1, 1, 2))):
            if self.chance(0.3):
                terms.append(MaskTerm(self.added(), MaskRole.ADDED))
            elif self.chance(0.1):
                terms.append(MaskTerm(self.emit(operator.invert, self.conjunction()), MaskRole.HIDE))
            else:
                terms.append(MaskTerm(self.conjunction(), MaskRole.KEEP))
        if len(terms) == 2 and self.chance(0.7):
            terms.append(MaskTerm(self.causal(), MaskRole.KEEP))
        return terms


@dataclass
class Result:
    """What became of a program: "no program", "unproven", "not compared", or what it was proved to be."""

    verdict: str


def run_program(seed: int) -> Result:
    """Build a program, prove its masks and compare a proof with them.

    Raises:
        AssertionError: the proof is false.
    """
    symbolic = seed % 8 == 0
    lengths = [None] if symbolic else [LENGTHS[seed % 6], LENGTHS[(seed + 3) % 6]]
    verdict = "no program"
    for length in lengths:
        try:
            program = Program(seed, length)
        except (IndexError, RuntimeError, TypeError, ValueError):  # random operators that do not fit each other
            continue
        facts = GraphFacts(program.graph, overwritten_storages(program.graph, ()), held=HeldTensors(program.held))
        proof = prove_terms(Interpreter(facts), program.terms)
        if not isinstance(proof, MaskPredicate):
            verdict = "unproven"
            continue
        compared = [
            check(program, proof, checked, draw)
            for checked in (LENGTHS if symbolic else [length])
            for draw in range(DRAWS)
        ]
        verdict = str(proof) if any(compared) else "not compared"
    return Result(verdict)


def check(program: Program, proof: MaskPredicate, length: int, draw: int) -> bool:
    """Compare a proof with the masks that the program computes for one length and one draw of values.

    Returns:
        Whether there was anything to compare: the program runs for the length, and its masks are those of a site.
    """
    values = {**program.inputs(length, draw), **program.buffers}
    recorded: dict[fx.Node, object] = {}
    sizes = {}
    if program.mode is not None:
        if not _guards_hold(program.mode.shape_env, length):
            return False
        extents = (n.meta["example_value"].shape[1].node.expr for n in program.nodes.values() if _is_dynamic(n))
        sizes = dict.fromkeys(extents, length)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            recorded[node] = values[node.target]
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), recorded.__getitem__)
        try:
            method = node.op == "call_method"
            recorded[node] = (
                getattr(args[0], node.target)(*args[1:], **kwargs) if method else node.target(*args, **kwargs)
            )
        except IndexError:  # the program does not run for this length
            return False
    visible = torch.ones(BATCH, 1, length, length, dtype=torch.bool)
    for term in program.terms:
        mask = recorded[term.node]
        try:
            mask = mask[(None,) * (4 - mask.dim())].expand(BATCH, -1, length, length)
        except RuntimeError:  # not a mask of this site
            return False
        if term.role is MaskRole.KEEP:
            visible = visible & mask
        elif term.role is MaskRole.HIDE:
            visible = visible & ~mask
        else:
            bound = max(HIDING_NUMBER, torch.finfo(mask.dtype).min)
            shown = mask > bound
            if not proof.key_terms.bias:
                assert bool((mask[shown] == 0).all()), f"seed {program.seed}: {proof} of {mask}"
            elif not any(bias.up_to_rows for bias in proof.key_terms.bias):
                least, most = (mask.masked_fill(~shown, far).double() for far in (torch.inf, -torch.inf))
                alike = (least.amin(2) == most.amax(2)) | ~shown.any(2)
                assert bool(alike.all()), f"seed {program.seed}: {proof} of {mask}"
            visible = visible & shown
    for name, _, leaf in proof.key_terms.leaves:
        if recorded[leaf].dim() == 0:
            sizes[name] = int(recorded[leaf])
    offsets = {s: int(recorded[n]) for n in recorded for s in _symbols(proof) if s.name.startswith(f"{n.name}@")}
    rows = _rowwise(proof)
    if rows:
        return False
    expected = mask_of(proof, recorded, (BATCH, length, length), {**sizes, **offsets})
    assert torch.equal(visible, expected), (
        f"seed {program.seed}, length {length}, draw {draw}: {proof} {proof.causal_offset}\n{program.graph}"
    )
    return True


def _is_dynamic(node: fx.Node) -> bool:
    shape = node.meta["example_value"].shape
    return len(shape) > 1 and isinstance(shape[1], torch.SymInt)


def _symbols(proof: MaskPredicate) -> set:
    found = set() if proof.causal_offset is None else set(proof.causal_offset.free_symbols)
    return {symbol for symbol in found if "@" in symbol.name}


def _rowwise(proof: MaskPredicate) -> bool:
    """Whether the causal limit differs from row to row, which the planner refuses."""
    return proof.causal_offset is not None and bool(proof.causal_offset.atoms(AppliedUndef))


def _guards_hold(env: ShapeEnv, length: int) -> bool:
    """Whether a symbolic program was traced for a length."""
    return all(bool(guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, length))) for guard in env.guards)


def run_many(seeds) -> Counter:
    """Verdicts of many programs, counted."""
    return Counter(run_program(seed).verdict for seed in seeds)


def main() -> int:
    """Run many programs and print what they were proved to be."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    verdicts = run_many(range(arguments.first, arguments.first + arguments.programs))
    proved = sum(
        count for verdict, count in verdicts.items() if verdict not in ("no program", "unproven", "not compared")
    )
    print(f"{arguments.programs} programs, {proved} proved, none wrongly")
    for verdict, count in verdicts.most_common():
        print(f"{count:7} {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
