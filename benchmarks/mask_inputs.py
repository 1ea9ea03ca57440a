"""What a mask costs that is handed to a graph: reading it, against one layer of dense attention that takes it.

A padded batch of one row: a boolean mask ``[1, 1, L, L]`` of a causal limit and hidden keys at the front. Reading finds
the valid keys and checks every element; the layers of a model share one reading. One layer of SmolLM2-135M (9 query
heads, 3 KV heads, 64 numbers each), in float32 on the CPU and in bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import results_header, show, write_results
from torch import Tensor

from infllm_pass.graph.mask_values import MaskValue, read_value
from infllm_pass.tools.output import add_format_options

HEADS, HEADS_KV, DIM = 9, 3, 64
HIDDEN = 100
"""Keys at the front that no query sees."""


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def measure(length: int, device: torch.device, repeats: int) -> dict[str, object]:
    """One row: what reading takes, and what attention with the mask takes."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, heads, length, DIM, dtype=dtype, device=device) for heads in (HEADS, HEADS_KV, HEADS_KV))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril_()
    mask[..., :HIDDEN] = False

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    dense_ms = milliseconds(dense, device, repeats)
    value = read_value(mask)
    if not isinstance(value, MaskValue) or not value.form.padded:
        raise RuntimeError("the mask was not read")
    read_ms = milliseconds(lambda: read_value(mask), device, repeats)
    return {
        "case": f"L={length}",
        "length": length,
        "read_ms": read_ms,
        "dense_ms": dense_ms,
        "ratio": read_ms / dense_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; their median is reported")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="where results are kept")
    add_format_options(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    header = results_header()
    if device.type == "cuda":
        header |= {"device": torch.cuda.get_device_name(device), "dtype": "bfloat16"}
    rows = [measure(length, device, arguments.repeats) for length in arguments.lengths]
    show(arguments.format, rows, {"read_ms": "reading ms", "dense_ms": "dense layer ms", "ratio": "ratio"})
    folder = str(header["device"]).lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    results = Path(__file__).parent / "results" / folder / "mask_inputs.json"
    write_results(arguments.output or results, header, rows)


if __name__ == "__main__":
    main()
