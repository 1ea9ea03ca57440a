"""Launch configurations of the decode kernels, and the measurement that chose each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeLaunch:
    """Sizes and launch options of the kernels of a decode step.

    Attributes:
        chunk: coarse keys of one program of compression and normaliser; a multiple of 8.
        keys: keys that compression reads at once.
        compress_warps: warps of such a program.
        compress_stages: depth of its software pipeline.
        blocks: key blocks of one program of scoring.
        score_warps: warps of such a program.
        score_stages: depth of its pipeline.
        ranks: key/value heads up to which, in steps of one token, the last program that scores a row's blocks also
            ranks them: a launch less, but scoring then uses more registers.
        ranked: blocks that ranking keeps in registers, a power of two.
        rank_warps: warps of a program that only ranks.
        step_keys: most keys, a power of two, of one step of attention.
        attend_warps: warps of a program of attention.
        attend_stages: depth of its pipeline.
        ahead: visits whose keys and values a program of attention fetches early, where it may begin early.
        programs: programs of attention for each multiprocessor, about, where the work can be split so far.
    """

    chunk: int = 64
    keys: int = 64
    compress_warps: int = 4
    compress_stages: int = 2
    blocks: int = 32
    score_warps: int = 4
    score_stages: int = 4
    ranks: int = 4
    ranked: int = 2048
    rank_warps: int = 4
    step_keys: int = 64
    attend_warps: int = 4
    attend_stages: int = 2
    ahead: int = 4
    programs: int = 2

    @staticmethod
    def warps(usual: int, columns: int) -> int:
        """Warps of a program with so many columns (or rows): more where one token's heads are more than 64."""
        return usual if columns <= 64 else 8


MEASURED_DECODE: dict[tuple[int, int, int], DecodeLaunch] = {
    # H100, 128k keys, 64 blocks; us of a step with 32/2 heads, batch 1 and 8, and with 32/8 heads, then the same below
    # dense_len, within one sweep:
    #   64 blocks a program in 3 stages, ranking there   19.7, 48.4, 35.5, 133.7;  11.9, 34.8, 22.5, 106.7
    #   the same, ranking in a launch of its own         20.8, 47.7, 33.0, 133.1;  13.1, 35.7, 23.2, 107.1
    #   32 blocks in 4 stages, ranking there             21.6, 52.0, 33.0, 140.5;  12.2, 36.1, 22.4, 108.3
    #   ... nothing fetched early                        21.7, 53.2, 34.1, 141.4;  11.9, 36.1, 22.6, 108.2
    #   ... no launch begins early                       23.6, 54.0, 35.1, 141.3;  13.9, 37.4, 22.9, 107.6
    #   ... 3 programs of attention                      21.3, 50.3, 32.1, 145.8;  12.1, 35.8, 21.1, 125.5
    (90, 2, 128): DecodeLaunch(blocks=64, score_stages=3),
}
"""By compute capability (90 for sm_90), bytes of an element, and the larger padded head dimension."""


def generic_decode(size: int, head_dim: int) -> DecodeLaunch:
    """A configuration that fits 99 KB of shared memory, by bytes of an element and the larger padded head dimension."""
    if size == 4:
        small = head_dim > 128
        return DecodeLaunch(
            chunk=16 if small else 32,
            keys=16,
            compress_warps=8,
            compress_stages=1,
            blocks=16 if small else 32,
            score_stages=2,
            step_keys=32 if head_dim <= 64 else 16,
            attend_stages=2,
        )
    if head_dim > 128:
        return DecodeLaunch(chunk=32, keys=32, score_stages=3, step_keys=32, attend_stages=2)
    return DecodeLaunch(blocks=64 if head_dim <= 64 else 32)


def decode_launch(tensor: Tensor, head_dim: int) -> DecodeLaunch:
    """The configuration on the tensor's device, for its dtype and the larger padded head dimension."""
    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        row = MEASURED_DECODE.get((10 * major + minor, tensor.element_size(), head_dim))
        if row is not None:
            return row
    return generic_decode(tensor.element_size(), head_dim)
