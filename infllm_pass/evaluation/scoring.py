"""Runs a model on texts and samples, and scores what it says about them.

Answers are scored by teacher forcing: the prompt and its answers are one forward pass, and each answer's tokens are
compared with the likeliest ones. All of them are if and only if greedy decoding gives the answer (where earlier answers
of the prompt are right), at the cost of one pass. How likely the answer was is a finer measure than whether it came.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_pass.evaluation.output_layer import OutputLayer, output_pieces
from infllm_pass.evaluation.samples import Answer, Sample

SEGMENTS = 32
"""Equal parts of a text whose losses are kept: enough to redraw, and to see where in the text something is lost."""

MOST_LOGITS = 2**29
"""Logits that exist at once where they cannot be made in pieces, 2 GB in float32: of more, some tokens are scored."""

RUN = 64
"""Neighbouring tokens that are scored together where not all are."""

SPARE_TOKENS = 8
"""Tokens generated beyond the answers' own."""


@dataclass(frozen=True)
class AnswerScore:
    """How a model did on one answer.

    Attributes:
        exact: whether every token was the likeliest; with generation, whether the text holds the answer.
        nll: mean negative log-likelihood of the answer's tokens in nats; of the first token of any right answer where
            several are right.
    """

    exact: bool
    nll: float


@dataclass(frozen=True)
class TextLosses:
    """Losses of a text, in `SEGMENTS` equal parts.

    Attributes:
        sums: negative log-likelihoods added up, in nats.
        counts: how many tokens were scored.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    def perplexity(self, first: int = 0, stop: int = SEGMENTS) -> float:
        """The perplexity of the segments from `first` to before `stop`."""
        return math.exp(math.fsum(self.sums[first:stop]) / sum(self.counts[first:stop]))

    @property
    def last_half(self) -> float:
        """The perplexity of the last half."""
        return self.perplexity(SEGMENTS // 2)

    @property
    def means(self) -> tuple[float, ...]:
        """Mean loss of each segment."""
        return tuple(total / count for total, count in zip(self.sums, self.counts, strict=True))


class Scorer:
    """A model that is run on token ids.

    Attributes:
        run: the model, plain, compiled or sparsified, with the call of a causal language model of transformers.
        original: the plain model, whose ``forward`` says which arguments there are.
        device: where inputs go.
    """

    def __init__(self, run: Callable[..., Any], original: torch.nn.Module) -> None:
        self.run = run
        self.original = original
        self.device = next(original.parameters()).device
        self._output = OutputLayer.of(original)
        self._keeps = "logits_to_keep" in inspect.signature(original.forward).parameters

    def logits(self, ids: Sequence[int], places: Tensor) -> Tensor:
        """Logits after the tokens at `places`: float32 ``[places, vocabulary]``."""
        return torch.cat(list(self._pieces(ids, places)))

    def losses(self, ids: Sequence[int]) -> TextLosses:
        """Losses of a text's tokens from the second on; all of them if logits can be made in pieces."""
        places = torch.arange(len(ids) - 1)
        if self._output is None:
            places = scored_places(len(ids), self._vocabulary())
        targets = torch.tensor(ids)[places + 1]
        found: list[Tensor] = []
        for logits in self._pieces(ids, places):
            done = sum(map(len, found))
            target = targets[done : done + len(logits)].to(logits.device)
            found.append(F.cross_entropy(logits, target, reduction="none").double().cpu())
        segment = (places + 1) * SEGMENTS // len(ids)
        sums = torch.zeros(SEGMENTS, dtype=torch.float64).index_add_(0, segment, torch.cat(found))
        counts = torch.bincount(segment, minlength=SEGMENTS)
        return TextLosses(tuple(sums.tolist()), tuple(counts.tolist()))

    def answers(self, sample: Sample) -> list[AnswerScore]:
        """Scores of a sample's answers by teacher forcing."""
        return answer_scores(sample, self.logits(sample.ids, answer_places(sample)))

    def generated(self, sample: Sample, decode: Callable[[Sequence[int]], str]) -> list[bool]:
        """Whether the text that is generated after the prompt holds each answer."""
        prompt = torch.tensor([sample.prompt], device=self.device)
        most = len(sample.ids) - len(sample.prompt) + SPARE_TOKENS
        model: Any = self.run
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        out = model.generate(**inputs, max_new_tokens=most, do_sample=False)[0, prompt.shape[1] :]
        text = decode(out.tolist())
        return [answer.text in text for answer in sample.answers]

    @torch.no_grad()
    def _pieces(self, ids: Sequence[int], places: Tensor) -> Iterator[Tensor]:
        """Logits after the tokens at `places`, some places at a time: float32 ``[n, vocabulary]``."""
        places = places.to(self.device)
        if self._output is not None:
            hidden = self._output.hidden(self.run, ids)
            yield from output_pieces(self._output.logits, hidden[places], self._output.vocabulary)
            return
        inputs = torch.tensor([list(ids)], device=self.device)
        if self._keeps:
            out = self.run(input_ids=inputs, use_cache=False, logits_to_keep=places).logits[0]
        else:
            out = self.run(input_ids=inputs, use_cache=False).logits[0, places]
        for part in torch.split(out, RUN):
            yield part.float()

    def _vocabulary(self) -> int:
        config: Any = getattr(self.original, "config", None)
        get = getattr(config, "get_text_config", None)
        size = getattr(get() if callable(get) else config, "vocab_size", None)
        return size if isinstance(size, int) else 1


def scored_places(length: int, vocabulary: int) -> Tensor:
    """The places in a text whose next token is scored: all, or runs spread over the text where memory is short."""
    places = torch.arange(length - 1)
    runs = -(-len(places) // RUN)
    most = max(2 * SEGMENTS, MOST_LOGITS // (vocabulary * RUN))
    if runs <= most:
        return places
    kept = torch.linspace(0, runs - 1, most).round().long()
    chosen = (kept[:, None] * RUN + torch.arange(RUN)).flatten()
    return chosen[chosen < length - 1]


def answer_places(sample: Sample) -> Tensor:
    """The places after which a sample's answers have their tokens, answer after answer."""
    return torch.cat([torch.arange(each.start - 1, each.stop - 1) for each in sample.answers])


def answer_scores(sample: Sample, logits: Tensor) -> list[AnswerScore]:
    """Scores of a sample's answers from the logits at `answer_places`, ``[places, vocabulary]``."""
    chances = torch.log_softmax(logits, -1)
    sizes = [each.stop - each.start for each in sample.answers]
    return [
        answer_score(answer, sample.ids, part)
        for answer, part in zip(sample.answers, torch.split(chances, sizes), strict=True)
    ]


def answer_score(answer: Answer, ids: Sequence[int], chances: Tensor) -> AnswerScore:
    """The score of one answer.

    Args:
        answer: the answer.
        ids: the sample's tokens.
        chances: log-probabilities before each of the answer's tokens, ``[tokens, vocabulary]``.
    """
    if answer.choices:
        right = list(answer.choices)
        nll = -float(torch.logsumexp(chances[0, right].double(), 0))
        return AnswerScore(int(chances[0].argmax()) in right, nll)
    target = torch.tensor(ids[answer.start : answer.stop], device=chances.device)
    taken = chances.gather(1, target[:, None])
    return AnswerScore(bool((chances.argmax(-1) == target).all()), -float(taken.double().mean()))
