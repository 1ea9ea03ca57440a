"""Pictures of block selection: which blocks are visited, and how much dense attention they hold."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from infllm_pass.errors import MissingDependencyError
from infllm_pass.tools.inspection import AttentionInputs

COLUMNS = 512
"""Columns of a selection map, at most; longer inputs show the mean over neighbouring queries."""

MAX_PANELS = 4
"""Key/value heads drawn, at most: more are too narrow to read at a page's width."""

FORCED = (0.42, 0.55, 0.67)
CHOSEN = (0.85, 0.33, 0.10)
UNVISITED = (0.93, 0.93, 0.92)
FUTURE = (1.0, 1.0, 1.0)


def draw_selection(
    inputs: AttentionInputs,
    selected_mass: Tensor,
    recent_mass: Tensor,
    *,
    title: str,
    row: int = 0,
) -> bytes:
    """Draw the blocks that one attention site visits over the dense attention mass that they hold.

    Args:
        inputs: the site, from `infllm_pass.tools.inspection.attention_inputs`; queries and keys are of one length.
        selected_mass: ``[B, Hkv, L]``, from `infllm_pass.tools.inspection.attention_mass` with the site's blocks.
        recent_mass: the same with the blocks of `infllm_pass.tools.inspection.recent_blocks`.
        title: first line of the picture, such as the model and the layer.
        row: which row of the batch is drawn.

    Returns:
        A PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise MissingDependencyError("matplotlib", "plot", "drawing pictures") from None

    geometry = inputs.config.geometry
    length = inputs.q.shape[2]
    panels = min(inputs.k.shape[1], MAX_PANELS)
    count = geometry.num_blocks(length)
    figure = Figure(figsize=(10, 6.6), dpi=160, layout="constrained")
    grid = figure.add_gridspec(2, panels, height_ratios=(1.35, 1))
    visited = min(geometry.selected_blocks, count)
    figure.suptitle(
        f"{title}: a query visits at most {visited} of {count} blocks ({100 * visited / count:.0f} %)",
        fontsize=13,
    )
    first: Any = None
    for head in range(panels):
        axes = figure.add_subplot(grid[0, head], sharey=first)
        picture = selection_map(inputs, row, head)
        axes.imshow(
            picture.numpy(), origin="lower", aspect="auto", interpolation="nearest", extent=(0, length, 0, count)
        )
        axes.set_title(f"key/value head {head}", fontsize=10)
        axes.set_xlabel("query position")
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        if first is None:
            first = axes
            axes.set_ylabel(f"key block ({geometry.block_size} tokens each)")
            axes.legend(
                handles=[
                    Patch(color=CHOSEN, label="selected by score"),
                    Patch(color=FORCED, label="forced: initial, local"),
                    Patch(color=UNVISITED, label="not visited"),
                ],
                loc="upper left",
                frameon=False,
                fontsize=9,
            )
        else:
            axes.tick_params(labelleft=False)
    axes = figure.add_subplot(grid[1, :])
    _draw_mass(axes, inputs, selected_mass[row], recent_mass[row])
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def selection_map(inputs: AttentionInputs, row: int, head: int) -> Tensor:
    """The colours of one key/value head's map.

    Args:
        inputs: the site.
        row: row of the batch.
        head: key/value head.

    Returns:
        RGB values, float32 ``[blocks, columns, 3]``; the lowest block comes first. A colour between that of a
        selected and that of an unvisited block says for how many of the column's queries it was selected.
    """
    geometry = inputs.config.geometry
    chosen = inputs.blocks[row, head].long().cpu()  # [L, S]
    length = chosen.shape[0]
    count = geometry.num_blocks(length)
    visited = torch.zeros(length, count + 1).scatter_(1, torch.where(chosen < 0, count, chosen), 1.0)[:, :count]
    own = torch.arange(length)[:, None] // geometry.block_size
    block = torch.arange(count)
    causal = block <= own  # [L, blocks]
    forced = causal & ((block < geometry.init_blocks) | (block >= own - geometry.local_blocks))
    weights = (visited * ~forced, forced.float(), causal * (1 - visited), (~causal).float())
    colours = torch.tensor([CHOSEN, FORCED, UNVISITED, FUTURE])
    pixels = sum(weight[..., None] * colour for weight, colour in zip(weights, colours, strict=True))
    return _column_means(torch.as_tensor(pixels), COLUMNS).transpose(0, 1).clamp(0, 1)


def _column_means(values: Tensor, columns: int) -> Tensor:
    """Means over runs of neighbouring rows, so that at most `columns` are left: ``[L, ...] -> [columns, ...]``."""
    width = -(-values.shape[0] // columns)
    return torch.stack([part.mean(0) for part in torch.split(values, width)])


def _draw_mass(axes: Any, inputs: AttentionInputs, selected: Tensor, recent: Tensor) -> None:
    """The attention mass against position: means over heads and neighbouring queries, and their spread."""
    from matplotlib.ticker import PercentFormatter

    config = inputs.config
    length = selected.shape[-1]
    width = max(1, length // 128)
    series = (
        (selected, CHOSEN, "blocks visited by InfLLM-V2"),
        (recent, FORCED, "as many initial and most recent blocks"),
    )
    lowest = 1.0
    for mass, colour, name in series:
        parts = torch.split(mass.mean(0).cpu(), width)  # [L] cut into runs of queries
        centres = [width * number + len(part) / 2 for number, part in enumerate(parts)]
        means = [float(part.mean()) for part in parts]
        low, high = ([float(part.quantile(q)) for part in parts] for q in (0.1, 0.9))
        axes.fill_between(centres, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(centres, means, color=colour, linewidth=2, label=name)
        lowest = min(lowest, *low)
    if config.visited_tokens < length:
        axes.axvline(config.visited_tokens, color="0.4", linewidth=1, linestyle=":")
        axes.annotate(
            f" budget: {config.visited_tokens} tokens",
            (config.visited_tokens, lowest),
            fontsize=9,
            color="0.35",
            va="bottom",
        )
    axes.set_xlim(0, length)
    axes.set_ylim(top=1.005)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("query position (mean over heads; band: 10th to 90th percentile of neighbouring queries)")
    axes.set_ylabel("dense attention held")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.12), framealpha=1, edgecolor="none", fontsize=9)
