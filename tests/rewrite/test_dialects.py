"""The same decisions on graphs of Dynamo and of ``torch.export``, and exported graphs rewritten to the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from infllm_pass.kernels import reference
from infllm_pass.plan.length_guard import Branch
from infllm_pass.rewrite.pipeline import run_on_export, run_pass
from tests.sites.test_sites_handwritten import ALWAYS, COVERING, INF, Attention, hidden
from tests.support.common import llama, relative_error

HIDDEN, HEADS, VOCABULARY = 24, 6, 64


class Layer(nn.Module):
    """Projections around an attention that subclasses write."""

    def __init__(self, heads_kv=HEADS):
        super().__init__()
        self.heads_kv, self.dim = heads_kv, HIDDEN // HEADS
        self.q = nn.Linear(HIDDEN, HIDDEN)
        self.kv = nn.Linear(HIDDEN, 2 * heads_kv * self.dim)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def project(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, self.dim)
        k, v = self.kv(x).view(batch, length, 2, self.heads_kv, self.dim).unbind(2)
        return q, k, v

    def forward(self, x):
        return self.out(self.attend(*self.project(x)).reshape(x.shape))


class NanoGPT(Layer):
    """A tril buffer of the longest length, sliced."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(128, 128)).view(1, 1, 128, 128))

    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        length = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, INF)
        return (F.softmax(scores, dim=-1) @ v).transpose(1, 2)


class Einsum(Layer):
    def attend(self, q, k, v):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.dim**-0.5
        scores = scores.masked_fill(hidden(q.shape[1]), INF)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Grouped(Layer):
    def __init__(self):
        super().__init__(heads_kv=2)

    def attend(self, q, k, v):
        k, v = (x.repeat_interleave(3, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.where(hidden(q.shape[2]), torch.finfo(q.dtype).min, q @ k.mT / self.dim**0.5)
        weights = F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype)
        return (F.dropout(weights, 0.1, self.training) @ v).transpose(1, 2)


class Fused(Layer):
    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Alibi(Layer):
    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        index = torch.arange(q.shape[2])
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        bias = (index[None, :] - index[:, None]) * slopes[:, None, None]
        scores = q @ k.mT * self.dim**-0.5 + bias
        return (scores.masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ v).transpose(1, 2)


class Relative(Layer):
    """A learned bias of the distance, as in T5."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, HEADS)

    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        index = torch.arange(q.shape[2])
        bias = self.table((index[:, None] - index[None, :]).clamp(0, 31)).permute(2, 0, 1)
        scores = (q @ k.mT + bias[None]).masked_fill(hidden(q.shape[2]), INF)
        return (scores.softmax(-1) @ v).transpose(1, 2)


class Bidirectional(Layer):
    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Capped(Layer):
    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.tanh(q @ k.mT / 5) * 5
        return (scores.masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ v).transpose(1, 2)


class Logits(nn.Module):
    """A language model of transformers, as a function of its tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": VOCABULARY, "n_positions": 128}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return Logits(GPT2LMHeadModel(GPT2Config(**sizes, **special, attn_implementation="eager")))


MODELS = {
    "Llama, sdpa": lambda: Logits(llama()),
    "Llama, eager": lambda: Logits(llama(attn_implementation="eager")),
    "GPT-2, eager": gpt2,
    "nanoGPT": NanoGPT,
    "einsum": Einsum,
    "grouped": Grouped,
    "fused": Fused,
    "nn.MultiheadAttention": Attention,
    "nn.MultiheadAttention, weights unused": lambda: Attention(need_weights=True),
    "ALiBi": Alibi,
    "relative positions": Relative,
    "bidirectional": Bidirectional,
    "soft cap": Capped,
}


def inputs_of(model):
    if isinstance(model, Logits):
        return torch.randint(0, VOCABULARY, (2, 57))
    return torch.randn(2, 57, HIDDEN, dtype=torch.float64)


def decisions(report):
    rows = sorted(report.sites, key=lambda row: row.module)
    return [(row.decision, row.reason, row.mask, row.query_shape[1:2], row.key_shape[1:2], row.dtype) for row in rows]


def decided_by_dynamo(model, x, dynamic):
    reports = []

    def backend(module, _example_inputs):
        reports.append(run_pass(module, ALWAYS))
        return module.forward

    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1, min=2, max=100)
    torch.compile(model, backend=backend, fullgraph=True)(x)
    (report,) = reports
    return report


def exported(model, x, dynamic):
    dim = torch.export.Dim
    shapes = ({0: dim("batch", min=2), 1: dim("length", min=2, max=100)},) if dynamic else None
    return torch.export.export(model, (x,), dynamic_shapes=shapes)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_both_dialects_lead_to_the_same_decisions_and_numbers(name, dynamic):
    if dynamic and "Llama" in name and torch.__version__ < "2.12":
        pytest.skip("this torch.export guards on the lengths of the model")
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    x = inputs_of(model)
    program = exported(model, x, dynamic)
    found = run_on_export(program.graph_module, ALWAYS)
    assert found.sites
    assert decisions(found) == decisions(decided_by_dynamo(model, x.clone(), dynamic))
    run_on_export(program.graph_module, COVERING, branch=Branch.SPARSE)
    switchable = [row for row in found.sites if row.decision == "switchable"]
    assert str(program.graph).count("infllm.block_attention") == len(switchable)
    assert all("val" in node.meta for node in program.graph.nodes if "infllm" in str(node.target))
    rounding = 1e-6 if name == "Llama, eager" else 1e-9  # its softmax is in float32
    assert relative_error(program.module()(x), model(x)) < rounding


def upper(length):
    return torch.arange(length)[None, :] <= torch.arange(length)[:, None]


KEY_CONDITIONS = {
    "a mask": lambda mask: mask.bool(),
    "not a mask": lambda mask: ~(mask == 0),
    "numbers compared": lambda mask: 2 * mask + 1 > 2,
    "lengths of rows": lambda mask: torch.arange(mask.shape[1])[None, :] < mask.sum(1)[:, None],
    "a test of pairs of keys": lambda mask: mask[:, torch.arange(mask.shape[1]) // 2] != 0,
    "either of two": lambda mask: (mask != 0) | (torch.arange(mask.shape[1]) % 5 == 1)[None],
    "a row for all": lambda mask: (mask[:1] != 0) & (mask[:1] < 2),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", KEY_CONDITIONS)
@torch.no_grad()
def test_an_exported_padded_batch_equals_the_oracle(name, dynamic):
    """What a mask tests of the keys is computed again by ATen overloads."""

    class Padded(nn.Module):
        def forward(self, q, k, v, mask):
            keys = KEY_CONDITIONS[name](mask)[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keys & upper(q.shape[2]))

    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 57, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(3, 57, dtype=torch.long)
    mask[0, :6], mask[0, 20:23], mask[1, -9:] = 0, 0, 0
    dims = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("length", min=2, max=200)}
    shapes = (dims, dims, dims, {0: dims[0], 1: dims[2]}) if dynamic else None
    program = torch.export.export(Padded(), (q, k, v, mask), dynamic_shapes=shapes)
    (row,) = run_on_export(program.graph_module, ALWAYS, branch=Branch.SPARSE).sites
    assert (row.decision, row.mask) == ("switchable", "causal, padded keys"), row.explanation
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    overloads = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
    assert all(isinstance(target, overloads) or target.__module__ == "_operator" for target in operators)
    common = {"geometry": ALWAYS.geometry, "scale": 8**-0.5, "offset": 0, "dense_len": 0}
    common["key_mask"] = KEY_CONDITIONS[name](mask).expand(3, 57)
    expected, _ = reference.attention(q, k, v, reference.select_blocks(q, k, **common), **common)
    assert relative_error(program.module()(q, k, v, mask), expected) < 1e-10
    assert relative_error(Padded()(q, k, v, mask).nan_to_num(), expected) > 1e-3  # the selection does leave keys out
