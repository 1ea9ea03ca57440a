"""The tasks by name, and the samples of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from infllm_pass.errors import ConfigError, EvaluationError
from infllm_pass.evaluation import lists, lookups, needles
from infllm_pass.evaluation.samples import Haystack, Sample, Writer
from infllm_pass.evaluation.texts import Text

Maker = Callable[..., Sample]

AT_DEPTH: dict[str, Maker] = {
    "needle_single": needles.needle_single,
    "needle_multikey": needles.needle_multikey,
}
"""Tasks with one answer, which is hidden at a depth that is asked for."""

OF_NUMBERS: dict[str, Maker] = {
    "needle_multivalue": needles.needle_multivalue,
    "needle_multiquery": needles.needle_multiquery,
}
"""Tasks with several numbers, at depths that are drawn."""

OF_WORDS: dict[str, Maker] = {
    "variable_tracking": lists.variable_tracking,
    "chained_lookups": lookups.chained_lookups,
    "common_words": lists.common_words,
    "frequent_words": lists.frequent_words,
}
"""Tasks with several words."""

PERPLEXITY = "perplexity"

TASKS = (PERPLEXITY, *AT_DEPTH, *OF_NUMBERS, *OF_WORDS)
"""Everything that can be evaluated, by name."""

MOST_DIGITS = 1000

LEAST_LENGTH = 64


@dataclass(frozen=True)
class TaskSettings:
    """What is drawn.

    Attributes:
        tasks: names out of `TASKS`.
        lengths: tokens of a sample, prompt and answers.
        depths: where `needle_single` and `needle_multikey` hide their number, 0 to 1.
        samples: samples of each task, length and depth.
        digits: digits of a hidden number.
        seed: seed of the first sample; the next have the next numbers.

    Raises:
        ConfigError: a value is out of its range.
    """

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (4096,)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    samples: int = 1
    digits: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(name, values, "at least one value, each given once")
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError("tasks", task, f"one of {', '.join(TASKS)}")
        for length in self.lengths:
            if length < LEAST_LENGTH:
                raise ConfigError("lengths", length, f"at least {LEAST_LENGTH} tokens")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ConfigError("depths", depth, "0 (start of the text) to 1 (end)")
        for name, least, most in (("samples", 1, None), ("digits", 2, MOST_DIGITS)):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                raise ConfigError(name, value, f"at least {least}" if most is None else f"{least} to {most}")


def haystacks(writer: Writer, texts: Sequence[Text]) -> tuple[Haystack, ...]:
    """The texts as tokens.

    Raises:
        EvaluationError: there is no text, or one has no tokens.
    """
    if not texts:
        raise EvaluationError("there is no text to evaluate on: give at least one")
    found = tuple(Haystack(text.name, text.content, tuple(writer.encode(text.content))) for text in texts)
    for each in found:
        if not each.ids:
            raise EvaluationError(f"the tokenizer gives no tokens for the text {each.name!r}: it is not the model's")
    return found


def windows(writer: Writer, texts: Sequence[Haystack], lengths: Sequence[int]) -> dict[tuple[str, int], list[int]]:
    """The start of each text, prefix included, at each length: what perplexity is measured on.

    Raises:
        EvaluationError: a text is too short.
    """
    longest = max(lengths)
    for text in texts:
        if len(text.ids) + len(writer.prefix) < longest:
            raise EvaluationError(
                f"the text {text.name!r} has {len(text.ids)} tokens and perplexity at {longest} tokens was asked for: "
                "give a longer text or lower the length"
            )
    return {(text.name, length): [*writer.prefix, *text.ids][:length] for text in texts for length in lengths}


def draw_samples(writer: Writer, texts: Sequence[Haystack], settings: TaskSettings) -> list[Sample]:
    """Every sample of every task but perplexity, each of exactly one of the lengths; they take the texts in turn.

    Raises:
        EvaluationError: a task does not fit a length, or a text is too short.
    """
    found: list[Sample] = []
    for length in settings.lengths:
        for task in settings.tasks:
            makers: list[Maker] = []
            if task in AT_DEPTH:
                makers = [partial(AT_DEPTH[task], depth=d, digits=settings.digits) for d in settings.depths]
            elif task in OF_NUMBERS:
                makers = [partial(OF_NUMBERS[task], digits=settings.digits)]
            elif task in OF_WORDS:
                makers = [OF_WORDS[task]]
            for place, make in enumerate(makers):
                for number in range(settings.samples):
                    seed = settings.seed + place * settings.samples + number
                    found.append(make(writer, texts[seed % len(texts)], length, seed=seed))
    return found
