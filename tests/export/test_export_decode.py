"""Decoding out of Python: one exported program or file for the prompt and all steps, over a static cache."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import OutputKind

import infllm_pass
from infllm_pass.errors import ExportError
from infllm_pass.lowering.export.functionalize import without_state
from infllm_pass.lowering.export.onnx.op_spec import NAME
from infllm_pass.tools import checkpoint
from tests.support import ROOT
from tests.support.common import SMALL, TOKENS, llama, relative_error, tokens
from tests.tools.test_checkpoint import first_layers

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CAPACITY = 160
STEPS = 64


@pytest.fixture(scope="module")
def example():
    """The module ``examples/export_decode.py``."""
    path = ROOT / "examples" / "export_decode.py"
    spec = importlib.util.spec_from_file_location("export_decode", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step(example):
    return example.Step(llama(weights=3.0).float())


@pytest.fixture(scope="module", params=[SMALL, TOKENS], ids=["pooled", "tokens"])
def sparse(request):
    return request.param


@pytest.fixture(scope="module")
def program(example, step, sparse):
    config = step.model.config
    arguments = (tokens(5, 2), *example.empty_cache(config, 2, CAPACITY))
    return infllm_pass.export(step, arguments, dynamic_shapes=example.dynamic_shapes(config), config=sparse)


def test_one_file_decodes_as_pytorch_does_across_dense_len(example, step, program, sparse, tmp_path):
    path, config = tmp_path / "step.onnx", step.model.config
    infllm_pass.export_onnx(program, path)
    found = [node for node in onnx.load(path).graph.node if node.op_type == NAME]
    assert [len(node.input) for node in found] == [4, 4]  # q, k, v and the offset
    session = example.Session(path)
    names = [each.name for each in session.session.get_inputs()]
    assert names == ["ids", "keys_0", "keys_1", "values_0", "values_1", "length"]
    sparsified = infllm_pass.sparsify(torch.compile(step, backend="eager", dynamic=True), sparse)
    prompt = tokens(40, 3)
    ways = (session, program.module(), sparsified, step)
    exported, in_torch, expected, dense = (example.generate(way, prompt, config, STEPS, CAPACITY) for way in ways)
    assert torch.equal(exported, expected)
    assert torch.equal(in_torch, expected)
    assert torch.equal(dense[:, :20], expected[:, :20])
    assert not torch.equal(dense, expected)


def test_a_package_decodes_as_pytorch_does_across_dense_len(example, step, program, tmp_path):
    config = step.model.config
    infllm_pass.package(program, (), tmp_path / "step.pt2")
    loaded = infllm_pass.load_package(tmp_path / "step.pt2")
    cache = expected = example.empty_cache(config, 2, CAPACITY)
    for count in (50, 1, 30, 1):
        ids = tokens(count, 2)
        with torch.no_grad():
            (logits, *cache), (right, *expected) = loaded(ids, *cache), program.module()(ids, *expected)
        assert relative_error(logits, right) <= 1e-4
        assert torch.equal(cache[2], expected[2])


def test_a_saved_program_computes_the_same(example, step, program, tmp_path):
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    inputs = (tokens(100, 2), *example.empty_cache(step.model.config, 2, CAPACITY))
    with torch.no_grad():
        outputs = [torch.utils._pytree.tree_leaves(each.module()(*inputs)) for each in (loaded, program)]
    assert len(outputs[0]) == len(outputs[1]) > 1
    assert all(map(torch.equal, *outputs))


@pytest.fixture(scope="module")
def stateful():
    """A Llama that transformers exported: its static cache is buffers, which the program writes to."""
    from transformers.integrations.executorch import convert_and_export_with_cache

    model = llama().float()
    model.generation_config.update(use_cache=True, cache_implementation="static")
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": CAPACITY}
    shapes = {"input_ids": {1: Dim.DYNAMIC}, "cache_position": {0: Dim.DYNAMIC}}
    ids = tokens(5)
    return model, convert_and_export_with_cache(model, ids, torch.arange(5), dynamic_shapes=shapes)


def test_the_static_cache_of_transformers(example, stateful, tmp_path):
    model, program = stateful
    exported = infllm_pass.export(program, config=SMALL)
    in_torch = exported.module()
    path = tmp_path / "llama.onnx"
    infllm_pass.export_onnx(exported, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs, outputs = ([each.name for each in group] for group in (session.get_inputs(), session.get_outputs()))
    state = [name for name in inputs if name not in ("input_ids", "cache_position")]
    assert sorted(f"{name}_out" for name in state) == sorted(outputs[1:])
    assert {"key_cache_0", "value_cache_1", "cumulative_length_1"} <= set(state)

    step = example.Step(model)
    sparsified = infllm_pass.sparsify(torch.compile(step, backend="eager", dynamic=True), SMALL)
    prompt = tokens(40)
    expected = example.generate(sparsified, prompt, model.config, STEPS, CAPACITY)
    kinds = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}
    held = {
        each.name: torch.zeros(each.shape, dtype=kinds[each.type]).numpy()
        for each in session.get_inputs()
        if each.name in state
    }
    ids, first = prompt, 0
    for place in range(STEPS):
        position = torch.arange(first, first + ids.shape[1])
        given = {"input_ids": ids.numpy(), "cache_position": position.numpy(), **held}
        ran = dict(zip(outputs, session.run(None, given), strict=True))
        held = {name: ran[f"{name}_out"] for name in state}
        with torch.no_grad():
            logits = in_torch(input_ids=ids, cache_position=position)
        assert relative_error(torch.from_numpy(ran[outputs[0]]), logits) <= 1e-4
        first, ids = first + ids.shape[1], logits[:, -1:].argmax(-1)
        assert int(ids) == int(expected[0, place])


def test_a_cache_that_is_held_twice_is_refused(stateful):
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    module = TorchExportableModuleWithStaticCache(stateful[0])
    given = {"input_ids": tokens(5), "cache_position": torch.arange(5)}
    with pytest.raises(ExportError, match=r"share.*strict=True"):
        infllm_pass.export(module, (), given, config=SMALL)


class Written(nn.Module):
    """Writes to an input and to a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x, seen):
        seen.add_(1)
        self.total.add_(x)
        return x * 2 + self.total


def test_programs_become_functions_of_their_state():
    program = torch.export.export(Written(), (torch.ones(3), torch.zeros(2))).run_decompositions({})
    function, gained = without_state(program)
    assert gained == [f"{name}_out" for name in ("total", "seen")]
    assert {spec.kind for spec in function.graph_signature.output_specs} == {OutputKind.USER_OUTPUT}
    assert function.graph_signature.user_inputs == ("x", "seen", "total")
    out, total, seen = function.module()(torch.ones(3), torch.tensor([4.0, 5.0]), torch.full((3,), 2.0))
    assert (out.tolist(), total.tolist(), seen.tolist()) == ([5.0] * 3, [3.0] * 3, [5.0, 6.0])


@pytest.mark.checkpoint
def test_the_example_on_the_public_checkpoint(example, capsys, monkeypatch, whole_smollm2, smollm2_tokenizer):
    """A prompt of 480 tokens and 64 more, past a `dense_len` of 512."""
    monkeypatch.setattr(checkpoint, "load_model", lambda: first_layers(whole_smollm2, 1))
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda: smollm2_tokenizer)
    example.main(1)
    printed = capsys.readouterr().out
    assert "1 attention site(s), 1 switchable" in printed
    assert "64 of 64 tokens as in PyTorch" in printed
