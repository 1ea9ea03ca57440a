"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

from infllm_pass.errors import ExportError
from infllm_pass.lowering.export.atomic_file import written_whole


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "figures.json"
    target.write_text("old")
    with written_whole(target) as file:
        file.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    target = tmp_path / "figures.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(target) as file:
        file.write_text(str(1 / 0))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_there_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="cannot be written"), written_whole(tmp_path / "no" / "figures.json") as file:
        file.write_text("new")
