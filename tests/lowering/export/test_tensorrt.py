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
from infllm_pass.errors import DeviceError, ExportError, MissingDependencyError
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.export.onnx.op_spec import DOMAIN, NAME, AttentionNode
from tests.support import ROOT
from tests.support.common import SMALL, llama, tokens

trt = pytest.importorskip("tensorrt_rtx")

from infllm_pass.lowering.export.tensorrt import plugin as lowering  # noqa: E402

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


def parsed(file, environment):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tensorrt_bodies", str(file)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PROFILE = {"ids": ((1, 2), (1, 200), (4, 1024))}


def test_an_engine_with_the_plugin(file, tmp_path):
    path = tmp_path / "llama.engine"
    report = infllm_pass.export_tensorrt(file, path, PROFILE)
    assert (report.package, len(report.plugins), report.bodies) == ("tensorrt_rtx", 2, 0)
    assert all(name.startswith(NAME) for name in report.plugins)
    assert report.inputs == {"ids": (-1, -1)}
    assert [each.name for each in tmp_path.iterdir()] == ["llama.engine"]
    engine = path.read_bytes()
    assert len(engine) == report.size
    assert engine.count(NAME.encode()) >= 2
    assert str(report).count(f": {NAME}") == 2
    with pytest.raises(ExportError, match="exists"):
        infllm_pass.export_tensorrt(file, path, PROFILE)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, r"'ids' has dynamic sizes \(-1, -1\): give its least"),
        ({"tokens": PROFILE["ids"]}, "the profile names 'tokens': the file's inputs are ids"),
    ],
)
def test_profiles_that_do_not_fit(file, tmp_path, profile, message):
    with pytest.raises(ExportError, match=message):
        infllm_pass.export_tensorrt(file, tmp_path / "llama.engine", profile)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_parsed(tmp_path):
    with pytest.raises(ExportError, match="is no file"):
        infllm_pass.export_tensorrt(tmp_path / "none.onnx", tmp_path / "none.engine")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot parse"):
        infllm_pass.export_tensorrt(tmp_path / "bad.onnx", tmp_path / "bad.engine")
    assert [each.name for each in tmp_path.iterdir()] == ["bad.onnx"]


def test_without_tensorrt(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("tensorrt") else found(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'infllm-pass\[tensorrt\]'"):
        infllm_pass.export_tensorrt("model.onnx", tmp_path / "model.engine")


def test_a_build_shows_how_far_it_is():
    from rich.progress import Progress

    from infllm_pass.lowering.export.tensorrt.engine import progress_monitor

    progress = Progress()
    monitor = progress_monitor(trt, progress)
    monitor.phase_start("building", None, 4)
    assert monitor.step_complete("building", 1)
    assert [(task.description, task.completed, task.total) for task in progress.tasks] == [("building", 2, 4)]
    monitor.phase_finish("building")
    assert not progress.tasks


def test_the_parser_imports_the_body_where_no_plugin_is_registered(file, environment):
    seen = parsed(file, environment)
    assert seen["parsed"], seen["errors"]
    assert not seen["plugins"]
    assert seen["loops"] == 4  # one over chunks of queries and one over their keys, in each layer


def test_memory_on_a_device_says_what_it_is():
    memory = lowering.DeviceMemory(1 << 20, (2, 3), torch.bfloat16, 0)
    assert memory.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<i2",
        "data": (1 << 20, False),
        "version": 2,
    }


def test_a_node_runs_on_the_device_of_its_memory(monkeypatch):
    """Which need not be the current one; memory of another device is not copied."""
    entered, asked = [], []

    class Entered:
        def __init__(self, *where):
            self.where = where

        def __enter__(self):
            entered.append(self.where)

        def __exit__(self, *_):
            pass

    def as_tensor(memory, device):
        asked.append(device)
        return tensors[memory.pointer]

    q, k, v = (torch.randn(1, heads, 90, 16) for heads in (4, 2, 2))
    out = torch.empty_like(q)
    tensors = {x.data_ptr(): x for x in (q, k, v, out)}
    memory = [lowering.DeviceMemory(x.data_ptr(), tuple(x.shape), x.dtype, 1) for x in (q, k, v, out)]
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *where: where)
    node = AttentionNode(SMALL.geometry, scale=0.25, dense_len=SMALL.dense_len)
    lowering.run_on_stream(node, memory[:3], memory[3], 77)
    device = torch.device("cuda", 1)
    assert asked == [device] * 4
    assert entered == [(device,), ((77, device),)]
    assert torch.equal(out, infllm_pass.switchable_attention(q, k, v, SMALL))
    tensors[q.data_ptr()] = q.clone()
    with pytest.raises(DeviceError, match="TensorRT's memory is not on cuda:1"):
        lowering.run_on_stream(node, memory[:3], memory[3], 77)


def test_the_plugin_takes_the_current_device(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(lowering, "run_on_stream", lambda *call: seen.append(call))
    creator = lowering.plugin_creator(trt)
    values = lowering.field_collection(trt, lowering.field_values(NODE))
    plugin = creator.create_plugin("site", values, trt.TensorRTPhase.RUNTIME)
    descriptions = [trt.PluginTensorDesc() for _ in range(5)]
    for description in descriptions:
        description.type, description.dims = trt.float32, (1, 2, 3, 4)
    plugin.enqueue(descriptions[:4], descriptions[4:], [1, 2, 3, 4], [5], 0, 77)
    ((node, inputs, output, stream),) = seen
    assert (node, stream) == (plugin.node, 77)
    assert [memory.device for memory in (*inputs, output)] == [3] * 5
