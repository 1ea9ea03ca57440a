"""Block selection on Triton against the oracle: the same sets, in the form that attention reads."""

from __future__ import annotations

import pytest
import torch

from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.prefill.compress import compress_keys
from infllm_pass.kernels.triton.prefill.pooled import select_tiles
from infllm_pass.kernels.triton.prefill.select import list_capacity
from infllm_pass.kernels.triton.tile_schedule import plan_packed_tiles, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileLists, TilePlan, TileShape
from tests.support.triton_device import DEVICE, arrange, gpu
from tests.support.triton_support import sets_from_lists

SMALL = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "init_blocks": 1,
    "local_blocks": 1,
    "selected_blocks": 5,
}


def select(
    q: torch.Tensor, k: torch.Tensor, geometry: BlockGeometry, plan: TilePlan, **options
) -> tuple[TileLists, torch.Tensor]:
    """The lists, and the sets that they stand for."""
    keys = compress_keys(k, plan, geometry=geometry)
    options = {"dense_len": 0, **options}
    lists = select_tiles(q, keys, plan, geometry=geometry, scale=q.shape[3] ** -0.5, length_k=k.shape[2], **options)
    blocks = geometry.num_blocks(k.shape[2])
    return lists, sets_from_lists(lists, plan, q.shape[0], k.shape[1], q.shape[2], blocks)


def check(
    group: int,
    *,
    length: int,
    queries: int | None = None,
    heads: int = 1,
    batch: int = 1,
    dim: int = 16,
    bounds: list[tuple[int, int]] | None = None,
    window: int | None = None,
    dense_len: int = 0,
    level: bool = False,
    softcap: float = 0.0,
    **sizes,
) -> None:
    """Compare with the oracle; `level`: keys are zero, so that all scores of a query are equal."""
    geometry = BlockGeometry(**{**SMALL, **sizes})
    queries = length if queries is None else queries
    q = 3 * torch.randn(batch, group * heads, queries, dim, device=DEVICE)  # so that a missing window is noticed
    k = torch.randn(batch, heads, length, dim, device=DEVICE) * (not level)
    offset = length - queries
    key_bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    shape = TileShape.choose(group, geometry.query_block)
    sizes_ = {"batch": batch, "length_q": queries, "length_k": length, "block_size": geometry.block_size}
    plan = plan_tiles(shape, **sizes_, device=DEVICE, offset=offset, key_bounds=key_bounds)
    lists, found = select(q, k, geometry, plan, window=window, dense_len=dense_len, softcap=softcap)
    assert int(lists.counts.max()) <= lists.blocks.stride(1)
    key_mask = None
    if bounds is not None:
        index = torch.arange(length, device=DEVICE)
        key_mask = (index >= key_bounds[:, :1]) & (index < key_bounds[:, 1:])
    expected = reference.select_blocks(
        q,
        k,
        geometry=geometry,
        scale=dim**-0.5,
        offset=offset,
        key_mask=key_mask,
        window=window,
        dense_len=dense_len,
        softcap=softcap,
    )
    wrong = (found != expected).any(-1)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} selections differ, first {wrong.nonzero()[0]}"
    assert not bool((found.sum(-1) > geometry.selected_blocks).any())


@pytest.mark.parametrize(
    ("group", "lse", "sizes"),
    [
        (1, "coarse", {"length": 203}),
        (1, "exact", {"length": 203}),
        (2, "coarse", {"length": 140, "dim": 24}),
        (3, "coarse", {"length": 123, "heads": 2, "dim": 80}),
        (4, "exact", {"length": 139}),
        (7, "coarse", {"length": 131}),
        (16, "coarse", {"length": 131, "queries": 37}),
        (16, "exact", {"length": 101, "queries": 19}),
        (96, "coarse", {"length": 131, "queries": 5}),
    ],
    ids=str,
)
def test_sets_equal_the_oracles(group, lse, sizes):
    check(group, lse=lse, **sizes)


@pytest.mark.parametrize(
    ("group", "query_block", "length", "queries"),
    [(16, 16, 203, 203), (4, 16, 203, 77), (4, 4, 203, 77), (200, 2, 120, 6)],
)
def test_query_blocks_share_a_selection(group, query_block, length, queries):
    # The last tile of positions has to be whole on both sides of a call, or the oracle scores it with fewer queries.
    offset = (length - queries) // query_block * query_block
    check(group, length=length, queries=length - offset, query_block=query_block)


@pytest.mark.parametrize(
    ("group", "query_block", "entries"),
    [(4, 1, 16 * 2 + 3), (4, 4, 4 * 2 + 4), (4, 16, 2 + 4), (4, 64, 2 + 7), (16, 16, 2 + 4)],
)
def test_lists_have_room_for_the_selections_of_a_tile(group, query_block, entries):
    """Two scored or initial blocks for each selection, those before the first token, and those that tokens stand in."""
    geometry = BlockGeometry(**{**SMALL, "selected_blocks": 4, "query_block": query_block})
    shape = TileShape.choose(group, query_block)
    sizes = {"batch": 1, "length_q": 2000, "length_k": 2000, "block_size": geometry.block_size}
    plan = plan_tiles(shape, **sizes, device=DEVICE, offset=0)
    assert list_capacity(plan, geometry, 2000) == entries


@pytest.mark.parametrize(
    ("group", "sizes"),
    [
        (1, {"softcap": 0.3, "window": 70}),
        (4, {"softcap": 1.0, "heads": 2}),
        (4, {"softcap": 1.0, "lse": "exact"}),
        (4, {"softcap": 1.0, "kernel_size": 64}),
        (96, {"softcap": 1.0, "queries": 5}),
        (200, {"softcap": 1.0, "queries": 6, "query_block": 2}),
    ],
    ids=str,
)
def test_capped_scores(group, sizes):
    check(group, **{"length": 140, "queries": 44} | sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_size": 48, "kernel_size": 16, "selected_blocks": 4},
        {"kernel_size": 4, "selected_blocks": 9, "local_blocks": 2},
        {"kernel_size": 16},
        {"kernel_size": 24},
        {"kernel_size": 64},
        {"block_size": 32, "init_blocks": 2},
    ],
    ids=lambda sizes: "-".join(f"{name}{value}" for name, value in sizes.items()),
)
def test_every_valid_geometry(sizes):
    check(4, length=330, queries=45, **sizes)


@pytest.mark.parametrize(("group", "length", "queries"), [(4, 203, 70), (16, 3000, 5), (4, 4900, 3)])
def test_ties_go_to_the_lower_block(group, length, queries):
    budget = 5 if length < 1000 else 40
    check(group, length=length, queries=queries, level=True, selected_blocks=budget)


@pytest.mark.parametrize(
    ("budget", "initial"), [(300, 1), (100, 20)], ids=["more_than_one_scan_of_candidates", "many_initial_blocks"]
)
def test_large_budgets(budget, initial):
    check(2, length=6000, queries=3, selected_blocks=budget, init_blocks=initial)


@pytest.mark.parametrize(
    ("group", "block_size", "length", "window"), [(7, 16, 170, 100), (1, 32, 310, 130), (4, 16, 310, 300)]
)
def test_blocks_before_a_sliding_window_are_no_candidates(group, block_size, length, window):
    check(group, length=length, queries=70, block_size=block_size, window=window)


def test_padding_moves_nothing():
    check(4, length=165, batch=2, bounds=[(0, 165), (50, 151)])


def test_short_sequences_select_nothing():
    check(4, length=150, batch=2, bounds=[(0, 150), (60, 150)], dense_len=150)
    check(4, length=150, queries=60, dense_len=151)


@pytest.mark.parametrize(("length", "queries"), [(200, 1), (1, 1), (31, 31), (40, 0)])
def test_tiny_calls(length, queries):
    check(4, length=length, queries=queries)


def test_packed_sequences_select_on_their_own():
    geometry = BlockGeometry(**SMALL)
    bounds = torch.tensor([0, 17, 17, 135, 236], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 4, 236, 16, device=DEVICE)
    k = torch.randn(1, 1, 236, 16, device=DEVICE)
    plan = plan_packed_tiles(
        TileShape.choose(4), bounds, bounds, batch=1, length_q=236, length_k=236, block_size=geometry.block_size
    )
    _, found = select(q, k, geometry, plan)
    for begin, end in ((0, 17), (17, 135), (135, 236)):
        part = slice(begin, end)
        expected = reference.select_blocks(q[:, :, part], k[:, :, part], geometry=geometry, scale=0.25, offset=0)
        assert torch.equal(found[:, :, part, : expected.shape[3]], expected)


def test_views_of_another_layout_are_read_in_place():
    geometry = BlockGeometry(**SMALL)
    q = torch.randn(1, 110, 8, 16, device=DEVICE).transpose(1, 2)
    k = torch.randn(1, 110, 2, 16, device=DEVICE).transpose(1, 2)
    plan = plan_tiles(
        TileShape.choose(4), batch=1, length_q=110, length_k=110, block_size=geometry.block_size, device=DEVICE
    )
    _, found = select(q, k, geometry, plan)
    assert torch.equal(found, reference.select_blocks(q, k, geometry=geometry, scale=0.25, offset=0))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "heads_kv", "dim"), [(32, 2, 128), (32, 8, 128), (9, 3, 64), (16, 16, 64), (8, 2, 256)]
)
def test_long_inputs_select_the_best_blocks(heads, heads_kv, dim, dtype):
    length, geometry = 6001, BlockGeometry(local_blocks=8, selected_blocks=24)
    q = torch.randn(1, heads, length, dim, device=DEVICE, dtype=dtype)
    k = torch.randn(1, heads_kv, length, dim, device=DEVICE, dtype=dtype)
    shape = TileShape.choose(heads // heads_kv)
    plan = plan_tiles(shape, batch=1, length_q=length, length_k=length, block_size=geometry.block_size, device=DEVICE)
    _, found = select(q, k, geometry, plan)
    for row in torch.randint(0, length, (64,)).tolist():
        assert_best(found[0, :, row], q[0, :, row], k[0], row, geometry)


@gpu
@pytest.mark.parametrize("group", [1, 4, 16, 80])
def test_panels_with_nothing_to_score_do_not_disturb_the_others(group):
    """Empty, dense and short sequences between long ones, in one launch of persistent programs."""
    geometry = BlockGeometry(local_blocks=4, selected_blocks=12)
    bounds = [(0, 5000), (100, 400), (700, 700), (900, 5000), (0, 2000), (3000, 5000), (0, 5000)]
    q = torch.randn(len(bounds), group, 5000, 128, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(len(bounds), 1, 5000, 128, device=DEVICE, dtype=torch.bfloat16)
    plan = plan_tiles(
        TileShape.choose(group),
        batch=len(bounds),
        length_q=5000,
        length_k=5000,
        block_size=geometry.block_size,
        device=DEVICE,
        key_bounds=torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
    )
    _, found = select(q, k, geometry, plan, dense_len=1000)
    for row, (begin, end) in enumerate(bounds):
        if end - begin < 1000:
            assert not found[row].any()
            continue
        for query in torch.randint(begin, end, (48,)).tolist():
            assert_best(found[row, :, query], q[row, :, query], k[row, :, begin:end], query - begin, geometry)


def assert_best(mine: torch.Tensor, q: torch.Tensor, k: torch.Tensor, position: int, geometry: BlockGeometry) -> None:
    """One query's blocks ``[Hkv, n_blocks]`` are the oracle's, save at the cut where scores differ by rounding."""
    common = {"geometry": geometry, "scale": q.shape[-1] ** -0.5, "offset": position}
    scores = reference.block_scores(q[:, None], k, **common)[:, 0]  # [Hkv, n_blocks]
    expected = reference.select_blocks(q[None, :, None], k[None], **common)[0, :, 0]
    mine = mine[:, : expected.shape[1]]
    assert torch.equal(mine.sum(-1), expected.sum(-1))
    tolerance = 1e-4 if q.dtype == torch.float32 else 2e-2
    for head in (mine != expected).any(-1).nonzero().flatten().tolist():
        left, taken = scores[head][expected[head] & ~mine[head]], scores[head][mine[head] & ~expected[head]]
        assert float((left.max() - taken.min()) / left.max()) < tolerance


arrange(globals())
