"""PyTorch's own layers, of which evaluation without gradients is one call that hides the attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import infllm_pass
from infllm_pass.plan.length_guard import Branch
from infllm_pass.rewrite.pipeline import run_on_export
from tests.support.common import SMALL, oracle_attention, relative_error

SIZES = {"d_model": 24, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}


class Encoder(nn.Module):
    def __init__(self, layers=2, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(**SIZES, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not options.get("norm_first"))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x, padding=None, causal=True):
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
        return self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=causal)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(**SIZES)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


def compiled(model, **options):
    return infllm_pass.sparsify(torch.compile(model, backend="eager", **options), SMALL)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": True, "activation": "gelu"}, {"norm_first": True, "bias": False}],
    ids=["norm last, relu", "norm first, gelu", "no biases"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_causal_encoder_equals_the_oracle(options, padded):
    if torch.__version__ < "2.12" and options.get("bias", True):
        pytest.skip("Dynamo of this version breaks the graph at PyTorch's layers: they run dense, with a warning")
    model = Encoder(**options).double().eval()
    sparse = compiled(model, dynamic=True)
    for length in (80, 48):
        x = torch.randn(2, length, 24, dtype=torch.float64)
        padding = torch.arange(length) >= torch.tensor([[length], [length - 10]]) if padded else None
        with oracle_attention(SMALL, None if padding is None else ~padding):
            expected = model(x, padding).detach()  # with gradients, PyTorch writes the layers out
        with torch.no_grad():
            actual = sparse(x, padding)
        valid = slice(None) if padding is None else ~padding
        assert relative_error(actual[valid], expected[valid]) < 1e-10
    assert [graph.branches for graph in infllm_pass.report(sparse).graphs] == [("sparse",), ("dense",)]
    assert infllm_pass.report(sparse).switchable == 4


@torch.no_grad()
def test_an_encoder_that_is_not_causal_keeps_its_calls():
    model = Encoder().double().eval()
    x = torch.randn(2, 80, 24, dtype=torch.float64)
    modules = []

    def backend(module, _inputs):
        modules.append(module)
        return module

    sparse = infllm_pass.sparsify(torch.compile(model, backend=backend), SMALL)
    assert torch.equal(sparse(x, None, False), model(x, None, False))
    assert {site.reason for site in infllm_pass.report(sparse).sites} == {"BIDIRECTIONAL"}
    calls = [node.target for node in modules[0].graph.nodes if node.op == "call_function"]
    assert calls == [torch._transformer_encoder_layer_fwd] * 2


@torch.no_grad()
def test_of_two_layers_the_excluded_one_keeps_its_call():
    model = Encoder().double().eval()
    backend = torch.compile(model, backend="eager")
    sparse = infllm_pass.sparsify(backend, SMALL, filter_fn=lambda site: "layers.0" in site.module_path)
    x = torch.randn(2, 80, 24, dtype=torch.float64)
    hidden = Encoder(1).double().eval()
    hidden.encoder.layers[0].load_state_dict(model.encoder.layers[0].state_dict())
    with oracle_attention(SMALL), torch.enable_grad():
        first = hidden(x).detach()
    hidden.encoder.layers[0].load_state_dict(model.encoder.layers[1].state_dict())
    assert relative_error(sparse(x), hidden(first)) < 1e-10
    assert [site.reason for site in infllm_pass.report(sparse).sites] == ["SWITCHABLE", "EXCLUDED"]


@torch.no_grad()
def test_the_causal_half_of_a_decoder_layer_equals_the_oracle():
    model = Decoder().double().eval()
    sparse = compiled(model)
    x, memory = torch.randn(2, 80, 24, dtype=torch.float64), torch.randn(2, 30, 24, dtype=torch.float64)
    causal = model.layer.self_attn
    with oracle_attention(SMALL):
        attended = causal(x, x, x, attn_mask=torch.zeros(80, 80, dtype=x.dtype), need_weights=False)[0]
    model.layer.self_attn = _Given(attended, causal)
    expected = model(x, memory)
    model.layer.self_attn = causal
    assert relative_error(sparse(x, memory), expected) < 1e-10
    assert [site.reason for site in infllm_pass.report(sparse).sites] == ["SWITCHABLE", "CROSS_ATTENTION"]


class _Given(nn.Module):
    """Stands for an attention whose result is known."""

    def __init__(self, result, attention):
        super().__init__()
        self.result, self.batch_first = result, attention.batch_first

    def forward(self, *_args, **_kwargs):
        return self.result, None


@torch.no_grad()
def test_an_exported_layer_is_decided_about_without_being_changed():
    program = torch.export.export(Encoder(1).eval(), (torch.randn(2, 80, 24),), strict=True)
    call = torch.ops.aten._transformer_encoder_layer_fwd.default
    assert sum(node.target is call for node in program.graph.nodes) == 1
    assert [site.reason for site in run_on_export(program.graph_module, SMALL).sites] == ["SWITCHABLE"]
    assert sum(node.target is call for node in program.graph.nodes) == 1
    assert [site.branch for site in run_on_export(program.graph_module, SMALL, branch=Branch.SPARSE).sites] == [
        "sparse"
    ]
    assert sum(node.target is call for node in program.graph.nodes) == 0
