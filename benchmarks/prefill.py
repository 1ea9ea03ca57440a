"""Prefill on the GPU: block selection and sparse attention against dense attention, one layer, bfloat16, batch 1.

A row's case is ``kind / query x KV heads x head size / visited blocks / tokens / data``; kinds: ``select``
(compression included), ``attend``, and ``fwd``, both in one call. Times are medians by CUDA events, sparse and dense
in the same process. ``dense_ms`` is cuDNN's causal attention, ``flash_ms`` PyTorch's flash kernel, ``flex_ms``
compiled FlexAttention with a causal block mask, ``flex_blocks_ms`` FlexAttention on the very blocks that were
selected (its lists are per 128 queries; a bit for every query and block masks the rest). FlexAttention is timed up to
32 768 tokens. ``floor_ms`` is what the measured matrix and copy rates allow (``_work.py`` has the formula).

``random`` data pick far blocks evenly; in ``local`` data queries and keys change slowly along the sequence;
``checkpoint`` data are those of a layer of SmolLM2-135M on text, computed or read from a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _baselines as baselines
import _stages as stages
import torch
from _common import note, show
from _data import LENGTHS, MAIN, SMOLLM2, Heads, make_data
from _gpu import (
    TOKENS,
    Row,
    Scoring,
    add_scoring,
    attempt,
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
    scratch_gb,
)
from _work import Ceilings, attention_work, selection_work
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend

import infllm_pass
from infllm_pass.config import PUBLISHED, SparseAttentionConfig
from infllm_pass.errors import InfLLMError

EXTRA = tuple(map(Heads.parse, ("9x3x64", "28x4x128", "32x32x128", "32x8x64", "16x8x256")))
FLEX_LIMIT = 32768
MILLION = 1 << 20
MILLION_DENSE = 1 << 18
MIXED_LENGTHS = (2048, 4096, 8192, 12288, 16384, 20480, 24576, 32768)
COLUMNS = {
    "ms": "ms",
    "dense_ms": "dense",
    "ratio": "ratio",
    "flash_ms": "flash",
    "flex_ms": "flex",
    "flex_blocks_ms": "flex blocks",
    "floor_ms": "floor",
    "of_floor": "of floor",
    "tflops": "TFLOP/s",
    "scratch_gb": "scratch GB",
}
FORMATS = {"ratio": ".3f", "tflops": ".0f"}


@dataclass(frozen=True)
class Point:
    """Data that dense attention and several budgets of blocks run on."""

    heads: Heads
    blocks: tuple[int, ...]
    length: int
    data: str
    flex: bool = False
    file: Path | None = None
    scoring: Scoring = TOKENS


def points(arguments: argparse.Namespace) -> Iterator[Point]:
    """The points of a run: those of the two main geometries, then others at 65 536 tokens."""
    scoring = scoring_of(arguments)
    if arguments.quick:
        for heads in MAIN:
            yield Point(heads, (64,), 32768, "local", scoring=scoring)
        return
    for heads in arguments.heads or MAIN:
        for length in arguments.lengths:
            for data in arguments.data:
                flex = arguments.flex and data == "local" and length <= FLEX_LIMIT
                yield Point(heads, tuple(arguments.blocks), length, data, flex, arguments.checkpoint_file, scoring)
    if not arguments.heads:
        for heads in EXTRA:
            yield Point(heads, (96,), 65536, "local", scoring=scoring)
        yield Point(SMOLLM2, (96,), 65536, "checkpoint", file=arguments.checkpoint_file, scoring=scoring)


def measure(point: Point, ceilings: Ceilings, device: torch.device) -> list[Row]:
    """Rows of all stages and budgets of blocks of a point."""
    q, k, v = make_data(point.data, point.heads, point.length, device, file=point.file)
    common: Row = {}
    dense, common["dense_kernel"] = baselines.dense(q, k, v)
    common["dense_ms"] = milliseconds(dense, device)
    extra: Row = {}
    if point.data == "local":
        attempt(extra, "flash", lambda: milliseconds(baselines.sdpa(q, k, v, SDPBackend.FLASH_ATTENTION)[0], device))
    if point.flex:
        attempt(extra, "flex", lambda: baselines.flex_ms(q, k, v, baselines.causal_mask(point.length, device)))
    rows = []
    for number, blocks in enumerate(point.blocks):
        found = stage_rows(point, blocks, (q, k, v), ceilings, device)
        found[0] |= common | extra
        found[0]["ratio"] = found[0]["ms"] / common["dense_ms"]
        if point.flex and number == 0:
            attempt(found[0], "flex_blocks", partial(flex_blocks_ms, q, k, v, config_for(blocks, 0, point.scoring)))
        rows += found
    return rows


def stage_rows(
    point: Point, blocks: int, tensors: tuple[Tensor, Tensor, Tensor], ceilings: Ceilings, device: torch.device
) -> list[Row]:
    """The rows ``fwd``, ``select`` and ``attend``."""
    q, k, v = tensors
    config = config_for(blocks, 0, point.scoring)
    geometry = geometry_of(config, point.heads.dim)

    def row(kind: str, ms: float) -> Row:
        name = case_name(kind, point.heads, blocks, point.length, point.data) + point.scoring.suffix
        return {"case": name, "kind": kind, "heads": str(point.heads), "blocks": blocks} | {
            "scorer": point.scoring.scorer,
            "length": point.length,
            "data": point.data,
            "ms": ms,
        }

    whole = row("fwd", milliseconds(lambda: stages.forward(q, k, v, config), device))
    whole["scratch_gb"] = scratch_gb(lambda: stages.forward(q, k, v, config), device)
    selection = stages.select(q, k, config)
    select = row("select", milliseconds(lambda: stages.select(q, k, config), device))
    select["compress_ms"] = milliseconds(lambda: stages.compress(k, selection.plan, config), device)
    select["blocks_per_tile"] = float(selection.lists.counts.float().mean())
    attend = row("attend", milliseconds(lambda: stages.attend(q, k, v, selection, config), device))
    attention, selecting = (work(point.heads, point.length, geometry) for work in (attention_work, selection_work))
    floored(whole, attention + selecting, ceilings)
    floored(select, selecting, ceilings)
    floored(attend, attention, ceilings)
    return [whole, select, attend]


def flex_blocks_ms(q: Tensor, k: Tensor, v: Tensor, config: SparseAttentionConfig) -> float:
    """Time of FlexAttention on the selected blocks in ms; selection and the mask's construction not counted."""
    length = k.shape[2]
    chosen = baselines.chosen_blocks(stages.select(q, k, config), length, config.geometry.num_blocks(length))
    mask = baselines.blocks_mask(chosen, q.shape[1] // k.shape[1], config.block_size)
    return baselines.flex_ms(q, k, v, mask)


def measure_mixed(
    device: torch.device,
    heads: Heads,
    lengths: tuple[int, ...] = MIXED_LENGTHS,
    scoring: Scoring = TOKENS,
) -> Row:
    """A batch of different lengths, padded on the left, through the public function with a key mask.

    Rows below ``dense_len`` attend densely. Dense attention is measured row by row without padding, the least that
    it can take: padded and masked it takes longer.
    """
    longest, config = max(lengths), config_for(96, PUBLISHED["dense_len"], scoring)
    rows = [make_data("local", heads, length, device) for length in lengths]
    key_mask = torch.zeros(len(lengths), longest, dtype=torch.bool, device=device)
    padded = [rows[0][0].new_zeros(len(lengths), x.shape[1], longest, heads.dim) for x in rows[0]]
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        key_mask[number, longest - length :] = True
        for whole, part in zip(padded, row, strict=True):
            whole[number, :, longest - length :] = part[0]
    q, k, v = padded
    ms = milliseconds(lambda: infllm_pass.switchable_attention(q, k, v, config, key_mask=key_mask), device)
    dense = [milliseconds(baselines.dense(*row)[0], device, budget_ms=50) for row in rows]
    return {
        "case": case_name("mixed", heads, 96, longest, "local") + scoring.suffix,
        "scorer": scoring.scorer,
        "kind": "mixed",
        "heads": str(heads),
        "blocks": 96,
        "length": longest,
        "lengths": list(lengths),
        "data": "local",
        "ms": ms,
        "dense_ms": sum(dense),
        "ratio": ms / sum(dense),
        "dense_note": "sum over unpadded rows",
    }


def measure_million(ceilings: Ceilings, device: torch.device, scoring: Scoring) -> Row:
    """Forward at 1 048 576 tokens; dense attention is measured at 262 144 and multiplied by 16."""
    heads, config = MAIN[0], config_for(64, 0, scoring)
    geometry = geometry_of(config, heads.dim)
    dense = milliseconds(baselines.dense(*make_data("local", heads, MILLION_DENSE, device))[0], device)
    q, k, v = make_data("local", heads, MILLION, device)
    row: Row = {
        "case": case_name("fwd", heads, 64, MILLION, "local") + scoring.suffix,
        "scorer": scoring.scorer,
        "kind": "fwd",
        "heads": str(heads),
        "blocks": 64,
        "length": MILLION,
        "data": "local",
        "ms": milliseconds(lambda: stages.forward(q, k, v, config), device),
        "dense_ms": 16 * dense,
        "dense_note": f"16 x {dense:.0f} ms measured at {MILLION_DENSE} tokens",
    }
    row["ratio"] = row["ms"] / row["dense_ms"]
    row["scratch_gb"] = scratch_gb(lambda: stages.forward(q, k, v, config), device)
    work = attention_work(heads, MILLION, geometry) + selection_work(heads, MILLION, geometry)
    return floored(row, work, ceilings)


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument(
        "--lengths", type=positive_option, nargs="+", default=list(LENGTHS), metavar="N", help="tokens"
    )
    options.add_argument(
        "--blocks", type=blocks_option, nargs="+", default=[64, 96], metavar="N", help="visited blocks (64 96)"
    )
    options.add_argument("--data", nargs="+", choices=["local", "random", "checkpoint"], default=["local", "random"])
    options.add_argument(
        "--heads",
        type=heads_option,
        nargs="+",
        metavar="QxKxD",
        help="these geometries alone, such as 32x8x128 (all, and a padded batch)",
    )
    options.add_argument("--checkpoint-file", type=Path, metavar="FILE", help="saved by checkpoint_inputs.py")
    options.add_argument("--no-flex", dest="flex", action="store_false", help="leave FlexAttention out")
    options.add_argument("--quick", action="store_true", help="two cases of 32 768 tokens, under a minute")
    add_scoring(options)
    options.add_argument("--million", action="store_true", help="1 048 576 tokens and nothing else")
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    ceilings = measure_ceilings(device)
    header: dict[str, Any] = gpu_header(device, ceilings)
    rows: list[Row] = []
    if arguments.million:
        rows.append(measure_million(ceilings, device, scoring_of(arguments)))
    else:
        chosen = list(points(arguments))
        for point in track(chosen, "measuring", console=Console(stderr=True)):
            try:
                rows += measure(point, ceilings, device)
            except InfLLMError as error:
                note(arguments.format, f"left out: {point.heads} on {point.data} data: {error}")
            torch.cuda.empty_cache()
        if not arguments.quick and not arguments.heads:
            rows.append(measure_mixed(device, MAIN[1], scoring=scoring_of(arguments)))
    show(arguments.format, rows, COLUMNS, FORMATS)
    name = "prefill_million" if arguments.million else "prefill_quick" if arguments.quick else "prefill"
    save(name if arguments.scorer == "pooled" else f"{name}_tokens", arguments.results, header, rows)


if __name__ == "__main__":
    main()
