"""Prefill on the CPU: block selection and sparse attention against PyTorch's dense attention.

Measures one attention layer of SmolLM2-135M (9 query heads, 3 KV heads, 64 numbers each, float32, batch 1)
with the default geometry, in one process. ``random`` data picks far blocks evenly; in ``local`` data queries
and keys change slowly along the sequence, so that neighbours pick the same blocks.
"""

from __future__ import annotations

import argparse
import math
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

from infllm_pass.kernels.cpu import prefill
from infllm_pass.kernels.geometry import BlockGeometry
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


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(kind: str, length: int, arguments: argparse.Namespace) -> dict[str, object]:
    heads, heads_kv, dim = arguments.heads, arguments.heads_kv, arguments.dim
    geometry = BlockGeometry()
    q, k, v = make_data(kind, length, heads, heads_kv, dim)
    call = PrefillParams(dim**-0.5, 0, geometry)

    def select_blocks() -> Tensor:
        return prefill.select_blocks(q, k, prefill.compress_keys(q, k, call), call)

    blocks = select_blocks()
    dense = milliseconds(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), arguments.repeats
    )
    select = milliseconds(select_blocks, arguments.repeats)
    attend = milliseconds(lambda: prefill.attention_forward(q, k, v, blocks, call), arguments.repeats)
    return {
        "case": f"fwd/{heads}x{heads_kv}x{dim}/{geometry.selected_blocks}/{length}/{kind}",
        "length": length,
        "data": kind,
        "ms": select + attend,
        "dense_ms": dense,
        "ratio": (select + attend) / dense,
        "select_ms": select,
        "attend_ms": attend,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], help="tokens in the prompt"
    )
    parser.add_argument("--data", nargs="+", choices=["random", "local"], default=["random", "local"])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; their median is reported")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--heads-kv", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_format_options(parser)
    arguments = parser.parse_args()

    cases = [(kind, length) for kind in arguments.data for length in arguments.lengths]
    rows = [
        measure(kind, length, arguments) for kind, length in track(cases, "measuring", console=Console(stderr=True))
    ]
    columns = {"select_ms": "select ms", "attend_ms": "attend ms", "ms": "sparse ms", "dense_ms": "dense ms"}
    show(arguments.format, rows, columns | {"ratio": "ratio"}, {"ratio": ".3f"}, default=".1f")
    even = {kind: break_even([row for row in rows if row["data"] == kind]) for kind in arguments.data}
    for kind, length in even.items():
        note(arguments.format, f"break-even length, {kind} data: {length}")
    write_results(arguments.output, {**results_header(), "break_even": even}, rows)


if __name__ == "__main__":
    main()
