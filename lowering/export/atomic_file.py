"""Output files of exports: path checks before any work, and atomic writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infllm_pass.errors import ExportError


def refuse_unwritable(path: Path, *beside: Path, overwrite: bool) -> None:
    """Check that a file can be written.

    Args:
        path: the file.
        beside: further files that are written with it.
        overwrite: whether existing files are replaced.

    Raises:
        ExportError: one of them exists, or the folder cannot be written to.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the name of a file")
    if not overwrite:
        for file in (path, *beside):
            if file.exists():
                raise ExportError(f"{file} exists: choose another path, or pass overwrite=True")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path.parent} is no folder that can be written to")


@contextmanager
def written_whole(path: Path, *beside: Path) -> Iterator[Path]:
    """A path to write a file to, which is moved to its own place at the end, with those written beside it.

    Raises:
        ExportError: the operating system refuses.
    """
    try:
        # In the same folder, so that moving it into place is one step.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder) / path.name
            for file in (*beside, path):
                written = Path(folder) / file.name
                if written.exists():
                    written.replace(file)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}") from error
