"""Running a graph whose new tokens have to fit into a cache: they are checked before the graph writes anything.

The rewriting leaves a check where a position is read. Compilers order operators by the data between them only, and
would run it after the graph has written to its caches. So it is taken out of the graph, with the few operators that
make the position, into a graph of its own that runs first. Where the position is a number, the graph is known not to
fit when it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from infllm_pass.errors import CachePositionError
from infllm_pass.graphs import all_graphs, input_name
from infllm_pass.liveness import pure
from infllm_pass.lowering.positions import checked_positions
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.masks.values import example_of, size, storage
from infllm_pass.slots import written_slots
from infllm_pass.vocabulary import read_update, written_arguments

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
    facts = all_graphs(module)[0].facts
    interpreter = Interpreter(facts)
    owners = {storage(node): node for node in module.graph.nodes if node.op == "placeholder"}
    for node in module.graph.nodes:
        write = read_update(node)
        owner = None if write is None else owners.get(storage(write.target))
        if write is None or owner is None:
            continue
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


def take_checks(module: fx.GraphModule, inputs: int) -> fx.GraphModule | None:
    """Take the checks of positions out of a graph.

    A check of what the graph first has to compute by writing somewhere stays where it is.

    Args:
        module: the graph, changed in place.
        inputs: how many inputs the caller gives; states of caches, see `cached_graph`, come after them.

    Returns:
        A graph of these inputs that runs the checks; None if there are none.
    """
    graph = module.graph
    found = {node: _made_from_inputs(node) for node in graph.nodes if node.target is checked_positions._opoverload}
    taken = {check: makers for check, makers in found.items() if makers is not None}
    if not taken:
        return None
    needed = {node for makers in taken.values() for node in makers}
    needed.update([node for node in graph.nodes if node.op == "placeholder"][:inputs])
    checks = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = checks.node_copy(node, copies.__getitem__)
    checks.output(None)
    for check in taken:
        check.replace_all_uses_with(check.args[0])
        graph.erase_node(check)
    for node in sorted(needed - taken.keys(), reverse=True):
        if node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    module.recompile()
    return fx.GraphModule(module, checks)


def _made_from_inputs(check: fx.Node) -> set[fx.Node] | None:
    """The nodes that make what a check looks at, itself included; None if it cannot run before the graph."""
    made: set[fx.Node] = set()
    pending = [check]
    while pending:
        node = pending.pop()
        if node in made or node.op == "placeholder":
            continue
        if node is not check and not pure(node):
            return None
        made.add(node)
        pending.extend(node.all_input_nodes)
    earlier = (node for node in check.graph.nodes if node < check)
    return None if any(written_arguments(node) for node in earlier) else made
