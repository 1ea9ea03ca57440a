from __future__ import annotations

import pytest
import torch

import infllm_pass
from infllm_pass.errors import DeviceError, DtypeError, ShapeError
from infllm_pass.kernels import reference
from infllm_pass.lowering.ops import prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall
from tests.support.common import SMALL, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def qkv(batch=1, heads=6, heads_kv=2, length=77, dim=16, dtype=torch.float32, dim_v=None, requires_grad=False):
    shapes = [(heads, dim), (heads_kv, dim), (heads_kv, dim_v or dim)]
    return [
        torch.randn(batch, h, length, d, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for h, d in shapes
    ]


def arguments(config=SMALL, dense_len=0):
    return AttentionCall(0.25, dense_len, config.geometry).arguments


def select(q, k):
    return prefill.select_blocks(q, k, prefill.compress_keys(q, k, *arguments()), *arguments())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparse", [True, False], ids=["blocks", "dense"])
def test_opcheck(dtype, sparse):
    q, k, v = qkv(dtype=dtype, requires_grad=True)
    torch.library.opcheck(prefill.compress_keys.default, (q, k, *arguments()))
    state = prefill.compress_keys(q, k, *arguments())
    torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *arguments()))
    selection = select(q, k) if sparse else []
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype != torch.float32 else {}
    torch.library.opcheck(prefill.block_attention.default, (q, k, v, selection, *arguments()), **tolerance)


@pytest.mark.parametrize("sparse", [True, False], ids=["blocks", "dense"])
def test_opcheck_of_the_backward(sparse):
    q, k, v = qkv()
    selection = select(q, k) if sparse else []
    out, lse = prefill.block_attention(q, k, v, selection, *arguments())
    given = (torch.randn_like(out), q, k, v, out, lse, selection, *arguments())
    torch.library.opcheck(prefill.block_attention_backward.default, given)


@pytest.mark.parametrize(
    ("group", "length", "place"),
    [
        (3, 43, {}),
        (1, 41, {"window": 11}),
        (2, 37, {"key_mask": (torch.arange(37) % 5 != 3)[None]}),
        (4, 33, {"offsets": torch.tensor([2], dtype=torch.int32), "offset": -5}),
        (7, 29, {"cu_seqlens_k": torch.tensor([0, 3, 29], dtype=torch.int32), "dense_len": 20}),
        (8, 19, {"dense_len": 20}),
    ],
    ids=str,
)
def test_gradcheck_with_the_selection_held_fixed(group, length, place):
    q, k, v = qkv(heads=2 * group, length=length, dim=3, dtype=torch.float64, dim_v=2, requires_grad=True)
    given = AttentionCall(**{"scale": 0.25, "dense_len": 0, "geometry": SMALL.geometry} | place).arguments
    selection = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *given), *given)
    run = lambda q, k, v: prefill.block_attention(q, k, v, selection, *given)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gradients_match_the_oracle(dtype):
    q, k, v = qkv(batch=2, length=91, dtype=dtype, requires_grad=True)
    config = infllm_pass.SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})
    out = infllm_pass.switchable_attention(q, k, v, config)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k, v), grad)
    common = {"geometry": config.geometry, "scale": 0.25, "offset": 0}
    (blocks,) = select(q, k)
    chosen = torch.zeros(2, 2, 91, 13, dtype=torch.bool)
    chosen.scatter_(-1, blocks.clamp(min=0).long(), blocks >= 0)
    chosen[..., 0] |= (blocks == 0).any(-1)
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected_out, _ = reference.attention(*wide, chosen, **common)
    expected = torch.autograd.grad(expected_out, wide, grad.double())
    assert relative_error(out, expected_out) <= TOLERANCE[dtype]
    for name, a, e in zip("qkv", actual, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, e) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_calls_are_compiled_without_a_graph_break(dynamic):
    compiled = torch.compile(infllm_pass.switchable_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (100, 50):
        q, k, v = qkv(length=length)
        assert torch.equal(compiled(q, k, v, SMALL), infllm_pass.switchable_attention(q, k, v, SMALL))


def test_nothing_is_differentiated_through_the_selection():
    q, k, _ = qkv(requires_grad=True)
    state = prefill.compress_keys(q, k, *arguments())
    assert not any(each.requires_grad for each in (*state, *select(q, k)))


def test_log_sum_exp_is_not_differentiable():
    q, k, v = qkv(requires_grad=True)
    assert not prefill.block_attention(q, k, v, [], *arguments())[1].requires_grad


def test_head_dim_of_values_may_differ():
    q, k, v = qkv(dim=16, dim_v=24)
    out = infllm_pass.switchable_attention(q, k, v, SMALL)
    assert out.shape == (1, 6, 77, 24)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ShapeError, "four dimensions"),
        (lambda q, k, v: (q[:, :5], k, v), ShapeError, "multiple of the number of key/value heads"),
        (lambda q, k, v: (q, k[..., :8], v), ShapeError, "head_dim 16 and k 8"),
        (lambda q, k, v: (q, k, v[:, :, :5]), ShapeError, "agree in all but the head dimension"),
        (lambda q, k, v: (torch.cat([q, q]), k, v), ShapeError, "batch size 2"),
        (lambda q, k, v: (q.half(), k, v), DtypeError, "cast them to one dtype"),
        (lambda q, k, v: (q, k, v.bfloat16()), DtypeError, "cast them to one dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), DtypeError, "expected one of"),
        (lambda q, k, v: (q, k.to("meta"), v), DeviceError, "move them to one device"),
        (lambda q, k, v: tuple(t.repeat(1, 1, 1, 17) for t in (q, k, v)), ShapeError, "head_dim 272"),
    ],
)
def test_bad_tensors(change, error, message):
    with pytest.raises(error, match=message):
        infllm_pass.switchable_attention(*change(*qkv()), SMALL)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(1, 77), DtypeError, "expected torch.bool"),
        (torch.ones(1, 76, dtype=torch.bool), ShapeError, r"\[B, Lk\] = \[1, 77\]"),
        (torch.ones(77, dtype=torch.bool), ShapeError, r"\[B, Lk\]"),
    ],
)
def test_bad_key_masks(mask, error, message):
    with pytest.raises(error, match=message):
        infllm_pass.switchable_attention(*qkv(), SMALL, key_mask=mask)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
def test_the_switch_is_at_dense_len(length):
    q, k, v = qkv(length=length, dtype=torch.float64)
    common = {"geometry": SMALL.geometry, "scale": 0.25, "offset": 0}
    selected = reference.select_blocks(q, k, **common) if length >= SMALL.dense_len else None
    expected, _ = reference.attention(q, k, v, selected, **common)
    actual = infllm_pass.switchable_attention(q, k, v, SMALL)
    assert torch.allclose(actual, expected, atol=1e-10)


def test_each_row_takes_its_own_side_of_the_switch():
    """A short row of a padded batch is dense although the batch is long."""
    q, k, v = qkv(batch=2, length=100, dtype=torch.float64)
    key_mask = torch.ones(2, 100, dtype=torch.bool)
    key_mask[1, :50] = False
    out = infllm_pass.switchable_attention(q, k, v, SMALL, key_mask=key_mask)
    short = [tensor[1:, :, 50:] for tensor in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*short, is_causal=True, enable_gqa=True)
    assert relative_error(out[1:, :, 50:], dense) < 1e-10
    alone = infllm_pass.switchable_attention(q[:1], k[:1], v[:1], SMALL)
    assert relative_error(out[:1], alone) < 1e-10
