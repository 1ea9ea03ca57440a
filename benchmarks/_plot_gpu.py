"""Draws plots of the GPU benchmarks from their results into docs/images; what has no results is left out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
IMAGES = ROOT / "docs" / "images"

Row = dict[str, Any]
COLOURS = {64: "#d9531e", 96: "#6a8caf"}
SERIES = ("#d9531e", "#8c2d04", "#6a8caf", "#2c4a6b")
BASELINES = {
    "flash_ms": "flash (SDPA)",
    "flex_ms": "FlexAttention, causal",
    "flex_blocks_ms": "FlexAttention, same 64 blocks",
}
GENERATE = {"ms": "ms a token", "speedup": "times as fast as dense", "ttft_s": "time to first token, s"}
STAGES = {"select": "selection", "attend": "attention", "bwd": "backward"}


def draw_prefill(results: dict[str, Any]) -> Any:
    """Speed-up over cuDNN's dense attention against the length, a panel for each main geometry."""
    rows = [row for row in results["rows"] if row["kind"] == "fwd" and row["data"] in ("local", "random")]
    lengths = sorted({row["length"] for row in rows})
    shapes = [heads for heads in dict.fromkeys(row["heads"] for row in rows) if _lengths(rows, heads) == lengths]
    figure, panels = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4.4), squeeze=False, layout="constrained")
    for axes, heads in zip(panels[0], shapes, strict=True):
        mine = [row for row in rows if row["heads"] == heads]
        for blocks in sorted({row["blocks"] for row in mine}):
            for data, line in (("local", "-"), ("random", "--")):
                points = sorted(
                    (r["length"], 1 / r["ratio"]) for r in mine if (r["blocks"], r["data"]) == (blocks, data)
                )
                if points:
                    label = f"{blocks} blocks, {data} data"
                    axes.plot(*zip(*points, strict=True), "o" + line, color=COLOURS.get(blocks, "black"), label=label)
        for (name, label), marker in zip(BASELINES.items(), "xv^", strict=True):
            known = [row for row in mine if row.get(name) is not None and row["data"] == "local"]
            points = sorted({row["length"]: row["dense_ms"] / row[name] for row in known}.items())
            if points:
                axes.plot(*zip(*points, strict=True), marker + ":", color="grey", label=label)
        axes.axhline(1.0, color="black", linewidth=1, label="dense (cuDNN)")
        axes.set(title=f"{heads}: query x KV heads x size", ylabel="times as fast as dense", ylim=(0, None))
        _finish(axes, lengths)
    return _titled(figure, "prefill attention of one layer, selection included", results["header"])


def draw_roofline(prefill: dict[str, Any], backward: dict[str, Any] | None = None) -> Any:
    """Matrix rate of each stage, counting only products that cannot be avoided, below the measured ceiling."""
    rows = prefill["rows"] + (backward["rows"] if backward else [])
    rows = [row for row in rows if row["kind"] in STAGES and row["data"] == "local" and row["blocks"] == 64]
    longest = max(row["length"] for row in rows)
    rows = [row for row in rows if row["length"] == longest]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    names = [f"{STAGES[row['kind']]}, {row['heads']}" for row in rows]
    bars = axes.barh(names, [row["tflops"] for row in rows], color="#6a8caf")
    axes.bar_label(bars, [f"{row['ms']:.1f} ms, floor {row['floor_ms']:.1f}" for row in rows], padding=4)
    peak = prefill["header"]["matmul_tflops"]
    axes.axvline(peak, color="black", linewidth=1)
    axes.annotate(
        f"matrix product, measured: {peak:.0f}",
        (peak, 0.98),
        (-4, 0),
        ha="right",
        va="top",
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
    )
    axes.set(xlabel=f"TFLOP/s at {longest // 1024}k tokens, 64 blocks, local data", xlim=(0, 1.05 * peak))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return _titled(figure, "what the kernels reach of the matrix units", prefill["header"])


def draw_backward(results: dict[str, Any]) -> Any:
    """Time of the backward pass against the length."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    rows = results["rows"]
    for heads, colour in zip(
        dict.fromkeys(row["heads"] for row in rows), ("#d9531e", "#6a8caf", "#5a8a4a"), strict=False
    ):
        mine = sorted((row for row in rows if row["heads"] == heads), key=lambda row: row["length"])
        for name, line, label in (("ms", "-", "sparse, 64 blocks"), ("dense_ms", "--", "dense")):
            points = [(row["length"], row[name]) for row in mine if row[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o" + line, color=colour, label=f"{heads}, {label}")
    axes.set(ylabel="ms", title="gradients of q, k and v")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _finish(axes, sorted({row["length"] for row in rows}))
    return _titled(figure, "backward of one layer's attention", results["header"])


def draw_breakeven(pooled: dict[str, Any], tokens: dict[str, Any] | None = None) -> Any:
    """Ratio to dense attention against the length: sparse at every length, and with ``dense_len="auto"``."""
    drawn = [results for results in (pooled, tokens) if results is not None]
    figure, panels = plt.subplots(len(drawn), 2, figsize=(11, 4.2 * len(drawn)), squeeze=False, layout="constrained")
    for (left, right), results in zip(panels, drawn, strict=True):
        rows = sorted(results["rows"], key=lambda row: row["length"])
        for heads, colour in zip(results["header"]["break_even"], SERIES, strict=False):
            mine = [row for row in rows if row["heads"] == heads]
            lengths = [row["length"] for row in mine]
            left.plot(lengths, [row["ratio"] for row in mine], "o-", color=colour)
            right.plot(lengths, [row.get("auto_ratio", math.nan) for row in mine], "o-", color=colour, label=heads)
        scores = f"{rows[0]['scorer']} scores"
        left.set(ylim=(0, 4), ylabel="sparse / dense time", title=f"{scores}, sparse at every length")
        right.set(ylim=(0, None), ylabel="time / dense time", title=f'{scores}, dense_len="auto"')
        for axes in (left, right):
            axes.axhline(1.0, color="black", linewidth=1)
            _finish(axes, sorted({row["length"] for row in rows}))
    row = pooled["rows"][0]
    return _titled(figure, f"{row['blocks']} blocks, {row['data']} data", pooled["header"])


def draw_decode(results: dict[str, Any]) -> Any:
    """Time of a decode step of one layer, and its ratio to dense attention, against the cached keys."""
    rows = [row for row in results["rows"] if row["mode"] == "sparse" and row["dense_ms"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    cases = dict.fromkeys((row["heads"], row["batch"]) for row in rows)
    for (heads, batch), colour in zip(cases, SERIES, strict=False):
        mine = sorted((r for r in rows if (r["heads"], r["batch"]) == (heads, batch)), key=lambda row: row["length"])
        lengths, label = [row["length"] for row in mine], f"{heads}, batch {batch}"
        left.plot(lengths, [1e3 * row["ms"] for row in mine], "o-", color=colour)
        left.plot(lengths, [1e3 * row["dense_ms"] for row in mine], "o--", color=colour)
        right.plot(lengths, [row["ratio"] for row in mine], "o-", color=colour, label=label)
    right.axhline(1.0, color="black", linewidth=1)
    left.set(yscale="log", ylabel="us", title="time of a step; dashed: dense")
    right.set(ylim=(0, None), ylabel="sparse / dense time", title="ratio to dense")
    for axes in (left, right):
        _finish(axes, sorted({row["length"] for row in rows}))
    title = f"decode attention of one layer, {rows[0]['blocks']} blocks, selection included, CUDA graphs"
    return _titled(figure, title, results["header"])


def draw_model(results: dict[str, Any]) -> Any:
    """Time and peak memory of a whole model's prefill against the length."""
    rows = results["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for variant, data in dict.fromkeys((row["variant"], row["data"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["data"]) == (variant, data)]
        mine.sort(key=lambda row: row["length"])
        sparse = variant == "sparsified"
        label = f"{variant}, {data} data" if sparse else variant.replace("_", " ")
        style = {"linestyle": "--"}
        if sparse:
            style = {"color": "#d9531e" if data == "local" else "#8c2d04", "linestyle": "-", "linewidth": 2}
        for axes, name in ((left, "ms"), (right, "peak_gb")):
            points = [(row["length"], row[name]) for row in mine if row[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label, **style)
    left.set(yscale="log", ylabel="ms", title="time")
    right.set(ylim=(0, None), ylabel="GB", title="peak of allocated memory")
    for axes in (left, right):
        _finish(axes, sorted({row["length"] for row in rows}))
    return _titled(figure, f"prefill of {rows[0]['layers']} layers of Llama-3-8B's sizes", results["header"])


def draw_generate(results: dict[str, Any]) -> Any:
    """Time of a token, the speed-up over the faster dense variant, and the time to the first token."""
    rows = results["rows"]
    known = [(name, label) for name, label in GENERATE.items() if any(row.get(name) is not None for row in rows)]
    figure, panels = plt.subplots(1, len(known), figsize=(5 * len(known), 4.2), squeeze=False, layout="constrained")
    styles = {"sparsified": "o-", "dense": "s--", "compiled": "^:"}
    for batch, colour in zip(sorted({row["batch"] for row in rows}), ("#d9531e", "#6a8caf", "#5a8a4a"), strict=False):
        for variant, line in styles.items():
            mine = sorted(
                (row for row in rows if (row["batch"], row["variant"]) == (batch, variant)),
                key=lambda row: row["length"],
            )
            for axes, (name, _) in zip(panels[0], known, strict=True):
                points = [(row["length"], row[name]) for row in mine if row.get(name) is not None]
                if points and not (name == "speedup" and variant != "sparsified"):
                    fill = colour if variant == "sparsified" else "none"
                    label = f"{variant}, batch {batch}"
                    axes.plot(*zip(*points, strict=True), line, color=colour, markerfacecolor=fill, label=label)
    for axes, (name, label) in zip(panels[0], known, strict=True):
        if name == "speedup":
            axes.axhline(1.0, color="black", linewidth=1)
        axes.set(ylim=(0, None), ylabel=label)
        _finish(axes, sorted({row["length"] for row in rows if row.get(name) is not None}))
        axes.set_xlabel("tokens in the cache")
    title = f"generation with {rows[0]['layers']} layers of Llama-3-8B's sizes, static cache, CUDA graphs"
    return _titled(figure, title, results["header"])


def draw_adaptation(results: dict[str, Any]) -> Any:
    """Perplexity against trained tokens, and the answers found after the last, of each run and side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(1, 1.5))
    runs = [row for row in results["rows"] if row["kind"] == "run"]
    colours = {"dense": "black", "tokens": "#d9531e", "pooled": "#6a8caf"}
    shown = [("dense", "dense"), *((run, side) for run in ("tokens", "pooled") for side in (run, "dense"))]
    for scorer, side in shown:
        points = [
            (row["trained_tokens"] / 1e6, row["perplexity"])
            for row in results["rows"]
            if (row["kind"], row["scorer"], row["side"]) == ("curve", scorer, side)
        ]
        if points:
            line, label = "o-" if side == scorer else "o:", _run_name(scorer, side)
            left.plot(*zip(*sorted(points), strict=True), line, color=colours[scorer], label=label)
    left.set(ylabel="perplexity, last half of a prompt", title="held-out texts, all")
    left.set_xlabel("million tokens trained")
    bars = [row for row in runs if (row["scorer"], row["side"]) in shown]
    tasks = list(bars[0]["tasks"])
    for number, row in enumerate(bars):
        places = [place + (number - len(bars) / 2 + 0.5) * 0.8 / len(bars) for place in range(len(tasks))]
        heights = [row["tasks"][task]["right"] / row["tasks"][task]["answers"] for task in tasks]
        paler = 1 if row["side"] == row["scorer"] else 0.45
        label = _run_name(row["scorer"], row["side"])
        right.bar(places, heights, 0.8 / len(bars), color=colours[row["scorer"]], alpha=paler, label=label)
    right.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks], fontsize=8)
    right.set(ylim=(0, 1), ylabel="answers found", title="tasks after the training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return _titled(figure, "a dense model trained on with sparse attention, a fifth of the blocks", results["header"])


def _run_name(scorer: str, side: str) -> str:
    if scorer == "dense":
        return "dense control"
    return f"trained with {scorer}, {'sparse' if side == scorer else 'dense'} mode"


def _lengths(rows: list[Row], heads: str) -> list[int]:
    return sorted({row["length"] for row in rows if row["heads"] == heads})


def _finish(axes: Any, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _titled(figure: Any, title: str, header: dict[str, Any]) -> Any:
    figure.suptitle(f"{title}\nbfloat16, {header['device']}, torch {header['torch']}", fontsize=10)
    return figure


DRAWINGS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "gpu_prefill": (("prefill",), draw_prefill),
    "gpu_roofline": (("prefill", "backward"), draw_roofline),
    "gpu_backward": (("backward",), draw_backward),
    "gpu_breakeven": (("breakeven", "breakeven_tokens"), draw_breakeven),
    "gpu_decode": (("decode",), draw_decode),
    "gpu_model": (("model",), draw_model),
    "gpu_generate": (("generate",), draw_generate),
    "gpu_adaptation": (("adaptation",), draw_adaptation),
}
"""Images, and the results that each is drawn from; the first is needed."""


def draw_all(folder: Path, images: Path) -> list[Path]:
    """Draw what a device's folder of results allows; the pictures' paths."""
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    written = []
    for name, (sources, draw) in DRAWINGS.items():
        if sources[0] not in found:
            continue
        figure = draw(*(found[source] for source in sources if source in found))
        images.mkdir(parents=True, exist_ok=True)
        figure.savefig(images / f"{name}.png", dpi=120)
        plt.close(figure)
        written.append(images / f"{name}.png")
    return written


def main() -> None:
    folders = (
        [Path(sys.argv[1])] if len(sys.argv) > 1 else [path.parent for path in sorted(RESULTS.glob("*/prefill.json"))]
    )
    if not folders:
        raise SystemExit(f"{RESULTS} has no results of prefill.py: name a folder of results")
    for path in draw_all(folders[0], IMAGES):
        print(f"written to {path}")


if __name__ == "__main__":
    main()
