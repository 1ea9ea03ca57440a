"""A decode step on the GPU: the sparse operator against PyTorch's dense attention on the same cache, bfloat16.

One new token a row over a cache of so many keys. Every time is that of one layer in a CUDA graph of several, each with
a cache of its own, so that no layer finds its keys in the L2 cache. ``ms`` is a step that completes no window of
compressed keys; ``update_ms`` one in which a fine and a coarse window complete, one step of 64; ``refill_ms`` the step
after the state was dropped. ``dense_ms`` is the faster one of cuDNN's and PyTorch's flash attention. ``floor_ms``: the
compressed or index keys and the visited keys and values, read once at 3.0 TB/s. Rows with ``mode`` dense have fewer
keys than ``dense_len``, and the operator decides on the device.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import show
from _data import MAIN, Heads
from _gpu import (
    Row,
    Scoring,
    add_scoring,
    attempt,
    blocks_option,
    config_for,
    geometry_of,
    gpu_header,
    gpu_parser,
    heads_option,
    positive_option,
    require_gpu,
    save,
    scoring_of,
)
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton import configs
from infllm_pass.lowering.ops.attention_args import DecodeCall
from infllm_pass.lowering.ops.decode import decode_attention, new_state

BANDWIDTH = 3.0e12
MEMORY = 24e9
"""Bytes of all layers' caches together, at most."""

LAYERS = 32
REPLAYS = 30
DENSE_LEN = 8192
COLUMNS = {
    "ms": "ms",
    "update_ms": "update",
    "refill_ms": "refill",
    "dense_ms": "dense",
    "ratio": "ratio",
    "floor_ms": "floor",
    "of_floor": "of floor",
    "gb_s": "GB/s",
}
FORMATS = dict.fromkeys(("ms", "update_ms", "refill_ms", "dense_ms", "floor_ms"), ".4f") | {"gb_s": ".0f"}
SWEEP = {
    "chunk": (32, 128),
    "compress_warps": (8,),
    "token_blocks": (8, 32, 64),
    "token_keys": (64, 256),
    "token_stages": (2, 4),
    "blocks": (16, 64),
    "score_warps": (2, 8),
    "score_stages": (2, 5),
    "rank_warps": (1, 2, 8),
    "step_keys": (32,),
    "attend_warps": (2, 8),
    "attend_stages": (2, 4),
    "programs": (1, 3, 4),
}


class Layers:
    """Caches with their state, and calls that attend to each in turn.

    Attributes:
        caches: keys, values and state of each layer.
        q: ``[B, Hq, 1, D]``.
    """

    def __init__(self, heads: Heads, batch: int, length: int, geometry: BlockGeometry, device: torch.device) -> None:
        self.heads, self.length, self.geometry, self.device = heads, length, geometry, device
        shape = (batch, heads.keys, length, heads.dim)
        count = max(2, min(LAYERS, int(MEMORY / (4 * batch * heads.keys * length * heads.dim))))
        self.caches = []
        for _ in range(count):
            k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
            self.caches.append((k, v, new_state(k, geometry)))
        self.q = torch.randn(batch, heads.queries, 1, heads.dim, device=device, dtype=torch.bfloat16)

    def sparse(self, length: int, dense_len: int) -> list[Callable[[], object]]:
        """A step of every layer at so many keys."""
        lengths = torch.tensor([length], device=self.device)
        scale = self.heads.dim**-0.5
        arguments = DecodeCall(lengths, scale, dense_len, self.geometry).arguments
        return [lambda cache=cache: decode_attention(self.q, *cache, *arguments) for cache in self.caches]

    def dropped(self, length: int) -> list[Callable[[], object]]:
        """The same after the state was dropped."""

        def call(step: Callable[[], object], filled: Tensor) -> object:
            filled.zero_()
            return step()

        steps = self.sparse(length, 0)
        return [lambda step=s, filled=c[2][-1]: call(step, filled) for s, c in zip(steps, self.caches, strict=True)]

    def dense(self, length: int, backend: SDPBackend) -> list[Callable[[], object]]:
        """Dense attention of every layer."""
        gqa = self.heads.group > 1
        keys = [(k[:, :, :length], v[:, :, :length]) for k, v, *_ in self.caches]

        def call(k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(self.q, k, v, enable_gqa=gqa)

        return [lambda k=k, v=v: call(k, v) for k, v in keys]


def replayed_ms(calls: list[Callable[[], object]]) -> float:
    """Median time of one call, by replays of a CUDA graph of all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def stage_us(calls: list[Callable[[], object]]) -> dict[str, float]:
    """Time of each kernel of a call in microseconds, by PyTorch's profiler."""
    for call in calls:
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    return {
        event.key: event.device_time_total / len(calls)
        for event in profile.key_averages()
        if event.key.strip("_").startswith("decode_")
    }


def floor_bytes(heads: Heads, batch: int, length: int, geometry: BlockGeometry, *, sparse: bool) -> int:
    """Bytes that a step cannot avoid reading."""
    g = geometry
    if not sparse:
        return 2 * batch * heads.keys * heads.dim * 2 * length
    visited = min(length, (g.selected_blocks - 1) * g.block_size + (length - 1) % g.block_size + 1)
    if g.scorer == "tokens":
        read = length * (2 * g.score_dims if g.score_dtype == "key" else g.score_dims + 4)
        return batch * heads.keys * (read + 4 * heads.dim * visited)
    return 2 * batch * heads.keys * heads.dim * (g.num_compressed(length) + g.num_coarse(length) + 2 * visited)


def measure(
    heads: Heads, batch: int, length: int, blocks: int, device: torch.device, scoring: Scoring, *, sparse: bool
) -> Row:
    """The row of one case; a sparse row is sparse at every length."""
    mode = "sparse" if sparse else "dense"
    geometry = geometry_of(config_for(blocks, 0, scoring), heads.dim)
    layers = Layers(heads, batch, length, geometry, device)
    name = f"decode/{heads}/{blocks}/{length}/{batch}/{mode}{scoring.suffix}"
    row: Row = {"case": name, "heads": str(heads), "mode": mode, "scorer": scoring.scorer}
    row |= {"blocks": blocks, "length": length, "batch": batch, "layers": len(layers.caches)}
    dense_len = 0 if sparse else DENSE_LEN
    row["ms"] = replayed_ms(layers.sparse(length - 8, dense_len))
    row["update_ms"] = replayed_ms(layers.sparse(length, dense_len))
    row["refill_ms"] = replayed_ms(layers.dropped(length))
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        attempt(row, name, lambda backend=backend: replayed_ms(layers.dense(length - 8, backend)))
    known = [row[f"{name}_ms"] for name in ("cudnn", "flash") if row[f"{name}_ms"] is not None]
    row["dense_ms"] = min(known) if known else None
    row["ratio"] = row["ms"] / row["dense_ms"] if known else None
    moved = floor_bytes(heads, batch, length - 8, geometry, sparse=sparse)
    row["floor_ms"] = 1e3 * moved / BANDWIDTH
    row["of_floor"] = row["floor_ms"] / row["ms"]
    row["gb_s"] = moved / row["ms"] / 1e6
    row["stages_us"] = stage_us(layers.sparse(length - 8, dense_len))
    return row


def sweep(heads: Heads, batch: int, length: int, blocks: int, device: torch.device, scoring: Scoring) -> list[Row]:
    """The step with one number of its launch configuration changed at a time."""
    layers = Layers(heads, batch, length, geometry_of(config_for(blocks, 0, scoring), heads.dim), device)
    usual = configs.config_for(configs.DecodeConfig, "decode", layers.q, heads.dim)
    changes: list[dict[str, Any]] = [{}, *({name: value} for name, values in SWEEP.items() for value in values)]
    rows = []
    for change in changes:
        name = ", ".join(f"{key}={value}" for key, value in change.items()) or "as it is"
        row: Row = {"case": f"{heads}/{batch}: {name}"}
        with configs.override(decode=dataclasses.replace(usual, **change)):
            attempt(row, "step", lambda: replayed_ms(layers.sparse(length - 8, 0)))
            attempt(row, "below", lambda: replayed_ms(layers.sparse(DENSE_LEN - 1, DENSE_LEN)))
            rows.append({**row, "stages_us": stage_us(layers.sparse(length - 8, 0)) if row["step_ms"] else {}})
    return rows


def parser() -> Any:
    options = gpu_parser(__doc__)
    options.add_argument("--lengths", type=positive_option, nargs="+", default=[8192, 32768, 131072], metavar="N")
    options.add_argument("--batches", type=positive_option, nargs="+", default=[1, 8], metavar="N")
    options.add_argument("--blocks", type=blocks_option, default=64, metavar="N", help="visited blocks (64)")
    options.add_argument("--heads", type=heads_option, nargs="+", default=list(MAIN), metavar="QxKxD")
    add_scoring(options)
    options.add_argument("--sweep", action="store_true", help="launch configurations instead, at the first length")
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    scoring, suffix = scoring_of(arguments), "" if arguments.scorer == "pooled" else "_tokens"
    cases = [(heads, batch) for heads in arguments.heads for batch in arguments.batches]
    rows: list[Row] = []
    if arguments.sweep:
        for heads, batch in cases:
            rows += sweep(heads, batch, arguments.lengths[0], arguments.blocks, device, scoring)
            torch.cuda.empty_cache()
        stages = sorted({name for row in rows for name in row["stages_us"]})
        flat = [row | row["stages_us"] for row in rows]
        titles = {"step_ms": "step ms", "below_ms": "below ms"} | {
            name: name.strip("_").split("_")[1] + " us" for name in stages
        }
        show(arguments.format, flat, titles, dict.fromkeys(("step_ms", "below_ms"), ".4f"))
        save(f"decode_sweep{suffix}", arguments.results, gpu_header(device), rows)
        return
    points = [(*case, length, True) for case in cases for length in arguments.lengths]
    points += [(*case, DENSE_LEN - 1, False) for case in cases]
    for heads, batch, length, sparse in track(points, "measuring", console=Console(stderr=True)):
        rows.append(measure(heads, batch, length, arguments.blocks, device, scoring, sparse=sparse))
        torch.cuda.empty_cache()
    show(arguments.format, rows, COLUMNS, FORMATS)
    save(f"decode{suffix}", arguments.results, gpu_header(device), rows)


if __name__ == "__main__":
    main()
