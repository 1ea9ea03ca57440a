"""Launch configurations of the Triton kernels, and the measurement that chose each.

One row a kernel, architecture and size class; where no row fits, the generic configuration of the architecture
holds, which is safe (it fits every sm_80 and later) but not tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .launch import is_recorded

AnyLaunch = TypeVar("AnyLaunch", bound="Launch")


@dataclass(frozen=True)
class Launch:
    """What a launch adds to a kernel's arguments.

    Attributes:
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        max_keys: most keys, a power of two, that one step of a loop over key blocks takes.
        rows: rows (queries x heads), a power of two, that a program or one step of a loop over queries takes.
        held: whether a program keeps queries in registers rather than in shared memory (the forward: half of each).
        registers: most registers of one thread; None: as many as the assembler likes.
        recorded: what holds instead where a compiler records the launch itself, which drops `registers`.
    """

    num_warps: int = 4
    num_stages: int = 2
    max_keys: int = 64
    rows: int = 64
    held: bool = False
    registers: int | None = None
    recorded: Launch | None = None

    @property
    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}

    def as_launched(self: AnyLaunch, kernel: Any) -> AnyLaunch:
        """What holds for a launch of the kernel: `recorded`, if there is one and a compiler records the launch."""
        if self.recorded is None or not is_recorded(kernel):
            return self
        return cast(AnyLaunch, self.recorded)  # of the same kind

    def step_keys(self, block_size: int) -> int:
        """Keys of one step: the largest power of two that divides the block, `max_keys` at most."""
        return min(block_size & -block_size, self.max_keys)


MEASURED: dict[tuple[str, int, int, int], Launch] = {
    ("attention_forward", 90, 2, 64): Launch(num_stages=3),
    # Three programs a multiprocessor: 22.0 ms against 24.6 with two (128k tokens, 32 query and 2 key/value heads).
    ("attention_forward", 90, 2, 128): Launch(held=True, registers=168, recorded=Launch(num_stages=3, held=True)),
    ("query_gradient", 90, 2, 64): Launch(num_stages=3),
    # 25.5 ms, against 28.7 where the queries lie in shared memory, which then holds two stages only.
    ("query_gradient", 90, 2, 128): Launch(num_stages=3, held=True),
    ("attention_backward_keys", 90, 2, 64): Launch(),
    ("attention_backward_keys", 90, 2, 128): Launch(),
}
"""Configurations by kernel, compute capability (90 for sm_90), bytes of an element, padded head_dim."""

GENERIC: dict[str | tuple[str, int, int], Launch] = {
    "compress": Launch(num_stages=3),
    ("attention_forward", 2, 256): Launch(num_warps=8, max_keys=32),
    ("attention_forward", 4, 64): Launch(max_keys=32),
    ("attention_forward", 4, 128): Launch(num_warps=8, max_keys=32),
    ("attention_forward", 4, 256): Launch(num_warps=8, max_keys=16, rows=32),
    ("query_gradient", 2, 256): Launch(max_keys=16),
    ("query_gradient", 4, 64): Launch(max_keys=16),
    ("query_gradient", 4, 128): Launch(num_warps=8, max_keys=16),
    ("query_gradient", 4, 256): Launch(num_warps=8, num_stages=1, max_keys=16, rows=32),
    ("attention_backward_keys", 2, 64): Launch(rows=32),
    ("attention_backward_keys", 2, 128): Launch(rows=32),
    ("attention_backward_keys", 2, 256): Launch(num_warps=8, max_keys=32, rows=32),
    ("attention_backward_keys", 4, 64): Launch(num_warps=8, max_keys=32, rows=32),
    ("attention_backward_keys", 4, 128): Launch(num_warps=8, num_stages=1, max_keys=32, rows=32),
    ("attention_backward_keys", 4, 256): Launch(num_warps=8, num_stages=1, max_keys=16, rows=16),
}
"""Configurations where nothing was measured, by kernel, or by kernel, bytes of an element and the largest padded
head_dim that the row covers (64, 128 or 256). They need at most 99 KB of shared memory, what sm_86 and sm_89 have."""


def launch_for(kernel: str, tensor: Tensor, head_dim: int) -> Launch:
    """The configuration of a kernel on the tensor's device, for its dtype and the padded head dimension."""
    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return launch_on(kernel, 10 * major + minor, tensor.element_size(), head_dim)
    return launch_on(kernel, 0, tensor.element_size(), head_dim)


def launch_on(kernel: str, capability: int, element_size: int, head_dim: int) -> Launch:
    """The configuration of a kernel where the device is known by its capability alone."""
    measured = MEASURED.get((kernel, capability, element_size, head_dim))
    if measured is not None:
        return measured
    covering = next(size for size in (64, 128, 256) if head_dim <= size)
    return GENERIC.get((kernel, element_size, covering), GENERIC.get(kernel, Launch()))


@dataclass(frozen=True)
class SelectionLaunch(Launch):
    """Sizes of the selection kernel's products.

    Attributes:
        columns: tokens x heads of one product, at most.
        windows: compressed keys of one step of scoring.
        coarse: coarse keys of one step of the normaliser.
        rows: queries whose blocks are ranked at once.
        programs: persistent programs for each multiprocessor.
    """

    columns: int = 128
    windows: int = 64
    coarse: int = 64
    rows: int = 32
    programs: int = 2

    def for_panel(self, rows: int) -> SelectionLaunch:
        """The same for a panel's number of rows: from 64 on, a single program of eight warps, which share the registers
        that hold the rows' scores.
        """
        return self if rows <= 32 else replace(self, num_warps=8, programs=1)


MEASURED_SELECTION: dict[tuple[int, int, int], SelectionLaunch] = {
    # H100, 32/8 heads, 128k tokens, 64 blocks: 4 warps with 64 windows 28 ms; 8 warps with 128 windows 36 ms; three
    # programs a multiprocessor, which spill, 38 ms; 128 coarse keys a step 46 ms.
    (90, 2, 64): SelectionLaunch(num_stages=3),
    (90, 2, 128): SelectionLaunch(num_stages=3),
    (90, 2, 256): SelectionLaunch(windows=32, coarse=32),
}
"""By compute capability, bytes of an element, padded head_dim."""


def selection_launch(tensor: Tensor, head_dim: int) -> SelectionLaunch:
    """The configuration of block selection on the tensor's device."""
    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        row = MEASURED_SELECTION.get((10 * major + minor, tensor.element_size(), head_dim))
        if row is not None:
            return row
    return generic_selection(tensor.element_size(), head_dim)


def generic_selection(size: int, head_dim: int) -> SelectionLaunch:
    """A configuration that fits 99 KB of shared memory, by bytes of an element and padded head dimension."""
    if size == 4:
        return SelectionLaunch(num_warps=8, num_stages=1, columns=64, windows=32 if head_dim <= 128 else 16, coarse=16)
    if head_dim > 128:
        return SelectionLaunch(columns=64, windows=32, coarse=32)
    return SelectionLaunch()


@dataclass(frozen=True)
class GatherLaunch(Launch):
    """Sizes of the kernel that gathers the queries of a block.

    Attributes:
        programs: persistent programs for each multiprocessor.
        above: gathering is chosen where tiles visit more far blocks than this share, times the heads of a group, of
            those that their tokens choose.
        pool_bytes: memory for partial results.
        block_bytes: most bytes of a block's keys, or of its values.
        recorded: as for `Launch`.
    """

    programs: int = 2
    above: float = 0.0625
    pool_bytes: int = 1 << 28
    block_bytes: int = 1 << 14
    recorded: GatherLaunch | None = None


# H100, 32/8 heads, 64 blocks, random data: tiles take 0.285 ms (128k tokens; 0.070 at 32k) for each far block that they
# visit on average, gathering 35 (8.1) ms whatever the data; they meet at 123 (116) blocks, a quarter of what 16 tokens
# choose. A choice costs gathering as many rows as a group has heads, and a tile always 64: hence the share by heads.
# 46.2 ms at 128k with three programs of 168 registers; 47.2 with two, three stages and no limit of registers.
MEASURED_GATHERING = GatherLaunch(programs=3, registers=168, recorded=GatherLaunch(num_stages=3))


def gather_launch(tensor: Tensor, head_dim: int) -> GatherLaunch | None:
    """The configuration of gathering on the tensor's device; None where it is not offered."""
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) == (9, 0) and head_dim <= 128:
        return MEASURED_GATHERING
    return None
