"""The glossary: each term once, and the terms that it needs are its own."""

from __future__ import annotations

import re
from collections import Counter

from tests.support import ROOT

TEXT = (ROOT / "docs" / "glossary.md").read_text()
ROWS = re.findall(r"^\| (.*\*\*.*?) \| (.*) \|$", TEXT, re.MULTILINE)
TERMS = [term for heads, _ in ROWS for term in re.findall(r"\*\*(.+?)\*\*", heads)]


def test_each_term_stands_once():
    assert len(TERMS) > 60
    assert [term for term, count in Counter(map(str.lower, TERMS)).items() if count > 1] == []


def test_terms_in_meanings_are_explained():
    used = {term for _, meaning in ROWS for term in re.findall(r"\*\*(.+?)\*\*", meaning)}
    assert used <= set(TERMS) | {"decomposition"}


def test_code_that_the_glossary_names_exists():
    sources = "".join(path.read_text() for path in (ROOT / "infllm_pass").rglob("*.py"))
    names = [name for name in re.findall(r"`([A-Za-z_]{4,})`", TEXT) if name not in ("grad_out",)]
    assert [name for name in names if not re.search(rf"\b{name}\b", sources)] == []
