"""DistributedDataParallel and fully_shard in one process: sparse, with the gradients of a model on its own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import infllm_pass
from tests.support.common import SMALL, llama


@pytest.fixture(scope="module", autouse=True)
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def batch(length=96, padding=20):
    ids = torch.arange(2 * length).view(2, length) % 61
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def gradients(model, call, ids, mask):
    model.zero_grad()
    call(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    found = (parameter.grad for parameter in model.parameters())
    return torch.cat([(grad.full_tensor() if hasattr(grad, "full_tensor") else grad).flatten() for grad in found])


@functools.cache
def alone(length=96, padding=20):
    model = llama()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), SMALL)
    return gradients(model, sparse, *batch(length, padding))


class Parts:
    """A backend that counts the graphs that it is given."""

    def __init__(self):
        self.sizes = []

    def __call__(self, module, inputs):
        self.sizes.append(len(module.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


@pytest.mark.parametrize("length", [96, 40])
def test_a_padded_batch_is_sparse_in_buckets(length, monkeypatch):
    monkeypatch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
    inputs, expected = batch(length), alone(length)
    torch._dynamo.reset()
    model, parts = llama(), Parts()
    sparse = infllm_pass.sparsify(
        torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.03), backend=parts), SMALL
    )
    torch.testing.assert_close(gradients(model, sparse, *inputs), expected, rtol=1e-9, atol=1e-9 * expected.abs().max())
    assert len(parts.sizes) > 2, "gradients of all buckets are sent at the end"
    report = infllm_pass.report(sparse)
    assert [site.mask for site in report.sites] == ["causal, padded keys"] * 2
    assert {site.branch for site in report.sites} == {"sparse" if length > 64 else "dense"}
    assert torch._dynamo.config.optimize_ddp is True


def test_a_model_inside_is_sparse_in_buckets_as_well(monkeypatch):
    monkeypatch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
    inputs, expected = batch(), alone()
    torch._dynamo.reset()
    model, parts = llama(), Parts()
    sparse = infllm_pass.sparsify(torch.compile(model, backend=parts), SMALL)
    whole = DistributedDataParallel(sparse, bucket_cap_mb=0.03)
    torch.testing.assert_close(gradients(model, whole, *inputs), expected, rtol=1e-9, atol=1e-9 * expected.abs().max())
    assert len(parts.sizes) > 2
    assert infllm_pass.report(sparse).switchable == 2


def test_the_backend_by_name_says_why_parts_of_a_graph_stay_dense(monkeypatch):
    monkeypatch.setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)
    model = llama()
    options = {**SMALL.to_dict(), "backend": "aot_eager"}
    compiled = torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.03), backend="infllm", options=options)
    gradients(model, compiled, *batch())
    dense = [site for site in infllm_pass.report(compiled).sites if site.decision == "dense"]
    assert dense
    assert "the graph was split before the pass, as DistributedDataParallel does" in dense[-1].explanation


@pytest.mark.parametrize("padding", [0, 20])
def test_fully_sharded_layers_are_sparse(padding):
    inputs, expected = batch(padding=padding), alone(padding=padding)
    torch._dynamo.reset()
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), SMALL)
    torch.testing.assert_close(gradients(model, sparse, *inputs), expected, rtol=1e-9, atol=1e-9 * expected.abs().max())
    sites = infllm_pass.report(sparse).sites
    assert {(site.decision, site.branch) for site in sites} == {("switchable", "sparse")}
