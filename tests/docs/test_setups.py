"""The table of set-ups: the tests that it names are there."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support import ROOT

NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "setups.md").read_text())


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_a_test_that_a_row_names_is_there(path, name):
    tree = ast.parse((ROOT / path).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions


def test_every_row_names_tests():
    rows = [line for line in (ROOT / "docs" / "setups.md").read_text().splitlines() if line.startswith("| ")]
    without = [row for row in rows if "`tests/" not in row and not row.startswith("| set-up")]
    assert len(rows) > 25
    assert not without
