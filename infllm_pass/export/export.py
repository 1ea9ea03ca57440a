"""Exported programs and ONNX files in which every provable attention site is switchable.

The pass is the same as under ``torch.compile``; it runs on the graph of ``torch.export``. Where Dynamo compiles a graph
for each side of the length switch, an exported program holds both: its operators compare the length themselves.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypedDict

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from typing_extensions import Unpack

from infllm_pass.compat.dynamo import UserError, uncompiled
from infllm_pass.compat.shapes import ConstraintViolationError
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CarriedError, ExportError, NoAttentionSiteError, UnsupportedModelError
from infllm_pass.graph.op_table import written_arguments
from infllm_pass.plan.length_guard import Branch
from infllm_pass.plan.site_config import SiteConfig, SiteFilter, site_config_of
from infllm_pass.rewrite.failures import warn_of_failures
from infllm_pass.rewrite.pipeline import SitePolicy, run_on_export
from infllm_pass.rewrite.report import Report
from infllm_pass.rewrite.targets import DEFAULT_TARGETS, Target


def export(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    filter_fn: SiteFilter | None = None,
    site_config: SiteConfig | None = None,
    targets: Sequence[Target] = DEFAULT_TARGETS,
) -> ExportedProgram:
    """Export a model with its attention switchable between dense and block-sparse.

    Args:
        model: a module, compiled or not, or an exported program, which is left as it is.
        args: example arguments; a program needs none.
        kwargs: example keyword arguments.
        dynamic_shapes: which sizes are dynamic, as ``torch.export.export`` takes it. The switch stays in the program.
        config: what sparse attention selects, a `SparseAttentionConfig`, a dict of its fields, or None for the
            defaults.
        filter_fn: sites for which it returns False stay dense.
        site_config: the configuration of each site, see `sparsify`.
        targets: what a site can become, see `sparsify`.

    Returns:
        A program whose switchable sites are calls of this package's operators.

    Raises:
        NoAttentionSiteError: no site is switchable; the message says why.
        UnsupportedModelError: the object is no model that can be exported.
        ExportError: torch.export refuses it: sizes outside `dynamic_shapes`, control flow that depends on data.
        ConfigError: the configuration is not valid, or `filter_fn` or `site_config` returned
            something else than it should.
        Exception: whatever these two raise.
    """
    chosen = SparseAttentionConfig.coerce(config)
    policy = SitePolicy(chosen, site_config_of(filter_fn, site_config), tuple(targets))
    return export_with_report(model, args, kwargs, dynamic_shapes, policy)[0]


class OnnxFileOptions(TypedDict, total=False):
    """Keywords of `export_onnx` that concern the file.

    Attributes:
        opset: version of ONNX's default operators, at least 18; 18 if not given.
        external_data: whether weights go to a second file beside the first; None, the default: if they are large.
        input_names: names of the graph's inputs; None, the default: the arguments' own.
        output_names: names of the graph's outputs.
        overwrite: whether an existing file is replaced; False if not given.
    """

    opset: int
    external_data: bool | None
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    overwrite: bool


def export_onnx(
    model: nn.Module | ExportedProgram,
    path: str | PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    filter_fn: SiteFilter | None = None,
    site_config: SiteConfig | None = None,
    **file: Unpack[OnnxFileOptions],
) -> Report:
    """Export a model to an ONNX file in which every switchable site is one node ``infllm::InfLLMV2Attention``.

    The node is a function of the file, with the length switch inside a body of standard operators, so that any
    runtime runs it; TensorRT takes a plugin of that name instead if one is registered.

    Args:
        model: a module, compiled or not, or an exported program.
        path: the file to write.
        args: example arguments; a program needs none.
        kwargs: example keyword arguments.
        dynamic_shapes: which sizes are dynamic, as ``torch.export.export`` takes it.
        config: what sparse attention selects; see `export`.
        filter_fn: sites for which it returns False stay dense.
        site_config: the configuration of each site, see `sparsify`.
        file: how the file is written, by keyword: see `OnnxFileOptions`.

    Returns:
        What was found and done at every site.

    Raises:
        MissingDependencyError: the packages of the extra ``onnx`` are not installed.
        ExportError: the path exists or cannot be written, or a part of the model cannot be exported. Nothing is
            written then.
        DtypeError: a site computes in another dtype than float32 or float16.
        NoAttentionSiteError, UnsupportedModelError, ConfigError: see `export`.
    """
    from infllm_pass.lowering.export.onnx.exporter import OnnxTarget, require_onnx

    require_onnx()
    target = OnnxTarget(path, **file)
    policy = SitePolicy(SparseAttentionConfig.coerce(config), site_config_of(filter_fn, site_config))
    program, report = export_with_report(model, args, kwargs, dynamic_shapes, policy)
    target.write(program)
    return report


def export_with_report(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    policy: SitePolicy,
) -> tuple[ExportedProgram, Report]:
    """`export`, with what was found and done at every site."""
    program = _functional(_program(model, args, kwargs, dynamic_shapes))
    module = copy.deepcopy(program.graph_module)
    failure: Exception | None = None
    try:
        found = run_on_export(module, policy, branch=Branch.SPARSE, values=_held_values(program))
    except CarriedError as carried:
        failure = carried.error
    if failure is not None:
        raise failure  # outside of the handler: a user's exception keeps the context that it had
    warn_of_failures(found, set())
    report = Report([found])
    if not report.switchable and not _calls_operators(module):
        raise NoAttentionSiteError(f"nothing to export: no attention site is switchable\n{report}")
    _unpack_lists(module.graph)
    return _with_module(program, module), report


def _program(
    model: nn.Module | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported: give an nn.Module or a torch.export.ExportedProgram"
        )
    original = uncompiled(model)
    try:
        with torch.no_grad():
            return torch.export.export(original, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    except (UserError, ConstraintViolationError) as error:
        raise ExportError(f"torch.export refuses the model, its arguments or dynamic_shapes: {error}") from error


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes in place, and with a signature that says which buffers and inputs it writes to.

    No mask could be proved of a cache whose position is set and then advanced in place: its value depends on when it
    is read. Programs that write to nothing stay as they are.
    """
    if not any(written_arguments(node) for node in program.graph.nodes):
        return program
    try:
        with torch.no_grad():
            functional: ExportedProgram = program.run_decompositions({})
    except AssertionError as error:  # how torch says that two inputs share memory
        raise ExportError(
            "the program writes to memory that two of its inputs share, as when a cache is a buffer and held outside "
            "the module too: export it with torch.export.export(..., strict=True), and give that program"
        ) from error
    return functional


def _held_values(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The buffers and constants of a program, by the names of their placeholders."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    stores = (program.state_dict, program.constants)
    found = ((name, next((store[key] for store in stores if key in store), None)) for name, key in names.items())
    return {name: value for name, value in found if isinstance(value, torch.Tensor)}


def _calls_operators(module: fx.GraphModule) -> bool:
    """Whether the model itself calls switchable attention."""
    return any(getattr(node.target, "namespace", "") == "infllm" for node in module.graph.nodes)


def _unpack_lists(graph: fx.Graph) -> None:
    """Hand on the tensors of a list one by one: ``torch.export.save`` takes no program that hands on a list whole."""
    for node in graph.nodes:
        whole = [user for user in node.users if user.target is not operator.getitem and user.op != "output"]
        if not whole or not isinstance(node.meta.get("val"), list):
            continue
        with graph.inserting_before(node.next):
            parts = [graph.call_function(operator.getitem, (node, at)) for at in range(len(node.meta["val"]))]
        for part, value in zip(parts, node.meta["val"], strict=True):
            part.meta["val"] = value
        for user in whole:
            user.args = tuple(parts if arg is node else arg for arg in user.args)


def _with_module(program: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    """The program with a rewritten graph: an output of the graph may be a node of another name now."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    signature = program.graph_signature
    specs = [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, fx.Node) else spec
        for spec, node in zip(signature.output_specs, output.args[0], strict=True)
    ]
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature(list(signature.input_specs), specs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
