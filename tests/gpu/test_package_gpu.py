"""Packages of AOTInductor on a CUDA device: kernels, both sides of the switch and the guard in one file."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ExportError
from tests.export.test_aoti import LOADING, Logits
from tests.support.common import llama, relative_error, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = SparseAttentionConfig(
    kernel_size=32, kernel_stride=16, block_size=64, window_size=128, topk=4, dense_len=1024, scorer="pooled"
)


@pytest.mark.usefixtures("shared_cpp_runtime")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_a_fresh_process_without_this_project_gives_the_same_logits(tmp_path, dtype, bound):
    """One layer: in more, rounding of the first would change what the second selects."""
    plain = llama(num_hidden_layers=1, hidden_size=384, max_position_embeddings=8192)
    model = Logits(plain.to("cuda", dtype)).eval()
    path, dynamic = tmp_path / "llama.pt2", {"ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    report = infllm_pass.package(model, (tokens(1500, 2).cuda(),), path, dynamic_shapes=dynamic, config=CONFIG)
    assert [site.kernels for site in report.sites] == ["triton"]
    inputs = [tokens(length, batch).cuda() for length, batch in ((700, 3), (1023, 1), (1024, 1), (3001, 2))]
    torch.save(inputs, tmp_path / "ids")
    command = [sys.executable, "-c", LOADING, str(path), str(tmp_path / "ids"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sparsified = infllm_pass.sparsify(torch.compile(model, dynamic=True), CONFIG)  # rounds where the package does
    for ids, got in zip(inputs, torch.load(tmp_path / "logits"), strict=True):
        with torch.no_grad():
            expected, dense = sparsified(ids), model(ids)
        assert relative_error(got, expected) <= bound, tuple(ids.shape)
        if ids.shape[1] >= CONFIG.dense_len:
            assert relative_error(got, dense) > 2 * relative_error(got, expected)


def test_what_keeps_a_site_from_the_kernels_is_said(tmp_path):
    model = Logits(llama(num_hidden_layers=1, hidden_size=384).to("cuda", torch.float64)).eval()
    with pytest.raises(ExportError, match=r"for the CPU only: q is torch\.float64: the Triton kernels take"):
        infllm_pass.package(model, (tokens(900).cuda(),), tmp_path / "llama.pt2", config=CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("shared_cpp_runtime")
def test_the_program_in_c_plus_plus(cpp_program, tmp_path):
    """Without Python, on both sides of the switch."""
    plain = llama(num_hidden_layers=1, hidden_size=384, max_position_embeddings=8192)
    model = Logits(plain.to("cuda", torch.float32)).eval()
    path, (_, run) = tmp_path / "llama.pt2", cpp_program
    infllm_pass.package(model, (tokens(1500).cuda(),), path, dynamic_shapes={"ids": {1: Dim.DYNAMIC}}, config=CONFIG)
    loaded = infllm_pass.load_package(path)
    for length in (700, 3001):
        ids = tokens(length).cuda()
        assert relative_error(run(path, ids), loaded(ids)[0, -1].cpu()) <= 1e-6
