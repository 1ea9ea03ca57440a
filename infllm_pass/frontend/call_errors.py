"""Diagnosis of failed calls: finds the cache argument whose device, dtype or batch does not fit.

What Dynamo raises while it traces such a call names graph nodes and fake tensors. Nothing has been run by then; after
a failure, and only then, the arguments are compared here. What a model accepts is never refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infllm_pass.errors import DeviceError, DtypeError, InfLLMError, ShapeError

_DEEPEST = 4
"""Containers and objects that an argument is looked for in; a cache of transformers holds layers that hold tensors."""

Named = tuple[str, Tensor]


def misfit_of_call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InfLLMError | None:
    """The error that says which cache does not fit in a call that failed; None if all do.

    Caches are floating-point tensors in arguments and in the model's buffers: of four dimensions and in pairs, as keys
    and values are, or of more, as those of all layers together. They are to be on the device and of the dtype of the
    model's parameters, where these agree on one, and those in pairs to have as many rows as the first other tensor
    among the arguments.

    Args:
        model: the uncompiled module or function.
        args: positional arguments of the call.
        kwargs: keyword arguments.
    """
    tensors = list(_tensors_of_call(model, args, kwargs))
    inputs = [(name, tensor) for name, tensor in tensors if 2 <= tensor.dim() <= 3]
    weights: list[nn.Parameter] = []
    if isinstance(model, nn.Module):
        tensors += [(f"self.{name}", buffer) for name, buffer in model.named_buffers()]
        weights += model.parameters()
    caches = _caches(tensors)
    return (
        _of_other_device(caches, weights, inputs) or _of_other_dtype(caches, weights) or _of_other_batch(caches, inputs)
    )


def _of_other_device(caches: list[Named], weights: list[nn.Parameter], inputs: list[Named]) -> InfLLMError | None:
    owner, others = ("the model's parameters", weights) if weights else ("the other inputs", [t for _, t in inputs])
    devices = {tensor.device for tensor in others}
    for name, cache in caches:
        if len(devices) == 1 and cache.device not in devices:
            device = next(iter(devices))
            return DeviceError(f"{name} is on {cache.device} and {owner} on {device}: make the cache on {device}")
    return None


def _of_other_dtype(caches: list[Named], weights: list[nn.Parameter]) -> InfLLMError | None:
    dtypes = {weight.dtype for weight in weights if weight.is_floating_point()}
    for name, cache in caches:
        if len(dtypes) == 1 and cache.dtype not in dtypes and not torch.is_autocast_enabled(cache.device.type):
            dtype = next(iter(dtypes))
            return DtypeError(
                f"{name} is {cache.dtype} and the model's parameters are {dtype}: make the cache in {dtype}"
            )
    return None


def _of_other_batch(caches: list[Named], inputs: list[Named]) -> InfLLMError | None:
    if not inputs:
        return None
    name, rows = inputs[0][0], inputs[0][1].shape[0]
    for cache_name, cache in caches:
        if cache.dim() == 4 and cache.shape[0] != rows:
            return ShapeError(
                f"{cache_name} has {cache.shape[0]} row(s) and {name} {rows}: a cache keeps the number of rows that it "
                f"was made with; make another for {rows}"
            )
    return None


def _caches(tensors: list[Named]) -> list[Named]:
    """Those of some tensors that are caches; tensors of one byte are left out, which models convert by themselves."""
    large = [(name, t) for name, t in tensors if t.dim() >= 4 and t.is_floating_point() and t.element_size() > 1]
    shapes = [tensor.shape[:-1] for _, tensor in large]
    return [(name, tensor) for name, tensor in large if tensor.dim() > 4 or shapes.count(tensor.shape[:-1]) > 1]


def _tensors_of_call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Named]:
    """The tensors in a call's arguments, and what the caller knows them by."""
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:  # the call failed because its arguments are none of the model's
        return
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            for key, inner in value.items():
                yield from _tensors_in(key, inner, 0)
        else:
            yield from _tensors_in(name, value, 0)


def _tensors_in(name: str, value: Any, depth: int) -> Iterator[Named]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth == _DEEPEST or isinstance(value, (type, nn.Module)):
        return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(f"{name}[{key!r}]", inner, depth + 1)
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _tensors_in(f"{name}[{place}]", inner, depth + 1)
    elif hasattr(value, "__dict__"):
        for key, inner in vars(value).items():
            yield from _tensors_in(f"{name}.{key}", inner, depth + 1)
