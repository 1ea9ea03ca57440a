"""Graphs built call by call, and the pass run on them: what the scripts of `reproducer` are written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from infllm_pass.compat.tensors import FakeTensorMode
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.graph.buffers import ClosedForm, HeldTensors
from infllm_pass.graph.facts import example_of
from infllm_pass.kv_cache.inputs import CacheInputs
from infllm_pass.rewrite.pipeline import SitePolicy, Switch, run_pass
from infllm_pass.rewrite.report import GraphReport
from infllm_pass.rewrite.reproducer import not_reproducing, trying
from infllm_pass.rewrite.trace import PassTrace


@dataclass(frozen=True)
class Example:
    """What an input tensor looks like.

    Attributes:
        shape: its sizes.
        dtype: its dtype.
        device: its device.
        stride: its strides; None: contiguous.
        requires_grad: whether gradients of it are asked for.
        values: its elements, for a tensor that a module holds and whose values the pass reads; None: they are data.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"
    stride: tuple[int, ...] | None = None
    requires_grad: bool = False
    values: ClosedForm | None = None

    def fake(self) -> torch.Tensor:
        """A tensor like it, under the fake tensor mode that is on."""
        if self.stride is None:
            tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        else:
            tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return tensor.requires_grad_(self.requires_grad)

    def real(self, form: ClosedForm) -> torch.Tensor:
        """A tensor in memory with the elements that a closed form gives."""
        position = torch.zeros([1] * len(self.shape), dtype=torch.int64)
        dims = form.dims if form.rank else ()
        for sign, dim in zip((1, -1), reversed(dims), strict=False):  # the last dimension minus the one before it
            view = [-1 if other == dim else 1 for other in range(len(self.shape))]
            position = position + sign * torch.arange(self.shape[dim]).view(view)
        if form.step is not None:
            return (form.values[0] + form.step * position).to(self.dtype).expand(self.shape).contiguous()
        run = torch.zeros_like(position)
        for end in form.ends:
            run += position > end
        return torch.tensor(form.values, dtype=self.dtype)[run].expand(self.shape).contiguous()


class GraphBuilder:
    """Builds a graph of torch-level calls that carry example values, as Dynamo hands graphs to a backend.

    Each call is made once, on fake tensors: an error of the call is raised as it is.
    """

    def __init__(self, outer: GraphBuilder | None = None) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.held: dict[fx.Node, torch.Tensor] = {}
        self.mode: FakeTensorMode = FakeTensorMode() if outer is None else outer.mode

    def input(self, name: str, example: Example | int | float) -> fx.Node:
        """Add an input."""
        node = self.graph.placeholder(name)
        if not isinstance(example, Example):
            node.meta["example_value"] = example
            return node
        if example.values is not None:
            self.held[node] = example.real(example.values)
        with self.mode:
            node.meta["example_value"] = example.fake()
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of a function."""
        return self._add(self.graph.call_function(target, args, kwargs), target)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of a method of the first argument."""
        return self._add(self.graph.call_method(name, args, kwargs), lambda of, *a, **k: getattr(of, name)(*a, **k))

    def body(self, name: str, body: GraphBuilder) -> fx.Node:
        """Add a graph that a higher-order operator calls."""
        module = body.module()
        setattr(self.root, name, module)
        node = self.graph.get_attr(name)
        node.meta["example_value"] = module
        return node

    def output(self, value: Any) -> GraphBuilder:
        """Set the output; the builder itself, for the end of a function."""
        self.graph.output(value)
        return self

    def module(self) -> fx.GraphModule:
        """The graph as a module."""
        return fx.GraphModule(self.root, self.graph)

    def _add(self, node: fx.Node, function: Callable[..., Any]) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), example_of)
        with self.mode:
            node.meta["example_value"] = function(*args, **kwargs)
        return node


def replay(
    build: Callable[[], GraphBuilder], config: SparseAttentionConfig, switch: str = Switch.BY_LENGTH.value
) -> GraphReport:
    """Run the pass on a graph.

    Args:
        build: makes the graph.
        config: what sparse attention selects, and from which length on.
        switch: how the sides of the length switch are chosen, the value of a `Switch`.

    Raises:
        InternalError: the pass fails at a site.
    """
    with not_reproducing():
        builder = build()
        policy = SitePolicy(config, strict=True)
        held = HeldTensors(builder.held)
        trace = PassTrace(0, silent=trying())
        caches = CacheInputs()
        return run_pass(builder.module(), policy, switch=Switch(switch), held=held, caches=caches, trace=trace)
