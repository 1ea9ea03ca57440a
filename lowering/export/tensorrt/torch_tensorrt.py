"""Torch-TensorRT lowering pass and converter for the plugin in `plugin`.

The pass fuses the operators of a site, and the converter adds the plugin for the fused operator. Without them
Torch-TensorRT splits the graph at these operators and runs them in PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import fx

from infllm_pass.compat.torch_tensorrt import add_lowering_pass, converter_registry
from infllm_pass.errors import MissingDependencyError

from ...ops.attention_args import FUSED
from .. import fused_op
from ..onnx.op_spec import DOMAIN, NAME, VERSION, AttentionNode
from .plugin import field_collection, field_values, register_plugin


def register_converters() -> None:
    """Make the pass and the converter known to Torch-TensorRT; once is enough, and more do no harm.

    Raises:
        MissingDependencyError: ``torch_tensorrt`` is not installed.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise MissingDependencyError("torch-tensorrt", "torch-tensorrt", "converting for Torch-TensorRT")
    registry = converter_registry()
    trt = importlib.import_module("tensorrt")  # Torch-TensorRT puts the one that it uses under this name
    register_plugin(trt)
    if fused_op.OPERATOR in registry.DYNAMO_ATEN_CONVERTERS:
        return
    add_lowering_pass(join)
    register = registry.dynamo_tensorrt_converter(
        fused_op.OPERATOR, capability_validator=is_convertible, supports_dynamic_shapes=True
    )
    register(_converter(trt))


def join(module: fx.GraphModule, _: Any = None) -> fx.GraphModule:
    """Lowering pass: make one operator of compression, selection and attention, where they have such a form.

    Packed sequences, and calls whose log-sum-exp is read, stay as they are.
    """
    fused_op.join_sites(module.graph, lambda node: fused_op.why_not_joined(node) is None)
    module.recompile()
    return module


def is_convertible(call: fx.Node, settings: Any = None) -> bool:
    """Whether the plugin computes what a call does: no number as offset."""
    return FUSED.named(call)["offset"] is None


def _converter(trt: ModuleType) -> Any:
    utilities = importlib.import_module("torch_tensorrt.dynamo.conversion.converter_utils")

    def convert(context: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
        given = dict(zip(FUSED.names, FUSED.positional(args, dict(kwargs)), strict=True))
        node = AttentionNode.from_call(given, placed=given["offsets"] is not None)
        tensors = {**given, "offset": given["offsets"]}
        inputs = [utilities.get_trt_tensor(context, tensors[each], f"{name}_{each}") for each in node.inputs]
        creator = trt.get_plugin_registry().get_creator(NAME, str(VERSION), DOMAIN)
        plugin = creator.create_plugin(name, field_collection(trt, field_values(node)), trt.TensorRTPhase.BUILD)
        layer = context.net.add_plugin_v3(inputs, [], plugin)
        layer.name = f"{NAME}_{name}"
        return layer.get_output(0)

    return convert
