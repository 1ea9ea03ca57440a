"""What is registered with Torch-TensorRT and what its converters add, beside a stand-in for its registry.

Torch-TensorRT does not import without a GPU: that its own compiler takes the converters is not shown here.
"""

import importlib.util
import operator
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import fx

import infllm_pass
from infllm_pass.errors import MissingDependencyError
from infllm_pass.lowering.export import fused_op
from infllm_pass.lowering.export.onnx.op_spec import DOMAIN, NAME, AttentionNode
from infllm_pass.lowering.export.tensorrt.torch_tensorrt import is_convertible
from infllm_pass.lowering.ops.prefill_cpu import selection_arguments
from tests.support.common import SMALL

trt = pytest.importorskip("tensorrt_rtx")

CALL = (None, None, None, None, 0.3, 64, *selection_arguments(SMALL.geometry))
"""key_mask, offsets, offset, window, scale, dense_len and the geometry."""


@pytest.fixture
def registered(monkeypatch):
    """The converters that were registered, by operator: the decorator's options and the function."""
    registry = ModuleType("torch_tensorrt.dynamo.conversion._ConverterRegistry")
    registry.DYNAMO_ATEN_CONVERTERS = {}

    def dynamo_tensorrt_converter(key, *, capability_validator=None, supports_dynamic_shapes=False):
        def register(function):
            options = {"validator": capability_validator, "dynamic": supports_dynamic_shapes, "convert": function}
            registry.DYNAMO_ATEN_CONVERTERS.setdefault(key, []).append(SimpleNamespace(**options))
            return function

        return register

    registry.dynamo_tensorrt_converter = dynamo_tensorrt_converter
    utilities = ModuleType("torch_tensorrt.dynamo.conversion.converter_utils")
    utilities.get_trt_tensor = lambda context, value, name: (value, name)
    package = ModuleType("torch_tensorrt")
    package.__spec__ = SimpleNamespace()
    for name, module in (
        ("torch_tensorrt", package),
        ("torch_tensorrt.dynamo", ModuleType("torch_tensorrt.dynamo")),
        ("torch_tensorrt.dynamo.conversion", ModuleType("torch_tensorrt.dynamo.conversion")),
        (registry.__name__, registry),
        (utilities.__name__, utilities),
        ("tensorrt", trt),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    infllm_pass.register_torch_tensorrt()
    infllm_pass.register_torch_tensorrt()
    return registry.DYNAMO_ATEN_CONVERTERS


class Network:
    """Takes plugins as TensorRT's network does."""

    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        self.inputs, self.shape_inputs, self.plugin = inputs, shape_inputs, plugin
        self.layer = SimpleNamespace(name="", get_output=lambda number: ("output", number))
        return self.layer


def tiled_call(**changed):
    """The names and values of a call of ``infllm::tiled_attention``, of a causal site if nothing is changed."""
    schema = torch.ops.infllm.tiled_attention.default._schema.arguments
    given = dict.fromkeys((argument.name for argument in schema), None)
    names = [argument.name for argument in fused_op.OPERATOR._schema.arguments][3:]
    given.update(dict(zip(names, CALL, strict=True)), q="q", k="k", v="v", select=True)
    return {**given, **changed}


def test_each_operator_is_registered_once_for_dynamic_shapes(registered):
    targets = {str(target) for target in registered}
    assert "infllm.switchable_attention.default" in targets
    assert all(len(converters) == 1 for converters in registered.values())
    assert all(each.dynamic and each.validator is is_convertible for (each,) in registered.values())
    assert trt.get_plugin_registry().get_creator(NAME, "1", DOMAIN) is not None


def test_a_call_becomes_the_plugin_with_its_fields(registered):
    (converter,) = registered[fused_op.OPERATOR]
    network, context = Network(), SimpleNamespace()
    context.net = network
    args = ("q", "k", "v", "valid", "starts", None, 9, *CALL[4:])
    out = converter.convert(context, fused_op.OPERATOR, args, {}, "layer")
    assert out == ("output", 0)
    names = [f"layer_{name}" for name in ("q", "k", "v", "key_mask", "offset")]
    assert network.inputs == list(zip(("q", "k", "v", "valid", "starts"), names, strict=True))
    assert network.shape_inputs == []
    assert network.layer.name == f"{NAME}_layer"
    found = network.plugin.node
    assert found.scale == pytest.approx(0.3)
    expected = AttentionNode(SMALL.geometry, found.scale, 64, window=9, masked=True, placed=True)
    assert found == expected


def test_calls_of_the_triton_kernels(registered):
    pytest.importorskip("triton")
    target = torch.ops.infllm.tiled_attention.default
    (converter,) = registered[target]
    for select, dense_len in ((True, 64), (False, fused_op.ALWAYS_DENSE)):
        network = Network()
        args = tuple(tiled_call(select=select).values())
        assert converter.convert(SimpleNamespace(net=network), target, args, {}, "layer") == (("output", 0), None)
        assert network.plugin.node.dense_len == dense_len
        assert network.plugin.node.inputs == ("q", "k", "v")


@pytest.mark.parametrize(
    ("changed", "result", "taken"),
    [
        ({}, 0, True),
        ({"offsets": "starts"}, 0, True),
        ({}, 1, False),
        ({"offset": 5}, 0, False),
        ({"cu_seqlens_k": "bounds"}, 0, False),
    ],
)
def test_calls_that_the_plugin_does_not_compute_stay_in_pytorch(changed, result, taken):
    pytest.importorskip("infllm_pass.lowering.ops.prefill_triton")
    graph = fx.Graph()
    q = graph.placeholder("q")
    args = tuple(q if isinstance(value, str) and value == "q" else value for value in tiled_call(**changed).values())
    call = graph.call_function(torch.ops.infllm.tiled_attention.default, args)
    graph.output(graph.call_function(operator.getitem, (call, result)))
    assert is_convertible(call) == taken


def test_without_torch_tensorrt(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'infllm-pass\[torch-tensorrt\]'"):
        infllm_pass.register_torch_tensorrt()
