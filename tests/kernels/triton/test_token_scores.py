"""Token scores in Triton against the oracle: index keys, and the sets of blocks that they choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels import reference
from infllm_pass.kernels.cpu.tokens import index_keys as torch_index_keys
from infllm_pass.kernels.geometry import BlockGeometry, ChannelSets
from infllm_pass.kernels.triton.index_keys import SLACK_KEYS, _encode_runs, index_keys
from infllm_pass.kernels.triton.prefill.token_scores import select_tiles
from infllm_pass.kernels.triton.tile_schedule import plan_packed_tiles, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TilePlan, TileShape
from tests.support.triton_device import DEVICE, arrange, gpu
from tests.support.triton_support import sets_from_lists

SMALL = BlockGeometry(8, 4, 16, init_blocks=1, local_blocks=1, selected_blocks=5, scorer="tokens")

LOW = ((*range(8, 16), *range(24, 32)),)
"""The lowest frequencies of a rotary embedding whose halves are split, of 32 channels."""

SCATTERED = (tuple(range(0, 32, 2)),)
"""More runs than a program's constant holds."""

BY_HEAD = (tuple(range(16)), tuple(range(1, 32, 2)))
"""Other channels for each of two heads."""


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that PyTorch does not initialise holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def select(q, k, geometry: BlockGeometry, plan: TilePlan, scale: float, **options) -> torch.Tensor:
    """The chosen sets, bool ``[B, Hkv, Lq, n_blocks]``."""
    options = {"dense_len": 0, **options}
    keys = index_keys(k, geometry=geometry)
    sizes = {"length_k": k.shape[2], "heads_kv": k.shape[1]}
    lists = select_tiles(q, keys, plan, geometry=geometry, scale=scale, **sizes, **options)
    return sets_from_lists(lists, plan, q.shape[0], k.shape[1], q.shape[2], geometry.num_blocks(k.shape[2]))


def check(
    group: int,
    *,
    length: int,
    queries: int | None = None,
    heads: int = 1,
    batch: int = 1,
    dim: int = 32,
    channels: ChannelSets = LOW,
    bounds: list[tuple[int, int]] | None = None,
    holes: float = 0.0,
    window: int | None = None,
    dense_len: int = 0,
    level: bool = False,
    softcap: float = 0.0,
    mean: float = 0.0,
    **sizes,
) -> None:
    """Compare with the oracle.

    Args:
        bounds: first and last key of every row, for a padded batch; the others are NaN.
        holes: share of the keys between that are hidden.
        level: keys are zero, so that all scores of a query are equal.
        mean: that of keys; other than 0 it tells the heads of a group apart.
    """
    geometry = replace(SMALL, channels=channels, **sizes)
    queries = length if queries is None else queries
    scale, offset = 0.5, length - queries
    q = torch.randn(batch, group * heads, queries, dim, device=DEVICE)
    k = torch.randn(batch, heads, length, dim, device=DEVICE) * (not level) + mean
    index = torch.arange(length, device=DEVICE)
    key_bounds, key_mask = None, None
    if bounds is not None or holes:
        bounds = [(0, length)] * batch if bounds is None else bounds
        key_bounds = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        key_mask = (index >= key_bounds[:, :1]) & (index < key_bounds[:, 1:])
        ends = (index == key_bounds[:, :1]) | (index == key_bounds[:, 1:] - 1)
        key_mask &= (torch.rand(batch, length, device=DEVICE) >= holes) | ends
        key_mask[:, 3 * geometry.block_size : 4 * geometry.block_size] &= not holes  # a block without a visible token
    shape = TileShape.choose(group, geometry.query_block)
    place = {"block_size": geometry.block_size, "device": DEVICE, "offset": offset, "key_bounds": key_bounds}
    plan = plan_tiles(shape, batch=batch, length_q=queries, length_k=length, **place)
    poisoned = k if key_mask is None else k.masked_fill(~key_mask[:, None, :, None], torch.nan)
    numbers = {"dense_len": dense_len, "window": window, "softcap": softcap}
    found = select(q, poisoned, geometry, plan, scale, **numbers, key_mask=key_mask)
    common = {"geometry": geometry, "scale": scale, **numbers}
    expected = reference.select_blocks(q, k, **common, offset=offset, key_mask=key_mask)
    wrong = (found != expected).any(-1)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} selections differ, first {wrong.nonzero()[0]}"


@pytest.mark.parametrize(
    ("group", "sizes"),
    [
        (1, {"length": 203}),
        (3, {"length": 139, "heads": 2}),
        (4, {"length": 203, "queries": 101}),
        (16, {"length": 151, "queries": 37}),
        (7, {"length": 141, "dim": 80, "channels": (tuple(range(16, 64)),)}),
        (96, {"length": 131, "queries": 5}),
        (2, {"length": 150, "dim": 24, "channels": (tuple(range(24)),)}),
        (2, {"length": 150, "dim": 128, "channels": ((*range(32, 64), *range(96, 128)),)}),
    ],
    ids=str,
)
def test_sets_equal_the_oracles(group, sizes):
    check(group, **sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"softcap": 2.0, "mean": 1.0, "group": 4, "window": 170, "length": 300, "queries": 300},
        {"softcap": 2.0, "group": 3, "heads": 2, "holes": 0.4},
        {"softcap": 1.0, "group": 4, "score_dtype": "int8"},
        {"softcap": 1.0, "group": 96, "queries": 5},
    ],
    ids=str,
)
def test_capped_scores(sizes):
    check(**{"length": 140, "queries": 44} | sizes)


@pytest.mark.parametrize(
    "channels", [SCATTERED, BY_HEAD, (LOW[0], SCATTERED[0])], ids=["scattered", "by head", "mixed"]
)
@pytest.mark.parametrize("score_dtype", ["key", "int8"])
def test_sets_of_channels(channels, score_dtype):
    check(3, length=150, queries=90, heads=2, batch=2, channels=channels, score_dtype=score_dtype)


@pytest.mark.parametrize("score_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("group", [1, 4])
def test_keys_of_8_bits(group, score_dtype):
    check(group, length=203, queries=120, heads=2, score_dtype=score_dtype)


@pytest.mark.parametrize(
    ("group", "query_block", "length", "queries"),
    [(16, 16, 203, 203), (4, 16, 203, 77), (4, 4, 203, 77), (4, 64, 203, 140), (200, 2, 120, 6), (1, 64, 203, 77)],
)
def test_query_blocks_share_a_selection(group, query_block, length, queries):
    # The last tile of positions has to be whole on both sides of a call, or the oracle scores it with fewer queries.
    offset = (length - queries) // query_block * query_block
    check(group, length=length, queries=length - offset, query_block=query_block)


@pytest.mark.parametrize(
    "sizes",
    [{"block_size": 48, "selected_blocks": 4}, {"block_size": 32, "init_blocks": 2}, {"selected_blocks": 3}],
    ids=lambda sizes: "-".join(f"{name}{value}" for name, value in sizes.items()),
)
def test_every_valid_geometry(sizes):
    check(4, length=530, queries=45, **sizes)


@pytest.mark.parametrize(("group", "length", "queries"), [(4, 203, 70), (4, 4900, 3)])
def test_ties_go_to_the_lower_block(group, length, queries):
    check(group, length=length, queries=queries, level=True, selected_blocks=5 if length < 1000 else 40)


@pytest.mark.parametrize(
    ("group", "block_size", "length", "window", "query_block"),
    [(7, 16, 170, 100, 1), (1, 32, 310, 130, 1), (4, 16, 510, 300, 1), (4, 16, 310, 133, 16)],
)
def test_sliding_windows_hide_tokens(group, block_size, length, window, query_block):
    check(group, length=length, queries=70, block_size=block_size, window=window, query_block=query_block)


@pytest.mark.parametrize("query_block", [1, 16])
def test_padding_and_holes(query_block):
    check(4, length=165, batch=2, bounds=[(0, 165), (50, 151)], query_block=query_block)
    check(4, length=190, batch=2, bounds=[(0, 190), (5, 171)], holes=0.3, query_block=query_block)
    check(4, length=190, queries=64, holes=0.8, window=120)


def test_what_is_hidden_comes_after_the_lowest_scores():
    """A visible block whose score is 0 in float32 comes before one of which no token is visible."""
    geometry = replace(SMALL, channels=LOW)
    q = torch.ones(1, 1, 1, 32, device=DEVICE)
    k = torch.zeros(1, 1, 128, 32, device=DEVICE)
    k[:, :, 16:96] = -20.0
    k[:, :, 48:64] = 0.0
    key_mask = torch.ones(1, 128, dtype=torch.bool, device=DEVICE)
    key_mask[:, 16:32] = False
    place = {"block_size": 16, "device": DEVICE, "offset": 127}
    plan = plan_tiles(TileShape.choose(1), batch=1, length_q=1, length_k=128, **place)
    found = select(q, k, geometry, plan, 0.5, key_mask=key_mask)
    expected = reference.select_blocks(q, k, geometry=geometry, scale=0.5, offset=127, key_mask=key_mask)
    assert found[0, 0, 0].nonzero().flatten().tolist() == [0, 2, 3, 6, 7]
    assert torch.equal(found, expected)


def test_heads_that_one_product_does_not_hold():
    check(200, length=190, queries=4, query_block=4, holes=0.3)


def test_short_sequences_select_nothing():
    check(4, length=150, batch=2, bounds=[(0, 150), (60, 150)], dense_len=150)
    check(4, length=150, queries=60, dense_len=151)


@pytest.mark.parametrize(("length", "queries"), [(200, 1), (1, 1), (31, 31)])
def test_tiny_calls(length, queries):
    check(4, length=length, queries=queries)


def test_packed_sequences_select_on_their_own():
    geometry = replace(SMALL, channels=LOW)
    bounds = torch.tensor([0, 17, 17, 135, 236], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 4, 236, 32, device=DEVICE)
    k = torch.randn(1, 1, 236, 32, device=DEVICE)
    sizes = {"batch": 1, "length_q": 236, "length_k": 236, "block_size": geometry.block_size}
    found = select(q, k, geometry, plan_packed_tiles(TileShape.choose(4), bounds, bounds, **sizes), 0.5)
    for begin, end in ((0, 17), (17, 135), (135, 236)):
        part = slice(begin, end)
        expected = reference.select_blocks(q[:, :, part], k[:, :, part], geometry=geometry, scale=0.5, offset=0)
        assert torch.equal(found[:, :, part, : expected.shape[3]], expected)


@pytest.mark.parametrize("score_dtype", ["key", "int8", "fp8"])
@pytest.mark.parametrize("channels", [LOW, BY_HEAD], ids=["one set", "by head"])
def test_index_keys_equal_the_oracles(channels, score_dtype):
    geometry = replace(SMALL, channels=channels, score_dtype=score_dtype)
    k = torch.randn(2, 70, 2, 32, device=DEVICE).transpose(1, 2)
    k[0, :, 3] = 0.0
    k[1, :, 5] *= 1e-3
    k[1, :, 6] = torch.arange(-16, 16, device=DEVICE) / 8  # halves, and subnormal numbers in float8
    keys = index_keys(k, geometry=geometry)
    parts = [tensor[: tensor.shape[0] - SLACK_KEYS].unflatten(0, (2, 2, 70)) for tensor in keys.tensors]
    stored = parts[0].to(torch.float64)
    if score_dtype != "key":
        stored *= parts[1][..., None].double()
    expected = torch.stack([reference.index_keys(row, geometry) for row in k])
    assert torch.equal(stored, expected)


@gpu
@pytest.mark.parametrize("score_dtype", ["int8", "fp8"])
def test_index_keys_of_bfloat16_are_the_same_on_every_device(score_dtype):
    """Quotients of bfloat16 numbers often lie half way between two that are stored: one bit of the scale decides."""
    geometry = BlockGeometry(scorer="tokens", score_dtype=score_dtype, channels=(tuple(range(32)),))
    k = torch.randn(1, 2, 20000, 32, device=DEVICE, dtype=torch.bfloat16)
    expected = torch_index_keys(k.cpu(), geometry)
    keys = index_keys(k, geometry=geometry)
    stored = [x[: x.shape[0] - SLACK_KEYS].unflatten(0, (1, 2, 20000)) for x in keys.tensors]
    for found in (stored, torch_index_keys(k, geometry)):
        assert all(torch.equal(x.cpu().double(), y.double()) for x, y in zip(found, expected, strict=True))
    assert torch.equal(reference.index_keys(k[0], geometry).cpu(), reference.index_keys(k[0].cpu(), geometry))


@pytest.mark.parametrize(("channels", "runs"), [((0, 1, 2), 1), ((3, 4), 1), ((1, 3, 4, 9), 3), ((0, 2, 4, 6), 4)])
def test_runs_of_channels(channels, runs):
    assert _encode_runs(channels)[0] == runs


@gpu
@pytest.mark.parametrize("score_dtype", ["key", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "heads_kv", "dim", "kept", "query_block"),
    [(32, 2, 128, 32, 1), (32, 8, 128, 32, 16), (9, 3, 64, 16, 1), (16, 16, 64, 64, 1), (8, 2, 256, 64, 64)],
)
def test_long_inputs_select_the_best_blocks(heads, heads_kv, dim, kept, query_block, dtype, score_dtype):
    length = 6001
    geometry = BlockGeometry(local_blocks=8, selected_blocks=24, scorer="tokens", score_dtype=score_dtype)
    geometry = replace(geometry, channels=(tuple(range(dim - kept, dim)),), query_block=query_block)
    q = torch.randn(1, heads, length, dim, device=DEVICE, dtype=dtype)
    k = torch.randn(1, heads_kv, length, dim, device=DEVICE, dtype=dtype)
    shape = TileShape.choose(heads // heads_kv, query_block)
    plan = plan_tiles(shape, batch=1, length_q=length, length_k=length, block_size=64, device=DEVICE)
    found = select(q, k, geometry, plan, dim**-0.5)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for tile in torch.randint(0, length // query_block, (32,)).tolist():
        rows = slice(tile * query_block, (tile + 1) * query_block)
        common = {"geometry": geometry, "scale": dim**-0.5, "offset": rows.start}
        scores = reference.block_scores(q[0, :, rows], k[0], **common)[:, 0]
        expected = reference.select_sequence(q[0, :, rows], k[0], **common)[:, 0]
        mine = found[0, :, rows.start]
        assert torch.equal(mine.sum(-1), expected.sum(-1))
        for head in (mine != expected).any(-1).nonzero().flatten().tolist():
            left, taken = scores[head][expected[head] & ~mine[head]], scores[head][mine[head] & ~expected[head]]
            assert float((left.max() - taken.min()) / left.max()) < tolerance


arrange(globals())
