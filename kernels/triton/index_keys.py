"""Index keys of token scores: which channels of a head they hold, how they are stored, and those of a whole prompt.

Channels are numbers of the program as long as they are few runs, as those that a rotary embedding suggests; else a
table on the device, written by a launch for each set, has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import BlockGeometry
from ..scorer import INDEX_DTYPES
from .launch import wrap_triton
from .tile_tables import padded_dim

KEY_FORM = tl.constexpr(0)
INT8_FORM = tl.constexpr(1)
FP8_FORM = tl.constexpr(2)
FORMS = {"key": KEY_FORM.value, "int8": INT8_FORM.value, "fp8": FP8_FORM.value}
"""How index keys are stored, as kernels know it."""

SLACK_KEYS = 1024
"""Index keys of memory behind the last one: block selection reads eight blocks at a time, without asking for an end."""

_RUN_BITS = 9
_MOST_RUNS = 3
"""Runs of channels whose numbers fit into a constant of 63 bits."""

_WORD_BITS = 32
_GATHERED_ROWS = 64
"""Keys of one program of `_index_keys_kernel`."""

CHANNEL_WORDS = tl.constexpr(8)
MOST_CHANNELS = tl.constexpr(256)


@dataclass(frozen=True)
class Channels:
    """The channels of a geometry, as kernels take them.

    Attributes:
        table: int32 ``[sets, padded channels]``, or any tensor where `code` has them.
        stride: numbers between the sets of two key/value heads.
        kept: channels of a set.
        runs: runs of the only set, 0 where the table counts.
        code: its runs: the first of its places and what channels there exceed those of the run before by.
    """

    table: Tensor
    stride: int
    kept: int
    runs: int
    code: int

    @property
    def padded(self) -> int:
        """What products pad a set to."""
        return padded_dim(self.kept)

    @property
    def constants(self) -> dict[str, int]:
        """What kernels are compiled for."""
        return {"KEPT": self.kept, "KP": self.padded, "RUNS": self.runs, "CODE": self.code}


def place_channels(geometry: BlockGeometry, like: Tensor) -> Channels:
    """The channels of a geometry, for kernels on the device of a tensor."""
    kept = geometry.score_dims
    if len(geometry.channels) == 1:
        runs, code = _encode_runs(geometry.channels[0])
        if runs <= _MOST_RUNS:
            return Channels(like, 0, kept, runs, code)
    padded, count = padded_dim(kept), len(geometry.channels)
    table = torch.empty(count, padded, dtype=torch.int32, device=like.device)
    for number, channels in enumerate(geometry.channels):
        wrap_triton(_channels_kernel)[(1,)](table, number * padded, *_words(channels))
    return Channels(table, padded if count > 1 else 0, kept, 0, 0)


@lru_cache
def _encode_runs(channels: tuple[int, ...]) -> tuple[int, int]:
    """How many runs ascending channels are, and `Channels.code`."""
    steps = [(0, channels[0])]
    steps += [(at, high - low - 1) for at, (low, high) in enumerate(pairwise(channels), 1) if high > low + 1]
    code = sum((place | step << _RUN_BITS) << 2 * _RUN_BITS * run for run, (place, step) in enumerate(steps))
    return len(steps), code


def _words(channels: tuple[int, ...]) -> list[int]:
    """A bit for every channel, in words with a sign."""
    bits = sum(1 << channel for channel in channels)
    words = [(bits >> _WORD_BITS * number) & 0xFFFFFFFF for number in range(CHANNEL_WORDS.value)]
    return [word - (1 << _WORD_BITS) if word >> (_WORD_BITS - 1) else word for word in words]


@triton.jit(do_not_specialize=["first", "word0", "word1", "word2", "word3", "word4", "word5", "word6", "word7"])
def _channels_kernel(table, first, word0, word1, word2, word3, word4, word5, word6, word7):
    """Write the numbers of the bits that are set, ascending, from `first` on."""
    channel = tl.arange(0, MOST_CHANNELS)
    words = (word0, word1, word2, word3, word4, word5, word6, word7)
    bits = tl.zeros([MOST_CHANNELS], tl.int32)
    for number in tl.static_range(CHANNEL_WORDS):
        bits = tl.where(channel // 32 == number, tl.cast(words[number], tl.int32), bits)
    kept = (bits >> (channel % 32)) & 1
    tl.store(table + first + tl.cumsum(kept, 0) - 1, channel, mask=kept != 0)


@triton.jit
def head_channels(table_row, places, KEPT: tl.constexpr, RUNS: tl.constexpr, CODE: tl.constexpr):
    """The channels of a head at some places of its set, from the program or from its row of the table."""
    if RUNS == 0:
        channels = tl.load(table_row + places, mask=places < KEPT, other=0)
    else:
        channels = places
        for run in tl.static_range(RUNS):
            begin = (CODE >> (18 * run)) % 512  # as `_encode_runs` packs them
            step = (CODE >> (18 * run + 9)) % 512
            channels = channels + tl.where(places >= begin, step, 0)
    return channels


@triton.jit
def stored_bits(ki, FORM: tl.constexpr):
    """Where index keys are stored; those of float8 as bytes, which kernels pack and unpack themselves."""
    if FORM == FP8_FORM:
        ki = ki.to(tl.pointer_type(tl.uint8), bitcast=True)
    return ki


@triton.jit
def _round_even(numbers):
    """Numbers below 2^22 rounded to whole ones, halves to even ones."""
    return (numbers + 12582912.0) - 12582912.0


@triton.jit
def _fp8_bits(numbers):
    """Numbers up to 448 as bits of float8_e4m3fn, rounded to nearest, halves to even."""
    size = tl.abs(numbers)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    unit = ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # 2 ** (3 - exponent)
    bits = ((exponent + 6) << 3) + _round_even(size * unit).to(tl.int32)
    return tl.where(numbers < 0.0, bits | 128, bits).to(tl.uint8)


@triton.jit
def store_index_keys(
    ki_at,  # [N, KP] addresses
    scale_at,  # [N] addresses, of keys of 8 bits
    keys,  # [N, KP], 0 past the last channel
    rows,  # [N] whether a key is stored
    inside,  # [N, KP] or [N, 1] which numbers are
    FORM: tl.constexpr,
):
    """Store index keys, those of 8 bits with the scale that makes the largest channel the largest number."""
    if FORM == KEY_FORM:
        tl.store(ki_at, keys, mask=inside)
    else:
        wide = keys.to(tl.float32)
        step = tl.div_rn(tl.max(tl.abs(wide), 1), 127.0 if FORM == INT8_FORM else 448.0)
        parts = tl.div_rn(wide, (tl.where(step > 0.0, step, 1.0))[:, None] + tl.zeros_like(wide))
        if FORM == INT8_FORM:
            tl.store(ki_at, _round_even(parts).to(tl.int8), mask=inside)
        else:
            tl.store(ki_at, _fp8_bits(parts), mask=inside)
        tl.store(scale_at, step, mask=rows)


@triton.jit
def unpack_index_keys(stored, dtype: tl.constexpr, FORM: tl.constexpr):
    """Index keys as they were loaded, in the queries' dtype and without their scales; exact in every dtype."""
    keys = stored
    if FORM == INT8_FORM:
        keys = stored.to(dtype)
    if FORM == FP8_FORM:
        # Bits of a float16 with an exponent that is 8 too low, also where float8 is subnormal.
        bits = stored.to(tl.int32)
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.int16)
        keys = (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
    return keys


@triton.jit(do_not_specialize=["length_k", "channel_stride"])
def _index_keys_kernel(
    k,
    ki,  # as in `IndexKeys`
    scales,
    channels,
    length_k,
    heads,
    stride_b,
    stride_h,
    stride_t,
    channel_stride,
    KEPT: tl.constexpr,
    KP: tl.constexpr,
    RUNS: tl.constexpr,
    CODE: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, KP)
    channel = head_channels(channels + head * channel_stride, dims, KEPT, RUNS, CODE)
    there = row < length_k
    at = k + batch * stride_b + head * stride_h + row.to(tl.int64)[:, None] * stride_t + channel[None, :]
    keys = tl.load(at, mask=there[:, None] & (dims < KEPT)[None, :], other=0.0)
    to = pair * length_k + row
    ki_at = stored_bits(ki, FORM) + to[:, None] * KP + dims[None, :]
    store_index_keys(ki_at, scales + to, keys, there, there[:, None], FORM)


@dataclass(frozen=True)
class IndexKeys:
    """Index keys of a prompt, with the memory behind them that block selection may read; it holds anything.

    Attributes:
        keys: ``[B * Hkv * Lk + SLACK_KEYS, padded channels]``, contiguous; channels past the last hold 0.
        scales: float32 ``[B * Hkv * Lk + SLACK_KEYS]`` for keys of 8 bits; None: they have none.
    """

    keys: Tensor
    scales: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [self.keys] if self.scales is None else [self.keys, self.scales]


def index_keys(k: Tensor, *, geometry: BlockGeometry) -> IndexKeys:
    """The channels of every key that token scores read.

    Args:
        k: ``[B, Hkv, Lk, D]``, last stride 1.
        geometry: the block geometry.

    Returns:
        Index keys in k's dtype, or in 8 bits with a scale a key.
    """
    batch, heads, length, _ = k.shape
    count = batch * heads * length + SLACK_KEYS
    channels = place_channels(geometry, k)
    keys = torch.empty(count, channels.padded, dtype=INDEX_DTYPES.get(geometry.score_dtype, k.dtype), device=k.device)
    plain = geometry.score_dtype == "key"
    scales = None if plain else torch.empty(count, dtype=torch.float32, device=k.device)
    wrap_triton(_index_keys_kernel)[(triton.cdiv(length, _GATHERED_ROWS), batch * heads)](
        k,
        keys,
        k if scales is None else scales,
        channels.table,
        length,
        heads,
        *k.stride()[:3],
        channels.stride,
        **channels.constants,
        FORM=FORMS[geometry.score_dtype],
        ROWS=_GATHERED_ROWS,
    )
    return IndexKeys(keys, scales)
