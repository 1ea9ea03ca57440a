"""A training step's attention on the CPU: forward and backward, sparse against PyTorch's dense attention.

Measures one attention layer of SmolLM2-135M (9 query heads, 3 KV heads, 64 numbers each, float32, batch 1) with the
default geometry, in one process; sparse and dense calls take turns. ``--clock processor`` counts processor time, for
machines that are busy with something else: with one thread it is what the step costs, whoever else runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import results_header, write_results
from cpu_prefill import make_data
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from infllm_pass.kernels.cpu import prefill
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.params import PrefillParams

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_training.json"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
STAGES = ("select_ms", "forward_ms", "backward_ms", "dense_forward_ms", "dense_backward_ms")


def measure(kind: str, length: int, arguments: argparse.Namespace) -> dict[str, object]:
    geometry, clock = BlockGeometry(), CLOCKS[arguments.clock]
    q, k, v = make_data(kind, length, arguments.heads, arguments.heads_kv, arguments.dim)
    grad = torch.randn_like(q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    call = PrefillParams(arguments.dim**-0.5, 0, geometry)

    made: dict[str, torch.Tensor] = {}

    def select() -> None:
        made["blocks"] = prefill.select_blocks(q, k, prefill.compress_keys(q, k, call), call)

    def forward() -> None:
        made["out"], made["lse"] = prefill.attention_forward(q, k, v, made["blocks"], call)

    def backward() -> None:
        prefill.attention_backward(grad, q, k, v, made["out"], made["lse"], made["blocks"], call)

    def dense_forward() -> None:
        made["dense"] = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)

    def dense_backward() -> None:
        made["dense"].backward(grad)

    steps = (select, forward, backward, dense_forward, dense_backward)
    times: list[list[float]] = []
    for _ in range(arguments.repeats + 1):
        marks = [clock()]
        for step in steps:
            step()
            marks.append(clock())
        times.append([1e3 * (end - begin) for begin, end in itertools.pairwise(marks)])
    medians = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    sparse, dense = sum(medians[:3]), sum(medians[3:])
    case = f"train/{arguments.heads}x{arguments.heads_kv}x{arguments.dim}/{geometry.selected_blocks}/{length}/{kind}"
    row = {"case": case, "length": length, "data": kind, "ms": sparse, "dense_ms": dense, "ratio": sparse / dense}
    return row | dict(zip(STAGES, medians, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens in the sequence")
    parser.add_argument("--data", nargs="+", choices=["random", "local"], default=["random"])
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed rounds, after one that is not; medians are reported"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--heads-kv", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    console = Console()
    cases = [(kind, length) for kind in arguments.data for length in arguments.lengths]
    rows = [measure(kind, length, arguments) for kind, length in track(cases, "measuring", console=console)]
    table = Table(
        Column("case", no_wrap=True, min_width=32), "forward ms", "backward ms", "step ms", "dense ms", "ratio"
    )
    for row in rows:
        numbers = (f"{row[name]:.0f}" for name in ("forward_ms", "backward_ms", "ms", "dense_ms"))
        table.add_row(str(row["case"]), *numbers, f"{row['ratio']:.3f}")
    console.print(table)
    machine = {"clock": arguments.clock, "load": os.getloadavg()[0]}
    write_results(arguments.output, {**results_header(), **machine}, rows)


if __name__ == "__main__":
    main()
