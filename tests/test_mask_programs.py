"""Soundness of the mask prover: random programs over its own operators, checked element by element.

A program is a graph built from the operators that the interpreter has rules for, over aranges and a padding
vector. Whatever is proved of its mask must be what the mask is.
"""

from __future__ import annotations

import operator
import random

import pytest
import torch
from torch import fx

from infllm_pass.masks import GraphFacts, MaskPredicate, prove_mask
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.masks.values import overwritten_storages

from .mask_support import mask_of

PROGRAMS = 600
BATCH, LENGTH = 2, 6


class Program:
    """A random graph that ends in a mask ``[BATCH or 1, 1, LENGTH, LENGTH]``."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.graph = fx.Graph()
        self.padding = self.graph.placeholder("padding")
        self.padding.meta["example_value"] = torch.randint(0, 2, (BATCH, LENGTH))
        self.mask = self.conjunction()

    def emit(self, target, *args, **kwargs) -> fx.Node:
        values, options = fx.node.map_arg((args, kwargs), lambda node: node.meta["example_value"])
        if isinstance(target, str):
            node = self.graph.call_method(target, args, kwargs)
            node.meta["example_value"] = getattr(values[0], target)(*values[1:], **options)
        else:
            node = self.graph.call_function(target, args, kwargs)
            node.meta["example_value"] = target(*values, **options)
        return node

    def index(self, dim: int) -> fx.Node:
        """Positions along one of four dimensions, perhaps shifted, scaled or turned around."""
        value = self.emit(torch.arange, LENGTH)
        for _ in range(self.random.choice((0, 0, 0, 1, 1, 2))):
            step = self.random.randrange(8)
            if step == 0:
                value = self.emit(operator.add, value, self.random.randint(-2, 2))
            elif step == 1:
                value = self.emit(operator.sub, value, self.random.randint(0, 2))
            elif step == 2:
                value = self.emit(operator.mul, value, self.random.choice((0, 1, 2)))
            elif step == 3:
                value = self.emit(operator.floordiv, value, self.random.choice((1, 2)))
            elif step == 4:
                value = self.emit(operator.neg, value)
            elif step == 5:
                value = self.emit(torch.diff, value, prepend=self.emit(operator.sub, self.first(value), 1))
            elif step == 6:  # a negative index counts from the end
                value = self.emit(operator.getitem, self.emit(torch.arange, LENGTH), (value,))
            else:
                value = self.emit("cumsum", self.emit(operator.ne, value, self.random.randint(-1, 9)), 0)
        for place in range(4):
            if place != dim:
                value = self.emit("unsqueeze", value, place)
        return value

    def first(self, value: fx.Node) -> fx.Node:
        return self.emit(operator.getitem, value, slice(None, 1))

    def comparison(self) -> fx.Node:
        relation = self.random.choice((operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne))
        dims = self.random.choice(((3, 2), (2, 3), (3, 2), (2, 3), (3, 3), (2, 2)))
        return self.emit(relation, *(self.index(dim) for dim in dims))

    def condition(self) -> fx.Node:
        """A test of the padding vector, read at keys or at queries."""
        batch = self.emit("view", self.emit(torch.arange, BATCH), BATCH, 1, 1, 1)
        read = self.emit(operator.getitem, self.padding, (batch, self.index(self.random.choice((3, 3, 3, 2)))))
        if self.random.random() < 0.5:
            return self.emit("bool", read)
        return self.emit(self.random.choice((operator.ne, operator.gt, operator.eq)), read, 0)

    def term(self) -> fx.Node:
        choice = self.random.randrange(10)
        if choice < 6:
            value = self.comparison()
        elif choice < 8:
            value = self.condition()
        elif choice == 8:
            value = self.emit(operator.or_, self.comparison(), self.comparison())
        else:
            value = self.emit(torch.where, self.comparison(), self.comparison(), self.comparison())
        if self.random.random() < 0.15:
            value = self.emit(operator.invert, value)
        if self.random.random() < 0.1:
            value = self.emit("to", self.emit("to", value, torch.int64), torch.bool)
        return value

    def conjunction(self) -> fx.Node:
        value = self.emit(torch.ones, (1, 1, LENGTH, LENGTH), dtype=torch.bool)
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 3))):
            try:
                value = self.emit(operator.and_, value, self.term())
            except IndexError:  # a random index left the tensor: no such program
                continue
        if self.random.random() < 0.15:
            value = self.emit("transpose", value, -1, -2)
        return self.emit("expand", value, BATCH, -1, -1, -1)


@pytest.mark.parametrize("part", range(4))
def test_no_random_program_is_proved_wrongly(part):
    proved = causal = padded = 0
    for seed in range(part * PROGRAMS, (part + 1) * PROGRAMS):
        program = Program(seed)
        facts = GraphFacts(program.graph, overwritten_storages([program.graph]))
        proof = prove_mask(Interpreter(facts), program.mask)
        if not isinstance(proof, MaskPredicate):
            continue
        tensors = {node: node.meta["example_value"] for node in program.graph.nodes}
        actual = program.mask.meta["example_value"]
        expected = mask_of(proof, tensors, (BATCH, LENGTH, LENGTH))
        assert torch.equal(actual, expected), f"seed {seed}: {proof}\n{program.graph}"
        proved += 1
        causal += proof.causal_offset is not None
        padded += bool(proof.key_conditions)
    assert proved > PROGRAMS // 20, "the programs are too wild to say anything"
    assert causal
    assert padded
    print(f"{PROGRAMS} programs, {proved} proved, {causal} causal, {padded} with key conditions")
