"""Chained lookups: what is found in one place says where to look next.

After the multi-hop tracing of RULER (arXiv 2404.06654, section 3.2), but with links of two kinds in any order of the
text, so that every step is a search of its own through the whole prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from infllm_pass.evaluation.needles import different_numbers
from infllm_pass.evaluation.samples import Haystack, Prompt, Sample, Writer, hidden_in_text

_OWNERS = "Anna Boris Clara David Elena Felix Greta Henry Irene Jakob Karin Leo Marta Nils Olga Peter"

_FOUND = "clock coin crown diary flute globe harp map medal photo ring scarf statue stamp telescope watch"

OWNERS = tuple(_OWNERS.split())
"""Whose lockers chains begin at."""

FOUND = tuple(_FOUND.split())
"""What chains end with."""

CHAINS = 3
"""Chains in the text; one is asked for."""

ROUNDS = 2
"""How often a chain goes from a key to a box."""

DIGITS = 5
"""Digits of the number of a key or a box."""


def chained_lookups(writer: Writer, text: Haystack, length: int, *, seed: int) -> Sample:
    """From a locker to a key, from the key to a box, from there to the next key: every stop is asked for in turn."""
    draw = random.Random(f"chained_lookups {seed}")
    owners, found = draw.sample(OWNERS, CHAINS + 1), draw.sample(FOUND, CHAINS + 1)
    stops = 2 * ROUNDS
    numbers = different_numbers((CHAINS + 1) * stops, DIGITS, text.content, draw)
    chains = [[*numbers[n * stops : (n + 1) * stops], thing] for n, thing in enumerate(found)]
    example = "".join(f"{name} {stop}{after}" for name, stop, after in _stops(chains[-1]))
    opening = (
        "Lockers, keys and boxes are described in the text below. Remember where each of them leads. An example:\n\n"
        f"{''.join(_links(owners[-1], chains[-1])).strip()}{_question(owners[-1])}{example}\n\nThe text:\n\n"
    )
    hidden: list[tuple[float, str]] = []
    for owner, chain in zip(owners[:-1], chains[:-1], strict=True):
        hidden += [(draw.random(), link) for link in _links(owner, chain)]
    asked = Prompt(writer)
    asked.say(_question(owners[0]))
    for (name, stop, after), (depth, _) in zip(_stops(chains[0]), hidden, strict=False):
        asked.say(name)
        asked.answer(stop, depth)
        if stop != chains[0][-1]:
            asked.say(after)
    return hidden_in_text("chained_lookups", writer, text, length, opening, hidden, asked, draw, seed)


def _links(owner: str, chain: Sequence[str]) -> list[str]:
    """The sentences of a chain, each of which has the chain's next stop."""
    links = [f" The locker of {owner} holds key {chain[0]}."]
    for number, (here, there) in enumerate(pairwise(chain[:-1])):
        links.append(f" Box {here} holds key {there}." if number % 2 else f" Key {here} opens box {there}.")
    return [*links, f" Box {chain[-2]} holds the {chain[-1]}."]


def _question(owner: str) -> str:
    return f"\n\nQuestion: Where does the locker of {owner} lead, step by step?\nAnswer: The locker of {owner} leads to"


def _stops(chain: Sequence[str]) -> list[tuple[str, str, str]]:
    """What each stop is called in the answer, the stop, and what comes after it."""
    names = [" key", " box"] * ROUNDS + [" the"]
    return list(zip(names, chain, [","] * (len(chain) - 1) + ["."], strict=True))
