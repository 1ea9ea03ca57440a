"""The pass: finds sites, proves masks, plans, evaluates the length guard, rewrites and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor, fx

from infllm_pass.config import SparseAttentionConfig
from infllm_pass.emit.mask_operands import OperandMakers
from infllm_pass.graph.decompose import Expansion, expand_composites
from infllm_pass.graph.facts import GraphFacts
from infllm_pass.graph.subgraphs import GraphView, all_graphs, regions_of
from infllm_pass.kv_cache.inputs import CacheInputs
from infllm_pass.masks import HeldTensors
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.plan.length_guard import Branch, LengthGuard, decide_capacity, decide_length
from infllm_pass.plan.planner import failed, plan_graph
from infllm_pass.plan.site_config import SiteConfig, configured
from infllm_pass.plan.site_plan import SitePlan
from infllm_pass.reasons import Reason
from infllm_pass.rewrite.failures import Strict, refuse
from infllm_pass.rewrite.outcome import Outcome
from infllm_pass.rewrite.report import GraphReport, describe_site
from infllm_pass.rewrite.reproducer import Reproducer, recorded
from infllm_pass.rewrite.reproducer_script import Failure
from infllm_pass.rewrite.rewriter import Rewriter
from infllm_pass.rewrite.targets import DEFAULT_TARGETS, Target
from infllm_pass.rewrite.trace import PassTrace
from infllm_pass.sites import AttentionSite
from infllm_pass.stages import Stage, stage


class Switch(Enum):
    """How the sides of the dense/sparse switch are chosen."""

    BY_LENGTH = "by length"
    ALWAYS_DENSE = "always dense"


@dataclass(frozen=True)
class SitePolicy:
    """What is to become of the attention sites of a model.

    Attributes:
        config: what sparse attention selects, and from which length on.
        site_config: the configuration of each site, see `plan.site_config.configured`; None: `config`.
        targets: what sites can become; the first that accepts one computes it.
        strict: what raises, see `failures.refuse`; sites that `site_config` leaves dense are exempt.
    """

    config: SparseAttentionConfig
    site_config: SiteConfig | None = None
    targets: Sequence[Target] = DEFAULT_TARGETS
    strict: Strict = False


def run_pass(
    module: fx.GraphModule,
    policy: SitePolicy | SparseAttentionConfig,
    *,
    switch: Switch = Switch.BY_LENGTH,
    number: int = 0,
    held: HeldTensors | None = None,
    caches: CacheInputs | None = None,
    trace: PassTrace | None = None,
) -> GraphReport:
    """Rewrite every attention site of a Dynamo graph, and of the graphs nested in it, in place.

    Args:
        module: the graph as Dynamo hands it to a backend: torch-level calls, before autograd.
        policy: what is to become of its sites; a configuration is that of every site.
        switch: ALWAYS_DENSE rewrites to attention without mask tensors only.
        number: number of the graph, for the report.
        held: tensors that masks may be read from. Whoever runs the graph has to watch what was read, see
            `runtime.buffer_guards`.
        caches: takes up the caches whose state is an input of the rewritten graph, which whoever runs it has to hand
            over, see `kv_cache.store`; None: none are.
        trace: follows the graph on to the compiler behind; None: nothing comes behind.

    Returns:
        What was found and done.

    Raises:
        InternalError, DenseSiteError: see `failures.refuse`.
        CarriedError: see `plan.site_config.configured`.
    """

    def decide(plan: SitePlan) -> LengthGuard | None:
        if switch is not Switch.BY_LENGTH or plan.config is None or not isinstance(plan.site, AttentionSite):
            return None
        if plan.length is None:
            return decide_capacity(plan.site.shape(plan.site.key)[2], plan.config.switch_length)
        return decide_length(plan.length, plan.config.switch_length)

    policy = policy if isinstance(policy, SitePolicy) else SitePolicy(policy)
    following = PassTrace(number) if trace is None else trace
    reproducer = recorded(module, held)
    with following.run(module):
        decisions = _run(module, policy, decide, held, caches)
    report = _report(number, decisions, policy, following)
    if reproducer is not None:
        report = _reproduced(report, decisions, reproducer, policy.config, switch)
    if trace is None:
        following.finish(report)
    plans = [plan for plan, _, _ in decisions]
    exempt = [policy.strict == "all" and not plan.switchable and _is_excluded(plan, policy) for plan in plans]
    refuse(policy.strict, report, [plan.error for plan in plans], exempt)
    return report


def _reproduced(
    report: GraphReport,
    decisions: Sequence[Decision],
    reproducer: Reproducer,
    config: SparseAttentionConfig,
    switch: Switch,
) -> GraphReport:
    """The report with the scripts that reproduce the failures of the pass, which are written."""
    rows = []
    for row, (plan, _, _) in zip(report.sites, decisions, strict=True):
        if plan.error is not None:
            place = f"site {row.site} {row.module or row.source}".rstrip()
            failure = Failure(report.graph, row.site, plan.site.node, place, plan.error)
            row = replace(row, reproducer=reproducer.write(failure, plan.config or config, switch.value))
        rows.append(row)
    return replace(report, sites=tuple(rows))


def _is_excluded(plan: SitePlan, policy: SitePolicy) -> bool:
    """Whether the user wants a site dense, or would if it were provable."""
    if plan.reason is Reason.EXCLUDED:
        return True
    return isinstance(plan.site, AttentionSite) and configured(policy.site_config, plan.site, policy.config) is None


def run_on_export(
    module: fx.GraphModule,
    policy: SitePolicy | SparseAttentionConfig,
    *,
    branch: Branch | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> GraphReport:
    """Decide about every attention site of an exported graph, and rewrite them for one side of the switch.

    Args:
        module: the graph of a ``torch.export.ExportedProgram``: ATen operators before any decomposition.
        policy: what is to become of its sites; `dense_len` decides nothing here.
        branch: the side that every switchable site is rewritten for; None: decide only, and leave the graph alone.
        values: tensors that the program holds, by the names of their placeholders; only the channels that token scores
            read may depend on them.

    Returns:
        What was found and done.

    Raises:
        CarriedError: see `plan.site_config.configured`.
    """
    policy = policy if isinstance(policy, SitePolicy) else SitePolicy(policy)
    trace = PassTrace(0)
    given = values or {}
    held = HeldTensors({}, looked_at={node: given[node.name] for node in module.graph.nodes if node.name in given})
    with trace.run(module):
        if branch is None:
            expansions = expand_composites(module)
            calls = {expansion.call for expansion in expansions}
            decisions: list[Decision] = []
            for view in all_graphs(module, held):
                rewriter = Rewriter(view.facts, targets=policy.targets)
                plans = plan_graph(view, policy.config, policy.site_config)
                decisions += [(rewriter.admit(plan), None, Outcome()) for plan in plans if plan.site.node not in calls]
            for expansion in expansions:
                expansion.withdraw()
        else:
            chosen = LengthGuard(branch, "", False)
            decisions = _run(module, policy, lambda _plan: chosen, held)
    report = _report(0, decisions, policy, trace)
    trace.finish(report)
    return report


Decision = tuple[SitePlan, LengthGuard | None, Outcome]


def _report(number: int, decisions: Sequence[Decision], policy: SitePolicy, trace: PassTrace) -> GraphReport:
    """The report of a graph, whose numbers are counted."""
    rows = [
        describe_site(number, place, plan, guard, outcome, policy.config)
        for place, (plan, guard, outcome) in enumerate(decisions)
    ]
    report = GraphReport(number, tuple(rows), trace.times.seconds)
    had_mask = [isinstance(plan.site, AttentionSite) and bool(plan.site.masks) for plan, _, _ in decisions]
    trace.count(report, [outcome.rewritten and had for (_, _, outcome), had in zip(decisions, had_mask, strict=True)])
    return report


def _run(
    module: fx.GraphModule,
    policy: SitePolicy,
    decide: Callable[[SitePlan], LengthGuard | None],
    held: HeldTensors | None = None,
    caches: CacheInputs | None = None,
) -> list[Decision]:
    """Find, plan, decide and rewrite, site by site; a site at which that fails stays as it was.

    Args:
        module: the graph.
        policy: what is to become of its sites.
        decide: chooses the side of a switchable site.
        held: see `run_pass`, as for `caches`.
        caches: see there.
    """
    done: list[Decision] = []
    with stage(Stage.DECOMPOSE):
        expansions = expand_composites(module)
    calls = {expansion.call for expansion in expansions}
    used: set[Expansion] = set()
    views = all_graphs(module, held)
    regions = regions_of(views)
    makers = OperandMakers(regions)
    interpreters: dict[GraphFacts, Interpreter] = {}
    for view in views:
        rewriter = Rewriter(view.facts, caches if view.module is module else None, policy.targets, makers)
        for plan in plan_graph(view, policy.config, policy.site_config, interpreters):
            if plan.site.node in calls:
                continue
            within = next((expansion for expansion in expansions if plan.site.node in expansion.nodes), None)
            guard, outcome = None, Outcome()
            try:
                with stage(Stage.PLAN):
                    plan = rewriter.admit(plan)
                    guard = decide(plan) if plan.switchable else None
                with stage(Stage.REWRITE):
                    outcome = rewriter.rewrite(plan, guard.branch if guard is not None else Branch.DENSE)
            except Exception as error:
                plan, guard = failed(plan.site, error), None
            if within is not None and outcome.rewritten:
                used.add(within)
            done.append((plan, guard, outcome))
        if done:
            with stage(Stage.REWRITE):
                view.module.graph.lint()
    if held is not None:
        held.inputs.keep({name for plan, _, outcome in done if outcome.rewritten for name in plan.mask_inputs})
    with stage(Stage.REWRITE):
        _tidy(views, expansions, used, caches, changed=bool(done or expansions))
    return done


def _tidy(
    views: Sequence[GraphView],
    expansions: Sequence[Expansion],
    used: set[Expansion],
    caches: CacheInputs | None,
    *,
    changed: bool,
) -> None:
    """Take back what no site came to need, and make the code of the graphs anew if they changed."""
    if caches is not None:
        caches.drop_unused(views[0].module.graph)
    for expansion in expansions:
        if expansion in used:
            expansion.accept()
        else:
            expansion.withdraw()
    if changed:
        for region in dict.fromkeys(view.region for view in reversed(views)):  # inner ones first
            if region is not None:
                region.drop_unread()
        for view in views:
            view.module.recompile()
