"""What is true of the models whose attention stays dense: the ground on which the pass's reasons are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any


class Cause(Enum):
    """Why attention cannot be made sparse, with the reasons that say so truly."""

    BIAS = "adds a bias to the scores that depends on position", ("ADDITIVE_BIAS",)

    def __init__(self, text: str, reasons: tuple[str, ...]) -> None:
        self.text = text
        self.reasons = reasons
