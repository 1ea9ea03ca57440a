"""Rules for the calls that ``torch.vmap`` leaves in a graph: a level hides one dimension of each tensor it maps over.

While a dimension is hidden its index is a `hidden_axis` of the level; operators in between see the other dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from infllm_pass.masks.rules import dim_of, rule
from infllm_pass.masks.values import axis, hidden_axis
from infllm_pass.vocabulary import Kind, read

if TYPE_CHECKING:
    from infllm_pass.masks.interpreter import Interpreter


def level_axis(level: Any) -> sympy.Symbol:
    """The index that a level hides."""
    return hidden_axis(f"vmap{level}")


@rule(Kind.HIDE_DIM)
def _hide(run: Interpreter, example: torch.Tensor, input: Any, dim: Any, level: Any) -> sympy.Basic:
    source = run.operand(input)
    along = dim_of(dim, len(source.shape))
    index = [axis(d) for d in range(example.dim())]
    return source.at([*index[:along], level_axis(level), *index[along:]])


@rule(Kind.SHOW_DIM)
def _show(run: Interpreter, example: torch.Tensor, input: Any, level: Any, size: Any, dim: Any) -> sympy.Basic:
    source = run.operand(input)
    along = dim_of(dim, example.dim())
    moved = {axis(d): axis(d + 1) for d in range(along, len(source.shape))}
    return source.value.xreplace({**moved, level_axis(level): axis(along)})


def hidden_axes(graph: fx.Graph) -> dict[fx.Node, tuple[sympy.Symbol, ...]]:
    """For each node inside ``vmap`` calls, the indices that are hidden there."""
    found: dict[fx.Node, tuple[sympy.Symbol, ...]] = {}
    levels: list[list[sympy.Symbol]] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_vmap_increment_nesting":
            levels.append([])
        elif name == "_vmap_decrement_nesting" and levels:
            levels.pop()
        if levels:
            call = read(node)
            if call is not None and call.kind is Kind.HIDE_DIM:
                levels[-1].append(level_axis(call.args.get("level")))
            found[node] = tuple(dict.fromkeys(symbol for level in levels for symbol in level))
    return found
