"""Soundness of the mask prover: what is proved of random mask programs is what they compute."""

from __future__ import annotations

import pytest

from tests.support.mask_programs import run_many

PROGRAMS = 50
"""For each part; ``python -m tests.support.mask_programs`` runs 20 000."""


@pytest.mark.parametrize("part", range(4))
def test_no_random_program_is_proved_wrongly(part):
    verdicts = run_many(range(part * PROGRAMS, (part + 1) * PROGRAMS))
    proved = {
        verdict: n for verdict, n in verdicts.items() if verdict not in ("unproven", "no program", "not compared")
    }
    assert sum(proved.values()) > PROGRAMS // 4, "the programs are too wild to say anything"
    assert verdicts["unproven"] > PROGRAMS // 4, "the programs are too tame to say anything"
    for ingredient in ("causal", "padded keys", "window", "packed sequences"):
        assert any(ingredient in verdict for verdict in proved), ingredient
