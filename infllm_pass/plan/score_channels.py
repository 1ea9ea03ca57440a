"""Which channels of a site's keys token scores read: given, read off the rotary embedding, or all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infllm_pass.config import LEAST_SCORE_DIMS, SparseAttentionConfig
from infllm_pass.errors import ConfigError
from infllm_pass.kernels.geometry import ChannelSets
from infllm_pass.sites.rotary import Rotary

CALIBRATE = "all channels are read; calibrate to use fewer"


@dataclass(frozen=True)
class ScoreChannels:
    """The channels that a site's token scores read.

    Attributes:
        sets: ascending channels, one set for all key/value heads or one for each.
        origin: what they were chosen by, for people.
    """

    sets: ChannelSets
    origin: str

    def described(self, head_dim: int) -> str:
        """The scores in a few words, such as ``tokens 32 of 128: lowest rotary frequencies, half-split``."""
        return f"tokens {len(self.sets[0])} of {head_dim}: {self.origin}"


def from_rotary(rotary: Rotary | str, head_dim: int, config: SparseAttentionConfig) -> ScoreChannels:
    """Channels that a rotary embedding leaves alone, then whole pairs of its lowest frequencies.

    High frequencies tell positions, which the local blocks cover; what a token is about lies in the rest.

    Args:
        rotary: the keys' rotary embedding, or why none is known: then all channels are read.
        head_dim: channels of a key.
        config: says how many channels are read.

    Raises:
        ConfigError: more than the head has.
    """
    wanted = config.score_dims_of(head_dim)
    every = tuple(range(head_dim))
    if wanted == head_dim:
        return ScoreChannels((every,), "all channels")
    if isinstance(rotary, str):
        return ScoreChannels((every,), f"{rotary}: {CALIBRATE}")
    plain = rotary.unrotated[: wanted - wanted % 2]
    plain = plain[: len(plain) - len(plain) % 2]
    pairs = rotary.pairs[: (wanted - len(plain)) // 2]
    chosen = tuple(sorted([*plain, *(channel for pair in pairs for channel in pair)]))
    if len(chosen) != wanted:  # an odd number of channels without a mate
        return ScoreChannels((every,), f"its channels do not make up {wanted} in whole pairs: {CALIBRATE}")
    parts = []
    if plain:
        parts.append("channels without rotation" if not pairs else f"{len(plain)} channels without rotation")
    if pairs:
        parts.append(f"lowest rotary frequencies, {rotary.pairing}" + (f", {rotary.order}" if rotary.order else ""))
    return ScoreChannels((chosen,), ", then ".join(parts))


def checked_sets(sets: object, head_dim: int, kv_heads: int, config: SparseAttentionConfig) -> ChannelSets:
    """Sets of channels that somebody gave for a site, as the kernels take them.

    Args:
        sets: a sequence of channels for all key/value heads, or a sequence of one such for each.
        head_dim: channels of a key.
        kv_heads: key/value heads of the site.
        config: the site's configuration; its `score_dims`, if any, must be their number.

    Raises:
        ConfigError: they do not fit the site or the configuration.
    """
    given = _as_sets(sets)
    if given is None:
        raise ConfigError("channels", sets, "ascending channel numbers, or a sequence of them for each key/value head")
    if len(given) not in (1, kv_heads):
        raise ConfigError("channels", sets, f"one set, or one for each of the site's {kv_heads} key/value heads")
    counts = {len(channels) for channels in given}
    count = next(iter(counts))
    if len(counts) != 1 or count < 1 or (count % LEAST_SCORE_DIMS and count != head_dim):
        raise ConfigError("channels", sets, f"sets of one size, a multiple of {LEAST_SCORE_DIMS} or the whole head")
    if config.score_dims is not None and count not in (config.score_dims, head_dim):
        raise ConfigError("channels", sets, f"sets of score_dims={config.score_dims} channels")
    for channels in given:
        if list(channels) != sorted(set(channels)) or channels[0] < 0 or channels[-1] >= head_dim:
            raise ConfigError("channels", sets, f"different channels of 0 to {head_dim - 1}, ascending")
    return given


def _as_sets(sets: object) -> ChannelSets | None:
    if not isinstance(sets, Sequence) or isinstance(sets, str) or not sets:
        return None
    nested = [sets] if all(_is_channel(each) for each in sets) else sets
    if not all(isinstance(each, Sequence) and each and all(map(_is_channel, each)) for each in nested):
        return None
    return tuple(tuple(each) for each in nested)


def _is_channel(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
