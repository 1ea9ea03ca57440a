"""The TensorRT plugin: as an object, in the parser and in an engine. Running it takes a GPU: see test_gpu_tensorrt."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import infllm_pass
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.node import DOMAIN, NAME, AttentionNode

from .conftest import SMALL, llama, tokens

trt = pytest.importorskip("tensorrt_rtx")

from infllm_pass.lowering import tensorrt as lowering  # noqa: E402

NODE = AttentionNode(
    BlockGeometry(lse="exact", query_block=4, selected_blocks=40), scale=0.3, dense_len=77, window=9, placed=True
)


def described(dtype, layout=None):
    description = trt.DynamicPluginTensorDesc()
    description.desc.type = dtype
    description.desc.format = trt.TensorFormat.LINEAR if layout is None else layout
    return description


def test_a_plugin_comes_back_from_its_fields():
    creator = lowering.plugin_creator(trt)
    assert (creator.name, creator.plugin_namespace, creator.plugin_version) == (NAME, DOMAIN, "1")
    values = lowering.field_values(NODE)
    plugin = creator.create_plugin("site", lowering.field_collection(trt, values), trt.TensorRTPhase.BUILD)
    assert plugin.node.geometry == NODE.geometry
    again = creator.create_plugin("site", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert again.node == plugin.node == plugin.clone().node
    assert abs(again.node.scale - 0.3) < 1e-7
    assert again.node.inputs == ("q", "k", "v", "offset")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_formats(dtype):
    values = lowering.field_values(NODE)
    creator = lowering.plugin_creator(trt)
    plugin = creator.create_plugin("site", lowering.field_collection(trt, values), trt.TensorRTPhase.BUILD)
    kind = getattr(trt, dtype)
    call = [described(kind), described(kind), described(kind), described(trt.int64), described(kind)]
    assert all(plugin.supports_format_combination(place, call, 4) for place in range(5))
    other = trt.float32 if dtype != "float32" else trt.float16
    for place, wrong in ((1, other), (2, other), (3, trt.bool), (3, kind), (4, other), (0, trt.int32)):
        changed = [*call[:place], described(wrong), *call[place + 1 :]]
        assert not plugin.supports_format_combination(place, changed, 4)
    packed = [described(kind, trt.TensorFormat.CHW4), *call[1:]]
    assert not plugin.supports_format_combination(0, packed, 4)
    assert plugin.get_output_data_types([kind, kind, kind, trt.int64]) == [kind]
    assert plugin.get_workspace_size([], []) == 0


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("tensorrt") / "llama.onnx"
    shapes = {"ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    infllm_pass.export_onnx(Logits(llama().float()), path, (tokens(50, 2),), dynamic_shapes=shapes, config=SMALL)
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which the parser finds its library under the name without a version."""
    (place,) = importlib.util.find_spec("tensorrt_rtx_libs").submodule_search_locations
    folder = tmp_path_factory.mktemp("libraries")
    (library,) = Path(place).glob("libtensorrt_rtx.so*")
    (folder / "libtensorrt_rtx.so").symlink_to(library)
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def build(file, how, environment):
    done = subprocess.run(
        [sys.executable, "-m", "tests.tensorrt_build", str(file), how],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_parser_takes_the_plugin_and_an_engine_is_built(file, environment):
    seen = build(file, "plugin", environment)
    assert seen["parsed"], seen["errors"]
    assert len(seen["plugins"]) == 2
    assert seen["loops"] == 0
    assert seen["dynamic"] == [[-1, -1]]
    assert seen["named_in_engine"] >= 2


def test_the_parser_imports_the_body_where_no_plugin_is_registered(file, environment):
    seen = build(file, "body", environment)
    assert seen["parsed"], seen["errors"]
    assert not seen["plugins"]
    assert seen["loops"] == 4  # one over chunks of queries and one over their keys, in each layer


def test_memory_on_a_device_says_what_it_is():
    memory = lowering.DeviceMemory(1 << 20, (2, 3), torch.bfloat16)
    assert memory.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<i2",
        "data": (1 << 20, False),
        "version": 2,
    }
