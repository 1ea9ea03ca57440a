"""Tables that fit the width they are printed at, and the same rows as CSV or plain data."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120
"""Columns of output that goes to no terminal, unless the environment variable COLUMNS says otherwise."""

_LEAST_FOLDED = 16
"""Characters that a column of text keeps, however narrow the table."""

_LINED: dict[str, Any] = {"box": box.HEAVY_HEAD, "padding": (0, 1)}
_OPEN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
_STYLES = ((_LINED, 3, 1), (_OPEN, 2, 0))
"""How a table is drawn, widest first: options of rich, characters added to each column, and to the line."""


@dataclass(frozen=True)
class Column:
    """A column of a `FittedTable`.

    Attributes:
        key: the row's key.
        heading: what stands above the cells.
        form: format specification of numbers, such as ".2f".
        folds: whether a cell is text that may be broken over lines; figures and names are never broken.
        right: whether cells are aligned to the right.
        drop_empty: whether the column is left out where all of its cells are empty.
    """

    key: str
    heading: str
    form: str = ""
    folds: bool = False
    right: bool = True
    drop_empty: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        """The text of a row's value; "" where it has none."""
        value = row.get(self.key)
        if value is None:
            return ""
        return format(value, self.form) if self.form and isinstance(value, (int, float)) else str(value)


@dataclass(frozen=True)
class FittedTable:
    """Rows that rich prints as columns, or as a block of ``heading value`` lines for each row where columns do not fit.

    Columns of text are folded as far as need be; nothing is ever cut or left out.

    Attributes:
        columns: what to show, in order.
        rows: a mapping from keys to values for each line.
        title: a line above the table; "" for none.
    """

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = {column: [column.cell(row) for row in self.rows] for column in self.columns}
        shown = {column: texts for column, texts in cells.items() if any(texts) or not column.drop_empty}
        bounds = [_natural_and_least(*item) for item in shown.items()]
        for style, each, line in _STYLES:
            widths = _fitted(bounds, options.max_width - each * len(shown) - line)
            if widths is not None:
                yield self._table(shown, widths, style)
                return
        yield from self._blocks(shown, options.max_width)

    def _table(self, shown: Mapping[Column, Sequence[str]], widths: Sequence[int], style: Mapping[str, Any]) -> Table:
        title = Text(self.title, overflow="fold") if self.title else None
        table = Table(title=title, title_justify="left", **style)
        for column, width in zip(shown, widths, strict=True):
            table.add_column(
                Text(column.heading), width=width, justify="right" if column.right else "left", overflow="fold"
            )
        for texts in zip(*shown.values(), strict=True):
            folded = (_folded(*cell) for cell in zip(shown, texts, widths, strict=True))
            table.add_row(*(Text("\n".join(lines)) for lines in folded))
        return table

    def _blocks(self, shown: Mapping[Column, Sequence[str]], width: int) -> Iterable[Text]:
        indent = min(max(len(column.heading) for column in shown), max(width // 3, 8)) + 2
        lines = textwrap.wrap(self.title, width)
        for texts in zip(*shown.values(), strict=True):
            lines.append("")
            for column, text in zip(shown, texts, strict=True):
                if text:
                    lines += _heading_and_value(column, text, indent, width)
        yield Text("\n".join(lines), no_wrap=True, overflow="ignore")

    def __str__(self) -> str:
        return rendered(self)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows with the table's keys only, values unformatted."""
        return [{column.key: row.get(column.key) for column in self.columns} for row in self.rows]


def output_width(stream: TextIO | None = None) -> int:
    """Characters a line of a stream, standard output unless given: the terminal's, COLUMNS, or `PLAIN_WIDTH`."""
    stream = stream or sys.stdout
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or PLAIN_WIDTH
    if stream is not None and stream.isatty():
        return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    return PLAIN_WIDTH


def output_console(*, stderr: bool = False) -> Console:
    """A console of `output_width` on standard output, or on standard error."""
    return Console(stderr=stderr, width=output_width(sys.stderr if stderr else None))


def rendered(value: object) -> str:
    """What rich prints of a value at `output_width`, as plain text."""
    console = Console(width=output_width(), record=True, file=io.StringIO())
    console.print(value)
    return console.export_text()


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV: a header of all keys, in order of their first appearance, and a line for each row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _natural_and_least(column: Column, texts: Sequence[str]) -> tuple[int, int]:
    """Width of a column that folds nothing, and the least that cuts nothing."""
    longest_word = max(len(word) for word in column.heading.split() or [""])
    longest = max(map(len, texts), default=0)
    natural = max(longest, len(column.heading), 1)
    least = max(longest_word, min(longest, _LEAST_FOLDED) if column.folds else longest, 1)
    return natural, least


def _fitted(columns: Sequence[tuple[int, int]], room: int) -> list[int] | None:
    """Widths between natural and least that fit into one line, the widest narrowed first; None where there are none."""
    if sum(least for _, least in columns) > room:
        return None
    widths = [natural for natural, _ in columns]
    for _ in range(sum(widths) - room):
        widest = max((n for n, (_, least) in enumerate(columns) if widths[n] > least), key=lambda n: widths[n])
        widths[widest] -= 1
    return widths


def _heading_and_value(column: Column, text: str, indent: int, width: int) -> list[str]:
    """The lines of one cell in a block: beside its heading, or below where the two need a line each."""
    lines = _folded(column, text, max(width - indent, 1))
    if len(lines[0]) > width - indent:  # a figure wider than what the heading leaves
        return [
            *_pieces(column.heading, width),
            *(piece.rjust(min(indent + len(piece), width)) for piece in _pieces(text, width)),
        ]
    if len(column.heading) > indent - 2:
        return [*_pieces(column.heading, width), *(" " * indent + line for line in lines)]
    return [column.heading.ljust(indent) + lines[0], *(" " * indent + line for line in lines[1:])]


def _pieces(text: str, width: int) -> list[str]:
    return [text[start : start + width] for start in range(0, len(text), width)]


def _folded(column: Column, text: str, room: int) -> list[str]:
    """Text broken at spaces, after ``.`` or ``/``, or, in longer words, anywhere; figures stay whole."""
    if not column.folds or len(text) <= room:
        return [text]
    lines, line = [], ""
    for part in re.findall(r"\s+|[^\s./]*[./]?", text):
        for piece in textwrap.wrap(part, room, drop_whitespace=False) or [part]:
            if len(line) + len(piece) > room:
                lines.append(line.rstrip())
                line = piece.lstrip()
            else:
                line += piece
    return [*lines, line.rstrip()] if line.strip() else lines
