"""The command ``infllm-pass export``: a checkpoint as an ONNX file, a TensorRT engine or an AOTInductor package."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.export.aoti import package
from infllm_pass.export.export import export_onnx
from infllm_pass.export.tensorrt import export_tensorrt
from infllm_pass.rewrite.report import Report
from infllm_pass.tools.checkpoint import SMOLLM2, load_local, load_model
from infllm_pass.tools.output import OutputFormat, print_data

TARGETS = {"onnx": ".onnx", "tensorrt": ".engine", "aoti": ".pt2"}
"""What can be written, and how its files end."""

EXAMPLE_TOKENS = 64


class Logits(nn.Module):
    """A language model as a function from token ids, int64 ``[B, L]``, to logits ``[B, L, vocabulary]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """The logits of every token."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def export_checkpoint(
    options: argparse.Namespace, configured: Callable[[SparseAttentionConfig], SparseAttentionConfig], console: Console
) -> None:
    """Export a model for batches and lengths of any size, and print what became of its attention sites.

    Args:
        options: ``model``, ``to``, ``out``, ``layers``, ``max_length``, ``overwrite`` and ``format``.
        configured: sets the fields that were given as options.
        console: where lines for people go.
    """
    model = _model(options.model, options.layers)
    config = configured(SparseAttentionConfig())
    out = Path(options.out or f"model{TARGETS[options.to]}")
    ids = torch.zeros(2, EXAMPLE_TOKENS, dtype=torch.int64)
    dynamic = {"ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    report: Report
    if options.to == "aoti":
        report = package(model, (ids,), out, dynamic_shapes=dynamic, config=config, overwrite=options.overwrite)
    elif options.to == "onnx":
        report = export_onnx(model, out, (ids,), dynamic_shapes=dynamic, config=config, overwrite=options.overwrite)
    else:
        file = out.with_suffix(TARGETS["onnx"])
        report = export_onnx(model, file, (ids,), dynamic_shapes=dynamic, config=config, overwrite=options.overwrite)
        profile = {"ids": ((1, 1), (1, options.max_length // 2), (1, options.max_length))}
        console.print(str(export_tensorrt(file, out, profile, overwrite=options.overwrite)), soft_wrap=True)
    if options.format is not OutputFormat.TABLE:
        facts = {"file": str(out), "bytes": out.stat().st_size, "to": options.to, "config": config.to_dict()}
        print_data(options.format, facts | report.to_dict(), report.to_rows())
        return
    console.print(report)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", soft_wrap=True)


def _model(path: str, layers: int | None) -> nn.Module:
    """The public checkpoint, or the architecture of a local folder; with `layers`, only that many of its layers."""
    if path != SMOLLM2.name:
        return Logits(load_local(path, layers=layers)).eval()
    model = load_model()
    if layers is not None:
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
    return Logits(model).eval()
