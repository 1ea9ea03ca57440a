"""Rewriting planned sites in place: each becomes what the first target that accepts it emits.

Invariants: the graph computes what it did (up to the method's own approximation on the sparse side); every
emitted node is of the graph's dialect and carries the example value and the source location of the site it replaces;
a node is erased only if it is known to be pure and nothing uses it any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from infllm_pass.emit.mask_operands import OperandMakers
from infllm_pass.graph.dce import erase_unused
from infllm_pass.graph.facts import GraphFacts, example_of
from infllm_pass.kv_cache.inputs import CacheInputs, CacheSpec, cache_of
from infllm_pass.plan.length_guard import Branch
from infllm_pass.plan.site_plan import Lowering, SitePlan
from infllm_pass.rewrite.outcome import CacheUse, Outcome
from infllm_pass.rewrite.targets import DEFAULT_TARGETS, Refusal, Request, SiteBuilder, Target
from infllm_pass.sites import AttentionSite


class Rewriter:
    """Rewrites the sites of one graph.

    Args:
        facts: what is known of the graph.
        caches: takes up the caches whose state the graph is to keep; None: it keeps none.
        targets: what sites can become; the first that accepts one computes it.
        makers: what makes operands, for the graphs that are nested in one another; None: there is this one only.
    """

    def __init__(
        self,
        facts: GraphFacts,
        caches: CacheInputs | None = None,
        targets: Sequence[Target] = DEFAULT_TARGETS,
        makers: OperandMakers | None = None,
    ) -> None:
        self.graph = facts.graph
        self.targets = targets
        self._facts = facts
        self._makers = OperandMakers() if makers is None else makers
        self._emitter = self._makers.emitter(facts)
        self._caches = caches

    def admit(self, plan: SitePlan) -> SitePlan:
        """The plan of a site, dense if every target refuses what it could become, one of them for a reason.

        Asked before lengths are compared, so that no guard is added for a site that stays dense.
        """
        site, lowering = plan.site, plan.lowering(Branch.SPARSE)
        if lowering is Lowering.UNCHANGED or not isinstance(site, AttentionSite):
            return plan
        request = Request(site, plan, lowering)
        refusals = [target.accepts(request) for target in self.targets]
        reasons = [refusal for refusal in refusals if refusal is not None and refusal.reason is not None]
        if None in refusals or not reasons or reasons[0].reason is None:
            return plan
        return SitePlan(site, reasons[0].reason, reasons[0].detail)

    def rewrite(self, plan: SitePlan, branch: Branch) -> Outcome:
        """Rewrite one site for one side of the length switch.

        Args:
            plan: the site's plan.
            branch: the side that this graph is compiled for.

        Returns:
            What became of it.
        """
        site, lowering = plan.site, plan.lowering(branch)
        if lowering is Lowering.UNCHANGED or not isinstance(site, AttentionSite):
            return Outcome()
        request = Request(site, plan, lowering)
        refusals: dict[str, str] = {}
        for target in self.targets:
            found = self._cache_for(target, request)
            if not isinstance(found, Refusal):
                return self._replace(target, request, found, refusals)
            refusals[target.name] = found.detail
        return Outcome(refusals=refusals)

    def _cache_for(self, target: Target, request: Request) -> CacheSpec | Refusal | None:
        """The cache whose state a target keeps at a site, None if it keeps none; or why it does not take the site."""
        layout = target.state(request)
        if layout is not None and self._caches is None:
            return Refusal("nothing outlives a call of an exported or nested graph")
        refusal = target.accepts(request)
        if refusal is not None or layout is None:
            return refusal
        spec = cache_of(request.plan, request.site, self._facts, layout)
        return Refusal(spec) if isinstance(spec, str) else spec

    def _replace(self, target: Target, request: Request, cache: CacheSpec | None, refusals: dict[str, str]) -> Outcome:
        """Put what a target emits in the place of a site."""
        site = request.site
        kernels = target.kernels(request)
        try:
            result = self._emit(target, request, cache)
        except Exception:
            self._makers.undo(self._facts)
            raise
        self._emitter.keep({site.node: result})
        site.node.replace_all_uses_with(result)
        erase_unused(self.graph, site.node)
        outcome = Outcome(True, kernels.name, kernels.refusal, target=target.name, refusals=refusals)
        return self._with_cache_use(outcome, request, cache)

    def _emit(self, target: Target, request: Request, cache: CacheSpec | None) -> fx.Node:
        """Emit what replaces a site, in its layout and dtype."""
        site = request.site
        with self.graph.inserting_before(site.node):
            state = None
            if cache is not None and self._caches is not None:
                state = self._caches.state(cache, site, self.graph)
            masks = self._makers.masks(self._facts, site.key.example.device)
            builder = SiteBuilder(request.plan, site, self._facts, self._emitter, masks, state)
            result = target.emit(request, builder)
            result = self._emitter.layout(site.node, result, site.output_steps)
            if example_of(result).dtype != example_of(site.node).dtype:
                result = builder.call("to", result, example_of(site.node).dtype)
            return self._emitter.strided_as(site.node, result)

    def _with_cache_use(self, outcome: Outcome, request: Request, cache: CacheSpec | None) -> Outcome:
        """The outcome with what becomes of a cache's state: where it is not kept, why the targets before did not."""
        if cache is not None:
            return replace(outcome, cache_state=CacheUse.CARRIED.value)
        over_cache = request.plan.in_cache or request.site.growth is not None
        if request.lowering is not Lowering.SPARSE or not over_cache:
            return outcome
        keeping = (target.name for target in self.targets if target.state(request) is not None)
        detail = next((outcome.refusals[name] for name in keeping if name in outcome.refusals), "")
        return replace(outcome, cache_state=CacheUse.RECOMPUTED.value, cache_detail=detail)
