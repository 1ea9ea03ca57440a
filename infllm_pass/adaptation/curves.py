"""A picture of a run: loss by step, perplexity of held-out texts and answers found, dense and sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infllm_pass.adaptation.losses import StepLoss
from infllm_pass.evaluation.plots import COLOURS, png_of, require_matplotlib
from infllm_pass.evaluation.results import ALL_TEXTS

Figures = Mapping[str, Any]
"""An evaluation as plain data, see `Evaluation.to_dict`."""

SMOOTHED = 50
"""Of so many points a curve of losses consists, each the mean of neighbouring steps of one length."""


def draw_curves(steps: Sequence[StepLoss], evaluations: Mapping[int, Figures]) -> bytes:
    """Losses by step, a line for each length, and what evaluations found, a line for each side.

    Args:
        steps: the losses.
        evaluations: by the step that they were made after; 0 is before the training.

    Returns:
        A PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels: Any = [(_draw_losses, steps), (_draw_perplexity, evaluations), (_draw_tasks, evaluations)]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=160, layout="constrained")
    axes: Any = figure.subplots(1, len(panels))
    for each, (draw, what) in zip(axes, panels, strict=True):
        draw(each, what)
        each.set_xlabel("step", fontsize=8)
        each.tick_params(labelsize=8)
        each.grid(axis="y", color="0.9")
        each.spines[["top", "right"]].set_visible(False)
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, fontsize=8)
    return png_of(figure)


def _draw_losses(axes: Any, steps: Sequence[StepLoss]) -> None:
    axes.set_title("training loss (nats a token)", fontsize=9)
    for number, length in enumerate(sorted({each.length for each in steps})):
        own = [each for each in steps if each.length == length]
        width = -(-len(own) // SMOOTHED)
        parts = [own[start : start + width] for start in range(0, len(own), width)]
        places = [sum(each.step for each in part) / len(part) for part in parts]
        means = [sum(each.loss for each in part) / len(part) for part in parts]
        axes.plot(places, means, color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=f"{length} tokens")


def _draw_perplexity(axes: Any, evaluations: Mapping[int, Figures]) -> None:
    axes.set_title("perplexity of held-out texts, last half", fontsize=9)
    values: dict[str, dict[int, float]] = {}
    for step, found in sorted(evaluations.items()):
        rows = found["perplexity"]
        longest = max((row["tokens"] for row in rows), default=0)
        several = any(row["text"] == ALL_TEXTS for row in rows)
        for row in rows:
            if row["tokens"] == longest and (row["text"] == ALL_TEXTS or not several):
                values.setdefault(row["side"], {})[step] = row["perplexity"]
    _draw_sides(axes, values)


def _draw_tasks(axes: Any, evaluations: Mapping[int, Figures]) -> None:
    axes.set_title("answers found, all tasks", fontsize=9)
    values: dict[str, dict[int, float]] = {}
    for step, found in sorted(evaluations.items()):
        for side in dict.fromkeys(row["side"] for row in found["tasks"]):
            rows = [row for row in found["tasks"] if row["side"] == side]
            asked = sum(row["answers"] for row in rows)
            values.setdefault(side, {})[step] = sum(row["exact"] * row["answers"] for row in rows) / asked
    axes.set_ylim(-0.03, 1.03)
    _draw_sides(axes, values)


def _draw_sides(axes: Any, values: Mapping[str, Mapping[int, float]]) -> None:
    for number, (side, points) in enumerate(values.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(list(points), list(points.values()), color=colour, marker="o", markersize=3, label=side)
