"""What compile caches have to know of the code behind the operators.

A cache knows an operator by its name and arguments: a graph that it kept could hold kernels, or rely on layouts of
results, that the code no longer has. The hash is part of every call's geometry (`attention_args.geometry_text`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import infllm_pass.kernels


def source_files() -> list[Path]:
    """Every file of the kernels and of the operators: Python, C++ and tables, whatever folder they are in."""
    folders = (Path(infllm_pass.kernels.__path__[0]), Path(__file__).parent)
    files = (file for folder in folders for file in sorted(folder.rglob("*")))
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


def _hash() -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in source_files())).hexdigest()[:16]


SOURCES = _hash()
"""A hash of `source_files`."""
