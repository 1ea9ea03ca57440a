"""Dynamic caches: proves that keys made by ``torch.cat`` continue the keys of earlier calls.

A decoding step has one query and no mask: it is causal because its own token's key is the last, which nothing but the
dataflow says. The rule: keys are a concatenation along their length, the parts before the last are inputs of the graph,
and the last is computed from data that the query is computed from. Attention to an encoder, to learned keys, or to
anything else that does not grow by the query's own token does not meet it.

Where the grown keys are also an output of the graph, in the layout of the input that they continue, the next call's
first keys are this call's keys: what was computed of them stays true, see `cached_graph`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from infllm_pass.graph.facts import axis, same
from infllm_pass.graph.op_table import Kind, read
from infllm_pass.sites.index_algebra import KEY, simplify
from infllm_pass.sites.layout_ops import Roles
from infllm_pass.sites.layouts import Index, Layouts, Reading
from infllm_pass.sites.site import Continuation, Growth


def growth_of(
    layouts: Layouts, keys: Sequence[Reading], chosen: Reading, roles: Roles, query: fx.Node
) -> Growth | None:
    """How the keys of an attention grow with its queries; None where they do not, or that cannot be told.

    Args:
        layouts: the graph's layout operators.
        keys: readings of one key, from the product towards where the keys come from.
        chosen: the one of them that the site reads its keys from.
        roles: what the indices of the readings mean.
        query: the node that the product reads the queries from.
    """
    end, found = keys[-1], _grown(layouts, keys, query)
    if found is None:
        return None
    along, earlier, last = found
    appended = layouts.shape(last)[along]
    continuation: Continuation | str = "its keys are scaled after they are put together"
    if chosen.factor == end.factor:
        continuation = _continuation(layouts, keys, roles, earlier, along, appended)
    return Growth(appended, _is_trimmed(layouts, end.node, along), continuation)


def appended_keys(layouts: Layouts, keys: Sequence[Reading], query: fx.Node) -> sympy.Expr | None:
    """How many keys a call appends to those of earlier ones; None where that is not seen. See `growth_of`."""
    found = _grown(layouts, keys, query)
    return None if found is None else layouts.shape(found[2])[found[0]]


def _grown(layouts: Layouts, keys: Sequence[Reading], query: fx.Node) -> tuple[int, Sequence[fx.Node], fx.Node] | None:
    """The dimension that a call's keys are put together in, the earlier ones, and its own; None where they are not."""
    end = keys[-1]
    call = read(end.node)
    if call is None or call.kind is not Kind.CAT:
        return None
    parts = call.args.get("tensors")
    along = [dim for dim, part in enumerate(end.index) if KEY in part.free_symbols]
    if len(along) != 1 or end.index[along[0]] != KEY or call.args.get("dim", 0) not in _spellings(along[0], end):
        return None
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not all(layouts.is_tensor(part) for part in parts):
        return None
    *earlier, last = parts
    if not all(_is_input(layouts, part) for part in earlier) or not _have_common_data(layouts, query, last):
        return None
    return along[0], earlier, last


def _continuation(
    layouts: Layouts,
    keys: Sequence[Reading],
    roles: Roles,
    earlier: Sequence[fx.Node],
    along: int,
    appended: sympy.Expr,
) -> Continuation | str:
    """How the next call gets the keys of a concatenation; a text says what keeps that from being known.

    Args:
        layouts: the graph's layout operators.
        keys: readings of one key, from the product to the concatenation.
        roles: what their indices mean.
        earlier: the parts before the last.
        along: the dimension that the parts are put together in.
        appended: length of the last part.
    """
    if len(earlier) != 1:
        return "its keys are put together of more than earlier and new ones"
    grown, past = keys[-1], _source(layouts, earlier[0])
    counting = [dim for dim, part in enumerate(past.index) if part == axis(along)]
    total = layouts.shape(grown.node)[along]
    if len(counting) != 1 or not same(layouts.shape(past.node)[counting[0]] + appended, total):
        return "it reads a part of the earlier keys"
    kept = [
        returned
        for returned in layouts.returned.get(grown.node, ())
        if _continues(returned.index, past.index, layouts.shape(grown.node))
    ]
    if not kept:
        return "the graph does not return its keys as it takes them"
    if any(layouts.facts.is_overwritten(reading.node) for reading in (*keys, past)):
        return "the graph writes to its keys"
    meant = (simplify(part.xreplace(roles.meaning), roles.extents) for part in grown.index)
    return Continuation(past.node, kept[0].place, counting[0], tuple(map(str, (*past.index, *meant))))


def _source(layouts: Layouts, node: fx.Node) -> Reading:
    """What a tensor is a view, copy or wider form of, and where that holds each of its elements."""
    *_, (end, _) = layouts.readings(node, _places(layouts, node), scaled=False)
    return end


def _continues(returned: Index, past: Index, shape: tuple[sympy.Expr, ...]) -> bool:
    """Whether an output, taken as the input of the next call, gives every key the place that it has now.

    Args:
        returned: where the concatenation holds each element of the output.
        past: where the input holds each element of the concatenation.
        shape: sizes of the concatenation.
    """
    place = {axis(dim): part for dim, part in enumerate(past)}
    return all(
        part.xreplace(place) == axis(dim) or (extent == 1 and part == 0)
        for dim, (part, extent) in enumerate(zip(returned, shape, strict=True))
    )


def _spellings(dim: int, reading: Reading) -> tuple[int, int]:
    return dim, dim - len(reading.index)


def _places(layouts: Layouts, node: fx.Node) -> tuple[sympy.Expr, ...]:
    return tuple(axis(dim) for dim in range(len(layouts.shape(node))))


def _is_input(layouts: Layouts, node: fx.Node) -> bool:
    """Whether a tensor is an input of the whole graph, or a view, copy or wider form of one."""
    end = _source(layouts, node).node
    return end.op == "placeholder" and end not in layouts.facts.bindings


def _have_common_data(layouts: Layouts, a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors are computed from one that depends on the call's data, not on parameters and sizes alone.

    Nodes are visited from the last to the first, so that the walk ends at the nearest one.
    """
    sides = {a: {0}, b: {1}} if a is not b else {a: {0, 1}}
    pending = [(-layouts.position(node), node.name, node) for node in sides]
    heapq.heapify(pending)
    while pending:
        _, _, node = heapq.heappop(pending)
        if len(sides[node]) == 2 and layouts.is_tensor(node) and node in layouts.data:
            return True
        for source in node.all_input_nodes:
            if source not in sides:
                sides[source] = set()
                heapq.heappush(pending, (-layouts.position(source), source.name, source))
            sides[source] |= sides[node]
    return False


def _is_trimmed(layouts: Layouts, keys: fx.Node, along: int) -> bool:
    """Whether the graph keeps, or reads, a part of the keys only: later calls then count them from another one."""
    for user in keys.users:
        call = read(user)
        if call is None or call.kind is not Kind.GETITEM or not isinstance(layouts.example(user), torch.Tensor):
            continue
        moved = layouts.step(user, keys, _places(layouts, user))
        if moved is None or not moved[along].is_Symbol:
            return True
    return False
