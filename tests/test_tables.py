"""Tables that fit: at any width every figure is whole and nothing is left out; the same rows as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import torch
from rich.console import Console

import infllm_pass
from infllm_pass.tables import Column, FittedTable, csv_text, output_width
from infllm_pass.tools.output import OutputFormat, print_table
from tests.support.common import SMALL

COLUMNS = (
    Column("case", "case", right=False),
    Column("select_ms", "selection ms", ".3f"),
    Column("dense_ms", "dense by length ms", ".1f"),
    Column("ratio", "ratio of processor time", ".3f"),
    Column("note", "note", folds=True, right=False),
    Column("absent", "absent", drop_empty=True),
)
ROWS = [
    {
        "case": f"decode/32x8x128/64/{length}",
        "select_ms": length / 7,
        "dense_ms": 1390.04,
        "ratio": 0.1,
        "note": "model.layers.17.self_attn: [B] and some explanation that takes more than one line of any narrow table",
    }
    for length in (8191, 131072)
]
FIGURES = ("decode/32x8x128/64/131072", "18724.571", "1170.143", "1390.0", "0.100")


def printed(value, width):
    out = io.StringIO()
    Console(file=out, width=width).print(value)
    return out.getvalue()


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40])
def test_every_figure_is_whole_at_every_width(width):
    text = printed(FittedTable(COLUMNS, ROWS, "a title"), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "a title" in text
    for figure in FIGURES:
        assert figure in text
    for column in COLUMNS[:5]:
        for word in column.heading.split():
            assert word in text
    assert "absent" not in text
    words = re.findall(r"\w+", "".join(re.sub(r"[^\w\s\[\]:.]", " ", text)))
    assert {"explanation", "narrow", "B"} <= set(words)


def test_columns_where_they_fit_and_blocks_where_they_do_not():
    table = FittedTable(COLUMNS, ROWS)
    assert "┃" in printed(table, 200)
    assert "┃" not in printed(table, 80)  # columns without lines between them
    assert printed(table, 80).count("selection") == 1
    assert printed(table, 60).count("selection ms") == len(ROWS)


def test_nothing_of_a_cell_is_lost_when_it_folds():
    note = ROWS[0]["note"]
    for width in (110, 80, 40, 17):
        text = printed(FittedTable(COLUMNS[-2:-1], ROWS[:1]), width)
        kept = "".join(re.sub(r"[^\w\[\]:.]", "", line) for line in text.splitlines())
        assert re.sub(r"\s", "", note) in kept.replace("note", "", 1)


def test_a_figure_wider_than_the_line_is_broken_and_not_cut():
    text = printed(FittedTable(COLUMNS[:1], ROWS[1:]), 12)
    assert "".join(text.split()) == "case" + FIGURES[0]


def test_brackets_in_cells_are_no_markup():
    assert "[bold]x[/bold]" in printed(FittedTable([Column("a", "a")], [{"a": "[bold]x[/bold]"}]), 60)


@pytest.mark.parametrize(
    ("columns", "terminal", "expected"), [("", False, 120), ("64", False, 64), ("33", True, 33), ("none", False, 120)]
)
def test_width_of_a_terminal_of_the_environment_or_of_a_log(monkeypatch, columns, terminal, expected):
    stream = io.StringIO()
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    assert output_width(stream) == expected


def test_csv_has_a_line_for_each_row_and_quotes_what_must_be():
    rows = [{"a": 1, "b": "x,y"}, {"a": 2.5, "c": 'say "no"'}]
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert read == [{"a": "1", "b": "x,y", "c": ""}, {"a": "2.5", "b": "", "c": 'say "no"'}]


@pytest.mark.parametrize("form", list(OutputFormat))
def test_programs_get_rows_unrounded(capsys, form):
    print_table(form, FittedTable(COLUMNS[:3], ROWS), ROWS)
    out = capsys.readouterr().out
    if form is OutputFormat.JSON:
        assert json.loads(out) == ROWS
    elif form is OutputFormat.CSV:
        assert [float(row["select_ms"]) for row in csv.DictReader(io.StringIO(out))] == [8191 / 7, 131072 / 7]
    else:
        assert "18724.571" in out


class Attention(torch.nn.Module):
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=False)


@pytest.mark.parametrize("width", [200, 80, 40])
def test_a_report_is_whole_at_every_width(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    report = infllm_pass.explain(Attention(), torch.randn(1, 2, 100, 16), config=SMALL)
    text = str(report)
    assert max(map(len, text.splitlines())) <= width
    for figure in ("1, 2, 100, 16", "BIDIRECTIONAL", "1 graph(s), 1 attention"):
        assert figure in text
    (row,) = csv.DictReader(io.StringIO(report.to_csv()))
    assert (row["reason"], row["query_shape"]) == ("BIDIRECTIONAL", "(1, 2, 100, 16)")
