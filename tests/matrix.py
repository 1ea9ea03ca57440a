"""Runs the compiler part of the suite with other versions of Python, PyTorch and transformers: ``make test-matrix``.

Every row of `ROWS` gets an environment under ``.matrix/``. What its tests say is kept in ``docs/versions.json``, folder
by folder, so that a row can be run in parts; the table in ``docs/versions.md`` is written from it.

    python -m tests.matrix                                    all rows
    python -m tests.matrix torch-2.11 --tests tests/masks     one row, one folder
    python -m tests.matrix torch-2.11 --environment torch-2.11=/opt/venvs/old    packages of an environment that exists
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".matrix"
RESULTS = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

COMPILER = ("compat", "masks", "sites", "plan", "rewrite", "kv_cache", "frontend", "export", "lowering")
MARKERS = "not gpu and not interpreter and not checkpoint"
"""Tests of kernels depend on Triton, and those of the checkpoint on a download."""

BEGIN, END = "<!-- table: python -m tests.matrix -->", "<!-- end of table -->"
PACKAGES = ("torch", "transformers", "triton", "onnx", "onnxscript", "onnxruntime", "numpy", "sympy")


@dataclass(frozen=True)
class Row:
    """Versions to test with, and the folders of tests that are run there.

    Attributes:
        name: how the command line calls it.
        python: version of the interpreter, which is looked for as ``python3.x``.
        torch: version of PyTorch.
        transformers: version of transformers.
        tests: folders of tests.
    """

    name: str
    python: str
    torch: str
    transformers: str
    tests: tuple[str, ...] = tuple(f"tests/{folder}" for folder in COMPILER)


ROWS = (
    Row("torch-2.11", "3.11", "2.11.0", "5.17.0"),
    Row("torch-2.13", "3.11", "2.13.0", "5.23.0"),
    Row("torch-2.14", "3.11", "2.14.1", "5.24.0"),
    Row("torch-2.15", "3.11", "2.15.0", "5.24.0"),
    Row("python-3.10", "3.10", "2.11.0", "5.17.0", ("tests/compat", "tests/sites", "tests/plan")),
    Row("python-3.12", "3.12", "2.11.0", "5.17.0"),
    Row("python-3.13", "3.13", "2.15.0", "5.24.0", ("tests/compat", "tests/sites", "tests/plan")),
)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(row.name for row in ROWS)}; none: all")
    parser.add_argument(
        "--environment",
        action="append",
        default=[],
        metavar="ROW=PATH",
        help="take the packages of the environment at PATH instead of installing them",
    )
    parser.add_argument("--tests", action="append", metavar="PATH", help="folders of tests; none: all of the row's")
    parser.add_argument("--workers", default="2", help="processes for each row")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    options = parser.parse_args(arguments)
    rows = {row.name: row for row in ROWS}
    existing = dict(pair.partition("=")[::2] for pair in options.environment)
    unknown = [name for name in (*options.rows, *existing) if name not in rows]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}: choose from {', '.join(rows)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = False
    for row in [] if options.table else [rows[name] for name in options.rows or rows]:
        python = make_environment(row, existing.get(row.name))
        versions = installed_versions(python)
        check_versions(row, versions)
        for folder in options.tests or row.tests:
            outcome = run_tests(python, row.name, folder, options.workers)
            failed |= bool(outcome["failures"])
            enter(results, row.name, versions, folder, outcome)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_table(results)
    return int(failed)


def make_environment(row: Row, existing: str | None) -> Path:
    """The interpreter of an environment with the row's packages and this checkout, made where there is none."""
    place = FOLDER / row.name
    python, ready = place / "bin" / "python", place / ".ready"
    if not ready.exists():
        base = Path(existing) / "bin" / "python" if existing else find_python(row.python)
        run(base, "-m", "venv", "--clear", place)
        if existing:
            packages = json.loads(run(base, "-c", "import json, site; print(json.dumps(site.getsitepackages()))"))
            (site_packages(python) / "existing.pth").write_text("\n".join(packages) + "\n")
        else:
            run(python, "-m", "pip", "install", "--quiet", *requirements(row))
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", ROOT)
        ready.touch()
    return python


def find_python(version: str) -> str:
    """An interpreter of a version, by its name on the path."""
    name = f"python{version}"
    try:
        run(name, "--version")
    except FileNotFoundError:
        raise SystemExit(f"{name} is not on the path: install it, or give --environment") from None
    return name


def requirements(row: Row) -> list[str]:
    """What a row's environment is made of: the packages of requirements.in, three of them in the row's versions."""
    fixed = ("torch", "triton", "transformers", "ruff", "mypy", "tensorrt-rtx")
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.in").read_text().splitlines())
    others = [line for line in lines if line and re.split(r"[^\w.-]", line)[0] not in fixed]
    return [f"torch=={row.torch}", f"transformers=={row.transformers}", *others]


def site_packages(python: Path) -> Path:
    """Where an environment's packages lie."""
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def installed_versions(python: Path) -> dict[str, str]:
    """The versions of an environment, by package; Python's among them."""
    program = (
        "import json, platform; from importlib.metadata import version, PackageNotFoundError\n"
        "found = {'python': platform.python_version()}\n"
        f"for name in {PACKAGES!r}:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    versions: dict[str, str] = json.loads(run(python, "-c", program))
    return versions


def check_versions(row: Row, versions: Mapping[str, str]) -> None:
    """Refuse an environment that is another row's."""
    asked = {"python": row.python, "torch": row.torch, "transformers": row.transformers}
    for name, version in asked.items():
        if (
            not f"{versions.get(name, '')}.".startswith(f"{version}.")
            and versions.get(name, "").split("+")[0] != version
        ):
            raise SystemExit(f"{row.name} asks for {name} {version}, its environment has {versions.get(name)}")


def run_tests(python: Path, row: str, folder: str, workers: str) -> dict[str, Any]:
    """What the tests of a folder say."""
    report = FOLDER / f"{row}-{folder.replace('/', '-')}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-m", MARKERS, "-p", "no:cacheprovider", f"--junitxml={report}", folder]
    if workers != "0":
        command += ["-n", workers]
    print(f"{row}: {folder}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit(f"{row}: pytest did not finish in {folder}")
    return read_report(ElementTree.parse(report).getroot())


def read_report(report: ElementTree.Element) -> dict[str, Any]:
    """Counts, the names of failing tests, and the reasons of skipped ones, of a report in JUnit's format."""
    cases = list(report.iter("testcase"))
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failures) - len(skipped),
        "failed": len(failures),
        "skipped": len(skipped),
        "failures": sorted({f"{case.get('classname')}::{case.get('name')}" for case in failures}),
        "reasons": sorted({str(case.find("skipped").get("message")) for case in skipped}),  # type: ignore[union-attr]
        "date": datetime.date.today().isoformat(),
    }


def enter(results: dict[str, Any], name: str, versions: Mapping[str, str], folder: str, outcome: Any) -> None:
    """Enter a folder's outcome; a row whose versions have changed begins anew."""
    row = results.setdefault(name, {"versions": versions, "tests": {}})
    if row["versions"] != versions:
        row.update(versions=dict(versions), tests={})
    row["tests"][folder] = outcome


def table(results: Mapping[str, Any]) -> Iterable[str]:
    """The lines of the table: a row for each environment."""
    yield "| Python | torch | transformers | Triton | tests | passed | failed | skipped | date |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        if row.name not in results:
            continue
        versions, tests = results[row.name]["versions"], results[row.name]["tests"]
        missing = [folder for folder in row.tests if folder not in tests]
        part = "compiler part" if len(row.tests) == len(COMPILER) else ", ".join(map(_short, row.tests))
        part += f", without {', '.join(map(_short, missing))}" if missing else ""
        numbers = [sum(outcome[key] for outcome in tests.values()) for key in ("passed", "failed", "skipped")]
        date = max(outcome["date"] for outcome in tests.values())
        named = [versions.get(name, "none") for name in ("python", "torch", "transformers", "triton")]
        yield "| " + " | ".join(map(str, (*named, part, *numbers, date))) + " |"


def _short(folder: str) -> str:
    return folder.removeprefix("tests/")


def write_table(results: Mapping[str, Any]) -> None:
    """Put the table in the place of the page's."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, "", *table(results), "", END + after]))


def run(*command: object) -> str:
    """What a command prints.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
