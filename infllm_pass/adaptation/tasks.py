"""Synthetic tasks to train on: something is hidden in a document, and found again at its end.

They ask for what the tasks of `infllm_pass.evaluation` ask for, in other words, of other things and with numbers of
other sizes, so that an evaluation after the training sees nothing that was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from infllm_pass.adaptation.documents import Documents
from infllm_pass.errors import AdaptationError
from infllm_pass.evaluation.samples import Writer, inserted

_COLOURS = "amber azure beige black blue brown coral cyan green grey lilac ochre olive pink plum red teal"

_THINGS = """
acrobat almond beacon bonnet cactus cradle daisy drawer easel ember ferry fiddle goblet gravel hatchet hazel igloo
inkwell jigsaw juniper kayak kernel lobster locket magnet mitten napkin noodle otter parrot pretzel quilt raven rocket
sandal shovel teapot tractor urchin vase walrus whistle xylophone yarn zipper
"""

COLOURS, THINGS = tuple(_COLOURS.split()), tuple(_THINGS.split())
"""Numbers are filed under a colour and a thing: none of the keys that evaluations use."""

DIGITS = (4, 6, 8, 9)
"""How many digits a number has: never the five or seven of an evaluation."""

TOKENS_PER_NUMBER = 300
"""Tokens of a row for each of several numbers that are hidden in it."""

MOST_NUMBERS = 32

MOST_ASKED = 12
"""Numbers that are asked for in one row: more answers to learn from than one."""

SYLLABLES = ("ba", "da", "fe", "gi", "ho", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")
"""Made-up names have three of them."""

SHORT_ROW = 1024
"""Shorter rows have two chains of two steps."""

ATTEMPTS = 12
"""How often a sample is drawn that does not fit its row: as for rows of half the length, a quarter, and an eighth."""

CHECKED = 32
"""Draws of a task as for an eighth of a row, all of which have to fit before a run begins."""


@dataclass(frozen=True)
class Hidden:
    """What a sample holds beside its text.

    Attributes:
        opening: what comes before the text.
        sentences: what is hidden, in the order of the text.
        closing: what comes after it, the answers included.
    """

    opening: str
    sentences: tuple[str, ...]
    closing: str


@dataclass(frozen=True)
class _Wording:
    """One way to hide numbers and to ask for them; each text gets the fields ``key`` and ``number``."""

    opening: str
    sentence: str
    ask: str


_NUMBERED = (
    _Wording(
        "Some figures are noted on the following pages, to be looked up when the pages are over.\n\n",
        " Noted here: for the {key}, figure {number}.",
        "Which figure was noted for the {key}? {number}\n",
    ),
    _Wording(
        "The record below was kept by a clerk, who wrote passcodes between its lines.\n\n",
        "\n[passcode, {key}: {number}]\n",
        "passcode, {key} -> {number}\n",
    ),
    _Wording(
        "# settings are spread over this file\n\n",
        '\nset_value("{key}", {number})\n',
        '>>> get_value("{key}")\n{number}\n',
    ),
    _Wording(
        "Phone extensions of some shops appear along the way. A list of them follows at the end.\n\n",
        " To reach the shop called {key}, dial {number}.",
        "The shop called {key} has extension {number}.\n",
    ),
)


def single_needle(length: int, draw: random.Random) -> Hidden:
    """One number under one key."""
    return _numbers(1, 1, draw)


def multi_key_needle(length: int, draw: random.Random) -> Hidden:
    """Numbers under different keys, up to `MOST_NUMBERS`; up to `MOST_ASKED` are asked for, in another order."""
    count = max(2, min(MOST_NUMBERS, length // TOKENS_PER_NUMBER))
    return _numbers(count, min(count, MOST_ASKED), draw)


def _numbers(count: int, asked: int, draw: random.Random) -> Hidden:
    wording = draw.choice(_NUMBERED)
    pairs = draw.sample(range(len(COLOURS) * len(THINGS)), count)
    keys = [f"{COLOURS[pair % len(COLOURS)]} {THINGS[pair // len(COLOURS)]}" for pair in pairs]
    numbers = _different_numbers(count, draw)
    filed = list(zip(keys, numbers, strict=True))
    sentences = tuple(wording.sentence.format(key=key, number=number) for key, number in filed)
    asks = "".join(wording.ask.format(key=key, number=number) for key, number in draw.sample(filed, asked))
    return Hidden(wording.opening, sentences, f"\n\n{asks}")


def variable_tracking(length: int, draw: random.Random) -> Hidden:
    """A number is put into one name, that name's into another, and so on; all names of a number are listed."""
    count, hops = _chain_sizes(length, draw)
    names = _different_names(count * (hops + 1), draw)
    chains = [names[start : start + hops + 1] for start in range(0, len(names), hops + 1)]
    numbers = _different_numbers(count, draw)
    first, then, listed = draw.choice(
        (
            (" Jar {name} was filled with {value} beads.", " Jar {name} got as many as jar {value}.", "{} beads: {}\n"),
            ("\nlet {name} := {value};\n", "\nlet {name} := {value};\n", "# equal to {}: {}\n"),
            ("\n(cell {name} <- {value})\n", "\n(cell {name} <- cell {value})\n", "cells with {}: {}\n"),
        )
    )
    steps: list[list[str]] = []
    for number, chain in zip(numbers, chains, strict=True):
        told = [first.format(name=chain[0], value=number)]
        told += [then.format(name=name, value=before) for before, name in pairwise(chain)]
        steps.append(told)
    answers = [listed.format(number, ", ".join(chain)) for number, chain in zip(numbers, chains, strict=True)]
    opening = "Values are copied from name to name in what follows; all copies are listed after it.\n\n"
    return Hidden(opening, tuple(_merged(steps, draw)), "\n\n" + "".join(draw.sample(answers, min(2, count))))


def chained_lookups(length: int, draw: random.Random) -> Hidden:
    """Each of several entries names the next one, in any order of the text; trails of them are followed to the end."""
    count, hops = _chain_sizes(length, draw)
    entries = _different_numbers(count * (hops + 1), draw)
    ends = draw.sample(THINGS, count)
    onward, last, followed, finish = draw.choice(
        (
            (
                " After the stop at {here} the tram goes on to {there}.",
                " At the stop of {here} the tram ends, beside the {end}.",
                "Tram from {}: ",
                "beside the {}",
            ),
            ("\n{here}: see {there}\n", "\n{here}: final entry, {end}\n", "Trail of {}: ", "final entry, {}"),
            (
                " Page {here} sends its reader to page {there}.",
                " Page {here} shows a drawing of the {end}.",
                "Reading from page {} on: ",
                "drawing of the {}",
            ),
        )
    )
    sentences: list[str] = []
    answers: list[str] = []
    for number, end in enumerate(ends):
        chain = entries[number * (hops + 1) : (number + 1) * (hops + 1)]
        sentences += [onward.format(here=a, there=b) for a, b in pairwise(chain)]
        sentences.append(last.format(here=chain[-1], end=end))
        answers.append(followed.format(chain[0]) + ", ".join([*chain[1:], finish.format(end)]) + "\n")
    draw.shuffle(sentences)
    opening = "Entries of a network are scattered over these lines, each of which leads to another one.\n\n"
    return Hidden(opening, tuple(sentences), "\n\n" + "".join(draw.sample(answers, min(2, count))))


TRAINING_TASKS: dict[str, Callable[[int, random.Random], Hidden]] = {
    "single_needle": single_needle,
    "multi_key_needle": multi_key_needle,
    "variable_tracking": variable_tracking,
    "chained_lookups": chained_lookups,
}
"""The tasks by name; each takes the tokens of a row and what decides."""


class Sampler:
    """Makes samples of tasks out of documents.

    Args:
        writer: the documents' tokenizer.
        documents: what things are hidden in.
    """

    def __init__(self, writer: Writer, documents: Documents) -> None:
        self._writer = writer
        self._documents = documents
        stops = torch.cat([documents.starts[1:], torch.tensor([len(documents.ids)])])
        ended = documents.ids[stops - 1] == (
            -1 if writer.tokenizer.eos_token_id is None else writer.tokenizer.eos_token_id
        )
        self._stops = stops - ended.long()

    def sample(self, task: str, length: int, draw: random.Random) -> list[int]:
        """The tokens of a sample, exactly `length`.

        Args:
            task: a name out of `TRAINING_TASKS`.
            length: tokens of the sample.
            draw: what decides.

        Raises:
            AdaptationError: what is hidden does not fit.
        """
        for attempt in range(ATTEMPTS):
            head, pieces, tail = self._written(task, length // min(2**attempt, 8), draw)
            room = length - len(head) - len(tail) - sum(map(len, pieces))
            if room > 0:
                break
        else:
            raise _too_short(task, length, length - room)
        text = self._text(room, draw)
        depths = sorted(draw.random() for _ in pieces)
        body = inserted(text, list(zip(depths, pieces, strict=True)), self._writer.ends_sentence)
        return [*head, *body, *tail]

    def check(self, task: str, length: int) -> None:
        """Refuse a task that may not fit a row.

        Raises:
            AdaptationError: one of `CHECKED` draws does not.
        """
        for seed in range(CHECKED):
            head, pieces, tail = self._written(task, length // 8, random.Random(seed))
            needed = len(head) + len(tail) + sum(map(len, pieces))
            if needed >= length:
                raise _too_short(task, length, needed)

    def _written(self, task: str, length: int, draw: random.Random) -> tuple[list[int], list[list[int]], list[int]]:
        """The tokens before the text, those of each sentence, and those after the text."""
        hidden = TRAINING_TASKS[task](length, draw)
        head = [*self._writer.prefix, *self._writer.encode(hidden.opening)]
        return head, [self._writer.encode(each) for each in hidden.sentences], self._writer.encode(hidden.closing)

    def _text(self, count: int, draw: random.Random) -> list[int]:
        """So many tokens from any place of a document that is long enough; where none is, of several in a row."""
        ids, starts = self._documents.ids, self._documents.starts
        places = (self._stops - starts - count + 1).clamp(min=0).cumsum(0)
        if int(places[-1]):
            place = draw.randrange(int(places[-1]))
            number = int(torch.searchsorted(places, place, right=True))
            begin = int(self._stops[number]) - count - (int(places[number]) - 1 - place)
            return list(ids[begin : begin + count].tolist())
        number = draw.randrange(len(starts))
        found: list[int] = []
        while len(found) < count:
            found += ids[int(starts[number]) : int(self._stops[number])].tolist()
            number = (number + 1) % len(starts)
        return found[:count]


def _too_short(task: str, length: int, needed: int) -> AdaptationError:
    return AdaptationError(
        f"the task {task} takes {needed} tokens beside the text it hides things in, and a row has {length}: "
        "take longer rows, or leave the task out"
    )


def _chain_sizes(length: int, draw: random.Random) -> tuple[int, int]:
    """How many chains, and how many steps after the first each has."""
    return (2, 2) if length < SHORT_ROW else (draw.randint(2, 4), draw.randint(2, 6))


def _merged(chains: Sequence[Sequence[str]], draw: random.Random) -> list[str]:
    """The steps of all chains in one order, in which each chain's come one after the other."""
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    draw.shuffle(turns)
    left = [iter(chain) for chain in chains]
    return [next(left[number]) for number in turns]


def _different_numbers(count: int, draw: random.Random) -> list[str]:
    """So many different numbers, all of as many digits."""
    digits = draw.choice(DIGITS)
    return [str(number) for number in draw.sample(range(10 ** (digits - 1), 10**digits), count)]


def _different_names(count: int, draw: random.Random) -> list[str]:
    """So many different made-up words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(SYLLABLES, k=3))] = None
    return list(found)
