"""Random attentions with score terms: whatever the pass decides, results stay the program's own."""

from __future__ import annotations

import pytest

from tests.support.term_programs import run_many

PROGRAMS = 15
"""For each part; ``python -m tests.support.term_programs`` runs 2 000."""


@pytest.mark.parametrize("part", range(3))
def test_terms_are_read_right_or_not_at_all(part):
    found = run_many(range(part * PROGRAMS, (part + 1) * PROGRAMS))
    assert found["SWITCHABLE"] >= 2
    assert sum(found.values()) - found["SWITCHABLE"] >= 2
