"""Export of a `torch.export` program to an ONNX file.

Each attention site becomes one ``infllm::InfLLMV2Attention`` node and `torch.onnx.export` translates the rest. The
node's body is added afterwards, as a model-local function (`body`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from infllm_pass.compat.shapes import statically_known_true
from infllm_pass.compat.tensors import TorchDispatchMode, detect_fake_mode
from infllm_pass.errors import DtypeError, ExportError, MissingDependencyError

from ...ops.attention_args import FUSED
from .. import fused_op
from ..atomic_file import refuse_unwritable, written_whole
from ..functionalize import without_state
from .op_spec import DOMAIN, NAME, VERSION, AttentionNode

if TYPE_CHECKING:
    import onnx_ir

aten = torch.ops.aten

OPSETS = range(18, 24)
DTYPES = (torch.float32, torch.float16)

ONNXSCRIPT_VERSION = "0.7.1"
"""The first version with `onnxscript.build_function`."""

LARGE_WEIGHTS = 1 << 30
"""Bytes from which weights go to a file of their own: one file of protocol buffers ends at 2 GB."""


def require_onnx() -> None:
    """Check that the packages that write ONNX files are installed.

    Raises:
        MissingDependencyError: one of them is missing, or onnxscript is too old to build functions.
    """
    purpose = "exporting to ONNX"
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "onnx", purpose)
    if not hasattr(importlib.import_module("onnxscript"), "build_function"):
        raise MissingDependencyError(f"onnxscript>={ONNXSCRIPT_VERSION}", "onnx", purpose)


class OnnxTarget:
    """A file to be written, checked before any work is done for it.

    Args:
        path: the file.
        opset: version of the default operators.
        external_data: whether weights go to a file of their own, ``<path>.data``; None: if they are large.
        input_names: names of the graph's inputs; None: the program's own.
        output_names: names of the graph's outputs.
        overwrite: whether an existing file is replaced.

    Raises:
        ExportError: the file exists, or its folder cannot be written to, or the opset is not supported.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        opset: int = 18,
        external_data: bool | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.opset = opset
        self.external_data = external_data
        self.input_names, self.output_names = input_names, output_names
        if opset not in OPSETS:
            raise ExportError(f"opset {opset} is not supported: expected {OPSETS.start} to {OPSETS.stop - 1}")
        refuse_unwritable(self.path, self.data_path, overwrite=overwrite)

    @property
    def data_path(self) -> Path:
        """The file for weights."""
        return self.path.with_name(self.path.name + ".data")

    def write(self, program: ExportedProgram) -> None:
        """Write a program; the file appears whole, or not at all.

        Args:
            program: the program, from `infllm_pass.export`. Its graph is changed.

        Raises:
            ExportError: a part of the program has no ONNX form, or the file cannot be written.
            DtypeError: a site's dtype has none.
        """
        model = _translate(program, self.opset, self.input_names, self.output_names)
        with written_whole(self.path, self.data_path) as path:
            self._save(model, path)

    def _save(self, model: onnx_ir.Model, path: Path) -> None:
        import onnx
        import onnx_ir

        external = self.external_data
        if external is None:
            weights = (value.const_value for value in model.graph.initializers.values())
            external = sum(weight.nbytes for weight in weights if weight is not None) > LARGE_WEIGHTS
        onnx_ir.save(model, path, external_data=self.data_path.name if external else None)
        onnx.checker.check_model(str(path), full_check=True)


def _translate(
    program: ExportedProgram, opset: int, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> onnx_ir.Model:
    import onnxscript.optimizer

    fused_op.join_sites(program.graph)
    _check_dtypes(program)
    _write_nodes(program.graph)
    program, gained = without_state(program)
    input_names = _names(input_names, program.graph_signature.user_inputs)
    output_names = _names(output_names, [*program.graph_signature.user_outputs[: -len(gained) or None], *gained])
    try:
        exported = torch.onnx.export(
            program,
            (),
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"the model has no ONNX form: {error}") from error
    assert exported is not None
    # What torch would do beside this at opset 23 makes rotary tables that broadcast over the batch invalid.
    model: onnx_ir.Model = onnxscript.optimizer.optimize(exported.model)
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it names files of this machine
    _add_functions(model, opset)
    return model


def _names(given: Sequence[str] | None, own: Sequence[Any]) -> list[str]:
    """The names given, and their own for what these do not reach; a file has no constants as inputs or outputs."""
    names = [name for name in own if isinstance(name, str)]
    return [*(given or ()), *names[len(given or ()) :]]


def _check_dtypes(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        if node.target is fused_op.OPERATOR and node.meta["val"].dtype not in DTYPES:
            raise DtypeError(
                f"{node.name} computes in {node.meta['val'].dtype}: ONNX export takes "
                f"{' and '.join(map(str, DTYPES))}; cast the model first"
            )


def _write_nodes(graph: fx.Graph) -> None:
    """Replace each call of ``infllm::switchable_attention`` by what torch translates to a node of the operator."""
    for call in list(graph.nodes):
        if call.target is not fused_op.OPERATOR:
            continue
        given = FUSED.named(call)
        with graph.inserting_before(call):
            place = _offset(graph, given, call)
            node = AttentionNode.from_call(given, placed=place is not None)
            inputs = [{**given, "offset": place}.get(name) for name in node.inputs]
            with detect_fake_mode(call.meta["val"]), _Recorder() as recorder:
                torch.onnx.ops.symbolic(
                    f"{DOMAIN}::{NAME}",
                    [tensor.meta["val"] for tensor in inputs],
                    attrs=node.attributes,
                    dtype=call.meta["val"].dtype,
                    shape=call.meta["val"].shape,
                    version=VERSION,
                )
            # Parameters are asked for their device in calls of their own.
            target, args, kwargs = next(call for call in recorder.calls if call[0].namespace != "prim")
            sizes = [_size(graph, given["v" if dim == 3 else "q"], dim) for dim in range(4)]
            written = graph.call_function(target, (inputs, *args[1:]), {**kwargs, "shape": sizes})
        written.meta = dict(call.meta)
        call.replace_all_uses_with(written)
        graph.erase_node(call)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of operators that are made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _offset(graph: fx.Graph, given: Mapping[str, Any], call: fx.Node) -> fx.Node | None:
    """The key index of the first query as one int64 tensor, or None where it follows from the lengths."""
    offsets, offset = given["offsets"], given["offset"]
    if offsets is not None:
        offsets = _call(graph, aten.to.dtype, offsets, torch.int64)
        return offsets if offset is None else _call(graph, aten.add.Tensor, offsets, offset)
    if offset is None:
        return None
    place = offset.meta["val"] if isinstance(offset, fx.Node) else offset
    length_q, length_k = (given[name].meta["val"].shape[2] for name in ("q", "k"))
    if not statically_known_true(place == length_k - length_q):
        raise ExportError(
            f"the queries of {call.name} stand at the number {place} and are not known to be the last of the keys: "
            "give the offset as a tensor"
        )
    return None


def _size(graph: fx.Graph, tensor: fx.Node, dim: int) -> fx.Node | int:
    size = tensor.meta["val"].shape[dim]
    return size if isinstance(size, int) else _call(graph, aten.sym_size.int, tensor, dim)


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call, with the fake tensor or number that it gives as ``val``."""
    node = graph.call_function(target, args, kwargs)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    with detect_fake_mode(values) or nullcontext():
        node.meta["val"] = target(*values, **kwargs)
    return node


def _add_functions(model: onnx_ir.Model, opset: int) -> None:
    """Give the model the body of every node of the operator; nodes that differ get bodies of their own."""
    from .body import attention_function

    overloads: dict[AttentionNode, str] = {}
    count = -1
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) != (DOMAIN, NAME):
            continue
        count += 1
        described = AttentionNode.from_attributes({name: each.value for name, each in node.attributes.items()})
        if described not in overloads:
            overloads[described] = f"variant_{len(overloads)}" if overloads else ""
            function = attention_function(described, opset, overloads[described])
            model.functions[function.identifier()] = function
        node.overload = overloads[described]
        node.name = f"{NAME}_{count}"
