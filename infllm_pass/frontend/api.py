"""Public entry points: `sparsify`, `dense`, `dense_mode`, `report` and `explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from infllm_pass.calibration.record import Calibration
from infllm_pass.calibration.sites import CalibratedSites
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import CarriedError, UnsupportedModelError
from infllm_pass.frontend.backend import NAMED_BACKEND_LOG, SwitchableBackend, compiler_behind, infllm
from infllm_pass.frontend.compile_settings import CompileSettings, compile_with, settings_of
from infllm_pass.frontend.handle import HANDLE, Handle, compile_dense
from infllm_pass.frontend.sparsified import sparsified
from infllm_pass.plan.site_config import SiteConfig, SiteFilter, site_config_of
from infllm_pass.rewrite.failures import Strict, checked_strict
from infllm_pass.rewrite.pipeline import SitePolicy
from infllm_pass.rewrite.report import Report
from infllm_pass.rewrite.targets import DEFAULT_TARGETS, Target

ModelT = TypeVar("ModelT", bound=Callable[..., Any])
ConfigLike = SparseAttentionConfig | Mapping[str, Any] | None


def sparsify(
    model: ModelT,
    config: ConfigLike = None,
    *,
    strict: Strict = False,
    filter_fn: SiteFilter | None = None,
    site_config: SiteConfig | None = None,
    targets: Sequence[Target] = DEFAULT_TARGETS,
    calibration: Calibration | str | PathLike[str] | None = None,
) -> ModelT:
    """Make the attention of a dense model switchable: dense for short inputs, InfLLM-V2 sparse for long ones.

    Every provably causal attention in the compiled graphs, fused or written by hand, is rewritten (arXiv
    2509.24663); one that stays dense is reported with its reason. The original model is not changed and shares its
    parameters.

    Args:
        model: a module or function, plain or compiled by ``torch.compile``, whose backend, mode, options,
            ``dynamic`` and ``fullgraph`` are kept. A sparsified model is sparsified anew from its original.
        config: a `SparseAttentionConfig`, a dict of its fields, a model configuration that carries
            ``sparse_config`` (MiniCPM4), or None: that of the model itself where its configuration carries one, as
            after `adapt`; else the defaults.
        strict: True: raise, instead of warning, when a call compiled graphs and no site became switchable, and when the
            pass itself failed at a site. "all": also when any attention site of the compiled graphs stays dense, for
            whatever reason, bidirectional ones included, unless `filter_fn` or `site_config` turns it down.
        filter_fn: called with each provable `AttentionSite`, and with ``strict="all"`` with every one that was read;
            return False to leave it dense. What it raises, the call that compiles raises.
        site_config: called with the sites that `filter_fn` lets through; returns the `SparseAttentionConfig` of a site,
            a dict of the fields in which it differs from `config` (``{}``: in none), or None to leave it dense. What it
            raises, the call that compiles raises.
        targets: what a site can become, see `infllm_pass.rewrite.targets.Target`: the first that accepts it computes
            it. Put your own before `DEFAULT_TARGETS`.
        calibration: a `Calibration` of this model, or the path of a file that holds one: its channels are read where
            the scorer is "tokens". What `site_config` says of a site comes first.

    Returns:
        A compiled module (``torch._dynamo.OptimizedModule``) or function to call like the original.

    Raises:
        ConfigError: the configuration or `strict` is invalid, or `filter_fn` or `site_config` is no function; at call
            time, if one of them returned something else than it should.
        UnsupportedModelError: `model` is no module or function, or was compiled in a way that cannot be kept.
        CalibrationError: the calibration cannot be read, or is that of another model; at call time, if it does not
            know a site.
        NoAttentionSiteError: at call time, with `strict`: no site is switchable.
        InternalError: at call time, with `strict`: the pass failed at a site, with what it raised as the cause.
        DenseSiteError: at call time, with ``strict="all"``: a site stays dense.
    """
    given = None if config is None else SparseAttentionConfig.coerce(config)
    strict = checked_strict(strict)
    original, settings = original_of(model)
    chosen = _config_for(original, given)
    own = _calibrated(calibration, original, site_config)
    policy = SitePolicy(chosen, site_config_of(filter_fn, own), tuple(targets), strict)
    return sparsified(original, settings, policy)  # type: ignore[return-value]


def _config_for(original: object, config: ConfigLike) -> SparseAttentionConfig:
    """The configuration that was given, or the model's own, or the defaults.

    Raises:
        ConfigError: it is invalid.
    """
    own = getattr(original, "config", None)
    if config is None and isinstance(getattr(own, "sparse_config", None), Mapping):
        return SparseAttentionConfig.from_model_config(own)
    return SparseAttentionConfig.coerce(config)


def original_of(model: object) -> tuple[Callable[..., Any], CompileSettings]:
    """What a plain, compiled or sparsified model was made of, and how it is compiled without the pass.

    Raises:
        UnsupportedModelError: see `settings_of`.
    """
    previous = _find_handle(model)
    if previous is not None:
        return previous.original, previous.settings
    original, settings = settings_of(model)
    return original, replace(settings, compiler=compiler_behind(settings.compiler))


def _calibrated(
    calibration: Calibration | str | PathLike[str] | None, original: Callable[..., Any], site_config: SiteConfig | None
) -> SiteConfig | None:
    """The function of sites with a calibration behind it.

    Raises:
        CalibrationError: the calibration cannot be read, or is that of another model.
    """
    if calibration is None or (site_config is not None and not callable(site_config)):
        return site_config
    found = Calibration.coerce(calibration)
    found.check_model(original)
    return CalibratedSites(found, site_config)


def _find_handle(model: object) -> Handle | None:
    """The handle of a sparsified model; an OptimizedModule would ask its original for a missing attribute."""
    handle = getattr(model, "__dict__", {}).get(HANDLE)
    return handle if isinstance(handle, Handle) else None


def _handle_of(model: object) -> Handle:
    handle = _find_handle(model)
    if handle is None:
        raise UnsupportedModelError(
            f"{_name(model)} is not a sparsified model: pass what infllm_pass.sparsify(...) returned"
        )
    return handle


def sparsified_config(model: object) -> SparseAttentionConfig | None:
    """The configuration of a sparsified model; None for any other."""
    handle = _find_handle(model)
    return None if handle is None else handle.policy.config


def with_compiler(model: object, compiler: Callable[..., Any]) -> Callable[..., Any]:
    """A sparsified model's original with the same sites configured alike, for another compiler.

    Args:
        model: a model that `sparsify` returned.
        compiler: takes a rewritten graph's module and example inputs, as backends of ``torch.compile`` do.

    Raises:
        UnsupportedModelError: `model` was not returned by `sparsify`.
    """
    handle = _handle_of(model)
    return compile_with(handle.original, SwitchableBackend(compiler, handle.policy), handle.settings)


def _name(model: object) -> str:
    return getattr(model, "__name__", None) or f"an object of type {type(model).__name__}"


def dense(model: ModelT) -> ModelT:
    """The dense compiled model behind a sparsified one: same weights, compiler and options.

    Provably causal masks are still elided, so that it runs without an N x N mask; nothing is sparse.

    Args:
        model: a model that `sparsify` returned.

    Raises:
        UnsupportedModelError: `model` was not returned by `sparsify`.
    """
    handle = _handle_of(model)
    return compile_dense(handle.original, handle.settings, handle.policy)  # type: ignore[return-value]


@contextlib.contextmanager
def dense_mode(model: Callable[..., Any]) -> Iterator[None]:
    """Run a sparsified model dense inside the ``with`` block, for instance to evaluate it against itself.

    The dense side is compiled when it is first called and kept for later blocks. The switch belongs to the model, not
    to a thread: while any thread is inside such a block, every call of the model is dense.

    Args:
        model: a model that `sparsify` returned.

    Raises:
        UnsupportedModelError: `model` was not returned by `sparsify`.
    """
    with _handle_of(model).dense():
        yield


def report(model: Callable[..., Any] | None = None) -> Report:
    """What the pass did in the graphs compiled so far.

    Args:
        model: a model that `sparsify` returned, or a module compiled with ``backend="infllm"``; None: the graphs
            that were compiled in this process through ``backend="infllm"`` and whose parameters are still there. The
            latest `rewrite.log.MOST_GRAPHS` are remembered.

    Raises:
        UnsupportedModelError: the pass does not run in front of this model's compiler.
    """
    if model is None:
        return NAMED_BACKEND_LOG.report()
    handle = _find_handle(model)
    if handle is not None:
        return handle.log.report()
    original, settings = settings_of(model)
    backend = getattr(settings.compiler, "compiler_fn", None)
    if isinstance(backend, SwitchableBackend):
        return backend.log.report()
    if backend is infllm and isinstance(original, nn.Module):
        return NAMED_BACKEND_LOG.report_for(original.parameters())
    return _handle_of(model).log.report()


def explain(
    model: Callable[..., Any],
    *example_inputs: Any,
    config: ConfigLike = None,
    site_config: SiteConfig | None = None,
    calibration: Calibration | str | PathLike[str] | None = None,
    **example_kwargs: Any,
) -> Report:
    """Run a model once on example inputs, rewritten but not compiled, and report every attention site.

    Args:
        model: a module or function, plain, compiled or sparsified (whose configuration, filter, site configuration and
            targets are then used).
        example_inputs: positional inputs; their lengths decide the side of the switch.
        config: as for `sparsify`.
        site_config: as for `sparsify`; for a sparsified model it takes the place of its filter and site configuration.
        calibration: as for `sparsify`, and as `site_config`.
        example_kwargs: keyword inputs.

    Raises:
        ConfigError: the configuration is invalid, or `site_config` is no function.
        CalibrationError: see `sparsify`.
        UnsupportedModelError: `model` cannot be sparsified.
        Exception: what the model's `filter_fn` or the `site_config` raises.
    """
    handle = _find_handle(model)
    chosen = site_config_of(None, _calibrated(calibration, original_of(model)[0], site_config))
    if handle is not None:
        original, settings, policy = handle.original, handle.settings, replace(handle.policy, strict=False)
        if config is not None:
            policy = replace(policy, config=SparseAttentionConfig.coerce(config))
        if chosen is not None:
            policy = replace(policy, site_config=chosen)
    else:
        original, settings = settings_of(model)
        policy = SitePolicy(_config_for(original, config), chosen)
    backend = SwitchableBackend(_run_uncompiled, policy)
    failure: Exception | None = None
    try:
        compile_with(original, backend, settings)(*example_inputs, **example_kwargs)
    except CarriedError as carried:
        failure = carried.error
    if failure is not None:
        raise failure
    return backend.log.report()


def _run_uncompiled(module: torch.fx.GraphModule, _example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
    return module.forward
