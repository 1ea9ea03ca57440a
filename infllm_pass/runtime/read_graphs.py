"""Graphs whose masks were read from their inputs: the masks of each call are read, and the right graph runs.

A graph is compiled for the forms that its masks had. A call whose masks are of those forms, or of forms that these
cover, runs it, with the vectors of the masks as further inputs. For others the graph as it was before the pass is
compiled once more, for forms that cover both where there are any. What cannot be read, or comes after too many forms,
runs the graph as it was, uncompiled and dense, with a warning.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from infllm_pass.compat.dynamo import recompile_limit
from infllm_pass.errors import MaskInputWarning
from infllm_pass.graph.input_readings import InputReading
from infllm_pass.graph.mask_values import READER, InputForm, InputValue, MaskValue, joined

Forms = Mapping[str, InputForm]
"""Forms of masks, by the names that the placeholders of a graph have."""


@dataclass(frozen=True)
class Again:
    """What a graph is made of that is compiled for other masks than those of its first call.

    Attributes:
        original: the graph as Dynamo made it then.
        forms: the forms of its masks now.
        labels: what people know its inputs by, by the names of its placeholders.
    """

    original: fx.GraphModule
    forms: Forms
    labels: Mapping[str, str]


def adopt_origins(graph: fx.Graph, original: fx.Graph) -> None:
    """Give the calls of a graph that was traced from another one's code the modules and lines of the model's calls.

    Args:
        graph: the graph; it stays as it is if its calls are not those of the original.
        original: the graph whose code was traced.
    """
    calls, origins = ([node for node in part.nodes if node.op.startswith("call")] for part in (graph, original))
    if [node.target for node in calls] != [node.target for node in origins]:
        return
    for node, origin in zip(calls, origins, strict=True):
        for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
            if key in origin.meta:
                node.meta[key] = origin.meta[key]


class ReadGraph:
    """Calls the graph that was compiled for the masks of a call.

    Args:
        compiled: the compiled graph, which takes the vectors of its masks as its last inputs.
        readings: what was read when it was compiled.
        original: the graph as it was before the pass.
        compile_again: compiles a copy of the original for masks of other forms.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        readings: Sequence[InputReading],
        original: fx.GraphModule,
        compile_again: Callable[[Again], Callable[..., Any]],
    ) -> None:
        self.compiled = compiled
        self.readings = tuple(readings)
        self.original = original
        self._compile_again = compile_again
        placeholders = [node for node in original.graph.nodes if node.op == "placeholder"]
        self._names = {reading.position: str(placeholders[reading.position].target) for reading in self.readings}
        self._labels = {self._names[reading.position]: reading.name for reading in self.readings}
        self._others: list[tuple[Forms, Callable[..., Any]]] = []
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        """Run a graph; the outputs are those of the original."""
        values = {reading.position: _read(reading, inputs) for reading in self.readings}
        if any(value is None for value in values.values()):
            return self._run_original(inputs, "holds no mask that can be read")
        vectors: list[Tensor] = []
        for reading in self.readings:
            value = values[reading.position]
            if value is None or not reading.form.covers(value.form):  # type: ignore[arg-type]
                return self._other(inputs, values)
            vectors += _vectors(reading, value)
        return self.compiled(*inputs, *vectors)

    def _other(self, inputs: Sequence[Any], values: Mapping[int, InputValue | None]) -> Any:
        """Run the graph of other forms than those that were compiled first."""
        forms = {self._names[place]: value.form for place, value in values.items() if value is not None}
        with self._lock:
            found = next((run for known, run in self._others if _cover(known, forms)), None)
            if found is None and len(self._others) + 1 < recompile_limit():
                first = {self._names[reading.position]: reading.form for reading in self.readings}
                both = {name: joined(first[name], form) for name, form in forms.items()}
                found = self._compile_again(Again(self.original, both, self._labels))
                self._others.append((both, found))
        if found is None:
            return self._run_original(inputs, "has held masks of too many forms")
        return found(*inputs)

    def _run_original(self, inputs: Sequence[Any], why: str) -> Any:
        names = ", ".join(reading.name for reading in self.readings)
        warnings.warn(
            f"the graph that takes the mask {names} as an input runs uncompiled and dense: the tensor {why}; let the "
            "compiled model make the mask from a 2-D padding mask, or pass masks of one kind",
            MaskInputWarning,
            stacklevel=2,
        )
        return self.original(*inputs)


def _read(reading: InputReading, inputs: Sequence[Any]) -> InputValue | None:
    """What an input holds in this call."""
    return READER.read(inputs[reading.position], [inputs[place] for place in reading.beside])


def _vectors(reading: InputReading, value: InputValue) -> list[Tensor]:
    """The further inputs that a graph takes for a mask."""
    if not isinstance(value, MaskValue):
        return []
    found = [] if reading.valid is None else [value.valid]
    return found if reading.sequences is None else [*found, value.sequences]


def _cover(known: Forms, forms: Forms) -> bool:
    return all(known[name].covers(form) for name, form in forms.items())  # type: ignore[arg-type]
