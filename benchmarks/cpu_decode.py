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

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops.attention_args import DecodeCall
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


def measure(length: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each scorer."""
    heads, heads_kv, dim = arguments.heads, arguments.heads_kv, arguments.dim
    steps = arguments.steps
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, heads_kv, length + steps, dim, generator=generator) for _ in range(2))
    q = torch.randn(steps, 1, heads, 1, dim, generator=generator)

    def dense(number: int) -> Tensor:
        end = length + number
        return F.scaled_dot_product_attention(q[number], k[:, :, :end], v[:, :, :end], enable_gqa=True)

    def step_of(geometry: BlockGeometry, state: list[Tensor], dense_len: int = 0) -> Callable[[int], object]:
        def step(number: int) -> object:
            call = DecodeCall(torch.tensor([length + number]), dim**-0.5, dense_len, geometry)
            return decode_attention(q[number], k, v, state, *call.arguments)

        return step

    taking: dict[str, Callable[[int], object]] = {"dense": dense}
    refilled = {}
    for scorer in arguments.scorers:
        config = SparseAttentionConfig(scorer=scorer, score_dtype=arguments.score_dtype)
        geometry = config.geometry_for(dim, (tuple(range(dim - config.score_dims_of(dim), dim)),))
        state = new_state(k, geometry)
        taking[scorer] = step_of(geometry, state)
        taking[f"{scorer}_below_dense_len"] = step_of(geometry, state, 2 * length)

        def refill(_: int, state: list[Tensor] = state, scorer: str = scorer) -> object:
            state[-1].zero_()
            return taking[scorer](0)

        refilled[scorer] = milliseconds({"refill": refill}, 3)
    taken = milliseconds(taking, steps)
    units = ("ms", "cpu_ms")
    return [
        {
            "case": f"decode/{heads}x{heads_kv}x{dim}/96/{length}/{scorer}",
            "length": length,
            "scorer": scorer,
            **{f"sparse_{unit}": taken[f"{scorer}_{unit}"] for unit in units},
            **{
                f"{name}_{unit}": taken[f"{prefix}{name}_{unit}"]
                for unit in units
                for name, prefix in (("dense", ""), ("below_dense_len", f"{scorer}_"))
            },
            "ratio": taken[f"{scorer}_ms"] / taken["dense_ms"],
            "cpu_ratio": taken[f"{scorer}_cpu_ms"] / taken["dense_cpu_ms"],
            **refilled[scorer],
        }
        for scorer in arguments.scorers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="cached keys")
    parser.add_argument("--steps", type=int, default=64, help="consecutive tokens; their median is reported")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--heads-kv", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--scorers", nargs="+", choices=["pooled", "tokens"], default=["pooled", "tokens"])
    parser.add_argument("--score-dtype", choices=["key", "int8", "fp8"], default="key", help="of token scores")
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_format_options(parser)
    arguments = parser.parse_args()

    lengths = track(arguments.lengths, "measuring", console=Console(stderr=True))
    rows = [row for length in lengths for row in measure(length, arguments)]
    columns = {"sparse_ms": "sparse ms", "dense_ms": "SDPA ms", "ratio": "ratio", "cpu_ratio": "processor time"}
    columns |= {"refill_ms": "refill ms", "below_dense_len_ms": "dense by length ms"}
    show(arguments.format, rows, columns, default=".3f")
    even = {scorer: break_even([row for row in rows if row["scorer"] == scorer]) for scorer in arguments.scorers}
    for scorer, length in even.items():
        note(arguments.format, f"break-even length, {scorer}: {length}")
    header = {**results_header(), "wait_policy": os.environ.get("OMP_WAIT_POLICY", "active")}
    write_results(arguments.output, {**header, "load": os.getloadavg()[0], "break_even": even}, rows)


if __name__ == "__main__":
    main()
