"""Operators: what their schemas say, and functions of PyTorch that graphs call under a private name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch import predispatch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.export._trace import custom_triton_ops_decomposition_disabled

__all__ = [
    "ADD_BATCH_DIM",
    "ATTENTION_BUILTIN",
    "ENCODER_LAYER",
    "PAD_BUILTIN",
    "REMOVE_BATCH_DIM",
    "SCALAR_TENSOR",
    "SET_GRAD_ENABLED",
    "OpOverload",
    "is_mutable",
    "keeps_operators",
    "operator_name",
    "registered_name",
    "returns_values",
    "written_values",
]

ATTENTION_BUILTIN: Any = torch._C._nn.scaled_dot_product_attention
"""What ``F.scaled_dot_product_attention`` is in Dynamo's graphs. The same object as the public name in torch 2.11 to
2.15, where that is a builtin; another one as soon as it is wrapped in Python."""

ENCODER_LAYER: Any = torch._transformer_encoder_layer_fwd
"""What ``nn.TransformerEncoderLayer`` is in Dynamo's graphs, in evaluation without gradients. In torch 2.11 to 2.15."""

PAD_BUILTIN: Any = torch._C._nn.pad
"""What ``F.pad`` is in Dynamo's graphs, which see through its Python wrapper. In torch 2.11 to 2.15."""

SCALAR_TENSOR: Any = torch._refs.tensor
"""What Dynamo writes for ``torch.tensor`` of a dynamic number. In torch 2.11 to 2.15."""

ADD_BATCH_DIM: Any = predispatch._add_batch_dim
"""The call by which graphs hide a dimension inside ``vmap``. In torch 2.11 to 2.15."""

REMOVE_BATCH_DIM: Any = predispatch._remove_batch_dim
"""The call by which graphs show again a dimension hidden by `ADD_BATCH_DIM`. In torch 2.11 to 2.15."""

SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled
"""The call that ``torch.no_grad()`` and its kind leave in Dynamo's graphs. In torch 2.11 to 2.15."""


def registered_name(target: object) -> str | None:
    """What follows ``torch.ops`` in the name of an operator, of one of its overloads or of a higher-order operator.

    The classes of these in ``torch._ops`` and their texts, the same in torch 2.11 to 2.15. Nothing public names an
    operator. None for any other function.
    """
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"  # type: ignore[no-untyped-call]
    return str(target) if isinstance(target, (OpOverload, OpOverloadPacket)) else None


def written_values(overload: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The values among a call's arguments that its operator declares to write to.

    ``OpOverload._schema``, the same in torch 2.11 to 2.15, as for the functions below. Nothing public reads schemas.
    """
    declared = overload._schema.arguments
    positional = [value for argument, value in zip(declared, args, strict=False) if argument.is_write]
    return positional + [kwargs.get(argument.name) for argument in declared if argument.is_write]


def is_mutable(target: object) -> bool:
    """Whether a target is an operator that declares to write to an argument; see `written_values`."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def returns_values(overload: OpOverload) -> bool:
    """Whether an operator declares results; see `written_values`."""
    return bool(overload._schema.returns)


def operator_name(overload: OpOverload) -> str:
    """An operator's name without namespace and overload; see `written_values`."""
    name: str = overload._schema.name
    return name.partition("::")[2]


def keeps_operators() -> bool:
    """Whether ``torch.export`` traces, which keeps operators with Triton kernels as they are.

    ``torch.export._trace.custom_triton_ops_decomposition_disabled``, the same in torch 2.11 to 2.15, which
    ``torch.library.triton_op`` asks too. ``torch.compiler.is_exporting`` is False while programs are decomposed.
    """
    return bool(custom_triton_ops_decomposition_disabled())  # type: ignore[no-untyped-call]
