"""Prefill on the CPU: block selection and sparse attention against PyTorch's dense attention.

Measures one attention layer of SmolLM2-135M (9 query heads, 3 KV heads, 64 numbers each, float32, batch 1)
with the default geometry, in one process. ``random`` data picks far blocks evenly; in ``local`` data queries
and keys change slowly along the sequence, so that neighbours pick the same blocks.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import break_even, note, results_header, show, write_results
from rich.console import Console
from rich.progress import track
from torch import Tensor

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.kernels.cpu import prefill
from infllm_pass.kernels.params import PrefillParams
from infllm_pass.tools.output import add_format_options

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_prefill.json"
CORRELATION = 0.98
"""Of neighbouring tokens in ``local`` data."""


def make_data(kind: str, length: int, heads: int, heads_kv: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[1, heads, length, dim]`` of unit variance."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, length, dim, generator=generator) for h in (heads, heads_kv, heads_kv))
    if kind == "local":
        for x in (q, k):
            x[:, :, 1:] *= math.sqrt(1 - CORRELATION**2)
            for token in range(1, length):
                x[:, :, token] += CORRELATION * x[:, :, token - 1]
    return q, k, v


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def milliseconds(function: Callable[[], object], arguments: argparse.Namespace) -> float:
    """Median time of a call, after one that is not counted."""
    clock = CLOCKS[arguments.clock]
    function()
    times = []
    for _ in range(arguments.repeats):
        begin = clock()
        function()
        times.append(1e3 * (clock() - begin))
    return statistics.median(times)


def measure(kind: str, length: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each scorer; the measurements take turns."""
    heads, heads_kv, dim = arguments.heads, arguments.heads_kv, arguments.dim
    q, k, v = make_data(kind, length, heads, heads_kv, dim)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    rows = []
    for scorer in arguments.scorers:
        config = SparseAttentionConfig(scorer=scorer, score_dtype=arguments.score_dtype)
        geometry = config.geometry_for(dim, (tuple(range(dim - config.score_dims_of(dim), dim)),))
        call = PrefillParams(dim**-0.5, 0, geometry)

        def select_blocks(call: PrefillParams = call) -> Tensor:
            return prefill.select_blocks(q, k, prefill.compress_keys(q, k, call), call)

        def attend(call: PrefillParams = call, blocks: Tensor = select_blocks(call)) -> object:  # noqa: B008
            return prefill.attention_forward(q, k, v, blocks, call)

        dense_ms, select_ms, attend_ms = (milliseconds(each, arguments) for each in (dense, select_blocks, attend))
        rows.append(
            {
                "case": f"fwd/{heads}x{heads_kv}x{dim}/{geometry.selected_blocks}/{length}/{kind}/{scorer}",
                "length": length,
                "data": kind,
                "scorer": scorer,
                "channels": geometry.score_dims,
                "ms": select_ms + attend_ms,
                "dense_ms": dense_ms,
                "ratio": (select_ms + attend_ms) / dense_ms,
                "select_ms": select_ms,
                "attend_ms": attend_ms,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], help="tokens in the prompt"
    )
    parser.add_argument("--data", nargs="+", choices=["random", "local"], default=["random", "local"])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; their median is reported")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: time of all threads together")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--heads-kv", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--scorers", nargs="+", choices=["pooled", "tokens"], default=["pooled", "tokens"])
    parser.add_argument("--score-dtype", choices=["key", "int8", "fp8"], default="key", help="of token scores")
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_format_options(parser)
    arguments = parser.parse_args()

    cases = [(kind, length) for kind in arguments.data for length in arguments.lengths]
    console = Console(stderr=True)
    rows = [
        row for kind, length in track(cases, "measuring", console=console) for row in measure(kind, length, arguments)
    ]
    columns = {"select_ms": "select ms", "attend_ms": "attend ms", "ms": "sparse ms", "dense_ms": "dense ms"}
    show(arguments.format, rows, columns | {"ratio": "ratio"}, {"ratio": ".3f"}, default=".1f")
    even = {
        f"{kind}, {scorer}": break_even([row for row in rows if (row["data"], row["scorer"]) == (kind, scorer)])
        for kind in arguments.data
        for scorer in arguments.scorers
    }
    for case, length in even.items():
        note(arguments.format, f"break-even length, {case}: {length}")
    write_results(
        arguments.output,
        {**results_header(), "clock": arguments.clock, "load": os.getloadavg()[0], "break_even": even},
        rows,
    )


if __name__ == "__main__":
    main()
