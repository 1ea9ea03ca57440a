"""Fuses compression, selection and attention of a site into one operator for formats outside Python.

``infllm::switchable_attention``
    what ``infllm::compress_keys``, ``infllm::select_blocks`` and ``infllm::block_attention`` compute together, without
    the log-sum-exp and without a gradient. Formats that know operators by name have one name to know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from infllm_pass.errors import ExportError

from ..ops.attention_args import FUSED, SIGNATURES, AttentionCall, geometry_of, name_of
from ..ops.checks import check_attention, check_sequences, check_terms, refused_by_tiled
from ..ops.dispatch import attend
from ..ops.prefill import new_output
from ..ops.registry import Operator

ALWAYS_DENSE = 2**31 - 1
"""The ``dense_len`` of a call that selects nothing."""


def compute(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """What the operator gives."""
    return attend(q, k, v, call, select=bool(k.shape[2] >= call.dense_len))


def fake(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Shape, dtype and layout of it."""
    check_attention(q, k, v, call.key_mask)
    check_sequences(q, call)
    check_terms(q, k, call)
    return new_output(q, v)[0]


switchable_attention = Operator(
    "switchable_attention",
    FUSED,
    compute=compute,
    fake=fake,
    doc="""Causal attention, dense for sequences shorter than `dense_len` and block-sparse for others.

Returns ``[B, Hq, Lq, Dv]`` in q's dtype, stored as ``[B, Lq, Hq, Dv]``. A query that sees no key gives 0.

Raises ShapeError, DtypeError, DeviceError: the tensors do not fit; before anything is computed.""",
)

OPERATOR = switchable_attention.default


def is_tiled(node: fx.Node) -> bool:
    """Whether the Triton kernels compute a call of attention."""
    return refusal(node) is None


def refusal(node: fx.Node) -> str | None:
    """Why the Triton kernels do not take a call of attention, in words that say what to change; None if they do."""
    given = SIGNATURES[name_of(node)].named(node)
    q, v = (given[name].meta["val"] for name in ("q", "v"))
    return refused_by_tiled(q, v, given["scale"], geometry_of(given["geometry"]))


def join_sites(graph: fx.Graph, wanted: Callable[[fx.Node], bool] = lambda node: True) -> int:
    """Replace compression, selection and attention by one operator, wherever a graph holds them.

    Args:
        graph: the graph of an exported program.
        wanted: which calls of ``infllm::block_attention`` to replace; all, if nothing is given.

    Returns:
        How many calls of the one operator the graph holds now.

    Raises:
        ExportError: a call has no such form: see `why_not_joined`.
    """
    for node in list(graph.nodes):
        if name_of(node) != "block_attention" or not wanted(node):
            continue
        reason = why_not_joined(node)
        if reason is not None:
            raise ExportError(reason)
        given = SIGNATURES["block_attention"].named(node)
        if given["selection"] is None or not _parts(given["selection"]):
            given["dense_len"] = ALWAYS_DENSE
        for user in list(node.users):
            if not user.users:
                graph.erase_node(user)
                continue
            with graph.inserting_before(user):
                call = graph.call_function(OPERATOR, tuple(given[name] for name in FUSED.names))
            call.meta = dict(user.meta)
            user.replace_all_uses_with(call)
            graph.erase_node(user)
        _erase_unused(graph, node)
    return sum(node.target is OPERATOR for node in graph.nodes)


def why_not_joined(node: fx.Node) -> str | None:
    """Why a call of ``infllm::block_attention`` has no form as one operator; None if it has."""
    given = SIGNATURES["block_attention"].named(node)
    for user in node.users:
        if user.users and (user.target is not operator.getitem or user.args[1] != 0):
            return f"{user.name} reads the log-sum-exp of {node.name}, which is not exported"
    if count := geometry_of(given["geometry"]).agnostic_blocks:
        return f"{node.name} chooses {count} blocks by importance, which cannot be exported: set agnostic_topk=0"
    if given["cu_seqlens_q"] is not None or given["cu_seqlens_k"] is not None:
        return f"{node.name} attends within packed sequences, which cannot be exported: pad them to rows of a batch"
    for part in _parts(given["selection"]):
        source = part.args[0] if part.target is operator.getitem else part
        if not isinstance(source, fx.Node) or name_of(source) != "select_blocks":
            return f"the selection of {node.name} comes from {source}: expected infllm::select_blocks"
    return None


def _parts(selection: Any) -> list[fx.Node]:
    """The nodes that a selection is made of: its tensors, or one that gives them all."""
    return [selection] if isinstance(selection, fx.Node) else list(selection)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a call and, of what it was computed from, this package's calls and their results that nothing reads."""
    if node.users or not (name_of(node) or (node.target is operator.getitem and _erasable(node.args[0]))):
        return
    inputs = list(node.all_input_nodes)
    graph.erase_node(node)
    for source in inputs:
        _erase_unused(graph, source)


def _erasable(source: Any) -> bool:
    return isinstance(source, fx.Node) and bool(name_of(source))
