"""The planner: decides for each site whether it may be rewritten and to what, with a reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import sympy
import torch

from infllm_pass.compat.shapes import GuardOnDataDependentSymNode
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CarriedError, ConfigError, TuningError
from infllm_pass.graph.facts import GraphFacts, same, size
from infllm_pass.graph.op_table import scatters
from infllm_pass.graph.subgraphs import GraphView, input_name
from infllm_pass.lowering.ops.checks import DTYPES, MAX_HEAD_DIM
from infllm_pass.masks import (
    BATCH,
    Leaf,
    MaskPredicate,
    MaskRole,
    UnprovenMask,
    home_of,
    prove_terms,
    readable,
    without_shift,
)
from infllm_pass.masks.codegen import is_expressible
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.plan.break_even import AttentionPlace, break_even, device_name
from infllm_pass.plan.cache_writes import writes_slots
from infllm_pass.plan.length_guard import decided
from infllm_pass.plan.score_channels import ScoreChannels, checked_sets, from_rotary
from infllm_pass.plan.site_config import Configured, SiteConfig, configured
from infllm_pass.plan.site_plan import SitePlan, lengths_of
from infllm_pass.reasons import Reason
from infllm_pass.sites import AttentionSite, PartialSite, find_sites
from infllm_pass.sites.layouts import Layouts
from infllm_pass.sites.rotary import RotaryReader
from infllm_pass.sites.scalars import read_number
from infllm_pass.stages import Stage, each_in, stage

logger = logging.getLogger("infllm_pass")


def plan_graph(
    view: GraphView,
    config: SparseAttentionConfig,
    site_config: SiteConfig | None = None,
    interpreters: dict[GraphFacts, Interpreter] | None = None,
) -> list[SitePlan]:
    """A plan for every attention site of a graph, in order.

    Args:
        view: the graph.
        config: what sites are configured with by default.
        site_config: the configuration of each site, see `site_config.configured`; None: the default.
        interpreters: those of the graphs around this one, which is added to them; None: there are none yet.

    Raises:
        CarriedError: see `site_config.configured`.
    """
    interpreter = Interpreter(view.facts, outer=interpreters)
    layouts = Layouts(view.facts)
    rotary = RotaryReader(layouts)
    plans = []
    sites = list(each_in(Stage.FIND, find_sites(view.facts, layouts)))
    for site in sites:
        rewritable = view.rewritable and not view.facts.transform_of(site.node)
        if isinstance(site, AttentionSite) and rewritable and _may_be_causal(site):
            with suppress(Exception):  # raised again where the site is planned, and reported there
                _join_sizes(site)
    for site in sites:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("site at node %s (%s)", site.node.name, site.source_line)
        if view.facts.transform_of(site.node):
            plans.append(SitePlan(site, Reason.FUNCTION_TRANSFORM, f"inside {view.facts.transform_of(site.node)}"))
        elif isinstance(site, PartialSite):
            plans.append(SitePlan(site, site.reason, site.detail, error=site.error))
        elif not view.rewritable:
            plans.append(SitePlan(site, Reason.NESTED_GRAPH, f"inside {view.caller}"))
        else:
            try:
                with stage(Stage.PLAN):
                    plan = _configure(_plan_site(site, interpreter), config, site_config, rotary)
                plans.append(plan)
            except Exception as error:
                plans.append(failed(site, error))
    return plans


def failed(site: AttentionSite | PartialSite, error: Exception) -> SitePlan:
    """The plan of a site at which the pass failed, by itself or for a size that data decides: it stays as it was."""
    if isinstance(error, GuardOnDataDependentSymNode):
        unknown = f"whether {error.cond}" if isinstance(error.cond, sympy.Rel) else f"what {error.cond} is"
        return SitePlan(site, Reason.DATA_DEPENDENT_SIZE, f"it is not known {unknown}")
    return SitePlan(site, Reason.INTERNAL, f"{type(error).__name__}: {error}", error=error)


def _configure(
    plan: SitePlan, config: SparseAttentionConfig, site_config: SiteConfig | None, rotary: RotaryReader
) -> SitePlan:
    """The plan with the site's configuration, which may leave it dense."""
    site = plan.site
    if not plan.switchable or not isinstance(site, AttentionSite):
        return plan
    chosen = configured(site_config, site, config)
    if chosen is None:
        return replace(plan, reason=Reason.EXCLUDED)
    try:
        return _chosen(plan, site, chosen, rotary)
    except (ConfigError, TuningError) as error:
        raise CarriedError(error) from error


def _chosen(plan: SitePlan, site: AttentionSite, chosen: Configured, rotary: RotaryReader) -> SitePlan:
    """The plan of a switchable site with its configuration, numbers in the place of what a device or graph decides.

    Raises:
        ConfigError: the configured channels do not fit the site.
        TuningError: the user's file of break-even lengths is damaged.
    """
    config, origin = chosen.config, ""
    window = None if plan.mask is None else plan.mask.window
    within = window is not None and int(window) <= config.visited_tokens
    head_dim = int(site.shape(site.key_heads)[3])
    channels = _score_channels(site, chosen, head_dim, rotary) if config.scorer == "tokens" and not within else None
    if config.dense_len == "auto":
        found = break_even(config, _place(site, head_dim, channels))
        config, origin = config.with_dense_len(found.length), found.origin
    plan = replace(plan, config=config, dense_len_origin=origin)
    if within:
        seen = f"the window is {window} keys, and {config.visited_tokens} are visited"
        return replace(plan, reason=Reason.WINDOW_WITHIN_BUDGET, detail=seen, config=replace(config, agnostic_topk=0))
    if config.agnostic_topk:
        if "key_bias" not in plan.terms:
            return replace(plan, reason=Reason.NO_KEY_BIAS, detail=f"agnostic_topk={config.agnostic_topk}")
        shares = f"{config.agnostic_topk} of {config.selected_blocks} blocks by the keys' bias"
        return replace(plan, scores=f"pooled, {shares}")
    if channels is None:
        return replace(plan, scores="pooled")
    return replace(plan, channels=channels.sets, scores=channels.described(head_dim))


def _score_channels(site: AttentionSite, chosen: Configured, head_dim: int, rotary: RotaryReader) -> ScoreChannels:
    """The channels that a site's token scores read: those of its configuration, or those of its rotary embedding.

    Raises:
        ConfigError: the configured ones do not fit the site.
    """
    if chosen.channels is not None:
        return ScoreChannels(checked_sets(chosen.channels, head_dim, int(site.kv_heads), chosen.config), chosen.origin)
    if chosen.config.score_dims_of(head_dim) == head_dim:
        return from_rotary("", head_dim, chosen.config)
    return from_rotary(rotary.read(site, head_dim), head_dim, chosen.config)


def _place(site: AttentionSite, head_dim: int, channels: ScoreChannels | None) -> AttentionPlace:
    """Where a site runs, its heads, and what its token scores read of them."""
    device = device_name(site.query.example.device)
    read = None if channels is None else len(channels.sets[0])
    return AttentionPlace(device, int(site.query_heads), int(site.kv_heads), head_dim, read)


def _plan_site(site: AttentionSite, interpreter: Interpreter) -> SitePlan:
    """The plan of a site, whatever it is configured with."""
    if not _may_be_causal(site):
        return _unmasked(site)
    refused = _check_tensors(site) or _check_dropout(site, interpreter)
    if refused is not None:
        return refused
    proof = _prove_masks(site, interpreter)
    if isinstance(proof, SitePlan):
        return proof
    plan = _check_proof(site, proof, interpreter)
    return plan if plan.mask is None else _with_inputs(plan, site, interpreter)


def _check_proof(site: AttentionSite, proof: MaskPredicate, interpreter: Interpreter) -> SitePlan:
    """The plan of a site of which it is proved what its masks let through."""
    causal = _check_predicate(site, proof, interpreter)
    if isinstance(causal, SitePlan):
        return causal
    scale = _read_scale(site, interpreter)
    if scale is None:
        return SitePlan(site, Reason.SCALE_IS_DATA)
    shifted = [bias for bias in causal.key_terms.bias if bias.up_to_rows]
    if shifted and site.sinks is not None:
        seen = f"{shifted[0].described}; sinks see the numbers that it adds to whole rows"
        return SitePlan(site, Reason.ADDITIVE_BIAS, seen)
    for bias in causal.key_terms.bias:
        for at in bias.index:
            refusal = unemittable(without_shift(at)[1], (), interpreter, site)
            if refusal is not None:
                seen = f"{bias.described}; it is read from {readable(without_shift(at)[1])} on, and {refusal}"
                return SitePlan(site, Reason.ADDITIVE_BIAS, seen)
    proved = SitePlan(site, Reason.SWITCHABLE, mask=causal, scale=scale)
    return _check_heads(site, proved) or proved


def _may_be_causal(site: AttentionSite) -> bool:
    """Whether anything limits the keys that a query sees, or there is no later key to hide."""
    return bool(site.masks) or site.is_causal is True or _is_step(site) or _is_alone(site)


def _is_alone(site: AttentionSite) -> bool:
    """Whether one query sees one key, as in the first call of a text of one token."""
    return lengths_of(site) == (1, 1)


def _unmasked(site: AttentionSite) -> SitePlan:
    """The plan of a site in which every query sees every key."""
    length_q, length_k = lengths_of(site)
    if length_q == 1 or same(length_q, length_k):
        return SitePlan(site, Reason.BIDIRECTIONAL)
    return SitePlan(site, Reason.CROSS_ATTENTION, f"{length_q} queries over {length_k} keys")


def _is_step(site: AttentionSite) -> bool:
    """Whether a site is a decoding step: one query, over keys of which the last is its own token's.

    Such a site needs no causal limit: there is no later key to hide.
    """
    grown = site.growth is not None and site.growth.appended == 1
    return grown and not site.is_causal and lengths_of(site)[0] == 1


def _shapes_of(examples: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(list(example.shape)) for example in examples)


def _join_sizes(site: AttentionSite) -> bool | None:
    """Whether sizes fit that have to be equal: of batches, of key/value heads, of keys; None: that is not known.

    Dynamic ones that Dynamo gave symbols of their own, as it does for the layers of a cache, become one symbol by
    being compared. All sites' are before any mask is read: what was read before names symbols that are no longer used.
    """
    query, key, value = (tensor.example.shape for tensor in (site.query, site.key, site.value))
    sized = all(len(shape) == 4 for shape in (query, key, value))
    pairs = [(query[0], key[0]), *zip(key[:3], value[:3], strict=True)] if sized else []
    found = {decided(a == b) for a, b in pairs}
    if not sized or False in found:
        return False
    return None if None in found else True


def _check_tensors(site: AttentionSite) -> SitePlan | None:
    """Check what the operators ask of the tensors."""
    examples = [tensor.example for tensor in (site.query, site.key, site.value)]
    joined = _join_sizes(site)
    if joined is None:
        return SitePlan(site, Reason.DATA_DEPENDENT_SIZE, f"it is not known whether {_shapes_of(examples)} fit")
    if not joined:
        return SitePlan(site, Reason.SHAPES, f"shapes are {_shapes_of(examples)}")
    if site.dtype not in DTYPES:
        return SitePlan(site, Reason.DTYPE, f"the dtype is {site.dtype}")
    devices = {example.device for example in examples}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        return SitePlan(site, Reason.DEVICE, "devices are " + ", ".join(sorted(map(str, devices))))
    return None


def _check_dropout(site: AttentionSite, interpreter: Interpreter) -> SitePlan | None:
    probability = read_number(interpreter.facts, site.dropout_p)
    if probability == 0.0:
        return None
    seen = "it is computed from data" if probability is None else f"dropout_p is {probability}"
    return SitePlan(site, Reason.DROPOUT, seen)


def _check_heads(site: AttentionSite, plan: SitePlan) -> SitePlan | None:
    """Check the sizes that kernels are built for; where Dynamo made them dynamic, reading them guards on them."""
    heads_q, heads_kv = int(site.query_heads), int(site.kv_heads)
    for node in (site.query, site.value):
        head_dim = int(site.shape(node)[3])
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            return SitePlan(site, Reason.HEAD_DIM, f"head_dim is {head_dim}", plan.mask, plan.scale)
    if heads_kv < 1 or heads_q % heads_kv:
        return SitePlan(site, Reason.HEAD_GROUPS, f"{heads_q} over {heads_kv} heads", plan.mask, plan.scale)
    return None


def _prove_masks(site: AttentionSite, interpreter: Interpreter) -> MaskPredicate | SitePlan:
    """What a site's masks let through, whether the operators take it or not."""
    if not site.masks:
        return MaskPredicate(size(0) if site.is_causal is True else None)
    if site.is_causal is True:
        return SitePlan(site, Reason.UNPROVEN_MASK, "a causal flag beside a mask")
    one_query = _is_decoding(site, interpreter)
    with stage(Stage.PROVE):
        proof = prove_terms(interpreter, site.masks, one_query=one_query)
        while isinstance(proof, UnprovenMask) and any(map(interpreter.read_input, (proof.node, *proof.reads))):
            proof = prove_terms(interpreter, site.masks, one_query=one_query)
    return _unproven(site, proof, interpreter) if isinstance(proof, UnprovenMask) else proof


def _with_inputs(plan: SitePlan, site: AttentionSite, interpreter: Interpreter) -> SitePlan:
    """The plan of a site with the inputs that its mask is read from."""
    inputs = interpreter.facts.held.inputs
    if not inputs.read:
        return plan
    names = tuple(inputs.read_by([node for term in site.masks for node in (term.node, *term.arguments)]))
    if not names:
        return plan
    came_from = f"; the trace broke at {inputs.context.came_from}" if inputs.context.came_from else ""
    origin = f"the mask is read from the values of {', '.join(names)} in each call{came_from}"
    return replace(plan, mask_inputs=names, mask_origin=origin)


def _is_decoding(site: AttentionSite, interpreter: Interpreter) -> bool:
    """Whether one query attends to keys that the graph has just written or appended: a limit of them is causal."""
    node = site.key_heads.node
    written = interpreter.facts.is_overwritten(node) or scatters(node)
    return _is_step(site) or (written and bool(lengths_of(site)[0] == 1))


def _check_predicate(
    site: AttentionSite, predicate: MaskPredicate, interpreter: Interpreter
) -> MaskPredicate | SitePlan:
    """Check that the operators take what a site's masks were proved to be."""
    length_q, length_k = lengths_of(site)
    if site.growth is not None and site.growth.trimmed and length_q == 1:
        return SitePlan(site, Reason.PARTIAL_KEYS, "the cache is cut: its first key is not its sequence's first")
    if predicate.causal_offset is None and (_is_step(site) or _is_alone(site)):
        predicate = replace(predicate, causal_offset=length_k - 1)
    if predicate.causal_offset is None:
        return _unlimited(site, predicate, interpreter)
    refusal = _refused_offset(site, predicate, interpreter, length_q, length_k)
    if refusal is not None:
        seen = f"query i sees keys up to i + {readable(predicate.causal_offset)}"
        detail = f"{seen}, of {length_k} keys for {length_q} queries: {refusal}"
        return SitePlan(site, Reason.PARTIAL_KEYS, detail)
    if predicate.segments is not None and not same(predicate.segments.offset, predicate.causal_offset):
        return SitePlan(site, Reason.PARTIAL_KEYS, "queries are numbered as sequences from another key on")
    if predicate.window is not None and not predicate.window.is_Integer:
        return SitePlan(site, Reason.UNPROVEN_MASK, f"the window, {readable(predicate.window)}, is not a number")
    for facts, node in predicate.sources:
        if not interpreter.facts.is_within(facts):
            return SitePlan(site, Reason.NESTED_GRAPH, f"the mask reads {node.name}, which only its own function sees")
    for facts, node in predicate.read_later:
        if facts.is_overwritten(node) and not facts.is_final(node):
            return SitePlan(site, Reason.UNPROVEN_MASK, f"at node {node.name}: the graph overwrites its memory")
    return predicate


def _unlimited(site: AttentionSite, predicate: MaskPredicate, interpreter: Interpreter) -> SitePlan:
    """The plan of a site whose mask was proved to have no causal limit.

    A decoding step has one that may be all in the values of a tensor, made where no proof sees it.
    """
    given = {node for _, _, node in predicate.key_terms.leaves}
    inputs = sorted(input_name(node) for node in given if node.op == "placeholder")
    if inputs and _is_decoding(site, interpreter):
        return SitePlan(
            site,
            Reason.UNPROVEN_MASK,
            f"what one query sees of a cache is in the values of {', '.join(inputs)}, made outside of the graph, as "
            "generate() of transformers does for a model that is not sparsified",
        )
    return SitePlan(site, Reason.BIDIRECTIONAL, "the mask hides keys but has no causal limit")


def _refused_offset(
    site: AttentionSite,
    predicate: MaskPredicate,
    interpreter: Interpreter,
    length_q: sympy.Expr,
    length_k: sympy.Expr,
) -> str | None:
    """Why the operators cannot be told at which key the queries stand; None if they can."""
    offset: sympy.Expr = predicate.causal_offset
    if same(offset, length_k - length_q):
        return None
    if predicate.segments is not None:
        return "they are packed sequences"
    leaves = predicate.offset_leaves
    tokens, capacity = (site.shape(tensor)[2] for tensor in (site.query, site.key))
    if offset.is_Integer:
        return None if offset >= 0 and decided(tokens + int(offset) <= capacity) else "they are not all among the keys"
    if not leaves and offset.free_symbols <= length_q.free_symbols | length_k.free_symbols:
        return "these are neither the last of the keys nor at a position in them"
    refusal = unemittable(offset, leaves, interpreter, site)
    if refusal is None and not writes_slots(interpreter, offset, tokens, capacity, site.shape(site.key)[0]):
        return "the graph writes no keys there, so that they may stand past the last of them"
    return refusal


def unemittable(
    expression: sympy.Expr, leaves: tuple[Leaf, ...], interpreter: Interpreter, site: AttentionSite
) -> str | None:
    """Why a position in the keys cannot be made from the graph's inputs, for all rows at once; None if it can."""
    names = {name for name, _, _ in leaves}
    numbers = {symbol for symbol in expression.free_symbols - {BATCH} if symbol.name not in names}
    if BATCH in expression.free_symbols:
        numbers |= size(site.shape(site.key)[0]).free_symbols
    if not is_expressible(expression) or not numbers <= set(home_of(leaves, interpreter.facts).size_sources):
        return "that number cannot be made of the graph's inputs"
    unreadable = [node for name, _, node in leaves if not interpreter.unknowns[name].readable]
    return f"{unreadable[0].name} lives inside a nested function" if unreadable else None


def _unproven(site: AttentionSite, proof: UnprovenMask, interpreter: Interpreter) -> SitePlan:
    """The plan of a site whose mask was not proved: numbers added to the scores, or a mask unknown."""
    reason = Reason.ADDITIVE_BIAS if proof.role is MaskRole.ADDED else Reason.UNPROVEN_MASK
    why = interpreter.facts.held.inputs.unreadable.get(proof.node, "")
    return SitePlan(site, reason, "; ".join(filter(None, (proof.described, why))))


def _read_scale(site: AttentionSite, interpreter: Interpreter) -> float | None:
    if site.scale is None:
        head_dim = int(site.shape(site.query)[3])
        return float(head_dim) ** -0.5 if head_dim > 0 else None
    return read_number(interpreter.facts, site.scale)
