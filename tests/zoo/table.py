"""The zoo's results as a table for people, and as decisions that tests compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .running import ROOT, Result

TABLE = ROOT / "docs" / "zoo.md"
DECISIONS = Path(__file__).parent / "expected.json"


def decisions(results: Sequence[Result]) -> dict[str, Any]:
    """What must not drift, by family and architecture."""
    found: dict[str, Any] = {}
    for result in results:
        entry = {"unbuilt": result.unbuilt} if result.unbuilt else result.decisions()
        found.setdefault(result.family, {})[result.architecture] = entry
    return found


def markdown(results: Sequence[Result]) -> str:
    return ""
