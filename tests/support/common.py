"""Models, inputs and measures that tests of several parts share."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
import torch.nn.functional as F

from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels import reference

SMALL = SparseAttentionConfig(
    kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=3, init_blocks=1, dense_len=64, scorer="pooled"
)
"""Five blocks of eight in all: above 40 tokens the selection leaves keys out."""

TOKENS = replace(SMALL, scorer="tokens")
"""The same by token scores."""


def llama(weights: float = 6.0, **overrides):
    """A Llama with random weights large enough that attention matters, in float64.

    Args:
        weights: how many times larger than usual; with 3 all scores of tokens are within the range of float32.
        overrides: fields of the configuration.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 1024,
    }
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(weights)
    return model


def tiny_config():
    """The configuration of a Llama for tests of model folders."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; NaN anywhere gives NaN, which no bound accepts."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm())


@contextlib.contextmanager
def oracle_attention(config: SparseAttentionConfig, key_mask: torch.Tensor | None = None, channels=None):
    """Replace fused attention by the float64 oracle, switch included, for uncompiled runs.

    Args:
        config: the configuration.
        key_mask: bool ``[B, Lk]``.
        channels: those that token scores read; None: all.
    """
    plain = F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if k.shape[1] == q.shape[1] and attention.heads is not None:
            step = q.shape[1] // attention.heads
            k, v = k[:, ::step], v[:, ::step]
        common = {
            "geometry": config.geometry_for(k.shape[-1], channels),
            "scale": q.shape[-1] ** -0.5 if scale is None else scale,
            "offset": k.shape[2] - q.shape[2],
            "key_mask": key_mask,
            "dense_len": config.dense_len,
        }
        selected = reference.select_blocks(q, k, **common) if k.shape[2] >= config.dense_len else None
        return reference.attention(q, k, v, selected, **common)[0].to(q.dtype)

    attention.heads = 2
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def capture(function, *inputs, dynamic=None, **kwargs) -> torch.fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    seen = []

    def backend(module, _example_inputs):
        seen.append(module)
        return module.forward

    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs, **kwargs)
    assert len(seen) == 1
    return seen[0]


def count_calls(module: torch.fx.GraphModule, target) -> int:
    """Calls of a target in a graph and in the graphs nested in it."""
    graphs = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(node.target is target or node.target == target for graph in graphs for node in graph.nodes)
