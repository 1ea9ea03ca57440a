"""``torch.func`` and forward-mode differentiation in, around and beside attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import infllm_pass
from infllm_pass.errors import ForwardModeError
from tests.support.common import SMALL, relative_error

LENGTHS = (100, 40)
"""On both sides of `SMALL.dense_len`, 64."""


class Attention(nn.Module):
    """Attention by hand, which every transform works on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(16, 48).double()

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).movedim(-3, 0).transpose(-2, -3)
        at = torch.arange(x.shape[-2])
        return (q @ k.mT * 0.3).masked_fill(at[:, None] < at, float("-inf")).softmax(-1) @ v


MODEL = Attention()


def loss(x):
    return MODEL(x).sin().sum()


def fused_loss(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True).sin().sum()


def of_parameters(x):
    named = {name: parameter.detach() for name, parameter in MODEL.named_parameters()}
    return grad(lambda named: functional_call(MODEL, named, (x,)).sin().sum())(named)["project.weight"]


def dual(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x.cos()))).tangent


INSIDE = {
    "grad": lambda x: grad(loss)(x),
    "grad, fused": lambda x: grad(fused_loss)(x),
    "grad of parameters": of_parameters,
    "grad of grad": lambda x: grad(lambda x: grad(loss)(x).sin().sum())(x),
    "vjp": lambda x: vjp(MODEL, x)[1](torch.ones(x.shape[0], 2, x.shape[1], 8).double())[0],
    "jvp": lambda x: jvp(MODEL, (x,), (x.cos(),))[1],
    "jacrev": lambda x: jacrev(lambda s: MODEL(x * s).sum((0, 2, 3)))(torch.ones((), dtype=x.dtype)),
    "vmap": lambda x: vmap(MODEL)(x[None]),
    "vmap of grad": lambda x: vmap(grad(loss))(x[None]),
    "dual numbers": lambda x: dual(MODEL, x),
}


def assert_usable(x):
    """Nothing of a transform is left: the same transforms run uncompiled."""
    for name in ("grad", "jvp", "dual numbers"):
        INSIDE[name](x)


@pytest.mark.parametrize("name", INSIDE)
def test_attention_inside_a_transform_stays_as_it_is_with_a_reason(name):
    for length in LENGTHS:
        torch._dynamo.reset()
        x = torch.randn(2, length, 16).double()
        sparse = infllm_pass.sparsify(torch.compile(INSIDE[name], backend="aot_eager"), SMALL)
        with pytest.warns(infllm_pass.errors.NoAttentionSiteWarning, match="FUNCTION_TRANSFORM"):
            found = sparse(x)
        assert relative_error(found, INSIDE[name](x)) < 1e-12
        assert {site.reason for site in infllm_pass.report(sparse).sites} == {"FUNCTION_TRANSFORM"}
        assert_usable(x)


def test_attention_inside_a_nested_graph_of_a_transform_stays_dense():
    torch._dynamo.reset()

    def checkpointed(x):
        return vmap(lambda x: torch.utils.checkpoint.checkpoint(MODEL, x, use_reentrant=False))(x)

    x = torch.randn(1, 2, 100, 16).double()
    sparse = infllm_pass.sparsify(torch.compile(checkpointed, backend="eager"), SMALL)
    with pytest.warns(infllm_pass.errors.NoAttentionSiteWarning, match="FUNCTION_TRANSFORM"):
        assert relative_error(sparse(x), vmap(MODEL)(x)) < 1e-12
    (site,) = infllm_pass.report(sparse).sites
    assert (site.branch, site.reason) == ("dense", "FUNCTION_TRANSFORM")
    assert_usable(x[0])


def test_attention_beside_a_transform_is_sparse():
    torch._dynamo.reset()
    x = torch.randn(2, 100, 16).double()
    sparse = infllm_pass.sparsify(torch.compile(lambda x: (MODEL(x), grad(loss)(x)), backend="aot_eager"), SMALL)
    alone = infllm_pass.sparsify(torch.compile(MODEL, backend="aot_eager"), SMALL, strict=True)
    out, gradient = sparse(x)
    assert relative_error(out, alone(x)) < 1e-12
    assert relative_error(gradient, grad(loss)(x)) < 1e-12
    branches = [(site.branch, site.reason) for site in infllm_pass.report(sparse).sites]
    assert branches == [("sparse", "SWITCHABLE"), ("dense", "FUNCTION_TRANSFORM")]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_tangents_from_outside_are_right_or_refused_and_never_lost(gradients):
    torch._dynamo.reset()
    x = torch.randn(2, 100, 16).double()
    expected = jvp(MODEL, (x,), (x.cos(),))[1]
    sparse = infllm_pass.sparsify(torch.compile(MODEL, backend="aot_eager"), SMALL)
    with torch.set_grad_enabled(gradients):
        before = sparse(x)
        with pytest.raises(ForwardModeError, match="tangents"):
            dual(sparse, x)
        assert torch.equal(sparse(x), before)
    assert relative_error(jvp(sparse, (x,), (x.cos(),))[1], expected) < 1e-12
    torch._dynamo.reset()
    assert relative_error(dual(infllm_pass.sparsify(torch.compile(MODEL, backend="eager"), SMALL), x), expected) < 1e-12
    assert_usable(x)


def test_the_function_refuses_tangents():
    x = torch.randn(1, 2, 100, 8)
    call = lambda x: infllm_pass.switchable_attention(x, x, x, SMALL)  # noqa: E731
    for transform in (lambda: dual(call, x), lambda: jvp(call, (x,), (x.cos(),))):
        with pytest.raises(ForwardModeError):
            transform()
    assert call(x).isfinite().all()
