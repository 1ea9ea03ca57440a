"""``infllm-pass tune``: break-even lengths from measured ratios, and the command."""

from __future__ import annotations

import json

import pytest

from infllm_pass.errors import TuningError
from infllm_pass.plan import break_even as table
from infllm_pass.tools.cli import main
from infllm_pass.tools.tune_command import break_even_length


def rows(*ratios):
    return [{"heads": "4x2x8", "length": 1000 * 2**n, "ratio": ratio} for n, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    ("ratios", "length"),
    [
        ((0.9, 0.5), 1000),
        ((2.0, 0.5), 1415),  # half way between 1000 and 2000 on a scale of logarithms
        ((0.9, 1.25, 0.8), 2829),  # from where on none is slower
        ((1.5, 1.0), 2000),
    ],
)
def test_the_length_from_which_none_is_slower(ratios, length):
    assert break_even_length(rows(*ratios)) == length


def test_no_length_is_fast_enough():
    with pytest.raises(TuningError, match=r"slower than dense attention at 2000 tokens \(ratio 1.20\)"):
        break_even_length(rows(2.0, 1.2))


def test_the_command_keeps_what_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("infllm_pass.tools.tune_command.LENGTHS", (64, 4096))
    monkeypatch.setattr("infllm_pass.tools.tune_command.measure", measured)
    path = tmp_path / "rows.json"
    monkeypatch.setenv(table.USER_FILE, str(path))
    assert main(["tune", "4x2x8", "--scorers", "pooled", "--topk", "2", "--window-size", "64"]) == 0
    assert "4096" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["length"] == 64 + 1
    assert (row["selected_blocks"], row["query_heads"], row["scorer"]) == (3, 4, "pooled")


def measured(heads, config, length, device):
    ratio = {64: 1.001, 4096: 0.01}[length]
    return {"heads": str(heads), "scorer": config.scorer, "blocks": config.selected_blocks, "length": length} | {
        "dense_ms": 1.0, "sparse_ms": ratio, "ratio": ratio
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["4x2"], "expected QUERYxKEYxDIM"), (["3x2x8"], "3 query heads are no multiple of 2"), ([], "QxKxD")],
)
def test_bad_heads(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
