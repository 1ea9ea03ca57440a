"""What an evaluation found: figures with their intervals, as tables and as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.evaluation.locality import KeptBlocks
from infllm_pass.evaluation.samples import Sample
from infllm_pass.evaluation.scoring import SEGMENTS, AnswerScore, TextLosses
from infllm_pass.evaluation.statistics import Interval, bootstrap_mean, relative_perplexity, wilson
from infllm_pass.tables import Column, FittedTable, rendered

DENSE = "dense"
"""The name of the side that the others are compared with."""

ALL_TEXTS = "all"
"""The name of the row that averages over the texts."""

BINS = 8
"""Parts of a text in `PerplexityRow.by_position`."""


@dataclass(frozen=True)
class PerplexityRow:
    """Perplexity of one text at one length on one side.

    Attributes:
        text: name of the text, or `ALL_TEXTS` for the geometric mean over them.
        tokens: length of the text.
        side: "dense", or the name of a configuration.
        density: key blocks that the scored queries visit, as a share of those that they see.
        perplexity: of the last half.
        whole: of the whole text.
        change: how much larger than dense, .01 for one hundredth; None for dense itself.
        interval: 95 % interval of `change`, from redrawn segments of the text.
        by_position: perplexity of each eighth of the text, first to last.
    """

    text: str
    tokens: int
    side: str
    density: float
    perplexity: float
    whole: float
    change: float | None
    interval: Interval | None
    by_position: tuple[float, ...]


@dataclass(frozen=True)
class TaskRow:
    """Answers of one task at one length, and one depth or all, on one side.

    Attributes:
        task: the task's name.
        tokens: length of a sample.
        depth: where the answers stand in the text; None: all of them.
        side: "dense", or the name of a configuration.
        density: as in `PerplexityRow`.
        answers: how many were asked for.
        exact: share that came out right.
        interval: 95 % interval of `exact`, by Wilson.
        nll: mean negative log-likelihood of an answer's tokens, in nats.
        nll_interval: 95 % interval of `nll`, from redrawn answers.
        generated: share found in generated text; None where nothing was generated.
    """

    task: str
    tokens: int
    depth: float | None
    side: str
    density: float
    answers: int
    exact: float
    interval: Interval
    nll: float
    nll_interval: Interval
    generated: float | None


@dataclass(frozen=True)
class LocalityRow:
    """What selections of adjacent queries share in the second half of one text on one side, see `locality`.

    Attributes:
        text: name of the text.
        tokens: its length.
        side: the name of a configuration.
        kept: mean share of a query's blocks that the one before visits too.
        least: the smallest such share.
        bound: share that no step can fall below while no new block enters: that of the query-agnostic blocks.
        by_site: mean share at each sparse site, in the order in which they run.
    """

    text: str
    tokens: int
    side: str
    kept: float
    least: float
    bound: float
    by_site: tuple[float, ...]


@dataclass(frozen=True)
class SideRun:
    """Everything measured on one side.

    Attributes:
        name: "dense", or the name of a configuration.
        config: the configuration as a dict; None for dense.
        sites: attention sites of the compiled graphs that are switchable, of how many; None for dense.
        density: the share of visible blocks that queries visit: called with the first scored position and the length.
        texts: losses by text and length.
        answers: for each sample, the scores of its answers.
        generated: for each sample, whether generated text held the answers; empty: nothing was generated.
        seconds: what it took.
        kept: blocks kept from query to query, of the longest texts where the side is sparse.
    """

    name: str
    config: Mapping[str, Any] | None
    sites: tuple[int, int] | None
    density: Callable[[int, int], float]
    texts: Mapping[tuple[str, int], TextLosses]
    answers: Sequence[Sequence[AnswerScore]]
    generated: Sequence[Sequence[bool]]
    seconds: float
    kept: Mapping[tuple[str, int], KeptBlocks] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Dense attention against sparse configurations. ``print(evaluation)`` shows the tables.

    Attributes:
        facts: what was evaluated, on what, with which settings and versions.
        perplexity: a row for each text, length and side, and one over all texts.
        tasks: a row for each task, length and side, over all depths.
        depths: the same for each depth, where a task has any.
        locality: a row for each of the longest texts and each sparse side.
    """

    facts: Mapping[str, Any]
    perplexity: tuple[PerplexityRow, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    depths: tuple[TaskRow, ...] = ()
    segments: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    locality: tuple[LocalityRow, ...] = ()

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the sides, dense first."""
        return tuple(dict.fromkeys([row.side for row in self.perplexity] + [row.side for row in self.tasks]))

    def tables(self) -> list[FittedTable]:
        """The tables of perplexity, of tasks and of locality, as far as these were evaluated."""
        found = []
        if self.perplexity:
            found.append(FittedTable(_PERPLEXITY_COLUMNS, list(map(_perplexity_cells, self.perplexity)), "perplexity"))
        if self.tasks:
            found.append(FittedTable(_TASK_COLUMNS, list(map(_task_cells, self.tasks)), "answers"))
        if self.locality:
            found.append(FittedTable(_LOCALITY_COLUMNS, list(map(_locality_cells, self.locality)), "locality"))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            **self.facts,
            "perplexity": [vars(row) for row in self.perplexity],
            "tasks": [vars(row) for row in self.tasks],
            "depths": [vars(row) for row in self.depths],
            "segments": [dict(each) for each in self.segments],
            "locality": [vars(row) for row in self.locality],
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """A flat row for every figure; `low` and `high` bound `change`, or `value` where there is no change."""
        rows: list[dict[str, Any]] = []
        for found in self.perplexity:
            low, high = found.interval or (None, None)
            rows.append(
                {
                    "measure": "perplexity",
                    "text": found.text,
                    "tokens": found.tokens,
                    "depth": None,
                    "side": found.side,
                    "density": found.density,
                    "answers": None,
                    "value": found.perplexity,
                    "change": found.change,
                    "low": low,
                    "high": high,
                }
            )
        for row in (*self.tasks, *self.depths):
            for measure, value, interval in (("exact", row.exact, row.interval), ("nll", row.nll, row.nll_interval)):
                rows.append(
                    {
                        "measure": f"{row.task} {measure}",
                        "text": None,
                        "tokens": row.tokens,
                        "depth": row.depth,
                        "side": row.side,
                        "density": row.density,
                        "answers": row.answers,
                        "value": value,
                        "change": None,
                        "low": interval[0],
                        "high": interval[1],
                    }
                )
        for kept in self.locality:
            rows.append(
                dict.fromkeys(rows[0] if rows else ())
                | {"measure": "blocks kept", "text": kept.text, "tokens": kept.tokens, "side": kept.side}
                | {"value": kept.kept, "low": kept.least}
            )
        return rows

    def __str__(self) -> str:
        return "\n".join(map(rendered, self.tables()))


_PERPLEXITY_COLUMNS = (
    Column("text", "text", right=False),
    Column("tokens", "tokens"),
    Column("side", "attention", right=False, folds=True),
    Column("density", "blocks"),
    Column("perplexity", "last half", ".3f"),
    Column("change", "change"),
    Column("interval", "95 %"),
    Column("whole", "whole", ".3f"),
)

_TASK_COLUMNS = (
    Column("task", "task", right=False),
    Column("tokens", "tokens"),
    Column("side", "attention", right=False, folds=True),
    Column("density", "blocks"),
    Column("answers", "answers"),
    Column("exact", "right", ".2f"),
    Column("interval", "95 %"),
    Column("generated", "generated", ".2f", drop_empty=True),
    Column("nll", "nll", ".3f"),
    Column("nll_interval", "95 %"),
)


_LOCALITY_COLUMNS = (
    Column("text", "text", right=False),
    Column("tokens", "tokens"),
    Column("side", "attention", right=False, folds=True),
    Column("kept", "kept"),
    Column("least", "least"),
    Column("bound", "bound"),
)


def _locality_cells(row: LocalityRow) -> dict[str, Any]:
    return vars(row) | {name: f"{100 * getattr(row, name):.1f} %" for name in ("kept", "least", "bound")}


def _perplexity_cells(row: PerplexityRow) -> dict[str, Any]:
    return vars(row) | {
        "density": f"{100 * row.density:.0f} %",
        "change": None if row.change is None else f"{100 * row.change:+.1f} %",
        "interval": None if row.interval is None else f"{100 * row.interval[0]:+.1f} to {100 * row.interval[1]:+.1f}",
    }


def _task_cells(row: TaskRow) -> dict[str, Any]:
    return vars(row) | {
        "density": f"{100 * row.density:.0f} %",
        "interval": "{:.2f} to {:.2f}".format(*row.interval),
        "nll_interval": "{:.2f} to {:.2f}".format(*row.nll_interval),
    }


def summarised(
    facts: Mapping[str, Any], runs: Sequence[SideRun], samples: Sequence[Sample], depths: Sequence[float]
) -> Evaluation:
    """Figures with intervals from what was measured.

    Args:
        facts: what was evaluated.
        runs: the sides, dense first.
        samples: what the runs' answers belong to.
        depths: answers are put to the nearest of these.
    """
    dense = runs[0]
    perplexity = []
    for length in dict.fromkeys(length for _, length in dense.texts):
        names = [name for name, tokens in dense.texts if tokens == length]
        for name, members in [*((name, [name]) for name in names), *([(ALL_TEXTS, names)] if len(names) > 1 else [])]:
            perplexity += [_perplexity_row(name, members, length, run, dense) for run in runs]
    groups: dict[tuple[str, int], list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault((sample.task, len(sample.ids)), []).append(place)
    tasks, by_depth = [], []
    for (task, length), places in groups.items():
        tasks += [_task_row(task, length, None, run, samples, places, depths) for run in runs]
        for depth in depths:
            rows = [_task_row(task, length, depth, run, samples, places, depths) for run in runs]
            by_depth += [row for row in rows if row is not None]
    segments = tuple(
        {"text": name, "tokens": length, "side": run.name, "mean_nll": losses.means, "scored": losses.counts}
        for run in runs
        for (name, length), losses in run.texts.items()
    )
    sides = [
        {"side": run.name, "config": run.config, "sites": run.sites, "seconds": round(run.seconds, 1)} for run in runs
    ]
    found = tuple(row for row in tasks if row is not None)
    locality = tuple(
        _locality_row(text, length, run, kept) for run in runs for (text, length), kept in run.kept.items()
    )
    return Evaluation({**facts, "sides": sides}, tuple(perplexity), found, tuple(by_depth), segments, locality)


def _locality_row(text: str, length: int, run: SideRun, kept: KeptBlocks) -> LocalityRow:
    """One text's row; the bound is that of texts with more blocks than are visited."""
    config = SparseAttentionConfig.coerce(run.config)
    bound = config.agnostic_topk / config.selected_blocks
    return LocalityRow(text, length, run.name, kept.mean, min(kept.least), bound, kept.means)


def _perplexity_row(name: str, texts: Sequence[str], length: int, run: SideRun, dense: SideRun) -> PerplexityRow:
    """One text's row, or that of all texts together."""
    own = [run.texts[text, length] for text in texts]
    base = [dense.texts[text, length] for text in texts]
    change, interval = None, None
    if run is not dense:
        half = SEGMENTS // 2
        groups = [
            [a - b for a, b in zip(sparse.means[half:], plain.means[half:], strict=True)]
            for sparse, plain in zip(own, base, strict=True)
        ]
        change = _geometric([o.last_half / d.last_half for o, d in zip(own, base, strict=True)]) - 1
        low, high = bootstrap_mean(groups)
        interval = relative_perplexity([low]), relative_perplexity([high])
    width = SEGMENTS // BINS
    return PerplexityRow(
        text=name,
        tokens=length,
        side=run.name,
        density=run.density(length // 2, length),
        perplexity=_geometric([each.last_half for each in own]),
        whole=_geometric([each.perplexity() for each in own]),
        change=change,
        interval=interval,
        by_position=tuple(
            _geometric([each.perplexity(first, first + width) for each in own]) for first in range(0, SEGMENTS, width)
        ),
    )


def _geometric(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _task_row(
    task: str,
    length: int,
    depth: float | None,
    run: SideRun,
    samples: Sequence[Sample],
    places: Sequence[int],
    depths: Sequence[float],
) -> TaskRow | None:
    """One task's row; None where no answer stands at the depth."""
    scores: list[AnswerScore] = []
    generated: list[bool] = []
    first = length
    for place in places:
        for number, answer in enumerate(samples[place].answers):
            near = None if answer.depth is None else min(depths, key=lambda d: abs(d - answer.depth))  # type: ignore[operator]
            if depth is None or near == depth:
                scores.append(run.answers[place][number])
                first = min(first, answer.start - 1)
                if run.generated:
                    generated.append(run.generated[place][number])
    if not scores:
        return None
    losses = [score.nll for score in scores]
    hits = sum(score.exact for score in scores)
    return TaskRow(
        task=task,
        tokens=length,
        depth=depth,
        side=run.name,
        density=run.density(first, length),
        answers=len(scores),
        exact=hits / len(scores),
        interval=wilson(hits, len(scores)),
        nll=math.fsum(losses) / len(losses),
        nll_interval=bootstrap_mean([losses]),
        generated=sum(generated) / len(generated) if generated else None,
    )
