"""What options of commands are read as."""

from __future__ import annotations

import argparse


def natural(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return value


def length_or_auto(text: str) -> int | str:
    """A whole number, or the word "auto"."""
    return text if text == "auto" else natural(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("expected a number of at least 1, got '0'")
    return value
