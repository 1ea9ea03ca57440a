"""From which length on sparse attention is faster than dense attention on the GPU: one layer, bfloat16, batch 1.

``ms`` is sparse at every length, also where all blocks are visited; ``auto_ms`` is what a graph with
``dense_len="auto"`` runs, the operators or dense attention, and is to be no slower than dense attention at any length.
Dense attention is cuDNN's; the three take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import _baselines as baselines
import _stages as stages
import torch
from _common import break_even, note, show
from _data import Heads, make_data
from _gpu import (
    TOKENS,
    Row,
    Scoring,
    add_layer,
    case_name,
    config_for,
    floored,
    geometry_of,
    gpu_header,
    gpu_parser,
    in_turns,
    measure_ceilings,
    require_gpu,
    save,
    scoring_of,
)
from _work import Ceilings, attention_work, selection_work
from rich.console import Console
from rich.progress import track

from infllm_pass.lowering.ops.attention_args import AttentionCall
from infllm_pass.lowering.ops.dispatch import attend
from infllm_pass.plan.break_even import AttentionPlace, device_name, resolved

LENGTHS = (2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 131072)
COLUMNS = {"ms": "ms", "dense_ms": "dense", "ratio": "ratio", "auto_ms": "auto", "auto_ratio": "ratio of auto"}


def measure(
    heads: Heads,
    blocks: int,
    length: int,
    data: str,
    ceilings: Ceilings,
    device: torch.device,
    scoring: Scoring = TOKENS,
) -> Row:
    """The row of one length."""
    q, k, v = make_data(data, heads, length, device)
    config = config_for(blocks, 0, scoring)
    geometry = geometry_of(config, heads.dim)
    dense, kernel = baselines.dense(q, k, v)
    row: Row = {"case": case_name("fwd", heads, blocks, length, data) + scoring.suffix, "kind": "fwd"}
    row |= {
        "heads": str(heads),
        "scorer": scoring.scorer,
        "blocks": blocks,
        "length": length,
        "data": data,
        "dense_kernel": kernel,
    }
    auto = replace(config, dense_len="auto")
    place = AttentionPlace(device_name(device), heads.queries, heads.keys, heads.dim)
    row["dense_len"] = switch = resolved(auto, place).dense_len
    call = AttentionCall(heads.dim**-0.5, int(switch), geometry)
    calls: dict[str, Callable[[], object]] = {
        "ms": lambda: stages.forward(q, k, v, config),
        "dense_ms": dense,
        "auto_ms": dense if length < int(switch) else lambda: attend(q, k, v, call, select=True),
    }
    row |= in_turns(calls, device)
    row["ratio"], row["auto_ratio"] = row["ms"] / row["dense_ms"], row["auto_ms"] / row["dense_ms"]
    work = attention_work(heads, length, geometry) + selection_work(heads, length, geometry)
    return floored(row, work, ceilings)


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    add_layer(options, lengths=list(LENGTHS))
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    ceilings = measure_ceilings(device)
    rows = []
    points = [(heads, length) for heads in arguments.heads for length in sorted(arguments.lengths)]
    for heads, length in track(points, "measuring", console=Console(stderr=True)):
        rows.append(measure(heads, arguments.blocks, length, arguments.data, ceilings, device, scoring_of(arguments)))
        torch.cuda.empty_cache()
    show(arguments.format, rows, COLUMNS, {"ratio": ".3f", "auto_ratio": ".3f"})
    names = dict.fromkeys(row["heads"] for row in rows)
    even = {name: break_even([row for row in rows if row["heads"] == name]) for name in names}
    note(arguments.format, f"break-even length: {', '.join(f'{name}: {length}' for name, length in even.items())}")
    name = "breakeven" if arguments.scorer == "pooled" else "breakeven_tokens"
    save(name, arguments.results, gpu_header(device, ceilings) | {"break_even": even}, rows)


if __name__ == "__main__":
    main()
