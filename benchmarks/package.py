"""A packaged model against the compiled one: the model of `model.py` as a ``.pt2`` of AOTInductor, bfloat16.

Prefill of one sequence, of embeddings of independent tokens, with 96 visited blocks:
``sparsify(torch.compile(model))``, the same with ``dynamic=True``, and the package, which is made once and serves all
lengths. ``ratio`` is to the first. Times are medians by CUDA events. Results are written after every row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import dump_results
from _gpu import (
    Row,
    blocks_option,
    config_for,
    gpu_header,
    gpu_parser,
    milliseconds,
    positive_option,
    require_gpu,
    results_path,
    show,
)
from model import LLAMA_3_8B, build, synchronize
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.export import Dim

import infllm_pass
from infllm_pass import SparseAttentionConfig

SIZES = {**LLAMA_3_8B, "vocab_size": 1024}
"""Embeddings are given, so that the table of them would only make the file larger."""

LENGTHS = (4096, 32768)
VARIANTS = ("compiled", "compiled_dynamic", "package")
COLUMNS = {"ms": "ms", "ratio": "of compiled", "error": "difference", "ready_s": "ready after s"}
FORMATS = {"ratio": ".3f", "error": ".1e", "ready_s": ".1f"}


class States(nn.Module):
    """The last hidden states ``[B, L, hidden]`` as a function of embeddings of that shape."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor) -> Tensor:
        """The model without a cache."""
        states: Tensor = self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return states


def prepare(variant: str, model: nn.Module, example: Tensor, config: SparseAttentionConfig, folder: Path) -> Any:
    """The model in the form that is measured, with everything done that does not depend on a length."""
    torch._dynamo.reset()
    if variant != "package":
        dynamic = True if variant == "compiled_dynamic" else None
        return infllm_pass.sparsify(torch.compile(model, dynamic=dynamic), config, strict=True)
    shapes = {"embeddings": {1: Dim.DYNAMIC}}
    infllm_pass.package(model, (example,), folder / "model.pt2", dynamic_shapes=shapes, config=config)
    return infllm_pass.load_package(folder / "model.pt2")


def measure(
    model: nn.Module, lengths: list[int], config: SparseAttentionConfig, *, variants: tuple[str, ...] = VARIANTS
) -> Iterator[Row]:
    """The rows, one a variant and length. ``error`` is relative to the first variant's result."""
    weight = next(model.parameters())
    torch.manual_seed(0)
    hidden = weight.shape[-1]
    inputs = {
        length: torch.randn(1, length, hidden, device=weight.device).mul_(0.02).to(weight.dtype)
        for length in sorted(lengths)
    }
    first: dict[int, tuple[Tensor, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for variant in variants:
            begin = time.perf_counter()
            runs = prepare(variant, model, inputs[min(lengths)], config, Path(folder))
            for length, embeddings in inputs.items():
                call = caller(runs, embeddings)
                result = call().float()
                synchronize(weight.device)
                row: Row = {"case": f"{variant}/{length}", "variant": variant, "length": length}
                row["ready_s"] = time.perf_counter() - begin
                row["ms"] = milliseconds(call, weight.device)
                expected, ms = first.setdefault(length, (result.cpu(), row["ms"]))
                row["ratio"] = row["ms"] / ms
                row["error"] = float((result.cpu() - expected).norm() / expected.norm())
                yield row
                begin = time.perf_counter()


def caller(runs: Any, embeddings: Tensor) -> Callable[[], Tensor]:
    """One forward pass."""

    def call() -> Tensor:
        states: Tensor = runs(embeddings)
        return states

    return call


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument("--layers", type=positive_option, default=4, metavar="L", help="decoder layers (4)")
    options.add_argument("--lengths", type=positive_option, nargs="+", default=list(LENGTHS), metavar="N")
    options.add_argument("--blocks", type=blocks_option, default=96, metavar="N", help="visited blocks (96)")
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    config = config_for(arguments.blocks, SparseAttentionConfig().dense_len)
    model = States(build(arguments.layers, SIZES, device, torch.bfloat16)).eval()
    header = gpu_header(device) | {"layers": arguments.layers, "sizes": SIZES}
    path = results_path("package", arguments.results, header)
    rows: list[Row] = []
    total = len(VARIANTS) * len(arguments.lengths)
    for row in track(measure(model, arguments.lengths, config), "measuring", total, console=Console(stderr=True)):
        rows.append(row)
        dump_results(path, header, rows)
    show(Console(), rows, COLUMNS, FORMATS)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
