"""Query-agnostic blocks on Triton (NOSA), in prompts and in decode steps, against the oracle: the same sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.tile_schedule import plan_packed_tiles, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileShape
from tests.kernels.triton.test_decode_terms import BiasedCache, select_and_attend
from tests.kernels.triton.test_select import select
from tests.support.triton_device import DEVICE, arrange, gpu

SMALL = BlockGeometry(8, 4, 16, init_blocks=1, local_blocks=1, selected_blocks=6, lse="exact", agnostic_blocks=2)


def draw(batch, group, heads, queries, length, *, rows=1, kind="random", dtype=torch.float32):
    """Queries, keys, and a bias ``[rows, heads, length]``."""
    q = 3 * torch.randn(batch, group * heads, queries, 16, device=DEVICE).to(dtype)
    k = torch.randn(batch, heads, length, 16, device=DEVICE).to(dtype)
    bias = torch.randn(length, rows, heads, device=DEVICE).permute(1, 2, 0)
    if kind == "level":
        bias = bias * 0.0  # of either sign
    elif kind == "hidden":
        bias[..., torch.rand(length, device=DEVICE) < 0.05] = float("-inf")
    return q, k, bias


def check(q, k, bias, geometry, plan, **fields):
    options = {name: fields[name] for name in ("dense_len", "window") if name in fields}
    _, found = select(q, k, geometry, plan, key_bias=bias, **options)
    given = {"geometry": geometry, "scale": 16**-0.5, **fields}
    expected = reference.select_blocks(q, k, key_bias=bias, **given)
    assert torch.equal(found, expected)
    unfilled = reference.select_blocks(q, k, **given | {"geometry": geometry.query_aware})
    assert not torch.equal(found, unfilled)  # a fill that did nothing would show nothing
    assert not bool((unfilled & ~found).any())


@pytest.mark.parametrize(
    ("group", "kind", "sizes"),
    [
        (1, "random", {}),
        (4, "hidden", {"agnostic_blocks": 3}),  # nothing but forced blocks is chosen by the query
        (16, "level", {}),
        (4, "random", {"query_block": 4}),
        (200, "random", {"query_block": 2, "kernel_size": 12}),
        (2, "random", {"kernel_size": 4, "selected_blocks": 20, "agnostic_blocks": 12}),
    ],
    ids=str,
)
def test_sets_equal_the_oracles(group, kind, sizes):
    geometry = replace(SMALL, **sizes)
    length, queries = (460, 24) if sizes.get("selected_blocks") else (203, 43)
    if group > 16:
        queries = 7
    q, k, bias = draw(1, group, 2, queries, length, kind=kind)
    shape = TileShape.choose(group, geometry.query_block)
    offset = length - queries
    plan = plan_tiles(shape, batch=1, length_q=queries, length_k=length, block_size=16, device=DEVICE, offset=offset)
    if geometry.query_block > 1:  # whole groups of queries, as the oracle scores those that it is given
        begin = -offset % geometry.query_block
        q, queries, offset = q[:, :, begin:].contiguous(), queries - begin, offset + begin
        plan = plan_tiles(
            shape, batch=1, length_q=queries, length_k=length, block_size=16, device=DEVICE, offset=offset
        )
    check(q, k, bias, geometry, plan, offset=offset)


def test_padded_rows_on_both_sides_of_dense_len_with_a_window():
    bounds = torch.tensor([(0, 203), (21, 190), (7, 60), (40, 40)], dtype=torch.int32, device=DEVICE)
    q, k, bias = draw(4, 4, 1, 203, 203, rows=4)
    plan = plan_tiles(
        TileShape.choose(4), batch=4, length_q=203, length_k=203, block_size=16, device=DEVICE, key_bounds=bounds
    )
    index = torch.arange(203, device=DEVICE)
    key_mask = (index >= bounds[:, :1]) & (index < bounds[:, 1:])
    check(q, k, bias, SMALL, plan, key_mask=key_mask, dense_len=80, window=140)


def test_packed_sequences():
    """Blocks of sequences that begin anywhere share no slot; one of them is shorter than a block."""
    bounds = torch.tensor([0, 131, 140, 203, 317], dtype=torch.int32, device=DEVICE)
    q, k, bias = draw(1, 4, 2, 317, 317)
    plan = plan_packed_tiles(TileShape.choose(4), bounds, bounds, batch=1, length_q=317, length_k=317, block_size=16)
    check(q, k, bias, SMALL, plan, cu_seqlens_q=bounds, cu_seqlens_k=bounds)


def steps(lengths, **sizes):
    return BiasedCache(select_and_attend, lengths, device=DEVICE, **{"geometry": SMALL, "bias": (1, 2), **sizes})


@pytest.mark.parametrize(
    "sizes",
    [
        {"group": 1},
        {"group": 4, "heads": 1, "bias": (1, 1), "geometry": replace(SMALL, lse="coarse", agnostic_blocks=3)},
        {"geometry": replace(SMALL, query_block=4), "window": 130},
        {"level": True},
    ],
    ids=["group 1", "nothing by query", "shared by 4, window", "ties"],
)
def test_decode_steps(sizes):
    cache = steps([151], capacity=200, **sizes)
    if sizes.get("level"):
        cache.terms["key_bias"].zero_()
    cache.grow(3, 1, 9, 1)


def test_decode_rows_from_below_the_budget():
    """Rows with fewer blocks than are visited, with padding, and a cache that was cut back and forgotten."""
    cache = steps([62, 97, 150], starts=[0, 17, 3], bias=(3, 1), dense_len=70, heads=1, capacity=220)
    cache.grow(5, 16, 1)
    cache.crop(20)
    cache.grow(1, 1)
    cache.forget()
    cache.grow(1)


def test_a_step_reads_the_bias_of_new_windows_only():
    """What is pooled is state: biases of keys before the last complete window are read for attention alone."""
    cache = steps([159], capacity=200, heads=2)
    q = cache.append(1)
    cache.compare(q)
    pooled = cache.state[2].clone()
    cache.terms["key_bias"][..., :100] += 5.0
    cache.attend(cache.append(1))
    assert torch.equal(cache.state[2][..., :38], pooled[..., :38])


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [16, 4])
def test_released_constants_at_length(group, dtype):
    """32 768 keys; scores are rounded, so each query's fill is compared for the blocks that it chose by score."""
    geometry = BlockGeometry(local_blocks=16, selected_blocks=64, lse="exact", agnostic_blocks=31)
    length, queries = 32768, 512
    q, k, bias = draw(1, group, 2, queries, length, dtype=dtype)
    plan = plan_tiles(
        TileShape.choose(group), batch=1, length_q=queries, length_k=length, block_size=64, device=DEVICE,
        offset=length - queries,
    )  # fmt: skip
    _, found = select(q, k, geometry, plan, key_bias=bias)
    _, chosen = select(q, k, geometry.query_aware, plan)
    own = (torch.arange(queries, device=DEVICE) + length - queries) // 64
    candidate = torch.arange(512, device=DEVICE) <= own[:, None]
    importance = reference.block_importance(bias[0], geometry)[:, None].expand(2, queries, 512)
    rank = torch.where(chosen[0], torch.inf, importance).masked_fill(~candidate, -torch.inf)
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :64]
    expected = torch.zeros_like(chosen[0]).scatter(-1, best, True)
    assert torch.equal(found[0], expected)


@gpu
@pytest.mark.parametrize("group", [16, 4])
def test_long_decode_steps(group):
    geometry = BlockGeometry(local_blocks=16, selected_blocks=64, lse="exact", agnostic_blocks=31)
    cache = steps([6500, 5000], geometry=geometry, group=group, dim=64, value_dim=64, capacity=6600)
    cache.grow(1, 2, 1)


arrange(globals())
