"""The examples of the README and of the pages run, in the order in which a reader meets them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import infllm_pass
from tests.support import ROOT
from tests.support.common import llama, tokens
from tests.support.tokenizers import byte_llama, byte_tokenizer

pytest.importorskip("transformers")

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDED = ("onnxscript", "onnxruntime", "tensorrt_rtx", "torch_tensorrt")
"""Packages without which a block that names them is left out."""


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of the line before it."""
    text = page.read_text()
    return [(text[: match.start(1)].count("\n"), match[1]) for match in BLOCK.finditer(text)]


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the pages take for granted: a model, tokens, tensors; compiled without Inductor, in a folder of its own."""
    compile_ = torch.compile

    def without_inductor(model, *, backend="eager", options=None, **keywords):
        if backend == "infllm":
            options = (options or {}) | {"backend": "eager"}
        backend = "eager" if backend == "inductor" else backend
        return compile_(model, backend=backend, options=options, **keywords)

    def compile_and_package(program, *, package_path, inductor_configs):
        with torch.no_grad():
            assert program.module()(tokens(40)).isfinite().all()
        Path(package_path).write_bytes(b"compiled")

    monkeypatch.setattr(torch, "compile", without_inductor)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr(torch._logging, "set_logs", lambda **_: None)  # it would outlast the test
    monkeypatch.chdir(tmp_path)
    model = llama().float()
    packed = [torch.randn(300, heads, 16) for heads in (4, 2, 2)]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in packed)
    return {
        "torch": torch,
        "infllm_pass": infllm_pass,
        "model": model,
        "module": Logits(model).eval(),
        "input_ids": tokens(200),
        "ids": tokens(200, 2),
        "inputs": {"input_ids": tokens(140), "attention_mask": torch.ones(1, 140, dtype=torch.long)},
        **dict(zip("qkv", (q, k, v), strict=True)),
        **dict(zip(("packed_q", "packed_k", "packed_v"), packed, strict=True)),
        "importance": torch.randn(1, 2, 300),
        "cu_seqlens": torch.tensor([0, 100, 300], dtype=torch.int32),
        "config": infllm_pass.SparseAttentionConfig(window_size=64, topk=4, dense_len=128),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_examples_of_a_page_run_in_order(page, names, capsys):
    if page.name in ("adaptation.md", "evaluation.md", "training_data.md"):
        names |= {"model": byte_llama(), "tokenizer": byte_tokenizer()}
        Path("texts").mkdir()
        Path("texts/long.txt").write_text("A line of some text.\n" * 500)
        Path("held_out.txt").write_text("Another line of some other text.\n" * 100)
    for line, source in blocks(page):
        missing = [name for name in NEEDED if name in source and importlib.util.find_spec(name) is None]
        if not missing:
            exec(compile("\n" * line + source, str(page), "exec"), names)


def test_blocks_are_found():
    found = {page.name: len(blocks(page)) for page in PAGES}
    assert found["README.md"] >= 3
    assert found["guide.md"] >= 7
