"""``generate`` of transformers on a sparsified forward.

`torch.compile` hands every method but the call itself to the original module, whose ``generate`` calls the original,
uncompiled. A `GeneratingView` is the original under another class: it shares the original's attributes, and calling it
calls the sparsified model. All of transformers' generation code then runs as it is, with the view for ``self``. Where
the original hands ``generate`` on to a part of it, as adapters and wrappers do, it finds a view of that part.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from infllm_pass.compat.tensors import version_of
from infllm_pass.compat.transformers import cache_among, generation_hooks
from infllm_pass.errors import CachePositionError, PagedCacheError, UncompiledGenerateWarning

Call = Callable[..., Any]

_PAGED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods that generate with a paged cache and attention functions of their own, which the pass does not follow."""


class GeneratingView:
    """What a view, see `generating_view`, does differently from the class of its original, which is its second base.

    Attributes:
        infllm_call: calls the sparsified model.
        infllm_compiled_as: the sparsified model as ``torch.compile`` makes it with the arguments given.
    """

    infllm_call: Call
    infllm_compiled_as: Callable[[Mapping[str, Any]], Call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the sparsified model."""
        return self.infllm_call(*args, **self._without_idle_mask(kwargs))

    def get_compiled_call(self, compile_config: Any = None) -> Call:
        """What ``generate`` decodes with where transformers compiles by itself, as on accelerators with static caches.

        That is the sparsified model, which is compiled already; an explicit configuration compiles it that way.

        Args:
            compile_config: a ``CompileConfig`` of transformers, or None.
        """
        if compile_config is None:
            return self.__call__
        call = self.infllm_compiled_as(compile_config.to_dict())
        return lambda *args, **kwargs: call(*args, **self._without_idle_mask(kwargs))

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **inputs: Any) -> Any:
        """The 2-D mask for a cache of fixed capacity, from which the model then makes its own inside the graph.

        Transformers makes the 4-D mask out here instead, and what a mask was made of cannot be proved from a tensor.
        The mask is padded to the capacity: its shape then stays the same while the text grows.
        """
        if attention_mask is None or _hides_nothing(attention_mask):
            return None
        layers = getattr(cache_among(inputs)[1], "layers", ())
        capacity = max((getattr(layer, "max_cache_len", 0) for layer in layers), default=0)
        return F.pad(attention_mask, (0, max(0, capacity - attention_mask.shape[1])))

    def _without_idle_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs without a 2-D mask of ones, which every graph would otherwise have to test keys with.

        Where there is no cache the mask is kept: without it, transformers reads packed sequences off the positions.
        """
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or cache_among(inputs)[1] is None:
            return inputs
        of_encoder = getattr(getattr(self, "config", None), "is_encoder_decoder", False)
        return inputs if of_encoder or not _hides_nothing(mask) else {**inputs, "attention_mask": None}


def generating_members(kind: type, call: Call, compiled_as: Callable[[Mapping[str, Any]], Call]) -> dict[str, Any]:
    """What the class of a `GeneratingView` has beside that of its original.

    Args:
        kind: the class of a model of transformers.
        call: calls the sparsified model, hooks of the original included.
        compiled_as: gives the same for other arguments of ``torch.compile``.
    """
    members: dict[str, Any] = {
        "infllm_call": staticmethod(call),
        "infllm_compiled_as": staticmethod(compiled_as),
        **generation_hooks(kind, grow=_grown_inputs, prepare=_static_cache_in_place),
    }
    if hasattr(kind, "prepare_inputs_for_generation"):
        members["prepare_inputs_for_generation"] = _with_room(kind.prepare_inputs_for_generation)
    return members


def _grown_inputs(
    _: GeneratingView, grow: Call, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Grow the inputs by a token, as transformers does; a mask that hid nothing grows by a one."""
    before = model_kwargs.get("attention_mask")
    known = isinstance(before, Tensor) and _is_known_idle(before)
    grown: dict[str, Any] = grow(outputs, model_kwargs, *args, **kwargs)
    after = grown.get("attention_mask")
    if known and isinstance(after, Tensor) and after is not before:
        _remember_idle(after)
    return grown


def _static_cache_in_place(view: Any, prepare: Call, *args: Any, **kwargs: Any) -> Any:
    """Make a static cache with its memory in place, which is otherwise taken inside the first compiled graph.

    Transformers would take that of all layers on one device: a model on several gets it when each layer first runs.
    """
    devices = {parameter.device for parameter in view.parameters()}
    if len(devices) == 1 and kwargs.get("prefill_chunk_size", 0) is None:
        kwargs["prefill_chunk_size"] = kwargs.get("max_cache_len", 1)  # what transformers takes memory early for
    return prepare(*args, **kwargs)


def generating_methods(original: nn.Module, view: Any, count_calls: Callable[[], int]) -> dict[str, Call]:
    """The methods that generate, by name, for a sparsified model; none for a model that does not generate.

    Args:
        original: the model that was sparsified.
        view: a `GeneratingView` of it, or a view of a wrapper that hands ``generate`` on to a part.
        count_calls: how often the sparsified model, or a part of it, was called so far.
    """
    if not callable(getattr(original, "generate", None)):
        return {}
    paged = [name for name in _PAGED if callable(getattr(original, name, None))]
    return {
        "generate": _checked(original, view, count_calls),
        **{name: _refused(original, name) for name in paged},
    }


def _checked(original: nn.Module, view: Any, count_calls: Callable[[], int]) -> Call:
    """``generate``, with a warning when it called neither the model nor a part of it through a view."""

    @functools.wraps(original.generate)  # type: ignore[arg-type]
    def generate(*args: Any, **kwargs: Any) -> Any:
        before = count_calls()
        result = view.generate(*args, **kwargs)
        if count_calls() == before:
            warnings.warn(
                f"generate() of {type(original).__name__} called neither the model nor a part that is one of its "
                "attributes, and ran dense and uncompiled: sparsify the part of it that generates, such as its "
                "language model, in its place",
                UncompiledGenerateWarning,
                stacklevel=2,
            )
        return result

    return generate


def _refused(original: nn.Module, name: str) -> Call:
    """A method that generates with a paged cache, refused before anything is computed."""

    @functools.wraps(getattr(original, name))
    def refused(*_args: Any, **_kwargs: Any) -> Any:
        raise PagedCacheError(name)

    return refused


def _with_room(prepare: Call) -> Call:
    """``prepare_inputs_for_generation``, refusing a text that is longer than a static layer; a sliding one forgets.

    How long the text is, and how long the layer, is known on the host: nothing is read from a device.
    """

    @functools.wraps(prepare)
    def prepared(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        length = input_ids.shape[1]
        tokens = kwargs.get("next_sequence_length") or length
        name, cache = cache_among(kwargs)
        for place, layer in enumerate(getattr(cache, "layers", ())):
            capacity = getattr(layer, "max_cache_len", None)
            if isinstance(capacity, int) and length > capacity and not getattr(layer, "is_sliding", False):
                raise CachePositionError(f"{name}.layers[{place}].keys", 0, length - tokens, tokens, capacity)
        return prepare(self, input_ids, *args, **kwargs)

    return prepared


def _hides_nothing(mask: Tensor) -> bool:
    """Whether a 2-D mask is all ones; reads the device unless it is known of this very tensor."""
    if _is_known_idle(mask):
        return True
    if mask.dim() != 2 or not bool(mask.all()):
        return False
    _remember_idle(mask)
    return True


_KNOWN_IDLE = "_infllm_idle_at_version"
"""Attribute of a mask: its version when it was known to be all ones."""


def _is_known_idle(mask: Tensor) -> bool:
    return not mask.is_inference() and getattr(mask, _KNOWN_IDLE, None) == version_of(mask)


def _remember_idle(mask: Tensor) -> None:
    if not mask.is_inference():  # tensors of inference mode do not count what is written to them
        setattr(mask, _KNOWN_IDLE, version_of(mask))
