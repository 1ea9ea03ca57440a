"""Converters of Torch-TensorRT: calls of this package's operators become the plugin of `tensorrt`.

Torch-TensorRT asks its registry for a converter of each node's operator. Without these it would run the operators in
PyTorch, between engines.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import fx

from infllm_pass.errors import MissingDependencyError
from infllm_pass.kernels.geometry import BlockGeometry

from .. import fused_op
from ..onnx.op_spec import DOMAIN, NAME, VERSION, AttentionNode
from .plugin import field_collection, field_values, register_plugin


def register_converters() -> None:
    """Make the converters known to Torch-TensorRT; once is enough, and more do no harm.

    Raises:
        MissingDependencyError: ``torch_tensorrt`` is not installed.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise MissingDependencyError("torch-tensorrt", "torch-tensorrt", "converting for Torch-TensorRT")
    registry = importlib.import_module("torch_tensorrt.dynamo.conversion._ConverterRegistry")
    trt = importlib.import_module("tensorrt")  # Torch-TensorRT puts the one that it uses under this name
    register_plugin(trt)
    for target in targets():
        if target not in registry.DYNAMO_ATEN_CONVERTERS:
            register = registry.dynamo_tensorrt_converter(
                target, capability_validator=is_convertible, supports_dynamic_shapes=True
            )
            register(_converter(trt))


def targets() -> list[torch._ops.OpOverload]:
    """The operators with converters: of one result, and of the Triton kernels, where Triton is installed."""
    found = [fused_op.OPERATOR]
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("infllm_pass.lowering.ops.prefill_triton")
        found.append(torch.ops.infllm.tiled_attention.default)
    return found


def is_convertible(call: fx.Node, settings: Any = None) -> bool:
    """Whether the plugin computes what a call does: no packed sequences, no number as offset, no log-sum-exp read."""
    given = _by_name(call.target, call.args)
    if any(given.get(name) is not None for name in ("cu_seqlens_q", "cu_seqlens_k", "offset")):
        return False
    return call.target is fused_op.OPERATOR or all(
        user.target is operator.getitem and user.args[1] == 0 for user in call.users
    )


def attention_node(given: Mapping[str, Any]) -> AttentionNode:
    """The plugin's node for the arguments of a call, by name."""
    return AttentionNode(
        BlockGeometry(**{field.name: given[field.name] for field in fields(BlockGeometry)}),
        scale=given["scale"],
        dense_len=given["dense_len"] if given.get("select", True) else fused_op.ALWAYS_DENSE,
        window=given["window"] or 0,
        masked=given["key_mask"] is not None,
        placed=given["offsets"] is not None,
    )


def _converter(trt: ModuleType) -> Any:
    utilities = importlib.import_module("torch_tensorrt.dynamo.conversion.converter_utils")

    def convert(context: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
        given = {**_by_name(target, args), **kwargs}
        node = attention_node(given)
        tensors = {**given, "offset": given["offsets"]}
        inputs = [utilities.get_trt_tensor(context, tensors[each], f"{name}_{each}") for each in node.inputs]
        values = field_values(node)  # what the fields read from
        creator = trt.get_plugin_registry().get_creator(NAME, str(VERSION), DOMAIN)
        plugin = creator.create_plugin(name, field_collection(trt, values), trt.TensorRTPhase.BUILD)
        layer = context.net.add_plugin_v3(inputs, [], plugin)
        layer.name = f"{NAME}_{name}"
        out = layer.get_output(0)
        return out if target is fused_op.OPERATOR else (out, None)

    return convert


def _by_name(target: Any, args: Sequence[Any]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in target._schema.arguments), args, strict=False))
