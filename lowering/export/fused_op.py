"""Selection and attention as one operator, the form in which graphs leave Python.

``infllm::switchable_attention``
    what ``infllm::select_blocks`` and ``infllm::block_attention``, or ``infllm::tiled_attention``, compute together,
    without the log-sum-exp and without a gradient. Formats that know operators by name have one name to know.
"""

from __future__ import annotations

import operator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx

from infllm_pass.errors import ExportError
from infllm_pass.kernels.geometry import BlockGeometry

from ..ops.checks import check_attention, check_sequences
from ..ops.dispatch import attend
from ..ops.prefill_cpu import static_geometry

ALWAYS_DENSE = 2**31 - 1
"""The ``dense_len`` of a call that selects nothing."""


@torch.library.custom_op("infllm::switchable_attention", mutates_args=())
def switchable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
) -> Tensor:
    """Causal attention, dense for sequences shorter than `dense_len` and block-sparse for others.

    Args:
        q: ``[B, Hq, Lq, D]``; query ``i`` stands at key index ``offset + i`` and sees no later key.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        key_mask: bool ``[B, Lk]``, True where a key is valid, or None.
        offsets: int32 or int64 ``[1]`` or ``[B]``: key index of the first query, added to `offset`, or None.
        offset: key index of the first query; None: ``Lk - Lq``, the queries are the last of the keys (0 with
            `offsets`).
        window: sliding window in keys, or None.
        scale: softmax scale.
        dense_len: length from which a sequence is sparse.
        kernel_size: see `BlockGeometry`, as for the arguments that follow.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype, stored as ``[B, Lq, Hq, Dv]``. A query that sees no key gives 0.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit; raised before anything is computed.
    """
    geometry = static_geometry(
        *(kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    )
    call = (key_mask, offsets, None, None, offset, window, scale, dense_len)
    return attend(q, k, v, call, geometry, scale=scale, select=bool(k.shape[2] >= dense_len))


@switchable_attention.register_fake
def switchable_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    offset: int | None,
    window: int | None,
    scale: float,
    dense_len: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
) -> Tensor:
    """Shape, dtype and layout of what `switchable_attention` returns."""
    check_attention(q, k, v, None, key_mask)
    check_sequences(q, offsets, None, None, window)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


OPERATOR = torch.ops.infllm.switchable_attention.default

TORCH_PARTS = frozenset({"block_attention"})
"""The operators of attention that are implemented in Python."""

PARTS = TORCH_PARTS | {"tiled_attention"}
"""All operators of attention over whole prompts."""


def join_sites(graph: fx.Graph, parts: frozenset[str] = PARTS) -> int:
    """Replace selection and attention by one operator, wherever a graph holds them.

    Args:
        graph: the graph of an exported program.
        parts: names of the operators of attention to replace.

    Returns:
        How many calls of the one operator the graph holds now.

    Raises:
        ExportError: a call has no such form: packed sequences, or a log-sum-exp that the graph reads.
    """
    for node in list(graph.nodes):
        if _name(node) not in parts:
            continue
        arguments, blocks = _joined_arguments(node)
        for user in list(node.users):
            if not user.users:
                graph.erase_node(user)
                continue
            if user.target is not operator.getitem or user.args[1] != 0:
                raise ExportError(f"{user.name} reads the log-sum-exp of {node.name}, which is not exported")
            with graph.inserting_before(user):
                call = graph.call_function(OPERATOR, arguments)
            call.meta = dict(user.meta)
            user.replace_all_uses_with(call)
            graph.erase_node(user)
        graph.erase_node(node)
        if blocks is not None and not blocks.users:
            graph.erase_node(blocks)
    return sum(node.target is OPERATOR for node in graph.nodes)


def _joined_arguments(node: fx.Node) -> tuple[tuple[Any, ...], fx.Node | None]:
    """Arguments of the one operator for a call of attention, and the node that selects its blocks."""
    args, blocks = _named_arguments(node), None
    select = args.get("select", False)
    if _name(node) == "block_attention":
        blocks = args["blocks"]
        if blocks is not None:
            if _name(blocks) != "select_blocks":
                raise ExportError(f"the blocks of {node.name} come from {blocks.name}: expected infllm::select_blocks")
            select, args = True, {**args, **_named_arguments(blocks)}
        else:
            args = {**{field.name: field.default for field in fields(BlockGeometry)}, **args}
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if args[name] is not None:
            raise ExportError(
                f"{node.name} attends within packed sequences, which cannot be exported: pad them to rows of a batch"
            )
    if not select:
        args["dense_len"] = ALWAYS_DENSE
    return tuple(args[argument.name] for argument in OPERATOR._schema.arguments), blocks


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _name(node: fx.Node) -> str:
    """The name of one of this package's operators, without its namespace; "" for anything else."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "infllm":
        return ""
    return node.target._schema.name.removeprefix("infllm::")
