"""The decode benchmarks' own logic: floors, rows of the CPU, and no GPU."""

from __future__ import annotations

import argparse
import importlib

import pytest
import torch

from infllm_pass.kernels.geometry import BlockGeometry
from tests.support import ROOT


@pytest.fixture(autouse=True)
def _folder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_floor_counts_each_byte_once():
    pytest.importorskip("triton")
    decode, heads = importlib.import_module("decode"), importlib.import_module("_data").MAIN[0]
    sizes = (heads, 1, 131072, BlockGeometry(selected_blocks=64))
    assert decode.floor_bytes(*sizes, sparse=False) == 2 * 2 * 128 * 2 * 131072
    assert decode.floor_bytes(*sizes, sparse=True) == 2 * 2 * 128 * (8191 + 2047 + 2 * 4096)
    short = (heads, 1, 100, BlockGeometry(selected_blocks=64))
    assert decode.floor_bytes(*short, sparse=True) == 2 * 2 * 128 * (5 + 2 * 100)


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["decode"])
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module("decode").main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "this benchmark needs a CUDA device, and torch sees none\n"


def test_a_row_of_the_cpu():
    cpu_decode = importlib.import_module("cpu_decode")
    options = {"heads": 2, "heads_kv": 1, "dim": 16, "steps": 2, "score_dtype": "key"}
    rows = cpu_decode.measure(300, argparse.Namespace(**options, scorers=["pooled", "tokens"]))
    assert [row["case"] for row in rows] == ["decode/2x1x16/96/300/pooled", "decode/2x1x16/96/300/tokens"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["sparse_ms"] / row["dense_ms"])
        assert row["cpu_ratio"] == pytest.approx(row["sparse_cpu_ms"] / row["dense_cpu_ms"])
        assert row["refill_ms"] > 0


def test_the_plot_has_a_line_for_every_case():
    pytest.importorskip("matplotlib")
    cases = [("32x2x128", 1), ("32x2x128", 8), ("32x8x128", 1)]
    rows = [
        {"heads": heads, "batch": batch, "mode": mode, "blocks": 64, "length": length, "ms": 0.02, "dense_ms": 0.04}
        | {"ratio": 0.5}
        for heads, batch in cases
        for mode, length in (("sparse", 8192), ("sparse", 32768), ("dense", 8191))
    ]
    figure = importlib.import_module("_plot_gpu").draw_decode(
        {"header": {"device": "NVIDIA H100", "torch": "2"}, "rows": rows}
    )
    left, right = figure.axes
    assert len(left.lines) == 6
    assert [line.get_label() for line in right.lines[:3]] == [f"{heads}, batch {batch}" for heads, batch in cases]
    assert list(right.lines[0].get_xdata()) == [8192, 32768]
