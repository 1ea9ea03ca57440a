"""The operators with token scores, on the CPU: what they take and give, gradients, and models that call them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import infllm_pass
from infllm_pass.errors import DtypeError, ShapeError
from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops import prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall
from tests.support import cache_support
from tests.support.cache_support import GrowingAttention, expected
from tests.support.common import TOKENS, relative_error

SMALL = BlockGeometry(4, 2, 8, 1, 2, 5, scorer="tokens", channels=((0, 3, 4, 5, 12),))
GEOMETRIES = {
    "one set": SMALL,
    "channels of each head": replace(SMALL, channels=((0, 1), (5, 15))),
    "int8": replace(SMALL, score_dtype="int8"),
    "fp8, shared by 4": replace(SMALL, score_dtype="fp8", query_block=4),
}


def qkv(length=90, group=3, dtype=torch.float32, requires_grad=False):
    shapes = [(2 * group, 16), (2, 16), (2, 12)]
    return [torch.randn(2, h, length, d).to(dtype).requires_grad_(requires_grad) for h, d in shapes]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(geometry, dtype):
    q, k, v = qkv(dtype=dtype, requires_grad=True)
    call = AttentionCall(0.25, 0, geometry).arguments
    torch.library.opcheck(prefill.compress_keys.default, (q, k, *call))
    state = prefill.compress_keys(q, k, *call)
    assert not any(tensor.requires_grad for tensor in state)
    if geometry.score_dtype == "fp8":  # torch computes with none, not even to see that it was left alone
        checks = ("test_faketensor", "test_autograd_registration")
        torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *call), test_utils=checks)
    else:
        torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *call))
    selection = prefill.select_blocks(q, k, state, *call)
    assert [(each.dtype, each.requires_grad) for each in selection] == [(torch.int32, False)]
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype != torch.float32 else {}
    torch.library.opcheck(prefill.block_attention.default, (q, k, v, selection, *call), **tolerance)


@pytest.mark.parametrize(
    ("kept", "dtypes"),
    [
        ("key", [torch.bfloat16]),
        ("int8", [torch.int8, torch.float32]),
        ("fp8", [torch.float8_e4m3fn, torch.float32]),
    ],
)
def test_what_is_kept_of_the_keys(kept, dtypes):
    q, k, _ = qkv(dtype=torch.bfloat16)
    k.detach()[:, :, 7] = 0.0
    geometry = replace(GEOMETRIES["channels of each head"], score_dtype=kept)
    state = prefill.compress_keys(q, k, *AttentionCall(0.25, 0, geometry).arguments)
    assert [tensor.dtype for tensor in state] == dtypes
    assert [tensor.shape for tensor in state] == [(2, 2, 90, 2), (2, 2, 90)][: len(state)]
    read = state[0].double() * (state[1].double()[..., None] if len(state) > 1 else 1.0)
    assert torch.equal(read, torch.stack([reference.index_keys(row, geometry) for row in k]))
    error = (read - torch.stack([k[:, head][..., list(some)] for head, some in enumerate(geometry.channels)], 1)).abs()
    assert float(error.amax()) <= {"key": 0.0, "int8": 0.02, "fp8": 0.15}[kept] * float(k.abs().amax()) / 2


@pytest.mark.parametrize("name", ["query_block", "score_dtype", "plain"])
@pytest.mark.parametrize("group", [1, 2, 4, 16])
def test_the_function_and_its_gradients_are_those_of_the_oracle(name, group):
    config = replace(
        TOKENS, **{"query_block": {"query_block": 16}, "score_dtype": {"score_dtype": "int8"}}.get(name, {})
    )
    q, k, v = qkv(150, group, torch.float64, requires_grad=True)
    mask = torch.rand(2, 150) < 0.8
    mask[0, :100] = False  # shorter than dense_len
    out = infllm_pass.switchable_attention(q, k, v, config, scale=0.25, key_mask=mask)
    common = {"geometry": config.geometry_for(16), "scale": 0.25, "key_mask": mask, "dense_len": config.dense_len}
    chosen = reference.select_blocks(q, k, **common)
    wanted = reference.attention(q, k, v, chosen, **common)[0]
    assert relative_error(out, wanted) < 1e-12
    pooled = reference.select_blocks(q, k, **common | {"geometry": config.geometry})
    assert not torch.equal(chosen, pooled)
    grad = torch.randn_like(out)
    given, right = (torch.autograd.grad(each, (q, k, v), grad) for each in (out, wanted))
    for one, other in zip(given, right, strict=True):
        assert relative_error(one, other) < 1e-11


@pytest.mark.parametrize("place", ["window", "packed", "offsets"])
def test_compiled_and_uncompiled_calls_agree(place):
    q, k, v = qkv(130)
    numbers = {"window": {"window": 70}, "packed": {}, "offsets": {"offset": torch.tensor([3, 9])}}[place]
    if place == "packed":
        numbers = {"segment_ids": (torch.arange(130) // 100).expand(2, -1)}
    if place == "offsets":
        q = q[:, :, :100]

    def call(q, k, v):
        return infllm_pass.switchable_attention(q, k, v, TOKENS, scale=0.25, **numbers)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="inductor", fullgraph=True)
    assert relative_error(compiled(q, k, v), call(q, k, v)) < 1e-6


@pytest.mark.parametrize("kept", ["key", "int8"])
def test_a_growing_cache_under_inductor(kept):
    config = replace(cache_support.CONFIG, scorer="tokens", score_dtype=kept)
    module = GrowingAttention()
    torch._dynamo.reset()
    model = infllm_pass.sparsify(torch.compile(module, backend="inductor"), config)
    cache = tuple(torch.randn(1, cache_support.KV_HEADS, 50, cache_support.DIM, dtype=torch.float64) for _ in range(2))
    for count in (1, 1, 1, 1, 5, 1, 16, 1, 1):
        x = cache_support.tokens(1, count)
        with torch.no_grad():
            out, *cache = model(x, *cache)
            wanted = expected(module, x, *cache, cache[0].shape[2] - count, config=config)
        assert relative_error(out, wanted) < 1e-12
    assert {site.cache_state for site in infllm_pass.report(model).sites} == {"carried"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: state[:1], ShapeError, "state has 1 tensors: expected the 2 of infllm::compress_keys on cpu"),
        (lambda state: [state[0][:, :, 1:], state[1]], ShapeError, r"ki has shape .*: expected \(2, 2, 90, 5\)"),
        (lambda state: [state[0].float(), state[1]], DtypeError, "ki is torch.float32: expected torch.int8"),
        (lambda state: [state[0], state[1].half()], DtypeError, "ki_scale is torch.float16: expected torch.float32"),
    ],
)
def test_another_state_is_refused(change, error, message):
    q, k, _ = qkv()
    call = AttentionCall(0.25, 0, GEOMETRIES["int8"]).arguments
    state = prefill.compress_keys(q, k, *call)
    with pytest.raises(error, match=message):
        prefill.select_blocks(q, k, change(state), *call)


def test_channels_that_the_keys_lack_are_refused():
    q, k, _ = qkv()
    for channels, message in (
        (((3, 16),), "channels are 3-3\\+16-16: expected different numbers in ascending order, below head_dim 16"),
        (((4, 3),), "ascending"),
        (((3,), (4,), (5,)), "expected one set, or one for each of the 2 key/value heads"),
        (((3, 4), (5,)), "expected as many in each set"),
        ((), "channels are none: expected one set"),
    ):
        call = AttentionCall(0.25, 0, replace(SMALL, channels=channels)).arguments
        with pytest.raises(ShapeError, match=message):
            prefill.compress_keys(q, k, *call)
