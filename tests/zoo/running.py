"""Running the zoo: every architecture in a worker process with a time limit, so that none can stop the others."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import huggingface, packages, written
from .examination import Finding, examine, one_line
from .specimens import CannotBuildError, Kind, Specimen

FAMILIES = {"transformers": huggingface, "written for the tests": written, "packages": packages}
ROOT = Path(__file__).parents[2]
LIMIT_S = 900.0
"""Seconds that one architecture may take; the slowest take two minutes of a processor."""
PROCESS_LIFE = 25
"""Architectures that one process examines. Compiled code and caches stay with it, 40 MB for an architecture."""


@dataclass(frozen=True)
class Result:
    """What was found for one architecture.

    Attributes:
        family: where it comes from.
        architecture: its name.
        findings: by implementation and kind of batch.
        unbuilt: why it cannot be built; "" where it can.
        lost: whether its process gave no answer, so that nothing was found.
    """

    family: str
    architecture: str
    findings: dict[str, dict[str, Finding]]
    unbuilt: str = ""
    lost: bool = False

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        findings = {
            implementation: {kind: Finding(**finding) for kind, finding in kinds.items()}
            for implementation, kinds in values.pop("findings").items()
        }
        return cls(findings=findings, **values)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @property
    def place(self) -> tuple[str, str]:
        """Family and architecture, as in `names`."""
        return self.family, self.architecture

    def decisions(self) -> dict[str, Any]:
        """What must not drift."""
        return {
            implementation: {kind: finding.decision() for kind, finding in kinds.items()}
            for implementation, kinds in self.findings.items()
        }


def names() -> list[tuple[str, str]]:
    """Family and architecture of everything in the zoo, in the table's order."""
    return [(family, name) for family, module in FAMILIES.items() for name in module.architectures()]


def run_architecture(family: str, architecture: str) -> Result:
    """Build an architecture and examine it in every implementation and batch; exceptions become findings."""
    module = FAMILIES[family]
    findings: dict[str, dict[str, Finding]] = {}
    try:
        for specimen in module.specimens(architecture):  # type: ignore[attr-defined]
            findings[specimen.implementation] = examine_all(specimen)
    except CannotBuildError as error:
        return Result(family, architecture, findings, str(error))
    return Result(family, architecture, findings)


def examine_all(specimen: Specimen) -> dict[str, Finding]:
    """Examine a specimen in every batch that it takes; gradients where the batch is plain and CPUs have them."""
    found = {}
    for kind in specimen.kinds:
        gradients = kind is Kind.PLAIN and specimen.implementation != "flex_attention"
        try:
            found[kind.value] = examine(specimen, kind, gradients=gradients)
        except Exception as error:
            found[kind.value] = Finding(error=one_line(error))
    return found


def run_zoo(wanted: Iterable[tuple[str, str]], workers: int) -> Iterator[Result]:
    """Examine architectures in worker processes; results come as they are ready."""
    spare: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for _ in range(workers):
        spare.put(_Worker())

    def examine_one(place: tuple[str, str]) -> Result:
        worker = spare.get()
        try:
            return worker.ask(*place)
        finally:
            spare.put(worker)

    try:
        with ThreadPoolExecutor(workers) as pool:
            for done in as_completed([pool.submit(examine_one, place) for place in wanted]):
                yield done.result()
    finally:
        for _ in range(workers):
            spare.get().stop()


class _Worker:
    """A process that examines one architecture after another; a new one takes over where one was lost or is old."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._examined = 0

    def ask(self, family: str, architecture: str) -> Result:
        if self._examined == PROCESS_LIFE:
            self.stop()
        if self._process is None:
            command = [sys.executable, "-m", "tests.zoo", "--worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            self._examined += 1
            print(json.dumps([family, architecture]), file=process.stdin, flush=True)
            ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = [process.stdout], ""
        if line:
            return Result.from_json(line)
        self.stop()
        why = "its process died" if ready else f"it took longer than {LIMIT_S:.0f} s"
        return Result(family, architecture, {}, why, lost=True)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self._examined = None, 0


def serve() -> None:
    """The worker's side: read architectures from standard input, write results to standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print does not get between the answers
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        print(run_architecture(*json.loads(line)).to_json(), file=answers, flush=True)
