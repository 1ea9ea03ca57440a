"""Where a training step's time goes on the GPU: time of all kernels of a kind, by PyTorch's profiler.

The step is that of ``model.py --train``: a Llama of Llama-3-8B's sizes with random weights, bfloat16, gradient
checkpointing, forward and backward; with ``--optimizer`` a step of fused AdamW as well. Kinds are told from the names
of kernels; "idle" is what is left of the step's time by CUDA events, measured without the profiler. Under a table of
kinds come the kernels that take the most time, with their launches a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _common import show, write_results
from _gpu import (
    Row,
    add_checkpoint_saves,
    add_scoring,
    blocks_option,
    config_for,
    gpu_header,
    gpu_parser,
    milliseconds,
    positive_option,
    require_gpu,
    results_path,
    scoring_of,
)
from model import LLAMA_3_8B, VARIANTS, apply_variant, build, dense_len_option, embeddings, synchronize, train_call
from torch import nn

from infllm_pass.config import SparseAttentionConfig

COLUMNS = {"ms": "ms", "share": "of the step", "launches": "launches"}
KERNEL_COLUMNS = COLUMNS | {"kind": "kind"}
FORMATS = {"share": ".3f", "launches": ".0f"}

KINDS = {
    "selection": r"_(select_\w+|compress|index_keys|channels|importance|sequences|panels|key_bounds)_kernel",
    "attention forward": r"_(attention_forward|scattered|choose)_kernel|fprop|flash_fwd|fmha_cutlassF"
    r"|scaled_dot_product\w+$|triton_tem_\w*flex_attention_(?!\w*backward)",
    "attention backward": r"_(key_gradients|query_gradient|scattered_gradient|output_delta|block_table|invert|starts"
    r"|cursors|schedule|add_pieces)_kernel|bprop|flash_bwd|fmha_cutlassB|scaled_dot_product\w+_backward"
    r"|triton_tem_\w*flex_attention_\w*backward",
    "matrix products": r"gemm|nvjet|xmma|cutlass|splitK|triton_tem_|aten::(add|b|badd)?mm$",
    "optimizer": r"[aA]dam|multi_tensor_apply",
    "copies": r"^Mem(cpy|set)|aten::(copy|clone|fill)_?$",
}
"""Patterns of the names of kernels, or of the CPU's operators, in the order in which they are tried."""

REST = "elementwise and reductions"


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), REST)


@dataclass(frozen=True)
class Usage:
    """Time of one kernel in a step, in milliseconds, and how often it is launched."""

    name: str
    ms: float
    launches: float

    @property
    def kind(self) -> str:
        """Its kind."""
        return kind_of(self.name)


def profiled(step: Callable[[], object], device: torch.device, steps: int) -> list[Usage]:
    """What each kernel takes in a step, the longest first; on the CPU, each operator itself."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    step()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            step()
        synchronize(device)
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profile.key_averages()
    }
    usages = [Usage(name, time / 1e3 / steps, count / steps) for name, (time, count) in times.items() if time > 0]
    return sorted(usages, key=lambda usage: -usage.ms)


def kind_rows(usages: list[Usage], step_ms: float) -> list[Row]:
    """A row for every kind, the longest first, then the idle time and the whole step."""
    rows = []
    for kind in (*KINDS, REST):
        found = [usage for usage in usages if usage.kind == kind]
        ms = sum(usage.ms for usage in found)
        rows.append({"case": kind, "ms": ms, "share": ms / step_ms, "launches": sum(usage.launches for usage in found)})
    rows.sort(key=lambda row: -row["ms"])
    idle = step_ms - sum(row["ms"] for row in rows)
    rows.append({"case": "idle", "ms": idle, "share": idle / step_ms})
    return [*rows, {"case": "step", "ms": step_ms, "share": 1.0, "launches": sum(usage.launches for usage in usages)}]


def training_step(model: Any, plain: nn.Module, length: int, data: str, *, optimizer: bool) -> Callable[[], object]:
    """A step of `model`, whose parameters are those of `plain`."""
    gradients = train_call(model, plain, embeddings(plain, length, data))
    if not optimizer:
        return gradients
    update = torch.optim.AdamW(plain.parameters(), lr=1e-5, fused=True)

    def step() -> object:
        gradients()
        return update.step()

    return step


def measure(
    variant: str,
    plain: nn.Module,
    length: int,
    config: SparseAttentionConfig,
    *,
    data: str = "random",
    optimizer: bool = False,
    steps: int = 2,
    kernels: int = 20,
) -> tuple[list[Row], list[Row]]:
    """The rows of a variant's kinds of kernels, and those of single kernels."""
    device = next(plain.parameters()).device
    step = training_step(apply_variant(variant, plain, config), plain, length, data, optimizer=optimizer)
    step()
    step_ms = milliseconds(step, device)
    usages = profiled(step, device, steps)
    single = [
        {"case": usage.name[:90], "ms": usage.ms, "share": usage.ms / step_ms}
        | {"launches": usage.launches, "kind": usage.kind}
        for usage in usages[:kernels]
    ]
    plain.zero_grad(set_to_none=True)
    named = {"variant": variant, "layers": plain.config.num_hidden_layers, "length": length}  # type: ignore[union-attr]
    return [row | named for row in kind_rows(usages, step_ms)], [row | named for row in single]


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument("--layers", type=positive_option, default=4, metavar="L", help="decoder layers (4)")
    options.add_argument("--length", type=positive_option, default=65536, metavar="N", help="tokens (65536)")
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["eager_sdpa", "sparsified"])
    options.add_argument("--blocks", type=blocks_option, default=96, metavar="N", help="visited blocks (96)")
    options.add_argument("--data", choices=["random", "local"], default="random", help="embeddings (random)")
    options.add_argument("--dense-len", type=dense_len_option, metavar="N", help="see model.py (auto)")
    options.add_argument("--optimizer", action="store_true", help="a step of fused AdamW, too")
    options.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    options.add_argument("--steps", type=positive_option, default=2, metavar="N", help="profiled steps (2)")
    options.add_argument("--kernels", type=positive_option, default=20, metavar="N", help="single kernels shown (20)")
    add_scoring(options)
    add_checkpoint_saves(options)
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    config = config_for(arguments.blocks, arguments.dense_len or "auto", scoring_of(arguments))
    config = dataclasses.replace(config, checkpoint_saves=arguments.checkpoint_saves)
    plain = build(arguments.layers, LLAMA_3_8B, device, torch.bfloat16).train()
    if not arguments.no_checkpointing:
        plain.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    numbers = {name: getattr(arguments, name) for name in ("data", "optimizer", "steps", "kernels")}
    rows: list[Row] = []
    for variant in arguments.variants:
        kinds, single = measure(variant, plain, arguments.length, config, **numbers)
        gc.collect()
        torch.cuda.empty_cache()
        show(arguments.format, kinds, COLUMNS, FORMATS, title=variant)
        show(arguments.format, single, KERNEL_COLUMNS, FORMATS)
        sys.stdout.flush()
        rows += [*kinds, *single]
    header = gpu_header(device) | {"sizes": LLAMA_3_8B, "checkpointing": not arguments.no_checkpointing}
    header["checkpoint_saves"] = arguments.checkpoint_saves
    write_results(results_path("train_kernels", arguments.results, header), header, rows)


if __name__ == "__main__":
    main()
