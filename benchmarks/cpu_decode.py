"""A decode step on the CPU: sparse attention over a cache against PyTorch's dense attention.

Measures one attention layer of SmolLM2-135M (9 query heads, 3 KV heads, 64 numbers each, float32, batch 1) with the
default geometry, in one process: one new token over a cache of so many keys, block selection and the update of the
compressed keys included. Each token finds one key more than the last.

``refill`` is the one call that compresses a whole cache anew, ``dense by length`` the operator below ``dense_len``. On
a machine that does other work too, OMP_WAIT_POLICY=passive keeps threads from waiting for each other in vain, which a
step of many short operators suffers from most.
"""

from __future__ import annotations

import argparse
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

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops.attention_args import geometry_text
from infllm_pass.lowering.ops.decode import decode_attention, new_state
from infllm_pass.tools.output import add_format_options

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_decode.json"


def milliseconds(steps: dict[str, Callable[[int], object]], count: int) -> dict[str, float]:
    """Medians of ``step(i)`` for i below `count`, after up to three rounds that are not counted.

    The steps take turns: what else the machine does then meets all of them, and none finds its keys in the caches.

    Returns:
        ``{name}_ms``: time on the clock; ``{name}_cpu_ms``: processor time of all threads together.
    """
    clocks = {"ms": time.perf_counter, "cpu_ms": time.process_time}
    times: dict[str, list[float]] = {f"{name}_{unit}": [] for name in steps for unit in clocks}
    for number in [*range(min(3, count)), *range(count)]:
        for name, step in steps.items():
            begin = [clock() for clock in clocks.values()]
            step(number)
            for (unit, clock), start in zip(clocks.items(), begin, strict=True):
                times[f"{name}_{unit}"].append(1e3 * (clock() - start))
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
        numbers = (None, None, None, dim**-0.5, dense_len, geometry_text(geometry))
        return decode_attention(q[number], k, v, state, end, *numbers)

    def dense(number: int) -> Tensor:
        end = length + number
        return F.scaled_dot_product_attention(q[number], k[:, :, :end], v[:, :, :end], enable_gqa=True)

    def refill(_: int) -> object:
        state[2].zero_()
        return sparse(0)

    refilled = milliseconds({"refill": refill}, 3)
    below = {"below_dense_len": lambda number: sparse(number, 2 * length)}
    taken = milliseconds({"sparse": sparse, "dense": dense, **below}, steps)
    return {
        "case": f"decode/{heads}x{heads_kv}x{dim}/{geometry.selected_blocks}/{length}",
        "length": length,
        **taken,
        "ratio": taken["sparse_ms"] / taken["dense_ms"],
        "cpu_ratio": taken["sparse_cpu_ms"] / taken["dense_cpu_ms"],
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
    add_format_options(parser)
    arguments = parser.parse_args()

    rows = [
        measure(length, arguments) for length in track(arguments.lengths, "measuring", console=Console(stderr=True))
    ]
    columns = {"sparse_ms": "sparse ms", "dense_ms": "SDPA ms", "ratio": "ratio", "cpu_ratio": "processor time"}
    columns |= {"refill_ms": "refill ms", "below_dense_len_ms": "dense by length ms"}
    show(arguments.format, rows, columns, default=".3f")
    even = break_even(rows)
    note(arguments.format, f"break-even length: {even}")
    header = {**results_header(), "wait_policy": os.environ.get("OMP_WAIT_POLICY", "active")}
    write_results(arguments.output, {**header, "load": os.getloadavg()[0], "break_even": even}, rows)


if __name__ == "__main__":
    main()
