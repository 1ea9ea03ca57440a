"""Functionalises exported programs: buffers and inputs that are mutated become inputs and outputs.

A program may write to its buffers, as to those of a static cache, or to its inputs. A graph that is a function would
lose what was written: buffers that are written to become inputs here, and what is written to them becomes outputs.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec

from infllm_pass.compat.fx import rename
from infllm_pass.compat.trees import tree_structure

WRITTEN = "_out"
"""What the name of an output adds to the name of the input whose new value it is."""

_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def without_state(program: ExportedProgram) -> tuple[ExportedProgram, list[str]]:
    """The program as a function: what it writes to is handed in, and given back.

    Args:
        program: the program, decomposed, so that its graph is functional and its signature names what it writes to.
            Its graph is changed.

    Returns:
        The program, and the names of the outputs that it gained, which follow its own: those of the inputs that they
        replace at the next call, with `WRITTEN` behind them. Buffers are inputs after all others, under their own names
        with ``_`` for ``.``.
    """
    signature, graph = program.graph_signature, program.graph
    mutations = [spec for spec in signature.output_specs if spec.kind in _MUTATIONS]
    if not mutations:
        return program, []
    buffers = {str(spec.target) for spec in mutations if spec.kind is OutputKind.BUFFER_MUTATION}
    inputs = _with_inputs(graph, signature.input_specs, buffers)
    outputs = _with_outputs(graph, signature.output_specs)
    function = ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: value for name, value in program.state_dict.items() if name not in buffers},
        range_constraints=program.range_constraints,
        module_call_graph=[_flat_call(inputs, outputs)],
        constants={name: value for name, value in program.constants.items() if name not in buffers},
        verifiers=program.verifiers,
    )
    return function, [str(spec.target).replace(".", "_") + WRITTEN for spec in mutations]


def _flat_call(inputs: list[InputSpec], outputs: list[OutputSpec]) -> ModuleCallEntry:
    """The program's signature as a call: its inputs one after the other, a tuple of its outputs."""
    given = [spec.arg for spec in inputs if spec.kind is InputKind.USER_INPUT]
    gives = [spec.arg for spec in outputs]
    structure = tree_structure(((0,) * len(given), {})), tree_structure((0,) * len(gives))
    return ModuleCallEntry("", ModuleCallSignature(given, gives, *structure))


def _with_inputs(graph: fx.Graph, specs: list[InputSpec], buffers: set[str]) -> list[InputSpec]:
    """Move the placeholders of these buffers behind all others, as inputs of the user."""
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    last = next(reversed(placeholders.values()))
    kept = [spec for spec in specs if spec.kind is not InputKind.BUFFER or spec.target not in buffers]
    moved = []
    for spec in specs:
        if spec in kept:
            continue
        node = placeholders[spec.arg.name]
        last.append(node)
        last = node
        rename(node, str(spec.target).replace(".", "_"))
        node.target = node.name
        moved.append(InputSpec(InputKind.USER_INPUT, replace(spec.arg, name=node.name), None))
    return [*kept, *moved]


def _with_outputs(graph: fx.Graph, specs: list[OutputSpec]) -> list[OutputSpec]:
    """Move what is written to the end of the outputs, as outputs of the user."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    places = sorted(range(len(specs)), key=lambda place: specs[place].kind in _MUTATIONS)
    output.args = (tuple(output.args[0][place] for place in places),)
    return [
        OutputSpec(OutputKind.USER_OUTPUT, specs[place].arg, None) if specs[place].kind in _MUTATIONS else specs[place]
        for place in places
    ]
