"""The text of a script that builds a part of a recorded graph and runs the pass on it."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.graph.facts import example_of
from infllm_pass.rewrite.graph_slice import RecordedGraph, Step
from infllm_pass.rewrite.source_text import Unwritable, hint, literal, module_of, reference
from infllm_pass.sites.site import source_line

_TAKEN = frozenset(
    {
        "Example",
        "GraphBuilder",
        "ClosedForm",
        "SparseAttentionConfig",
        "g",
        "graph",
        "math",
        "operator",
        "replay",
        "reproduce",
        "torch",
    }
)
"""Names that a script uses itself."""


@dataclass(frozen=True)
class Failure:
    """A site at which the pass failed.

    Attributes:
        graph: number of the graph.
        site: number of the site.
        node: the site's node.
        place: the site, for people.
        error: what the pass failed with.
    """

    graph: int
    site: int
    node: fx.Node
    place: str
    error: Exception


class Script:
    """A script for a part of a graph.

    Args:
        graph: the graph.
        wanted: the nodes whose dependencies are written; their values are the output.
        cut_opaque: see `RecordedGraph.slice`.
        held: tensors that masks may be read from.

    Raises:
        Unwritable: the part holds something that no script could make.
    """

    def __init__(
        self, graph: RecordedGraph, wanted: Sequence[fx.Node], cut_opaque: bool, held: HeldTensors | None
    ) -> None:
        self._held = HeldTensors({}) if held is None else held
        self._modules = {"torch"}
        self._functions: list[str] = []
        self._holds_values = False
        self.nodes = self._function("graph", graph, wanted, cut_opaque, outer=False)

    def text(self, failure: Failure, config: SparseAttentionConfig, switch: str, *, again: bool) -> str:
        """The script.

        Args:
            failure: what it is to show.
            config: the configuration that the pass ran with.
            switch: how sides of the length switch are chosen, the value of a `Switch`.
            again: whether the failure showed again when the script was tried.
        """
        shown = "It did when this file was written." if again else "It did not when this file was written."
        what = f"{type(failure.error).__name__}: {failure.error}".replace("\\", "\\\\").replace('"""', "'''")
        options = ", ".join(f"{name}={value!r}" for name, value in config.to_dict().items())
        told = "".join(traceback.format_exception(failure.error)).rstrip().splitlines()
        lines = [
            f'"""The pass failed at graph {failure.graph}, {failure.place} with',
            "",
            *(f"    {line}".rstrip() for line in what.splitlines()),
            "",
            f"This script builds {self.nodes} nodes of the graph and runs the pass on them, which should fail alike.",
            shown,
            f"Written with torch {torch.__version__}, Python {platform.python_version()}.",
            '"""',
            "",
            *(f"import {module}" for module in sorted(self._modules)),
            "",
            "from infllm_pass import SparseAttentionConfig",
            *(["from infllm_pass.graph.buffers import ClosedForm"] if self._holds_values else []),
            "from infllm_pass.rewrite.replay import Example, GraphBuilder, replay",
            *self._functions,
            "",
            "",
            "def reproduce():",
            f"    with torch.set_grad_enabled({torch.is_grad_enabled()}):",
            f"        return replay(graph, SparseAttentionConfig({options}), {switch!r})",
            "",
            "",
            'if __name__ == "__main__":',
            "    reproduce()",
            '    print("the pass did not fail")',
            "",
            "# The failure was",
            *(f"# {line}".rstrip() for line in told),
            "",
        ]
        return "\n".join(lines)

    def _function(
        self, name: str, graph: RecordedGraph, wanted: Sequence[fx.Node], cut_opaque: bool, *, outer: bool
    ) -> int:
        """Write the function that builds a graph; the number of its nodes."""
        kept, inputs = graph.slice(wanted, cut_opaque=cut_opaque)
        if outer:
            given = {node for node in graph.steps if node.op == "placeholder"}
            if not inputs <= given:
                raise Unwritable(f"a nested graph holds {', '.join(node.name for node in inputs - given)}")
            inputs = given  # the caller hands over all of them
        lines = ["", "", f"def {name}(outer=None):", "    g = GraphBuilder(outer)"]
        names: dict[fx.Node, str] = {}
        place = ""
        for node in sorted(graph.steps, key=lambda node: node not in inputs):  # inputs come first
            if node in kept or node in inputs:
                here = source_line(node)
                if here and here != place:
                    lines.append(f"    # {here}")
                place = here or place
                made = self._input(node) if node in inputs else self._call(name, graph.steps[node], names)
                names[node] = f"{node.name}_" if node.name in _TAKEN else node.name
                lines.append(f"    {names[node]} = {made}")
        lines.append(f"    return g.output({self._output(graph, wanted, names, outer=outer)})")
        self._functions += lines
        return len(names)

    def _output(
        self, graph: RecordedGraph, wanted: Sequence[fx.Node], names: dict[fx.Node, str], *, outer: bool
    ) -> str:
        """What a graph returns: as it did, if all of it is there, else the wanted nodes."""
        (output,) = (step for node, step in graph.steps.items() if node.op == "output")
        if outer or all(node in names for node in output.inputs):
            return literal(output.args[0], names, self._reference)
        return literal(tuple(node for node in wanted if node.op != "output"), names, self._reference)

    def _input(self, node: fx.Node) -> str:
        example = example_of(node)
        if not isinstance(example, torch.Tensor):
            return f"g.input({node.name!r}, {literal(hint(example), {})})"
        shape, stride = (tuple(hint(extent) for extent in of) for of in (example.shape, example.stride()))
        parts = [repr(shape), str(example.dtype)]
        if str(example.device) != "cpu":
            parts.append(f"device={str(example.device)!r}")
        if stride != torch.empty(shape, device="meta").stride():
            parts.append(f"stride={stride!r}")
        if example.requires_grad:
            parts.append("requires_grad=True")
        form = self._held.read(node)
        if form is not None:
            self._holds_values = True
            values = literal((form.rank, form.dims, form.values, form.ends, form.step), {})
            parts.append(f"values=ClosedForm{values}")
        return f"g.input({node.name!r}, Example({', '.join(parts)}))"

    def _call(self, function: str, step: Step, names: dict[fx.Node, str]) -> str:
        node = step.node
        if step.body is not None:
            inner = f"{function}_{node.name}"
            everything = [each for each in step.body.steps if each.op != "output"]
            self._function(inner, step.body, everything, False, outer=True)
            return f"g.body({node.name!r}, {inner}(g))"
        target = repr(node.target) if node.op == "call_method" else self._reference(node.target)
        parts = [target, *(literal(part, names, self._reference) for part in step.args)]
        parts += [f"{name}={literal(part, names, self._reference)}" for name, part in step.kwargs.items()]
        return f"g.{'method' if node.op == 'call_method' else 'call'}({', '.join(parts)})"

    def _reference(self, target: Any) -> str:
        """The expression for a function, whose module the script imports."""
        expression = reference(target)
        module = module_of(expression)
        if module is None:
            return expression.removeprefix("builtins.")
        self._modules.add(module)
        return expression
