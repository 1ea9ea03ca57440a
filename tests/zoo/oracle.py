"""Rewritten graphs with the float64 oracle in place of the project's operators."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops.attention_args import geometry_of


@dataclass(frozen=True)
class _Selection:
    """What the oracle's selection hands to its attention: how to select, to be done where the values are known."""

    geometry: BlockGeometry


def count_operators(module: fx.GraphModule) -> int:
    """Attention calls of this project in a graph and the graphs nested in it."""
    return sum(node.target is torch.ops.infllm.block_attention.default for node in _nodes(module))


def with_oracle(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a rewritten graph whose sparse attention is computed by `reference`, and differentiated by autograd."""
    module = copy.deepcopy(module)
    for node in _nodes(module):
        if node.target is torch.ops.infllm.compress_keys.default:
            node.target = _compress_keys
        elif node.target is torch.ops.infllm.select_blocks.default:
            node.target = _select_blocks
        elif node.target is torch.ops.infllm.block_attention.default:
            node.target = _block_attention
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            part.recompile()
    return module


def _nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def _bind(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults included."""
    names = operator._schema.arguments
    given = dict(zip((argument.name for argument in names), args, strict=False)) | kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in names}


def _compress_keys(*args: Any, **kwargs: Any) -> list[Tensor]:
    """Nothing: the oracle compresses where it selects."""
    return []


def _select_blocks(*args: Any, **kwargs: Any) -> _Selection:
    call = _bind(torch.ops.infllm.select_blocks.default, args, kwargs)
    return _Selection(geometry_of(call["geometry"]))


def _block_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    call = _bind(torch.ops.infllm.block_attention.default, args, kwargs)
    q, k = call["q"], call["k"]
    selection = call["selection"] or None
    shift = k.shape[2] - q.shape[2] if call["offset"] is None else call["offset"]
    shifts, length = [shift] * q.shape[0], k.shape[2]
    if call.get("offsets") is not None:  # the keys are a cache: its rows end at their last queries
        shifts = [(call["offset"] or 0) + int(extra) for extra in call["offsets"].expand(q.shape[0])]
        length = max(shifts) + q.shape[2]
        if any(offset != shifts[0] for offset in shifts):
            raise NotImplementedError("rows at positions of their own")
    rows = []
    for row, offset in enumerate(shifts):
        parts = [
            _attend(row, keys, offset, call, selection) for keys in _segments(row, length, call.get("cu_seqlens_k"))
        ]
        rows.append((torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)))
    out, lse = (torch.cat([row[index] for row in rows]) for index in (0, 1))
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32).detach()


def _segments(row: int, length: int, bounds: Tensor | None) -> list[slice]:
    """The packed sequences of one row, as slices of its keys; `bounds` counts through all rows."""
    if bounds is None:
        return [slice(0, length)]
    inside = {int(bound) - row * length for bound in bounds}
    edges = sorted({0, length} | {edge for edge in inside if 0 < edge < length})
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _attend(
    row: int, keys: slice, offset: int, call: dict[str, Any], selection: _Selection | None
) -> tuple[Tensor, Tensor]:
    """One packed sequence, with the queries that stand on its keys; a whole row when nothing is packed."""
    q, k, v = (call[name][row : row + 1] for name in ("q", "k", "v"))
    if call.get("cu_seqlens_k") is not None and keys != slice(0, k.shape[2]):
        if offset != 0 or q.shape[2] != k.shape[2]:
            raise NotImplementedError("packed sequences whose queries are not their keys")
        q = q[:, :, keys]
    k, v = k[:, :, keys], v[:, :, keys]
    mask, bias = call["key_mask"], call["key_bias"]
    if bias is not None:
        bias = bias.expand(call["q"].shape[0], -1, -1)[row : row + 1, :, keys]
    common: dict[str, Any] = {
        "geometry": geometry_of(call["geometry"]),
        "scale": call["scale"],
        "offset": offset,
        "key_mask": None if mask is None else mask[row : row + 1, keys],
        "dense_len": call["dense_len"],
        "window": call.get("window"),
        "softcap": call["softcap"],
    }
    chosen = None if selection is None else reference.select_blocks(q, k, **common)
    return reference.attention(q, k, v, chosen, **common, key_bias=bias, sinks=call["sinks"])
