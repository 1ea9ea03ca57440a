"""The program of ``examples/cpp``, which runs a package without Python: building and running it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parents[1] / "examples" / "cpp"


def build_program(folder: Path) -> Path:
    """Build the program in a folder.

    Raises:
        FileNotFoundError: there is no CMake.
        subprocess.CalledProcessError: building fails.
    """
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=places)
    if cmake is None:
        raise FileNotFoundError("no cmake")
    package = f"-DTORCH={torch.__path__[0]}"
    for arguments in (["-S", str(SOURCE), "-B", str(folder / "build"), package], ["--build", str(folder / "build")]):
        subprocess.run([cmake, *arguments], check=True, capture_output=True, text=True)
    return folder / "build" / "logits"


def run_program(program: Path, package: Path, ids: Tensor) -> Tensor:
    """Logits of the last token, computed on the device of ``ids [1, L]``.

    Raises:
        subprocess.CalledProcessError: the program fails.
    """
    text = program.parent / "ids.txt"
    text.write_text(" ".join(map(str, ids[0].tolist())))
    command = [str(program), str(package), str(text), ids.device.type]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return torch.tensor([float(line) for line in done.stdout.splitlines()])
