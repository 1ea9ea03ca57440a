"""What is read of the rotary embedding of each architecture's keys, and what its numbers say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from tests.support.key_channels import KeyChannels, Observer

from .specimens import Kind, Specimen, make_batch

RECORD = Path(__file__).parent / "channels.json"
SAME_TOKEN = 7


@torch.no_grad()
def read_keys(specimen: Specimen) -> list[KeyChannels]:
    """The keys of every site of one specimen, for a row of equal tokens: they differ by their positions alone."""
    torch._dynamo.reset()
    model = specimen.build()
    batch = make_batch(Kind.PLAIN)
    batch = replace(batch, ids=torch.full_like(batch.ids, SAME_TOKEN))
    observer = Observer()
    torch.compile(lambda: specimen.call(model, batch), backend=observer)()  # type: ignore[call-overload]
    return observer.found


def record() -> dict[str, dict[str, dict[str, list[str]]]]:
    """The record: for each family, architecture and implementation what is read at its sites, equal ones once."""
    found: dict[str, dict[str, dict[str, list[str]]]] = json.loads(RECORD.read_text())
    return found
