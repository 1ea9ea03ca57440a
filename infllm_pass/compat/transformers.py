"""Models of transformers: methods that generation calls under a private name, and names that releases changed.

transformers itself is not imported: what is asked is whatever model is given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Method = Callable[..., Any]

CACHE_NAMES = ("cache", "past_key_values")
"""The argument that a model takes its cache by, which is also the name in its outputs: transformers 5.24, 5.17 to 5.23.

Public names, but 5.24 warns of the second at every use, and its own code passes the first."""


def cache_among(inputs: Mapping[str, Any]) -> tuple[str, Any]:
    """The cache among a model's inputs, with the name that it has there; None for a call without one."""
    return next(((name, inputs[name]) for name in CACHE_NAMES if inputs.get(name) is not None), (CACHE_NAMES[0], None))


def cache_name(model: Callable[..., Any]) -> str:
    """The name that a model takes and gives its cache by."""
    known = inspect.signature(getattr(model, "forward", model)).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])


def generation_hooks(kind: type, *, grow: Method, prepare: Method) -> dict[str, Method]:
    """Methods for a subclass of a model's class, by the names that ``generate`` calls them by.

    ``_update_model_kwargs_for_generation(outputs, model_kwargs, …)`` makes the inputs of the next step from those of
    the last; ``_prepare_static_cache(…, max_cache_len, …, prefill_chunk_size)`` makes a static cache. Both in
    transformers 5.17 to 5.24. ``prepare_inputs_for_generation`` is public and comes too late for either.

    Args:
        kind: the model's class.
        grow: called with the model, the class's own method, bound, and the arguments; gives the method's result.
        prepare: the same for a static cache.

    Returns:
        The methods that the class has.
    """
    wrapped = {"_update_model_kwargs_for_generation": grow, "_prepare_static_cache": prepare}
    return {name: _around(getattr(kind, name), hook) for name, hook in wrapped.items() if hasattr(kind, name)}


def _around(method: Method, hook: Method) -> Method:
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(self, functools.partial(method, self), *args, **kwargs)

    return called


def supports_sdpa(model_class: type) -> bool:
    """Whether a class of transformers' models can attend by ``F.scaled_dot_product_attention``.

    ``PreTrainedModel._supports_sdpa``, the same in transformers 5.17 to 5.24. ``attn_implementation="sdpa"`` raises
    where it is False.
    """
    return bool(getattr(model_class, "_supports_sdpa", False))


def unpacked(model: Any) -> Any:
    """A model that was read from a GGUF file, with plain weights and nothing that says otherwise.

    transformers 5.24 unpacks weights where it has no kernels for packed ones, and remembers the quantizer either way:
    ``hf_quantizer`` and ``is_quantized``, of which `Trainer` concludes that the model cannot be trained.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        model = model.dequantize()
    model.hf_quantizer = None
    for module in model.modules():
        for name in ("is_quantized", "quantization_method"):
            vars(module).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


Kind = TypeVar("Kind", bound=type)


def checkpoint_hooks(kind: Kind) -> Kind:
    """Decorates a subclass of ``Trainer``: what its checkpoints hold is decided by methods with public names.

    ``write_checkpoint(write)`` is called in the place of ``_save_checkpoint``, to call ``write()``;
    ``save_trained(folder)`` in the place of ``_save``, and ``load_trained(folder)`` in the place of
    ``_load_from_checkpoint``. These names are the same in transformers 5.17 to 5.24.
    """
    write: Method = kind._save_checkpoint  # type: ignore[attr-defined]

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        self.write_checkpoint(functools.partial(write, self, *args, **kwargs))

    def _save(self: Any, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        self.save_trained(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_trained(Path(resume_from_checkpoint))

    for method in (_save_checkpoint, _save, _load_from_checkpoint):
        setattr(kind, method.__name__, method)
    return kind


def stay_on_one_gpu(arguments: Any) -> None:
    """Keep ``Trainer`` from wrapping its model into `DataParallel` where one process sees several GPUs."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
