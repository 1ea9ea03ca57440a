"""How commands and benchmarks print what they found: a table for people, or JSON or CSV for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from rich.console import Console

from infllm_pass.tables import FittedTable, csv_text, output_console


class OutputFormat(Enum):
    """What standard output holds. With JSON and CSV it holds nothing else: all other lines go to standard error."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--csv``; the choice is ``options.format``, an `OutputFormat`."""
    group = parser.add_mutually_exclusive_group()
    parser.set_defaults(format=OutputFormat.TABLE)
    for form in (OutputFormat.JSON, OutputFormat.CSV):
        group.add_argument(
            f"--{form.value}",
            dest="format",
            action="store_const",
            const=form,
            help=f"print {form.name} instead of a table, and nothing else on standard output",
        )


def notes_console(form: OutputFormat) -> Console:
    """Where lines go that are neither a table nor data."""
    return output_console(stderr=form is not OutputFormat.TABLE)


def print_data(form: OutputFormat, data: object, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what a command found for programs: `data` as JSON, or `rows` as CSV."""
    if form is OutputFormat.JSON:
        print(json.dumps(data, indent=2))
    else:
        print(csv_text(rows), end="")


def print_table(form: OutputFormat, table: FittedTable, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Print a table to people, or its rows to programs.

    Args:
        form: which.
        table: what people see.
        rows: what programs get; None: the table's own rows.
    """
    if form is OutputFormat.TABLE:
        output_console().print(table)
        return
    data = table.to_dicts() if rows is None else list(rows)
    print_data(form, data, data)
