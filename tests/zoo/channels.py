"""What is read of the rotary embedding of each architecture's keys, and what its numbers say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from tests.support.key_channels import KeyChannels, Observer

from .examination import one_line
from .specimens import CannotBuildError, Kind, Specimen, make_batch

Record = dict[str, dict[str, list[str]]]

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


def record() -> Record:
    """The record: for each family and architecture what is read at the sites of its first implementation."""
    found: Record = json.loads(RECORD.read_text())
    return found


def readings(specimen: Specimen) -> list[str]:
    """What is read at the sites of one specimen, equal readings once."""
    return list(dict.fromkeys(keys.text for keys in read_keys(specimen)))


def write_record(places: Iterable[tuple[str, str, Iterable[Specimen]]]) -> None:
    """Read every architecture's first implementation, and bring the record up to date.

    Args:
        places: families, architectures, and their specimens. What cannot be built here keeps its entry.
    """
    found = record() if RECORD.exists() else {}
    for family, architecture, specimens in places:
        try:
            specimen = next(iter(specimens))
            found.setdefault(family, {})[architecture] = readings(specimen)
        except CannotBuildError:
            continue
        except Exception as error:  # a model that Dynamo does not trace has nothing to read
            found.setdefault(family, {})[architecture] = [f"not traced: {one_line(error)}"]
        print(f"{architecture}: {found[family][architecture]}", flush=True)
        RECORD.write_text(dump(found))


def dump(found: Record) -> str:
    """The record as JSON with a line for each architecture."""
    families = []
    for family, entries in found.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
        families.append(f" {json.dumps(family)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(families) + "\n}\n"


def section() -> str:
    """The page's part about keys: a row for each reading, and the architectures that have a site with it."""
    rows: dict[str, list[str]] = {}
    for entries in record().values():
        for architecture, texts in entries.items():
            for text in texts:
                rows.setdefault(_cut(text), []).append(architecture)
    lines = [f"| {text} | {', '.join(names)} |\n" for text, names in sorted(rows.items(), key=lambda row: -len(row[1]))]
    return _SECTION + "".join(lines)


def _cut(text: str) -> str:
    """A reading whose pairs fit a table."""
    words = text.split(" ")
    pairs = [place for place, word in enumerate(words) if "+" in word]
    return " ".join([*words[: pairs[3]], "…", *words[pairs[-1] :]]) if len(pairs) > 16 else text


_SECTION = """
## Channels of the keys

What the pass reads of the rotary embedding of every architecture's keys, which token scores choose their channels by:
pairs of channels, that of the lowest frequency first, and channels without rotation. Models are made small, with heads
of 16 channels mostly; an architecture whose layers differ stands in several rows. Written by
`python -m tests.zoo --channels`.

| keys | architectures |
|---|---|
"""
