"""A packaged model against the compiled one: the model of `model.py` as a ``.pt2`` of AOTInductor, bfloat16.

Prefill of one sequence of random tokens with 96 visited blocks: ``sparsify(torch.compile(model))``, the same with
``dynamic=True``, and the package, which is made once and serves all lengths. ``ratio`` is to the first, and so is
``error``, the relative difference of the logits. Times are medians by CUDA events. At last the program of
``examples/cpp`` is built and runs the package without Python: ``ready_s`` is the time of its whole process, ``error``
that of the last token's logits. Results are written after every row.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import dump_results, show
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
)
from _program import build_program, run_program
from model import LLAMA_3_8B, build
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.export import Dim

import infllm_pass
from infllm_pass.config import PUBLISHED, SparseAttentionConfig

SIZES = {**LLAMA_3_8B, "vocab_size": 1024}
"""Tables of more words would only make the file larger."""

LENGTHS = (4096, 32768)
VARIANTS = ("compiled", "compiled_dynamic", "package", "cpp")
COLUMNS = {"ms": "ms", "ratio": "of compiled", "error": "difference", "ready_s": "ready after s", "note": "note"}
FORMATS = {"ratio": ".3f", "error": ".1e", "ready_s": ".1f"}


class Logits(nn.Module):
    """Logits ``[B, L, vocabulary]`` as a function of token ids ``[B, L]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """The model without a cache."""
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def prepare(variant: str, model: nn.Module, example: Tensor, config: SparseAttentionConfig, folder: Path) -> Any:
    """The model in the form that is measured, with everything done that does not depend on a length."""
    torch._dynamo.reset()
    if variant != "package":
        dynamic = True if variant == "compiled_dynamic" else None
        return infllm_pass.sparsify(torch.compile(model, dynamic=dynamic), config, strict=True)
    shapes = {"ids": {1: Dim.DYNAMIC}}
    infllm_pass.package(model, (example,), folder / "model.pt2", dynamic_shapes=shapes, config=config)
    return infllm_pass.load_package(folder / "model.pt2")


def program_rows(inputs: dict[int, Tensor], expected: dict[int, Tensor], folder: Path) -> Iterator[Row]:
    """The program's rows; one with a note in place of them where it cannot be built or run."""
    try:
        program = build_program(folder)
        for length, ids in inputs.items():
            begin = time.perf_counter()
            result = run_program(program, folder / "model.pt2", ids)
            row: Row = {"case": f"cpp/{length}", "variant": "cpp", "length": length, "ms": None, "ratio": None}
            row["ready_s"] = time.perf_counter() - begin
            row["error"] = relative_difference(result, expected[length][0, -1])
            yield row
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        note = getattr(error, "stderr", None) or str(error)
        yield {"case": "cpp", "variant": "cpp", "length": None, "ms": None, "ratio": None, "note": note[-200:].strip()}


def relative_difference(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def measure(
    model: nn.Module, lengths: list[int], config: SparseAttentionConfig, *, variants: tuple[str, ...] = VARIANTS
) -> Iterator[Row]:
    """The rows, one a variant and length. ``error`` is relative to the first variant's result."""
    device = next(model.parameters()).device
    torch.manual_seed(0)
    words: int = model.model.config.vocab_size  # type: ignore[union-attr, assignment]
    inputs = {length: torch.randint(0, words, (1, length), device=device) for length in sorted(lengths)}
    first: dict[int, tuple[Tensor, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for variant in variants:
            if variant == "cpp":
                yield from program_rows(inputs, {length: logits for length, (logits, _) in first.items()}, Path(folder))
                continue
            begin = time.perf_counter()
            runs = prepare(variant, model, inputs[min(lengths)], config, Path(folder))
            for length, ids in inputs.items():
                call = caller(runs, ids)
                result = call().float().cpu()
                row: Row = {"case": f"{variant}/{length}", "variant": variant, "length": length}
                row["ready_s"] = time.perf_counter() - begin
                row["ms"] = milliseconds(call, device)
                expected, ms = first.setdefault(length, (result, row["ms"]))
                row["ratio"] = row["ms"] / ms
                row["error"] = relative_difference(result, expected)
                yield row
                begin = time.perf_counter()


def caller(runs: Any, ids: Tensor) -> Callable[[], Tensor]:
    """One forward pass."""

    def call() -> Tensor:
        logits: Tensor = runs(ids)
        return logits

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
    config = config_for(arguments.blocks, PUBLISHED["dense_len"])
    model = Logits(build(arguments.layers, SIZES, device, torch.bfloat16, head=True)).eval()
    header = gpu_header(device) | {"layers": arguments.layers, "sizes": SIZES}
    path = results_path("package", arguments.results, header)
    rows: list[Row] = []
    total = len(VARIANTS) * len(arguments.lengths)
    for row in track(measure(model, arguments.lengths, config), "measuring", total, console=Console(stderr=True)):
        rows.append(row)
        dump_results(path, header, rows)
    show(arguments.format, rows, COLUMNS, FORMATS)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
