"""``infllm-pass tune``: measures where sparse attention breaks even on this machine, for ``dense_len="auto"``."""

from __future__ import annotations

import argparse
import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import TuningError
from infllm_pass.lowering.ops.attention_args import AttentionCall
from infllm_pass.lowering.ops.dispatch import attend
from infllm_pass.plan.break_even import AttentionPlace, BreakEvenRow, add_user_rows, device_name
from infllm_pass.tables import Column, FittedTable
from infllm_pass.tools.output import OutputFormat, print_table

LENGTHS = (2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 131072)
CORRELATION = 0.98
"""Of neighbouring tokens in the data that is measured on: as in text, neighbours select mostly the same blocks."""

COLUMNS = (
    Column("heads", "heads", right=False),
    Column("scorer", "scorer", right=False),
    Column("blocks", "blocks", "d"),
    Column("length", "tokens", "d"),
    Column("dense_ms", "dense, ms", ".3f"),
    Column("sparse_ms", "sparse, ms", ".3f"),
    Column("ratio", "ratio", ".3f"),
)


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and channels of a head."""

    queries: int
    keys: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """From ``32x8x128``.

        Raises:
            ArgumentTypeError: it is something else.
        """
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise argparse.ArgumentTypeError(f"expected QUERYxKEYxDIM such as 32x8x128, got {text!r}")
        queries, keys, dim = map(int, parts)
        if queries % keys:
            raise argparse.ArgumentTypeError(f"{queries} query heads are no multiple of {keys} key/value heads")
        return cls(queries, keys, dim)

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}x{self.dim}"


def tune(
    options: argparse.Namespace, configured: Callable[[SparseAttentionConfig], SparseAttentionConfig], console: Console
) -> None:
    """Measure, print the rows and keep the break-even lengths.

    Args:
        options: ``heads``, ``scorers``, ``longest``, ``device`` and ``format``.
        configured: sets the fields that were given as options.
        console: where lines for people go.

    Raises:
        TuningError: sparse attention of some heads is slower at every length (the lengths of the others are kept), or
            the file of earlier rows is damaged.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = configured(SparseAttentionConfig())
    lengths = [length for length in LENGTHS if length <= options.longest]
    measured: list[dict[str, Any]] = []
    kept, slower = [], []
    cases = [(heads, scorer) for heads in options.heads for scorer in options.scorers]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases) * len(lengths))
        for heads, scorer in cases:
            chosen = replace(config, scorer=scorer)
            rows = []
            for length in lengths:
                rows.append(measure(heads, chosen, length, device))
                progress.advance(task)
            measured += rows
            try:
                kept.append(_row(heads, chosen, device, break_even_length(rows)))
            except TuningError as error:
                slower.append(str(error))
    print_table(options.format, FittedTable(COLUMNS, measured), measured)
    path = add_user_rows(kept)
    if kept and options.format is OutputFormat.TABLE:
        for row in kept:
            heads = f"{row.query_heads}x{row.kv_heads}x{row.head_dim}"
            console.print(f"{row.device}, {heads}, {row.scorer}: breaks even at {row.length} tokens", soft_wrap=True)
        console.print(f'kept in {path}, where dense_len="auto" finds it', soft_wrap=True)
    if slower:
        raise TuningError("; ".join(slower))


def measure(heads: Heads, config: SparseAttentionConfig, length: int, device: torch.device) -> dict[str, Any]:
    """Times of dense and sparse causal attention of one layer, batch 1; medians, in milliseconds."""
    q, k, v = _data(heads, length, device)
    call = AttentionCall(heads.dim**-0.5, 0, config.geometry_for(heads.dim, _lowest(heads.dim, config)))
    grouped = heads.queries != heads.keys
    dense = _milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped), device)
    sparse = _milliseconds(lambda: attend(q, k, v, call, select=True), device)
    row = {"heads": str(heads), "scorer": config.scorer, "blocks": config.selected_blocks, "length": length}
    return row | {"dense_ms": dense, "sparse_ms": sparse, "ratio": sparse / dense}


def break_even_length(rows: Sequence[dict[str, Any]]) -> int:
    """The length from which no ratio is above 1, between measured lengths by interpolation on logarithms.

    Raises:
        TuningError: the ratio at the longest length is above 1.
    """
    if rows[-1]["ratio"] > 1.0:
        raise TuningError(
            f"sparse attention of {rows[-1]['heads']} heads is still slower than dense attention at "
            f"{rows[-1]['length']} tokens (ratio {rows[-1]['ratio']:.2f}): raise --longest, or lower --topk"
        )
    slower = [at for at, row in enumerate(rows) if row["ratio"] > 1.0]
    if not slower:
        return int(rows[0]["length"])
    before, after = rows[slower[-1]], rows[slower[-1] + 1]
    high, low = math.log(before["ratio"]), math.log(after["ratio"])
    begin, end = int(before["length"]), int(after["length"])
    return math.ceil(begin * math.pow(end / begin, high / (high - low)))


def _row(heads: Heads, config: SparseAttentionConfig, device: torch.device, length: int) -> BreakEvenRow:
    read = config.score_dims_of(heads.dim) if config.scorer == "tokens" else None
    place = AttentionPlace(device_name(device), heads.queries, heads.keys, heads.dim, read)
    return BreakEvenRow(
        **vars(place),
        scorer=config.scorer,
        selected_blocks=config.selected_blocks,
        block_size=config.block_size,
        query_block=config.query_block,
        length=length,
        source=f"infllm-pass tune, torch {torch.__version__}, {datetime.date.today()}",
    )


def _lowest(head_dim: int, config: SparseAttentionConfig) -> tuple[tuple[int, ...], ...]:
    """As many channels as token scores read; which ones makes no difference to the time."""
    return (tuple(range(config.score_dims_of(head_dim))),)


def _data(heads: Heads, length: int, device: torch.device) -> list[Tensor]:
    """Queries, keys and values in which neighbours are alike, half precision on a GPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = []
    for count in (heads.queries, heads.keys, heads.keys):
        numbers = torch.randn(1, count, length, heads.dim, generator=generator, device=device)
        numbers *= math.sqrt(1.0 - CORRELATION**2)
        reach = 1  # each holds what the last `reach` tokens add to it
        while reach < length and CORRELATION**reach > 1e-6:
            numbers[:, :, reach:] += CORRELATION**reach * numbers[:, :, :-reach]
            reach *= 2
        made.append(numbers.to(dtype))
    return made


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of some runs after one that warms up."""
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times[1:])
