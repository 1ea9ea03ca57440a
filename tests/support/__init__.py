"""What tests share: inputs, oracles, and runners of kernels without a GPU."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
