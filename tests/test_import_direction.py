"""Imports go in one direction, from room to room and from module to module."""

import pytest

from tests.support import ROOT
from tests.support.import_graph import circle, imports, misspelt, modules, upward

ROOMS = (
    "errors",
    "tables",
    "stages",
    "compat",
    "kernels",
    "config",
    "lowering",
    "reasons",
    "graph",
    "masks",
    "sites",
    "plan",
    "emit",
    "kv_cache",
    "rewrite",
    "runtime",
    "calibration",
    "frontend",
    "export",
    "evaluation",
    "adaptation",
    "",
    "tools",
)
"""Each may import those before it; "" is the package itself, the public surface."""

RELATIVE = ("kernels", "lowering")
"""Their folders stand beside the package's: only relative imports can be followed by tools that read files."""

FOLDERS = {
    "infllm_pass": ROOT / "infllm_pass",
    "infllm_pass.kernels": ROOT / "kernels",
    "infllm_pass.lowering": ROOT / "lowering",
}


@pytest.fixture(scope="module")
def found():
    return list(imports(modules(FOLDERS)))


def test_every_folder_is_read(found):
    assert len(found) > 400
    assert {each.importer.split(".")[1] for each in found if "." in each.importer} >= {"kernels", "lowering", "tools"}


def test_rooms_import_only_those_before_them(found):
    assert upward(found, ROOMS) == []


def test_no_modules_import_one_another(found):
    assert circle(found) == []


def test_imports_are_relative_within_kernels_and_lowering_only(found):
    assert misspelt(found, RELATIVE) == []


def tree(folder, **files):
    """The imports of a small package ``p`` with these modules, dots in names written as double underscores."""
    for name, text in {"__init__": "", **files}.items():
        file = folder / f"{name.replace('___', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return list(imports(modules({"p": folder})))


ORDER = ("low", "high", "")


@pytest.mark.parametrize(
    "text",
    [
        "from p.high.b import x",
        "import p.high.b",
        "from p.high import b",
        "def f():\n    from p.high.b import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.high.b import x",
        "from ..high.b import x",
        "from p import high",
        "import p",
    ],
)
def test_an_import_upwards_is_found(tmp_path, text):
    found = tree(tmp_path, low___a=text, high___b="from p.low.c import y", low___c="y = 1")
    assert len(upward(found, ORDER)) == 1
    assert "p.low.a, line" in upward(found, ORDER)[0]


def test_imports_downwards_are_right(tmp_path):
    found = tree(tmp_path, low___a="import os", high___b="from p.low.a import os", __main__="")
    assert upward(found, ORDER) == []
    assert [(each.importer, each.imported) for each in found] == [("p.high.b", "p.low.a")]


def test_a_room_that_is_not_listed_is_found(tmp_path):
    (wrong,) = upward(tree(tmp_path, new___a="from p.low.b import x", low___b="x = 1"), ORDER)
    assert "new has no place" in wrong


def test_a_circle_within_a_room_is_found(tmp_path):
    found = tree(
        tmp_path, low___a="from p.low.b import x", low___b="def f():\n    from p.low import c", low___c="import p.low.a"
    )
    assert upward(found, ORDER) == []
    assert {"p.low.a", "p.low.b", "p.low.c"} == set(circle(found))
    assert circle(tree(tmp_path / "straight", low___a="from p.low.b import x", low___b="x = 1")) == []


def test_spellings_of_imports_are_told_apart(tmp_path):
    found = tree(
        tmp_path, low___a="from .b import x", low___b="x = 1", high___c="from p.high.d import y", high___d="y = 1"
    )
    assert misspelt(found, ["low"]) == []
    assert [text.split(",")[0] for text in misspelt(found, ["high"])] == ["p.high.c", "p.low.a"]
    assert [text.split(",")[0] for text in misspelt(found, ["low", "high"])] == ["p.high.c"]
