"""Inputs of a graph that masks are read from by value, and the vectors that stand for them.

A mask that is an input is data: nothing in its graph says what it lets through. If the proof of a site stops there, the
tensor that the traced call handed over is read (`graph.mask_values`). Its form becomes part of what the graph is
compiled for, its vectors become further inputs, and whoever runs the graph reads the mask of each call and hands the
vectors over, see `runtime.read_graphs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from infllm_pass.compat.dynamo import add_input, is_held_by_module
from infllm_pass.compat.tensors import FakeTensor, fake_mode_of
from infllm_pass.graph.mask_values import READER, InputForm, MaskForm, MaskValue, RunsForm, joined, may_be_read


@dataclass(frozen=True)
class InputReading:
    """An input that was read.

    Attributes:
        position: its place among the graph's inputs.
        name: the input's name, for people.
        form: what the graph is compiled for.
        valid: an added input: the keys that a mask lets any query see, bool ``[B, Lk]``; None if it lets all.
        sequences: another one: the numbers of the keys' sequences, int32 ``[B, Lk]``; None if there is one a row.
        beside: for positions, the places of the inputs with the numbers of their sequences.
    """

    position: int
    name: str
    form: InputForm
    valid: fx.Node | None = None
    sequences: fx.Node | None = None
    beside: tuple[int, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The inputs that were added, in the graph's order."""
        return tuple(node for node in (self.valid, self.sequences) if node is not None)


@dataclass(frozen=True)
class InputContext:
    """What is known of a graph's inputs beside their values.

    Attributes:
        expected: forms of masks to be covered beside those of this call, by the names of inputs.
        labels: what people know inputs by, where that is another name.
        came_from: how the inputs came to be made outside of the graph, for people; "" if nothing is known.
    """

    expected: Mapping[str, InputForm] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    came_from: str = ""


@dataclass
class InputReadings:
    """What is read of the inputs of a graph.

    Attributes:
        tensors: the tensors that the traced call handed over, by placeholder of the root graph.
        last: the last placeholder of the graph as it was traced.
        context: what is known beside.
        unreadable: what could not be read, and why.
        read: what was read.
    """

    tensors: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    last: fx.Node | None = None
    context: InputContext = InputContext()
    unreadable: dict[fx.Node, str] = field(default_factory=dict)
    read: dict[fx.Node, InputReading] = field(default_factory=dict)

    @property
    def examples(self) -> list[Tensor]:
        """Fake tensors for the added inputs, in their order."""
        return [node.meta["example_value"] for reading in self.read.values() for node in reading.nodes]

    @property
    def numbered(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """Inputs that hold numbers of sequences, none of which returns once another one has followed it.

        With each, the inputs that hold positions in these sequences.
        """
        places = {reading.position: node for node, reading in self.read.items()}
        found: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node, reading in self.read.items():
            if isinstance(reading.form, RunsForm):
                found.setdefault(node, ())
            if reading.sequences is not None:
                found[reading.sequences] = ()
            for numbers in map(places.__getitem__, reading.beside):
                found[numbers] = (*found.get(numbers, ()), node)
        return found

    @property
    def may_hold_masks(self) -> bool:
        """Whether any of the tensors may be a mask; the tokens alone are none."""
        return len(self.tensors) > 1 or any(value.is_floating_point() for value in self.tensors.values())

    def read_by(self, nodes: Sequence[fx.Node]) -> list[str]:
        """The names of the inputs read that nodes are computed from; of all of them for nodes of a nested graph."""
        seen: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending += node.all_input_nodes
        graphs = {node.graph for node in nodes}
        return [reading.name for node, reading in self.read.items() if node in seen or node.graph not in graphs]

    def keep(self, names: set[str]) -> None:
        """Take back what was read of inputs that no site's mask turned out to be read from.

        Args:
            names: the inputs that one was.
        """
        for node, reading in list(self.read.items()):
            if reading.name not in names:
                for added in reading.nodes:
                    added.graph.erase_node(added)
                del self.read[node]

    def add(self, node: fx.Node, name: str) -> bool:
        """Read an input; False if that has been done before, or says nothing.

        Args:
            node: the placeholder.
            name: the input's name, see `subgraphs.input_name`.
        """
        if node not in self.tensors:
            return False
        label = self.context.labels.get(name, name)
        if self._add_positions(node, label):
            return True
        value = None if node in self.read else READER.read(self.tensors[node])
        if value is None:
            self.unreadable[node] = "its values are not those of a causal mask with windows, padding and sequences"
            return False
        position = _place(node)
        form = joined(self.context.expected.get(name), value.form)
        reading = InputReading(position, label, form)
        if isinstance(value, MaskValue) and isinstance(form, MaskForm):
            after = [added for other in self.read.values() for added in other.nodes]
            valid = self._vector(node, "valid", torch.bool, after) if form.padded else None
            after += [] if valid is None else [valid]
            sequences = self._vector(node, "sequences", torch.int32, after) if form.packed else None
            reading = InputReading(position, label, form, valid, sequences)
        self.read[node] = reading
        return True

    def _add_positions(self, node: fx.Node, label: str) -> bool:
        """Read an input as positions in the sequences that another one numbers, once that is read."""
        known = self.read.get(node)
        beside = () if known is None else known.beside
        if known is not None and isinstance(known.form, MaskForm):
            return False
        for other, reading in self.read.items():
            if other is node or not isinstance(reading.form, RunsForm) or reading.position in beside:
                continue
            value = READER.read(self.tensors[node], [self.tensors[other]])
            if value is not None:
                self.read[node] = InputReading(_place(node), label, value.form, beside=(*beside, reading.position))
                return True
        return False

    def _vector(self, mask: fx.Node, name: str, dtype: torch.dtype, after: Sequence[fx.Node]) -> fx.Node:
        """An input ``[B, Lk]`` beside a mask, behind those of the traced call and the ones added before."""
        example = mask.meta["example_value"]
        rows = example.shape[0] if example.dim() > 2 else 1
        with fake_mode_of(example) or torch.no_grad():
            vector = torch.empty((rows, example.shape[-1]), dtype=dtype, device=example.device)
        with mask.graph.inserting_after(after[-1] if after else self.last):
            node = mask.graph.placeholder(f"{mask.name}_{name}")
        add_input(node, vector)
        return node


def _place(node: fx.Node) -> int:
    """The place of an input among those of its graph."""
    return [other for other in node.graph.nodes if other.op == "placeholder"].index(node)


def readable_inputs(graph: fx.Graph, inputs: Sequence[object], context: InputContext | None = None) -> InputReadings:
    """What may be read of the inputs of a graph: tensors of data that no module holds.

    Args:
        graph: the graph as Dynamo made it.
        inputs: real values of its placeholders; fake ones are not read.
        context: what is known beside.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = {
        node: value
        for node, value in zip(placeholders, inputs, strict=False)
        if isinstance(value, Tensor) and not is_held_by_module(node)
    }
    found = {node: value for node, value in given.items() if may_be_read(value)}
    unknown = "the graph was split before the pass, as DistributedDataParallel does: call infllm_pass.sparsify, or set"
    unreadable = {
        node: f"{unknown} torch._dynamo.config.optimize_ddp to 'no_optimization'"
        for node, value in given.items()
        if isinstance(value, FakeTensor)
    }
    last = placeholders[-1] if placeholders else None
    return InputReadings(found, last, context or InputContext(), unreadable)
