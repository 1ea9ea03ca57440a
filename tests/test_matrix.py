"""The matrix of versions: what is read off a report, and what the kept results say."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tests import matrix

REPORT = """
<testsuites><testsuite>
  <testcase classname="tests.a" name="fine"/>
  <testcase classname="tests.a" name="broken"><failure message="no"/></testcase>
  <testcase classname="tests.a" name="unmade"><error message="no"/></testcase>
  <testcase classname="tests.b" name="left"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>
"""


def test_a_report_is_counted():
    outcome = matrix.read_report(ElementTree.fromstring(REPORT))
    assert (outcome["passed"], outcome["failed"], outcome["skipped"]) == (1, 2, 1)
    assert outcome["failures"] == ["tests.a::broken", "tests.a::unmade"]
    assert outcome["reasons"] == ["no GPU"]


def test_results_of_other_versions_are_dropped():
    results = {}
    outcome = {"passed": 1, "failed": 0, "skipped": 0, "date": "2026-01-01"}
    row = matrix.ROWS[0]
    matrix.enter(results, row.name, {"torch": "1"}, "tests/masks", outcome)
    matrix.enter(results, row.name, {"torch": "1"}, "tests/sites", outcome)
    assert set(results[row.name]["tests"]) == {"tests/masks", "tests/sites"}
    assert "without" in list(matrix.table(results))[-1]
    matrix.enter(results, row.name, {"torch": "2"}, "tests/sites", outcome)
    assert set(results[row.name]["tests"]) == {"tests/sites"}


def test_an_environment_of_other_versions_is_refused():
    row = matrix.ROWS[0]
    matrix.check_versions(
        row, {"python": f"{row.python}.7", "torch": f"{row.torch}+cpu", "transformers": row.transformers}
    )
    with pytest.raises(SystemExit, match="torch"):
        matrix.check_versions(row, {"python": f"{row.python}.7", "torch": "2.1.0", "transformers": row.transformers})


def test_the_page_shows_the_kept_results():
    results = json.loads(matrix.RESULTS.read_text())
    assert "\n".join(matrix.table(results)) in matrix.PAGE.read_text()
    assert all((matrix.ROOT / folder).is_dir() for row in matrix.ROWS for folder in row.tests)
