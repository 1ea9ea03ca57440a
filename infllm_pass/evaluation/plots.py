"""Pictures of an evaluation: needles by length and depth, perplexity by position, locality by site."""

from __future__ import annotations

import io
from typing import Any

from infllm_pass.errors import MissingDependencyError
from infllm_pass.evaluation.results import ALL_TEXTS, DENSE, Evaluation, PerplexityRow, TaskRow

COLOURS = ("#6b8cab", "#d9541a", "#3a9d5d", "#8f5fb7", "#b08a2e")
"""Of the sides, dense first; they repeat where there are more."""


def require_matplotlib() -> None:
    """Find out whether pictures can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError("matplotlib", "plot", "drawing pictures") from None


def draw_depths(evaluation: Evaluation) -> bytes | None:
    """Heat maps of the tasks whose answers have a depth: a row of maps for each task, a map for each side.

    Colour is the mean negative log-likelihood of an answer, in nats; a cell says how many came out right.

    Returns:
        A PNG file; None where no task has a depth.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows = evaluation.depths
    if not rows:
        return None
    tasks = list(dict.fromkeys(row.task for row in rows))
    sides = evaluation.sides
    size = (1.6 + 2.6 * len(sides), 0.9 + 2.1 * len(tasks))
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    grid: Any = figure.subplots(len(tasks), len(sides), squeeze=False)
    scale = Normalize(0, max(row.nll for row in rows))
    image: Any = None
    for line, task in zip(grid, tasks, strict=True):
        for axes, side in zip(line, sides, strict=True):
            image = _heat_map(axes, [row for row in rows if (row.task, row.side) == (task, side)], scale)
            if task == tasks[0]:
                axes.set_title(side, fontsize=9)
            if task == tasks[-1]:
                axes.set_xlabel("tokens", fontsize=8)
        line[0].set_ylabel(f"{task}\ndepth", fontsize=8)
    figure.colorbar(image, ax=list(grid.flat), label="negative log-likelihood of an answer's tokens (nats)", shrink=0.8)
    return png_of(figure)


def _heat_map(axes: Any, rows: list[TaskRow], scale: Any) -> Any:
    """One side's map of one task."""
    lengths = sorted({row.tokens for row in rows})
    depths = sorted({row.depth for row in rows if row.depth is not None})
    values = [[float("nan")] * len(lengths) for _ in depths]
    for row in rows:
        if row.depth is not None:
            values[depths.index(row.depth)][lengths.index(row.tokens)] = row.nll
    image = axes.imshow(values, cmap="YlOrRd", norm=scale, aspect="auto")
    for row in rows:
        if row.depth is not None:
            place = lengths.index(row.tokens), depths.index(row.depth)
            colour = "white" if scale(row.nll) > 0.6 else "black"
            hits = f"{round(row.exact * row.answers)}/{row.answers}"
            axes.text(*place, hits, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length}" for length in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    return image


def draw_perplexity(evaluation: Evaluation) -> bytes | None:
    """How much larger than dense the perplexity is in each eighth of the longest texts; a panel for each text.

    Returns:
        A PNG file; None where no perplexity was measured on a sparse side.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    longest = max((row.tokens for row in evaluation.perplexity), default=0)
    rows = [row for row in evaluation.perplexity if row.tokens == longest]
    sides = [side for side in evaluation.sides if side != DENSE]
    if not rows or not sides:
        return None
    texts = list(dict.fromkeys(row.text for row in rows))
    figure = Figure(figsize=(1 + 2.6 * len(texts), 3.2), dpi=160, layout="constrained")
    panels: Any = figure.subplots(1, len(texts), squeeze=False, sharey=True)
    found = {(row.text, row.side): row for row in rows}
    for axes, text in zip(panels[0], texts, strict=True):
        dense = found[text, DENSE].by_position
        axes.axhline(0, color=COLOURS[0], linewidth=1)
        for number, side in enumerate(sides, 1):
            changes = _changes(found[text, side], dense)
            places = [longest * (part + 0.5) / len(dense) for part in range(len(dense))]
            axes.plot(places, changes, color=COLOURS[number % len(COLOURS)], marker="o", markersize=3, label=side)
        axes.set_title("all texts" if text == ALL_TEXTS else text, fontsize=9)
        axes.set_xlabel("position", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("perplexity above dense", fontsize=8)
    panels[0][0].legend(frameon=False, fontsize=8)
    return png_of(figure)


def _changes(row: PerplexityRow, dense: tuple[float, ...]) -> list[float]:
    return [sparse / plain - 1 for sparse, plain in zip(row.by_position, dense, strict=True)]


def draw_locality(evaluation: Evaluation) -> bytes | None:
    """Blocks that are kept from token to token at each site, a line for each side; the mean over the texts.

    Dashed lines: what query-agnostic blocks guarantee.

    Returns:
        A PNG file; None where locality was not measured.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if not evaluation.locality:
        return None
    figure = Figure(figsize=(5.2, 3.2), dpi=160, layout="constrained")
    axes: Any = figure.subplots()
    sides = [side for side in evaluation.sides if side != DENSE]
    for number, side in enumerate(sides, 1):
        rows = [row for row in evaluation.locality if row.side == side]
        if not rows:
            continue
        colour = COLOURS[number % len(COLOURS)]
        means = [sum(shares) / len(shares) for shares in zip(*(row.by_site for row in rows), strict=True)]
        kept = sum(row.kept for row in rows) / len(rows)
        label = f"{side}: {100 * kept:.1f} %"
        axes.plot(range(len(means)), means, color=colour, marker="o", markersize=3, label=label)
        if rows[0].bound:
            axes.axhline(rows[0].bound, color=colour, linewidth=1, linestyle="--")
    axes.set_xlabel("attention site", fontsize=8)
    axes.set_ylabel("blocks kept from token to token", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return png_of(figure)


def png_of(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
