"""Whether a tensor stands for data in a graph that is being traced."""

from __future__ import annotations

from torch import Tensor

from infllm_pass.compat.tensors import FakeTensor, FunctionalTensor


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler traces with the tensor: it then has no data, and nothing runs on its device."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)
