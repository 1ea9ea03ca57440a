"""Stages that compiled graphs call as operators: the results are the kernels' own, and opcheck has no objection."""

from __future__ import annotations

import pytest
import torch

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.prefill.compress import compress_keys
from infllm_pass.kernels.triton.prefill.select import select_tiles
from infllm_pass.kernels.triton.tile_schedule import plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileShape
from infllm_pass.lowering.ops import opaque
from infllm_pass.lowering.ops.decode_cpu import new_state
from infllm_pass.lowering.ops.prefill_cpu import selection_arguments
from tests.support.triton_device import DEVICE, arrange

GEOMETRY = BlockGeometry(8, 4, 16, 1, 1, 4)
SCALE = 0.3


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_the_attention_stage(sparse):
    q, k, v = (torch.randn(1, heads, 101, 16, device=DEVICE) for heads in (4, 2, 2))
    plan = plan_tiles(TileShape.choose(2), batch=1, length_q=101, length_k=101, block_size=16, device=DEVICE, offset=0)
    numbers = {"geometry": GEOMETRY, "scale": SCALE, "dense_len": 0}
    lists = None
    if sparse:
        compressed = compress_keys(k, plan, geometry=GEOMETRY)
        lists = select_tiles(q, compressed, plan, **numbers, length_k=101)
    selection = (lists.blocks, lists.tokens, lists.counts) if lists is not None else (None, None, None)
    given = (q, k, v, *selection, plan.sequences, plan.panels, None, plan.packed, None, SCALE, 0, True)
    given = (*given, *selection_arguments(GEOMETRY))
    expected = attention_forward(q, k, v, lists, plan, **numbers, every_query=True)
    for mine, other in zip(opaque.attend_tiles(*given), expected, strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()
    torch.library.opcheck(opaque.attend_tiles, given)


def test_the_decode_step():
    """The operator also writes the state."""
    q, k, v = (torch.randn(2, heads, size, 16, device=DEVICE) for heads, size in ((4, 1), (2, 120), (2, 120)))
    lengths, starts = torch.tensor([110, 70], device=DEVICE), torch.tensor([3, 0], device=DEVICE)
    numbers = {"geometry": GEOMETRY, "scale": SCALE, "dense_len": 80, "window": None}
    states = [[tensor.zero_() for tensor in new_state(k, GEOMETRY)] for _ in range(2)]
    rows = DecodeRows(lengths, starts)
    expected = opaque.decode(q, k, v, DecodeState(*states[0]), rows, None, **numbers)
    given = (q, k, v, *states[1], lengths, starts, None, None, SCALE, 80, *selection_arguments(GEOMETRY))
    results = opaque.launched_decode_attention(*given)
    for mine, other in zip((*results, *states[1]), (*expected, *states[0]), strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()
    assert states[1][2].tolist() == [107, 70]
    torch.library.opcheck(opaque.launched_decode_attention, given)


arrange(globals())
