"""The configuration of switchable attention, in the key names of MiniCPM4.1's ``sparse_config``."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias, get_args

from infllm_pass.errors import ConfigError
from infllm_pass.kernels.geometry import BlockGeometry, ChannelSets, LseMode, ScoreDtype, ScorerName

LEAST_SCORE_DIMS = 16
"""Channels that token scores read are a multiple of so many."""

SMALL_HEAD_DIMS = 32
"""Of small heads token scores read up to half, this many: 16 of 64 miss some of what is looked up."""

PUBLISHED: dict[str, Any] = {"scorer": "pooled", "dense_len": 8192}
"""What differs from the defaults in models that were trained with InfLLM-V2 (MiniCPM4.1)."""

CheckpointSaves: TypeAlias = Literal["nothing", "selection", "attention"]

WORDS: dict[str, Any] = {
    "lse": LseMode,
    "scorer": ScorerName,
    "score_dtype": ScoreDtype,
    "checkpoint_saves": CheckpointSaves,
}
"""Fields that are one of some words."""


def default_score_dims(head_dim: int) -> int:
    """Channels that token scores read if nobody says how many."""
    quarter, half = (-(-head_dim // (parts * LEAST_SCORE_DIMS)) * LEAST_SCORE_DIMS for parts in (4, 2))
    return min(max(quarter, min(half, SMALL_HEAD_DIMS)), head_dim)


@dataclass(frozen=True)
class SparseAttentionConfig:
    """What InfLLM-V2 attention selects, and from which length on (arXiv 2509.24663, section 3).

    Lengths are in tokens. A query visits `selected_blocks` key blocks in all: the first `init_blocks`,
    the ``window_size // block_size`` blocks before its own and its own, and the best scored of the rest.

    Attributes:
        kernel_size: tokens averaged into one compressed key.
        kernel_stride: tokens between the starts of two compressed keys.
        block_size: tokens in one key block.
        init_blocks: blocks at the start of the sequence that every query visits.
        window_size: tokens before a query's own block that it always visits.
        topk: blocks visited beside ``window_size // block_size``; init blocks and the own block count.
        dense_len: key length from which attention is sparse; shorter sequences stay dense. 0: always sparse; "auto":
            where sparse attention breaks even on the device at hand, see `plan.break_even`.
        use_nope: MiniCPM4.1's key for selecting with keys before RoPE; only False is supported.
        lse: normaliser of block scores, "coarse" (the paper's approximation) or "exact".
        query_block: adjacent queries that share one selection; 1 selects for every query.
        scorer: how blocks are scored: "pooled", the published score over means of windows of keys, or "tokens", the
            largest score of a block's tokens over a few channels of the head, which needs no training.
        score_dims: channels that "tokens" reads, a multiple of 16; None: a quarter of the head, 32 at
            least in heads of 64 and more, half of smaller ones.
        score_dtype: what these channels of the keys are stored in: "key", k's dtype, or "int8" or "fp8" with a scale
            a token.
        agnostic_topk: of the visited blocks, how many are chosen by the importance of their keys, the bias that the
            site adds to their scores, whatever the query (NOSA, arXiv 2510.13602); 0: none. Needs pooled scores and a
            site with such a bias.
        checkpoint_saves: what activation checkpointing saves of sparse attention instead of computing it again in the
            backward pass: "selection", the lists of selected blocks; "attention", the output and log-sum-exp as well;
            "nothing".

    Raises:
        ConfigError: a field has the wrong type or an invalid value.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64
    dense_len: int | Literal["auto"] = "auto"
    use_nope: bool = False
    lse: LseMode = "coarse"
    query_block: int = 1
    scorer: ScorerName = "tokens"
    score_dims: int | None = None
    score_dtype: ScoreDtype = "key"
    agnostic_topk: int = 0
    checkpoint_saves: CheckpointSaves = "selection"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "dense_len" and value == "auto":
                continue
            least = 0 if name in ("dense_len", "agnostic_topk") else 1
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
                auto = ', or "auto"' if name == "dense_len" else ""
                raise ConfigError(name, value, f"an integer of at least {least}{auto}")
            object.__setattr__(self, name, int(value))
        for name, divisor in (
            ("block_size", "kernel_stride"),
            ("kernel_size", "kernel_stride"),
            ("window_size", "block_size"),
        ):
            value, by = getattr(self, name), getattr(self, divisor)
            if value % by:
                raise ConfigError(name, value, f"a multiple of {divisor}={by}, such as {-(-value // by) * by}")
        least_topk = self.init_blocks + 1
        if self.topk < least_topk:
            raise ConfigError(
                "topk",
                self.topk,
                f"at least init_blocks + 1 = {least_topk}, so that the {self.init_blocks} initial blocks, "
                f"the {self.local_blocks} local blocks and the query's own block fit into the budget",
            )
        if self.use_nope is not False:
            raise ConfigError("use_nope", self.use_nope, "False: block selection reads the keys after RoPE")
        for name, words in WORDS.items():
            if getattr(self, name) not in get_args(words):
                raise ConfigError(name, getattr(self, name), "one of " + ", ".join(map(repr, get_args(words))))
        dims = self.score_dims
        if dims is not None:
            if isinstance(dims, bool) or not isinstance(dims, numbers.Integral) or dims < 1 or dims % LEAST_SCORE_DIMS:
                raise ConfigError("score_dims", dims, f"a multiple of {LEAST_SCORE_DIMS}, or None for the default")
            object.__setattr__(self, "score_dims", int(dims))
        if self.agnostic_topk:
            self._check_agnostic()

    def _check_agnostic(self) -> None:
        """Check what a selection of blocks by importance asks of the other fields."""
        unforced = self.topk - self.init_blocks - 1
        if self.agnostic_topk > unforced:
            raise ConfigError(
                "agnostic_topk",
                self.agnostic_topk,
                f"at most topk - init_blocks - 1 = {unforced}, the visited blocks that are neither initial nor local",
            )
        if self.scorer != "pooled":
            raise ConfigError("scorer", self.scorer, f'"pooled" with agnostic_topk={self.agnostic_topk}')
        if self.kernel_size - self.kernel_stride > self.window_size:
            raise ConfigError(
                "kernel_size",
                self.kernel_size,
                f"at most window_size + kernel_stride = {self.window_size + self.kernel_stride} with agnostic_topk, so "
                "that the importance of a block that is not local reaches no later key",
            )

    @property
    def local_blocks(self) -> int:
        """Blocks before the query's own that are always visited."""
        return self.window_size // self.block_size

    @property
    def selected_blocks(self) -> int:
        """Blocks a query visits in all, forced ones included (the paper's ``|I|``)."""
        return self.topk + self.local_blocks

    @property
    def visited_tokens(self) -> int:
        """Tokens in a full budget of blocks: up to this length sparse and dense attention agree."""
        return self.selected_blocks * self.block_size

    @property
    def switch_length(self) -> int:
        """``dense_len`` as a number.

        Raises:
            ConfigError: it is "auto", which only a device gives a number to.
        """
        if isinstance(self.dense_len, str):
            raise ConfigError("dense_len", self.dense_len, "a number here")
        return self.dense_len

    def with_dense_len(self, length: int) -> SparseAttentionConfig:
        """The same with another ``dense_len``."""
        return replace(self, dense_len=length)

    def score_dims_of(self, head_dim: int) -> int:
        """Channels that token scores read of a head with so many.

        Raises:
            ConfigError: `score_dims` is larger than the head.
        """
        if self.score_dims is None:
            return default_score_dims(head_dim)
        if self.score_dims > head_dim:
            raise ConfigError("score_dims", self.score_dims, f"at most the head size, {head_dim}")
        return self.score_dims

    def geometry_for(self, head_dim: int, channels: ChannelSets | None = None) -> BlockGeometry:
        """Sizes and scorer in the form that the kernels take.

        Args:
            head_dim: channels of a head, ``D``.
            channels: those that token scores read; None: all.

        Raises:
            ConfigError: `score_dims` is larger than the head.
        """
        if self.scorer == "pooled":
            return self.geometry
        self.score_dims_of(head_dim)
        every = (tuple(range(head_dim)),)
        return replace(self.geometry, scorer=self.scorer, channels=channels or every, score_dtype=self.score_dtype)

    @property
    def geometry(self) -> BlockGeometry:
        """The sizes alone, with the published score, in the form that the kernels take."""
        return BlockGeometry(
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            block_size=self.block_size,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            selected_blocks=self.selected_blocks,
            lse=self.lse,
            query_block=self.query_block,
            agnostic_blocks=self.agnostic_topk,
        )

    @classmethod
    def nosa(cls) -> SparseAttentionConfig:
        """What the released NOSA models were trained with (arXiv 2510.13602; openbmb/NOSA-1B, -3B and -8B).

        Of 64 blocks 18 are forced, 15 have the best scores, under the exact normaliser, and 31 the largest importance;
        attention is sparse at every length.
        """
        return cls(window_size=1024, topk=48, dense_len=0, lse="exact", scorer="pooled", agnostic_topk=31)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseAttentionConfig:
        """Build from a mapping such as a model's ``sparse_config``.

        Raises:
            ConfigError: a key is not a field (the message names the nearest one), or a value is invalid.
        """
        known = [field.name for field in fields(cls)]
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(str(key), value, f"{hint}known keys are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_model_config(cls, config: object) -> SparseAttentionConfig:
        """Read ``config.sparse_config`` of a model configuration (MiniCPM4, MiniCPM4.1).

        Such a model was trained with the published score: what the mapping leaves out is as published.

        Raises:
            ConfigError: the configuration has no ``sparse_config``, or it is invalid.
        """
        values = getattr(config, "sparse_config", None)
        if not isinstance(values, Mapping):
            raise ConfigError(
                "sparse_config",
                values,
                f"a mapping on {type(config).__name__}, as MiniCPM4.1's config.json has",
            )
        return cls.from_dict({**PUBLISHED, **values})

    @classmethod
    def coerce(cls, value: object) -> SparseAttentionConfig:
        """Accept a config, a mapping, a model configuration with ``sparse_config``, or None for the defaults.

        Raises:
            ConfigError: the value is none of these, or holds invalid fields.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if hasattr(value, "sparse_config"):
            return cls.from_model_config(value)
        raise ConfigError(
            "config",
            value,
            "a SparseAttentionConfig, a dict of its fields, or a model config with sparse_config",
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict that `from_dict` reads back."""
        return asdict(self)


_COUNTS = (
    "kernel_size",
    "kernel_stride",
    "block_size",
    "init_blocks",
    "window_size",
    "topk",
    "dense_len",
    "query_block",
    "agnostic_topk",
)
