"""Whole models as ONNX files, run by ONNX Runtime, against the same models in PyTorch."""

import importlib.util
from collections import Counter

import pytest
import torch
from torch import nn
from torch.export import Dim

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import (
    DtypeError,
    ExportError,
    MissingDependencyError,
    NoAttentionSiteError,
    UnsupportedModelError,
)
from infllm_pass.tools.checkpoint import corpus
from tests.support.common import SMALL, TOKENS, llama, relative_error, tokens
from tests.tools.test_checkpoint import first_layers

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from infllm_pass.lowering.export.onnx import exporter as lowering  # noqa: E402
from infllm_pass.lowering.export.onnx.op_spec import DOMAIN, NAME  # noqa: E402

DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
"""Batches and lengths of any size. Torch 2.11 fails to prove a named range of lengths from a model's strides."""


class Logits(nn.Module):
    """A language model as a function of token ids, and of a padding mask if it is given one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, padding=None):
        return self.model(input_ids=ids, attention_mask=padding, use_cache=False).logits


def runtime(path):
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def run(session, *inputs):
    names = [each.name for each in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def nodes(path):
    return [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == NAME]


@pytest.fixture(scope="module")
def small_llama():
    return Logits(llama(weights=3.0).float())


@pytest.fixture(scope="module")
def program(small_llama):
    """The same model, exported by torch, for batches and lengths of any size."""
    with torch.no_grad():
        return torch.export.export(small_llama, (tokens(50, 2),), dynamic_shapes={"ids": DYNAMIC})


@pytest.mark.parametrize(("config", "opset"), [(SMALL, 18), (SMALL, 23), (TOKENS, 18)], ids=["18", "23", "tokens"])
def test_llama_with_dynamic_batch_and_length(small_llama, program, tmp_path, config, opset):
    path = tmp_path / "llama.onnx"
    report = infllm_pass.export_onnx(program, path, config=config, opset=opset, input_names=["ids"])
    assert report.switchable == len(report.sites) == 2
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds[NAME] == 2
    assert not kinds.keys() & {"If", "Loop", "Softmax", "Where", "Trilu", "LessOrEqual"}  # no mask is left
    assert [(function.domain, function.name) for function in model.functions] == [(DOMAIN, NAME)]
    assert {imported.domain: imported.version for imported in model.opset_import} == {"": opset, DOMAIN: 1}
    assert len(list(tmp_path.iterdir())) == 1

    session = runtime(path)
    sparsified = infllm_pass.sparsify(torch.compile(small_llama, backend="eager"), config)
    for length, batch, sparse in ((20, 1, False), (63, 3, False), (64, 2, True), (201, 1, True)):
        ids = tokens(length, batch)
        with torch.no_grad():
            got, expected, dense = run(session, ids), sparsified(ids), small_llama(ids)
        assert relative_error(got, expected) <= 1e-4
        assert (relative_error(got, dense) > 1e-2) == sparse


def test_padding_becomes_a_key_mask(small_llama, tmp_path):
    path = tmp_path / "llama.onnx"
    padding = torch.ones(3, 50, dtype=torch.int64)
    infllm_pass.export_onnx(
        small_llama,
        path,
        (tokens(50, 3), padding),
        dynamic_shapes={"ids": DYNAMIC, "padding": DYNAMIC},
        config=SMALL,
    )
    assert [len(node.input) for node in nodes(path)] == [4, 4]
    session = runtime(path)
    sparsified = infllm_pass.sparsify(torch.compile(small_llama, backend="eager", dynamic=True), SMALL)
    for length in (40, 130):
        padding = torch.ones(3, length, dtype=torch.int64)
        padding[0, :17] = 0
        padding[1, :90] = 0  # shorter than dense_len, whatever the others are
        ids = tokens(length, 3)
        got = run(session, ids, padding)
        assert torch.isfinite(got).all()
        for row in range(3):
            valid = padding[row].bool()
            if valid.any():  # rotary positions are relative, so that a row alone gives what it gives padded
                with torch.no_grad():
                    expected = sparsified(ids[row : row + 1, valid])
                assert relative_error(got[row, valid], expected[0]) <= 1e-4


class Layers(nn.Module):
    """Attention that the model asks for itself, with a window in one layer and offsets from a tensor in the other."""

    def forward(self, q, k, v, start):
        first = infllm_pass.switchable_attention(q, k, v, SMALL, window=30)
        return first + infllm_pass.switchable_attention(q, k, v, SMALL, offset=start, scale=0.5)


def test_sites_that_differ_have_bodies_of_their_own(tmp_path):
    path = tmp_path / "layers.onnx"
    q, k, v = (torch.randn(2, heads, 70, 8) for heads in (6, 2, 2))
    start = torch.tensor([0, 0])
    sizes = {2: Dim("length", min=2, max=512)}
    shapes = {"q": sizes, "k": sizes, "v": sizes, "start": {}}
    infllm_pass.export_onnx(Layers(), path, (q, k, v, start), dynamic_shapes=shapes)
    assert len({node.overload for node in nodes(path)}) == len(onnx.load(path).functions) == 2
    session = runtime(path)
    for length, offsets in ((33, [0, 0]), (150, [0, -40])):
        q, k, v = (torch.randn(2, heads, length, 8) for heads in (6, 2, 2))
        start = torch.tensor(offsets)
        assert relative_error(run(session, q, k, v, start), Layers()(q, k, v, start)) <= 1e-5


def test_half_precision(tmp_path):
    path = tmp_path / "half.onnx"
    model, ids = Logits(llama().half()), tokens(150)
    infllm_pass.export_onnx(model, path, (ids,), config=SMALL)
    exact = infllm_pass.export(Logits(llama()), (ids,), config=SMALL).module()
    plain = infllm_pass.export(model, (ids,), config=SMALL).module()
    with torch.no_grad():
        expected = exact(ids)
        allowed = 2 * relative_error(plain(ids), expected)
    assert relative_error(run(runtime(path), ids), expected) <= allowed


def test_a_program_runs_in_pytorch_and_switches(small_llama, program):
    exported = infllm_pass.export(program, config=SMALL)
    targets = Counter(str(node.target) for node in exported.graph.nodes)
    assert targets["infllm.block_attention.default"] == targets["infllm.select_blocks.default"] == 2
    assert not [target for target in targets if "scaled_dot_product" in target]
    sparsified = infllm_pass.sparsify(torch.compile(small_llama, backend="eager"), SMALL)
    for length in (30, 63, 64, 140):
        ids = tokens(length)
        with torch.no_grad():
            assert relative_error(exported.module()(ids), sparsified(ids)) <= 1e-5


class Plain(nn.Module):
    """One call of causal attention, whose result is the output itself."""

    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_an_exported_program_is_left_as_it_is(tmp_path):
    q = torch.randn(1, 2, 90, 8)
    program = torch.export.export(Plain(), (q,))
    before = str(program.graph)
    again = infllm_pass.export(program, config=SMALL)
    infllm_pass.export_onnx(program, tmp_path / "plain.onnx", config=SMALL)
    assert str(program.graph) == before
    assert torch.equal(program.module()(q), Plain()(q))
    expected = infllm_pass.switchable_attention(q, q, q, SMALL)
    assert torch.equal(again.module()(q), expected)
    assert relative_error(run(runtime(tmp_path / "plain.onnx"), q), expected) <= 1e-5


def test_filtered_sites_stay_dense(small_llama, tmp_path):
    path = tmp_path / "llama.onnx"
    report = infllm_pass.export_onnx(
        small_llama, path, (tokens(80),), config=SMALL, filter_fn=lambda site: "layers.0" in site.module_path
    )
    assert [site.decision for site in report.sites] == ["switchable", "dense"]
    assert len(nodes(path)) == 1


def test_weights_beside_the_model(small_llama, tmp_path):
    path = tmp_path / "llama.onnx"
    infllm_pass.export_onnx(small_llama, path, (tokens(80),), config=SMALL, external_data=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama.onnx", "llama.onnx.data"]
    weights = sum(parameter.nbytes for parameter in small_llama.parameters())
    assert (tmp_path / "llama.onnx.data").stat().st_size >= weights * 0.9
    ids = tokens(80)
    with torch.no_grad():
        expected = infllm_pass.export(small_llama, (ids,), config=SMALL).module()(ids)
    assert relative_error(run(runtime(path), ids), expected) <= 1e-4
    with pytest.raises(ExportError, match="exists"):
        infllm_pass.export_onnx(small_llama, path, (tokens(80),), config=SMALL)


def test_large_weights_go_to_a_file_of_their_own(small_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "LARGE_WEIGHTS", 1000)
    infllm_pass.export_onnx(small_llama, tmp_path / "llama.onnx", (tokens(80),), config=SMALL)
    assert (tmp_path / "llama.onnx.data").exists()


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("model.onnx", {}, "exists: choose another path, or pass overwrite=True"),
        ("", {}, "is a folder"),
        ("no/such/folder.onnx", {}, "no folder that can be written to"),
        ("new.onnx", {"opset": 17}, "opset 17 is not supported: expected 18 to 23"),
    ],
)
def test_bad_paths_are_refused_before_any_work(tmp_path, place, options, message):
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(ExportError, match=message):
        infllm_pass.export_onnx(Plain(), tmp_path / place, (torch.randn(1, 2, 90, 8),), **options)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"


@pytest.mark.parametrize("moment", ["save", "check_model"])
def test_no_half_written_file(tmp_path, monkeypatch, moment):
    import onnx_ir

    def fail(*_args, **_options):
        raise OSError("no space left on device")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    monkeypatch.setattr(*((onnx_ir, "save") if moment == "save" else (onnx.checker, "check_model")), fail)
    with pytest.raises(ExportError, match="cannot be written: no space left"):
        infllm_pass.export_onnx(Plain(), path, (torch.randn(1, 2, 90, 8),), overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_without_a_body_are_refused(tmp_path, dtype):
    with pytest.raises(DtypeError, match=r"ONNX export takes torch\.float32 and torch\.float16; cast the model"):
        infllm_pass.export_onnx(Plain(), tmp_path / "model.onnx", (torch.randn(1, 2, 90, 8, dtype=dtype),))
    assert not list(tmp_path.iterdir())


class Packed(nn.Module):
    def forward(self, q, ids):
        return infllm_pass.switchable_attention(q, q, q, SMALL, segment_ids=ids)


def test_packed_sequences_are_refused(tmp_path):
    q, ids = torch.randn(1, 2, 90, 8), torch.zeros(1, 90, dtype=torch.int64)
    with pytest.raises(ExportError, match="pad them to rows of a batch"):
        infllm_pass.export_onnx(Packed(), tmp_path / "model.onnx", (q, ids))
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_switchable_site_is_refused(tmp_path):
    class Bidirectional(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    for model in (nn.Linear(4, 4), Bidirectional()):
        with pytest.raises(NoAttentionSiteError, match="no attention site is switchable"):
            infllm_pass.export_onnx(model, tmp_path / "model.onnx", (torch.randn(1, 2, 90, 4),))
    assert not list(tmp_path.iterdir())


def test_something_that_is_no_model_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"give an nn\.Module"):
        infllm_pass.export(lambda x: x, (torch.ones(1),))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'infllm-pass\[onnx\]'"):
        infllm_pass.export_onnx(Plain(), tmp_path / "model.onnx", (torch.randn(1, 2, 90, 8),))


def test_an_onnxscript_without_function_builder_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr("onnxscript.build_function")
    with pytest.raises(MissingDependencyError, match=r"onnxscript>=0\.7\.1.*pip install 'infllm-pass\[onnx\]'"):
        infllm_pass.export_onnx(Plain(), tmp_path / "model.onnx", (torch.randn(1, 2, 90, 8),))


@pytest.mark.checkpoint
def test_checkpoint_on_both_sides_of_dense_len(tmp_path, whole_smollm2, smollm2_tokenizer):
    part = first_layers(whole_smollm2, 1)
    text = corpus(smollm2_tokenizer, 768)
    sparse = SparseAttentionConfig(window_size=64, topk=4, dense_len=400)
    covering = SparseAttentionConfig(window_size=512, topk=8, dense_len=400)
    shapes = {"ids": {1: Dim.DYNAMIC}}
    program = torch.export.export(Logits(part), (text[:, :64],), dynamic_shapes=shapes)
    sessions = []
    for number, chosen in enumerate((sparse, covering)):
        path = tmp_path / f"{number}.onnx"
        report = infllm_pass.export_onnx(program, path, config=chosen)
        assert report.switchable == len(report.sites) == 1
        sessions.append(runtime(path))
    sparsified = infllm_pass.sparsify(torch.compile(Logits(part), backend="eager"), sparse)
    for length in (150, 399, 768):
        ids = text[:, :length]
        with torch.no_grad():
            expected, dense = sparsified(ids), part(input_ids=ids, use_cache=False).logits
        assert relative_error(run(sessions[0], ids), expected) <= 1e-3
        assert relative_error(run(sessions[1], ids), dense) <= 1e-3
        assert (relative_error(expected, dense) > 1e-3) == (length >= 400)


class Terms(nn.Module):
    """Attention with a cap, biases of keys, and sinks."""

    def __init__(self):
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(48, heads * 8) for heads in (6, 2, 2))
        self.importance = nn.Linear(48, 2)
        self.sinks = nn.Parameter(torch.randn(6))

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, -1, 8).transpose(1, 2) for layer in self.project)
        scores = torch.tanh(q @ k.repeat_interleave(3, 1).mT / 4) * 4
        scores = scores + self.importance(x).transpose(1, 2).repeat_interleave(3, 1)[:, :, None]
        place = torch.arange(length)
        scores = scores.masked_fill(place > place[:, None], float("-inf"))
        sinks = self.sinks.view(1, -1, 1, 1).expand(batch, -1, length, -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return (weights @ v.repeat_interleave(3, 1)).transpose(1, 2).flatten(2)


def test_score_terms_become_inputs_and_an_attribute(tmp_path):
    path = tmp_path / "terms.onnx"
    torch.manual_seed(0)
    model, x = Terms().eval(), torch.randn(2, 130, 48) * 2
    infllm_pass.export_onnx(model, path, (x,), config=SMALL)
    (node,) = nodes(path)
    assert len(node.input) == 5
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["softcap"] == 4.0
    sparsified = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL)
    with torch.no_grad():
        got, expected, dense = run(runtime(path), x), sparsified(x), model(x)
    assert relative_error(got, expected) <= 1e-5
    assert relative_error(got, dense) > 1e-2
