"""Gradients of keys and values from Triton against autograd through the oracle, and the transposed selection."""

import functools
from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.backward.block_to_query import invert_selection
from infllm_pass.kernels.triton.backward.dkv import key_gradients
from infllm_pass.kernels.triton.tile_schedule import plan_packed_tiles, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileShape
from tests.support.triton_device import DEVICE, arrange, gpu
from tests.support.triton_support import lists_from_sets

GEOMETRY = BlockGeometry(
    kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, local_blocks=1, selected_blocks=4
)
SCALE = 0.3


@pytest.fixture(autouse=True)
def _poisoned():
    """Deterministic mode fills what was never written with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(batch, heads_q, heads_kv, length_q, length_k, dim, dim_v, dtype):
    """Random grad_out, q, k, v."""
    shapes = (
        (batch, heads_q, length_q, dim_v),
        (batch, heads_q, length_q, dim),
        (batch, heads_kv, length_k, dim),
        (batch, heads_kv, length_k, dim_v),
    )
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def oracle(grad_out, q, k, v, selected, **common):
    """lse, delta, dk and dv in float64."""
    k, v = k.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    out, lse = reference.attention(q, k, v, selected, scale=SCALE, **common)
    grads = torch.autograd.grad(out, (k, v), grad_out.double())
    return lse.detach(), (grad_out.double() * out.detach()).sum(-1), *grads


def gradients(*arguments, **options):
    """Those of keys and values, of a call without a key bias."""
    *found, grad_bias = key_gradients(*arguments, **options)
    assert grad_bias is None
    return found


def compare(actual, expected, dtype, tolerance):
    for name, got, wanted in zip(("dk", "dv"), actual, expected, strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert got.shape == wanted.shape
        # One visible key has no gradient but rounding: measure that against inputs of size 1.
        error = float((got.double() - wanted).norm())
        assert error <= tolerance * max(float(wanted.norm()), 1.0), f"{name}: {error}"


def check(
    heads=(4, 2),
    length_q=114,
    length_k=114,
    *,
    batch=1,
    dims=(16, 16),
    offset=None,
    offsets=None,
    geometry=GEOMETRY,
    dense_len=0,
    bounds=None,
    key_mask=None,
    window=None,
    selecting=True,
    dtype=torch.float32,
    tolerance=1e-5,
    permuted=False,
    holes_poisoned=False,
    **options,
):
    """Compare with the oracle; `bounds` gives the first and one past the last valid key of every row.

    Returns a function that computes the gradients again, and the gradients.
    """
    offset = length_k - length_q if offset is None else offset
    grad_out, q, k, v = inputs(batch, *heads, length_q, length_k, *dims, dtype)
    if permuted:
        grad_out, q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad_out, q, k, v))
    key_bounds = None
    if bounds is not None:
        valid = torch.zeros(batch, length_k, dtype=torch.bool, device=DEVICE)
        for row, (begin, end) in enumerate(bounds):
            valid[row, begin:end] = True
        key_mask = valid if key_mask is None else key_mask & valid
        key_bounds = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    common = {"geometry": geometry, "offset": offset, "key_mask": key_mask, "window": window, "dense_len": dense_len}
    selected = reference.select_blocks(q, k, scale=SCALE, **common) if selecting else None
    lse, delta, *expected = oracle(grad_out, q, k, v, selected, **common)
    if holes_poisoned:
        k, v = (x.masked_fill(~key_mask[:, None, :, None], torch.nan) for x in (k, v))

    plan = plan_tiles(
        TileShape.choose(heads[0] // heads[1], geometry.query_block),
        batch=batch,
        length_q=length_q,
        length_k=length_k,
        block_size=geometry.block_size,
        device=DEVICE,
        offset=offset if offsets is None else 0,
        offsets=offsets,
        key_bounds=key_bounds,
    )
    lists = None
    if selected is not None:
        lists = lists_from_sets(selected, plan, max(selected.shape[-1], 1), dense_len=dense_len)
    run = functools.partial(
        gradients,
        grad_out,
        lse.float(),
        delta.float(),
        AttentionInputs(q, k, v, lists, plan, geometry, SCALE, dense_len, key_mask, window),
        **options,
    )
    actual = run()
    compare(actual, expected, dtype, tolerance)
    return run, actual


@pytest.mark.parametrize(
    ("heads", "dims"),
    [((2, 2), (16, 32)), ((6, 2), (24, 16)), ((4, 1), (16, 16)), ((16, 1), (16, 16)), ((7, 1), (40, 20))],
    ids=str,
)
def test_groups_and_head_dims(heads, dims):
    check(heads, 90, 90, dims=dims)


def test_more_heads_than_rows():
    check((96, 1), 12, 40, geometry=replace(GEOMETRY, local_blocks=0, selected_blocks=2))


@pytest.mark.parametrize(("block_size", "stride"), [(48, 16), (128, 32)])
def test_block_sizes(block_size, stride):
    geometry = BlockGeometry(
        kernel_size=stride, kernel_stride=stride, block_size=block_size, local_blocks=0, selected_blocks=3
    )
    check((1, 1), block_size + 30, 4 * block_size + 10, geometry=geometry)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 113])
def test_lengths(length):
    check((4, 1), length, length)


@pytest.mark.parametrize(("length_q", "length_k"), [(1, 130), (37, 130), (100, 163)])
def test_later_chunk_of_a_sequence(length_q, length_k):
    check((4, 1), length_q, length_k)


def test_queries_before_the_first_key():
    check((4, 1), 120, 90)


def test_no_queries():
    _, grads = check((4, 1), 0, 40)
    assert not any(grad.any() for grad in grads)


def test_dense():
    check((16, 1), 60, 60, selecting=False)


def test_rows_on_both_sides_of_the_switch():
    check((4, 1), 130, 130, batch=3, dense_len=99, bounds=[(0, 130), (31, 130), (20, 118)])


def test_padding_and_an_empty_row():
    check((4, 2), 110, 110, batch=3, bounds=[(5, 97), (0, 0), (33, 110)])


@pytest.mark.parametrize("selecting", [True, False], ids=["sparse", "dense"])
def test_holes(selecting):
    torch.manual_seed(3)
    mask = torch.rand(2, 120, device=DEVICE) < 0.8
    mask[0, :20] = False
    mask[1, 40:60] = False
    bounds = [(20, 1 + int(mask[0].nonzero().max())), (int(mask[1].nonzero().min()), 1 + int(mask[1].nonzero().max()))]
    check((4, 1), 120, 120, batch=2, bounds=bounds, key_mask=mask, selecting=selecting)


def test_values_in_holes_do_not_matter():
    mask = torch.ones(1, 120, dtype=torch.bool, device=DEVICE)
    mask[:, 30:41] = False
    check((4, 2), 120, 120, key_mask=mask, selecting=False, holes_poisoned=True)


def test_queries_without_a_visible_key():
    mask = torch.ones(1, 80, dtype=torch.bool, device=DEVICE)
    mask[:, 10:40] = False
    check((4, 2), 80, 80, key_mask=mask, window=5, selecting=False)


@pytest.mark.parametrize(
    ("window", "selecting"), [(1, True), (20, True), (60, True), (20, False)], ids=["1", "20", "60", "20-dense"]
)
def test_window(window, selecting):
    check((4, 1), 100, 100, window=window, selecting=selecting)


@pytest.mark.parametrize(("query_block", "window"), [(4, None), (40, None), (24, 45)])
def test_queries_that_share_a_selection(query_block, window):
    geometry = BlockGeometry(
        kernel_size=8, kernel_stride=4, block_size=16, local_blocks=1, selected_blocks=4, query_block=query_block
    )
    check((4, 2), 150, 150, geometry=geometry, window=window)


def test_offset_on_the_device():
    check((4, 1), 40, 130, batch=2, offset=80, offsets=torch.tensor([80, 80], device=DEVICE))


def test_any_strides():
    check((4, 2), 70, 70, batch=2, permuted=True)


@pytest.mark.parametrize(
    ("selecting", "steps", "pool"),
    [(True, 1, 1 << 20), (True, 1, 10_000), (True, 1, 0), (False, 2, 1 << 20)],
)
def test_pieces(selecting, steps, pool):
    check((8, 1), 70, 70, selecting=selecting, piece_steps=steps, pool_bytes=pool)


def test_pieces_of_a_masked_block():
    mask = torch.rand(1, 90, device=DEVICE) < 0.7
    mask[:, [0, 89]] = True
    check((4, 1), 90, 90, dims=(24, 16), key_mask=mask, piece_steps=1)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "later-chunks"])
def test_packed_sequences(chunked):
    lengths_k = [70, 1, 110, 64]
    lengths_q = [30, 1, 110, 10] if chunked else lengths_k
    grad_out, q, k, v = inputs(1, 4, 2, sum(lengths_q), sum(lengths_k), 16, 16, torch.float32)
    cumulative_k, cumulative_q = (
        torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int() for lengths in (lengths_k, lengths_q)
    )
    plan = plan_packed_tiles(
        TileShape.choose(2),
        cumulative_k,
        cumulative_q if chunked else None,
        batch=1,
        length_q=sum(lengths_q),
        length_k=sum(lengths_k),
        block_size=16,
    )
    dense_len = 65
    selected = torch.zeros(1, 2, sum(lengths_q), 8, dtype=torch.bool, device=DEVICE)
    lse, delta = (torch.full(q.shape[:3], torch.nan, device=DEVICE) for _ in range(2))
    expected = torch.zeros_like(k).double(), torch.zeros_like(v).double()
    begins_k, begins_q = cumulative_k.tolist(), cumulative_q.tolist()
    for number, (length_k, length_q) in enumerate(zip(lengths_k, lengths_q, strict=True)):
        keys = slice(begins_k[number], begins_k[number + 1])
        queries = slice(begins_q[number], begins_q[number + 1])
        part = grad_out[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys]
        common = {"geometry": GEOMETRY, "offset": length_k - length_q, "dense_len": dense_len}
        chosen = reference.select_blocks(part[1], part[2], scale=SCALE, **common)
        selected[:, :, queries, : chosen.shape[-1]] = chosen
        lse_, delta_, grad_k, grad_v = oracle(*part, chosen, **common)
        lse[:, :, queries], delta[:, :, queries] = lse_.float(), delta_.float()
        expected[0][:, :, keys], expected[1][:, :, keys] = grad_k, grad_v
    lists = lists_from_sets(selected, plan, 8, dense_len=dense_len)
    actual = gradients(grad_out, lse, delta, AttentionInputs(q, k, v, lists, plan, GEOMETRY, SCALE, dense_len))
    compare(actual, expected, torch.float32, 1e-5)


@pytest.mark.parametrize(("group", "programs"), [(1, 5), (4, 1), (4, 5), (16, 1024)])
def test_transposed_lists(group, programs):
    """Every block's run and list together are exactly the queries that see one of its keys."""
    length, heads, dense_len = 210, 2, 150
    _, q, k, _ = inputs(2, heads * group, heads, length, length, 16, 16, torch.float32)
    bounds = torch.tensor([[3, length], [20, 140]], dtype=torch.int32, device=DEVICE)
    mask = torch.arange(length, device=DEVICE).expand(2, -1)
    mask = (mask >= bounds[:, :1]) & (mask < bounds[:, 1:])
    selected = reference.select_blocks(
        q, k, geometry=GEOMETRY, scale=SCALE, offset=0, key_mask=mask, dense_len=dense_len
    )
    plan = plan_tiles(
        TileShape.choose(group),
        batch=2,
        length_q=length,
        length_k=length,
        block_size=16,
        device=DEVICE,
        key_bounds=bounds,
    )
    lists = lists_from_sets(selected, plan, selected.shape[-1], dense_len=dense_len)
    found = invert_selection(
        lists, plan, geometry=GEOMETRY, batch=2, length_k=length, dense_len=dense_len, programs=programs
    )

    wanted = []  # (row, first key, keys, head) -> queries
    for row, (begin, end) in enumerate(bounds.tolist()):
        for block in range(-(-(end - begin) // 16)):
            key = begin + 16 * block
            for head in range(heads):
                if row == 0:
                    queries = [query for query in range(key, end) if selected[row, head, query, block]]
                else:
                    queries = list(range(key, end))
                wanted.append(((row, key, min(16, end - key), head), queries))
    actual = []
    for block, (row, key, keys, first, run, shift, *_) in enumerate(found.table.tolist()):
        assert shift == 0 or keys == 0
        for head in range(heads):
            start, count = int(found.starts[head, block]), int(found.counts[head, block])
            queries = [*range(first, first + run), *found.queries[head, start : start + count].tolist()]
            if keys:
                actual.append(((row, key, keys, head), queries))
            else:
                assert not queries
    assert actual == wanted


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 128), (80, 80)], ids=str)
@pytest.mark.parametrize("heads", [(32, 2), (8, 2), (3, 1)], ids=str)
def test_sizes_of_models(heads, dims, dtype):
    geometry = BlockGeometry(local_blocks=4, selected_blocks=12)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    run, first = check(
        heads, 2100, 2100, dims=dims, dtype=dtype, geometry=geometry, tolerance=tolerance, piece_steps=16
    )
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


arrange(globals())
