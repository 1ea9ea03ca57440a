"""The form of a computation: equal for two nodes that are computed in the same way, as in the layers of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from infllm_pass.graph.op_table import read
from infllm_pass.sites.layouts import Index, Layouts

MOST_NODES = 200
MOST_VALUES = 1024


def form_of(layouts: Layouts, node: fx.Node, index: Index) -> Any:
    """The form of what a node computes out of inputs and of results of operators that the table does not hold.

    Two nodes of one form hold, at one index, the same function of such inputs. Held tensors of a few values count by
    these, longer ones are told apart.

    Args:
        layouts: the graph's layout operators.
        node: the node.
        index: an index of it that the form is to include.

    Returns:
        Something to compare; None where memory is overwritten on the way, or the computation is long.
    """
    numbers: dict[fx.Node, int] = {}
    stack = [node]
    while stack:
        each = stack.pop()
        if each in numbers:
            continue
        if layouts.facts.is_overwritten(each) or len(numbers) == MOST_NODES:
            return None
        numbers[each] = len(numbers)
        if read(each) is not None:
            stack += reversed(each.all_input_nodes)
    return tuple(_line(layouts, each, numbers) for each in numbers), tuple(map(str, index))


def _line(layouts: Layouts, node: fx.Node, numbers: dict[fx.Node, int]) -> Any:
    example = layouts.example(node)
    shape = layouts.shape(node) if isinstance(example, torch.Tensor) else str(example)
    if read(node) is not None:
        arguments = fx.map_arg((node.args, node.kwargs), lambda source: f"%{numbers[source]}")
        return node.target, repr(arguments), shape
    if node in layouts.facts.bindings:
        return node
    held = layouts.facts.held.tensors.get(node, layouts.facts.held.looked_at.get(node))
    if held is None:
        return shape, getattr(example, "dtype", None)
    return tuple(held.flatten().tolist()) if held.numel() <= MOST_VALUES else node
