"""Peak memory of a compiled Hugging Face Llama on the CPU: with its N x N mask, and with the pass.

Runs a random-weight Llama of SmolLM2-135M's geometry (two layers, float32, batch 1) through ``torch.compile``,
Inductor behind, and measures by how much resident memory rises during one forward call after a warm-up. Each
side runs in a process of its own. ``use_cache=False`` as in training and scoring: transformers then builds the
mask tensor. Linux only (``/proc``).
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import re
from pathlib import Path

import torch
from _common import results_header, show, write_results
from rich.console import Console
from rich.progress import track

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.tools.output import add_format_options

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_memory.json"
SIDES = ("compiled", "dense", "sparse")
"""``torch.compile`` alone; the pass below dense_len; the pass above dense_len."""


def resident_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024


def peak_of_a_call(side: str, length: int, results: multiprocessing.SimpleQueue) -> None:
    """Put the rise of resident memory in MB during one forward call, warm."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=512,
        max_position_embeddings=1 << 20,
    )
    model = torch.compile(LlamaModel(sizes).eval())
    if side != "compiled":
        dense_len = length + 1 if side == "dense" else length
        model = infllm_pass.sparsify(model, SparseAttentionConfig(dense_len=dense_len), strict=True)
    ids = torch.randint(0, 512, (1, length))
    with torch.no_grad():
        model(ids, use_cache=False)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_mb("VmRSS")
        model(ids, use_cache=False)
        results.put(resident_mb("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_format_options(parser)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    runs = [(length, side) for length in arguments.lengths for side in SIDES]
    for length, side in track(runs, "measuring", console=Console(stderr=True)):
        results = context.SimpleQueue()
        process = context.Process(target=peak_of_a_call, args=(side, length, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{side} at {length} tokens ended with exit code {process.exitcode}")
        case = f"memory/9x3x64/{length}/{side}"
        rows.append({"case": case, "length": length, "side": side, "peak_mb": results.get()})

    lengths = [
        {"case": length} | {row["side"]: row["peak_mb"] for row in rows if row["length"] == length}
        for length in arguments.lengths
    ]
    title = "rise of resident memory in MB during one forward call, by tokens"
    show(arguments.format, lengths, dict(zip(SIDES, SIDES, strict=True)), title=title, default=".0f")
    write_results(arguments.output, results_header(), rows)


if __name__ == "__main__":
    main()
