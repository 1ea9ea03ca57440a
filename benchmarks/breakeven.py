"""From which length on sparse attention is faster than dense attention on the GPU: one layer, bfloat16, batch 1.

Attention is sparse at every length here, also where all blocks are visited; ``dense_len`` should be set no lower than
the break-even length. Dense attention is cuDNN's.
"""

from __future__ import annotations

import argparse

import _baselines as baselines
import _stages as stages
import torch
from _common import break_even, note, show
from _data import Heads, make_data
from _gpu import (
    TOKENS,
    Row,
    Scoring,
    add_scoring,
    blocks_option,
    case_name,
    config_for,
    floored,
    geometry_of,
    gpu_header,
    gpu_parser,
    heads_option,
    measure_ceilings,
    milliseconds,
    positive_option,
    require_gpu,
    save,
    scoring_of,
)
from _work import Ceilings, attention_work, selection_work
from rich.console import Console
from rich.progress import track

LENGTHS = (4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536)
COLUMNS = {"ms": "ms", "dense_ms": "dense", "ratio": "ratio", "floor_ms": "floor"}


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
    row["ms"] = milliseconds(lambda: stages.forward(q, k, v, config), device)
    row["dense_ms"] = milliseconds(dense, device)
    row["ratio"] = row["ms"] / row["dense_ms"]
    work = attention_work(heads, length, geometry) + selection_work(heads, length, geometry)
    return floored(row, work, ceilings)


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument(
        "--lengths", type=positive_option, nargs="+", default=list(LENGTHS), metavar="N", help="tokens"
    )
    options.add_argument("--blocks", type=blocks_option, default=96, metavar="N", help="visited blocks (96)")
    options.add_argument("--data", choices=["local", "random"], default="local")
    options.add_argument("--heads", type=heads_option, default="32x8x128", metavar="QxKxD", help="(32x8x128)")
    add_scoring(options)
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    ceilings = measure_ceilings(device)
    heads = arguments.heads
    rows = []
    for length in track(sorted(arguments.lengths), "measuring", console=Console(stderr=True)):
        rows.append(measure(heads, arguments.blocks, length, arguments.data, ceilings, device, scoring_of(arguments)))
        torch.cuda.empty_cache()
    show(arguments.format, rows, COLUMNS, {"ratio": ".3f"})
    even = break_even(rows)
    note(arguments.format, f"break-even length: {even}")
    name = "breakeven" if arguments.scorer == "pooled" else "breakeven_tokens"
    save(name, arguments.results, gpu_header(device, ceilings) | {"break_even": even}, rows)


if __name__ == "__main__":
    main()
