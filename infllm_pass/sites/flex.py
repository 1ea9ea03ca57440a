"""Matcher for ``flex_attention``: a score function that scales, caps and adds, and a mask function, as mask terms."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from infllm_pass.graph.dce import live_users
from infllm_pass.graph.facts import GraphFacts
from infllm_pass.graph.op_table import Call, Kind, read
from infllm_pass.masks.normal_form import MaskRole, MaskTerm
from infllm_pass.reasons import Reason
from infllm_pass.sites.fused import fused_reads, site_of
from infllm_pass.sites.late_sinks import late_sinks
from infllm_pass.sites.layouts import Layouts
from infllm_pass.sites.scalars import number_of
from infllm_pass.sites.site import AttentionSite, PartialSite


def read_flex(layouts: Layouts, node: fx.Node) -> AttentionSite | PartialSite | None:
    """Read a node as a call of flex attention; None for one that is none.

    The block tables of a mask hold, by their contract, every block in which the mask function lets a query see a
    key; the mask function alone is read.
    """
    call = read(node)
    if call is None or call.kind is not Kind.FLEX_ATTENTION:
        return None
    outputs = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    result = outputs.get(0)
    if result is None or not layouts.is_tensor(result):
        return None
    used = [user for place, user in outputs.items() if place != 0 and live_users(user)]
    late = late_sinks(layouts, result, used[0]) if used == [outputs.get(1)] else None
    if used and late is None:
        return PartialSite(node, Reason.RETURNED_WEIGHTS, used[0], "flex_attention, whose log-sum-exp is used")
    block_mask = call.args.get("block_mask")
    score_body = _body(layouts, call.args.get("score_mod"))
    mask_node = block_mask[-1] if isinstance(block_mask, (tuple, list)) and block_mask else None
    mask_body = _body(layouts, mask_node)
    scale = number_of(layouts.example(call.args.get("scale")))
    if score_body is None or mask_body is None or scale is None or not isinstance(mask_node, fx.Node):
        return PartialSite(node, Reason.PARTIAL_MATCH, node, "flex_attention, whose arguments are not followed")
    scores = _scores(score_body)
    if isinstance(scores, PartialSite):
        return PartialSite(node, scores.reason, scores.stopped, "flex_attention, its score function")
    term = MaskTerm(mask_node, MaskRole.BLOCK_MASK, None, mask_body, _buffers(call, "mask_mod_buffers"))
    captured = _buffers(call, "score_mod_buffers")
    added = [
        MaskTerm(node, MaskRole.ADDED, None, score_body, captured, factor, inside) for inside, factor in scores.added
    ]
    grouped = Call(call.kind, {**call.args, "enable_gqa": True, "is_causal": False, "dropout_p": 0.0})
    dtype = layouts.facts.example(result).dtype
    reads = fused_reads(layouts, result, grouped, terms=(term, *added), scale=scale * scores.factor, dtype=dtype)
    if reads is None:
        return PartialSite(node, Reason.SHAPES, node, "flex_attention")
    reads = replace(reads, softcap=scores.softcap)
    if late is not None:
        reads = replace(reads, node=late.node, last=late.node, sinks=late.sinks)
    return site_of(layouts, reads, Reason.SHAPES, "flex_attention")


def _body(layouts: Layouts, node: Any) -> fx.GraphModule | None:
    """The graph that a node names."""
    owner = layouts.facts.graph.owning_module
    if not isinstance(node, fx.Node) or node.op != "get_attr" or owner is None:
        return None
    body = getattr(owner, str(node.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _buffers(call: Call, name: str) -> tuple[fx.Node, ...]:
    """The tensors that a function captures."""
    return tuple(buffer for buffer in call.args.get(name) or () if isinstance(buffer, fx.Node))


@dataclass(frozen=True)
class _ScoreFunction:
    """What a score function does to scores.

    Attributes:
        factor: what it multiplies them with.
        softcap: the cap; 0.0 without one.
        added: nodes of the function that are added after the cap, and what they are multiplied with.
    """

    factor: float
    softcap: float
    added: tuple[tuple[fx.Node, float], ...]


def _scores(body: fx.GraphModule) -> _ScoreFunction | PartialSite:
    """What a score function does to scores; the node at which it does something that is no term, if it does."""
    facts = GraphFacts(body.graph, {})
    layouts = Layouts(facts)
    score = next(node for node in body.graph.nodes if node.op == "placeholder")
    current: Any = next(node for node in body.graph.nodes if node.op == "output").args[0]
    if isinstance(current, (tuple, list)) and len(current) == 1:
        current = current[0]
    factor, softcap = 1.0, 0.0
    added: list[tuple[fx.Node, float]] = []
    while current is not score:
        call = read(current) if isinstance(current, fx.Node) else None
        kind = None if call is None else call.kind
        finite = factor != 0.0 and math.isfinite(factor)
        if call is not None and kind is Kind.CAST:
            current = call.args.get("input")
            continue
        if call is not None and kind is Kind.TANH and not softcap and finite:
            current, softcap = call.args.get("input"), abs(factor)  # f * tanh(y) is c * tanh(f * y / c) for c = |f|
            continue
        if call is not None and kind in (Kind.ADD, Kind.SUB) and not softcap and finite:
            split = _split(call, score)
            if split is not None:
                current, other, sign = split
                added.append((other, factor * sign))
                continue
        source, number = (
            layouts.scaling(kind, call.args) if call is not None and kind in (Kind.MUL, Kind.DIV) else (None, None)
        )
        if source is None or number is None:
            kinds = {found.kind for node in body.graph.nodes if (found := read(node)) is not None}
            reason = Reason.SOFT_CAP if Kind.TANH in kinds else Reason.ADDITIVE_BIAS
            stopped = current if isinstance(current, fx.Node) else score
            return PartialSite(stopped, reason, stopped, "")
        current, factor = source, factor * number
    return _ScoreFunction(factor, softcap, tuple(added))


def _split(call: Call, score: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """The operand of a sum that the score is in, the other one and its sign; None unless just one of them is."""
    if set(call.args) - {"input", "other"}:
        return None
    first, second = call.args.get("input"), call.args.get("other")
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    holds = [_reaches(operand, score) for operand in (first, second)]
    if holds == [True, False]:
        return first, second, -1.0 if call.kind is Kind.SUB else 1.0
    return (second, first, 1.0) if holds == [False, True] and call.kind is Kind.ADD else None


def _reaches(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is computed from another one."""
    stack, seen = [node], set()
    while stack:
        each = stack.pop()
        if each is source:
            return True
        if each not in seen:
            seen.add(each)
            stack += each.all_input_nodes
    return False
