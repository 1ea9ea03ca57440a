"""Values of tensors that do not depend on a call: what modules hold, and what a graph computes from numbers alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from infllm_pass.compat.aten import OpOverload, is_mutable
from infllm_pass.compat.tensors import without_modes
from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.graph.facts import example_of
from infllm_pass.graph.kinds import Kind
from infllm_pass.graph.op_table import read

MOST_ELEMENTS = 1 << 16
"""Of a tensor that is computed here."""

MOST_DEEP = 32
"""Operators that a value is computed by, one after the other."""

_UNREAD = {
    *(Kind.DROPOUT, Kind.ATTENTION, Kind.FLEX_ATTENTION, Kind.MULTI_HEAD_ATTENTION, Kind.ENCODER_LAYER),
    *(Kind.CHECK, Kind.FULL),
}
"""Kinds that are random, or never make a table."""

_MORE = {
    "reciprocal",
    "exp",
    "exp2",
    "log",
    "log2",
    "float_power",
    "square",
    "rsqrt",
    "linspace",
    "logspace",
    "sigmoid",
}
"""Functions beside those of the table."""


class Constants:
    """The constants of a graph and of those around it. Nothing watches them: what is read must not have to stay.

    Args:
        held: tensors that modules hold.
    """

    def __init__(self, held: HeldTensors) -> None:
        self._tensors = {**held.looked_at, **held.tensors}
        self._known: dict[fx.Node, Tensor | None] = {}

    def of(self, node: fx.Node, depth: int = MOST_DEEP) -> Tensor | None:
        """The value of a node's tensor; None: it depends on the call, or cannot be computed here."""
        if depth == 0:
            return None
        if node not in self._known:
            self._known[node] = None  # a failure on the way is no value
            self._known[node] = self._compute(node, depth)
        return self._known[node]

    def _compute(self, node: fx.Node, depth: int) -> Tensor | None:
        held = self._tensors.get(node)
        if held is not None or node.op not in ("call_function", "call_method"):
            return held
        example = example_of(node)
        if not isinstance(example, Tensor) or not self._may_run(node, example):
            return None
        inputs = {source: self.of(source, depth - 1) for source in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), inputs.__getitem__)
        try:
            with without_modes(), torch.no_grad():
                return self._run(node, args, kwargs)
        except (RuntimeError, TypeError, ValueError, AttributeError):  # a spelling that needs what tracing had
            return None

    def _may_run(self, node: fx.Node, example: Tensor) -> bool:
        if not all(isinstance(extent, int) for extent in example.shape) or example.numel() > MOST_ELEMENTS:
            return False
        if isinstance(node.target, OpOverload) and is_mutable(node.target):
            return False
        call = read(node)
        if call is not None:
            return call.kind not in _UNREAD
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return name.split(".")[0] in _MORE

    def _run(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        if isinstance(node.target, str):
            result = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None
