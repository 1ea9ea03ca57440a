"""Soft caps, key biases and sinks of the operators on the CPU, in C++ and in torch operators, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import infllm_pass
from infllm_pass.errors import DeviceError, DtypeError, ExportError, ShapeError
from infllm_pass.kernels import reference
from infllm_pass.kernels.cpu import chunked, native
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.export.onnx.exporter import OnnxTarget
from infllm_pass.lowering.ops import decode, prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall, DecodeCall
from tests.lowering.ops.test_placement import CALLS, TOTAL, rows
from tests.support.common import SMALL, relative_error
from tests.support.score_terms import BLOCK, CAP, WINDOW, blocks_before_the_window

TERMS = {
    "cap": {"softcap": 0.8},
    "bias": {"key_bias": (2, 2)},
    "bias of all rows": {"key_bias": (1, 2)},
    "bias of all heads": {"key_bias": (2, 1)},
    "sinks": {"sinks": 6},
    "all": {"softcap": 1.5, "key_bias": (1, 1), "sinks": 6},
}
PLACES = CALLS | {
    "whole rows": rows(),
    "holes": rows(key_mask=CALLS["window of less than a block"].place["key_mask"]),
    "few": rows(length_q=7),
}


COMPUTED = ("compress_keys", "select_blocks", "attend_blocks", "attend_blocks_backward")


@pytest.fixture(params=["C++", "torch operators"])
def computed(request, monkeypatch):
    """Everything in one way alone."""
    if request.param == "C++":
        for name in COMPUTED:
            monkeypatch.setattr(chunked, name, lambda *_: pytest.fail("computed in torch operators"))
    else:
        for name in COMPUTED:
            monkeypatch.setattr(native, name, lambda *_: None)
        monkeypatch.setattr(native, "decode_attention", lambda *_: False)


def draw(name, batch=2, length=TOTAL, dtype=torch.float64):
    """The arguments of a case of `TERMS`; tensors need gradients."""
    terms = dict(TERMS[name])
    if sizes := terms.get("key_bias"):
        bias = 2 * torch.randn(min(sizes[0], batch), sizes[1], length, dtype=torch.float64)
        bias[..., 3::11] = -torch.inf
        terms["key_bias"] = bias.to(dtype).requires_grad_()
    if count := terms.get("sinks"):
        terms["sinks"] = torch.randn(count, dtype=torch.float64).to(dtype).add(1).requires_grad_()
    return terms


def differentiable(terms):
    return [x for x in terms.values() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("place", PLACES)
def test_outputs_and_gradients_equal_the_oracle(place, terms, computed):
    """Float64, in which both select the same blocks."""
    torch.manual_seed(5)
    call, own = PLACES[place], draw(terms, PLACES[place].batch)
    call = replace(call, place=call.place | own)
    q, k, v = tensors = [x.requires_grad_() for x in call.tensors(torch.float64)]
    operands = call.operands()
    selection = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *operands), *operands)
    out, lse = prefill.block_attention(q, k, v, selection, *operands)
    expected, expected_lse = reference.attention(q, k, v, call.select(q, k), **call.oracle())
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    assert relative_error(out, expected) <= 1e-12
    grad = torch.randn_like(out)
    inputs = [*tensors, *differentiable(own)]
    for mine, other, given in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), inputs, strict=True
    ):
        assert mine.shape == given.shape
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "changes", [{"lse": "exact"}, {"query_block": 4}, {"scorer": "tokens", "channels": ((1, 2, 5),)}]
)
def test_selections_score_capped_logits(changes, computed):
    geometry = replace(BlockGeometry(4, 2, 8, init_blocks=1, local_blocks=1, selected_blocks=4), **changes)
    torch.manual_seed(2)
    q, k = 6 * torch.randn(1, 6, 90, 16, dtype=torch.float64), torch.randn(1, 2, 90, 16, dtype=torch.float64)
    chosen = {}
    for softcap in (0.0, 0.7):
        call = AttentionCall(0.25, 0, geometry, softcap=softcap)
        (blocks,) = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call.arguments), *call.arguments)
        expected = reference.select_blocks(q, k, geometry=geometry, scale=0.25, softcap=softcap)
        found = torch.zeros_like(torch.cat([expected, expected[..., :1]], -1))
        found.scatter_(-1, torch.where(blocks < 0, expected.shape[-1], blocks).long(), True)
        assert torch.equal(found[..., :-1], expected)
        chosen[softcap] = expected
    assert not torch.equal(*chosen.values())  # a cap that changed nothing would show nothing


def test_what_no_query_sees_has_no_capped_score(computed):
    q, k, expected = blocks_before_the_window()
    geometry = BlockGeometry(8, 4, BLOCK, 1, 1, 3, scorer="tokens", channels=((4, 5),))
    call = AttentionCall(1.0, 0, geometry, window=WINDOW, softcap=CAP).arguments
    (blocks,) = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call), *call)
    assert set(blocks.flatten().tolist()) == expected
    numbers = torch.arange(k.shape[2]) // BLOCK
    v = torch.nn.functional.one_hot(numbers, 72).float()[None, None]  # of a block
    step = DecodeCall(torch.tensor([k.shape[2]]), 1.0, 0, geometry, window=WINDOW, softcap=CAP)
    out, _ = decode.decode_attention(q, k, v, decode.new_state(k, geometry), *step.arguments)
    assert set(out.sum((0, 1, 2)).nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [40, 100])
@pytest.mark.parametrize("terms", TERMS)
def test_lower_precisions(terms, length, dtype):
    """Terms may be of another dtype than q, k and v."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, length, 16).to(dtype).requires_grad_() for h in (6, 2, 2))
    own = draw(terms, length=length, dtype=torch.float32)
    config = replace(SMALL, dense_len=64)
    out = infllm_pass.switchable_attention(q, k, v, config, scale=0.25, **own)
    call = AttentionCall(0.25, 64, config.geometry_for(16), **own)
    (blocks,) = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call.arguments), *call.arguments)
    chosen = torch.zeros(2, 2, length, call.geometry.num_blocks(length) + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(blocks < 0, chosen.shape[-1] - 1, blocks).long(), True)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    places = {"geometry": call.geometry, "scale": 0.25, "dense_len": 64, "offset": 0}
    expected, _ = reference.attention(*wide, chosen[..., :-1], **places, **own)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    assert out.dtype == dtype
    assert relative_error(out, expected) <= bound
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, [q, k, v, *differentiable(own)], grad)
    other = torch.autograd.grad(expected, [*wide, *differentiable(own)], grad.double())
    for one, two, given in zip(mine, other, [q, k, v, *differentiable(own)], strict=True):
        assert one.dtype == given.dtype
        assert relative_error(one, two) <= bound


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("length", [40, 77])
def test_opcheck(terms, length):
    q, k, v = (torch.randn(2, h, length, 16, requires_grad=True) for h in (6, 2, 2))
    call = AttentionCall(0.25, 64, SMALL.geometry, **draw(terms, length=length, dtype=torch.float32)).arguments
    selection = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *call), *call)
    torch.library.opcheck(prefill.block_attention.default, (q, k, v, selection, *call))
    out, lse = (x.detach() for x in prefill.block_attention(q, k, v, selection, *call))
    given = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), out, lse, selection)
    call = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
    torch.library.opcheck(prefill.block_attention_backward.default, (*given, *call))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_calls_give_the_same_gradients(backend):
    q, k, v = (torch.randn(2, h, 100, 16, requires_grad=True) for h in (6, 2, 2))
    own = draw("all", length=100, dtype=torch.float32)
    inputs = [q, k, v, *differentiable(own)]
    run = torch.compile(infllm_pass.switchable_attention, backend=backend, fullgraph=True)
    outs = [function(q, k, v, SMALL, **own) for function in (run, infllm_pass.switchable_attention)]
    grad = torch.randn_like(outs[0])
    for mine, other in zip(*(torch.autograd.grad(out, inputs, grad) for out in outs), strict=True):
        assert torch.equal(mine, other)


def test_sequences_packed_one_after_the_other():
    torch.manual_seed(4)
    lengths = torch.tensor([70, 3, 90])
    bounds = torch.tensor([0, *lengths.cumsum(0)]).int()
    q, k, v = (torch.randn(163, h, 16, dtype=torch.float64) for h in (6, 2, 2))
    own = draw("all", 1, 163)
    own["key_bias"] = own["key_bias"][0]
    out = infllm_pass.switchable_attention_varlen(q, k, v, bounds, bounds, SMALL, scale=0.25, **own)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = (x[None, begin:end].transpose(1, 2) for x in (q, k, v))
        terms = own | {"key_bias": own["key_bias"][None, :, begin:end]}
        alone = infllm_pass.switchable_attention(*part, SMALL, scale=0.25, **terms)
        torch.testing.assert_close(out[begin:end], alone[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -torch.inf])], ids=["no sinks", "sinks"])
def test_a_query_that_sees_no_key_gives_its_sink(sinks, computed):
    """The first query, as a key's bias hides the first key."""
    q, k, v = (torch.randn(1, h, 5, 4, requires_grad=True) for h in (2, 1, 1))
    bias = torch.zeros(1, 1, 5)
    bias[..., 0] = -torch.inf
    given = [x.requires_grad_() for x in (bias, sinks) if x is not None]
    call = AttentionCall(0.5, 64, SMALL.geometry, key_bias=bias, sinks=sinks)
    out, lse = prefill.block_attention(q, k, v, [], *call.arguments)
    assert not out[:, :, 0].any()
    expected = torch.full((2,), -torch.inf) if sinks is None else sinks
    torch.testing.assert_close(lse[0, :, 0], expected, rtol=1e-6, atol=0)
    assert out[:, :, 1:].any()
    gradients = torch.autograd.grad(out.square().sum(), [q, k, v, *given])
    assert all(bool(each.isfinite().all()) for each in gradients)
    assert not gradients[0][:, :, 0].any()


STEPS = {
    "pooled": SMALL.geometry,
    "tokens": replace(SMALL.geometry, scorer="tokens", channels=((0, 3, 4),)),
    "shared": replace(SMALL.geometry, query_block=4),
}


@pytest.mark.parametrize("terms", ["cap", "bias of all heads", "sinks", "all"])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("geometry", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("place", [{}, {"window": 30}, {"starts": [0, 9], "holes": True}], ids=str)
def test_decode_steps_equal_the_oracle(place, geometry, count, terms, computed):
    """One row on each side of `dense_len`; the cache holds NaN where no key is."""
    torch.manual_seed(8)
    lengths, capacity = [130, 41], 140
    starts = place.get("starts", [0, 0])
    q = torch.randn(2, 6, count, 16, dtype=torch.float64)
    k, v = (torch.full((2, 2, capacity, 16), torch.nan, dtype=torch.float64) for _ in range(2))
    key_mask = torch.rand(2, capacity) < 0.8 if "holes" in place else None
    own = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in draw(terms, 2, capacity).items()}
    for row, (begin, end) in enumerate(zip(starts, lengths, strict=True)):
        for x in (k, v):
            x[row, :, begin:end] = torch.randn(2, end - begin, 16)
    given = (torch.tensor(starts), key_mask, place.get("window"))
    call = DecodeCall(torch.tensor(lengths), 0.25, 64, geometry, *given, **own)
    out, lse = decode.decode_attention(q, k, v, decode.new_state(k, geometry), *call.arguments)
    for row, (begin, end) in enumerate(zip(starts, lengths, strict=True)):
        part = slice(row, row + 1)
        keys, values = k[part, :, begin:end], v[part, :, begin:end]
        fields = {"geometry": geometry, "scale": 0.25, "dense_len": 64, "window": place.get("window")}
        fields |= {"sinks": own.get("sinks"), "softcap": own.get("softcap", 0.0)}
        if "key_bias" in own:
            fields["key_bias"] = own["key_bias"].expand(2, -1, -1)[part, :, begin:end]
        hidden = {} if key_mask is None else {"key_mask": key_mask[part, begin:end]}
        # Holes move no key in a step: the whole stretch is the sequence.
        if hidden:
            hidden["cu_seqlens_k"] = torch.tensor([0, end - begin], dtype=torch.int32)
        sets = reference.select_blocks(q[part], keys, **fields, **hidden)
        expected, expected_lse = reference.attention(q[part], keys, values, sets, **fields, **hidden)
        torch.testing.assert_close(out[part], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse[part], expected_lse, rtol=1e-11, atol=1e-11)


def test_opcheck_of_a_step():
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((6, 1), (2, 90), (2, 90)))
    own = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in draw("all", 2, 90).items()}
    call = DecodeCall(torch.tensor([80, 40]), 0.25, 64, SMALL.geometry, **own)
    torch.library.opcheck(
        decode.decode_attention.default, (q, k, v, decode.new_state(k, SMALL.geometry), *call.arguments)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["expanded", "every other"])
def test_a_step_counts_the_sink_once_over_many_partial_softmaxes(layout, dtype):
    """Dense over 4 000 keys, of which no task of the kernel takes more than some hundred."""
    torch.manual_seed(3)
    capacity, length = 4100, 4000
    q = torch.randn(2, 6, 2, 16).to(dtype)
    k, v = (torch.randn(2, 2, capacity, 16).to(dtype) for _ in range(2))
    bias = torch.randn(1, 2, 2 * capacity).to(dtype)[..., ::2]
    if layout == "expanded":
        bias = torch.randn(2, 1, capacity).to(dtype).expand(2, 2, -1)
    own = {"key_bias": bias, "sinks": torch.tensor([9.0, 8.0, -4.0, 0.0, 8.5, -torch.inf]).to(dtype), "softcap": 2.0}
    call = DecodeCall(torch.tensor([length]), 0.25, 10_000, SMALL.geometry, **own)
    out, lse = decode.decode_attention(q, k, v, decode.new_state(k, SMALL.geometry), *call.arguments)
    own["key_bias"] = bias[:, :, :length]
    fields = {"geometry": SMALL.geometry, "scale": 0.25, "dense_len": 10_000, **own}
    keys, values = k[:, :, :length], v[:, :, :length]
    expected, expected_lse = reference.attention(q, keys, values, reference.select_blocks(q, keys, **fields), **fields)
    assert relative_error(out, expected) <= (1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, h, 900, 16, requires_grad=True) for h in (6, 2, 2))
    own = draw("all", 1, 900, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = infllm_pass.switchable_attention(q, k, v, SMALL, **own)
            results.append(torch.autograd.grad(out.square().sum(), [q, k, v, *differentiable(own)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))


BAD = {
    "rank": (
        {"key_bias": torch.zeros(40)},
        ShapeError,
        r"key_bias has shape \(40,\): expected \[B or 1, Hkv or 1, Lk\]",
    ),
    "rows": ({"key_bias": torch.zeros(3, 1, 40)}, ShapeError, "key_bias has shape"),
    "heads": ({"key_bias": torch.zeros(1, 6, 40)}, ShapeError, "key_bias has shape"),
    "keys": ({"key_bias": torch.zeros(1, 1, 39)}, ShapeError, "key_bias has shape"),
    "integers": ({"key_bias": torch.zeros(1, 1, 40).int()}, DtypeError, "key_bias is torch.int32"),
    "device": ({"key_bias": torch.zeros(1, 1, 40, device="meta")}, DeviceError, "key_bias is on meta"),
    "sinks of rows": ({"sinks": torch.zeros(2, 6)}, ShapeError, r"one number a query head, \[Hq\] = \[6\]"),
    "sinks of key heads": ({"sinks": torch.zeros(2)}, ShapeError, "sinks has shape"),
    "whole sinks": ({"sinks": torch.zeros(6).long()}, DtypeError, "sinks is torch.int64"),
    "sinks elsewhere": ({"sinks": torch.zeros(6, device="meta")}, DeviceError, "sinks is on meta"),
    "negative cap": ({"softcap": -1.0}, ShapeError, "softcap=-1.0: expected a positive number"),
    "no number": ({"softcap": float("nan")}, ShapeError, "softcap=nan"),
    "endless cap": ({"softcap": float("inf")}, ShapeError, "softcap=inf"),
}


@pytest.mark.parametrize(("terms", "error", "reason"), BAD.values(), ids=BAD)
def test_bad_terms_are_refused_before_anything_is_computed(terms, error, reason, monkeypatch):
    for name in ("attention_forward", "compress_keys", "select_blocks"):
        monkeypatch.setattr(prefill.torch_kernels, name, lambda *_: pytest.fail("computed"))
    q, k, v = (torch.randn(2, h, 40, 16) for h in (6, 2, 2))
    with pytest.raises(error, match=reason):
        infllm_pass.switchable_attention(q, k, v, SMALL, **terms)
    call = AttentionCall(0.25, 0, SMALL.geometry, **terms).arguments
    with pytest.raises(error, match=reason):
        prefill.block_attention(q, k, v, [], *call)
    state = decode.new_state(k, SMALL.geometry)
    call = DecodeCall(torch.tensor([40]), 0.25, 0, SMALL.geometry, **terms).arguments
    with pytest.raises(error, match=reason):
        decode.decode_attention(q[:, :, :1], k, v, state, *call)
    assert not state[-1].any()


@pytest.mark.parametrize("terms", ["bias", "all"])
def test_onnx_files_have_no_terms(terms, tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return infllm_pass.switchable_attention(q, k, v, SMALL, **own)

    own = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in draw(terms, 1, 80).items()}
    given = tuple(torch.randn(1, h, 80, 16) for h in (6, 2, 2))
    program = torch.export.export(Attention(), given)
    names = [name for name in ("key_bias", "sinks", "softcap") if name in own]
    with pytest.raises(ExportError, match=" and ".join(names)):
        OnnxTarget(tmp_path / "model.onnx").write(program)
    assert not list(tmp_path.iterdir())
