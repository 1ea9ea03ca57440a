"""What a tensor is: its memory, its count of writes, the modes and wrappers around it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "TorchDispatchMode",
    "base_of",
    "current_mode",
    "detect_fake_mode",
    "fake_mode_of",
    "have_tangents",
    "storage_id",
    "unwrap_functorch",
    "version_of",
    "without_modes",
]

without_modes = _disable_current_modes
"""Context in which tensor operators run for real: fake tensor modes and tracers that surround the call are off.

The same in torch 2.11 to 2.15. Nothing public; `torch.utils._python_dispatch` is where modes are defined."""

current_mode = _get_current_dispatch_mode
"""The innermost mode that sees tensor operators, a tracer's or another; None where operators just run.

The same in torch 2.11 to 2.15. Nothing public."""


def storage_id(tensor: Tensor) -> int:
    """Identity of the memory that a tensor lives in, a fake one's too.

    ``UntypedStorage._cdata`` is the address of the storage object, the same in torch 2.11 to 2.15. ``data_ptr()`` would
    replace it if fake tensors had one.
    """
    cell: int = tensor.untyped_storage()._cdata
    return cell


def version_of(tensor: Tensor) -> int:
    """How often a tensor's memory was written to; views share the count. Tensors of inference mode do not count.

    ``Tensor._version``, which PyTorch's notes on autograd describe; the same in torch 2.11 to 2.15.
    """
    return tensor._version


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that a view was made of, or the tensor itself.

    ``Tensor._base``, the same in torch 2.11 to 2.15. Nothing public tells the tensor from its memory.
    """
    return tensor if tensor._base is None else tensor._base


def unwrap_functorch(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``vmap`` and ``grad``, which has the memory that they have not.

    ``torch._C._functorch``, the same in torch 2.11 to 2.15. `torch.func` has no public way to look inside.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def have_tangents(values: Iterable[object]) -> bool:
    """Whether a tensor among some values is dual: carries a tangent of forward-mode differentiation.

    ``torch.autograd.forward_ad._current_level``, -1 outside of ``dual_level()`` and ``torch.func.jvp``; the same in
    torch 2.11 to 2.15. The public ``unpack_dual`` alone would cost every call the tensors' look-ups.
    """
    if forward_ad._current_level < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(isinstance(value, Tensor) and unpack(value).tangent is not None for value in values)


def fake_mode_of(value: object) -> FakeTensorMode | None:
    """The mode that a fake tensor belongs to; None for anything else.

    ``FakeTensor.fake_mode``, the same in torch 2.11 to 2.15. `detect_fake_mode` also finds the mode that is on.
    """
    mode = getattr(value, "fake_mode", None)
    return mode if isinstance(mode, FakeTensorMode) else None
