"""Launch configurations: typed records, and the tuning tables (``tuning/*.json``) that they are read from.

``tuning/sm_90.json`` holds what was measured on that architecture, ``tuning/generic.json`` what fits every GPU from
sm_80 on (99 KB of shared memory, what sm_86 and sm_89 have). A row names the kernel, the bytes of an element and the
padded head dimensions that it is for (either may be absent: any), the configuration's fields that differ from the
defaults below, and the measurement that chose them. The first row that matches holds; `benchmarks/tune.py` writes rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .launch import is_recorded

TUNING = Path(__file__).parent / "tuning"


@dataclass(frozen=True)
class LaunchConfig:
    """Launch options and tile sizes of one kernel.

    Attributes:
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        max_keys: most keys of one step over key blocks, a power of two.
        rows: rows (queries x heads) of a program or of one step over queries, a power of two.
        queries_in_registers: whether the query operand stays in registers instead of shared memory (the forward kernel:
            half of it).
        max_registers: limit on registers per thread (``maxnreg``); None: the assembler's choice.
        recorded: configuration used where a compiler records the launch, which drops `max_registers`.
    """

    num_warps: int = 4
    num_stages: int = 2
    max_keys: int = 64
    rows: int = 64
    queries_in_registers: bool = False
    max_registers: int | None = None
    recorded: LaunchConfig | None = None

    @property
    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}

    def as_launched(self: AnyLaunch, kernel: Any) -> AnyLaunch:
        """`recorded`, if there is one and a compiler records launches of the kernel; else this configuration."""
        if self.recorded is None or not is_recorded(kernel):
            return self
        return cast(AnyLaunch, self.recorded)  # of the same class

    def step_keys(self, block_size: int) -> int:
        """Keys of one step: the largest power of two that divides the block, `max_keys` at most."""
        return min(block_size & -block_size, self.max_keys)


AnyLaunch = TypeVar("AnyLaunch", bound=LaunchConfig)


@dataclass(frozen=True)
class SelectionConfig(LaunchConfig):
    """Block selection: tile sizes of scoring and ranking.

    Attributes:
        columns: tokens x heads of one product, at most.
        windows: compressed keys, or index keys of tokens, of one scoring step.
        normaliser_keys: compressed keys of one step of the normaliser.
        rows: queries ranked at once.
        programs: persistent programs per multiprocessor.
    """

    columns: int = 128
    windows: int = 64
    normaliser_keys: int = 64
    rows: int = 32
    programs: int = 2

    def for_panel(self, rows: int) -> SelectionConfig:
        """The configuration for a panel of so many rows: from 64 on, one program of eight warps, since the rows' scores
        are kept in registers.
        """
        return self if rows <= 32 else replace(self, num_warps=8, programs=1)


@dataclass(frozen=True)
class ScatteredConfig(LaunchConfig):
    """Key-stationary attention to the scored blocks of scattered selections, or its gradient of q.

    Attributes:
        programs: persistent programs per multiprocessor.
        threshold: the kernel runs where tiles visit more scored blocks than this share, times the padded group, of
            those that their tokens select.
        pool_bytes: memory for partial results.
        block_bytes: most bytes of one block's keys, or values.
        recorded: as for `LaunchConfig`.
    """

    programs: int = 2
    threshold: float = 0.0625
    pool_bytes: int = 1 << 28
    block_bytes: int = 1 << 14
    recorded: ScatteredConfig | None = None


@dataclass(frozen=True)
class DecodeConfig:
    """The kernels of a decode step.

    Attributes:
        chunk: coarse keys per program of compression and normaliser; a multiple of 8.
        keys: keys of one compression step.
        compress_warps: warps of a program of compression, or of token scores.
        compress_stages: depth of its software pipeline.
        token_blocks: blocks per program of token scores; a multiple of 8.
        token_keys: index keys of one of its steps.
        token_stages: depth of its software pipeline.
        blocks: key blocks per scoring program.
        score_warps: warps of a scoring program.
        score_stages: depth of its software pipeline.
        fused_rank_heads: key/value heads up to which steps of one token rank in the scoring kernel: one launch less,
            but scoring then uses more registers.
        rank_blocks: blocks that ranking keeps in registers, a power of two.
        rank_warps: warps of a ranking program.
        step_keys: most keys, a power of two, of one attention step.
        attend_warps: warps of an attention program.
        attend_stages: depth of its software pipeline.
        prefetch_visits: visits whose keys and values an attention program prefetches before it waits for the previous
            kernel.
        programs: attention programs per multiprocessor, about, where the work can be split so far.
    """

    chunk: int = 64
    keys: int = 64
    compress_warps: int = 4
    compress_stages: int = 2
    token_blocks: int = 16
    token_keys: int = 128
    token_stages: int = 3
    blocks: int = 32
    score_warps: int = 4
    score_stages: int = 4
    fused_rank_heads: int = 4
    rank_blocks: int = 2048
    rank_warps: int = 4
    step_keys: int = 64
    attend_warps: int = 4
    attend_stages: int = 2
    prefetch_visits: int = 4
    programs: int = 2

    @staticmethod
    def warps(usual: int, columns: int) -> int:
        """Warps of a program with so many columns (or rows): more where one token's heads are more than 64."""
        return usual if columns <= 64 else 8


AnyConfig = TypeVar("AnyConfig", LaunchConfig, SelectionConfig, ScatteredConfig, DecodeConfig)

CLASSES: dict[str, type[Any]] = {
    "compress": LaunchConfig,
    "select": SelectionConfig,
    "select_tokens": SelectionConfig,
    "attention_forward": LaunchConfig,
    "scattered": ScatteredConfig,
    "query_gradient": LaunchConfig,
    "scattered_gradient": ScatteredConfig,
    "key_gradients": LaunchConfig,
    "decode": DecodeConfig,
}
"""The class of a kernel's configuration, by the name that rows give the kernel."""


@dataclass(frozen=True)
class Row:
    """One row of a tuning table; None stands for any."""

    kernel: str
    element_size: int | None
    head_dims: tuple[int, ...] | None
    config: Any

    def matches(self, kernel: str, element_size: int, head_dim: int) -> bool:
        """Whether the row is for such a launch."""
        return (
            self.kernel == kernel
            and self.element_size in (None, element_size)
            and (self.head_dims is None or head_dim in self.head_dims)
        )


def read_table(file: Path) -> tuple[Row, ...]:
    """The rows of a tuning table; none where there is no such file."""
    if not file.exists():
        return ()
    rows = []
    for row in json.loads(file.read_text())["rows"]:
        kind, fields = CLASSES[row["kernel"]], dict(row["config"])
        if "recorded" in fields:
            fields["recorded"] = kind(**fields["recorded"])
        dims = row.get("head_dims")
        rows.append(Row(row["kernel"], row.get("element_size"), None if dims is None else tuple(dims), kind(**fields)))
    return tuple(rows)


_overrides: ContextVar[dict[str, Any]] = ContextVar("infllm_launch_configs", default={})  # noqa: B039


@contextmanager
def override(**configs: Any) -> Iterator[None]:
    """Use the given configurations, by kernel name, for launches within: for tuning and for tests."""
    token = _overrides.set({**_overrides.get(), **configs})
    try:
        yield
    finally:
        _overrides.reset(token)


def find_config(
    kind: type[AnyConfig], kernel: str, capability: int, element_size: int, head_dim: int
) -> AnyConfig | None:
    """The configuration of a kernel on devices of a compute capability; None where it is not offered there.

    Args:
        kind: the class that `CLASSES` has for the kernel.
        kernel: the kernel's name in the tables.
        capability: 90 for sm_90; 0 for the interpreter.
        element_size: bytes of an element.
        head_dim: the padded head dimension, the larger one of keys and values.
    """
    given = _overrides.get().get(kernel)
    found = _look_up(kernel, capability, element_size, head_dim) if given is None else given
    assert found is None or isinstance(found, kind)
    return found


@cache
def _look_up(kernel: str, capability: int, element_size: int, head_dim: int) -> Any:
    rows = (*read_table(TUNING / f"sm_{capability}.json"), *read_table(TUNING / "generic.json"))
    return next((row.config for row in rows if row.matches(kernel, element_size, head_dim)), None)


def optional_config(kind: type[AnyConfig], kernel: str, tensor: Tensor, head_dim: int) -> AnyConfig | None:
    """As `find_config`, for the tensor's device and dtype."""
    capability = 0
    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        capability = 10 * major + minor
    return find_config(kind, kernel, capability, tensor.element_size(), head_dim)


def config_for(kind: type[AnyConfig], kernel: str, tensor: Tensor, head_dim: int) -> AnyConfig:
    """As `optional_config`, for kernels that every device runs."""
    config = optional_config(kind, kernel, tensor, head_dim)
    assert config is not None, f"tuning/generic.json has no row for {kernel} with head dimension {head_dim}"
    return config
