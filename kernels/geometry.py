"""Sizes that describe one block selection (InfLLM-V2, arXiv 2509.24663, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

from infllm_pass.errors import ConfigError

LseMode = Literal["coarse", "exact"]

ScorerName = Literal["pooled", "tokens"]

ScoreDtype = Literal["key", "int8", "fp8"]

ChannelSets = tuple[tuple[int, ...], ...]
"""Channels of a head that token scores read, ascending: one set for all key/value heads, or one for each."""

_KEYS = {
    "l": "kernel_size",
    "s": "kernel_stride",
    "b": "block_size",
    "init": "init_blocks",
    "local": "local_blocks",
    "sel": "selected_blocks",
    "lse": "lse",
    "qb": "query_block",
    "score": "scorer",
    "ch": "channels",
    "idx": "score_dtype",
    "agn": "agnostic_blocks",
}
"""Names of `BlockGeometry.format` and the fields that they stand for."""

_WORDS = {"lse": LseMode, "score": ScorerName, "idx": ScoreDtype}
"""Those that are words, and which."""

COARSE_FACTOR = 4
"""Coarse keys ``K2`` pool windows this many times longer, and further apart, than ``K1``."""


@dataclass(frozen=True)
class BlockGeometry:
    """The numbers a kernel needs to select blocks; lengths in tokens, budgets in blocks.

    Attributes:
        kernel_size: tokens averaged into one compressed key ``K1`` (``l``).
        kernel_stride: tokens between the starts of two compressed keys (``s``).
        block_size: tokens in one key block.
        init_blocks: blocks at the start of a sequence that every query visits.
        local_blocks: blocks before the query's own block that it always visits.
        selected_blocks: blocks visited in all, forced ones included.
        lse: the normaliser of the block scores: over the coarse keys ``K2`` (the paper's
            approximation) or over ``K1`` (exact).
        query_block: adjacent queries, aligned in absolute position, that share one selection.
        scorer: how blocks are scored, see `kernels.scorer`.
        channels: channels that token scores read; () for pooled scores.
        score_dtype: what index keys of token scores are stored in: k's dtype, or 8 bits with a scale a token.
        agnostic_blocks: how many of `selected_blocks` are chosen by the importance of their keys, whatever the query
            (NOSA, arXiv 2510.13602); 0: none.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    local_blocks: int = 32
    selected_blocks: int = 96
    lse: LseMode = "coarse"
    query_block: int = 1
    scorer: ScorerName = "pooled"
    channels: ChannelSets = ()
    score_dtype: ScoreDtype = "key"
    agnostic_blocks: int = 0

    def format(self) -> str:
        """The geometry as text, one for each.

        ``l=32,s=16,b=64,init=1,local=32,sel=96,lse=coarse,qb=1,score=pooled,ch=,idx=key,agn=0``; channels are written
        as runs, such as ``16-31+48-63``, the sets of different heads with ``/`` between them.
        """
        # A tracing compiler may hold the numbers as symbols: `int` gives their values.
        return (
            f"l={int(self.kernel_size)},s={int(self.kernel_stride)},b={int(self.block_size)},"
            f"init={int(self.init_blocks)},local={int(self.local_blocks)},sel={int(self.selected_blocks)},"
            f"lse={self.lse},qb={int(self.query_block)},score={self.scorer},"
            f"ch={format_channels(self.channels)},idx={self.score_dtype},agn={int(self.agnostic_blocks)}"
        )

    @staticmethod
    @lru_cache
    def parse(text: str) -> BlockGeometry:
        """The geometry that `format` wrote.

        Raises:
            ConfigError: the text is not one of `format`.
        """
        given = dict(entry.split("=", 1) for entry in text.split(",") if "=" in entry)
        if set(given) != set(_KEYS) or any(given[key] not in get_args(words) for key, words in _WORDS.items()):
            raise ConfigError("geometry", text, f"a text such as {BlockGeometry().format()!r}")
        try:
            fields: dict[str, Any] = {
                _KEYS[key]: each if key in _WORDS else int(each) for key, each in given.items() if key != "ch"
            }
            return BlockGeometry(**fields, channels=parse_channels(given["ch"]))
        except ValueError:
            raise ConfigError("geometry", text, "integers as sizes") from None

    @property
    def query_aware(self) -> BlockGeometry:
        """What is selected before the query-agnostic blocks: forced blocks and the best scored."""
        if not self.agnostic_blocks:
            return self
        return replace(self, selected_blocks=self.selected_blocks - self.agnostic_blocks, agnostic_blocks=0)

    @property
    def score_dims(self) -> int:
        """Channels that token scores read; 0 for pooled scores."""
        return len(self.channels[0]) if self.channels else 0

    def num_compressed(self, length: int) -> int:
        """Complete ``K1`` windows in a sequence of ``length`` keys."""
        return max(0, (length - self.kernel_size) // self.kernel_stride + 1)

    def num_coarse(self, length: int) -> int:
        """Complete ``K2`` windows in a sequence of ``length`` keys."""
        size, stride = COARSE_FACTOR * self.kernel_size, COARSE_FACTOR * self.kernel_stride
        return max(0, (length - size) // stride + 1)

    def num_blocks(self, length: int) -> int:
        """Key blocks, the last one possibly partial, in a sequence of ``length`` keys."""
        return -(-length // self.block_size)


def format_channels(sets: ChannelSets) -> str:
    """Sets of channels as runs, ``16-31+48-63``, those of different heads with ``/`` between them; "" for none."""
    return "/".join("+".join(f"{run[0]}-{run[-1]}" for run in channel_runs(channels)) for channels in sets)


def parse_channels(text: str) -> ChannelSets:
    """What `format_channels` wrote.

    Raises:
        ValueError: the text is not one of `format_channels`.
    """
    runs = [[run.split("-") for run in part.split("+")] for part in text.split("/")] if text else []
    return tuple(tuple(n for first, last in part for n in range(int(first), int(last) + 1)) for part in runs)


def channel_runs(numbers: Sequence[int]) -> list[Sequence[int]]:
    """Ascending numbers, cut where one is left out; each part is a slice of adjacent channels."""
    cuts = [at for at, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]
    return [numbers[begin:end] for begin, end in pairwise([0, *cuts, len(numbers)])]
