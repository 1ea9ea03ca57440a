"""The imports of a package's modules, read off their source, and what is wrong with their directions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One import of one module by another, both of the package.

    Attributes:
        importer: dotted name.
        imported: dotted name of a module or a package.
        line: where it stands.
        relative: whether it is written with dots.
    """

    importer: str
    imported: str
    line: int
    relative: bool


def modules(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Every module by its dotted name.

    Args:
        folders: for each package, where its files are; a package may lie within another one's name.
    """
    found: dict[str, Path] = {}
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


def imports(files: Mapping[str, Path]) -> Iterator[Import]:
    """Every import among these modules: at the top, in functions, and for type checkers only."""
    for name, file in files.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if (module := _module(alias.name, files)) is not None:
                        yield Import(name, module, node.lineno, False)
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    if (module := _module(f"{source}.{alias.name}", files)) is not None:
                        yield Import(name, module, node.lineno, node.level > 0)


def _module(name: str, files: Mapping[str, Path]) -> str | None:
    """The module that a dotted name is, or is an attribute of; None: it is of another package."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def room_of(module: str) -> str:
    """The part of the package that a module belongs to; "" for the package itself."""
    return [*module.split("."), ""][1]


def upward(found: Sequence[Import], rooms: Sequence[str]) -> list[str]:
    """Imports of a room by one that stands before it, and modules of no known room.

    Args:
        found: the imports.
        rooms: their order: each may import those before it; "" stands for the package itself.
    """
    wrong = []
    for each in found:
        importer, imported = room_of(each.importer), room_of(each.imported)
        unknown = [room for room in (importer, imported) if room not in rooms]
        if unknown:
            wrong.append(f"{_place(each)}: {unknown[0]} has no place in the order")
        elif rooms.index(imported) > rooms.index(importer):
            wrong.append(f"{_place(each)}: {importer or 'the package'} stands before {imported or 'the package'}")
    return wrong


def circle(found: Sequence[Import]) -> list[str]:
    """Modules that import one another in a circle; none: []. A package is no circle with what it holds."""
    graph: dict[str, set[str]] = {}
    for each in found:
        inside = each.imported.startswith(f"{each.importer}.") or each.importer.startswith(f"{each.imported}.")
        if not inside and each.imported != each.importer:
            graph.setdefault(each.importer, set()).add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def misspelt(found: Sequence[Import], relative_rooms: Sequence[str]) -> list[str]:
    """Imports within one of these rooms that are not relative, and relative ones anywhere else."""
    wrong = []
    for each in found:
        same = room_of(each.importer) == room_of(each.imported)
        expected = same and room_of(each.importer) in relative_rooms
        if each.relative is not expected:
            wrong.append(f"{_place(each)}: {'relative' if each.relative else 'absolute'} import of {each.imported}")
    return wrong


def _place(each: Import) -> str:
    return f"{each.importer}, line {each.line}"
