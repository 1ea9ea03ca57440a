"""Attention in nested graphs whose mask the graph around them makes: checkpointed and nested regions, cond."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import infllm_pass
from infllm_pass.graph.facts import example_of
from tests.support.common import SMALL, llama, oracle_attention, relative_error, tokens


class Recorder:
    """Compiles with another backend, after a look for tensors with two dimensions of one of some lengths.

    The default partitions as Inductor does, which is where checkpointing is decided.
    """

    def __init__(self, backend="aot_eager_decomp_partition"):
        self.compiler = lookup_backend(backend)
        self.modules = []

    def __call__(self, module, inputs):
        self.modules.append(module)
        self.squares = [
            node.name
            for part in module.modules()
            if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes
            if isinstance(example := example_of(node), torch.Tensor) and example.dim() > 1
            if example.shape[-1] == example.shape[-2] not in (1, 24, 48)  # no mask, but weights
        ]
        return self.compiler(module, inputs)


def keep_products(_context, op, *_args, **_kwargs):
    kept = op in (torch.ops.aten.mm.default, torch.ops.infllm.block_attention.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTING = {
    "not reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, keep_products),
    },
}


def gradients(model, function):
    model.zero_grad()
    function().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def mask_of(length):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, length - 10 :] = 0
    return mask


@pytest.mark.parametrize("kind", ["not reentrant", "selective"])
def test_a_checkpointed_padded_batch_has_the_gradients_of_the_oracle(kind):
    plain = llama(use_cache=False).train()
    ids, mask = tokens(80, 2), mask_of(80)
    labels = ids.masked_fill(mask == 0, -100)
    with oracle_attention(SMALL, mask.bool()):
        expected = gradients(plain, lambda: plain(ids, attention_mask=mask, labels=labels).loss)
    plain.gradient_checkpointing_enable(CHECKPOINTING[kind])
    model, recorder = switched(plain)
    actual = gradients(plain, lambda: model(ids, attention_mask=mask, labels=labels).loss)
    assert relative_error(actual, expected) < 1e-7
    assert infllm_pass.report(model).switchable == 2
    assert recorder.squares == []


@pytest.mark.parametrize("kind", ["reentrant"])
def test_checkpointed_packed_sequences_have_the_gradients_of_the_oracle(kind):
    """A sequence of 70 tokens, which is sparse, and one of 40, which is dense."""
    plain = llama(use_cache=False).train()
    parts = tokens(70), tokens(40)
    weight = torch.randn(1, 110, 64, dtype=torch.float64)
    with oracle_attention(SMALL):
        expected = gradients(plain, lambda: (torch.cat([plain(part).logits for part in parts], 1) * weight).sum())
    plain.gradient_checkpointing_enable(CHECKPOINTING[kind])
    model, recorder = switched(plain)
    ids, positions = torch.cat(parts, 1), torch.cat([torch.arange(70), torch.arange(40)])[None]
    packed = gradients(plain, lambda: (model(ids, position_ids=positions).logits * weight).sum())
    assert relative_error(packed, expected) < 1e-7
    assert infllm_pass.report(model).switchable == 2
    assert recorder.squares == []


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (2, 12)).transpose(1, 2) for part in self.mixed(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class NestedLayer(Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x, mask):
        return super().forward(x, mask)


class Stack(nn.Module):
    """Layers that are called in some way with a causal padded mask."""

    def __init__(self, call, layer=Layer, layers=2):
        super().__init__()
        self.call = call
        self.layers = nn.ModuleList([layer() for _ in range(layers)])

    def masks(self, pad):
        index = torch.arange(pad.shape[1])
        mask = (index <= index[:, None]) & pad[:, None, None].bool()
        return [mask] * len(self.layers)

    def forward(self, x, pad, taken):
        for layer, mask in zip(self.layers, self.masks(pad), strict=True):
            x = self.call(layer, x, mask, taken)
        return x

    def plain(self, x, mask):
        for layer in self.layers:
            x = Layer.forward(layer, x, mask)
        return x


def plainly(layer, x, mask, taken):
    return layer(x, mask)


def checkpointed(layer, x, mask, taken):
    return checkpoint(layer, x, mask, use_reentrant=False)


def twice_checkpointed(layer, x, mask, taken):
    return checkpoint(checkpointed, layer, x, mask, taken, use_reentrant=False)


def perhaps(layer, x, mask, taken):
    return torch.cond(taken, lambda x, mask: layer(x, mask), lambda x, mask: 2 * x, (x, mask))


def switched(model, dynamic=None):
    """A sparsified model of which no site is dense, and what records what its compiler is handed."""
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, dynamic=dynamic)
    return infllm_pass.sparsify(compiled, SMALL, strict="all"), recorder


def check(model, sparse, length):
    """Compare a sparsified stack with the oracle, gradients included."""
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    pad = mask_of(length)
    weight = torch.randn_like(x) * pad[..., None]
    with oracle_attention(SMALL, pad.bool()):
        expected = gradients(model, lambda: (model.plain(x, None) * weight).sum())
    actual = gradients(model, lambda: (sparse(x, pad, torch.tensor(True)) * weight).sum())
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize(
    ("call", "layer"),
    [
        pytest.param(checkpointed, Layer, id="checkpoint"),
        pytest.param(twice_checkpointed, Layer, id="checkpoint in checkpoint"),
        pytest.param(plainly, NestedLayer, id="nested region"),
        pytest.param(perhaps, Layer, id="cond"),
    ],
)
def test_a_mask_of_the_graph_around_a_nested_one_is_handed_in_as_vectors(call, layer):
    model = Stack(call, layer).double()
    sparse, recorder = switched(model, dynamic=True)
    for length in (80, 90, 48):
        check(model, sparse, length)
        assert recorder.squares == []
    assert [graph.branches for graph in infllm_pass.report(sparse).graphs] == [("sparse",), ("dense",)]


def test_the_other_branch_of_a_cond_keeps_its_result():
    model = Stack(perhaps).double()
    sparse, _ = switched(model)
    x = torch.randn(2, 80, 24, dtype=torch.float64)
    assert relative_error(sparse(x, mask_of(80), torch.tensor(False)), 4 * x) == 0


def test_a_body_that_several_nested_graphs_call_gets_the_operand_through_all_of_them():
    model = Stack(checkpointed, NestedLayer).double()
    sparse, recorder = switched(model)
    check(model, sparse, 80)
    assert recorder.squares == []


def test_masks_that_are_made_anew_for_every_call_of_a_body_are_one():
    class Anew(Stack):
        def masks(self, pad):
            return [Stack.masks(self, pad)[0] for _ in self.layers]

    model = Anew(plainly, NestedLayer).double()
    sparse, recorder = switched(model)
    check(model, sparse, 80)
    assert recorder.squares == []


def test_an_operand_is_made_once_for_all_nested_graphs():
    sparse, recorder = switched(Stack(checkpointed, layers=3))
    sparse(torch.randn(2, 80, 24), mask_of(80), torch.tensor(True))
    calls = [
        node
        for node in recorder.modules[0].graph.nodes
        if node.target is torch.ops.higher_order.tag_activation_checkpoint
    ]
    vectors = [{node for node in call.args[1:] if tuple(example_of(node).shape) == (2, 80)} for call in calls]
    assert [len(each) for each in vectors] == [1, 1, 1]
    assert len(set.union(*vectors)) == 1


def test_padding_that_is_overwritten_between_two_nested_graphs_leaves_them_as_they_were():
    class Overwriting(Stack):
        def forward(self, x, pad, taken):
            (mask, *_) = self.masks(pad)
            x = self.call(self.layers[0], x, mask, taken)
            pad[:, :20] = 0
            return self.call(self.layers[1], x, mask, taken)

    model = Overwriting(checkpointed, layers=2).double()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), SMALL)
    x, pad = torch.randn(2, 80, 24, dtype=torch.float64), mask_of(80)
    expected = model(x, pad.clone(), None)
    assert relative_error(sparse(x, pad.clone(), None), expected) < 1e-12
    report = infllm_pass.report(sparse)
    assert {site.reason for site in report.sites} == {"UNPROVEN_MASK"}
    assert all("overwrites its memory" in site.explanation for site in report.sites)


@torch.no_grad()
def test_calls_of_one_body_with_different_masks_leave_it_as_it_was():
    class Windowed(Stack):
        def masks(self, pad):
            index = torch.arange(pad.shape[1])
            mask = Stack.masks(self, pad)[0]
            return [mask, mask, mask & (index > index[:, None] - 50)]

    model = Windowed(plainly, NestedLayer, layers=3).double()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL)
    x, pad = torch.randn(2, 80, 24, dtype=torch.float64), mask_of(80)
    sparse(x, pad, None)
    dense = [site for site in infllm_pass.report(sparse).sites if site.reason == "UNPROVEN_MASK"]
    assert dense
    assert all("hand it different values" in site.explanation for site in dense)


def test_memory_that_a_body_overwrites_counts_for_every_call():
    """The second call's padding is no tensor of the body that was traced, and is overwritten all the same."""

    class Clearing(nn.Module):
        @torch.compiler.nested_compile_region
        def forward(self, x, pad):
            pad[:, :20] = 0
            return x + pad[..., None]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.clear, self.layer = Clearing(), Layer()

        def forward(self, x, first, second):
            index = torch.arange(x.shape[1])
            mask = (index <= index[:, None]) & second[:, None, None].bool()
            x = self.clear(self.clear(x, first), second)
            return self.layer(x, mask)

    with torch.no_grad():
        model = Model().double()
        sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL)
        x, pad = torch.randn(2, 80, 24, dtype=torch.float64), mask_of(80)
        expected = model(x, pad.clone(), pad.clone())
        assert relative_error(sparse(x, pad.clone(), pad.clone()), expected) < 1e-12
    assert {site.reason for site in infllm_pass.report(sparse).sites} == {"UNPROVEN_MASK"}
