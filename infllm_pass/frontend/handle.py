"""What a sparsified model carries: its original, how that and its parts are compiled, and what became of its calls."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from infllm_pass.compat import dynamo
from infllm_pass.compat.ddp import whole_graphs
from infllm_pass.errors import (
    CarriedError,
    InfLLMError,
    NoAttentionSiteError,
    NoAttentionSiteWarning,
    UncompiledCallError,
    UncompiledCallWarning,
)
from infllm_pass.frontend.backend import SwitchableBackend, compiler_behind
from infllm_pass.frontend.call_errors import misfit_of_call
from infllm_pass.frontend.compile_settings import CompileSettings, compile_with, settings_of
from infllm_pass.kv_cache.store import CacheStore
from infllm_pass.reasons import Uncompiled
from infllm_pass.rewrite.log import CompileLog
from infllm_pass.rewrite.pipeline import SitePolicy, Switch
from infllm_pass.runtime.graph_runs import RUNS

HANDLE = "_infllm_handle"
"""The attribute of a sparsified model that holds its handle."""


class _Sides:
    """One way in which a model or a part of it is compiled: the switchable side, and the dense one once it is called.

    Args:
        handle: the handle of the whole model.
        original: the model or the part.
        settings: how it is compiled.
    """

    def __init__(self, handle: Handle, original: Callable[..., Any], settings: CompileSettings) -> None:
        self.original = original
        self.backend = SwitchableBackend(settings.compiler, handle.policy, log=handle.log, store=handle.store)
        self.compiled = compile_with(original, self.backend, settings)
        self.switchable = _entry(self.compiled)
        self.most_sites = 0
        self.hides_own = isinstance(original, nn.Module) and dynamo.compiled_call(original) is not None
        self._lock = threading.Lock()
        self._dense: Callable[..., Any] | None = None
        self._compile_dense = functools.partial(compile_dense, original, settings, handle.policy)

    def dense(self) -> Callable[..., Any]:
        """The dense side, compiled when first called."""
        with self._lock:
            if self._dense is None:
                self._dense = _entry(self._compile_dense())
            return self._dense


class _Count(threading.local):
    """A number that each thread counts for itself."""

    value = 0


class Handle:
    """What a sparsified model carries: its original, how it is compiled, and which side of `dense_mode` runs.

    Threads may call it, and enter and leave `dense_mode`, at the same time.

    Args:
        original: the module or function.
        settings: how it is compiled without the pass.
        policy: what is to become of each site.
    """

    def __init__(self, original: Callable[..., Any], settings: CompileSettings, policy: SitePolicy) -> None:
        self.original = original
        self.settings = settings
        self.policy = policy
        self.log = CompileLog()
        self.store = CacheStore()
        self._lock = threading.RLock()
        self._calls = _Count()
        self._sides = _Sides(self, original, settings)
        self._parts: dict[int, _Sides] = {}
        self._views: dict[int, Any] = {}
        self._compiled_as: dict[int, tuple[dict[str, Any], _Sides]] = {}
        self._dense_blocks = 0
        self._graphs_checked = 0
        self.forward: Callable[..., Any] = self.call
        self._own_parts = _parts_compiled_by_themselves(original)
        self._limit_hits = dynamo.hits_of_recompile_limit()
        self._warned = False

    @property
    def arguments(self) -> tuple[CompileSettings, SitePolicy]:
        """What makes another handle like this one, beside an original."""
        return self.settings, self.policy

    @property
    def backend(self) -> SwitchableBackend:
        """The pass in front of the compiler, with the cache state that it keeps."""
        return self._sides.backend

    @property
    def compiled(self) -> Callable[..., Any]:
        """The compiled original, with the pass in front of its compiler."""
        return self._sides.compiled

    @property
    def calls(self) -> int:
        """How often this thread called the model, or parts of it by themselves."""
        return self._calls.value

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Run dense as long as any such block is open, in whatever thread."""
        with self._lock:
            self._dense_blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._dense_blocks -= 1

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self._run(self._sides, args, kwargs)

    def call_part(self, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a part of the model by itself, compiled like the whole; or the whole."""
        return self._run(self._sides_of(part), args, kwargs)

    def call_replaced(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model by a function that was put in the place of its forward.

        Raises:
            UncompiledCallError: with ``strict``: it ran none of the compiled graphs.
        """
        calls = self._calls.value
        graphs = RUNS.graphs
        result = call(*args, **kwargs)
        if RUNS.graphs == graphs and self._calls.value == calls and not self._dense_blocks:
            self._tell_uncompiled(Uncompiled.FORWARD_REPLACED)
        return result

    def compiled_as(self, part: nn.Module, arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """A part, or the whole, compiled with other arguments of ``torch.compile``; kept until others are asked for."""
        with self._lock:
            known = self._compiled_as.get(id(part))
            if known is None or known[0] != arguments:
                _, settings = settings_of(torch.compile(part, **arguments))
                settings = replace(settings, compiler=compiler_behind(settings.compiler))
                known = self._compiled_as[id(part)] = dict(arguments), _Sides(self, part, settings)
            sides = known[1]
        return lambda *args, **kwargs: self._run(sides, args, kwargs)

    def kept_view(self, part: nn.Module, make: Callable[[Handle, nn.Module], Any]) -> Any:
        """The view of a part, made when first asked for; it holds the part, so that no other gets its id."""
        with self._lock:
            if id(part) not in self._views:
                self._views[id(part)] = make(self, part)
            return self._views[id(part)]

    def _sides_of(self, part: nn.Module) -> _Sides:
        if part is self.original:
            return self._sides
        found = self._parts.get(id(part))  # a part is held by its sides, so that no other gets its id
        if found is None:
            with self._lock:
                found = self._parts.setdefault(id(part), _Sides(self, part, self.settings))
        return found

    def _run(self, sides: _Sides, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._calls.value += 1
        failure: Exception | None = None
        dense = self._dense_blocks
        graphs, sites = RUNS.graphs, RUNS.sites
        try:
            with whole_graphs():
                result = (sides.dense() if dense else sides.switchable)(*args, **kwargs)
        except CarriedError as carried:
            failure = carried.error
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            explained = isinstance(error, (InfLLMError, torch.OutOfMemoryError))
            misfit = None if explained else misfit_of_call(sides.original, args, kwargs)
            if misfit is None:
                raise
            raise misfit from error
        if failure is not None:
            raise failure  # outside of the handler: a user's exception keeps the context that it had
        if not dense:
            self._check_run(sides, RUNS.graphs - graphs, RUNS.sites - sites)
        added = self.log.added
        if added != self._graphs_checked:
            self._check_sites(RUNS.sites - sites)
            self._check_parts()
            self._graphs_checked = added
        return result

    def _check_run(self, sides: _Sides, graphs: int, sites: int) -> None:
        """Tell of a call that ran no graph and, past Dynamo's limit, of one that ran fewer sites than another."""
        if sites >= sides.most_sites and graphs:
            sides.most_sites = sites
            return
        past_limit = dynamo.hits_of_recompile_limit() > self._limit_hits
        if not graphs:
            self._tell_uncompiled(_why_uncompiled(sides, past_limit))
        elif past_limit:
            self._tell_uncompiled(Uncompiled.RECOMPILE_LIMIT)

    def _check_parts(self) -> None:
        """Tell of parts compiled by themselves that are in no graph; whether they attend is not known."""
        alone = [name for name, part in self._own_parts if not self.log.report_for(part.parameters()).graphs]
        if alone and self.log.added:
            strict = self.policy.strict == "all"
            self._tell_uncompiled(Uncompiled.PART_COMPILED, strict=strict, where=f" ({', '.join(alone)})")

    def _tell_uncompiled(self, reason: Uncompiled, *, strict: bool | None = None, where: str = "") -> None:
        first = self.log.add_uncompiled(reason)
        message = f"a call of a sparsified model ran the plain model, or a part of it{where}, dense: {reason.value}"
        if bool(self.policy.strict) if strict is None else strict:
            raise UncompiledCallError(message)
        if first:
            _warn(message, UncompiledCallWarning)

    def _check_sites(self, sites: int) -> None:
        """Tell of a model in whose graphs nothing is switchable.

        Args:
            sites: how many attention sites the call ran, those of other sparsified models inside this one included.
        """
        found = self.log.report()
        if found.switchable or (sites and not found.sites):
            return
        seen = sorted({f"{site.reason}: {site.explanation}" for site in found.sites})
        why = (
            "; ".join(seen)
            if seen
            else "the compiled graphs call no fused attention (torch.nn.functional.scaled_dot_product_attention), and "
            "no softmax in them stands between a product of queries and keys and one with values"
        )
        message = f"infllm_pass found nothing to make switchable, the model runs dense: {why}"
        if self.policy.strict:
            raise NoAttentionSiteError(message)
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            _warn(message, NoAttentionSiteWarning)


def _parts_compiled_by_themselves(original: Callable[..., Any]) -> list[tuple[str, nn.Module]]:
    """Parts of a model with a compilation and parameters of their own, by name; sparsified ones tell of themselves."""
    named = original.named_modules() if isinstance(original, nn.Module) else ()
    return [
        (name, part)
        for name, part in named
        if part is not original
        and dynamo.is_compiled(part)
        and HANDLE not in vars(part)
        and any(True for _ in part.parameters())
    ]


def _why_uncompiled(sides: _Sides, past_limit: bool) -> Uncompiled:
    """Why Dynamo ran none of the graphs."""
    original = sides.original
    if dynamo.is_off():
        return Uncompiled.DYNAMO_OFF
    if dynamo.stance() != "default":
        return Uncompiled.STANCE
    if dynamo.in_dispatch_mode():
        return Uncompiled.DISPATCH_MODE
    if dynamo.is_disabled(original.forward if isinstance(original, nn.Module) else original):
        return Uncompiled.DISABLED
    if isinstance(original, nn.Module) and dynamo.compiled_call(original) is not None and not sides.hides_own:
        return Uncompiled.COMPILED_ELSEWHERE
    return Uncompiled.RECOMPILE_LIMIT if past_limit else Uncompiled.NO_GRAPH


def _warn(message: str, category: type[Warning]) -> None:
    """Warn of a call, at the line of the user's code that made it."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("infllm_pass", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _entry(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What to call to run a compiled module without going through ``nn.Module.__call__`` again."""
    return compiled.forward if isinstance(compiled, nn.Module) else compiled


def compile_dense(original: Callable[..., Any], settings: CompileSettings, policy: SitePolicy) -> Callable[..., Any]:
    """Compile an original with masks elided and every site dense."""
    backend = SwitchableBackend(settings.compiler, SitePolicy(policy.config), switch=Switch.ALWAYS_DENSE)
    return compile_with(original, backend, settings)
