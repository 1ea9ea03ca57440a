"""Masks of whole models, from the graph to the output: dense, sparse against the oracle, and buffers that change."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass import Reason, SparseAttentionConfig
from infllm_pass.errors import MaskBufferChangedWarning
from infllm_pass.kernels import reference
from tests.support.common import SMALL, count_calls, llama, relative_error, tokens

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
ALWAYS_SPARSE = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})
SEGMENTS = (23, 51, 6, 20)


def packed_positions(lengths=SEGMENTS):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def small_model(name, **options):
    """A random model of a Hugging Face architecture in float64, with weights large enough that attention matters."""
    import transformers

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 256,
    }
    if name == "GPT2":
        sizes = {"vocab_size": 64}
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


MODELS = {
    "Llama, eager": ("Llama", {"attn_implementation": "eager"}, "causal"),
    "Llama, sdpa": ("Llama", {"attn_implementation": "sdpa"}, "causal"),
    "Mistral, eager": ("Mistral", {"attn_implementation": "eager", "sliding_window": 50}, "causal, window 50"),
    "Mistral, sdpa": ("Mistral", {"attn_implementation": "sdpa", "sliding_window": 50}, "causal, window 50"),
    "GPT-2, eager": ("GPT2", {"attn_implementation": "eager", "n_embd": 48, "n_head": 6, "n_layer": 2}, "causal"),
    "GPT-2, sdpa": ("GPT2", {"attn_implementation": "sdpa", "n_embd": 48, "n_head": 6, "n_layer": 2}, "causal"),
}


@pytest.mark.parametrize("padded", [False, True], ids=["no padding mask", "padding mask"])
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_models_with_a_covering_budget_equal_the_dense_model(case, padded):
    """In float32: eager models make NaN of padded queries in float64, whose lowest number their softmax rounds."""
    name, options, verdict = MODELS[case]
    plain = small_model(name, **options).float()
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    inputs = {"attention_mask": mask} if padded else {}
    ids = tokens(70, 2)
    expected = plain(ids, use_cache=False, **inputs).logits
    kept = mask.bool() if padded else torch.ones_like(mask, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows within the budget stay dense
        model = infllm_pass.sparsify(torch.compile(plain, backend="eager"), COVERING)
        actual = model(ids, use_cache=False, **inputs).logits
    sites = infllm_pass.report(model).sites
    assert relative_error(actual[kept], expected[kept]) < 1e-4
    assert {site.mask for site in sites} == {verdict + (", padded keys" if padded else "")}
    assert {site.reason for site in sites} == {"WINDOW_WITHIN_BUDGET" if "window" in verdict else "SWITCHABLE"}
    assert all(site.mask_elided for site in sites)


def packed_oracle(config, lengths):
    """Fused attention by the float64 oracle, sequence by sequence."""

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        step = q.shape[1] // 2
        outs, start = [], 0
        for length in lengths:
            rows = slice(start, start + length)
            parts = q[:, :, rows], k[:, ::step, rows] if k.shape[1] == q.shape[1] else k[:, :, rows]
            values = v[:, ::step, rows] if v.shape[1] == q.shape[1] else v[:, :, rows]
            common = {
                "geometry": config.geometry,
                "scale": q.shape[-1] ** -0.5 if scale is None else scale,
                "offset": 0,
                "dense_len": config.dense_len,
            }
            selected = reference.select_blocks(*parts, **common) if length >= config.dense_len else None
            outs.append(reference.attention(*parts, values, selected, **common)[0].to(q.dtype))
            start += length
        return torch.cat(outs, 2)

    return attention


@pytest.mark.parametrize(
    ("config", "dynamic"),
    [(COVERING, None), (ALWAYS_SPARSE, None), (SMALL, True)],
    ids=["covering", "sparse", "switched by sequence, dynamic"],
)
def test_packed_sequences_equal_the_oracle_of_each_sequence(config, dynamic, monkeypatch):
    """Also through a training step; in the last configuration one sequence of four is long enough to be sparse."""
    config = SparseAttentionConfig.from_dict(
        {**config.to_dict(), "dense_len": 48 if config is SMALL else config.dense_len}
    )
    plain = llama()
    ids = tokens(sum(SEGMENTS))
    positions = packed_positions()

    def step(model):
        plain.zero_grad()
        out = model(ids, position_ids=positions, use_cache=False).logits
        out.square().mean().backward()
        return out, torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", packed_oracle(config, SEGMENTS))
        expected, gradient = step(plain)
    model = infllm_pass.sparsify(torch.compile(plain, backend="aot_eager", dynamic=dynamic), config, strict=True)
    actual, actual_gradient = step(model)
    assert relative_error(actual, expected) < 1e-8
    assert relative_error(actual_gradient, gradient) < 1e-7
    assert {site.mask for site in infllm_pass.report(model).sites} == {"causal, packed sequences"}
    if config is COVERING:
        assert relative_error(actual, plain(ids, position_ids=positions, use_cache=False).logits) < 1e-8


@pytest.mark.parametrize(
    ("window", "reason"), [(40, Reason.WINDOW_WITHIN_BUDGET), (41, Reason.SWITCHABLE)], ids=["within", "beyond"]
)
@torch.no_grad()
def test_a_window_no_longer_than_the_budget_stays_dense_without_its_mask(window, reason):
    graphs = []

    def backend(module, _inputs):
        graphs.append(module)
        return module.forward

    plain = small_model("Mistral", sliding_window=window)
    model = infllm_pass.sparsify(torch.compile(plain, backend=backend), SMALL)
    ids = tokens(90)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # within the budget nothing is switchable
        actual = model(ids, use_cache=False).logits
    (graph,) = graphs
    expected = plain(ids, use_cache=False).logits
    assert {site.reason for site in infllm_pass.report(model).sites} == {reason.name}
    assert {site.mask_elided for site in infllm_pass.report(model).sites} == {True}
    graph.graph.eliminate_dead_code()
    shapes = [node.meta.get("example_value") for node in graph.graph.nodes]
    assert not any(isinstance(x, torch.Tensor) and x.shape[-2:] == (90, 90) for x in shapes)
    if reason is Reason.WINDOW_WITHIN_BUDGET:
        assert relative_error(actual, expected) < 1e-8
    assert count_calls(graph, torch.ops.infllm.block_attention.default) == 2


class NanoAttention(nn.Module):
    """Attention as nanoGPT writes it, with its mask in a buffer."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48, dtype=torch.float64)
        self.register_buffer("bias", torch.tril(torch.ones(128, 128)).view(1, 1, 128, 128))

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, 2, 8).transpose(1, 2) for part in self.project(x).split(16, dim=2))
        scores = (q @ k.transpose(-2, -1)) * 8**-0.5
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, length, 16)


def write_row(module):
    with torch.no_grad():
        module.bias[..., 5] = 1.0


def replace(module):
    module.bias = torch.ones_like(module.bias)


@pytest.mark.parametrize("change", [write_row, replace])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_a_mask_buffer_that_changes_is_noticed(change, backend):
    plain, x = NanoAttention(), torch.randn(2, 60, 16, dtype=torch.float64)
    model = infllm_pass.sparsify(torch.compile(plain, backend=backend), COVERING, strict=True)
    assert relative_error(model(x), plain(x)) < 1e-10
    (site,) = infllm_pass.report(model).sites
    assert (site.reason, site.mask) == ("SWITCHABLE", "causal")
    change(plain)
    with pytest.warns(MaskBufferChangedWarning, match="bias"):
        changed = model(x)
    assert torch.equal(changed, plain(x))
    with torch.no_grad():
        plain.bias.copy_(torch.ones(128, 128).tril())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(model(x), plain(x)) < 1e-10
    torch._dynamo.reset()
    change(plain)
    again = infllm_pass.sparsify(torch.compile(plain, backend=backend), COVERING)
    with pytest.warns(UserWarning, match="UNPROVEN_MASK|BIDIRECTIONAL"):
        assert torch.equal(again(x), plain(x))


def test_the_same_mask_in_another_tensor_is_taken_without_a_word():
    plain, x = NanoAttention(), torch.randn(2, 60, 16, dtype=torch.float64)
    model = infllm_pass.sparsify(torch.compile(plain, backend="eager"), ALWAYS_SPARSE, strict=True)
    first = model(x)
    plain.bias = plain.bias.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), first)
    assert relative_error(first, plain(x)) > 1e-4
