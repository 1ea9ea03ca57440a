"""A second scorer: block selection ranks the keys that its kernel writes, and lists blocks as for pooled scores."""

import pytest
import torch
import triton
import triton.language as tl

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.scorer import PooledScorer, Scorer, StateTensor
from infllm_pass.kernels.triton.prefill.select import (
    PanelScorer,
    block_keys,
    clear_marks,
    list_panel,
    panel_range,
    panel_scratch,
    select_blocks,
)
from infllm_pass.kernels.triton.prefill.topk import scored_range
from infllm_pass.kernels.triton.tile_schedule import plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileShape
from infllm_pass.lowering.ops.decode import new_state
from tests.support.triton_device import DEVICE, arrange
from tests.support.triton_support import sets_from_lists

GEOMETRY = BlockGeometry(8, 4, 16, init_blocks=1, local_blocks=1, selected_blocks=4)


@triton.jit(do_not_specialize=["num_panels", "slots", "num_blocks", "capacity", "dense_len", "window"])
def _select_mean_kernel(
    q,
    means,  # [B, Hkv, slots, D]
    panels,
    scratch,
    list_blocks,
    list_tokens,
    list_counts,
    stride_qb,
    stride_qh,
    stride_qt,
    scale_log2,
    cap_log2,
    num_panels,
    heads_kv,
    slots,
    num_blocks,
    capacity,
    dense_len,
    window,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    PANEL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    BUDGET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    RG: tl.constexpr,
    PEAKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FETCHED: tl.constexpr,
    LISTED: tl.constexpr,
    FILL: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores: the exponential of a query's product with a block's mean key, summed over the heads of a group."""
    slots_at, dense_at, _fixed_at, keys_at, marks_at, _per_block_at = panel_scratch(
        scratch, num_blocks, T, PANEL, QUERY_BLOCK, RG, CANDIDATES, 0, 0
    )
    row = tl.arange(0, PANEL)
    columns = tl.arange(0, PANEL * GP)
    token, member = columns // GP, columns % GP
    dims = tl.arange(0, DP)
    for item in range(tl.program_id(0), num_panels * heads_kv, PROGRAMS):
        panel = item // heads_kv
        head = item % heads_kv
        batch, query, begin, end, position, _key_begin, length, scored, low, high = panel_range(
            panels, panel, dense_len, window, PANEL, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
        )
        clear_marks(marks_at, num_blocks, low, high, T, PANEL, QUERY_BLOCK, LISTED)
        scored_begin, scored_end, _wanted = scored_range(
            row, position, begin, end, length, window, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW
        )
        real = (token >= begin) & (token < end) & (member < G)
        at = q + batch * stride_qb + (head * G + member) * stride_qh + (query + token) * stride_qt
        turned = tl.load(at[None, :] + dims[:, None], mask=real[None, :] & (dims < D)[:, None], other=0.0)
        for start in range(low, high, STEP):
            block = start + tl.arange(0, STEP)
            mean_at = means + ((batch * heads_kv + head) * slots + block)[:, None] * D + dims[None, :]
            mean = tl.load(mean_at, mask=(block < slots)[:, None] & (dims < D)[None, :], other=0.0)
            product = tl.dot(mean, turned, input_precision=PRECISION)
            weights = tl.where(real[None, :], tl.exp2(product * scale_log2), 0.0)
            scores = tl.sum(tl.reshape(weights, [STEP, PANEL, GP]), 2)
            keys = block_keys(scores, block[:, None], scored_begin[None, :], scored_end[None, :], HAS_WINDOW)
            tl.store(keys_at + row[None, :] * num_blocks + block[:, None], keys, mask=(block < high)[:, None])
        tl.debug_barrier()
        list_panel(
            slots_at, dense_at, keys_at, marks_at, num_blocks, list_blocks, list_tokens, list_counts, capacity,
            panel, head, heads_kv, begin, end, position, length, window, scored, low, high,
            T, PANEL, QUERY_BLOCK, BLOCK, INIT, LOCAL, BUDGET, HAS_WINDOW, RG, PEAKS, CANDIDATES, FETCHED, LISTED, FILL,
        )  # fmt: skip
        tl.debug_barrier()


MEANS = PanelScorer("means", lambda *_: {"STEP": 16}, lambda _: (0, 0))


class MeanScorer:
    """The same scorer's state."""

    name = "means"

    def state(self, geometry, capacity, head_dim, dtype):
        return [StateTensor("means", (geometry.num_blocks(capacity), head_dim), torch.float32)]


def expected_sets(q, means, geometry, scale, window):
    """The formula in float64: forced blocks, then the best of the others."""
    batch, _, length, _ = q.shape
    heads, blocks = means.shape[1:3]
    grouped = q.double().unflatten(1, (heads, -1))  # [B, Hkv, G, L, D]
    scores = torch.einsum("bhgld,bhjd->bhglj", grouped * scale, means.double()).exp().sum(2)
    chosen = torch.zeros(batch, heads, length, blocks, dtype=torch.bool)
    for i in range(length):
        own = i // geometry.block_size
        first = 0 if window is None else max(i - window + 1, 0) // geometry.block_size
        candidates = range(first, own + 1)
        forced = [j for j in candidates if j < geometry.init_blocks or j >= own - geometry.local_blocks]
        free = [j for j in candidates if j not in forced]
        for b in range(batch):
            for h in range(heads):
                best = sorted(free, key=lambda j: -float(scores[b, h, i, j]))
                chosen[b, h, i, forced + best[: geometry.selected_blocks - len(forced)]] = True
    return chosen


@pytest.mark.parametrize(("group", "window"), [(4, None), (3, None), (4, 90)], ids=["group 4", "group 3", "window"])
def test_another_scorer_selects_by_its_own_formula(group, window):
    batch, heads, length, dim, scale = 2, 2, 150, 16, 0.25
    q = 3 * torch.randn(batch, heads * group, length, dim, device=DEVICE)
    k = torch.randn(batch, heads, length, dim, device=DEVICE)
    (kept,) = MeanScorer().state(GEOMETRY, length, dim, k.dtype)
    means = torch.stack([part.mean(2) for part in k.split(GEOMETRY.block_size, 2)], 2).to(kept.dtype)
    assert means.shape[2:] == kept.shape
    shape = TileShape.choose(group)
    sizes = {"batch": batch, "length_q": length, "length_k": length, "block_size": 16, "device": DEVICE}
    plan = plan_tiles(shape, **sizes)
    numbers = {"geometry": GEOMETRY, "scale": scale, "dense_len": 0, "length_k": length, "window": window}
    state = (means.contiguous(),)
    lists = select_blocks(MEANS, _select_mean_kernel, q, state, (means.shape[2],), plan, heads_kv=heads, **numbers)
    found = sets_from_lists(lists, plan, batch, heads, length, GEOMETRY.num_blocks(length)).cpu()
    expected = expected_sets(q.cpu(), means.cpu(), GEOMETRY, scale, window)
    far = expected.sum(-1) < torch.tensor([min(i // 16 + 1, 10) for i in range(length)])
    assert far.any()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("capacity", [5, 100, 4096])
def test_the_pooled_scorer_keeps_what_decode_steps_use(capacity):
    scorer: Scorer = PooledScorer()
    k = torch.zeros(2, 3, capacity, 16, dtype=torch.float16)
    tensors = new_state(k, GEOMETRY)
    kept = scorer.state(GEOMETRY, capacity, 16, k.dtype)
    assert [tensor.name for tensor in kept] == ["k1", "k2"]
    for tensor, there in zip(kept, tensors[:2], strict=True):
        assert (there.shape, there.dtype) == ((2, 3, *tensor.shape), tensor.dtype)


arrange(globals())
