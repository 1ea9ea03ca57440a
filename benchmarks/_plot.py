"""Draws the plot in docs/benchmarks.md of the CPU prefill benchmark from its results; run after ``cpu_prefill.py``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent


def main() -> None:
    results = json.loads((Path(__file__).parent / "results" / "cpu" / "cpu_prefill.json").read_text())
    header, rows = results["header"], results["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = {"random": "#d9531e", "local": "#6a8caf"}
    lengths = sorted({row["length"] for row in rows})
    dense = [min(row["dense_ms"] for row in rows if row["length"] == length) / 1e3 for length in lengths]
    left.plot(lengths, dense, "o-", color="black", label="dense SDPA, causal")
    for data, scorer in sorted({(row["data"], row["scorer"]) for row in rows}, reverse=True):
        some = [row for row in rows if (row["data"], row["scorer"]) == (data, scorer)]
        mine = sorted((row["length"], row["ms"] / 1e3, row["ratio"]) for row in some)
        ticks, seconds, ratios = zip(*mine, strict=True)
        style = {"color": colours[data], "linestyle": "-" if scorer == "pooled" else "--", "marker": "o"}
        left.plot(ticks, seconds, **style, label=f"selection + sparse attention, {scorer}, {data} data")
        right.plot(ticks, ratios, **style, label=f"{scorer}, {data} data")
    right.axhline(1.0, color="black", linewidth=1)
    right.axhline(0.6, color="grey", linewidth=1, linestyle=":")
    right.annotate("target at 32k: 0.6", (lengths[0], 0.6), xytext=(0, -12), textcoords="offset points", color="grey")
    left.set(yscale="log", ylabel="seconds, one layer", title="time")
    right.set(ylim=(0, None), ylabel="sparse / dense time", title="ratio to dense")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"prefill attention, 9 query / 3 KV heads of 64, float32, 96 blocks: {header['threads']} threads, "
        f"{header['device']}, torch {header['torch']}",
        fontsize=10,
    )
    target = ROOT / "docs" / "images" / "cpu_prefill.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
