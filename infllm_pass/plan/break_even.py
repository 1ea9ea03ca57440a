"""``dense_len="auto"``: the length from which sparse attention is no slower than dense attention, from measured rows.

Rows come with the package (``break_even.json``, from the benchmarks) and from the user's machine, which
``infllm-pass tune`` measures. A geometry or device without a row gets the nearest one's length, scaled by the blocks
that a query visits, and is reported as estimated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from infllm_pass.config import SparseAttentionConfig, default_score_dims
from infllm_pass.errors import TuningError
from infllm_pass.lowering.export.atomic_file import written_whole

PACKAGED = Path(__file__).with_name("break_even.json")
USER_FILE = "INFLLM_BREAK_EVEN"
"""Environment variable: the file of the user's rows."""

SLOWER_SCORES = {"cpu": 1.25, "cuda": 1.7}
"""A row of pooled scores gives token scores a length this many times as long: 1.3 to 1.7 on an H200, by geometry; on a
CPU their selection takes twice as long.
"""

NEVER = 2**31 - 1
"""The length of a row whose attention was no faster sparse at any length that was measured."""

OTHER_DEVICE, OTHER_SCORER = 1.0, 1.5
"""How unlike a row of another GPU or another scorer is, where a geometry with twice the group is 1. From one query head
a key/value head to sixteen the length falls to a fourth; between an H100 and an H200 it differs by 6 %.
"""

MULTIPLE = 256
"""Lengths are rounded up to a multiple of so many tokens."""


@dataclass(frozen=True)
class BreakEvenRow:
    """One measured break-even length.

    Attributes:
        device: name of the GPU as CUDA gives it, or "cpu".
        scorer: how blocks are scored.
        query_heads: query heads ``Hq``.
        kv_heads: key/value heads ``Hkv``.
        head_dim: channels of a head ``D``.
        selected_blocks: blocks that a query visits in all.
        block_size: tokens of a block.
        query_block: adjacent queries that share one selection.
        length: tokens from which sparse attention was no slower than dense attention.
        source: where the number comes from.
        score_dims: channels that token scores read; None: the default for the head.
    """

    device: str
    scorer: str
    query_heads: int
    kv_heads: int
    head_dim: int
    selected_blocks: int
    block_size: int
    query_block: int
    length: int
    source: str
    score_dims: int | None = None

    @property
    def visited_tokens(self) -> int:
        """Tokens in a full budget of blocks."""
        return self.selected_blocks * self.block_size


@dataclass(frozen=True)
class AttentionPlace:
    """Where attention runs, and its heads.

    Attributes:
        device: as in `BreakEvenRow`.
        query_heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels of a head.
        score_dims: channels that token scores read of a head there; None: as many as the configuration says. Where
            no rotary embedding tells which ones matter, they are all.
    """

    device: str
    query_heads: int
    kv_heads: int
    head_dim: int
    score_dims: int | None = None


@dataclass(frozen=True)
class BreakEven:
    """A length, and where it comes from, in words."""

    length: int
    origin: str


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a property of the device
def device_name(device: torch.device) -> str:
    """What rows call a device: a GPU's name, "cpu", or the type of any other, as of tensors that no GPU holds."""
    named = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if named else device.type


def user_file() -> Path:
    """The file of the user's rows: `USER_FILE`, or ``infllm_pass/break_even.json`` in the user's cache folder."""
    given = os.environ.get(USER_FILE)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "infllm_pass" / "break_even.json"


def break_even(config: SparseAttentionConfig, place: AttentionPlace) -> BreakEven:
    """The length from which attention is to be sparse.

    Args:
        config: what is selected; its ``dense_len`` is not read.
        place: where attention runs.

    Raises:
        TuningError: the user's file is damaged.
    """
    rows = [*_rows(PACKAGED), *_user_rows()]
    kind = [row for row in rows if (row.device == "cpu") == (place.device == "cpu")]
    near = min(reversed(kind), key=lambda row: _distance(row, config, place))  # the user's rows come first
    scale = max(config.selected_blocks * config.block_size / near.visited_tokens, 0.5)
    if (near.scorer, config.scorer) == ("pooled", "tokens"):
        scale *= SLOWER_SCORES["cpu" if place.device == "cpu" else "cuda"]
    scale *= max(_more_channels(near, config, place), 1.0)
    length = min(math.ceil(near.length * scale / MULTIPLE) * MULTIPLE, NEVER)
    if _distance(near, config, place) == 0:
        return BreakEven(length, f"break-even measured: {near.source}")
    heads = f"{near.query_heads}x{near.kv_heads}x{near.head_dim}, {near.selected_blocks} blocks, {near.scorer} scores"
    return BreakEven(length, f"break-even estimated from {near.device}, {heads}; `infllm-pass tune` measures it")


def resolved(config: SparseAttentionConfig, place: AttentionPlace) -> SparseAttentionConfig:
    """The configuration with a number as ``dense_len``, the same for as long as the process runs or keeps no new rows.

    Raises:
        TuningError: see `break_even`.
    """
    return _resolved(config, place, os.environ.get(USER_FILE)) if config.dense_len == "auto" else config


@lru_cache
def _resolved(config: SparseAttentionConfig, place: AttentionPlace, _user_file: str | None) -> SparseAttentionConfig:
    return config.with_dense_len(break_even(config, place).length)


def add_user_rows(rows: Iterable[BreakEvenRow]) -> Path:
    """Keep rows in the user's file, in place of those of the same device and geometry.

    Returns:
        The file.

    Raises:
        TuningError: the file is damaged.
        ExportError: the operating system refuses to write it.
    """
    path = user_file()
    kept = {_key(row): row for row in _rows(path)} if path.exists() else {}
    kept |= {_key(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps({"rows": [asdict(row) for row in kept.values()]}, indent=1) + "\n")
    _parsed.cache_clear()
    _resolved.cache_clear()
    return path


def _key(row: BreakEvenRow) -> tuple[Any, ...]:
    return tuple(value for name, value in asdict(row).items() if name not in ("length", "source"))


def _distance(row: BreakEvenRow, config: SparseAttentionConfig, place: AttentionPlace) -> float:
    """How unlike a row is; 0 for the row of this very case."""
    group, row_group = place.query_heads / place.kv_heads, row.query_heads / row.kv_heads
    pairs = (
        (group, row_group),
        (place.head_dim, row.head_dim),
        (config.selected_blocks * config.block_size, row.visited_tokens),
        (place.query_heads, row.query_heads),
        (config.query_block, row.query_block),
        (config.block_size, row.block_size),
        (_more_channels(row, config, place), 1.0),
    )
    geometry: float = sum(abs(math.log2(one / other)) for one, other in pairs)
    others = (row.device != place.device, OTHER_DEVICE), (row.scorer != config.scorer, OTHER_SCORER)
    return geometry + sum(weight for differs, weight in others if differs)


def _more_channels(row: BreakEvenRow, config: SparseAttentionConfig, place: AttentionPlace) -> float:
    """How many times the share of a head's channels that a row's token scores read is read at a place.

    From a quarter of the channels to all of them, break-even lengths grew by 3 to 4 on an H200.
    """
    if config.scorer != "tokens":
        return 1.0
    read = place.score_dims or config.score_dims_of(place.head_dim)
    row_read = row.score_dims or default_score_dims(row.head_dim)
    return (read / place.head_dim) / (row_read / row.head_dim)


def _user_rows() -> tuple[BreakEvenRow, ...]:
    path = user_file()
    return _rows(path) if path.exists() else ()


def _rows(path: Path) -> tuple[BreakEvenRow, ...]:
    return _parsed(path, path.stat().st_mtime_ns)


_JSON_TYPES = {"int": (int,), "str": (str,), "int | None": (int, type(None))}


@lru_cache
def _parsed(path: Path, _changed: int) -> tuple[BreakEvenRow, ...]:
    """The rows of a file.

    Raises:
        TuningError: it is not one of `add_user_rows`.
    """
    types = {field.name: _JSON_TYPES[str(field.type)] for field in fields(BreakEvenRow)}
    try:
        rows = json.loads(path.read_text())["rows"]
        read = tuple(BreakEvenRow(**row) for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise TuningError(f"{path} is damaged ({error}): delete it, or run `infllm-pass tune` anew") from error
    for row in read:
        for name, kinds in types.items():
            value = getattr(row, name)
            if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
                raise TuningError(f"{path} is damaged ({name}={value!r}): delete it, or run `infllm-pass tune` anew")
    return read
