"""Choosing channels by the variance of keys: whole rotary pairs, largest first."""

from __future__ import annotations

from collections.abc import Sequence

from infllm_pass.kernels.geometry import ChannelSets
from infllm_pass.sites.rotary import Rotary


def by_variance(variance: Sequence[Sequence[float]], rotary: Rotary | str, dims: int) -> ChannelSets:
    """For each head the channels of largest variance.

    The two channels of a rotary pair hold one number that turns, so that they are taken or left together; channels
    without rotation are taken in twos, so that the count comes out.

    Args:
        variance: for each head the variance of every channel.
        rotary: the keys' rotary embedding; a text where there is none: channels are then taken one by one.
        dims: channels to choose, even.
    """
    return tuple(_chosen(row, rotary, dims) for row in variance)


def _chosen(variance: Sequence[float], rotary: Rotary | str, dims: int) -> tuple[int, ...]:
    if dims == len(variance):
        return tuple(range(dims))
    if isinstance(rotary, str):
        ranked = sorted(range(len(variance)), key=lambda channel: -variance[channel])
        return tuple(sorted(ranked[:dims]))
    plain = sorted(rotary.unrotated, key=lambda channel: -variance[channel])
    twos = list(zip(plain[::2], plain[1::2], strict=False))
    pairs = sorted([*twos, *rotary.pairs], key=lambda pair: -(variance[pair[0]] + variance[pair[1]]))
    return tuple(sorted(channel for pair in pairs[: dims // 2] for channel in pair))
