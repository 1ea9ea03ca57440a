"""Masks that arrive as inputs of a graph: after a graph break, from eager code, from the user."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.errors import MaskInputWarning, NoAttentionSiteWarning
from tests.support.common import SMALL, llama

COVERING = infllm_pass.SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})


def breaking(_module, _args, _kwargs):
    torch._dynamo.graph_break()


def batches():
    """Arguments of a Llama: lengths on both sides of the dense length with padding, and packed."""
    for length, padding in ((96, 20), (40, 5)):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :padding] = 0
        yield torch.arange(2 * length).view(2, length) % 61, {"attention_mask": mask}
    positions = torch.cat([torch.arange(58), torch.arange(30)]).expand(2, -1)
    yield torch.arange(2 * 88).view(2, 88) % 61, {"position_ids": positions}


def gradients(model, call, ids, arguments):
    model.zero_grad()
    call(ids, labels=ids, use_cache=False, **arguments).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def with_breaks(model):
    for layer in model.model.layers:
        layer.register_forward_pre_hook(breaking, with_kwargs=True)
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), SMALL)
    return sparse, lambda: infllm_pass.report(sparse)


def by_layer(model):
    layers = model.model.layers
    for place, layer in enumerate(layers):
        layers[place] = infllm_pass.sparsify(torch.compile(layer, backend="aot_eager"), SMALL)
    return model, lambda: infllm_pass.report(layers[0])


@pytest.fixture(scope="module")
def whole_graph_s_gradients():
    model = llama()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL)
    return [gradients(model, sparse, *batch) for batch in batches()]


@pytest.mark.parametrize("compiled", [with_breaks, by_layer])
def test_layers_that_are_handed_a_mask_train_as_those_of_a_whole_graph(compiled, whole_graph_s_gradients):
    torch._dynamo.reset()
    parts = llama()
    call, report = compiled(parts)
    for wanted, batch in zip(whole_graph_s_gradients, batches(), strict=True):
        got = gradients(parts, call, *batch)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    sites = report().sites
    assert {site.decision for site in sites} == {"switchable"}
    assert {site.branch for site in sites} == {"sparse", "dense"}
    assert {"causal, padded keys", "causal, packed sequences"} <= {site.mask for site in sites}
    handed = [site for site in sites if site.mask != "causal"]
    assert all("the mask is read from the values of attention_mask" in site.mask_origin for site in handed)


def test_the_report_names_the_line_at_which_the_trace_broke():
    sparse, report = with_breaks(llama())
    ids, arguments = next(batches())
    with torch.no_grad():
        sparse(ids, **arguments)
    line = breaking.__code__.co_firstlineno + 1
    assert f"test_mask_inputs.py:{line}: Call to `torch._dynamo.graph_break()`" in report().sites[0].mask_origin
    assert f"test_mask_inputs.py:{line}" in str(report()).replace("\n", "").replace(" ", "")


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def heads(length=96):
    return [torch.randn(2, 4, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def mask_of(length=96, padding=0, packed=False, window=0):
    query, key = torch.arange(length)[:, None], torch.arange(length)
    mask = (key <= query).expand(2, 1, length, length).clone()
    if padding:
        mask[0, :, :, :padding] = False
    if packed:
        mask &= (query >= 40) == (key >= 40)
    if window:
        mask &= key > query - window
    return mask


def added(mask, lowest):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, lowest)


@pytest.mark.parametrize(
    "written",
    [lambda mask: mask, lambda mask: added(mask, float("-inf")), lambda mask: added(mask, torch.finfo().min)],
    ids=["bool", "-inf", "lowest"],
)
def test_a_user_s_mask_is_read_at_every_call(written):
    sparse = infllm_pass.sparsify(torch.compile(attend, backend="aot_eager"), COVERING)
    masks = [
        mask_of(),
        mask_of(padding=9),
        mask_of(packed=True),
        mask_of(packed=True, padding=9),
        mask_of(length=80, padding=30),
        mask_of(length=40),
    ]
    for mask in masks:
        q, k, v = heads(mask.shape[-1])
        torch.testing.assert_close(sparse(q, k, v, written(mask)), attend(q, k, v, mask), rtol=1e-9, atol=1e-9)
    report = infllm_pass.report(sparse)
    assert report.switchable == len(report.sites)
    assert {site.branch for site in report.sites} == {"sparse", "dense"}


def test_a_mask_that_vectors_cannot_say_runs_dense_with_a_warning():
    sparse = infllm_pass.sparsify(torch.compile(attend, backend="aot_eager"), SMALL)
    q, k, v = heads()
    sparse(q, k, v, mask_of())
    torch.manual_seed(0)
    scattered = mask_of() & (torch.rand(2, 1, 96, 96) > 0.3) | torch.eye(96, dtype=torch.bool)
    with pytest.warns(MaskInputWarning, match="mask .*uncompiled and dense.*2-D padding mask"):
        torch.testing.assert_close(sparse(q, k, v, scattered), attend(q, k, v, scattered), rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()
    dense = infllm_pass.sparsify(torch.compile(attend, backend="aot_eager"), SMALL)
    with pytest.warns(NoAttentionSiteWarning, match="its values are not those of a causal mask"):
        dense(q, k, v, scattered)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_edited_between_layers_is_read_again(mode):
    edit = torch.compiler.disable(lambda mask: mask[:, :, :, :11].fill_(False))

    def layers(q, k, v, mask):
        first = attend(q, k, v, mask)
        edit(mask)
        return first, attend(q, k, v, mask)[:, :, 11:]

    with mode():
        sparse = infllm_pass.sparsify(torch.compile(layers, backend="aot_eager"), COVERING)
        q, k, v = (tensor.detach().clone() for tensor in heads())
        for _ in range(2):
            for got, wanted in zip(sparse(q, k, v, mask_of()), layers(q, k, v, mask_of()), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert infllm_pass.report(sparse).switchable == len(infllm_pass.report(sparse).sites)


def test_a_mask_that_the_graph_writes_to_is_not_read():
    def layers(q, k, v, mask):
        mask[..., 5, 0] = False
        return attend(q, k, v, mask)

    sparse = infllm_pass.sparsify(torch.compile(layers, backend="aot_eager"), SMALL)
    q, k, v = heads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoAttentionSiteWarning)
        torch.testing.assert_close(sparse(q, k, v, mask_of()), layers(q, k, v, mask_of()), rtol=1e-9, atol=1e-9)
    assert infllm_pass.report(sparse).switchable == 0


def test_sites_keep_their_names_when_a_graph_is_compiled_for_other_masks():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.Module()
            self.attention.forward = attend

        def forward(self, *inputs):
            return self.attention(*inputs)

    asked = []
    sparse = infllm_pass.sparsify(
        torch.compile(Layer(), backend="aot_eager"),
        SMALL,
        filter_fn=lambda site: asked.append(site.module_path) or True,
    )
    q, k, v = heads()
    sparse(q, k, v, mask_of())
    sparse(q, k, v, mask_of(padding=9))
    assert asked == ["attention", "attention"]


def test_flex_attention_s_packed_batch_is_read_across_its_graph_break():
    model = llama(weights=3.0)
    ids, positions = list(batches())[-1]
    with torch.no_grad():
        expected = model(ids, use_cache=False, **positions).logits
        model.set_attn_implementation("flex_attention")
        sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), COVERING)
        torch.testing.assert_close(sparse(ids, use_cache=False, **positions).logits, expected, rtol=1e-5, atol=1e-5)
    sites = infllm_pass.report(sparse).sites
    assert [site.mask for site in sites] == ["causal, packed sequences"] * 2
    assert {site.branch for site in sites} == {"sparse"}


def test_what_no_site_relies_on_is_not_read_again(monkeypatch):
    def attend_with_bias(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    sparse = infllm_pass.sparsify(torch.compile(attend_with_bias, backend="aot_eager"), SMALL)
    q, k, v = heads()
    bias = added(mask_of(padding=9), 5.0)  # two values, of which none hides
    with pytest.warns(NoAttentionSiteWarning, match="ADDITIVE_BIAS"):
        sparse(q, k, v, bias)
    monkeypatch.setattr("infllm_pass.runtime.read_graphs.READER", None)
    torch.testing.assert_close(sparse(q, k, v, bias), attend_with_bias(q, k, v, bias), rtol=1e-9, atol=1e-9)
