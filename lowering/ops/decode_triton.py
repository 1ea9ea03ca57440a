"""The decode step on CUDA: Triton kernels that Inductor and CUDA graphs see, with no host synchronisation.

``infllm::tiled_decode_attention``
    as ``infllm::decode_attention``, with the same arguments and `SOURCES`.

Launches whose grids follow from shapes alone: compressed keys and normaliser, block scores and their ranking (a launch
of its own in steps of several tokens), attention, merge. Which rows are sparse is decided on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState

from . import opaque
from .checks import check_tiled
from .decode_cpu import check_decode
from .prefill_cpu import selection_arguments, static_geometry
from .prefill_triton import SOURCES


def tiled_decode_arguments(geometry: BlockGeometry) -> tuple[int | str, ...]:
    """The last arguments of `tiled_decode_attention`, from ``kernel_size`` on."""
    return (*selection_arguments(geometry), SOURCES)


@torch.library.triton_op("infllm::tiled_decode_attention", mutates_args={"k1", "k2", "filled"})
def tiled_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k1: Tensor,
    k2: Tensor,
    filled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    key_mask: Tensor | None,
    window: int | None,
    scale: float,
    dense_len: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    lse: str,
    query_block: int,
    sources: str,
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries of every row over a cache, sparse from ``dense_len`` keys on.

    Args:
        q: ``[B, Hq, Lq, D]``, float16, bfloat16 or float32 on CUDA, unit last stride, as `k` and `v`. Arguments,
            results and what the caller has to keep about `filled`: see `decode.decode_attention`.
        sources: `SOURCES`; nothing is computed from it.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument is outside the kernels' range.
    """
    numbers = (kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, lse, query_block)
    geometry = static_geometry(*numbers)
    check_decode(q, k, v, k1, k2, filled, lengths, starts, key_mask, window, geometry)
    check_tiled(q, k, v, key_mask, None, None, None, window, scale, geometry)
    if opaque.calls_decode_step(q):
        fields = (k1, k2, filled, lengths, starts, key_mask, window, scale, dense_len)
        out, log_sum = opaque.launched_decode_attention(q, k, v, *fields, *numbers)
        return out, log_sum
    return opaque.decode(
        *(q, k, v, DecodeState(k1, k2, filled), DecodeRows(lengths, starts), key_mask),
        geometry=geometry,
        scale=scale,
        dense_len=dense_len,
        window=window,
    )
