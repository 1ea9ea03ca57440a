"""Models as packages of AOTInductor: loaded without this project, from Python and from C++."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import lowering
from torch.export import Dim
from torch.utils import _pytree as pytree

import infllm_pass
from infllm_pass.compat.inductor import kernel_readers
from infllm_pass.errors import ExportError, InputSizeError, NoAttentionSiteError
from infllm_pass.lowering.export import fused_op
from infllm_pass.lowering.inductor import cpp_extern, package
from tests.support import ROOT
from tests.support.common import SMALL, TOKENS, llama, relative_error, tokens

DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}

NAMES = ("llama.onnx", "llama.pt2", "llama.engine")

LOADING = """
import sys, torch
class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "infllm_pass":
            raise ImportError(name)
sys.meta_path.insert(0, Barred())
model = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([model(ids) for ids in torch.load(sys.argv[2])], sys.argv[3])
assert not [name for name in sys.modules if name.startswith("infllm")]
"""


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


class Plain(nn.Module):
    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.fixture(scope="module")
def model():
    return Logits(llama(num_hidden_layers=1).float())


@pytest.fixture(scope="module")
def example():
    """The module ``examples/export_llama.py``."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("export_llama", ROOT / "examples" / "export_llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def file(example, model, tmp_path_factory):
    """The package that the example writes beside its other files."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("package")
    example.export(model, tokens(600), SMALL, folder)
    assert {"llama.onnx", "llama.pt2"} <= {each.name for each in folder.iterdir()} <= {*NAMES}
    return folder / "llama.pt2"


def test_the_example_gives_the_same_logits_three_ways(example, model, file):
    errors = example.compare(model, tokens(300), SMALL, file.parent, [40, 300])
    assert len(errors) == 4
    assert max(errors.values()) <= 1e-4
    engine = file.with_name("llama.engine")
    assert engine.exists() == any(map(importlib.util.find_spec, ("tensorrt", "tensorrt_rtx")))


def test_a_fresh_process_without_this_project_gives_the_same_logits(model, file, tmp_path):
    inputs = [tokens(length, batch) for length, batch in ((1, 1), (63, 3), (64, 2), (129, 1), (333, 5))]
    torch.save(inputs, tmp_path / "ids")
    command = [sys.executable, "-c", LOADING, str(file), str(tmp_path / "ids"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sparsified = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL)
    for ids, got in zip(inputs, torch.load(tmp_path / "logits"), strict=True):
        with torch.no_grad():
            expected, dense = sparsified(ids), model(ids)
        assert relative_error(got, expected) <= 1e-4
        assert (relative_error(got, dense) > 1e-2) == (ids.shape[1] >= SMALL.dense_len)


def test_the_program_in_c_plus_plus(file, cpp_program, tmp_path):
    (program, run), loaded = cpp_program, infllm_pass.load_package(file)
    for length in (30, 150):
        ids = tokens(length)
        assert relative_error(run(file, ids), loaded(ids)[0, -1]) <= 1e-6
    done = subprocess.run([program, file, tmp_path / "none.txt"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no token ids" in done.stderr


class Gated(nn.Module):
    """Two layers of attention with a padding mask: views of one projection in, a gate behind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 6 * 8 + 2 * 8 + 2 * 12 + 72) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(72, 48) for _ in range(2))

    def forward(self, x, valid):
        place = torch.arange(x.shape[1])
        seen = (place <= place[:, None]) & valid[:, None, None]  # [B, 1, L, L]
        for layer, out in zip(self.layers, self.out, strict=True):
            *parts, gate = layer(x).split((48, 16, 24, 72), dim=2)
            each = zip(parts, (6, 2, 2), strict=True)
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part, heads in each)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            x = x + out(y.transpose(1, 2).flatten(2) * gate.sigmoid())
        return x


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("config", "dtype", "limit"),
    [
        (replace(TOKENS, score_dtype="fp8"), torch.bfloat16, 2e-2),
        (SMALL, torch.float64, 1e-12),
    ],
    ids=["tokens", "pooled in float64"],
)
def test_all_sites_call_one_kernel(tmp_path, dtype, limit, config):
    model, path = Gated().eval(), tmp_path / "model.pt2"
    shapes = {"x": DYNAMIC, "valid": DYNAMIC}
    example = (torch.randn(2, 90, 48, dtype=dtype), torch.ones(2, 90, dtype=torch.bool))
    infllm_pass.package(model.to(dtype), example, path, dynamic_shapes=shapes, config=config)
    with zipfile.ZipFile(path) as archive:
        sources = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    name = f"infllm_switchable_attention_{str(dtype).split('.')[1]}_int64"
    assert len(re.findall(rf"^\s*{name}\(", sources, re.MULTILINE)) == 2
    assert len(re.findall(rf"\bvoid {name}\([^)]*\) {{", sources)) == 1

    loaded = infllm_pass.load_package(path)
    exact = infllm_pass.sparsify(torch.compile(model.double(), backend="eager", dynamic=True), config)
    for batch, length in ((1, 40), (3, 200)):
        x = torch.randn(batch, length, 48, dtype=dtype)
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[0, :17] = False
        with torch.no_grad():
            got, expected = loaded(x, valid), exact(x.double(), valid)
        assert relative_error(got[valid], expected[valid]) <= limit


def test_sizes_outside_the_exported_range_are_refused():
    program = torch.export.export(
        Plain(), (torch.randn(2, 4, 90, 8),), dynamic_shapes={"q": {0: Dim.DYNAMIC, 2: Dim("length", min=16, max=512)}}
    )
    sizes = package.input_sizes(program)
    assert sizes[0][1:] == [4, [16, 512], 8]

    class Stub:
        def __init__(self):
            self.loader = self

        def get_metadata(self):
            return {package.RANGES: json.dumps(sizes)}

        def get_call_spec(self):
            return [pytree.treespec_dumps(pytree.tree_structure(given)) for given in structures]

        def __call__(self, *args, **kwargs):
            return next(iter((*args, *kwargs.values())))

    structures = (((0,), {}), 0)
    loaded = infllm_pass.Package(Stub())
    assert loaded(torch.zeros(7, 4, 512, 8)).shape[0] == 7
    with pytest.raises(InputSizeError, match="has size 513 in dimension 2: the model was exported for 16 to 512"):
        loaded(torch.zeros(2, 4, 513, 8))
    with pytest.raises(InputSizeError, match="exported for 4;"):
        loaded(torch.zeros(2, 5, 100, 8))
    with pytest.raises(InputSizeError, match="has 3 dimensions: the model was exported for 4"):
        loaded(torch.zeros(4, 100, 8))
    structures, sizes = (((), {"q": 0, "k": 0}), 0), [[4], [[1, None], 2]]
    loaded = infllm_pass.Package(Stub())
    assert loaded(k=torch.zeros(9, 2), q=torch.zeros(4)).shape == (4,)
    with pytest.raises(InputSizeError, match="input 0 has 2 dimensions"):
        loaded(k=torch.zeros(4), q=torch.zeros(9, 2))


def test_an_example_outside_its_range_is_refused():
    shapes = {"q": {2: Dim("length", min=16, max=64)}}
    with pytest.raises(ExportError, match=r"torch\.export refuses"):
        infllm_pass.export(Plain(), (torch.randn(2, 4, 90, 8),), dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model.pt2", "exists: choose another path, or pass overwrite=True"),
        ("model.so", r"let it end in \.pt2"),
        ("no/such/folder.pt2", "no folder that can be written to"),
    ],
)
def test_bad_paths_are_refused_before_any_work(tmp_path, place, message):
    (tmp_path / "model.pt2").write_bytes(b"mine")
    with pytest.raises(ExportError, match=message):
        infllm_pass.package(Plain(), (torch.randn(1, 2, 90, 8),), tmp_path / place)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"mine"


def test_what_keeps_a_site_from_the_kernels_is_said():
    """The report, which says so too, does not reach a caller of `package` that raises."""
    program = infllm_pass.export(Plain(), (torch.randn(1, 2, 90, 8),), config=SMALL)
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = node.meta["val"].to("meta")
    with pytest.raises(ExportError, match="packaged for the CPU only: q is on meta: the Triton kernels run on CUDA"):
        package.join(program)


def test_no_half_written_file(tmp_path, monkeypatch):
    def fail(_program, *, package_path, inductor_configs):
        Path(package_path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(ExportError, match="cannot be written: no space left"):
        infllm_pass.package(Plain(), (torch.randn(1, 2, 90, 8),), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def fail():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    with pytest.raises(ExportError, match=r"needs a C\+\+ compiler: install g\+\+"):
        infllm_pass.package(Plain(), (torch.randn(1, 2, 90, 8),), tmp_path / "model.pt2")


def test_models_that_cannot_be_packaged(tmp_path):
    path = tmp_path / "model.pt2"
    with pytest.raises(NoAttentionSiteError, match="no attention site is switchable"):
        infllm_pass.package(nn.Linear(4, 4), (torch.randn(1, 4),), path)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_packages(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot be loaded"):
        infllm_pass.load_package(tmp_path / "model.pt2")


def test_packaging_leaves_alone_what_others_compile(tmp_path, monkeypatch):
    """Whatever is compiled meanwhile, in another thread: Inductor's lowering of the operator is not replaced."""
    seen = []

    def compile_and_package(program, **_arguments):
        targets = {node.target for node in program.graph.nodes}
        called = [operator in targets for operator in (cpp_extern.OPERATOR, fused_op.OPERATOR)]
        seen.append((lowering.lowerings.get(fused_op.OPERATOR), *called))
        raise torch._inductor.exc.InductorError(RuntimeError("no"), None)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.setitem(lowering.lowerings, fused_op.OPERATOR, "another's")
    with pytest.raises(ExportError, match="no"):
        infllm_pass.package(Plain(), (torch.randn(1, 2, 80, 16),), tmp_path / "plain.pt2", config=SMALL)
    assert seen == [("another's", True, False)]
    assert lowering.lowerings[fused_op.OPERATOR] == "another's"


def test_packaging_reads_each_kernel_once(tmp_path, monkeypatch):
    """For all layers, as compiling does."""
    read, (module, (name,)) = [], kernel_readers()
    monkeypatch.setattr(module, name, lambda kernel, *_: read.append(kernel))
    kernel = object()

    def compile_and_package(*_program, **_arguments):
        for _ in range(2):
            getattr(module, name)(kernel, {"SIZE": 1}, {})
        raise torch._inductor.exc.InductorError(RuntimeError("no"), None)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    with pytest.raises(ExportError, match="no"):
        infllm_pass.package(Plain(), (torch.randn(1, 2, 80, 16),), tmp_path / "plain.pt2", config=SMALL)
    assert read == [kernel]


class Terms(nn.Module):
    """Three layers of attention: with learned biases of keys, with capped scores, and with sinks behind a window."""

    def __init__(self):
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(48, 6 * 8 + 2 * 8 + 2 * 8) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.importance = nn.Linear(48, 2)
        self.sinks = nn.Parameter(torch.randn(6))

    def forward(self, x, valid):
        place = torch.arange(x.shape[1])
        seen = (place <= place[:, None]) & valid[:, None, None]
        for number, (layer, out) in enumerate(zip(self.project, self.out, strict=True)):
            parts = layer(x).split((48, 16, 16), dim=2)
            q, k, v = (part.unflatten(2, (-1, 8)).transpose(1, 2) for part in parts)
            k, v = (part.repeat_interleave(3, 1) for part in (k, v))
            scores = q @ k.mT * 2.0
            if number == 0:
                bias = nn.functional.logsigmoid(4 * self.importance(x)).transpose(1, 2)
                scores = scores + bias.repeat_interleave(3, 1)[:, :, None]
            elif number == 1:
                scores = torch.tanh(scores / 3) * 3
            shown = seen & (place > place[:, None] - 60) if number == 2 else seen
            scores = scores.masked_fill(~shown, torch.finfo(x.dtype).min)
            if number == 2:
                scores = torch.cat([scores, self.sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
            weights = scores.softmax(-1)[..., : x.shape[1]]
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_score_terms_in_a_fresh_process(tmp_path):
    """Sparse and dense rows, against the oracle's selection and the model itself."""
    torch.manual_seed(0)
    model, path = Terms().eval(), tmp_path / "model.pt2"
    config = replace(SMALL, window_size=8, topk=3)
    shapes = {"x": DYNAMIC, "valid": DYNAMIC}
    example = (torch.randn(2, 90, 48), torch.ones(2, 90, dtype=torch.bool))
    infllm_pass.package(model, example, path, dynamic_shapes=shapes, config=config)
    with zipfile.ZipFile(path) as archive:
        sources = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    assert len(re.findall(r"^\s*infllm_switchable_attention_float32_int64\(", sources, re.MULTILINE)) == 3
    inputs = []
    for batch, length in ((1, 40), (3, 200)):
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[0, :17] = False
        inputs.append((torch.randn(batch, length, 48), valid))
    torch.save(inputs, tmp_path / "in")
    command = [sys.executable, "-c", LOADING.replace("model(ids)", "model(*ids)"), str(path), str(tmp_path / "in")]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = model.double()
    exact = infllm_pass.sparsify(torch.compile(model, backend="eager", dynamic=True), config)
    for (x, valid), got in zip(inputs, torch.load(tmp_path / "out"), strict=True):
        with torch.no_grad():
            expected, dense = exact(x.double(), valid), model(x.double(), valid)
        assert relative_error(got[valid], expected[valid]) <= 2e-5
        assert (relative_error(got[valid], dense[valid]) > 1e-2) == (x.shape[1] >= 64)
