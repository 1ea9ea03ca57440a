"""Generation on the GPU: a Llama of Llama-3-8B's sizes with random weights over a static cache, bfloat16.

The same model in three ways, each with ``mode="reduce-overhead"`` for steps (one CUDA graph) and the default mode for
prompts: ``compiled``, what ``torch.compile`` makes of it; ``dense``, ``infllm_pass.dense()``; and ``sparsified``,
with 96 visited blocks. A prompt is fed in chunks of one size, after a first chunk that compiles; ``ttft_s`` is the
time up to the first new token, on the host's clock, and ``prompt_peak_gb`` the peak of memory until then. With
``--fill random`` the cache is filled with random numbers instead, which saves the time. Then every step feeds its
likeliest token to the next one: ``ms`` is the median time from step to step, by CUDA events, nothing waiting for the
host. ``refill_ms`` is a step after somebody wrote to the caches, as the first after a prompt; ``peak_gb`` is the peak
of allocated memory during the steps, weights included. Every row is compiled by itself; results are written after
every row.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import dump_results, show
from _gpu import (
    BASELINE_ERRORS,
    Row,
    blocks_option,
    config_for,
    gpu_header,
    gpu_parser,
    positive_option,
    reason,
    require_gpu,
    results_path,
)
from model import LLAMA_3_8B, build, synchronize
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch._dynamo.utils import counters

import infllm_pass
from infllm_pass.config import PUBLISHED, SparseAttentionConfig

WARM_UP = 4
"""Steps that compile, run once without a CUDA graph, record it, and replay it."""

COLUMNS = {
    "ms": "ms a token",
    "speedup": "times best dense",
    "ttft_s": "first token s",
    "refill_ms": "first step ms",
    "peak_gb": "peak GB",
    "graphs": "graphs",
    "note": "note",
}
FORMATS = {"graphs": ".0f"}

Variant = Callable[[Any, SparseAttentionConfig], Any]

VARIANTS: dict[str, Variant] = {
    "compiled": lambda compiled, config: compiled,
    "dense": lambda compiled, config: infllm_pass.dense(infllm_pass.sparsify(compiled, config)),
    "sparsified": lambda compiled, config: infllm_pass.sparsify(compiled, config, strict=True),
}
"""What is done with the compiled model."""


class Text:
    """Rows of tokens in a static cache, one variant of the model that continues them.

    Args:
        plain: the model.
        transform: makes the variant of a compiled model.
        config: what sparse attention selects.
        batch: number of rows.
        length: tokens of the prompt.
        room: tokens that may follow it.
    """

    def __init__(
        self, plain: nn.Module, transform: Variant, config: SparseAttentionConfig, batch: int, length: int, room: int
    ) -> None:
        from transformers import StaticCache

        weight = next(plain.parameters())
        sizes: Any = plain.config
        self.device, self.vocabulary, self.length = weight.device, sizes.vocab_size, length
        self.cache = StaticCache(config=sizes, max_cache_len=length + room)
        heads = sizes.num_key_value_heads, sizes.hidden_size // sizes.num_attention_heads
        self.cache.early_initialization(batch, *heads, weight.dtype, weight.device)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=weight.device)
        self._prompt = transform(torch.compile(plain), config)
        self._step = transform(torch.compile(plain, mode="reduce-overhead"), config)

    def fill(self) -> None:
        """Random keys and values in place of a prompt's."""
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(self.length)

    def touch(self) -> None:
        """Write to every layer's keys without changing them: as after a prompt, none count as compressed."""
        for layer in self.cache.layers:
            layer.keys[:, :, :1].add_(0)

    def read(self, chunk: int, chunks: int | None = None) -> float:
        """Feed a random prompt in chunks, or the first of them, into the emptied cache; seconds to the next token.

        Args:
            chunk: tokens fed at once; the prompt is a multiple of it.
            chunks: how many are fed; None: all.
        """
        self.cache.reset()
        count = self.length // chunk if chunks is None else chunks
        parts = [
            torch.randint(0, self.vocabulary, (self.token.shape[0], chunk), device=self.device) for _ in range(count)
        ]
        synchronize(self.device)
        begin = time.perf_counter()
        for part in parts:
            logits = self._prompt(part, past_key_values=self.cache, logits_to_keep=1).logits
        self._choose(logits)
        synchronize(self.device)
        return time.perf_counter() - begin

    def steps(self, count: int) -> list[float]:
        """Generate so many tokens, greedily; the ms from one to the next, by CUDA events."""
        marks = [self._mark()]
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            self._choose(self._step(self.token, past_key_values=self.cache).logits)
            marks.append(self._mark())
        synchronize(self.device)
        if self.device.type != "cuda":
            return [1e3 * (end - begin) for begin, end in itertools.pairwise(marks)]
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]

    def _choose(self, logits: Tensor) -> None:
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@torch.no_grad()
def measure(
    variant: str,
    plain: nn.Module,
    batch: int,
    length: int,
    config: SparseAttentionConfig,
    *,
    chunk: int | None,
    steps: int,
) -> Row:
    """The row of one case.

    Args:
        variant: a key of `VARIANTS`.
        plain: the model.
        batch: number of rows.
        length: tokens in the cache before the first step.
        config: what sparse attention selects.
        chunk: tokens of the prompt that are fed at once; None: the cache is filled with random numbers.
        steps: tokens to time.
    """
    sizes: Any = plain.config
    layers, device = sizes.num_hidden_layers, next(plain.parameters()).device
    row: Row = {"case": f"generate/{variant}/{layers}/{length}/{batch}", "variant": variant, "layers": layers}
    row |= {"length": length, "batch": batch, "chunk": chunk, "ms": None, "ttft_s": None, "peak_gb": None}
    torch._dynamo.reset()
    counters.clear()
    try:
        text = Text(plain, VARIANTS[variant], config, batch, length, WARM_UP + 1 + steps)
        if chunk is None:
            text.fill()
        else:
            begin = time.perf_counter()
            text.read(chunk, 1)
            row["compile_prompt_s"] = time.perf_counter() - begin
            reset_peak(device)
            row["ttft_s"], row["prompt_peak_gb"] = text.read(chunk), peak_gb(device)
        begin = time.perf_counter()
        text.steps(WARM_UP)
        row["compile_step_s"] = time.perf_counter() - begin
        text.touch()
        reset_peak(device)
        compiled = counters["stats"]["unique_graphs"]
        (row["refill_ms"],) = text.steps(1)
        times = text.steps(steps)
        row["ms"], row["slowest_ms"] = statistics.median(times), max(times)
        row["graphs"] = counters["stats"]["unique_graphs"]
        row["recompiled"] = row["graphs"] - compiled
        row["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
        row["peak_gb"] = peak_gb(device)
    except BASELINE_ERRORS as error:
        if variant == "sparsified":
            raise
        row["note"] = reason(error)
    return row


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """Peak of allocated memory since `reset_peak`; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give the memory of a case back, CUDA graphs included."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def add_speedups(rows: list[Row]) -> None:
    """Put the time of the faster dense variant over that of each row into it, where both are known."""
    for row in rows:
        case = row["layers"], row["length"], row["batch"]
        dense = [
            other["ms"]
            for other in rows
            if (other["layers"], other["length"], other["batch"]) == case
            and other["variant"] != "sparsified"
            and other["ms"] is not None
        ]
        row["speedup"] = min(dense) / row["ms"] if dense and row["ms"] is not None else None


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument("--layers", type=positive_option, default=32, metavar="L", help="layers (32)")
    options.add_argument(
        "--lengths", type=positive_option, nargs="+", default=[32768, 131072], metavar="N", help="cached tokens"
    )
    options.add_argument("--batches", type=positive_option, nargs="+", default=[1, 2], metavar="N", help="rows (1, 2)")
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options.add_argument("--blocks", type=blocks_option, default=96, metavar="N", help="visited blocks (96)")
    options.add_argument("--steps", type=positive_option, default=100, metavar="N", help="tokens to time (100)")
    options.add_argument(
        "--chunk", type=positive_option, default=8192, metavar="N", help="tokens of the prompt fed at once (8192)"
    )
    options.add_argument(
        "--fill", choices=["prefill", "random"], default="prefill", help="what the cache is filled with (prefill)"
    )
    return options


def main() -> None:
    command = parser()
    arguments = command.parse_args()
    chunk = arguments.chunk if arguments.fill == "prefill" else None
    wrong = [length for length in arguments.lengths if chunk is not None and length % chunk]
    if wrong:
        command.error(f"--lengths: {wrong[0]} is no multiple of --chunk {chunk}, which a prompt is fed in")
    device = require_gpu()
    config = config_for(arguments.blocks, PUBLISHED["dense_len"])
    plain = build(arguments.layers, LLAMA_3_8B, device, torch.bfloat16, head=True)
    import transformers

    header = gpu_header(device) | {"transformers": transformers.__version__, "sizes": LLAMA_3_8B}
    header |= {"blocks": arguments.blocks, "steps": arguments.steps}
    name = "generate" if arguments.layers == 32 else f"generate_{arguments.layers}_layers"
    path = results_path(name, arguments.results, header)
    cases = list(itertools.product(arguments.batches, sorted(arguments.lengths), arguments.variants))
    rows: list[Row] = []
    for batch, length, variant in track(cases, "measuring", console=Console(stderr=True)):
        rows.append(measure(variant, plain, batch, length, config, chunk=chunk, steps=arguments.steps))
        add_speedups(rows)
        dump_results(path, header, rows)
        release(device)
    show(arguments.format, rows, COLUMNS, FORMATS)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
