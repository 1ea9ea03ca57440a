"""The pass itself, stage after stage: sites -> masks -> plan -> length guard -> rewrite -> report."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from torch import fx

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.failures import Strict, refuse
from infllm_pass.graph.decompose import Expansion, expand_composites
from infllm_pass.graph.subgraphs import all_graphs
from infllm_pass.kv_cache.static import CacheInputs
from infllm_pass.masks import HeldTensors
from infllm_pass.plan.length_guard import Branch, LengthGuard, decide_capacity, decide_length
from infllm_pass.plan.planner import SiteFilter, SitePlan, excludes, failed, plan_graph
from infllm_pass.reasons import Reason
from infllm_pass.rewrite.report import GraphReport, SiteReport, describe_site
from infllm_pass.rewrite.rewriter import Outcome, Rewriter
from infllm_pass.sites import AttentionSite


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
    held: HeldTensors | None = None,
    caches: CacheInputs | None = None,
    strict: Strict = False,
) -> GraphReport:
    """Rewrite every attention site of a Dynamo graph, and of the graphs nested in it, in place.

    Args:
        module: the graph as Dynamo hands it to a backend: torch-level calls, before autograd.
        config: what sparse attention selects, and from which length on.
        switch: ALWAYS_DENSE rewrites to attention without mask tensors only.
        filter_fn: sites for which it returns False stay dense.
        number: number of the graph, for the report.
        held: tensors that masks may be read from. Whoever runs the graph has to watch what was read, see `held`.
        caches: takes up the caches whose compressed keys are inputs of the rewritten graph, which whoever runs it has
            to hand over, see `cached_graph`; None: none are.
        strict: what raises, see `failures.refuse`; sites for which `filter_fn` returns False are exempt.

    Returns:
        What was found and done.

    Raises:
        InternalError, DenseSiteError: see `failures.refuse`.
        CarriedError: see `plan.excludes`.
    """
    rows: list[SiteReport] = []

    def decide(plan: SitePlan) -> LengthGuard | None:
        if not plan.switchable or switch is not Switch.BY_LENGTH or not isinstance(plan.site, AttentionSite):
            return None
        if plan.length is None:
            return decide_capacity(plan.site.shape(plan.site.key)[2], config.dense_len)
        return decide_length(plan.length, config.dense_len)

    plans: list[SitePlan] = []
    for plan, guard, outcome in _run(module, config, filter_fn, decide, held, caches):
        rows.append(describe_site(number, len(rows), plan, guard).with_outcome(outcome))
        plans.append(plan)
    report = GraphReport(number, tuple(rows))
    exempt = [strict == "all" and not plan.switchable and _is_excluded(plan, filter_fn) for plan in plans]
    refuse(strict, report, [plan.error for plan in plans], exempt)
    return report


def _is_excluded(plan: SitePlan, filter_fn: SiteFilter | None) -> bool:
    """Whether the user's filter turns a site down, or would if it were provable."""
    if plan.reason is Reason.EXCLUDED:
        return True
    return isinstance(plan.site, AttentionSite) and excludes(filter_fn, plan.site)


def run_on_export(
    module: fx.GraphModule,
    config: SparseAttentionConfig,
    *,
    branch: Branch | None = None,
    filter_fn: SiteFilter | None = None,
) -> GraphReport:
    """Decide about every attention site of an exported graph, and rewrite them for one side of the switch.

    Args:
        module: the graph of a ``torch.export.ExportedProgram``: ATen operators before any decomposition.
        config: what sparse attention selects; its `dense_len` decides nothing here.
        branch: the side that every switchable site is rewritten for; None: decide only, and leave the graph alone.
        filter_fn: sites for which it returns False stay dense.

    Returns:
        What was found and done.

    Raises:
        CarriedError: see `plan.excludes`.
    """
    rows: list[SiteReport] = []
    if branch is None:
        plans = [plan for view in all_graphs(module) for plan in plan_graph(view, filter_fn, config.visited_tokens)]
        rows += [describe_site(0, place, plan, None) for place, plan in enumerate(plans)]
        return GraphReport(0, tuple(rows))
    chosen = LengthGuard(branch, "", False)
    for plan, guard, outcome in _run(module, config, filter_fn, lambda plan: chosen if plan.switchable else None):
        rows.append(describe_site(0, len(rows), plan, guard).with_outcome(outcome))
    return GraphReport(0, tuple(rows))


Decision = tuple[SitePlan, LengthGuard | None, Outcome]


def _run(
    module: fx.GraphModule,
    config: SparseAttentionConfig,
    filter_fn: SiteFilter | None,
    decide: Callable[[SitePlan], LengthGuard | None],
    held: HeldTensors | None = None,
    caches: CacheInputs | None = None,
) -> list[Decision]:
    """Find, plan, decide and rewrite, site by site; a site at which that fails stays as it was."""
    done: list[Decision] = []
    expansions = expand_composites(module)
    calls = {expansion.call for expansion in expansions}
    used: set[Expansion] = set()
    for view in all_graphs(module, held):
        rewriter = Rewriter(view.facts, config, caches if view.module is module else None)
        for plan in plan_graph(view, filter_fn, config.visited_tokens):
            if plan.site.node in calls:
                continue
            within = next((expansion for expansion in expansions if plan.site.node in expansion.nodes), None)
            guard, outcome = None, Outcome()
            try:
                guard = decide(plan)
                outcome = rewriter.rewrite(plan, guard.branch if guard is not None else Branch.DENSE)
            except Exception as error:
                plan, guard = failed(plan.site, error), None
            if within is not None and outcome.rewritten:
                used.add(within)
            done.append((plan, guard, outcome))
        if done:
            view.module.graph.lint()
    if caches is not None:
        caches.drop_unused(module.graph)
    for expansion in expansions:
        if expansion in used:
            expansion.accept()
        else:
            expansion.withdraw()
    if done or expansions:
        for view in all_graphs(module):
            view.module.recompile()
    return done
