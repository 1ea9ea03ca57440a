"""Masks that cross graphs: random models with random breaks give what they give uncompiled."""

from __future__ import annotations

import pytest

from tests.support.break_programs import run_many

PROGRAMS = 8
"""For each part; ``python -m tests.support.break_programs --programs 5000`` runs many."""


@pytest.mark.parametrize("part", range(2))
def test_no_random_model_is_wrong(part):
    seen = run_many(range(1 + part * PROGRAMS, 1 + (part + 1) * PROGRAMS))
    assert seen["sparse"] > PROGRAMS // 2
    assert seen["read"] > PROGRAMS // 2
