"""Registration of this package's operators, and what compilers see of them.

A graph that runs under Python calls an operator, which launches its kernels itself, with all of their options:
compilers neither read kernels nor generate launches, of which Inductor would drop options that count (a limit of
registers, programmatic dependent launch). A graph that runs without Python, one of AOTInductor's, gets the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from infllm_pass.compat.aten import OpOverload, keeps_operators
from infllm_pass.compat.tensors import FakeTensor, FunctionalTensor, FunctionalTensorMode

from .attention_args import DIFFERENTIABLE_TERMS, Signature, flatten_tensors, no_gradients, restore_tensors

LIBRARY = torch.library.Library("infllm", "FRAGMENT")

_PLAIN = (torch.Tensor, FunctionalTensor)


class Seen(Enum):
    """What a compiler sees of a call."""

    CALL = "the operator"
    KERNELS = "what it launches"
    HOST_CALL = "the operator, of which it knows that the host reads data, which no CUDA graph can record"


class Operator:
    """An operator ``infllm::name``; calling it calls the operator.

    It is registered without `torch.library.custom_op`, which costs more than a decode step's checks: its wrappers go
    through the schema at every call, in time that is quadratic in the number of arguments.

    Args:
        name: its name, and the name of an overload after a dot if it is another of one operator.
        signature: its arguments.
        compute: takes the signature's own arguments and the record of the others.
        fake: the same, for tensors without data.
        kernels: the same, calling kernels in the form that compilers record; None: compilers never see them.
        seen: of the same arguments, what a compiler sees of the call; not asked in `torch.export`, where it sees the
            operator.
        backward: the operator of its gradient; see `_differentiate`. None: it has none.
        doc: what it computes and returns.
    """

    def __init__(
        self,
        name: str,
        signature: Signature[Any],
        *,
        compute: Callable[..., Any],
        fake: Callable[..., Any],
        kernels: Callable[..., Any] | None = None,
        seen: Callable[..., Seen] | None = None,
        backward: Operator | None = None,
        doc: str,
    ) -> None:
        self.name, self.signature = name, signature
        self.__doc__ = f"{doc}\n\nArgs:\n{signature.doc}\n"
        self._register(name, (), compute, fake)
        if backward is None:  # nothing is differentiated through it, and no time is spent on that
            LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        else:
            _differentiate(self, backward)
        packet, _, overload = name.partition(".")
        self.default: OpOverload = getattr(getattr(torch.ops.infllm, packet), overload or "default")
        if seen is not None:
            # Tags belong to operators, not to calls: another overload is the one that CUDA graphs are kept from.
            self._register(f"{name}.on_host", (torch.Tag.cudagraph_unsafe,), compute, fake)
            self.on_host: OpOverload = getattr(torch.ops.infllm, name).on_host
            self._register_rule(seen, kernels)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator."""
        return self.default(*args, **kwargs)

    def _register(
        self, name: str, tags: Sequence[torch.Tag], compute: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        read = self.signature.read

        @torch.compiler.disable  # or Dynamo would trace kernel launches, where a graph breaks in front of a call
        def run(*arguments: Any) -> Any:
            own, call = read(arguments)
            return compute(*own, call)

        def run_fake(*arguments: Any) -> Any:
            own, call = read(arguments)
            return fake(*own, call)

        LIBRARY.define(name + self.signature.schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"infllm::{name}", run_fake, lib=LIBRARY)

    def _register_rule(self, seen: Callable[..., Seen], kernels: Callable[..., Any] | None) -> None:
        """Decide, where AOTAutograd makes a graph functional, what the graph holds of a call."""

        def rule(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
            if any(type_ not in _PLAIN and not issubclass(type_, FakeTensor) for type_ in types):
                return NotImplemented
            if keeps_operators():
                return mode.__torch_dispatch__(operator, types, args, kwargs)
            own, call = self.signature.read(self.signature.positional(args, kwargs or {}))
            choice = seen(*own, call)
            if choice is Seen.KERNELS and kernels is not None:
                with mode:
                    return kernels(*own, call)
            target = self.on_host if choice is Seen.HOST_CALL else operator
            return mode.__torch_dispatch__(target, types, args, kwargs)

        torch.library.register_torch_dispatch(f"infllm::{self.name}", FunctionalTensorMode, rule, lib=LIBRARY)


def _differentiate(forward: Operator, backward: Operator) -> None:
    """Register a gradient: of q, k, v and `DIFFERENTIABLE_TERMS`, for an operator whose first output alone has one.

    Args:
        forward: the operator; returns its output and the log-sum-exp.
        backward: takes the output's gradient, q, k, v, what the operator returned, and its other arguments; returns
            gradients of q, k and v, and a list of those of the terms that are given.
    """
    terms = [forward.signature.names.index(name) - 3 for name in DIFFERENTIABLE_TERMS]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        tensors, ctx.rest = flatten_tensors((*inputs[:3], *output, *inputs[3:]))
        ctx.save_for_backward(*tensors)

    def run(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
        *gradients, of_terms = backward(grad_out, *restore_tensors(ctx.saved_tensors, ctx.rest))
        others = list(no_gradients(ctx.rest[5:]))
        for place, gradient in zip((at for at in terms if ctx.rest[5 + at] is not None), of_terms, strict=True):
            others[place] = gradient
        return (*gradients, *others)

    torch.library.register_autograd(f"infllm::{forward.name}", run, setup_context=save, lib=LIBRARY)
