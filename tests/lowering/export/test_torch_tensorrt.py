"""What is registered with Torch-TensorRT and what its converters add, beside a stand-in for its registry.

Torch-TensorRT does not import without a GPU: that its own compiler takes the converters is not shown here.
"""

import importlib.util
import operator
import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch import fx

import infllm_pass
from infllm_pass.errors import MissingDependencyError
from infllm_pass.lowering.export import fused_op
from infllm_pass.lowering.export.onnx.op_spec import DOMAIN, NAME, AttentionNode
from infllm_pass.lowering.export.tensorrt.torch_tensorrt import is_convertible, join
from infllm_pass.lowering.ops.attention_args import FUSED, AttentionCall, geometry_text
from infllm_pass.lowering.ops.prefill import block_attention, compress_keys, select_blocks
from tests.support.common import SMALL

trt = pytest.importorskip("tensorrt_rtx")

CALL = {"scale": 0.3, "dense_len": 64, "geometry": geometry_text(SMALL.geometry)}
"""Arguments of a call beside q, k and v."""


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
    passes = ModuleType("torch_tensorrt.dynamo.lowering.passes")
    passes.added = []
    passes._aten_lowering_pass = passes.added.append
    package = ModuleType("torch_tensorrt")
    package.__spec__ = SimpleNamespace()
    for name, module in (
        ("torch_tensorrt", package),
        ("torch_tensorrt.dynamo", ModuleType("torch_tensorrt.dynamo")),
        ("torch_tensorrt.dynamo.conversion", ModuleType("torch_tensorrt.dynamo.conversion")),
        (passes.__name__, passes),
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


def test_each_operator_is_registered_once_for_dynamic_shapes(registered):
    targets = {str(target) for target in registered}
    assert "infllm.switchable_attention.default" in targets
    assert all(len(converters) == 1 for converters in registered.values())
    assert all(each.dynamic and each.validator is is_convertible for (each,) in registered.values())
    assert sys.modules["torch_tensorrt.dynamo.lowering.passes"].added == [join]
    assert trt.get_plugin_registry().get_creator(NAME, "1", DOMAIN) is not None


def test_a_call_becomes_the_plugin_with_its_fields(registered):
    (converter,) = registered[fused_op.OPERATOR]
    network, context = Network(), SimpleNamespace()
    context.net = network
    args = ("q", "k", "v", *FUSED.rest({**CALL, "key_mask": "valid", "offsets": "starts", "window": 9}))
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


def test_score_terms_become_inputs_and_fields_of_the_plugin(registered):
    (converter,) = registered[fused_op.OPERATOR]
    network, context = Network(), SimpleNamespace()
    context.net = network
    args = ("q", "k", "v", *FUSED.rest({**CALL, "key_bias": "bias", "sinks": "logits", "softcap": 30.0}))
    converter.convert(context, fused_op.OPERATOR, args, {}, "layer")
    assert [value for value, _ in network.inputs] == ["q", "k", "v", "bias", "logits"]
    found = network.plugin.node
    expected = AttentionNode(SMALL.geometry, found.scale, 64, softcap=30.0, biased=True, sunk=True)
    assert found == expected


def site(result=0, select=True, **place):
    """A graph with the operators of a site, of which one result is read, and the node that reads it."""
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    tensors = {name: graph.placeholder(name) if value == "tensor" else value for name, value in place.items()}
    call = AttentionCall(**{"scale": 0.3, "dense_len": 64, "geometry": SMALL.geometry} | tensors).arguments
    selection = []
    if select:
        compressed = graph.call_function(compress_keys.default, (q, k, *call))
        state = [graph.call_function(operator.getitem, (compressed, number)) for number in range(2)]
        selected = graph.call_function(select_blocks.default, (q, k, state, *call))
        selection = [graph.call_function(operator.getitem, (selected, 0))]
    attention = graph.call_function(block_attention.default, (q, k, v, selection, *call))
    graph.output(graph.call_function(operator.getitem, (attention, result)))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize("select", [True, False])
def test_a_site_becomes_one_call(select):
    module = join(site(select=select, offsets="tensor"))
    (call,) = (node for node in module.graph.nodes if node.op == "call_function")
    assert call.target is fused_op.OPERATOR
    assert is_convertible(call)
    found = FUSED.named(call)
    assert [str(found[name]) for name in ("q", "k", "v", "key_mask", "offsets")] == ["q", "k", "v", "None", "offsets"]
    assert found["dense_len"] == (64 if select else fused_op.ALWAYS_DENSE)


@pytest.mark.parametrize(("changed", "result"), [({}, 1), ({"cu_seqlens_k": "tensor"}, 0)])
def test_calls_that_the_plugin_does_not_compute_stay_in_pytorch(changed, result):
    module = site(result, **changed)
    before = str(module.graph)
    assert str(join(module).graph) == before


def test_numbers_as_offsets_stay_in_pytorch():
    (call,) = (node for node in join(site(offset=5)).graph.nodes if node.op == "call_function")
    assert not is_convertible(call)


def test_without_torch_tensorrt(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'infllm-pass\[torch-tensorrt\]'"):
        infllm_pass.register_torch_tensorrt()
