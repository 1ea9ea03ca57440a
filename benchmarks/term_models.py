"""Models whose scores have more than a mask on the GPU: prefill of two layers, one of them with a sliding window.

gpt-oss-20b (sinks) and Gemma-2-9b (capped scores) with random weights and the sizes of their layers, bfloat16: dense as
Transformers runs them (eager attention, and compiled ``flex_attention``; its fused ``sdpa`` takes neither term), and
``infllm_pass.sparsify(torch.compile(model))``. Of gpt-oss's experts each layer has the four that a token takes, and the
vocabularies are cut, since neither changes with the attention. What cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import transformers
from _common import dump_results, show
from _gpu import (
    Row,
    add_scoring,
    blocks_option,
    config_for,
    gpu_header,
    gpu_parser,
    positive_option,
    require_gpu,
    results_path,
    scoring_of,
)
from model import COLUMNS, FORMATS, Variant, add_ratios, measure
from rich.console import Console
from rich.progress import track
from torch import nn

import infllm_pass

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss-20b": (
        "GptOss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
            "vocab_size": 1024,
        },
    ),
    "gemma-2-9b": (
        "Gemma2",
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "query_pre_attn_scalar": 256,
            "vocab_size": 1024,
        },
    ),
}
"""Transformers' prefix of the classes, and the sizes."""

LENGTHS = (32768, 131072)
VARIANTS: dict[str, tuple[str, Variant]] = {
    "eager": ("eager", lambda model, config: model),
    "compiled_flex": ("flex_attention", lambda model, config: torch.compile(model)),
    "sparsified": ("eager", lambda model, config: infllm_pass.sparsify(torch.compile(model), config, strict=True)),
}
"""Transformers' name of the attention, and what is done with the model."""


def build(name: str, device: torch.device, dtype: torch.dtype, **changed: Any) -> nn.Module:
    """Two layers of a model with random weights, made on the device; `changed` sizes take the place of its own."""
    prefix, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        **sizes | changed, num_hidden_layers=2, max_position_embeddings=131072
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: nn.Module = getattr(transformers, f"{prefix}Model")(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    options.add_argument(
        "--lengths", type=positive_option, nargs="+", default=list(LENGTHS), metavar="N", help="tokens"
    )
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options.add_argument("--blocks", type=blocks_option, default=96, metavar="N", help="visited blocks (96)")
    add_scoring(options)
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    config = config_for(arguments.blocks, "auto", scoring_of(arguments))
    header = gpu_header(device) | {"transformers": transformers.__version__, "sizes": dict(MODELS)}
    path = results_path("term_models", arguments.results, header)
    rows: list[Row] = []
    points = [(name, variant) for name in arguments.models for variant in arguments.variants]
    for name, variant in track(points, "measuring", console=Console(stderr=True)):
        plain = build(name, device, torch.bfloat16)
        for row in measure(variant, plain, arguments.lengths, config, data=["local"], train=False, variants=VARIANTS):
            rows.append(row | {"case": f"{name}/{row['case']}", "model": name})
            for model in arguments.models:
                add_ratios([row for row in rows if row["model"] == model])
            dump_results(path, header, rows)
    show(arguments.format, rows, COLUMNS, FORMATS)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
