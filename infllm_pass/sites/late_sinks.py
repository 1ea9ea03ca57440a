"""Sinks that join a softmax after it: a result scaled by what the sink leaves of each row's sum of exponentials.

With ``lse`` the logarithm of that sum, ``exp(lse - logaddexp(lse, sink))`` or, the same, ``sigmoid(lse - sink)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import fx

from infllm_pass.graph.dce import live_users
from infllm_pass.graph.op_table import Kind, read
from infllm_pass.sites.assembly import SinkReading
from infllm_pass.sites.layout_ops import out_axis
from infllm_pass.sites.layouts import LAYOUT_KINDS, Index, Layouts, Reading


@dataclass(frozen=True)
class LateSinks:
    """Sinks that join a softmax after it.

    Attributes:
        node: the scaled result.
        sinks: where they are read.
    """

    node: fx.Node
    sinks: SinkReading


def late_sinks(layouts: Layouts, result: fx.Node, lse: fx.Node) -> LateSinks | None:
    """The sinks that a result is scaled for; None where its log-sum-exp is used for anything else.

    Args:
        layouts: the graph's layout operators.
        result: what attention gives, ``[B, H, Lq, Dv]``.
        lse: its log-sum-exp to the base 2, ``[B, H, Lq]``.
    """
    users = live_users(result)
    call = read(users[0]) if len(users) == 1 else None
    if call is None or call.kind is not Kind.MUL:
        return None
    node = users[0]
    example, own = layouts.facts.example(node), layouts.facts.example(result)
    operands = [call.args.get("input"), call.args.get("other")]
    if example.shape != own.shape or example.dtype != own.dtype or operands.count(result) != 1:
        return None
    share = operands[1 - operands.index(result)]
    index = tuple(out_axis(dim) for dim in range(4))
    if not isinstance(share, fx.Node) or not layouts.is_tensor(share):
        return None
    place = layouts.broadcast(share, index, layouts.shape(node))
    reader = _Reader(layouts, lse, index[:3])
    column = None if place is None else reader.share(share, place)
    if column is None or any(set(live_users(each)) - {node, *reader.path} for each in (lse, *reader.path)):
        return None
    path = [lse, *reader.path, node]
    if layouts.disturbed(path, node) or any(layouts.gradients(each) != layouts.gradients(node) for each in reader.path):
        return None
    chain = tuple(
        reading
        for reading, reader_node in layouts.readings(column.node, column.index, scaled=False)
        if layouts.stable(reading.node, reader_node or node, node)
    )
    return LateSinks(node, SinkReading(chain, 1.0)) if chain else None


@dataclass
class _Reader:
    """Follows what a result is scaled with up to its log-sum-exp.

    Attributes:
        layouts: the graph's layout operators.
        lse: the log-sum-exp to the base 2.
        place: where it has to be read.
        path: the nodes on the way, those computed from `lse`.
    """

    layouts: Layouts
    lse: fx.Node
    place: Index
    path: list[fx.Node] = field(default_factory=list)

    def share(self, node: fx.Node, index: Index) -> Reading | None:
        """The column of sinks, of the share that they leave to the keys; None for anything else."""
        node, index = self._moved(node, index)
        call = read(node)
        difference = None if call is None else call.args.get("input")
        if call is None or call.kind not in (Kind.EXP, Kind.SIGMOID) or not isinstance(difference, fx.Node):
            return None
        operands = self._operands(difference, index, Kind.SUB)
        if operands is None or not self._is_lse(operands[0]):
            return None
        self.path += [node, difference]
        return operands[1] if call.kind is Kind.SIGMOID else self._of_sum(operands[1])

    def _of_sum(self, total: Reading) -> Reading | None:
        """The column of sinks, of the logarithm of all of a row's sum."""
        node, index = self._moved(total.node, total.index)
        call = read(node)
        if call is None:
            return None
        self.path.append(node)
        if call.kind is Kind.LOG_ADD_EXP:
            return self._beside_lse(self._operands(node, index, Kind.LOG_ADD_EXP))
        joined = call.args.get("input")
        if not isinstance(joined, fx.Node) or call.kind is not Kind.LOG_SUM_EXP:
            return None
        columns = read(joined)
        if columns is None or columns.kind is not Kind.CAT:
            return None
        tensors, rank = list(columns.args.get("tensors", ())), len(self.layouts.shape(joined))
        dims = call.args.get("dim")
        along = [dim % rank for dim in ([dims] if isinstance(dims, int) else dims or ())]
        if along != [columns.args.get("dim", 0) % rank] or len(tensors) != 2:
            return None
        if any(not self.layouts.is_tensor(each) or self.layouts.shape(each)[along[0]] != 1 for each in tensors):
            return None
        self.path.append(joined)
        kept = index[: along[0]] + index[along[0] + (1 if call.args.get("keepdim") else 0) :]
        at = (*kept[: along[0]], 0 * out_axis(0), *kept[along[0] :])
        return self._beside_lse([Reading(tensor, at) for tensor in tensors])

    def _beside_lse(self, operands: list[Reading] | None) -> Reading | None:
        for first, second in (operands, operands[::-1]) if operands is not None else ():
            if self._is_lse(first):
                return second
        return None

    def _operands(self, node: fx.Node, index: Index, kind: Kind) -> list[Reading] | None:
        """Where the two operands of an elementwise operator are read."""
        call = read(node)
        if call is None or call.kind is not kind or set(call.args) - {"input", "other"}:
            return None
        found = []
        for name in ("input", "other"):
            operand = call.args.get(name)
            if not isinstance(operand, fx.Node) or not self.layouts.is_tensor(operand):
                return None
            place = self.layouts.broadcast(operand, index, self.layouts.shape(node))
            if place is None:
                return None
            found.append(Reading(operand, place))
        return found

    def _moved(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
        """A node and a place, followed up through layout operators and casts, which are on the way."""
        while True:
            call = read(node)
            source = None if call is None else call.args.get("input")
            if call is None or not isinstance(source, fx.Node) or not self.layouts.is_tensor(source):
                return node, index
            moved = index if call.kind is Kind.CAST else None
            if call.kind in LAYOUT_KINDS:
                moved = self.layouts.step(node, source, index)
            if moved is None:
                return node, index
            self.path.append(node)
            node, index = source, moved

    def _is_lse(self, reading: Reading) -> bool:
        """Whether a tensor is the natural log-sum-exp, read for the row that it is of."""
        before = len(self.path)
        node, index = self._moved(reading.node, reading.index)
        call = read(node)
        source, number = (
            self.layouts.scaling(call.kind, call.args) if call is not None and call.kind is Kind.MUL else (None, None)
        )
        if source is self.lse and index == self.place and number is not None and math.isclose(number, math.log(2)):
            self.path.append(node)
            return True
        del self.path[before:]
        return False
