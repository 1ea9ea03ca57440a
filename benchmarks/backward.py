"""Backward on the GPU: gradients of sparse attention against those of dense attention, one layer, bfloat16, batch 1.

Both sides start from what their forward pass saved and take the gradient of the output as given. ``dense_ms`` is
cuDNN's backward pass, ``flash_ms`` that of PyTorch's flash kernel. ``floor_ms``: see ``_work.py``.
"""

from __future__ import annotations

import argparse
from functools import partial

import _baselines as baselines
import _stages as stages
import torch
from _common import show
from _data import LENGTHS, MAIN, Heads, make_data
from _gpu import (
    Row,
    attempt,
    blocks_option,
    case_name,
    config_for,
    floored,
    gpu_header,
    gpu_parser,
    heads_option,
    measure_ceilings,
    milliseconds,
    positive_option,
    require_gpu,
    save,
    scratch_gb,
)
from _work import Ceilings, backward_work
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend

COLUMNS = {
    "ms": "ms",
    "dense_ms": "dense",
    "ratio": "ratio",
    "flash_ms": "flash",
    "floor_ms": "floor",
    "of_floor": "of floor",
    "tflops": "TFLOP/s",
    "scratch_gb": "scratch GB",
}
FORMATS = {"ratio": ".3f", "tflops": ".0f"}


def measure(heads: Heads, blocks: int, length: int, data: str, ceilings: Ceilings, device: torch.device) -> Row:
    """The row of one case."""
    q, k, v = make_data(data, heads, length, device)
    row: Row = {"case": case_name("bwd", heads, blocks, length, data), "kind": "bwd", "heads": str(heads)}
    row |= {"blocks": blocks, "length": length, "data": data}
    config = config_for(blocks)
    selection = stages.select(q, k, config)
    out, lse = stages.attend(q, k, v, selection, config)
    grad = torch.randn_like(out)

    def backward() -> object:
        return stages.backward(grad, q, k, v, out, lse, selection, config)

    row["ms"] = milliseconds(backward, device)
    row["scratch_gb"] = scratch_gb(backward, device)
    floored(row, backward_work(heads, length, config.geometry), ceilings)
    for name, backend in (("dense", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        attempt(row, name, partial(dense_ms, q, k, v, backend))
    known = [row[name] for name in ("dense_ms", "flash_ms") if row[name] is not None]
    if row["dense_ms"] is None and known:
        row["dense_ms"], row["dense_note"] = known[0], "flash: " + row["dense_note"]
    row["ratio"] = row["ms"] / row["dense_ms"] if known else None
    return row


def dense_ms(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> float:
    """Time of a dense backward pass in ms."""
    return milliseconds(baselines.dense_gradient(q, k, v, backend)[0], q.device)


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument(
        "--lengths", type=positive_option, nargs="+", default=list(LENGTHS), metavar="N", help="tokens"
    )
    options.add_argument("--blocks", type=blocks_option, default=64, metavar="N", help="visited blocks (64)")
    options.add_argument("--data", choices=["local", "random"], default="local")
    options.add_argument("--heads", type=heads_option, nargs="+", default=list(MAIN), metavar="QxKxD")
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    ceilings = measure_ceilings(device)
    cases = [(heads, length) for heads in arguments.heads for length in arguments.lengths]
    rows = []
    for heads, length in track(cases, "measuring", console=Console(stderr=True)):
        rows.append(measure(heads, arguments.blocks, length, arguments.data, ceilings, device))
        torch.cuda.empty_cache()
    show(arguments.format, rows, COLUMNS, FORMATS)
    save("backward", arguments.results, gpu_header(device, ceilings), rows)


if __name__ == "__main__":
    main()
