"""Launch configurations of the Triton kernels, and the measurement that chose each.

One row a kernel, architecture and size class; where no row fits, the generic configuration of the architecture
holds, which is safe (it fits every sm_80 and later) but not tuned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """What a launch adds to a kernel's arguments.

    Attributes:
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
    """

    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


MEASURED: dict[tuple[str, int, int, int], Launch] = {}
"""Configurations by kernel, compute capability (90 for sm_90), bytes of an element, padded head_dim."""

GENERIC: dict[str, Launch] = {}
"""Configurations by kernel where nothing was measured."""


def launch_for(kernel: str, tensor: Tensor, head_dim: int) -> Launch:
    """The configuration of a kernel on the tensor's device, for its dtype and the padded head dimension."""
    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        row = MEASURED.get((kernel, 10 * major + minor, tensor.element_size(), head_dim))
        if row is not None:
            return row
    return GENERIC.get(kernel, Launch())
