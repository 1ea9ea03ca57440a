"""Rules for the calls that ``torch.vmap`` leaves in a graph: a level hides one dimension of each tensor it maps over.

While a dimension is hidden its index is a `hidden_axis` of the level; operators in between see the other dimensions.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from infllm_pass.graph.facts import axis, level_axis
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.rules.registry import Evaluator, dim_of, rule


@rule(Kind.HIDE_DIM)
def _hide(run: Evaluator, example: torch.Tensor, input: Any, dim: Any, level: Any) -> sympy.Basic:
    source = run.operand(input)
    along = dim_of(dim, len(source.shape))
    index = [axis(d) for d in range(example.dim())]
    return source.at([*index[:along], level_axis(level), *index[along:]])


@rule(Kind.SHOW_DIM)
def _show(run: Evaluator, example: torch.Tensor, input: Any, level: Any, size: Any, dim: Any) -> sympy.Basic:
    source = run.operand(input)
    along = dim_of(dim, example.dim())
    moved = {axis(d): axis(d + 1) for d in range(along, len(source.shape))}
    return source.value.xreplace({**moved, level_axis(level): axis(along)})
