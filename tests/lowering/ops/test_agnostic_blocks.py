"""Query-agnostic blocks (NOSA) of the operators on the CPU, against the oracle and against the formulas as published.

Sources: arXiv 2510.13602, and the repository openbmb/NOSA, of whose inference code some faults are tested for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ConfigError, ShapeError
from infllm_pass.kernels import reference
from infllm_pass.kernels.cpu.importance import block_importance, fill_blocks, window_importance
from infllm_pass.lowering.ops import decode, prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall, DecodeCall
from tests.lowering.ops.test_placement import CALLS
from tests.support.common import SMALL, relative_error

CONFIG = replace(SMALL, topk=7, agnostic_topk=3, lse="exact", dense_len=0)
"""Nine blocks of eight: one initial, three local, two by score and three by importance."""

SCALE = 0.25


def draw(length, *, batch=2, rows=1, heads=2, dtype=torch.float64):
    q, k, v = (torch.randn(batch, count, length, 16, dtype=dtype) for count in (6, 2, 2))
    return q, k, v, torch.randn(rows, heads, length, dtype=dtype)


def select(q, k, call):
    """The selection of the operators as a set."""
    (blocks,) = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call.arguments), *call.arguments)
    count = call.geometry.num_blocks(k.shape[2])
    found = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool)
    return found.scatter_(-1, torch.where(blocks < 0, count, blocks).long(), True)[..., :count]


@pytest.mark.parametrize("place", CALLS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 2)], ids=["one bias", "a bias a row and head"])
def test_selections_equal_the_oracles(place, rows):
    """Packed and padded rows, windows, offsets, both sides of dense_len."""
    torch.manual_seed(3)
    case = CALLS[place]
    geometry = replace(SMALL.geometry, selected_blocks=6, agnostic_blocks=2, lse="exact")
    q, k, _ = case.tensors(torch.float64)
    bias = torch.randn(min(rows[0], case.batch), rows[1], k.shape[2], dtype=torch.float64)
    fields = case.place | {"key_bias": bias}
    found = select(q, k, AttentionCall(SCALE, SMALL.dense_len, geometry, **fields))
    expected = reference.select_blocks(q, k, **case.oracle() | {"geometry": geometry, "key_bias": bias})
    assert torch.equal(found, expected)


def test_the_oracle_is_the_published_selection():
    """Two stages as published: the best by score, forced blocks at infinity, then the largest importance, these too."""
    torch.manual_seed(0)
    config = SparseAttentionConfig.nosa()
    length, g = 128 * 64 + 17, config.geometry
    q, k = torch.randn(1, 4, 1, 16, dtype=torch.float64), torch.randn(1, 1, length, 16, dtype=torch.float64)
    bias = torch.randn(1, 1, length, dtype=torch.float64)
    windows = (length - 32) // 16 + 1
    keys = torch.stack([k[0, 0, 16 * at : 16 * at + 32].mean(0) for at in range(windows)])
    importance = torch.stack([bias[0, 0, 16 * at : 16 * at + 32].mean() for at in range(windows)])
    weights = torch.softmax(q[0, :, 0] @ keys.T / 4, -1).sum(0)
    own = (length - 1) // 64
    pooled = [F.max_pool1d(F.pad(x, (1, 4), value=-torch.inf)[None], 5, 4)[0, : own + 1] for x in (weights, importance)]
    forced = torch.zeros(own + 1, dtype=torch.bool)
    forced[:1] = forced[own - 16 :] = True
    by_query = pooled[0].masked_fill(forced, torch.inf).topk(33).indices
    both = pooled[1].masked_fill(forced, torch.inf)
    both[by_query] = torch.inf
    expected = torch.zeros(own + 1, dtype=torch.bool)
    expected[both.topk(64).indices] = True
    found = reference.select_blocks(q, k, geometry=g, scale=0.25, key_bias=bias, offset=length - 1)[0, 0, 0]
    assert torch.equal(found, expected)
    assert torch.equal(select(q, k, AttentionCall(0.25, 0, g, key_bias=bias))[0, 0, 0], expected)


def test_sizes_and_forced_blocks_of_every_query():
    """As many blocks as there are, up to the budget; the first, the own and the local ones; none ahead of the query."""
    q, k, _, bias = draw(300)
    found = select(q, k, AttentionCall(SCALE, 0, CONFIG.geometry, key_bias=bias))
    own = torch.arange(300) // 8
    assert torch.equal(found.sum(-1), (own + 1).clamp(max=9).expand(2, 2, -1))
    block = torch.arange(38)
    forced = (block == 0) | ((block >= own[:, None] - 2) & (block <= own[:, None]))
    assert bool((found | ~forced).all())
    assert not bool((found & (block > own[:, None])).any())


@pytest.mark.parametrize("bias", ["zero", "of either sign", "hidden"])
def test_ties_go_to_the_lower_block(bias):
    """As where A is 0: the fill then is the first blocks that the query did not choose."""
    q, k, _, key_bias = draw(300)
    key_bias = key_bias * 0.0 if bias != "hidden" else torch.full_like(key_bias, -torch.inf)
    if bias == "zero":
        key_bias = key_bias.abs()
    geometry = CONFIG.geometry
    found = select(q, k, AttentionCall(SCALE, 0, geometry, key_bias=key_bias))
    chosen = select(q, k, AttentionCall(SCALE, 0, geometry.query_aware))
    rest = torch.where(chosen | (torch.arange(38) > torch.arange(300)[:, None] // 8), 0, 1)
    assert torch.equal(found, chosen | ((rest == 1) & (rest.cumsum(-1) <= 3)))


def test_the_overlap_of_adjacent_steps_is_never_below_its_bound():
    """10 000 steps of random scores: no two steps share fewer than the query-agnostic blocks, nor miss the best ones.

    The worst case, queries that choose by chance: scores of two steps have nothing to do with each other.
    """
    torch.manual_seed(0)
    config = SparseAttentionConfig.nosa()
    g, steps, blocks = config.geometry, 10_000, 200
    importance = torch.randn(1, blocks)
    own = torch.full((steps,), blocks - 1)
    free = torch.arange(1, blocks - 17)
    by_query = free[torch.rand(steps, free.numel()).argsort(-1)[:, :15]]
    forced = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(blocks - 17, blocks)]).expand(steps, -1)
    chosen = torch.cat([forced, by_query], -1).int()[None]
    filled = fill_blocks(chosen, importance, torch.zeros_like(own), own, g)
    sets = torch.zeros(steps, blocks, dtype=torch.bool).scatter_(-1, filled[0].long(), True)
    assert bool((sets.sum(-1) == 64).all())
    best = free[importance[0, free].topk(31).indices]
    assert bool(sets[:, best].all())
    shared = (sets[1:] & sets[:-1]).sum(-1)
    assert int(shared.min()) >= 31 + 18  # the bound k_e / k, and the forced blocks
    assert int((shared - 49).min()) < 15  # the queries' own choices differ, or the bound would hold for nothing


def test_attention_is_the_published_ratio():
    """Weighted values over weights, both by ``exp(s)``, in float64; without a bias it is plain sparse attention."""
    torch.manual_seed(1)
    q, k, v, bias = draw(150)
    out = infllm_pass.switchable_attention(q, k, v, CONFIG, scale=SCALE, key_bias=bias)
    chosen = select(q, k, AttentionCall(SCALE, 0, CONFIG.geometry, key_bias=bias))
    index = torch.arange(150)
    seen = chosen[..., index // 8] & (index <= index[:, None])
    weights = (SCALE * q.unflatten(1, (2, 3)) @ k[:, :, None].mT).exp() * seen[:, :, None]
    factor = bias.exp()[:, :, None, :, None]
    ratio = (weights @ (v[:, :, None] * factor)) / (weights @ factor)
    torch.testing.assert_close(out, ratio.flatten(1, 2), rtol=1e-12, atol=1e-12)
    plain = infllm_pass.switchable_attention(q, k, v, CONFIG, scale=SCALE, key_bias=0 * bias)
    same = select(q, k, AttentionCall(SCALE, 0, CONFIG.geometry, key_bias=0 * bias))
    torch.testing.assert_close(plain, reference.attention(q, k, v, same, geometry=CONFIG.geometry, scale=SCALE)[0])


def importance_of(v, amplitude, weight):
    """``A * softplus(W v)``, v being all heads' values of a token one after the other; ``[B, Hkv, L]``."""
    return amplitude[:, None] * F.softplus(v.transpose(1, 2).flatten(2) @ weight.T).mT


@pytest.mark.parametrize("amplitude", [0.0, 0.7])
def test_gradients_of_the_importance_come_through_the_bias_alone(amplitude):
    """Of A and W as autograd gives them in float64; from A = 0 only A moves, and without the bias neither does."""
    torch.manual_seed(2)
    q, k, v, _ = draw(150)
    leaves = [torch.full((2,), amplitude, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64), v]
    grad = torch.randn(2, 6, 150, 16, dtype=torch.float64)
    chosen, found = None, {}
    for kind in ("ours", "formula", "no bias"):
        a, w, values = (x.clone().requires_grad_() for x in leaves)
        bias = importance_of(values, a, w)
        if kind == "ours":
            chosen = select(q, k, AttentionCall(SCALE, 0, CONFIG.geometry, key_bias=bias.detach()))
            out = infllm_pass.switchable_attention(q, k, values, CONFIG, scale=SCALE, key_bias=bias)
        else:
            added = bias if kind == "formula" else None
            fields = {"geometry": CONFIG.geometry, "scale": SCALE, "key_bias": added}
            out, _ = reference.attention(q, k, values, chosen, **fields)
        found[kind] = torch.autograd.grad(out, [a, w, values], grad, allow_unused=True)
    for mine, exact in zip(found["ours"], found["formula"], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-11)
    assert found["no bias"][:2] == (None, None)
    assert bool((found["ours"][0] != 0).all())
    assert bool((found["ours"][1] != 0).any()) == (amplitude != 0.0)


def decode_steps(q, k, v, bias, geometry, lengths, starts=None, dtype=torch.int32):
    """Outputs of steps of one token, the keys at `lengths - 1`, with one state; `lengths`: a list of a row's each."""
    state = decode.new_state(k, geometry)
    for each in lengths:
        numbers = torch.tensor(each, dtype=dtype)
        call = DecodeCall(numbers, SCALE, 0, geometry, starts=starts, key_bias=bias)
        at = numbers.long() - 1
        queries = torch.stack([q[row, :, at[row % len(at)]] for row in range(q.shape[0])])[:, :, None]
        yield at, decode.decode_attention(queries, k, v, state, *call.arguments)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_step_adds_the_bias_to_scaled_scores(dtype):
    """As a prompt does. Published: decoding computes ``(q.k + s) / sqrt(d)``, prefill ``q.k / sqrt(d) + s``.

    Steps go through new windows and blocks, at which published buffers of fixed shapes fail or go stale.
    """
    torch.manual_seed(4)
    q, k, v, bias = draw(200, rows=2, dtype=dtype)
    whole = infllm_pass.switchable_attention(q, k, v, CONFIG, scale=SCALE, key_bias=bias)
    scaled = infllm_pass.switchable_attention(q, k, v, CONFIG, scale=SCALE, key_bias=bias * SCALE)
    lengths = [[length] for length in (70, *range(129, 165), 199, 200)]
    for at, out in decode_steps(q, k, v, bias, CONFIG.geometry, lengths):
        expected = whole[:, :, int(at)][:, :, None]
        assert relative_error(out, expected) <= (1e-12 if dtype == torch.float64 else 1e-5)
        assert relative_error(out, scaled[:, :, int(at)][:, :, None]) > 0.01  # what the fault would give


def test_rows_of_a_batch_keep_their_own_importance():
    """Rows of different lengths and padding, one state. Published: the last request's keys and biases serve all."""
    torch.manual_seed(5)
    q, k, v, bias = draw(200, batch=3, rows=3)
    starts = torch.tensor([0, 9, 30], dtype=torch.int32)
    lengths = [[length - 60, length, length - 17] for length in range(185, 200)]
    for at, out in decode_steps(q, k, v, bias, CONFIG.geometry, lengths, starts):
        for row, (end, start) in enumerate(zip(at.tolist(), starts.tolist(), strict=True)):
            keys = slice(start, end + 1)
            alone = [x[row : row + 1, :, keys] for x in (q, k, v)]
            expected = infllm_pass.switchable_attention(
                *alone, CONFIG, scale=SCALE, key_bias=bias[row : row + 1, :, keys]
            )
            assert relative_error(out[row], expected[0, :, -1:]) <= 1e-12


def test_a_large_importance_is_finite():
    """softplus of a large number. Published: a fused kernel computes ``log(1 + exp(x))``, which overflows."""
    q, k, v, _ = draw(150, dtype=torch.float32)
    bias = importance_of(v, torch.tensor([1.0, -1.0]), 40 * torch.randn(2, 32))
    assert float(bias.abs().max()) > 90.0
    out = infllm_pass.switchable_attention(q, k, v, CONFIG, scale=SCALE, key_bias=bias)
    assert bool(out.isfinite().all())
    chosen = select(q, k, AttentionCall(SCALE, 0, CONFIG.geometry, key_bias=bias))
    exact, _ = reference.attention(q, k, v, chosen, geometry=CONFIG.geometry, scale=SCALE, key_bias=bias)
    assert relative_error(out, exact) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_bias_in_half_precision_is_read_as_what_it_is(dtype):
    """Published: a bias of float16 is read as bfloat16."""
    torch.manual_seed(6)
    q, k, v, bias = draw(150, dtype=dtype)
    chosen = select(q, k, AttentionCall(SCALE, 0, CONFIG.geometry, key_bias=bias))
    exact, _ = reference.attention(q, k, v, chosen, geometry=CONFIG.geometry, scale=SCALE, key_bias=bias)
    out = infllm_pass.switchable_attention(q, k, v, CONFIG, scale=SCALE, key_bias=bias)
    assert relative_error(out, exact) <= 1e-2


def test_importance_of_windows_with_hidden_keys():
    geometry = CONFIG.geometry
    bias = torch.zeros(1, 40, dtype=torch.float64)
    bias[:, 9], bias[:, 20:] = torch.finfo(torch.float32).min, 2.0
    found = block_importance(window_importance(bias, geometry), 5, geometry)
    assert found.tolist() == [[0.0, 0.0, 2.0, 2.0, 2.0]]
    assert torch.equal(found, reference.block_importance(bias, geometry))
    bias[:, 8:16] = -torch.inf
    assert block_importance(window_importance(bias, geometry), 5, geometry)[0, 1] == -torch.inf


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "agnostic_topk=3 is not valid: expected 0 without key_bias"),
        ({"agnostic_blocks": 6, "bias": True}, "agnostic_topk=6 is not valid: expected 0 to 5"),
        ({"agnostic_blocks": -1, "bias": True}, "agnostic_topk=-1 is not valid: expected 0 to 5"),
        ({"kernel_size": 26, "bias": True}, "windows of keys no longer than"),
        ({"scorer": "tokens", "channels": ((0, 1),), "bias": True}, 'scorer="pooled"'),
    ],
    ids=["no bias", "too many", "negative", "long windows", "tokens"],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(changes, expected):
    changes = dict(changes)
    q, k, v, bias = draw(100)
    bias = bias if changes.pop("bias", False) else None
    geometry = replace(CONFIG.geometry, **changes)
    call = AttentionCall(SCALE, 0, geometry, key_bias=bias)
    for operator in (prefill.compress_keys, prefill.select_blocks):
        arguments = (q, k) if operator is prefill.compress_keys else (q, k, [])
        with pytest.raises(ConfigError, match=expected):
            operator(*arguments, *call.arguments)
    step = DecodeCall(torch.tensor([100]), SCALE, 0, geometry, key_bias=bias)
    with pytest.raises(ConfigError, match=expected):
        decode.decode_attention(q[:, :, :1], k, v, decode.new_state(k, geometry), *step.arguments)


def test_the_function_without_a_bias():
    q, k, v, bias = draw(100)
    with pytest.raises(ConfigError, match="agnostic_topk=3 is not valid: expected 0 without key_bias"):
        infllm_pass.switchable_attention(q, k, v, CONFIG)
    with pytest.raises(ConfigError, match="agnostic_topk=3 is not valid: expected 0 without key_bias"):
        infllm_pass.switchable_attention(q, k, v, replace(CONFIG, dense_len=4096))
    with pytest.raises(ShapeError, match="key_bias"):
        infllm_pass.switchable_attention(q, k, v, CONFIG, key_bias=bias[..., :-1])


def test_a_state_without_importance_is_refused():
    _, k, v, bias = draw(100)
    geometry = CONFIG.geometry
    call = DecodeCall(torch.tensor([100]), SCALE, 0, geometry, key_bias=bias)
    state = decode.new_state(k, geometry)
    assert [tuple(x.shape) for x in state] == [(2, 2, 49, 16), (2, 2, 11, 16), (2, 2, 49), (2,)]
    with pytest.raises(ShapeError, match="expected k1, k2, s1 and filled"):
        decode.decode_attention(torch.randn(2, 6, 1, 16, dtype=k.dtype), k, v, [*state[:2], state[3]], *call.arguments)
