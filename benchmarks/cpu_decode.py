"""A decode step on the CPU: sparse attention over a cache against PyTorch's dense attention.

Measures one attention layer of SmolLM2-135M (9 query heads, 3 KV heads, 64 numbers each, float32, batch 1) with the
default geometry, in one process: one new token over a cache of so many keys, block selection and the update of the
compressed keys included. Each token finds one key more than the last. ``refill`` is the one call that compresses a
whole cache anew, ``dense by length`` the operator below ``dense_len``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import break_even, results_header, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.decode import decode_attention, new_state
from infllm_pass.lowering.operators import selection_arguments

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_decode.json"


def milliseconds(steps: dict[str, Callable[[int], object]], count: int) -> dict[str, float]:
    """Median times of ``step(i)`` for i below `count`, after up to three rounds that are not counted.

    The steps take turns: what else the machine does then meets all of them, and none finds its keys in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in [*range(min(3, count)), *range(count)]:
        for name, step in steps.items():
            begin = time.perf_counter()
            step(number)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(taken[-count:]) for name, taken in times.items()}


def measure(length: int, arguments: argparse.Namespace) -> dict[str, object]:
    heads, heads_kv, dim = arguments.heads, arguments.heads_kv, arguments.dim
    geometry = BlockGeometry()
    steps = arguments.steps
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, heads_kv, length + steps, dim, generator=generator) for _ in range(2))
    q = torch.randn(steps, 1, heads, 1, dim, generator=generator)
    state = new_state(k, geometry)

    def sparse(number: int, dense_len: int = 0) -> tuple[Tensor, Tensor]:
        end = torch.tensor([length + number])
        numbers = (None, None, None, dim**-0.5, dense_len, *selection_arguments(geometry))
        return decode_attention(q[number], k, v, *state, end, *numbers)

    def dense(number: int) -> Tensor:
        end = length + number
        return F.scaled_dot_product_attention(q[number], k[:, :, :end], v[:, :, :end], enable_gqa=True)

    def refill(_: int) -> object:
        state[2].zero_()
        return sparse(0)

    refilled = milliseconds({"refill_ms": refill}, 3)
    below = {"below_dense_len_ms": lambda number: sparse(number, 2 * length)}
    taken = milliseconds({"ms": sparse, "dense_ms": dense, **below}, steps)
    return {
        "case": f"decode/{heads}x{heads_kv}x{dim}/{geometry.selected_blocks}/{length}",
        "length": length,
        **taken,
        "ratio": taken["ms"] / taken["dense_ms"],
        **refilled,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="cached keys")
    parser.add_argument("--steps", type=int, default=64, help="consecutive tokens; their median is reported")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--heads-kv", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    console = Console()
    rows = [measure(length, arguments) for length in track(arguments.lengths, "measuring", console=console)]
    columns = {"ms": "sparse ms", "dense_ms": "SDPA ms", "ratio": "ratio", "refill_ms": "refill ms"}
    table = Table(Column("case", no_wrap=True), *columns.values(), "dense by length ms")
    for row in rows:
        table.add_row(str(row["case"]), *(f"{row[name]:.3f}" for name in (*columns, "below_dense_len_ms")))
    console.print(table)
    even = break_even(rows)
    console.print(f"break-even length: {even}")
    write_results(arguments.output, {**results_header(), "break_even": even}, rows)


if __name__ == "__main__":
    main()
