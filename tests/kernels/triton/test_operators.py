"""The operators in Triton kernels: the results are the kernels' own, and opcheck has no objection."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ShapeError
from infllm_pass.kernels import reference
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.decode.attention import decode_attend
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState, IndexState
from infllm_pass.kernels.triton.decode.select import decode_select
from infllm_pass.kernels.triton.decode.step import DecodeStep
from infllm_pass.kernels.triton.decode.token_scores import decode_select_tokens
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.prefill.compress import compress_keys
from infllm_pass.kernels.triton.prefill.pooled import select_tiles
from infllm_pass.kernels.triton.tile_schedule import key_bounds, plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileShape
from infllm_pass.lowering.ops import checks, decode_triton, prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall, DecodeCall
from infllm_pass.lowering.ops.decode import decode_attention, new_state
from tests.support.triton_device import DEVICE, arrange

GEOMETRY = BlockGeometry(8, 4, 16, 1, 1, 4)
TILED = SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=3, init_blocks=1, dense_len=64, scorer="pooled"
)
TOKENS = replace(GEOMETRY, scorer="tokens", channels=((*range(4, 8), *range(12, 16)),), score_dtype="int8")
SCALE = 0.3
SCORERS = pytest.mark.parametrize("geometry", [GEOMETRY, TOKENS], ids=["pooled", "tokens"])


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(checks, "_refusal", lambda *_: None)


def tensors(length=101, requires_grad=False):
    return [torch.randn(1, n, length, 16, device=DEVICE, requires_grad=requires_grad) for n in (4, 2, 2)]


def draw_terms(length):
    """A key bias of one row, sinks and a cap."""
    bias, sinks = torch.randn(1, 2, length, device=DEVICE), torch.randn(4, device=DEVICE)
    return {"key_bias": bias, "sinks": sinks, "softcap": 1.5}


@pytest.mark.parametrize(("sparse", "terms"), [(True, True), (False, False)], ids=["sparse, terms", "dense"])
def test_a_prompt(sparse, terms):
    q, k, v = tensors()
    terms = draw_terms(101) if terms else {}
    plan = plan_tiles(TileShape.choose(2), batch=1, length_q=101, length_k=101, block_size=16, device=DEVICE, offset=0)
    numbers = {"geometry": GEOMETRY, "scale": SCALE, "dense_len": 0}
    call = AttentionCall(SCALE, 0, GEOMETRY, **terms).arguments
    lists, selection = None, []
    if sparse:
        keys = compress_keys(k, plan, geometry=GEOMETRY)
        lists = select_tiles(q, keys, plan, **numbers, length_k=101, softcap=terms.get("softcap", 0.0))
        state = prefill.compress_keys(q, k, *call)
        selection = prefill.select_blocks(q, k, state, *call)
        assert torch.equal(selection[2], lists.counts)
        torch.library.opcheck(prefill.compress_keys.default, (q, k, *call), test_utils=SHAPES)
        torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *call), test_utils=SHAPES)
    expected = attention_forward(AttentionInputs(q, k, v, lists, plan, **numbers, **terms, every_query=True))
    for mine, other in zip(prefill.block_attention(q, k, v, selection, *call), expected, strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()
    torch.library.opcheck(prefill.block_attention.default, (q, k, v, selection, *call))
    given = (torch.randn_like(expected[0]), q, k, v, *expected, selection, *call)
    torch.library.opcheck(prefill.block_attention_backward.default, given)


SHAPES = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Checks of results of which parts are not written: memory behind the last window, lists behind their ends."""


@pytest.mark.parametrize("length", [0, 1, 101])
def test_gradients_flow_to_q_k_and_v_only(length):
    q, k, v = tensors(length, requires_grad=True)
    call = AttentionCall(SCALE, 0, GEOMETRY).arguments
    state = prefill.compress_keys(q, k, *call)
    selection = prefill.select_blocks(q, k, state, *call)
    assert not any(each.requires_grad for each in (*state, *selection))
    out, lse = prefill.block_attention(q, k, v, selection, *call)
    assert (out.requires_grad, lse.requires_grad) == (True, False)
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert [each.shape for each in gradients] == [each.shape for each in (q, k, v)]


@pytest.mark.parametrize("length", [0, 101])
def test_gradients_flow_to_terms(length):
    """Selection, attention and its gradients by the operators alone, against autograd through the oracle."""
    given = tensors(length, requires_grad=True)
    terms = draw_terms(length)
    leaves = [*given, *(terms[name].requires_grad_() for name in ("key_bias", "sinks"))]
    call = AttentionCall(SCALE, 0, GEOMETRY, **terms).arguments
    selection = prefill.select_blocks(*given[:2], prefill.compress_keys(*given[:2], *call), *call)
    out, lse = prefill.block_attention(*given, selection, *call)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    fields = {"geometry": GEOMETRY, "scale": SCALE, "softcap": 1.5}
    sets = reference.select_blocks(*given[:2], **fields)
    expected, expected_lse = reference.attention(*exact[:3], sets, **fields, key_bias=exact[3], sinks=exact[4])
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    for mine, wanted in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(mine.double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_checkpointed_layer_saves_lists_and_output(monkeypatch):
    ran = Counter()
    launched = prefill._launched

    def counted(function, *arguments):
        ran[function] += 1
        return launched(function, *arguments)

    monkeypatch.setattr(prefill, "_launched", counted)
    inputs = tensors(90, requires_grad=True)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(1.5 * q, k, v, is_causal=True, enable_gqa=True)

    def step(function):
        return torch.autograd.grad(function(*inputs).square().sum(), inputs)

    config = replace(TILED, checkpoint_saves="attention")
    backend = "aot_eager_decomp_partition"
    plain = step(infllm_pass.sparsify(torch.compile(attend, backend=backend), config, strict="all"))
    ran.clear()
    wrapped = partial(checkpoint, attend, use_reentrant=False)
    model = infllm_pass.sparsify(torch.compile(wrapped, backend=backend), config, strict="all")
    assert all(torch.equal(one, other) for one, other in zip(step(model), plain, strict=True))
    assert ran == dict.fromkeys(("compress_keys", "select_blocks", "block_attention", "block_attention_backward"), 1)


def test_query_agnostic_blocks(monkeypatch):
    """Prompt, gradient of the bias and steps by the operators, against the oracle; compilers see their shapes."""
    geometry = BlockGeometry(8, 4, 16, 1, 1, 6, "exact", agnostic_blocks=2)
    q, k, v = given = tensors(203, requires_grad=True)
    bias = torch.randn(1, 2, 203, device=DEVICE, requires_grad=True)
    fields = {"geometry": geometry, "scale": SCALE, "key_bias": bias}
    call = AttentionCall(dense_len=0, **fields).arguments
    state = prefill.compress_keys(q, k, *call)
    selection = prefill.select_blocks(q, k, state, *call)
    torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *call), test_utils=SHAPES)
    out, _ = prefill.block_attention(*given, selection, *call)
    exact = [leaf.detach().double().requires_grad_() for leaf in (*given, bias)]
    selected = reference.select_blocks(q, k, **fields)
    assert not torch.equal(selected, reference.select_blocks(q, k, geometry=geometry.query_aware, scale=SCALE))
    expected, _ = reference.attention(*exact[:3], selected, **fields | {"key_bias": exact[3]})
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(out)
    for mine, wanted in zip(
        torch.autograd.grad(out, (*given, bias), grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), wanted, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(decode_triton, "is_recorded_in_graphs", lambda _: True)
    q, k, v, bias = (x.detach() for x in (*given, bias))
    cache = [tensor.zero_() for tensor in new_state(k, geometry)]
    for length in (202, 203):
        step = DecodeCall(torch.tensor([length], device=DEVICE), SCALE, 0, geometry, key_bias=bias).arguments
        found, _ = decode_attention(q[:, :, length - 1 : length], k, v, cache, *step)
        torch.testing.assert_close(found.double(), expected[:, :, length - 1 : length], atol=1e-5, rtol=1e-5)
    torch.library.opcheck(decode_attention.default, (q[:, :, -1:], k, v, cache, *step))


@SCORERS
def test_empty_calls_give_what_others_give(geometry):
    """The same number of tensors with the same dtypes."""
    call = AttentionCall(SCALE, 0, geometry).arguments
    dtypes = []
    for length in (0, 40):
        q, k, v = tensors(length)
        state = prefill.compress_keys(q, k, *call)
        selection = prefill.select_blocks(q, k, state, *call)
        results = prefill.block_attention(q, k, v, selection, *call)
        dtypes.append([each.dtype for each in (*state, *selection, *results)])
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize(
    ("score_dtype", "holes"), [("key", False), ("int8", True), ("fp8", False)], ids=["key", "int8, holes", "fp8"]
)
def test_a_prompt_by_token_scores(score_dtype, holes):
    """The whole prompt equals the oracle, and compilers see the shapes of all that is passed on."""
    q, k, v = tensors(150)
    geometry = replace(TOKENS, score_dtype=score_dtype)
    key_mask = torch.rand(1, 150, device=DEVICE) < 0.7 if holes else None
    fields = {"geometry": geometry, "scale": SCALE, "key_mask": key_mask}
    call = AttentionCall(dense_len=0, **fields).arguments
    state = prefill.compress_keys(q, k, *call)
    selection = prefill.select_blocks(q, k, state, *call)
    out, _ = prefill.block_attention(q, k, v, selection, *call)
    selected = reference.select_blocks(q, k, **fields)
    expected, _ = reference.attention(q, k, v, selected, **fields)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    checked = SHAPES[1:] if score_dtype == "fp8" else SHAPES  # the schema's check multiplies, which float8 cannot
    torch.library.opcheck(prefill.compress_keys.default, (q, k, *call), test_utils=checked)
    torch.library.opcheck(prefill.select_blocks.default, (q, k, state, *call), test_utils=checked)
    if not holes:
        with pytest.raises(ShapeError, match=r"ki has shape .* made of the same keys"):
            prefill.select_blocks(q, k[:, :, :-1], state, *call)
    other = AttentionCall(dense_len=0, **{**fields, "geometry": GEOMETRY}).arguments
    with pytest.raises(ShapeError, match="state"):
        prefill.select_blocks(q, k, state, *other)


def test_a_state_or_selection_of_other_tensors_is_refused():
    """Before a kernel reads past its end."""
    call = AttentionCall(SCALE, 0, GEOMETRY).arguments
    (q, k, v), (short_q, short_k, _) = tensors(), tensors(40)
    state = prefill.compress_keys(short_q, short_k, *call)
    with pytest.raises(ShapeError, match=r"K1 has shape .* made of the same keys"):
        prefill.select_blocks(q, k, state, *call)
    with pytest.raises(ShapeError, match="state has 2 tensors: expected the 3"):
        prefill.select_blocks(q, k, state[:2], *call)
    selection = prefill.select_blocks(short_q, short_k, state, *call)
    with pytest.raises(ShapeError, match=r"panels has shape .* made of the same queries"):
        prefill.block_attention(q, k, v, selection, *call)
    with pytest.raises(ShapeError, match="selection has 1 tensors: expected none, or the 5"):
        prefill.block_attention(q, k, v, selection[:1], *call)


def test_bounds_of_valid_keys():
    mask = torch.rand(5, 9001, device=DEVICE) < 0.5
    mask[0] = False
    mask[1] = True
    mask[2] = False
    mask[2, 4097] = True
    mask[3, :50] = False
    mask[4, 20:] = False
    for given in (mask, mask.T.contiguous().T):
        for (first, end), row in zip(key_bounds(given).tolist(), mask, strict=True):
            valid = row.nonzero()[:, 0].tolist() or [0, -1]
            assert (first, end) == (valid[0], valid[-1] + 1)


@pytest.mark.parametrize(("geometry", "terms"), [(GEOMETRY, True), (TOKENS, False)], ids=["pooled, terms", "tokens"])
def test_a_decode_step(geometry, terms, monkeypatch):
    """The operator also writes the state; compilers call it, as where CUDA graphs record it."""
    monkeypatch.setattr(decode_triton, "is_recorded_in_graphs", lambda _: True)
    q, k, v = (torch.randn(2, heads, size, 16, device=DEVICE) for heads, size in ((4, 1), (2, 120), (2, 120)))
    terms = draw_terms(120) if terms else {}
    lengths, starts = torch.tensor([110, 70], device=DEVICE), torch.tensor([3, 0], device=DEVICE)
    numbers = {"geometry": geometry, "scale": SCALE, "dense_len": 80, "window": None}
    states = [[tensor.zero_() for tensor in new_state(k, geometry)] for _ in range(2)]
    rows = DecodeRows(lengths, starts)
    step = DecodeStep(q, k, rows, **numbers, softcap=terms.get("softcap", 0.0))
    tokens = geometry.scorer == "tokens"
    select, kept = (decode_select_tokens, IndexState) if tokens else (decode_select, DecodeState)
    blocks = select(step, kept.of(states[0]))
    expected = decode_attend(q, k, v, blocks, rows, None, **numbers, **terms)
    given = (q, k, v, states[1], *DecodeCall(lengths, SCALE, 80, geometry, starts, **terms).arguments)
    results = decode_attention(*given)
    for mine, other in zip((*results, *states[1]), (*expected, *states[0]), strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()
    assert states[1][2].tolist() == [107, 70]
    torch.library.opcheck(decode_attention.default, given)


arrange(globals())
