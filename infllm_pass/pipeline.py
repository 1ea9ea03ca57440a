"""The pass itself, stage after stage: sites -> masks -> plan -> length guard -> rewrite -> report."""

from __future__ import annotations

from enum import Enum

from torch import fx

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.graphs import all_graphs
from infllm_pass.guard import Branch, decide_length
from infllm_pass.plan import SiteFilter, plan_graph
from infllm_pass.report import GraphReport, SiteReport, describe_site
from infllm_pass.rewrite import Rewriter


class Switch(Enum):
    """How the sides of the dense/sparse switch are chosen."""

    BY_LENGTH = "by length"
    ALWAYS_DENSE = "always dense"


def run_pass(
    module: fx.GraphModule,
    config: SparseAttentionConfig,
    *,
    switch: Switch = Switch.BY_LENGTH,
    filter_fn: SiteFilter | None = None,
    number: int = 0,
) -> GraphReport:
    """Rewrite every attention site of a Dynamo graph, and of the graphs nested in it, in place.

    Args:
        module: the graph as Dynamo hands it to a backend: torch-level calls, before autograd.
        config: what sparse attention selects, and from which length on.
        switch: ALWAYS_DENSE rewrites to attention without mask tensors only.
        filter_fn: sites for which it returns False stay dense.
        number: number of the graph, for the report.

    Returns:
        What was found and done.
    """
    rows: list[SiteReport] = []
    for view in all_graphs(module):
        rewriter = Rewriter(view.module.graph, config)
        for plan in plan_graph(view, filter_fn, config.visited_tokens):
            guard = None
            if plan.switchable and switch is Switch.BY_LENGTH:
                guard = decide_length(plan.site.shape(plan.site.key)[2], config.dense_len)
            row = describe_site(number, len(rows), plan, guard)
            outcome = rewriter.rewrite(plan, guard.branch if guard is not None else Branch.DENSE)
            rows.append(row.with_outcome(outcome))
        if rows:
            view.module.graph.lint()
            view.module.recompile()
    return GraphReport(number, tuple(rows))
