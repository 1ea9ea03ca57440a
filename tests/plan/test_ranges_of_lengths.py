"""Lengths that no guard may narrow: declared ranges, and sizes that come from data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass.compat.dynamo import UserError
from infllm_pass.errors import NoAttentionSiteWarning
from infllm_pass.kernels import reference
from tests.support.common import SMALL, llama, oracle_attention, relative_error, tokens

LENGTHS = (100, 40, 64, 63)
"""On both sides of `SMALL.dense_len`, 64, and at it."""


@pytest.fixture(autouse=True)
def data_dependent_shapes():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=1)


def gradients(model, parameters, ids, **inputs):
    for parameter in parameters:
        parameter.grad = None
    out = model(ids, use_cache=False, **inputs).logits
    out.square().mean().backward()
    return torch.cat([out.detach().flatten(), *(parameter.grad.flatten() for parameter in parameters)])


def compare(plain, sparse, mark, lengths=LENGTHS, padded=False):
    """Logits and gradients of a model at several lengths against the oracle's."""
    parameters = list(plain.parameters())
    for length in lengths:
        ids, inputs = tokens(length, 2), {}
        if padded:
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][0, :9] = 0
        with oracle_attention(SMALL, inputs["attention_mask"].bool() if padded else None):
            expected = gradients(plain, parameters, ids, **inputs)
        for tensor in (ids, *inputs.values()):
            mark(tensor)
        assert relative_error(gradients(sparse, parameters, ids, **inputs), expected) < 1e-7, length
    return infllm_pass.report(sparse).graphs


MARKS = {
    "range": lambda ids: torch._dynamo.mark_dynamic(ids, 1, min=16, max=4096),
    "no bounds": lambda ids: torch._dynamo.mark_dynamic(ids, 1),
    "maybe": lambda ids: torch._dynamo.maybe_mark_dynamic(ids, 1),
}


@pytest.mark.parametrize(
    ("kind", "graphs", "backend"), [("range", 1, "aot_eager"), ("no bounds", 2, "eager"), ("maybe", 2, "eager")]
)
def test_a_llama_of_marked_lengths_equals_the_oracle_on_both_sides(kind, graphs, backend, model):
    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend=backend), SMALL, strict="all")
    made = compare(model, sparse, MARKS[kind])
    assert len(made) == graphs
    assert all(("at run time" in graph.sites[0].guard) == (graphs == 1) for graph in made)


def test_a_padded_batch_of_a_declared_range_equals_the_oracle(model):
    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL, strict="all")
    assert len(compare(model, sparse, MARKS["range"], (100, 40), padded=True)) == 1


def test_all_sizes_dynamic_takes_a_graph_for_each_side(model):
    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager", dynamic=True), SMALL, strict="all")
    made = compare(model, sparse, lambda ids: None, (100, 40))
    assert [graph.branches for graph in made] == [("sparse",), ("dense",)]


@pytest.mark.parametrize(("least", "most", "branch"), [(64, 4096, "sparse"), (16, 63, "dense")])
def test_a_range_on_one_side_needs_no_switch(least, most, branch, model):
    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL, strict="all")
    made = compare(
        model,
        sparse,
        lambda ids: torch._dynamo.mark_dynamic(ids, 1, min=least, max=most),
        [length for length in LENGTHS if least <= length <= most],
    )
    assert [(graph.branches, "at run time" in graph.sites[0].guard) for graph in made] == [((branch,), False)]


def test_an_exported_range_equals_the_oracle_on_both_sides(model):
    ids = tokens(80)
    shapes = {"input_ids": {1: torch.export.Dim("L", min=16, max=4096)}, "use_cache": None}
    given = {"input_ids": ids, "use_cache": False}
    refuses_the_plain_model = torch.__version__.startswith("2.11.")
    if refuses_the_plain_model:
        with pytest.raises(UserError, match=r"min\(8\*"):
            torch.export.export(model, (), given, dynamic_shapes=shapes)
        pytest.skip("torch.export takes declared ranges of a Llama's lengths from 2.13 on")
    program = infllm_pass.export(model, kwargs=given, dynamic_shapes=shapes, config=SMALL).module()
    for length in LENGTHS:
        ids = tokens(length)
        with torch.no_grad(), oracle_attention(SMALL):
            expected = model(ids, use_cache=False).logits
        assert relative_error(program(input_ids=ids, use_cache=False).logits, expected) < 1e-7, length


class Kept(nn.Module):
    """Attention of those tokens that data lets through."""

    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(24, 96).double()
        self.attention = attention

    def forward(self, x, keep):
        x = x[keep]
        q, k, v = self.project(x).view(1, x.shape[0], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.attention(q, k, v)


def by_hand(q, k, v):
    at = torch.arange(q.shape[2])
    return (q @ k.mT * 0.3).masked_fill(at[:, None] < at, float("-inf")).softmax(-1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def oracle(q, k, v):
    call = {"geometry": SMALL.geometry_for(8), "scale": 0.3, "dense_len": SMALL.dense_len}
    selected = reference.select_blocks(q, k, **call) if k.shape[2] >= SMALL.dense_len else None
    return reference.attention(q, k, v, selected, **call)[0]


@pytest.mark.parametrize(
    ("attention", "backend"),
    [(by_hand, "aot_eager"), (fused, "aot_eager"), (by_hand, "inductor")],
    ids=["by hand", "fused", "inductor"],
)
def test_a_length_that_data_decides_is_switched_at_run_time(attention, backend):
    torch._dynamo.reset()
    plain, expected = Kept(attention), Kept(oracle)
    sparse = infllm_pass.sparsify(torch.compile(plain, backend=backend), SMALL, strict="all")
    for length, kept in ((200, 0.7), (100, 0.3), (200, 0.5)):
        x, keep = torch.randn(length, 24).double(), torch.rand(length) < kept
        results = []
        for model in (sparse, expected):
            leaf = x.clone().requires_grad_()
            out = model(leaf, keep)
            (gradient,) = torch.autograd.grad(out.sin().sum(), leaf)
            results.append(torch.cat([out.flatten(), gradient.flatten()]))
        assert relative_error(*results) < 1e-10
    switches = {site.guard.partition(" ")[2] for site in infllm_pass.report(sparse).sites}
    # Dynamo ends its graph at fused attention of such a length, and the next one's length is its input's
    assert switches == ({">= 64 at run time"} if attention is by_hand else {">= 64", "< 64"})


def test_heads_that_data_decides_stay_dense_with_a_reason():
    torch._dynamo.reset()

    def chosen(q, keep):
        q = q[:, keep]
        return by_hand(q, q, q)

    sparse = infllm_pass.sparsify(torch.compile(chosen, backend="eager"), SMALL)
    q, keep = torch.randn(1, 4, 80, 8), torch.tensor([True, False, True, True])
    with pytest.warns(NoAttentionSiteWarning):
        assert torch.equal(sparse(q, keep), chosen(q, keep))
    assert {site.reason for site in infllm_pass.report(sparse).sites} == {"DATA_DEPENDENT_SIZE"}


def test_chunks_of_a_declared_number_over_a_growing_cache(model):
    from transformers import DynamicCache

    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL, strict="all")
    ids = tokens(130)
    grown, caches = [[], []], [DynamicCache(), DynamicCache()]
    for first, last in ((0, 50), (50, 70), (70, 74), (74, 130)):
        for number, run in enumerate((model, sparse)):
            chunk = ids[:, first:last].clone()
            torch._dynamo.mark_dynamic(chunk, 1, min=2, max=200)
            with torch.no_grad(), oracle_attention(SMALL) if run is model else torch.no_grad():
                grown[number].append(run(chunk, past_key_values=caches[number]).logits)
    assert relative_error(torch.cat(grown[1], 1), torch.cat(grown[0], 1)) < 1e-7
