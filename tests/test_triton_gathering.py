"""Gathering the queries of a block instead of visiting the union of a tile's blocks: the same numbers, and the choice."""

from __future__ import annotations

import pytest
import torch

from infllm_pass.kernels import gathering
from infllm_pass.kernels.configurations import GatherLaunch

from . import test_triton_attention as tiles
from .test_triton_attention import Case, _poisoned, last_queries  # noqa: F401
from .triton_device import DEVICE, arrange


@pytest.fixture(autouse=True)
def launch(monkeypatch):
    """Gathering whatever the data, in chunks of few tiles."""
    chosen = GatherLaunch(above=-1.0, pool_bytes=1 << 16, programs=2)
    monkeypatch.setattr(gathering, "gather_launch", lambda *_: chosen)
    return chosen


def case(name: str, **sizes):
    sizes = {"selected_blocks": 7, "length_q": 197, "length_k": 197, **sizes}
    return pytest.param(Case(**sizes), id=name)


@pytest.mark.parametrize(
    "case",
    [
        case("group 4"),
        case("group 3, two heads", group=3, heads_kv=2),
    ],
)
def test_gathered_blocks_match_the_oracle(case):
    tiles.check_last_queries(case)


arrange(globals())
