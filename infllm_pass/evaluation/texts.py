"""Texts to evaluate on: three kinds that every installation has, or files."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from infllm_pass.errors import EvaluationError

LEAST_ENTRY = 2000
"""Characters of a help topic that is taken: shorter ones are lists of cross references."""

CODE_MODULES = ("argparse", "difflib", "inspect", "mailbox", "optparse", "subprocess", "tarfile", "typing", "zipfile")
"""Modules of the standard library, long ones of different subjects, whose source is the text ``code``."""


@dataclass(frozen=True)
class Text:
    """A text to read, and to hide things in.

    Attributes:
        name: what tables call it.
        content: the text.

    Raises:
        EvaluationError: the text holds nothing but white space.
    """

    name: str
    content: str

    def __post_init__(self) -> None:
        if not self.content.strip():
            raise EvaluationError(f"the text {self.name!r} is empty: give a file with text in it")


def standard_texts() -> tuple[Text, ...]:
    """A reference manual, program source and docstrings, which are on every machine that has this package.

    The wording follows the versions of Python and torch, so that perplexities compare within one installation only.
    """
    return (Text("manual", manual()), Text("code", _code()), Text("docstrings", _docstrings()))


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> tuple[Text, ...]:
    """Texts from UTF-8 files, named after them.

    Raises:
        EvaluationError: a file cannot be read, is no text, or is empty.
    """
    texts: list[Text] = []
    for path in map(Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{path} cannot be read as UTF-8 text: {error}") from error
        texts.append(Text(_new_name(path.stem, texts), content))
    return tuple(texts)


def _new_name(stem: str, texts: Sequence[Text]) -> str:
    taken = {text.name for text in texts}
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, len(texts) + 2))
    return next(name for name in names if name not in taken)


def manual() -> str:
    """The long help topics of Python, which follow its version."""
    from pydoc_data.topics import topics

    return "\n\n".join(entry for entry in topics.values() if len(entry) > LEAST_ENTRY)


def _code() -> str:
    """Source of the standard library."""
    folder = Path(os.__file__).parent
    files = (folder / f"{name}.py" for name in CODE_MODULES)
    found = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    if not found:
        raise EvaluationError(f"{folder} holds no source of the standard library: name texts of your own")
    return "\n\n".join(found)


def _docstrings() -> str:
    """The docstrings of ``torch.nn.modules``, in the order of files and lines."""
    folder = Path(torch.__file__).parent / "nn" / "modules"
    found: list[str] = []
    for file in sorted(folder.glob("*.py")):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        found += filter(None, map(ast.get_docstring, nodes))
    if not found:
        raise EvaluationError(f"{folder} holds no docstrings: name texts of your own")
    return "\n\n".join(found)
