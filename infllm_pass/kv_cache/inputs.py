"""Cache state as inputs of the graph that reads it.

A graph of a few queries over a cache calls the decode operator, which keeps state, the compressed keys, from step to
step. It comes as inputs that the pass adds to the graph, a set for each cache; who calls the graph hands them over, see
`store.CachedGraph`.
"""

from __future__ import annotations

import torch
from torch import fx

from infllm_pass.compat.dynamo import add_static_input
from infllm_pass.graph.facts import GraphFacts, example_of
from infllm_pass.graph.subgraphs import fake_mode_of
from infllm_pass.kv_cache.dynamic import DynamicCacheSpec
from infllm_pass.kv_cache.spec import StateLayout, StateNodes
from infllm_pass.kv_cache.static import StaticCacheSpec
from infllm_pass.plan.site_plan import SitePlan
from infllm_pass.sites import AttentionSite

CacheSpec = StaticCacheSpec | DynamicCacheSpec


class CacheInputs:
    """The states that a graph needs, added to it as inputs."""

    def __init__(self) -> None:
        self.specs: dict[CacheSpec, StateNodes] = {}

    @property
    def examples(self) -> list[torch.Tensor]:
        """Fake tensors for the added inputs, in their order."""
        return [example_of(node) for state in self.specs.values() for node in state.nodes]

    def drop_unused(self, graph: fx.Graph) -> None:
        """Take back the inputs of sites that were not rewritten after all."""
        for spec, state in list(self.specs.items()):
            if not any(node.users for node in state.nodes):
                for node in state.nodes:
                    graph.erase_node(node)
                del self.specs[spec]

    def state(self, spec: CacheSpec, site: AttentionSite, graph: fx.Graph) -> StateNodes:
        """The inputs with a cache's state, added to the graph unless they are there."""
        if spec not in self.specs:
            keys = site.key_heads.example
            with fake_mode_of(site.key_heads.node) or torch.no_grad():
                described = spec.layout(keys.shape, keys.dtype)
                values = spec.examples(keys)
                counts = [torch.empty(keys.shape[0], dtype=torch.int32, device=keys.device) for _ in range(2)]
            cache = f"cache{len(self.specs)}"
            tensors = tuple(
                _add_input(graph, f"{cache}_{tensor.name}", value)
                for tensor, value in zip(described, values, strict=True)
            )
            filled, first = (
                _add_input(graph, f"{cache}_{name}", value)
                for name, value in zip(("filled", "first"), counts, strict=True)
            )
            self.specs[spec] = StateNodes(tensors, filled, first)
        return self.specs[spec]


def cache_of(plan: SitePlan, site: AttentionSite, facts: GraphFacts, layout: StateLayout) -> CacheSpec | str:
    """The cache that a site decodes from; a text says why no state of it can outlive the call.

    Where a size that matters is dynamic, deciding guards on it.

    Args:
        plan: the site's plan.
        site: the site.
        facts: what is known of the graph.
        layout: the tensors to keep.
    """
    if not plan.switchable:
        return "the site stays dense"
    if any(example_of(operand.node).requires_grad for operand in (site.query, site.key_heads, site.value_heads)):
        return "gradients are asked for"
    if site.key_heads.example.dtype != site.dtype:
        return f"its keys are converted to {site.dtype}"
    padded = plan.mask is not None and bool(plan.mask.key_terms.mask)
    if plan.in_cache:
        return StaticCacheSpec.of(site, facts, layout, padded=padded)
    return DynamicCacheSpec.of(site, plan.mask, facts, layout, padded=padded)


def may_read_a_cache(graph: fx.Graph) -> bool:
    """Whether an input of a graph may be a cache of keys: a tensor of at least four dimensions."""
    inputs = (example_of(node) for node in graph.nodes if node.op == "placeholder")
    return any(isinstance(example, torch.Tensor) and example.dim() >= 4 for example in inputs)


def _add_input(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    """Append an input whose address does not change, so that writing to it keeps CUDA graphs possible."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        node = graph.placeholder(name)
    add_static_input(node, example)
    return node
