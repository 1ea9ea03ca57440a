"""The program of ``examples/cpp``, built and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[1] / "examples" / "cpp"


def build_program(folder: Path) -> Path:
    """Build it in a folder; without CMake the test is skipped."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("no cmake")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for arguments in (["-S", SOURCE, "-B", folder / "build", prefix], ["--build", folder / "build"]):
        done = subprocess.run([cmake, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "logits"


def run_program(program: Path, package: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last of ``ids [1, L]``, computed on their device."""
    text = program.parent / "ids.txt"
    text.write_text(" ".join(map(str, ids[0].tolist())))
    done = subprocess.run([program, package, text, ids.device.type], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.tensor([float(line) for line in done.stdout.splitlines()])
