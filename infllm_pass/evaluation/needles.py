"""Needles: numbers hidden in real text, and asked for at its end.

The four retrieval tasks of RULER (arXiv 2404.06654, section 3.1), on real text: one number, one number among others
under other keys, several numbers under one key, and several keys asked for one after the other.
"""

from __future__ import annotations

import random

from infllm_pass.evaluation.samples import Haystack, Prompt, Sample, Writer, hidden_in_text

_WORDS = """
anchor balcony candle desert engine feather garden harbour island jungle kettle lantern marble needle orchard pepper
quarry ribbon saddle temple umbrella valley window yacht zebra bridge carpet dragon falcon glacier hammer ivory jacket
ladder mirror nutmeg oyster pillow rabbit silver ticket velvet walnut barrel copper donkey
"""

KEYS = tuple(_WORDS.split())
"""Words that numbers are filed under."""

OPENING = "Secret numbers are hidden in the text below. Remember them, they will be asked for.\n\n"

DISTRACTORS = 7
"""Numbers under other keys beside the one that `needle_multikey` asks for."""

VALUES = 4
"""Numbers that `needle_multivalue` asks for."""

QUERIES = 8
"""Numbers that `needle_multiquery` asks for."""


def needle_single(writer: Writer, text: Haystack, length: int, *, depth: float, digits: int, seed: int) -> Sample:
    """One number in the text."""
    return _keyed("needle_single", writer, text, length, depth, 0, digits, seed)


def needle_multikey(writer: Writer, text: Haystack, length: int, *, depth: float, digits: int, seed: int) -> Sample:
    """A number among `DISTRACTORS` others, filed under other keys."""
    return _keyed("needle_multikey", writer, text, length, depth, DISTRACTORS, digits, seed)


def needle_multiquery(
    writer: Writer, text: Haystack, length: int, *, digits: int, seed: int, asked: int = QUERIES
) -> Sample:
    """Codes of a word and a number: the words are given one by one, in another order than that of the text.

    A code is a word and digits without a space between them, which small models find more surely than a number that is
    named after its key: what sparse attention loses then stands out.
    """
    draw = random.Random(f"needle_multiquery {seed}")
    keys, numbers = draw.sample(KEYS, asked), different_numbers(asked, digits, text.content, draw)
    depths = _spread(asked, draw)
    draw.shuffle(depths)
    prompt = Prompt(writer)
    for key, number, depth in zip(keys, numbers, depths, strict=True):
        prompt.say(f"\n\nQuestion: Which secret code begins with {key}?\nAnswer: One of the secret codes is {key}-")
        prompt.answer(number, depth, glue="")
    codes = [f" One of the secret codes is {key}-{number}." for key, number in zip(keys, numbers, strict=True)]
    hidden = list(zip(depths, codes, strict=True))
    return hidden_in_text("needle_multiquery", writer, text, length, OPENING, hidden, prompt, draw, seed)


def needle_multivalue(writer: Writer, text: Haystack, length: int, *, digits: int, seed: int) -> Sample:
    """`VALUES` numbers under one key, asked for in the order of the text."""
    draw = random.Random(f"needle_multivalue {seed}")
    (key,) = draw.sample(KEYS, 1)
    numbers = different_numbers(VALUES, digits, text.content, draw)
    depths = _spread(VALUES, draw)
    asked = Prompt(writer)
    asked.say(
        f"\n\nQuestion: What are all the secret numbers of the {key}, in the order of the text?\n"
        f"Answer: The secret numbers of the {key} are"
    )
    for place, (number, depth) in enumerate(zip(numbers, depths, strict=True)):
        if place:
            asked.say(",")
        asked.answer(number, depth)
    sentences = [f" One of the secret numbers of the {key} is {number}." for number in numbers]
    hidden = list(zip(depths, sentences, strict=True))
    return hidden_in_text("needle_multivalue", writer, text, length, OPENING, hidden, asked, draw, seed)


def _keyed(
    task: str, writer: Writer, text: Haystack, length: int, depth: float, others: int, digits: int, seed: int
) -> Sample:
    """A number under a key at a depth, and others under other keys anywhere."""
    draw = random.Random(f"{task} {seed}")
    keys, numbers = draw.sample(KEYS, 1 + others), different_numbers(1 + others, digits, text.content, draw)
    depths = [depth, *(draw.random() for _ in range(others))]
    sentences = [f" The secret number of the {k} is {n}." for k, n in zip(keys, numbers, strict=True)]
    asked = Prompt(writer)
    asked.say(
        f"\n\nQuestion: What is the secret number of the {keys[0]}?\nAnswer: The secret number of the {keys[0]} is"
    )
    asked.answer(numbers[0], depth)
    hidden = list(zip(depths, sentences, strict=True))
    return hidden_in_text(task, writer, text, length, OPENING, hidden, asked, draw, seed)


def different_numbers(count: int, digits: int, content: str, draw: random.Random) -> list[str]:
    """Different numbers of so many digits that the text does not hold."""
    found: list[str] = []
    while len(found) < count:
        number = str(draw.randrange(10 ** (digits - 1), 10**digits))
        if number not in content and number not in found:
            found.append(number)
    return found


def _spread(count: int, draw: random.Random) -> list[float]:
    """Depths in ascending order, one drawn from each of `count` equal parts."""
    return [(part + draw.random()) / count for part in range(count)]
