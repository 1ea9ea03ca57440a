"""Activation checkpointing: what the backward pass finds saved of the operators that the pass put into a graph.

A checkpointed layer keeps its input alone, and the backward pass computes the layer again, with it selection and sparse
attention. The lists of a selection are saved instead where the configuration asks for that, and the attention's output
and log-sum-exp; their nodes are marked when they are emitted.
"""

from __future__ import annotations

from torch import fx

from infllm_pass.compat.checkpointing import checkpointed_bodies, save_results, traces_writes
from infllm_pass.graph.facts import overwritten_storages

_SAVED = "infllm_saved"


def mark_saved(node: fx.Node) -> None:
    """Save what a node computes, where checkpointing would compute it again."""
    node.meta[_SAVED] = True


def save_marked(root: fx.GraphModule) -> None:
    """Save the results of marked nodes in all checkpointed bodies of a graph.

    Bodies that write in place are left alone where PyTorch does not trace them with a ``context_fn``.
    """
    for body in checkpointed_bodies(root):
        graphs = [module.graph for module in body.modules() if isinstance(module, fx.GraphModule)]
        operators = frozenset(node.target for graph in graphs for node in graph.nodes if _SAVED in node.meta)
        if operators and (traces_writes() or not overwritten_storages(body.graph, graphs[1:])):
            save_results(body, operators)
