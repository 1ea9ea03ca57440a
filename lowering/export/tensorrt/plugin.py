"""TensorRT plugin (``IPluginV3``) for the ONNX operator ``infllm::InfLLMV2Attention``.

It serves TensorRT (``tensorrt``) and TensorRT for RTX (``tensorrt_rtx``), which share a Python API. Their ONNX parser
prefers a registered plugin with the node's name, version and namespace to the function's body.

The plugin runs this package's operator on TensorRT's stream and buffers. Deserializing an engine with it needs a
process with Python, torch and this package in which `register_plugin` was called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infllm_pass.errors import DeviceError, DtypeError
from infllm_pass.kernels.geometry import BlockGeometry

from ...ops.attention_args import AttentionCall
from ...ops.dispatch import attend
from ..onnx.op_spec import DOMAIN, NAME, VERSION, AttentionNode

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class DeviceMemory:
    """Contiguous memory on a CUDA device that somebody else owns.

    Attributes:
        pointer: its address.
        shape: the shape of the tensor in it.
        dtype: the tensor's type.
        device: number of the device.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        kinds = {
            torch.float32: "<f4",
            torch.float16: "<f2",
            torch.bfloat16: "<i2",  # the interface has no name for it
            torch.int32: "<i4",
            torch.int64: "<i8",
            torch.bool: "|b1",
        }
        return {"shape": self.shape, "typestr": kinds[self.dtype], "data": (self.pointer, False), "version": 2}

    def tensor(self) -> Tensor:
        """A tensor that reads and writes this memory.

        Raises:
            DeviceError: the memory is on another device.
        """
        tensor = torch.as_tensor(self, device=torch.device("cuda", self.device))
        if tensor.numel() and tensor.data_ptr() != self.pointer:  # a copy, which nobody would read
            raise DeviceError(f"TensorRT's memory is not on cuda:{self.device}: run an engine on the device it is for")
        return tensor.view(self.dtype) if tensor.dtype != self.dtype else tensor


def run_on_stream(node: AttentionNode, inputs: Sequence[DeviceMemory], output: DeviceMemory, stream: int) -> None:
    """Compute a node on a CUDA stream, without waiting for it.

    Args:
        node: what to compute.
        inputs: the node's inputs, in order.
        output: where the result goes, ``[B, Hq, Lq, Dv]``.
        stream: handle of the stream, on the output's device.
    """
    device = torch.device("cuda", output.device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.ExternalStream(stream, device)), torch.no_grad():
        named = {name: memory.tensor() for name, memory in zip(node.inputs, inputs, strict=True)}
        call = AttentionCall(
            node.scale,
            node.dense_len,
            node.geometry,
            key_mask=named.get("key_mask"),
            offsets=named.get("offset"),
            window=node.window or None,
            softcap=node.softcap,
            key_bias=named.get("key_bias"),
            sinks=named.get("sinks"),
        )
        out = attend(named["q"], named["k"], named["v"], call, select=named["k"].shape[2] >= node.dense_len)
        output.tensor().copy_(out)


def register_plugin(trt: ModuleType) -> None:
    """Make the plugin known to TensorRT, for parsing ONNX files and for loading engines.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
    """
    registry = trt.get_plugin_registry()
    if registry.get_creator(NAME, str(VERSION), DOMAIN) is None:
        registry.register_creator(plugin_creator(trt), DOMAIN)


def plugin_creator(trt: ModuleType) -> Any:
    """A creator of the plugin for one of TensorRT's modules, an ``IPluginCreatorV3One``."""
    torch_types = {
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.float32: torch.float32,
        trt.int32: torch.int32,
        trt.int64: torch.int64,
        trt.bool: torch.bool,
    }

    def memory(description: Any, pointer: int) -> DeviceMemory:
        # TensorRT runs an engine on the current device, which is the engine's.
        return DeviceMemory(
            pointer, tuple(description.dims), torch_types[description.type], torch.cuda.current_device()
        )

    class Plugin(  # type: ignore[misc, name-defined]
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        """The operator as TensorRT sees it: linear memory, no workspace, one output like q."""

        def __init__(self, node: AttentionNode) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.node = node
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, str(VERSION), DOMAIN
            self.num_outputs = 1

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.node)

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            shape = trt.DimsExprs(4)
            for dim in range(4):
                shape[dim] = inputs[2][3] if dim == 3 else inputs[0][dim]
            return [shape]

        def supports_format_combination(self, position: int, descriptions: Sequence[Any], inputs: int) -> bool:
            found, first = descriptions[position].desc, descriptions[0].desc.type
            name = self.node.inputs[position] if position < inputs else "out"
            if name == "key_mask":
                allowed = found.type == trt.bool
            elif name == "offset":
                allowed = found.type in (trt.int64, trt.int32)
            elif name in ("key_bias", "sinks"):
                allowed = found.type == trt.float32
            else:
                allowed = found.type == first and torch_types.get(first) in INPUT_DTYPES
            return bool(allowed and found.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return 0  # torch's caching allocator holds what the operator needs

        def get_fields_to_serialize(self) -> Any:
            return field_collection(trt, field_values(self.node))

        def set_tactic(self, tactic: int) -> None:
            pass

        def enqueue(
            self,
            input_descriptions: Sequence[Any],
            output_descriptions: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            given = [memory(*pair) for pair in zip(input_descriptions, inputs, strict=True)]
            run_on_stream(self.node, given, memory(output_descriptions[0], outputs[0]), stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        """Makes the plugin from a node's attributes, or from the fields that an engine holds."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, str(VERSION), DOMAIN
            example = AttentionNode(BlockGeometry(), scale=1.0, dense_len=0)
            self.field_names = field_collection(trt, field_values(example))

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            return Plugin(AttentionNode.from_attributes(_attributes(trt, collection)))

    return Creator()


def field_values(node: AttentionNode) -> dict[str, np.ndarray[Any, Any]]:
    """A node's attributes as arrays, from which TensorRT's fields read."""
    dtypes = {int: np.int32, float: np.float32}
    return {
        name: np.frombuffer(value.encode(), dtype=np.int8)
        if isinstance(value, str)
        else np.array([value], dtype=dtypes[type(value)])
        for name, value in node.attributes.items()
    }


def field_collection(trt: ModuleType, values: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """A ``PluginFieldCollection`` that reads from these arrays, which it keeps: fields of TensorRT hold addresses."""

    class Fields(trt.PluginFieldCollection):  # type: ignore[misc, name-defined]
        values: Mapping[str, np.ndarray[Any, Any]]

    kinds = {
        np.dtype(np.int8): trt.PluginFieldType.CHAR,
        np.dtype(np.int32): trt.PluginFieldType.INT32,
        np.dtype(np.float32): trt.PluginFieldType.FLOAT32,
    }
    fields = Fields([trt.PluginField(name, array, kinds[array.dtype]) for name, array in values.items()])
    fields.values = values
    return fields


def _attributes(trt: ModuleType, collection: Any) -> Mapping[str, Any]:
    """What fields say, by name."""
    attributes: dict[str, Any] = {}
    for field in collection:
        if field.type == trt.PluginFieldType.CHAR:
            attributes[field.name] = bytes(np.asarray(field.data).astype(np.uint8)).decode().rstrip("\0")
        elif field.type == trt.PluginFieldType.FLOAT32:
            attributes[field.name] = float(np.asarray(field.data).reshape(-1)[0])
        elif field.type in (trt.PluginFieldType.INT32, trt.PluginFieldType.INT64):
            attributes[field.name] = int(np.asarray(field.data).reshape(-1)[0])
        else:
            raise DtypeError(f"the attribute {field.name} has the type {field.type}: expected a number or a string")
    return attributes
