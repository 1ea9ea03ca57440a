"""Tasks that need more than one place of the prompt: tracing variables, common words, frequent words.

The multi-hop and aggregation tasks of RULER (arXiv 2404.06654, sections 3.2 and 3.3), made from any text. Where the
paper accepts answers in any order, the order here follows from the question (tracing, frequent words), or each answer
counts that is right and not yet given (common words): one forward pass can then score them.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence

from infllm_pass.errors import EvaluationError
from infllm_pass.evaluation.samples import Haystack, Prompt, Sample, Writer, finished, hidden_in_text, room_for_text

HOPS = 4
"""Assignments after the first of a chain: the paper's default."""

CHAINS = 2
"""Chains of assignments; one is asked for."""

COMMON = 10
"""Words that `common_words` asks for: the paper's default, as the next."""

LONG_REPEATS = (30, 3)
"""How often a common and an uncommon word stands in the list, from `LONG` tokens on."""

SHORT_REPEATS = (10, 1)
"""The same in shorter lists."""

LONG = 4096

FREQUENT = 3
"""Words that `frequent_words` asks for: the paper's default, as the next two."""

ZIPF = 2.0
"""Exponent of the frequencies of `frequent_words`."""

CODE_LETTERS = 6
"""Letters of a word of `frequent_words`."""

LEAST_CODED = 64
"""Words of its shortest text: the three that are asked for stand in it 9, 4 and 2 times."""


def variable_tracking(writer: Writer, text: Haystack, length: int, *, seed: int) -> Sample:
    """A number is assigned to a variable, that to another, and so on; all that hold the number are asked for."""
    draw = random.Random(f"variable_tracking {seed}")
    names = _names((CHAINS + 1) * (HOPS + 1), draw)
    chains = [names[start : start + HOPS + 1] for start in range(0, len(names), HOPS + 1)]
    numbers = [str(number) for number in draw.sample(range(10_000, 100_000), CHAINS + 1)]
    example = "\n".join(_assignments(numbers[-1], chains[-1]))
    shown = "".join(f" VAR {name}" for name in chains[-1])
    opening = (
        "Variables are assigned in the text below. Remember the assignments. An example:\n\n"
        f"{example}{_chain_question(numbers[-1])}{shown}\n\nThe text:\n\n"
    )
    hidden: list[tuple[float, str]] = []
    depths: list[list[float]] = []
    for number, chain in zip(numbers[:-1], chains[:-1], strict=True):
        depths.append(sorted(draw.random() for _ in chain))
        hidden += [(d, f"\n{line}\n") for d, line in zip(depths[-1], _assignments(number, chain), strict=True)]
    asked = Prompt(writer)
    asked.say(_chain_question(numbers[0]))
    for name, depth in zip(chains[0], depths[0], strict=True):
        asked.say(" VAR")
        asked.answer(name, depth)
    return hidden_in_text("variable_tracking", writer, text, length, opening, hidden, asked, draw, seed)


def _assignments(number: str, chain: Sequence[str]) -> list[str]:
    before = [number, *(f"VAR {name}" for name in chain[:-1])]
    return [f"VAR {name} = {value}" for name, value in zip(chain, before, strict=True)]


def _chain_question(number: str) -> str:
    return (
        f"\n\nQuestion: Which variables hold the value {number}, in the order of their assignment?\n"
        f"Answer: The value {number} is held by"
    )


def _names(count: int, draw: random.Random) -> list[str]:
    """Different names of five capitals."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(string.ascii_uppercase, k=5))] = None
    return list(found)


def common_words(writer: Writer, text: Haystack, length: int, *, seed: int) -> Sample:
    """A numbered list in which `COMMON` words stand ten times as often as the others; these are asked for.

    The words are the text's own. The first token of a common one begins no other word of the list, so that the token
    tells which is meant.
    """
    draw = random.Random(f"common_words {seed}")
    common, others = _words(writer, text, draw)
    often, rarely = LONG_REPEATS if length >= LONG else SHORT_REPEATS
    opening = "\n\nBelow is a numbered list of words. Some stand in it more often than others. Remember those.\n\n"
    firsts = {word: writer.continuation("", f" {word}")[1][0] for word in common}
    asked = Prompt(writer)
    asked.say(f"\n\nQuestion: What are the {COMMON} most common words of the list?\nAnswer: They are 1.")
    left = dict(firsts)
    for number, word in enumerate(common, 1):
        if number > 1:
            asked.say(f" {number}.")
        asked.answer(word, None, tuple(left.values()))
        del left[word]

    def listed(count: int) -> list[int]:
        entries = common * often + others[:count] * rarely
        random.Random(f"order {seed}").shuffle(entries)
        return writer.encode(" ".join(f"{number}. {word}" for number, word in enumerate(entries, 1)))

    least = len(listed(1))
    room = least + room_for_text("common_words", length, writer, opening, len(asked.ids) + least)
    body = _fill(listed, room, 1, len(others))
    filler = text.take(room - len(body), draw)
    return finished("common_words", seed, writer, opening, body, asked, filler)


def _words(writer: Writer, text: Haystack, draw: random.Random) -> tuple[list[str], list[str]]:
    """Common words, and those that no common one shares its first token with, both drawn from the text."""
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text.content)))
    draw.shuffle(words)
    common: dict[int, str] = {}
    others: list[str] = []
    firsts = {word: writer.continuation("", f" {word}")[1][0] for word in words}
    for word in words:
        if len(common) < COMMON and firsts[word] not in common:
            common[firsts[word]] = word
        elif firsts[word] not in common:
            others.append(word)
    others = [word for word in others if firsts[word] not in common]
    if len(common) < COMMON or not others:
        raise EvaluationError(
            f"common_words needs more than {COMMON} words of 4 to 9 small letters that begin differently, and the "
            f"text {text.name!r} has {len(common)}: give a longer text"
        )
    return list(common.values()), others


def frequent_words(writer: Writer, text: Haystack, length: int, *, seed: int) -> Sample:
    """Coded words whose frequencies fall off as the square of their rank; the most frequent are asked for.

    The first rank is taken by dots, which do not count. Words are letters drawn at random, as the paper's.
    """
    draw = random.Random(f"frequent_words {seed}")
    words = ["...", *_codes(max(64, length // 32), draw)]
    opening = "\n\nBelow is a text in a code. Count how often each coded word stands in it, but not the dots.\n\n"
    asked = Prompt(writer)
    asked.say(
        f"\n\nQuestion: What are the {FREQUENT} most frequent coded words, the most frequent first?\nAnswer: They are"
    )
    for place, word in enumerate(words[1 : FREQUENT + 1]):
        if place:
            asked.say(",")
        asked.answer(word)
    weights = [rank**-ZIPF for rank in range(1, len(words) + 1)]

    def coded(count: int) -> list[int]:
        total = sum(weights)
        entries = [w for w, weight in zip(words, weights, strict=True) for _ in range(int(count * weight / total))]
        random.Random(f"order {seed}").shuffle(entries)
        return writer.encode(" ".join(entries))

    least = len(coded(LEAST_CODED))
    room = least + room_for_text("frequent_words", length, writer, opening, len(asked.ids) + least)
    body = _fill(coded, room, LEAST_CODED, length)
    filler = text.take(room - len(body), draw)
    return finished("frequent_words", seed, writer, opening, body, asked, filler)


def _codes(count: int, draw: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(string.ascii_lowercase, k=CODE_LETTERS))] = None
    return list(found)


def _fill(make: Callable[[int], list[int]], room: int, low: int, high: int) -> list[int]:
    """The longest of ``make(low)`` to ``make(high)`` that has at most `room` tokens, found by halving."""
    while low < high:
        middle = (low + high + 1) // 2
        if len(make(middle)) <= room:
            low = middle
        else:
            high = middle - 1
    return make(low)
