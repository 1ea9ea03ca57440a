"""Dynamo backends: run the pass, then the wrapped backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import fx

from infllm_pass.compat.checkpointing import saves_quietly
from infllm_pass.compat.ddp import split_at_buckets
from infllm_pass.compat.dynamo import RestartAnalysis, bound_backend, graph_breaks, latest_break
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CarriedError, ConfigError, DenseSiteError, InternalError
from infllm_pass.graph.input_readings import InputContext
from infllm_pass.graph.subgraphs import held_tensors
from infllm_pass.kv_cache.inputs import CacheInputs, may_read_a_cache
from infllm_pass.kv_cache.store import CachedGraph, CacheStore
from infllm_pass.lowering.inductor.mutation_cache import remembered_accesses
from infllm_pass.lowering.ops.dispatch import warn_untuned
from infllm_pass.plan.site_config import site_config_of
from infllm_pass.rewrite.checkpoints import save_marked
from infllm_pass.rewrite.failures import warn_of_failures
from infllm_pass.rewrite.log import CompileLog
from infllm_pass.rewrite.pipeline import SitePolicy, Switch, run_pass
from infllm_pass.rewrite.report import GraphReport
from infllm_pass.rewrite.targets import DEFAULT_TARGETS
from infllm_pass.rewrite.trace import PassTrace
from infllm_pass.runtime.buffer_guards import WatchedGraph, unchanged_copy, watch
from infllm_pass.runtime.forward_mode import ReverseModeGraph, loses_tangents
from infllm_pass.runtime.graph_runs import counted
from infllm_pass.runtime.position_checks import CheckedGraph, RefusedGraph, misfit_of, take_checks
from infllm_pass.runtime.read_graphs import Again, ReadGraph, adopt_origins

CompiledGraph = Callable[..., Any]
Compiler = Callable[..., CompiledGraph]

NAMED_BACKEND_LOG = CompileLog(forgets_dead=True)
"""Graphs compiled through ``backend="infllm"``, which Dynamo knows by name and of which there is one."""

NAMED_BACKEND_STORE = CacheStore()
"""The states of caches for the same backend.

Dynamo tells it graphs and not models. One store for all of them lets the graphs of a prompt and of a step share what
they keep; models that decode from one cache may share it too, since a state depends on nothing but what the cache
holds, the form of its keys and the block geometry.
"""


class SwitchableBackend:
    """Runs the pass on each graph and hands the result to another backend.

    Args:
        compiler: the backend that compiles the rewritten graph.
        policy: what is to become of each site.
        switch: how the sides of the switch are chosen.
        log: where the reports of compiled graphs go.
        store: the states of caches, for backends that compile the graphs of one model; None: a store of its own.
        again: the graph that is compiled once more, and the forms of its masks; None for the graphs of a model.
    """

    def __init__(
        self,
        compiler: Compiler,
        policy: SitePolicy,
        *,
        switch: Switch = Switch.BY_LENGTH,
        log: CompileLog | None = None,
        store: CacheStore | None = None,
        again: Again | None = None,
    ) -> None:
        self.compiler = compiler
        self.policy = policy
        self.switch = switch
        self.log = CompileLog() if log is None else log
        self.store = CacheStore() if store is None else store
        self.again = again
        self._breaks_before = graph_breaks()
        self.__name__ = "infllm"

    def __call__(self, module: fx.GraphModule, example_inputs: list[torch.Tensor]) -> CompiledGraph:
        """Rewrite and compile one graph; the contract of a Dynamo backend.

        Raises:
            CarriedError: with what the user's function of sites raised, or what ``strict`` does not allow.
        """
        context = InputContext(came_from=latest_break(self._breaks_before))
        if self.again is not None:
            adopt_origins(module.graph, self.again.original.graph)
            context = replace(context, expected=self.again.forms, labels=self.again.labels)
        held = held_tensors(module, example_inputs, context)
        original = module
        if held.tensors or held.inputs.may_hold_masks or may_read_a_cache(module.graph):
            module = unchanged_copy(module)  # Dynamo still needs the inputs of its own
            held = held_tensors(module, example_inputs, context)
        misfit = misfit_of(module) if may_read_a_cache(module.graph) else None
        if misfit is not None:
            return RefusedGraph(misfit)
        caches = CacheInputs()
        number = self.log.new_number()
        trace = PassTrace(number)
        try:
            report = run_pass(
                module,
                self.policy,
                switch=self.switch,
                number=number,
                held=held,
                caches=caches,
                trace=trace,
            )
        except (InternalError, DenseSiteError) as error:
            raise CarriedError(error) from error
        self.log.add(report, original)
        warn_of_failures(report, self.log.warned)
        _warn_untuned(report)
        save_marked(module)
        watched = watch(module.graph, held.readings)
        vectors = held.inputs.examples
        reverse_only = loses_tangents(module)
        checks = take_checks(module, len(example_inputs) + len(vectors))
        try:
            with trace.compiler_behind(report), remembered_accesses(), saves_quietly(module):
                compiled = split_at_buckets(self.compiler)(module, [*example_inputs, *vectors, *caches.examples])
        except RestartAnalysis:  # Dynamo traces once more, with numbers in place of floats that the graph depends on
            self.log.discard(report)
            raise
        if reverse_only:
            compiled = ReverseModeGraph(compiled)
        if caches.specs:
            compiled = CachedGraph(compiled, tuple(caches.specs), self.store)
        if checks is not None:
            compiled = CheckedGraph(compiled, checks)
        if held.inputs.read:
            compiled = ReadGraph(compiled, tuple(held.inputs.read.values()), original, self._compile_again)
        if watched:
            compiled = WatchedGraph(compiled, original, watched)
        return compiled if self.again is not None else counted(compiled, len(report.sites))

    def _compile_again(self, again: Again) -> CompiledGraph:
        """A graph as it was before the pass, compiled for masks of other forms."""
        backend = SwitchableBackend(
            self.compiler, self.policy, switch=self.switch, log=self.log, store=self.store, again=again
        )
        backend._breaks_before = self._breaks_before
        return torch.compile(unchanged_copy(again.original), backend=backend)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset``: lets the compiler behind drop its state."""
        reset = getattr(self.compiler, "reset", None)
        if reset is not None:
            reset()


def _warn_untuned(report: GraphReport) -> None:
    """Warn of a graph's sparse sites on a GPU that the Triton kernels do not take."""
    refused = {(site.device, site.refusal) for site in report.sites if site.branch == "sparse" and site.refusal}
    for device, refusal in sorted(refused):
        warn_untuned(device, refusal)


def infllm(
    module: fx.GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledGraph:
    """The backend behind ``torch.compile(model, backend="infllm", mode=..., options=...)``.

    Args:
        module: the graph.
        example_inputs: its example inputs.
        mode: an Inductor mode such as "reduce-overhead".
        options: fields of `SparseAttentionConfig`; "filter_fn", "site_config" and "targets" as for `sparsify`;
            "backend": the name of the compiler behind (default "inductor"); everything else is an option of that
            compiler.

    Raises:
        ConfigError: a field of the configuration is invalid, or the compiler behind is this backend.
        Exception: what a function of sites raises.
    """
    policy, compiler = _split_options(mode, options)
    backend = SwitchableBackend(compiler, policy, log=NAMED_BACKEND_LOG, store=NAMED_BACKEND_STORE)
    failure: Exception
    try:
        return backend(module, example_inputs)
    except CarriedError as carried:
        failure = carried.error
    raise failure  # no sparsified model takes it out of its carrier; Dynamo tells whose backend it is


def _split_options(mode: str | None = None, options: Mapping[str, Any] | None = None) -> tuple[SitePolicy, Compiler]:
    """What the pass is to do, and the compiler behind it, from the arguments of ``torch.compile``."""
    rest = dict(options or {})
    known = {field.name for field in fields(SparseAttentionConfig)}
    config = SparseAttentionConfig.from_dict({key: rest.pop(key) for key in list(rest) if key in known})
    site_config = site_config_of(rest.pop("filter_fn", None), rest.pop("site_config", None))
    policy = SitePolicy(config, site_config, rest.pop("targets", DEFAULT_TARGETS))
    name = rest.pop("backend", "inductor")
    if name == "infllm":
        raise ConfigError("backend", name, "the name of another Dynamo backend, such as 'inductor'")
    return policy, bound_backend(name, mode, rest or None)


def compiler_behind(compiler: Compiler) -> Compiler:
    """The compiler behind the pass, if the pass already stands in front of it; else the compiler itself."""
    backend = getattr(compiler, "compiler_fn", None)
    if isinstance(backend, SwitchableBackend):
        return backend.compiler
    if backend is infllm:
        return _split_options(**getattr(compiler, "kwargs", {}))[1]
    return compiler
