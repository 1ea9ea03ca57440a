"""A whole model on the GPU: a Llama of Llama-3-8B's sizes with random weights, dense and with the pass, bfloat16.

Prefill of one sequence through the base model (no language model head, no cache): Transformers' eager ``sdpa``, the
same compiled (compiling builds the N x N mask), compiled ``flex_attention``, and
``infllm_pass.sparsify(torch.compile(model))`` with 96 visited blocks. Embeddings are those of random tokens or, with
``--data local``, change slowly along the tokens (`_data.py`). With ``--train`` one training step instead:
forward and backward with gradient checkpointing. Times are medians by CUDA events; the peak is of allocated memory,
weights included. What cannot run is listed with its reason. Results are written after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from _common import dump_results, show
from _data import CORRELATION, correlated
from _gpu import (
    BASELINE_ERRORS,
    Row,
    add_checkpoint_saves,
    add_scoring,
    blocks_option,
    config_for,
    gpu_header,
    gpu_parser,
    milliseconds,
    positive_option,
    reason,
    require_gpu,
    results_path,
    scoring_of,
)
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import infllm_pass
from infllm_pass.config import SparseAttentionConfig

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
LENGTHS = (8192, 32768, 65536, 131072)
TRAIN_LENGTHS = (65536,)
COLUMNS = {"ms": "ms", "ratio": "of best dense", "peak_gb": "peak GB", "first_s": "first call s", "note": "note"}
FORMATS = {"ratio": ".3f", "first_s": ".1f"}

Variant = Callable[[nn.Module, SparseAttentionConfig], Any]

VARIANTS: dict[str, tuple[str, Variant]] = {
    "eager_sdpa": ("sdpa", lambda model, config: model),
    "compiled_sdpa": ("sdpa", lambda model, config: torch.compile(model)),
    "compiled_flex": ("flex_attention", lambda model, config: torch.compile(model)),
    "sparsified": ("sdpa", lambda model, config: infllm_pass.sparsify(torch.compile(model), config, strict=True)),
}
"""Transformers' name of the attention, and what is done with the model."""


def build(
    layers: int, sizes: dict[str, Any], device: torch.device, dtype: torch.dtype, *, head: bool = False
) -> nn.Module:
    """A Llama with random weights, made on the device; with its language model head if asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=1 << 20)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: nn.Module = (LlamaForCausalLM if head else LlamaModel)(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def embeddings(plain: nn.Module, length: int, data: str) -> Tensor:
    """What the first layer receives, ``[1, length, hidden]``."""
    sizes: Any = plain.config
    weight: Tensor = plain.get_input_embeddings().weight.detach()  # type: ignore[operator]
    if data == "local":
        noise = torch.randn(length, sizes.hidden_size, device=weight.device)
        return correlated(noise, CORRELATION).mul_(weight.float().std()).to(weight.dtype)[None]
    ids = torch.randint(0, sizes.vocab_size, (1, length), device=weight.device)
    return weight[ids]


def prefill_call(model: Any, inputs: Tensor) -> Callable[[], object]:
    """One forward pass without gradients."""

    @torch.no_grad()
    def call() -> object:
        return model(inputs_embeds=inputs, use_cache=False).last_hidden_state

    return call


def train_call(model: Any, plain: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """One forward and one backward pass for a fixed gradient of the last hidden states."""

    def call() -> object:
        plain.zero_grad(set_to_none=True)
        states = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        states.backward(torch.ones_like(states))
        return None

    return call


def apply_variant(
    variant: str,
    plain: nn.Module,
    config: SparseAttentionConfig,
    variants: Mapping[str, tuple[str, Variant]] = VARIANTS,
) -> Any:
    """The model as a variant runs it; of what was compiled before, nothing is left."""
    attention, transform = variants[variant]
    plain.set_attn_implementation(attention)  # type: ignore[operator]
    torch._dynamo.reset()
    return transform(plain, config)


def measure(
    variant: str,
    plain: nn.Module,
    lengths: list[int],
    config: SparseAttentionConfig,
    *,
    data: list[str],
    train: bool,
    variants: Mapping[str, tuple[str, Variant]] = VARIANTS,
) -> Iterator[Row]:
    """The rows of one variant, one a length and kind of data; those of dense variants do not depend on the data."""
    device = next(plain.parameters()).device
    sizes: Any = plain.config
    model = apply_variant(variant, plain, config, variants)
    kinds = data if variant == "sparsified" else data[:1]
    for length, kind in itertools.product(sorted(lengths), kinds):
        row: Row = {"case": f"{'train' if train else 'model'}/{variant}/{sizes.num_hidden_layers}/{length}/{kind}"}
        row |= {"variant": variant, "layers": sizes.num_hidden_layers, "length": length, "data": kind}
        row |= {"ms": None, "peak_gb": None}
        inputs = embeddings(plain, length, kind)
        call = train_call(model, plain, inputs) if train else prefill_call(model, inputs)
        try:
            begin = time.perf_counter()
            call()
            synchronize(device)
            row["first_s"] = time.perf_counter() - begin
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row["ms"] = milliseconds(call, device)
            if device.type == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        except BASELINE_ERRORS as error:
            if variant == "sparsified":
                raise
            row["note"] = reason(error)
        yield row
        plain.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def add_ratios(rows: list[Row]) -> None:
    """Put the time over that of the fastest dense variant at the same length into each row."""
    for row in rows:
        dense = [
            other["ms"]
            for other in rows
            if other["length"] == row["length"] and other["variant"] != "sparsified" and other["ms"] is not None
        ]
        row["ratio"] = row["ms"] / min(dense) if dense and row["ms"] is not None else None


def dense_len_option(text: str) -> int | Literal["auto"]:
    """A length given on the command line, or ``auto``."""
    return "auto" if text == "auto" else positive_option(text)


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument(
        "--layers", type=positive_option, default=4, metavar="L", help="decoder layers (4; the model has 32)"
    )
    options.add_argument(
        "--lengths", type=positive_option, nargs="+", metavar="N", help="tokens (8k to 128k; --train: 64k)"
    )
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options.add_argument("--blocks", type=blocks_option, default=96, metavar="N", help="visited blocks (96)")
    options.add_argument(
        "--data", nargs="+", choices=["random", "local"], default=["random", "local"], help="embeddings (both)"
    )
    options.add_argument(
        "--dense-len", type=dense_len_option, metavar="N", help="tokens up to which it stays dense, or auto (auto)"
    )
    add_scoring(options)
    add_checkpoint_saves(options)
    options.add_argument("--train", action="store_true", help="a training step in place of prefill")
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    lengths = arguments.lengths or list(TRAIN_LENGTHS if arguments.train else LENGTHS)
    config = config_for(arguments.blocks, arguments.dense_len or "auto", scoring_of(arguments))
    config = dataclasses.replace(config, checkpoint_saves=arguments.checkpoint_saves)
    plain = build(arguments.layers, LLAMA_3_8B, device, torch.bfloat16)
    if arguments.train:
        plain.train()
        plain.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    import transformers

    header = gpu_header(device) | {"transformers": transformers.__version__, "sizes": LLAMA_3_8B}
    header["checkpoint_saves"] = arguments.checkpoint_saves
    name = "train" if arguments.train else "model"
    name += "" if arguments.scorer == "pooled" else "_tokens"
    path = results_path(
        name if arguments.layers == 4 else f"{name}_{arguments.layers}_layers", arguments.results, header
    )
    rows: list[Row] = []
    for variant in track(arguments.variants, "measuring", console=Console(stderr=True)):
        for row in measure(variant, plain, lengths, config, data=arguments.data, train=arguments.train):
            rows.append(row)
            add_ratios(rows)
            rows.sort(key=lambda row: (row["length"], list(VARIANTS).index(row["variant"])))
            dump_results(path, header, rows)
    show(arguments.format, rows, COLUMNS, FORMATS)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
