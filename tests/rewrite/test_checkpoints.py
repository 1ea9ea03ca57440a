"""Activation checkpointing: what is computed once, what a step saves, and that gradients do not change."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import infllm_pass
from infllm_pass.compat import checkpointing
from infllm_pass.lowering.ops import prefill
from tests.support.common import SMALL

LAYERS = 2
LENGTH = 80
STAGES = ("compress_keys", "select_blocks", "attention_forward", "attention_backward")
NOT_SAVED = replace(SMALL, checkpoint_saves="nothing")
ATTENTION_SAVED = replace(SMALL, checkpoint_saves="attention")


@pytest.fixture
def runs(monkeypatch):
    """How often each stage of sparse attention ran."""
    counts = Counter()
    for name in STAGES:
        compute = getattr(prefill.torch_kernels, name)

        def counted(*arguments, compute=compute, name=name):
            counts[name] += 1
            return compute(*arguments)

        monkeypatch.setattr(prefill.torch_kernels, name, counted)
    return counts


def partitioned(saved):
    """A backend that partitions as Inductor does, and notes what the forward pass hands to the backward pass."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def partition(joint, inputs, *, num_fwd_outputs, **kwargs):
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs
        )
        outputs = forward.graph.find_nodes(op="output")[0].args[0]
        given = set(forward.graph.find_nodes(op="placeholder"))
        saved.extend(node for node in outputs[num_fwd_outputs:] if node not in given)
        return forward, backward

    def compiler(module, inputs):
        return module

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed, self.out = nn.Linear(48, 80), nn.Linear(48, 48)

    def forward(self, x):
        q, k, v = self.mixed(x).split((48, 16, 16), -1)
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(attended.transpose(1, 2).flatten(2)).tanh()


class Stack(nn.Module):
    def __init__(self, **checkpointing_kwargs):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.checkpointing_kwargs = checkpointing_kwargs

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, **self.checkpointing_kwargs) if self.checkpointing_kwargs else layer(x)
        return x


def trained(config, backend, counts=None, *, layers=None, **options):
    """Loss and gradients of one step of a model, checkpointed or not, the counts being those of this step alone."""
    model = Stack(**({"use_reentrant": False} if layers is None else layers))
    sparse = infllm_pass.sparsify(torch.compile(model, backend=backend), config, strict="all", **options)
    torch.manual_seed(0)
    x = torch.randn(1, LENGTH, 48)
    for _ in range(2):
        if counts is not None:
            counts.clear()
        model.zero_grad()
        loss = sparse(x).square().sum()
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@functools.cache
def unrecomputed(config, backend):
    return trained(config, backend, layers={})


def same(results, others):
    return all(torch.equal(one, other) for one, other in zip(results, others, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition"])
def test_a_selection_is_computed_once_a_step(runs, backend):
    results = trained(SMALL, backend, runs)
    assert runs["select_blocks"] == LAYERS
    assert runs["attention_forward"] == 2 * LAYERS
    assert runs["attention_backward"] == LAYERS
    if backend != "eager":  # which calls all operators again, of which only some are saved
        assert runs["compress_keys"] == LAYERS
    assert same(results, unrecomputed(SMALL, backend))


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_attention_is_computed_once_where_that_is_asked_for(runs, backend):
    results = trained(ATTENTION_SAVED, backend, runs)
    assert runs == {"compress_keys": LAYERS, "select_blocks": LAYERS, "attention_forward": LAYERS} | {
        "attention_backward": LAYERS
    }
    assert same(results, unrecomputed(SMALL, backend))


def test_all_is_computed_again_where_nothing_is_to_be_saved(runs):
    results = trained(NOT_SAVED, "aot_eager", runs)
    assert runs["select_blocks"] == runs["attention_forward"] == 2 * LAYERS
    assert same(results, unrecomputed(SMALL, "aot_eager"))


def test_a_site_decides_for_itself(runs):
    seen = []

    def site_config(site):
        seen.extend([] if site.node in seen else [site.node])
        return SMALL if seen.index(site.node) == 0 else NOT_SAVED

    trained(SMALL, "aot_eager", runs, site_config=site_config)
    assert runs["select_blocks"] == LAYERS + 1


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (NOT_SAVED, set()),
        (SMALL, {"select_blocks"}),
        (ATTENTION_SAVED, {"select_blocks", "block_attention"}),
    ],
    ids=["nothing", "selection", "attention"],
)
def test_checkpointing_saves_inputs_of_layers_and_what_is_asked_for(config, kept):
    """Nothing of size N x N, no compressed keys, and of a layer its input."""
    saved = []
    trained(config, partitioned(saved))
    named = [origin_of(node) for node in saved]
    assert {name for name in named if name.startswith(("compress", "select", "block"))} == kept
    values = [node.meta["val"] for node in saved]
    assert not [value for value in values if sum(size >= LENGTH - 1 for size in value.shape) > 1]
    lists = [value for name, value in zip(named, values, strict=True) if name == "select_blocks"]
    assert all(value.shape == (1, 2, LENGTH, SMALL.selected_blocks) for value in lists)
    others = [value.shape for name, value in zip(named, values, strict=True) if name not in kept]
    assert others == [(1, LENGTH, 48)] * len(others)  # inputs of layers
    assert len(others) <= LAYERS


def test_without_checkpointing_nothing_is_saved_for_the_selection_but_its_lists():
    saved = []
    trained(SMALL, partitioned(saved), layers={})
    named = [origin_of(node) for node in saved]
    assert named.count("select_blocks") == LAYERS
    assert "compress_keys" not in named
    assert not [node for node in saved if sum(size >= LENGTH - 1 for size in node.meta["val"].shape) > 1]


def origin_of(node):
    """The operator whose result a saved node is, whole or one of several."""
    if getattr(node.target, "__name__", "") == "getitem":
        return origin_of(node.args[0])
    return str(node.target).removeprefix("infllm.").removesuffix(".default")


def keep_products(_context, operator, *_args, **_kwargs):
    kept = operator is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def forbid_selections(_context, operator, *_args, **_kwargs):
    forbidden = operator is torch.ops.infllm.select_blocks.default
    return CheckpointPolicy.MUST_RECOMPUTE if forbidden else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("policy", "selections"), [(keep_products, LAYERS), (forbid_selections, 2 * LAYERS)])
def test_what_the_user_saves_stays_saved(runs, policy, selections):
    context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
    backend = "aot_eager_decomp_partition"
    results = trained(SMALL, backend, runs, layers={"use_reentrant": False, "context_fn": context_fn})
    assert runs["select_blocks"] == selections
    assert same(results, unrecomputed(SMALL, backend))


def test_a_body_that_writes_in_place_is_recomputed_rightly(runs):
    """Before torch 2.13 such a body cannot be told what to save."""

    def layer(q, k, v):
        out = F.scaled_dot_product_attention(q * 2, k, v, is_causal=True)
        return torch.relu_((out + q).mul_(2))

    def function(q, k, v):
        return checkpoint(layer, q, k, v, use_reentrant=False)

    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 80, 16, requires_grad=True) for heads in (4, 4, 4)]
    compiled = infllm_pass.sparsify(torch.compile(function, backend="aot_eager"), SMALL, strict="all")
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert runs["select_blocks"] == (1 if checkpointing.traces_writes() else 2)
    plain = infllm_pass.sparsify(torch.compile(layer, backend="aot_eager"), SMALL, strict="all")
    assert same(actual, torch.autograd.grad(plain(*inputs).square().sum(), inputs))


def test_uncompiled_checkpoints_save_what_a_context_names(runs):
    def attend(q, k, v):
        return infllm_pass.switchable_attention(q, k, v, config=SMALL)

    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, LENGTH, 16, requires_grad=True) for heads in (4, 2, 2)]
    saved = [torch.ops.infllm.select_blocks.default]
    context_fn = functools.partial(create_selective_checkpoint_contexts, saved)
    loss = checkpoint(attend, *inputs, use_reentrant=False, context_fn=context_fn).square().sum()
    actual = torch.autograd.grad(loss, inputs)
    assert (runs["select_blocks"], runs["attention_forward"]) == (1, 2)
    assert same(actual, torch.autograd.grad(attend(*inputs).square().sum(), inputs))
