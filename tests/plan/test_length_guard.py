"""The length switch: what is compiled, how often, and that no graph builds an N x N tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.frontend.compile_settings import recompiles_are_isolated
from tests.support.common import SMALL, llama, oracle_attention, relative_error, tokens


class CountingBackend:
    """Compiles nothing and keeps the graphs it was given."""

    def __init__(self):
        self.modules = []

    def __call__(self, module, _example_inputs):
        self.modules.append(module)
        return module.forward


@pytest.fixture(scope="module")
def tiny_llama():
    """One layer: all layers have one length."""
    return llama(num_hidden_layers=1)


LENGTHS = [40, 90, 63, 64, 65, 41, 100, 55, 130, 62, 77, 48, 99, 50, 120, 61, 66, 44, 111, 59]


@pytest.mark.parametrize("use_cache", [True, False], ids=["is_causal", "mask tensor"])
@torch.no_grad()
def test_twenty_lengths_cost_one_dense_and_one_sparse_graph(use_cache, tiny_llama):
    backend = CountingBackend()
    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend=backend), SMALL)
    for length in LENGTHS:
        ids = tokens(length)
        with oracle_attention(SMALL):
            expected = tiny_llama(ids, use_cache=use_cache).logits
        assert relative_error(model(ids, use_cache=use_cache).logits, expected) < 1e-8
    assert len(LENGTHS) == 20
    # One graph for each side, and the first, made before Dynamo had seen that the length varies.
    assert len(backend.modules) == 3
    report = infllm_pass.report(model)
    assert [graph.branches for graph in report.graphs] == [("dense",), ("sparse",), ("dense",)]
    assert [graph.sites[0].guard_dynamic for graph in report.graphs] == [False, True, True]


@torch.no_grad()
def test_a_length_marked_dynamic_needs_no_static_graph(tiny_llama):
    backend = CountingBackend()
    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend=backend), SMALL)
    for length in LENGTHS:
        ids = tokens(length)
        torch._dynamo.mark_dynamic(ids, 1)
        model(ids)
    assert len(backend.modules) == 2


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(("length", "branch"), [(63, "dense"), (64, "sparse"), (65, "sparse")])
def test_a_static_length_is_decided_at_compile_time(length, branch):
    q = torch.randn(1, 2, length, 8)
    model = infllm_pass.sparsify(torch.compile(attend, backend="eager", dynamic=False), SMALL)
    model(q, q, q)
    (site,) = infllm_pass.report(model).sites
    assert (site.branch, site.guard_dynamic) == (branch, False)


def test_dense_len_zero_is_always_sparse():
    config = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})
    backend = CountingBackend()
    model = infllm_pass.sparsify(torch.compile(attend, backend=backend, dynamic=True), config)
    for length in (11, 30, 90):
        q = torch.randn(1, 2, length, 8)
        model(q, q, q)
    assert [graph.branches for graph in infllm_pass.report(model).graphs] == [("sparse",)]
    assert len(backend.modules) == 1


@torch.no_grad()
def test_many_configurations_of_one_model_do_not_use_up_the_recompile_limit(tiny_llama):
    ids = tokens(99)
    limit = 3
    with torch._dynamo.config.patch(recompile_limit=limit):
        for topk in range(2, 2 + (limit + 3 if recompiles_are_isolated() else limit)):
            config = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": topk})
            model = infllm_pass.sparsify(torch.compile(tiny_llama, backend="eager"), config)
            model(ids)
            assert infllm_pass.report(model).switchable == 1, topk


def tensors_with_two_sizes_of(symbol_source, graph) -> list[str]:
    """Nodes of an ATen graph whose value has the sequence length in two of its dimensions."""
    found = []
    for node in graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(tensor, torch.Tensor) and sum(str(size) == symbol_source for size in tensor.shape) > 1:
                found.append(f"{node.name}: {tuple(tensor.shape)}")
    return found


def lengths_of(graph) -> set[str]:
    return {
        str(size)
        for node in graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    }


@pytest.mark.parametrize(
    ("length", "train", "padded"),
    [(50, False, False), (50, True, True), (100, False, True), (100, True, False)],
    ids=["dense-inference", "dense-training-padded", "sparse-inference-padded", "sparse-training"],
)
def test_no_graph_that_reaches_inductor_holds_an_n_by_n_tensor(length, train, padded, tiny_llama):
    """Dynamic shapes, below and above dense_len, forward and backward, at the level that Inductor compiles."""
    graphs = []

    def keep(module, _example_inputs):
        graphs.append(module.graph)
        return module.forward

    def run(model):
        ids = tokens(length, 2)
        torch._dynamo.mark_dynamic(ids, 1)
        mask = torch.ones_like(ids)
        torch._dynamo.mark_dynamic(mask, 1)
        mask[0, :9] = 0
        with torch.set_grad_enabled(train):
            out = model(ids, use_cache=False, **({"attention_mask": mask} if padded else {})).logits
            if train:
                out.sum().backward()
        tiny_llama.zero_grad()

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    run(torch.compile(tiny_llama, backend=backend))
    unwanted = [tensors_with_two_sizes_of(symbol, graph) for graph in graphs for symbol in lengths_of(graph)]
    assert any(unwanted), "the plain compiled model builds the mask: the test can see one"

    graphs.clear()
    torch._dynamo.reset()
    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend=backend), SMALL, strict=True)
    run(model)
    assert len(graphs) == 1 + train
    assert all(lengths_of(graph) for graph in graphs)
    for graph in graphs:
        for symbol in lengths_of(graph):
            assert tensors_with_two_sizes_of(symbol, graph) == []
