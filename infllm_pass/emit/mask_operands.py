"""Operands for a proved mask: offsets, windows, key masks and segment bounds, never an ``Lq x Lk`` tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from infllm_pass.emit.builder import Emitter
from infllm_pass.graph.facts import example_of, same, size, storage
from infllm_pass.graph.op_table import read_update
from infllm_pass.graph.regions import Regions, carry
from infllm_pass.graph.subgraphs import input_name
from infllm_pass.kernels.params import compute_dtype
from infllm_pass.lowering.ops.positions import CHECKED_POSITIONS
from infllm_pass.masks import (
    BATCH,
    HEAD,
    KEY,
    GraphFacts,
    HeadFunction,
    KeyBias,
    KeyCondition,
    Leaf,
    MaskPredicate,
    Segments,
    axes_of,
    home_of,
    without_shift,
)
from infllm_pass.masks.codegen import Site, build
from infllm_pass.plan.site_plan import SitePlan
from infllm_pass.sites import AttentionSite

MASK_ARGUMENTS = ("key_mask", "offsets", "cu_seqlens_q", "cu_seqlens_k", "offset", "window")
"""What `MaskOperands.arguments` makes, in order."""

ROW_ARGUMENTS = ("lengths", "starts", "key_mask", "window")
"""What `MaskOperands.rows` makes, in order."""


def _extent(counted: sympy.Expr, site: AttentionSite) -> sympy.Expr:
    """How many elements an index of a bias counts over, which begins at 0."""
    rows, heads, keys = size(site.shape(site.key)[0]), int(site.query_heads), size(site.shape(site.key)[2])
    axes = axes_of(counted)
    if axes == (HEAD,):
        return counted.args[1] if isinstance(counted, sympy.Mod) else sympy.floor(counted.xreplace({HEAD: heads}))
    return {(BATCH,): rows, (KEY,): keys, (BATCH, HEAD): rows * heads}[axes]


def _rows_and_keys(site: AttentionSite) -> tuple[sympy.Expr, sympy.Expr]:
    """How many rows and keys a site has: those of a prompt, or all slots of a cache, in layers of one model."""
    rows, _, keys, _ = site.shape(site.key)
    return size(rows), size(keys)


class OperandMakers:
    """What inserts calls and makes mask operands in a root graph and in those nested in it.

    Args:
        regions: the regions of nested graphs.
    """

    def __init__(self, regions: Regions | None = None) -> None:
        self._regions: Regions = regions or {}
        self._emitters: dict[GraphFacts, Emitter] = {}
        self._masks: dict[tuple[GraphFacts, torch.device], MaskOperands] = {}

    def emitter(self, facts: GraphFacts) -> Emitter:
        """What inserts calls into a graph."""
        if facts not in self._emitters:
            self._emitters[facts] = Emitter(facts.graph, nested=bool(facts.callers))
        return self._emitters[facts]

    def masks(self, facts: GraphFacts, device: torch.device) -> MaskOperands:
        """What makes the mask operands of a graph's sites on a device."""
        if (facts, device) not in self._masks:
            self._masks[facts, device] = MaskOperands(self, facts, device)
        return self._masks[facts, device]

    def undo(self, facts: GraphFacts) -> None:
        """Take back what was inserted into a graph and not kept, and forget its operands, some of which are gone."""
        self.emitter(facts).undo()
        self._masks = {key: masks for key, masks in self._masks.items() if key[0] is not facts}

    def carry(self, facts: GraphFacts, home: GraphFacts, node: fx.Node) -> fx.Node:
        """What a node of an outer graph is in a graph, see `graph.regions.carry`."""
        return carry(facts, home, node, self._regions)


class MaskOperands:
    """Makes the mask arguments of the operators, each tensor once for all sites of a graph and device that share it.

    What is made of tensors of an outer graph is made there, once for all graphs nested in it.

    Args:
        makers: those of the graph, and of those that it is nested in.
        facts: what is known of the graph.
        device: the device of the sites.
    """

    def __init__(self, makers: OperandMakers, facts: GraphFacts, device: torch.device) -> None:
        self._makers = makers
        self._emitter = makers.emitter(facts)
        self._facts = facts
        self._device = device
        self._early: dict[Any, fx.Node] = {}
        self._key_masks: dict[Any, fx.Node] = {}
        self._positions: dict[sympy.Expr, fx.Node] = {}
        self._numbers: dict[sympy.Expr, fx.Node | int] = {}
        self._checked: dict[tuple[fx.Node, Any, Any], fx.Node] = {}
        self._lengths: dict[Any, fx.Node] = {}
        self._starts: dict[fx.Node, fx.Node] = {}
        self._bounds: dict[Any, fx.Node] = {}

    def arguments(self, plan: SitePlan, site: AttentionSite) -> tuple[Any, ...]:
        """The arguments of a site by its mask, see `MASK_ARGUMENTS`."""
        mask = plan.mask
        if mask is None:
            return (None,) * 6
        offsets = self._offsets(mask, site) if plan.in_cache else None
        bounds = None if mask.segments is None else self._segment_bounds(mask.segments, site)
        window = None if mask.window is None else int(mask.window)
        return self.key_mask(mask.key_terms.mask, site), offsets, None, bounds, None, window

    def rows(self, plan: SitePlan, site: AttentionSite) -> tuple[fx.Node, fx.Node | None, fx.Node | None, int | None]:
        """The arguments of the decode operator by a site's mask, see `ROW_ARGUMENTS`."""
        key_mask, offsets, *_, window = self.arguments(plan, site)
        if key_mask is not None and key_mask not in self._starts:
            valid = self._call(site, "to", key_mask, torch.int32)
            first = self._call(site, "argmax", valid, 1)
            self._starts[key_mask] = self._call(site, "to", first, torch.int32)
        starts = None if key_mask is None else self._starts[key_mask]
        lengths = self._key_count(site) if offsets is None else self._ends(offsets, site)
        return lengths, starts, key_mask, window

    def _ends(self, offsets: fx.Node, site: AttentionSite) -> fx.Node:
        """One past the last key of each row of a cache, whose queries begin at `offsets`."""
        length_q = self._emitter.size(site.node, self._emitter.operand(site.node, site.query, site.query), 2)
        if (offsets, length_q) not in self._lengths:
            self._lengths[offsets, length_q] = self._call(site, operator.add, offsets, length_q)
        return self._lengths[offsets, length_q]

    def _key_count(self, site: AttentionSite) -> fx.Node:
        """The number of keys, of which the queries are the last, as a tensor ``[1]``."""
        count = size(site.shape(site.key_heads)[2])
        if count not in self._lengths:
            key, device = self._emitter.operand(site.node, site.key_heads, site.query), site.key.example.device
            number = self._emitter.size(site.node, key, 2)
            self._lengths[count] = self._call(site, torch.full, [1], number, dtype=torch.int64, device=device)
        return self._lengths[count]

    def key_mask(self, conditions: tuple[KeyCondition, ...], site: AttentionSite) -> fx.Node | None:
        """The keys' validity as a node ``[B, Lk]`` of dtype bool."""
        if not conditions:
            return None
        wanted = conditions, *_rows_and_keys(site)
        if wanted not in self._key_masks:
            leaves = [leaf for condition in conditions for leaf in condition.leaves]
            home = self._home(leaves, [condition.expression for condition in conditions], site)
            if home is self:
                mask = self._valid(conditions, site, self._extents(site))
            else:
                mask = self._made_in(
                    home,
                    lambda: home._at_once(
                        conditions, leaves, site, lambda extents: home._valid(conditions, site, extents)
                    ),
                )
            self._key_masks[wanted] = mask
        return self._key_masks[wanted]

    def _valid(self, conditions: tuple[KeyCondition, ...], site: AttentionSite, extents: tuple[Any, Any]) -> fx.Node:
        tests = [self._test(condition, site, extents) for condition in conditions]
        mask = tests[0]
        for test in tests[1:]:
            mask = self._call(site, torch.logical_and, mask, test)
        return self._call(site, "expand", mask, list(extents))

    def _home(self, leaves: Sequence[Leaf], expressions: Sequence[sympy.Basic], site: AttentionSite) -> MaskOperands:
        """What makes an operand ``[B, Lk]``: that of the graph which its tensors belong to, if it has the sizes too."""
        home = home_of(leaves, self._facts)
        outer = self._makers.masks(home, self._device)
        names = {name for name, _, _ in leaves}
        sizes = {symbol for each in expressions for symbol in each.free_symbols - {BATCH, KEY}}
        known = {symbol for symbol in sizes if symbol.name not in names} <= set(home.size_sources)
        return outer if known and None not in outer._sizes(site) else self

    def _made_in(self, home: MaskOperands, make: Callable[[], fx.Node]) -> fx.Node:
        """What an operand of an outer graph is here."""
        try:
            node = make()
        except Exception:
            self._makers.undo(home._facts)
            raise
        home._emitter.keep({})
        return self._makers.carry(self._facts, home._facts, node)

    def _at_once(
        self,
        key: Any,
        leaves: Sequence[Leaf],
        site: AttentionSite,
        make: Callable[[tuple[Any, Any]], fx.Node],
    ) -> fx.Node:
        """An operand of nested graphs, before their first call: right after the tensors that it is made of.

        Args:
            key: what the operand is.
            leaves: the tensors.
            site: the site that asks for it.
            make: makes it for numbers of rows and keys.
        """
        sizes = self._sizes(site)
        if (key, sizes) not in self._early:
            graph = self._emitter.graph
            nodes = [self._makers.carry(self._facts, facts, node) for _, facts, node in leaves]
            with graph.inserting_before(max([*nodes, *graph.find_nodes(op="placeholder")[-1:]]).next):
                extents = [n if n is None or isinstance(n, int) else self._size(n, site) for n in sizes]
                self._early[key, sizes] = make((extents[0], extents[1]))
        return self._early[key, sizes]

    def _sizes(self, site: AttentionSite) -> tuple[int | sympy.Symbol | None, int | sympy.Symbol | None]:
        """Rows and keys, as `_input_size`."""
        rows, _, keys, _ = site.shape(site.key)
        return self._input_size(rows), self._input_size(keys)

    def key_bias(self, plan: SitePlan, site: AttentionSite) -> list[fx.Node]:
        """The numbers added to the scaled scores of keys, each ``[B or 1, Hq or Hkv or 1, Lk or 1]``."""
        found: list[fx.Node] = []
        for bias in () if plan.mask is None else plan.mask.key_terms.bias:
            node = self._elements(bias, site)
            axes = [axes_of(at) for at in bias.index if not at.is_Integer]
            for dim, found_axes in enumerate(axes):
                if len(found_axes) == 2:  # only one index counts along two
                    node = self._call(site, "unflatten", node, dim, [-1, int(site.query_heads)])
            own = [symbol for each in axes for symbol in each]
            order = [own.index(symbol) for symbol in (BATCH, HEAD, KEY) if symbol in own]
            if order != sorted(order):
                node = self._call(site, "permute", node, order)
            for dim, symbol in enumerate((BATCH, HEAD)):
                if symbol not in own:
                    node = self._call(site, "unsqueeze", node, dim)
            if bias.by_position:
                node = self._call(site, "to", node, compute_dtype(site.dtype))
            node = node if bias.factor == 1.0 else self._call(site, operator.mul, node, bias.factor)
            found.append(self._by_position(node, site) if bias.by_position else node)
        return found

    def _elements(self, bias: KeyBias, site: AttentionSite) -> fx.Node:
        """The elements of a bias's tensor that it reads: a dimension for each index that is no number."""
        if bias.computed is not None:
            return self._of_heads(bias.computed, site)
        if bias.leaf is None:
            return self._call(site, torch.ones, [], dtype=compute_dtype(site.dtype), device=site.key.example.device)
        node = self._local(bias.leaf, site)
        for dim in reversed(range(len(bias.index))):
            at = bias.index[dim]
            if at.is_Integer:
                node = self._call(site, "select", node, dim, int(at))
                continue
            counted, start = without_shift(at)
            extent = _extent(counted, site)
            if start != 0 or not same(size(example_of(node).shape[dim]), extent):
                first, length = (self._number(number, (), site) for number in (start, extent))
                node = self._call(site, "narrow", node, dim, first, length)
        return node

    def _of_heads(self, function: HeadFunction, site: AttentionSite) -> fx.Node:
        """What a score function computes of one head, for all of them: ``[Hq]``."""
        dtype, device = function.head.meta["example_value"].dtype, site.key.example.device
        made = {function.head: self._call(site, torch.arange, int(site.query_heads), dtype=dtype, device=device)}

        def make(node: fx.Node) -> fx.Node:
            if node not in made:
                args, kwargs = fx.map_arg((node.args, node.kwargs), make)
                made[node] = self._call(site, node.target, *args, **kwargs)
            return made[node]

        return make(function.result)

    def _by_position(self, slopes: fx.Node, site: AttentionSite) -> fx.Node:
        """Slopes ``[B or 1, Hq or Hkv or 1]`` times the numbers of the keys, counted from the middle key.

        Half of the keys then lie on either side, which halves the numbers that scores are added to and what they are
        rounded by: to 0.001 for a slope of 1/2 and 131 072 keys in float32.
        """
        key = self._emitter.operand(site.node, site.key_heads, site.query)
        length, device = self._emitter.size(site.node, key, 2), site.key.example.device
        places = self._call(site, torch.arange, length, device=device)
        places = self._call(site, operator.sub, places, self._call(site, operator.floordiv, length, 2))
        return self._call(site, operator.mul, self._call(site, "unsqueeze", slopes, 2), places)

    def sinks(self, site: AttentionSite) -> fx.Node | None:
        """The logits that join each query's softmax without a key, as a node ``[Hq]``."""
        sinks, heads = site.sinks, int(site.query_heads)
        if sinks is None:
            return None
        dtype = compute_dtype(site.dtype)
        if sinks.node is None:
            return self._call(site, torch.full, [heads], sinks.factor, dtype=dtype, device=site.key.example.device)
        node = self._emitter.current(sinks.node)
        for dim in reversed(range(len(sinks.index))):
            if sinks.index[dim].is_Integer:
                node = self._call(site, "select", node, dim, int(sinks.index[dim]))
        if not example_of(node).dim():
            node = self._call(site, "expand", self._call(site, "unsqueeze", node, 0), [heads])
        node = node if example_of(node).dtype == dtype else self._call(site, "to", node, dtype)
        return node if sinks.factor == 1.0 else self._call(site, operator.mul, node, sinks.factor)

    def _offsets(self, mask: MaskPredicate, site: AttentionSite) -> fx.Node:
        """Where the queries of a cache's rows begin; if the host knows it, a graph of Dynamo checks that they fit."""
        home = self._makers.masks(home_of(mask.offset_leaves, self._facts), self._device)
        if home is not self:
            return self._made_in(home, lambda: home._offsets(mask, site))
        offsets = self.position(mask.causal_offset, mask.offset_leaves, site)
        tokens, capacity = (self._input_size(site.shape(tensor)[2]) for tensor in (site.query, site.key))
        offset: sympy.Expr = mask.causal_offset
        wrapped = offset.has(sympy.Mod)  # into the cache, whatever the position
        if "example_value" not in site.node.meta or tokens is None or capacity is None or wrapped:
            return offsets
        if (offsets, tokens, capacity) not in self._checked:
            with self._emitter.graph.inserting_before(offsets.next):
                self._checked[offsets, tokens, capacity] = offsets
                host = self._on_host(offsets, self._numbers[offset], site)
                if host is not None:
                    sizes = [n if isinstance(n, int) else self._size(n, site) for n in (tokens, capacity)]
                    name = self._name_of(site.key_heads.node)
                    checked = self._call(site, CHECKED_POSITIONS, host, *sizes, name)
                    if host is offsets:
                        self._checked[offsets, tokens, capacity] = checked
        return self._checked[offsets, tokens, capacity]

    def _on_host(self, offsets: fx.Node, number: fx.Node | int, site: AttentionSite) -> fx.Node | None:
        """Positions where reading them costs nothing; None if only a device knows them.

        Args:
            offsets: the positions, on the keys' device.
            number: what they were made of.
            site: where they are used.
        """
        if example_of(offsets).device.type == "cpu":
            return offsets
        if isinstance(number, fx.Node) and isinstance(example_of(number), torch.Tensor):
            return number if example_of(number).device.type == "cpu" else None
        return self._call(site, torch.full, [1], number, dtype=torch.int64, device="cpu")

    def _input_size(self, extent: int | torch.SymInt) -> int | sympy.Symbol | None:
        """A size as a number, or as the symbol of a size of the graph's inputs; None if it is neither."""
        expression = size(extent)
        if expression.is_Integer:
            return int(expression)
        return expression if expression in self._facts.size_sources else None

    def _name_of(self, node: fx.Node) -> str:
        """The name of the input that a tensor lives in, or is an updated copy of; its own if there is none."""
        while (write := read_update(node)) is not None and storage(node) != storage(write.target):
            node = write.target
        inputs = (other for other in self._facts.graph.nodes if other.op == "placeholder")
        return next((input_name(other) for other in inputs if storage(other) == storage(node)), node.name)

    def position(self, expression: sympy.Expr, leaves: tuple[Leaf, ...], site: AttentionSite) -> fx.Node:
        """A key number as an int64 tensor ``[1]`` or ``[B]`` on the keys' device, in memory of its own.

        It is made right after the tensors that it is computed from: the graph may write to them before the attention.
        """
        if expression not in self._positions:
            graph, device = self._emitter.graph, site.key.example.device
            placeholders = [node for node in graph.nodes if node.op == "placeholder"]
            nodes = [self._makers.carry(self._facts, facts, node) for _, facts, node in leaves]
            with graph.inserting_before(max([*nodes, *placeholders[-1:]]).next):
                number = self._number(expression, leaves, site)
                if isinstance(number, fx.Node) and isinstance(example_of(number), torch.Tensor):
                    number = self._numbers[expression] = self._call(site, "reshape", number, [-1])
                    if example_of(number).device != device:
                        number = self._call(site, "to", number, device, torch.int64)
                else:
                    self._numbers[expression] = number
                    number = self._call(site, torch.full, [1], number, dtype=torch.int64, device=device)
                self._positions[expression] = number
        return self._positions[expression]

    def _number(self, expression: sympy.Expr, leaves: tuple[Leaf, ...], site: AttentionSite) -> fx.Node | int:
        """An integer expression of sizes and tensors, int64, in memory of its own."""
        found = {name: self._makers.carry(self._facts, facts, node) for name, facts, node in leaves}
        widened = {name: self._call(site, "to", node, torch.int64) for name, node in found.items()}
        batch: Any = site.shape(site.key)[0]
        if BATCH in expression.free_symbols and isinstance(batch, torch.SymInt):
            batch = self._size(size(batch), site)
        value = self._build(expression, widened, site, (batch, None))
        if leaves and storage(value) in {storage(node) for _, _, node in leaves}:
            value = self._call(site, "clone", value)
        return value

    def _test(self, condition: KeyCondition, site: AttentionSite, extents: tuple[Any, Any]) -> fx.Node:
        leaves = {leaf[0]: self._local(leaf, site) for leaf in condition.leaves}
        return self._build(condition.expression, leaves, site, extents)

    def _local(self, leaf: Leaf, site: AttentionSite) -> fx.Node:
        """A tensor on the keys' device: layers on another device than the model's inputs read masks of these."""
        node = self._makers.carry(self._facts, leaf[1], leaf[2])
        device = site.key.example.device
        return node if example_of(node).device == device else self._call(site, "to", node, device)

    def _build(
        self,
        expression: sympy.Basic,
        leaves: Mapping[str, fx.Node],
        site: AttentionSite,
        extents: tuple[Any, Any],
    ) -> fx.Node:
        """An expression of rows, keys, sizes and elements of leaves; see `masks.codegen.build`."""

        def size_of(symbol: sympy.Symbol) -> fx.Node:
            return leaves[symbol.name] if symbol.name in leaves else self._size(symbol, site)

        value: fx.Node = build(
            expression,
            Site(
                call=lambda target, *args, **kwargs: self._call(site, target, *args, **kwargs),
                leaf=lambda name: (leaves[name], tuple(example_of(leaves[name]).shape)),
                size=size_of,
                batch=extents[0],
                length=extents[1],
                extents=(site.shape(site.key)[0], site.shape(site.key)[2]),
                device=site.key.example.device,
            ),
        )
        return value

    def _size(self, symbol: sympy.Symbol, site: AttentionSite) -> fx.Node:
        """A dynamic size, from the graph's inputs."""
        node, dim = self._facts.size_sources[symbol]
        return node if dim is None else self._call(site, "size", node, dim)

    def _segment_bounds(self, segments: Segments, site: AttentionSite) -> fx.Node:
        """Where the sequences of all rows begin: int32 ``[B * Lk + 1]``."""
        wanted = segments, *_rows_and_keys(site)
        if wanted not in self._bounds:
            leaf = segments.leaf
            home = self._home([leaf], [], site)
            if home is self:
                bounds = self._numbered(leaf, site, self._extents(site))
            else:
                bounds = self._made_in(
                    home,
                    lambda: home._at_once(segments, [leaf], site, lambda extents: home._numbered(leaf, site, extents)),
                )
            self._bounds[wanted] = bounds
        return self._bounds[wanted]

    def _numbered(self, numbers: Leaf, site: AttentionSite, extents: tuple[Any, Any]) -> fx.Node:
        ids = self._call(site, "expand", self._local(numbers, site), list(extents))
        return self._call(site, torch.ops.infllm.segment_bounds.default, ids)

    def _extents(self, site: AttentionSite) -> tuple[Any, Any]:
        """Rows and keys, numbers or nodes."""
        key = self._emitter.operand(site.node, site.key_heads, site.query)
        return self._emitter.size(site.node, key, 0), self._emitter.size(site.node, key, 2)

    def _call(self, site: AttentionSite, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._emitter.call(site.node, target, *args, **kwargs)
