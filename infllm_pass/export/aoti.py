"""AOTInductor packages that contain dense and sparse attention and the length switch.

A package is loaded by ``torch._inductor.aoti_load_package`` or from C++, without this project. `load_package` adds
errors that say what was wrong with an input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from infllm_pass.compat import inductor
from infllm_pass.compat.trees import reorder_kwargs, tree_leaves, treespec_loads
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import ExportError, InputSizeError
from infllm_pass.export.export import export_with_report
from infllm_pass.plan.site_config import SiteConfig, SiteFilter, site_config_of
from infllm_pass.rewrite.pipeline import SitePolicy
from infllm_pass.rewrite.report import Report
from infllm_pass.rewrite.targets import DEFAULT_TARGETS, Target


def package(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    path: str | PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    filter_fn: SiteFilter | None = None,
    site_config: SiteConfig | None = None,
    targets: Sequence[Target] = DEFAULT_TARGETS,
    overwrite: bool = False,
) -> Report:
    """Compile a model with AOTInductor into one file, switch included, that runs without this project.

    Args:
        model: a module, compiled or not, or an exported program.
        args: example arguments; a program needs none.
        path: the file to write, ``*.pt2``.
        kwargs: example keyword arguments.
        dynamic_shapes: which sizes are dynamic, as ``torch.export.export`` takes it.
        config: what sparse attention selects; see `export`.
        filter_fn: sites for which it returns False stay dense.
        site_config: the configuration of each site, see `sparsify`.
        targets: what a site can become, see `sparsify`.
        overwrite: whether an existing file is replaced.

    Returns:
        What was found and done at every site.

    Raises:
        ExportError: the path exists or cannot be written, there is no C++ compiler, or a part of the model cannot be
            compiled. Nothing is written then.
        DtypeError: a site on the CPU computes in another dtype than float32, bfloat16 or float16.
        NoAttentionSiteError, UnsupportedModelError, ConfigError: see `export`.
    """
    from infllm_pass.lowering.inductor.package import PackageTarget

    target = PackageTarget(path, overwrite=overwrite)
    chosen = SparseAttentionConfig.coerce(config)
    policy = SitePolicy(chosen, site_config_of(filter_fn, site_config), tuple(targets))
    program, report = export_with_report(model, args, kwargs, dynamic_shapes, policy)
    with torch.no_grad():
        target.write(program)
    return report


class Package:
    """A loaded package, called like the model that it was made of.

    Args:
        model: what ``torch._inductor.aoti_load_package`` gave.

    Raises:
        ExportError: it was not written by `package`.
    """

    def __init__(self, model: Any) -> None:
        from infllm_pass.lowering.inductor.package import RANGES

        self._model = model
        written = model.loader.get_metadata().get(RANGES)
        if written is None:
            raise ExportError("the package was not written by infllm_pass.package")
        self._sizes: list[list[Any]] = json.loads(written)
        self._structure = treespec_loads(model.loader.get_call_spec()[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            InputSizeError: a tensor has a size that the model was not exported for.
            ValueError: the keywords are not those that the model was exported with.
        """
        kwargs = reorder_kwargs(kwargs, self._structure)
        values = [value for value in tree_leaves((args, kwargs)) if value is not None]
        for place, (value, sizes) in enumerate(zip(values, self._sizes, strict=False)):
            if isinstance(value, Tensor):
                _check_sizes(place, value, sizes)
        return self._model(*args, **kwargs)


def load_package(path: str | PathLike[str]) -> Package:
    """Load a package that `package` wrote.

    Args:
        path: the file.

    Raises:
        ExportError: there is no such file, or it is no such package.
    """
    try:
        model = inductor.load_package(str(path))
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{path} cannot be loaded: {error}") from error
    return Package(model)


def _check_sizes(place: int, value: Tensor, sizes: list[Any]) -> None:
    if len(sizes) != value.ndim:
        raise InputSizeError(f"input {place} has {value.ndim} dimensions: the model was exported for {len(sizes)}")
    for dim, (size, taken) in enumerate(zip(value.shape, sizes, strict=True)):
        least, most = taken if isinstance(taken, list) else (taken, taken)
        if size < least or (most is not None and size > most):
            expected = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            raise InputSizeError(
                f"input {place} has size {size} in dimension {dim}: the model was exported for {expected}; "
                "cut or pad the input, or export with a wider range in dynamic_shapes"
            )
