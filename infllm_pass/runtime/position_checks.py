"""Position checks: tests that new tokens fit into a cache, hoisted into a graph that runs before any write.

The rewriting leaves a check where a position is read. Compilers order operators by the data between them only, and
would run it after the graph has written to its caches. So it is taken out of the graph, with the few operators that
make the position, into a graph of its own that runs first. A graph without such checks, as where attention stays dense,
gets checks of the slots that it writes to. Where the position is a number, the graph is known not to fit when it is
compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from infllm_pass.errors import CachePositionError
from infllm_pass.graph.dce import pure
from infllm_pass.graph.facts import example_of, size, storage
from infllm_pass.graph.op_table import Write, read_update, written_arguments
from infllm_pass.graph.subgraphs import all_graphs, input_name
from infllm_pass.lowering.ops.positions import CHECKED_POSITIONS
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.plan.cache_writes import written_slots

Misfit = tuple[str, int, int, int, int]
"""Cache, row, first slot, tokens, capacity: see `CachePositionError`."""


class CheckedGraph:
    """Calls a compiled graph once its new tokens are known to fit into its caches.

    Args:
        compiled: the compiled graph.
        checks: takes the same inputs, and raises if they do not fit.
    """

    def __init__(self, compiled: Callable[..., Any], checks: Callable[..., Any]) -> None:
        self.compiled = compiled
        self.checks = checks

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph; the outputs are its own.

        Raises:
            CachePositionError: a row's new tokens do not fit into a cache; nothing was written.
        """
        self.checks(*inputs)
        return self.compiled(*inputs)


class RefusedGraph:
    """Stands for a graph of which no call fits.

    Args:
        misfit: the arguments of the error.
    """

    def __init__(self, misfit: Misfit) -> None:
        self.misfit = misfit

    def __call__(self, *_inputs: Any) -> Any:
        """Refuse.

        Raises:
            CachePositionError: always; nothing was written.
        """
        raise CachePositionError(*self.misfit)


def misfit_of(module: fx.GraphModule) -> Misfit | None:
    """What a graph writes past the last slot of one of its inputs whatever these hold; None if nothing is known to.

    Args:
        module: the graph. Slices, which end where the tensor does, never go past it.
    """
    updates = list(_updates(module.graph))
    if not updates:
        return None
    interpreter = Interpreter(all_graphs(module)[0].facts)
    for _, write, owner in updates:
        shape = example_of(write.target).shape
        for extent, place in zip(shape, write.entries, strict=False):
            found = written_slots(interpreter, place, shape[0]) if isinstance(place, fx.Node) else None
            numbers = None if found is None else (found[0], found[1], size(extent))
            if numbers is None or not all(number is not None and number.is_Integer for number in numbers):
                continue
            first, tokens, capacity = (int(number) for number in numbers if number is not None)
            if first >= 0 and first + tokens > capacity:
                return input_name(owner), 0, first, tokens, capacity
    return None


def _updates(graph: fx.Graph) -> Iterator[tuple[fx.Node, Write, fx.Node]]:
    """The nodes that write to an input, or copy one with some elements replaced: what they write, and the input."""
    owners = {storage(node): node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        write = read_update(node)
        owner = None if write is None else owners.get(storage(write.target))
        if write is not None and owner is not None:
            yield node, write, owner


def take_checks(module: fx.GraphModule, inputs: int) -> fx.GraphModule | None:
    """Take the checks of positions out of a graph; one that has none gets a check of the slots that it writes to.

    What the graph first has to compute by writing somewhere is not checked before it runs.

    Args:
        module: the graph, changed in place.
        inputs: how many inputs the caller gives; states of caches, see `cached_graph`, come after them.

    Returns:
        A graph of these inputs that runs the checks; None if there are none.
    """
    graph = module.graph
    found = {node: _made_from_inputs(node) for node in graph.nodes if node.target is CHECKED_POSITIONS}
    taken = {check: makers for check, makers in found.items() if makers is not None}
    needed = {node for makers in taken.values() for node in makers}
    writes = [] if taken else list(_checkable_writes(graph))
    needed.update(node for write in writes for node in write.makers)
    if not needed and not writes:
        return None
    needed.update([node for node in graph.nodes if node.op == "placeholder"][:inputs])
    checks = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = checks.node_copy(node, copies.__getitem__)
    for write in writes:
        tensors = copies[write.index], copies[write.target]
        checks.call_function(check_slots, (*tensors, write.dim, write.wraps, write.cache))
    checks.output(None)
    for check in taken:
        check.replace_all_uses_with(check.args[0])
        graph.erase_node(check)
    for node in sorted(needed - taken.keys(), reverse=True):
        if taken and node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    module.recompile()
    return fx.GraphModule(module, checks)


@dataclass(frozen=True)
class _CheckableWrite:
    """A write to a cache at slots that can be computed before the graph runs.

    Attributes:
        index: the slots.
        target: the cache.
        dim: the dimension of its slots.
        wraps: whether negative slots count from the end.
        cache: what the caller knows the cache by.
        makers: the nodes that make the index and the target from inputs.
    """

    index: fx.Node
    target: fx.Node
    dim: int
    wraps: bool
    cache: str
    makers: frozenset[fx.Node]


def _checkable_writes(graph: fx.Graph) -> Iterator[_CheckableWrite]:
    """The writes to inputs at slots that the host knows before the graph runs, the same slots once."""
    seen = set()
    for node, write, owner in _updates(graph):
        if example_of(owner).dim() < 4:
            continue
        makers = _made_from_inputs(write.target)
        for dim, place in enumerate(write.entries):
            index = example_of(place) if isinstance(place, fx.Node) else None
            if makers is None or not isinstance(index, torch.Tensor):
                continue
            capacity = size(example_of(write.target).shape[dim])
            if index.device.type != "cpu" or index.dtype not in _SLOTS or (place, capacity) in seen:
                continue
            made = _made_from_inputs(place)
            if made is not None:
                seen.add((place, capacity))
                wraps = not any(name in str(node.target) for name in ("index_copy", "scatter"))
                yield _CheckableWrite(place, write.target, dim, wraps, input_name(owner), frozenset(makers | made))


_SLOTS = (torch.int64, torch.int32)


def check_slots(index: torch.Tensor, cache: torch.Tensor, dim: int, wraps: bool, name: str) -> None:
    """Refuse slots that a cache does not have.

    Args:
        index: integers on the CPU.
        cache: the tensor that is written.
        dim: the dimension of its slots.
        wraps: whether negative slots count from the end.
        name: what the caller knows the cache by.

    Raises:
        CachePositionError: a slot is outside.
    """
    if index.numel() == 0:
        return
    capacity = cache.shape[dim]
    first, last = (int(bound) for bound in index.aminmax())
    if first < (-capacity if wraps else 0) or last >= capacity:
        raise CachePositionError(name, 0, first, last - first + 1, capacity)


def _made_from_inputs(made: fx.Node) -> set[fx.Node] | None:
    """The nodes that make a value, its own included; None if they cannot run before the graph."""
    found: set[fx.Node] = set()
    pending = [made]
    while pending:
        node = pending.pop()
        if node in found or node.op == "placeholder":
            continue
        if node.target is not CHECKED_POSITIONS and not pure(node):
            return None
        found.add(node)
        pending.extend(node.all_input_nodes)
    last = max(found, default=None)
    earlier = (node for node in made.graph.nodes if last is not None and node < last)
    return None if any(written_arguments(node) for node in earlier) else found
