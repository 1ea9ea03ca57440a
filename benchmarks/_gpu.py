"""What the GPU benchmarks share: the device and its ceilings, timing, rows and tables."""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import triton
from _common import results_header, write_results
from _data import Heads
from _work import Ceilings, Work

from infllm_pass import SparseAttentionConfig
from infllm_pass.config import CheckpointSaves
from infllm_pass.kernels.geometry import BlockGeometry, ScoreDtype, ScorerName
from infllm_pass.tools.output import add_format_options

RESULTS = Path(__file__).parent / "results"
LOCAL_BLOCKS = 32
LEAST_BLOCKS = LOCAL_BLOCKS + 2
NO_DEVICE = 2
FLUSH_BYTES = 256 << 20
"""Written between timed calls, so that none finds its inputs in the L2 cache."""

LONG_MS = 100.0

Row: TypeAlias = dict[str, Any]
BASELINE_ERRORS = (RuntimeError, ValueError, NotImplementedError, AssertionError, AttributeError, TypeError)
"""What a baseline that does not support a case may raise; running out of memory is a RuntimeError."""


def gpu_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all GPU benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where a folder named after the device goes"
    )
    add_format_options(parser)
    return parser


def heads_option(text: str) -> Heads:
    """A geometry given on the command line."""
    try:
        return Heads.parse(text)
    except ValueError:
        message = f"expected QUERYxKEYxDIM with QUERY a multiple of KEY, such as 32x8x128, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def blocks_option(text: str) -> int:
    """A budget of blocks given on the command line."""
    if not text.isdecimal() or int(text) < LEAST_BLOCKS:
        raise argparse.ArgumentTypeError(
            f"expected at least {LEAST_BLOCKS} blocks, the local ones and two, got {text!r}"
        )
    return int(text)


def positive_option(text: str) -> int:
    """A length or a count given on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def require_gpu() -> torch.device:
    """The CUDA device, or the end of the program with a message."""
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        raise SystemExit(NO_DEVICE)
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Scoring:
    """How blocks are scored; the fields are those of the configuration."""

    scorer: ScorerName = "tokens"
    score_dims: int | None = None
    score_dtype: ScoreDtype = "key"
    query_block: int = 1

    @property
    def suffix(self) -> str:
        """What tells a case's name from that of the published score: nothing for that one."""
        shared = f"/qb{self.query_block}" if self.query_block > 1 else ""
        if self.scorer == "pooled":
            return shared
        return f"/tokens-{self.score_dims or 'auto'}-{self.score_dtype}{shared}"


TOKENS = Scoring()
"""The default."""


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Scoring`."""
    parser.add_argument("--scorer", choices=get_args(ScorerName), default="tokens", help="scores of blocks (tokens)")
    parser.add_argument("--score-dims", type=positive_option, metavar="D", help="channels (a quarter, 32 of 64)")
    parser.add_argument("--score-dtype", choices=get_args(ScoreDtype), default="key", help="dtype of index keys (key)")
    parser.add_argument("--query-block", type=positive_option, default=1, metavar="M", help="queries of one set (1)")


def add_layer(options: argparse.ArgumentParser, lengths: list[int]) -> None:
    """Add the options of one layer's attention: lengths, blocks, data, heads and `Scoring`."""
    options.add_argument("--lengths", type=positive_option, nargs="+", default=lengths, metavar="N", help="tokens")
    options.add_argument("--blocks", type=blocks_option, default=96, metavar="N", help="visited blocks (96)")
    options.add_argument("--data", choices=["local", "random"], default="local")
    options.add_argument(
        "--heads", type=heads_option, nargs="+", default=[Heads.parse("32x8x128")], metavar="QxKxD", help="(32x8x128)"
    )
    add_scoring(options)


def add_checkpoint_saves(parser: argparse.ArgumentParser) -> None:
    """Add the option of what checkpointing saves."""
    parser.add_argument(
        "--checkpoint-saves", choices=get_args(CheckpointSaves), default="selection", help="see the guide (selection)"
    )


def scoring_of(arguments: argparse.Namespace) -> Scoring:
    """What those options say."""
    return Scoring(arguments.scorer, arguments.score_dims, arguments.score_dtype, arguments.query_block)


def config_for(blocks: int, dense_len: int | Literal["auto"] = 0, scoring: Scoring = TOKENS) -> SparseAttentionConfig:
    """The default geometry with another budget of blocks; sparse at every length unless `dense_len` is given."""
    return SparseAttentionConfig(topk=blocks - LOCAL_BLOCKS, dense_len=dense_len, **dataclasses.asdict(scoring))


def geometry_of(config: SparseAttentionConfig, dim: int) -> BlockGeometry:
    """The geometry for heads whose rotary embedding pairs the halves: token scores read the lowest frequencies."""
    if config.scorer == "pooled":
        return config.geometry
    half, pairs = dim // 2, config.score_dims_of(dim) // 2
    return config.geometry_for(dim, ((*range(half - pairs, half), *range(dim - pairs, dim)),))


def device_slug(name: str) -> str:
    """A folder name: ``NVIDIA H100 80GB HBM3`` gives ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_header(device: torch.device, ceilings: Ceilings | None = None) -> dict[str, Any]:
    """Device, versions and measured ceilings that figures belong to."""
    base = results_header()
    header = {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "torch": base["torch"],
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": base["python"],
        "dtype": "bfloat16",
        "date": base["date"],
        "commit": base["commit"],
    }
    if ceilings is not None:
        header["matmul_tflops"] = ceilings.flops / 1e12
        header["copy_gb_s"] = ceilings.bandwidth / 1e9
    return header


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return next(iter(found.stdout.split()), "unknown")


def measure_ceilings(device: torch.device, size: int = 8192) -> Ceilings:
    """Rates of a square bfloat16 matrix product and of a copy of ``16 * size ** 2`` bytes."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b, device)
    source = torch.empty(16 * size * size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    return Ceilings(1e3 * 2 * size**3 / product, 1e3 * 2 * source.numel() / copy)


def milliseconds(call: Callable[[], object], device: torch.device, *, budget_ms: float = 200.0) -> float:
    """Median time of a call, by CUDA events, after calls that compile it and estimate how many to time.

    Args:
        call: what to time.
        device: where it runs.
        budget_ms: time to spend in all, between 5 and 50 calls; calls of more than 100 ms are timed three times.
    """
    call()
    estimate = _times([call], device)
    if estimate[0] > LONG_MS:
        return statistics.median(estimate + _times([call] * 2, device))
    return statistics.median(_times([call] * min(max(round(budget_ms / estimate[0]), 5), 50), device))


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, budget_ms: float = 400.0
) -> dict[str, float]:
    """Median times of calls to be compared, call by call in turns: a clock that falls under load falls for all.

    Args:
        calls: what to time, by name.
        device: where it runs.
        budget_ms: time to spend in all, between 3 and 50 rounds, each begun by another call.
    """
    estimate = sum(_times([call, call], device)[1] for call in calls.values())
    rounds = min(max(round(budget_ms / estimate), 3), 50)
    names = list(calls)
    order = [name for turn in range(rounds) for name in names[turn % len(names) :] + names[: turn % len(names)]]
    times: dict[str, list[float]] = {name: [] for name in names}
    for name, ms in zip(order, _times([calls[name] for name in order], device), strict=True):
        times[name].append(ms)
    return {name: statistics.median(kept) for name, kept in times.items()}


def _times(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The time of each call of a sequence; a GPU is waited for at its end alone, so that launches run ahead of it."""
    if device.type != "cuda":
        times = []
        for call in calls:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        return times
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    for call, (begin_event, end_event) in zip(calls, events, strict=True):
        flush.zero_()
        begin_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize(device)
    return [begin_event.elapsed_time(end_event) for begin_event, end_event in events]


def peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """How far allocated memory rises during a call, and how much of it the result holds when the call returns."""
    if device.type != "cuda":
        return 0, 0
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak, held = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    del result
    return peak, held


def scratch_gb(call: Callable[[], object], device: torch.device) -> float:
    """Memory in GB that a call needs beyond what was allocated before it and beyond its result."""
    peak, held = peak_bytes(call, device)
    return (peak - held) / 1e9


def case_name(kind: str, heads: Heads, blocks: int, length: int, data: str) -> str:
    """``kind / Hq x Hkv x D / visited blocks / tokens / data``."""
    return f"{kind}/{heads}/{blocks}/{length}/{data}"


def floored(row: Row, work: Work, ceilings: Ceilings) -> Row:
    """The row with its floor, and with what its time reaches of the matrix products that are needed."""
    row["floor_ms"] = work.floor_ms(ceilings)
    row["of_floor"] = row["floor_ms"] / row["ms"]
    row["tflops"] = work.flops / row["ms"] / 1e9
    return row


def attempt(row: Row, name: str, measure: Callable[[], float]) -> None:
    """Put a baseline's time into a row; where it cannot run, None and the reason."""
    try:
        row[f"{name}_ms"] = measure()
    except BASELINE_ERRORS as error:
        row[f"{name}_ms"] = None
        row[f"{name}_note"] = reason(error)


def reason(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def save(script: str, folder: Path, header: dict[str, Any], rows: list[Row]) -> Path:
    """Write ``<folder>/<device>/<script>.json``."""
    path = results_path(script, folder, header)
    write_results(path, header, rows)
    return path


def results_path(script: str, folder: Path, header: dict[str, Any]) -> Path:
    """``<folder>/<device>/<script>.json``."""
    return folder / device_slug(header["device"]) / f"{script}.json"
