"""Memory of the operators on the GPU: what a call allocates beyond its inputs and its result, bfloat16, batch 1.

``scratch_gb`` is the peak of allocated memory during a call, less what was allocated before it and what its result
holds. The log-sum-exp and the selection, which the backward pass needs, count as scratch of the forward pass and as
input of the backward pass. ``dense_gb`` is the same of cuDNN's attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import _baselines as baselines
import _stages as stages
import torch
from _common import show
from _data import LENGTHS, MAIN, Heads, make_data
from _gpu import (
    BASELINE_ERRORS,
    Row,
    blocks_option,
    case_name,
    config_for,
    gpu_header,
    gpu_parser,
    heads_option,
    positive_option,
    reason,
    require_gpu,
    save,
    scratch_gb,
)
from rich.console import Console
from rich.progress import track
from torch.nn.attention import SDPBackend

COLUMNS = {"inputs_gb": "inputs GB", "scratch_gb": "scratch GB", "dense_gb": "dense scratch GB"}
FORMATS = dict.fromkeys(COLUMNS, ".3f")


def measure(heads: Heads, blocks: int, length: int, device: torch.device) -> list[Row]:
    """The rows of the forward and the backward pass."""
    q, k, v = make_data("local", heads, length, device)
    config = config_for(blocks)
    selection = stages.select(q, k, config)
    out, lse = stages.attend(q, k, v, selection, config)
    grad = torch.randn_like(out)
    inputs = sum(x.nbytes for x in (q, k, v)) / 1e9
    sides: dict[str, tuple[float, Callable[[], object], Callable[[], Callable[[], object]]]] = {
        "memory_fwd": (
            inputs,
            lambda: stages.forward(q, k, v, config),
            lambda: baselines.dense(q, k, v)[0],
        ),
        "memory_bwd": (
            inputs + (out.nbytes + grad.nbytes + lse.nbytes) / 1e9,
            lambda: stages.backward(grad, q, k, v, out, lse, selection, config),
            lambda: baselines.dense_gradient(q, k, v, SDPBackend.CUDNN_ATTENTION)[0],
        ),
    }
    rows = []
    for kind, (size, call, dense) in sides.items():
        row: Row = {"case": case_name(kind, heads, blocks, length, "local"), "kind": kind, "heads": str(heads)}
        row |= {"blocks": blocks, "length": length, "inputs_gb": size, "scratch_gb": scratch_gb(call, device)}
        try:
            row["dense_gb"] = scratch_gb(dense(), device)
        except BASELINE_ERRORS as error:
            row["dense_gb"], row["dense_note"] = None, reason(error)
        rows.append(row)
    return rows


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument(
        "--lengths", type=positive_option, nargs="+", default=list(LENGTHS), metavar="N", help="tokens"
    )
    options.add_argument("--blocks", type=blocks_option, default=64, metavar="N", help="visited blocks (64)")
    options.add_argument("--heads", type=heads_option, nargs="+", default=list(MAIN), metavar="QxKxD")
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    cases = [(heads, length) for heads in arguments.heads for length in arguments.lengths]
    rows: list[Row] = []
    for heads, length in track(cases, "measuring", console=Console(stderr=True)):
        rows += measure(heads, arguments.blocks, length, device)
        torch.cuda.empty_cache()
    show(arguments.format, rows, COLUMNS, FORMATS)
    save("memory", arguments.results, gpu_header(device), rows)


if __name__ == "__main__":
    main()
