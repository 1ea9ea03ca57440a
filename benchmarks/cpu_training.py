"""A training step's attention on the CPU: forward and backward, sparse against PyTorch's dense attention.

Measures one attention layer of SmolLM2-135M (9 query heads, 3 KV heads, 64 numbers each, float32, batch 1) for each
scorer and for the default's 96 visited blocks and the demo's 26, in one process; sparse and dense calls take turns.
``--clock processor`` counts processor time, for machines that are busy with something else: with one thread it is what
the step costs, whoever else runs.
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

from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels.cpu import prefill
from infllm_pass.kernels.params import PrefillParams

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_training.json"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
BUDGETS = {96: {}, 26: {"window_size": 512, "topk": 18}}
"""Fields of the configuration by the number of visited blocks."""

STAGES = ("select_ms", "forward_ms", "backward_ms", "dense_forward_ms", "dense_backward_ms")


def measure(kind: str, length: int, scorer: str, blocks: int, arguments: argparse.Namespace) -> dict[str, object]:
    clock, dim = CLOCKS[arguments.clock], arguments.dim
    config = SparseAttentionConfig(scorer=scorer, **BUDGETS[blocks])
    geometry = config.geometry_for(dim, (tuple(range(dim - config.score_dims_of(dim), dim)),))
    q, k, v = make_data(kind, length, arguments.heads, arguments.heads_kv, dim)
    grad = torch.randn_like(q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    call = PrefillParams(dim**-0.5, 0, geometry)

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
    case = f"train/{arguments.heads}x{arguments.heads_kv}x{dim}/{blocks}/{length}/{kind}/{scorer}"
    row = {"case": case, "length": length, "data": kind, "blocks": blocks, "scorer": scorer}
    row |= {"ms": sparse, "dense_ms": dense, "ratio": sparse / dense}
    return row | dict(zip(STAGES, medians, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], help="tokens in the sequence")
    parser.add_argument("--data", nargs="+", choices=["random", "local"], default=["random"])
    parser.add_argument("--blocks", type=int, nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--scorers", nargs="+", choices=["pooled", "tokens"], default=["pooled", "tokens"])
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
    cases = list(itertools.product(arguments.data, arguments.lengths, arguments.scorers, arguments.blocks))
    rows = [measure(*case, arguments) for case in track(cases, "measuring", console=console)]
    table = Table(
        Column("case", no_wrap=True, min_width=39), "forward ms", "backward ms", "step ms", "dense ms", "ratio"
    )
    for row in rows:
        numbers = (f"{row[name]:.0f}" for name in ("forward_ms", "backward_ms", "ms", "dense_ms"))
        table.add_row(str(row["case"]), *numbers, f"{row['ratio']:.3f}")
    console.print(table)
    machine = {"clock": arguments.clock, "load": os.getloadavg()[0]}
    write_results(arguments.output, {**results_header(), **machine}, rows)


if __name__ == "__main__":
    main()
