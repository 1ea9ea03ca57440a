"""What every benchmark writes beside its figures."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from infllm_pass.lowering.export.atomic_file import written_whole
from infllm_pass.tables import Column, FittedTable
from infllm_pass.tools.output import OutputFormat, notes_console, print_table


def results_header() -> dict[str, Any]:
    """The machine, the versions and the commit that figures belong to."""
    return {
        "device": cpu_model(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
    }


def write_results(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write header and rows as JSON, and say where on standard error."""
    dump_results(path, header, rows)
    print(f"written to {path}", file=sys.stderr)


def dump_results(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write header and rows as JSON; the file is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write_text(json.dumps({"header": header, "rows": rows}, indent=2) + "\n")


def show(
    form: OutputFormat,
    rows: list[dict[str, Any]],
    columns: dict[str, str],
    formats: dict[str, str] | None = None,
    *,
    title: str = "",
    default: str = ".2f",
) -> None:
    """Print rows as a table for people, or in full for programs.

    Args:
        form: which.
        rows: each with a ``case``.
        columns: the keys of a row that the table shows, and their headings; what a row does not have stays empty.
        formats: formats of numbers by key.
        title: a line above the table.
        default: format of numbers without one of their own.
    """
    texts = {key for row in rows for key in columns if isinstance(row.get(key), str)}
    shown = [Column("case", "case", right=False)]
    for key, heading in columns.items():
        shown.append(
            Column(key, heading, (formats or {}).get(key, default), folds=key in texts, right=key not in texts)
        )
    print_table(form, FittedTable(shown, rows, title), rows)


def note(form: OutputFormat, line: str) -> None:
    """Print a line for people: below a table, or on standard error where standard output holds data."""
    notes_console(form).print(line, markup=False, highlight=False)


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def break_even(rows: list[dict[str, Any]]) -> str:
    """The length at which sparse and dense take the same time, interpolated between logarithms.

    Args:
        rows: each with a ``length`` and a ``ratio`` of sparse to dense time.
    """
    points = sorted((float(row["length"]), math.log(float(row["ratio"]))) for row in rows)
    for (left, high), (right, low) in itertools.pairwise(points):
        if high > 0 >= low:
            share = high / (high - low)
            return str(round(math.exp(math.log(left) + share * math.log(right / left))))
    return f"below {points[0][0]:.0f}" if points[0][1] <= 0 else f"above {points[-1][0]:.0f}"


def git_commit() -> str:
    """The checked-out commit, marked if files differ from it; "none" outside a checkout.

    A copy of the files without their history names its commit in the environment variable BENCH_COMMIT.
    """
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or "none"
