"""Buffer guards: a graph whose mask was read from a module's buffer checks that buffer at every call.

Nothing in Dynamo guards the values of a buffer. A graph whose mask was proved from one is watched: at each call the
buffer must be the tensor that was read, unwritten since by its version counter. Otherwise it is read again, and if
it no longer has the form that the proof used, the graph runs as it was before the pass, uncompiled.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from infllm_pass.compat.dynamo import copy_source
from infllm_pass.errors import MaskBufferChangedWarning
from infllm_pass.graph.buffers import Reading


@dataclass(frozen=True)
class Watched:
    """A reading that a graph relies on.

    Attributes:
        position: place of the tensor among the graph's inputs; None for one that the graph itself holds.
        name: the input's name, for people.
        reading: what was read.
    """

    position: int | None
    name: str
    reading: Reading

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether the tensor still has the values that were read."""
        tensor = self.reading.tensor() if self.position is None else inputs[self.position]
        return self.reading.still_holds(tensor) or self.reading.holds_again(tensor)


class WatchedGraph:
    """Calls a compiled graph as long as what it relies on holds.

    Args:
        compiled: the compiled graph.
        original: the graph as it was before the pass.
        watched: what it relies on.
    """

    def __init__(self, compiled: Callable[..., Any], original: fx.GraphModule, watched: tuple[Watched, ...]) -> None:
        self.compiled = compiled
        self.original = original
        self.watched = watched

    def __call__(self, *inputs: Any) -> Any:
        """Run one side; the outputs are those of the graph."""
        for part in self.watched:
            if not part.holds(inputs):
                warnings.warn(
                    f"the tensor {part.name} no longer holds the mask that was proved when its graph was compiled: "
                    "the graph runs uncompiled and dense; call torch.compiler.reset() to compile it for the new mask",
                    MaskBufferChangedWarning,
                    stacklevel=2,
                )
                return self.original(*inputs)
        return self.compiled(*inputs)


def unchanged_copy(module: fx.GraphModule, known: dict[int, fx.GraphModule] | None = None) -> fx.GraphModule:
    """A copy of a graph and of the graphs nested in it, with what Dynamo notes on them; the rest is shared.

    Args:
        module: the graph.
        known: copies by the identity of what they were made of; a graph with several names has one.
    """
    known = {} if known is None else known
    if id(module) in known:
        return known[id(module)]
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    known[id(module)] = copied
    for name, value in vars(module).items():
        vars(copied).setdefault(name, value)
    copied.meta = module.meta
    for node, twin in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        copy_source(node, twin)
    for name, part in module._modules.items():
        if isinstance(part, fx.GraphModule):
            setattr(copied, name, unchanged_copy(part, known))
    return copied


def watch(graph: fx.Graph, readings: dict[fx.Node, Reading]) -> tuple[Watched, ...]:
    """What a graph has to watch of the tensors that were read while its masks were proved."""
    places = {node: place for place, node in enumerate(node for node in graph.nodes if node.op == "placeholder")}
    return tuple(Watched(places.get(node), node.name, reading) for node, reading in readings.items())
