"""Prompts with answers in them, as token ids of an exact length, from which one forward pass scores every answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infllm_pass.errors import EvaluationError

SNAP = 48
"""Tokens within which an insertion moves to the end of a sentence or line."""


@dataclass(frozen=True)
class Answer:
    """One answer inside a sample.

    Attributes:
        text: what has to be answered, without the white space before it.
        start: place of its first token among the sample's tokens.
        stop: place after its last token.
        depth: where in the text the answer stands, from 0 (start) to 1 (end); None where it is no one place.
        choices: first tokens of all answers that are right here; empty: only this one is.
    """

    text: str
    start: int
    stop: int
    depth: float | None = None
    choices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers.

    Attributes:
        task: the task's name.
        seed: what it was drawn with.
        ids: token ids, prompt and answers, one after the other.
        answers: the answers, in order.
    """

    task: str
    seed: int
    ids: tuple[int, ...]
    answers: tuple[Answer, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first answer."""
        return self.ids[: self.answers[0].start]


class Writer:
    """Turns text into tokens.

    Attributes:
        prefix: token ids that come before every text.
    """

    def __init__(self, tokenizer: Any, prefix: Sequence[int] | None = None) -> None:
        """Hold a tokenizer of transformers; `prefix` None: what it puts before a text by itself."""
        self.tokenizer = tokenizer
        self.prefix = self._own_prefix() if prefix is None else tuple(prefix)
        self._ends: dict[int, bool] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(ids)))

    def continuation(self, before: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of `text` where it follows `before`: those of white space alone, and those from the first sign on."""
        known = self.encode(before)
        both = self.encode(before + text)
        ids = both[len(known) :] if both[: len(known)] == known else self.encode(text)
        lead = 0
        while lead < len(ids) - 1 and not self.decode(ids[lead : lead + 1]).strip():
            lead += 1
        return ids[:lead], ids[lead:]

    def ends_sentence(self, token: int) -> bool:
        """Whether a token ends a sentence or a line."""
        if token not in self._ends:
            text = self.decode([token])
            self._ends[token] = "\n" in text or text.endswith((".", "!", "?"))
        return self._ends[token]

    def _own_prefix(self) -> tuple[int, ...]:
        plain = self.encode("a")
        full = list(self.tokenizer("a").input_ids)
        places = (place for place in range(len(full)) if full[place : place + len(plain)] == plain)
        return tuple(full[: next(places, 0)])


@dataclass
class Prompt:
    """A sample while it is written.

    Attributes:
        writer: the tokenizer.
        ids: what was written so far.
        answers: the answers so far.
    """

    writer: Writer
    ids: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    _before: str = ""

    def say(self, text: str) -> None:
        """Append a text."""
        self.ids += self.writer.encode(text)
        self._before = text

    def answer(self, text: str, depth: float | None = None, choices: tuple[int, ...] = (), *, glue: str = " ") -> None:
        """Append an answer after a space, or other `glue`."""
        lead, ids = self.writer.continuation(self._before, f"{glue}{text}")
        start = len(self.ids) + len(lead)
        self.ids += lead + ids
        self.answers.append(Answer(text, start, len(self.ids), depth, choices))
        self._before = text


@dataclass(frozen=True)
class Haystack:
    """Tokens of a real text.

    Attributes:
        name: the text's name.
        content: the text itself.
        ids: its tokens.
    """

    name: str
    content: str
    ids: tuple[int, ...]

    def take(self, count: int, draw: random.Random) -> list[int]:
        """So many neighbouring tokens from a place that is drawn.

        Raises:
            EvaluationError: the text is shorter.
        """
        spare = len(self.ids) - count
        if spare < 0:
            raise EvaluationError(
                f"the text {self.name!r} has {len(self.ids)} tokens and {count} are needed: "
                "give a longer text or lower the length"
            )
        start = draw.randrange(spare + 1)
        return list(self.ids[start : start + count])


def finished(
    task: str,
    seed: int,
    writer: Writer,
    opening: str,
    body: Sequence[int],
    asked: Prompt,
    filler: Sequence[int] = (),
) -> Sample:
    """A sample of prefix, filler, opening, body, and the part with the questions and answers."""
    head = [*writer.prefix, *filler, *writer.encode(opening), *body]
    shifted = (replace(each, start=each.start + len(head), stop=each.stop + len(head)) for each in asked.answers)
    return Sample(task, seed, (*head, *asked.ids), tuple(shifted))


def hidden_in_text(
    task: str,
    writer: Writer,
    text: Haystack,
    length: int,
    opening: str,
    hidden: Sequence[tuple[float, str]],
    asked: Prompt,
    draw: random.Random,
    seed: int,
) -> Sample:
    """A sample with sentences hidden in text, filled up to its length.

    Args:
        task: the task's name.
        writer: the tokenizer.
        text: where the sentences are hidden.
        length: tokens of the sample.
        opening: what comes first.
        hidden: depth and text of each sentence.
        asked: the part with the questions and answers.
        draw: decides the place in the text.
        seed: what the sample was drawn with.

    Raises:
        EvaluationError: it does not fit the length, or the text is too short.
    """
    pieces = [(depth, writer.encode(sentence)) for depth, sentence in hidden]
    needed = sum(len(ids) for _, ids in pieces) + len(asked.ids)
    room = room_for_text(task, length, writer, opening, needed)
    body = inserted(text.take(room, draw), pieces, writer.ends_sentence)
    return finished(task, seed, writer, opening, body, asked)


def room_for_text(task: str, length: int, writer: Writer, opening: str, needed: int) -> int:
    """Tokens of text that a sample of `length` has room for.

    Args:
        task: the task's name.
        length: tokens of the sample.
        writer: the tokenizer.
        opening: what comes first.
        needed: tokens of everything else but the text.

    Raises:
        EvaluationError: there is no room for text.
    """
    fixed = len(writer.prefix) + len(writer.encode(opening)) + needed
    if fixed >= length:
        raise EvaluationError(
            f"{task} needs {fixed} tokens beside the text it hides things in, and a sample has {length}: "
            f"raise the length to {fixed + 1} or more, or ask for less to be hidden"
        )
    return length - fixed


def inserted(
    text: Sequence[int], pieces: Sequence[tuple[float, Sequence[int]]], ends_sentence: Callable[[int], bool]
) -> list[int]:
    """Text with pieces put into it, each at its depth, moved to the end of a sentence or line that is near.

    Args:
        text: token ids.
        pieces: depth from 0 to 1 and token ids of each.
        ends_sentence: whether a token ends a sentence.
    """
    placed = sorted((_place(text, depth, ends_sentence), number) for number, (depth, _) in enumerate(pieces))
    out: list[int] = []
    last = 0
    for place, number in placed:
        out += text[last:place]
        out += pieces[number][1]
        last = place
    return [*out, *text[last:]]


def _place(text: Sequence[int], depth: float, ends_sentence: Callable[[int], bool]) -> int:
    """The place nearest to a depth before which a sentence ends; the place itself where none is near."""
    wanted = round(depth * len(text))
    for distance in range(SNAP):
        for place in (wanted - distance, wanted + distance):
            if place in (0, len(text)) or (0 < place < len(text) and ends_sentence(text[place - 1])):
                return place
    return wanted
