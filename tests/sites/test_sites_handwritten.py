"""Attention written by hand: found in every spelling and layout, and rewritten to the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels import reference
from infllm_pass.rewrite.pipeline import run_pass
from tests.support.common import SMALL, capture, relative_error

ALWAYS = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})
COVERING = SparseAttentionConfig.from_dict({**ALWAYS.to_dict(), "topk": 40})
INF = float("-inf")
B, HQ, HKV, L, D, DV = 3, 6, 2, 57, 8, 12
G = HQ // HKV


def qkv(heads_kv=HQ, dtype=torch.float64):
    shapes = ((HQ, D), (heads_kv, D), (heads_kv, DV))
    return tuple(torch.randn(B, heads, L, dim, dtype=dtype) for heads, dim in shapes)


def hidden(length):
    index = torch.arange(length)
    return index[None, :] > index[:, None]


def matmul_attention(q, k, v, *, product=None, scale=None, mask=None, softmax=None, output=None):
    """Attention by matrices, of which each part can be written otherwise."""
    scores = (product or (lambda q, k: q @ k.transpose(-1, -2)))(q, k)
    scores = (scale or (lambda s: s * D**-0.5))(scores)
    scores = (mask or (lambda s: s.masked_fill(hidden(s.shape[-1]), INF)))(scores)
    weights = (softmax or (lambda s: s.softmax(-1)))(scores)
    return (output or (lambda p, v: p @ v))(weights, v)


def part(**parts):
    return lambda q, k, v: matmul_attention(q, k, v, **parts)


def unscaled(q, k, v):
    return matmul_attention(q, k, v, scale=lambda s: s)


def merged(x):
    return x.reshape(-1, *x.shape[2:])


def in_place(s):
    s *= D**-0.5
    return s.masked_fill_(hidden(s.shape[-1]), INF)


def masked_in_place(s):
    s.masked_fill_(hidden(s.shape[-1]).expand_as(s), INF)
    return s


def edited_in_place(s):
    s *= 2.0
    s.mul_(D**-0.5).div_(2.0)
    s.masked_fill_(hidden(s.shape[-1]), INF)
    return s


def numbers(s, least=INF):
    """A mask of numbers to add."""
    return torch.zeros(s.shape[-2:], dtype=s.dtype).masked_fill(hidden(s.shape[-1]), least)


def added_by_baddbmm(q, k):
    return torch.baddbmm(torch.zeros(B * HQ, L, L, dtype=q.dtype), merged(q), merged(k).mT).view(B, HQ, L, L)


SPELLINGS = {
    "matmul": part(product=lambda q, k: torch.matmul(q, k.transpose(2, 3))),
    "method": part(product=lambda q, k: q.matmul(k.mT)),
    "linear algebra": part(
        product=lambda q, k: torch.linalg.matmul(q, k.mT), output=lambda p, v: torch.linalg.matmul(p, v)
    ),
    "permuted keys": part(product=lambda q, k: q @ k.permute(0, 1, 3, 2)),
    "swapped axes": part(product=lambda q, k: q @ k.swapaxes(-2, -1).contiguous()),
    "keys times queries": part(product=lambda q, k: (k @ q.transpose(-1, -2)).transpose(-1, -2)),
    "einsum": part(product=lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k)),
    "einsum with an ellipsis": part(product=lambda q, k: torch.einsum("...id,...jd->...ij", q, k)),
    "output by einsum": part(output=lambda p, v: torch.einsum("bhij,bhjd->bhid", p, v)),
    "values first": part(output=lambda p, v: (v.transpose(-1, -2) @ p.transpose(-1, -2)).transpose(-1, -2)),
    "divided": part(scale=lambda s: s / math.sqrt(D)),
    "divided by a tensor": part(scale=lambda s: s / torch.tensor(D**0.5, dtype=s.dtype)),
    "divided by a filled tensor": part(scale=lambda s: s / torch.full([], D**0.5, dtype=s.dtype)),
    "divided by a root": part(scale=lambda s: s / torch.sqrt(torch.tensor(float(D), dtype=s.dtype))),
    "scaled queries": lambda q, k, v: unscaled(q * D**-0.5, k, v),
    "scaled keys": lambda q, k, v: unscaled(q, k / D**0.5, v),
    "scaled both": lambda q, k, v: unscaled(q * D**-0.25, k * D**-0.25, v),
    "scaled in place": part(scale=lambda s: s, mask=in_place),
    "where": part(mask=lambda s: torch.where(hidden(s.shape[-1]), INF, s)),
    "where kept": part(mask=lambda s: torch.where(~hidden(s.shape[-1]), s, torch.finfo(s.dtype).min)),
    "least number": part(mask=lambda s: s.masked_fill(hidden(s.shape[-1])[None, None], torch.finfo(s.dtype).min)),
    "two masks": part(
        mask=lambda s: s.masked_fill(hidden(s.shape[-1]), INF).masked_fill(hidden(s.shape[-1])[None], INF)
    ),
    "functional softmax": part(softmax=lambda s: F.softmax(s, dim=-1)),
    "torch softmax": part(softmax=lambda s: torch.softmax(s, 3)),
    "softmax in another dtype": part(softmax=lambda s: F.softmax(s, dim=-1, dtype=torch.float64).to(s.dtype)),
    "added before the scale": part(scale=lambda s: (s + numbers(s)) * D**-0.5, mask=lambda s: s),
    "least number added before the scale": part(
        scale=lambda s: (s + numbers(s, torch.finfo(s.dtype).min)) / D**0.5, mask=lambda s: s
    ),
    "subtracted": part(mask=lambda s: s - 1e10 * hidden(s.shape[-1]).to(s.dtype)),
    "added to nothing": part(product=added_by_baddbmm),
    "masked in place": part(mask=masked_in_place),
    "edited in place": part(scale=lambda s: s, mask=edited_in_place),
    "less the largest": part(softmax=lambda s: (s - s.max(dim=-1, keepdim=True).values).softmax(-1)),
    "less the largest, detached": part(softmax=lambda s: (s - s.amax(-1)[..., None].detach()).softmax(-1)),
    "less a number": part(softmax=lambda s: (s - 3.0).softmax(-1)),
    "not below the least": part(
        softmax=lambda s: torch.max(s, torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype)).softmax(-1)
    ),
    "clamped to the least": part(softmax=lambda s: s.clamp(min=torch.finfo(s.dtype).min).softmax(-1)),
    "inactive dropout": part(softmax=lambda s: F.dropout(s.softmax(-1), 0.1, False)),
    "dropout of nothing": part(softmax=lambda s: F.dropout(s.softmax(-1), 0.0, True)),
}


def bmm(q, k, v):
    scores = torch.bmm(merged(q), merged(k).transpose(1, 2)) * D**-0.5
    weights = scores.masked_fill(hidden(q.shape[2]), INF).softmax(-1)
    return torch.bmm(weights, merged(v)).view(q.shape[0], q.shape[1], q.shape[2], -1)


def baddbmm(q, k, v):
    empty = torch.empty(1, 1, 1, dtype=q.dtype)
    scores = torch.baddbmm(empty, merged(q), merged(k).transpose(1, 2), beta=0.0, alpha=D**-0.5)
    scores = scores.view(q.shape[0], q.shape[1], q.shape[2], -1)
    weights = scores.masked_fill(hidden(q.shape[2]), INF).softmax(-1)
    return torch.bmm(weights.view(-1, *weights.shape[2:]), merged(v)).view(q.shape[0], q.shape[1], q.shape[2], -1)


def bshd(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
    weights = scores.masked_fill(hidden(q.shape[1]), INF).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def bshd_scores(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * D**-0.5
    weights = scores.masked_fill(hidden(q.shape[1])[:, None], INF).softmax(-1)
    return torch.einsum("bqhk,bkhd->bqhd", weights, v).transpose(1, 2)


LAYOUTS = {"(BH)LD": bmm, "baddbmm": baddbmm, "BLHD": bshd, "BLHD, scores BLHL": bshd_scores}


def repeated(attention, repeat):
    return lambda q, k, v: attention(q, repeat(k), repeat(v))


def expand_reshape(x):
    return x[:, :, None].expand(-1, -1, G, -1, -1).reshape(x.shape[0], HQ, x.shape[2], x.shape[3])


def grouped_5d(q, k, v):
    q = q.reshape(q.shape[0], HKV, G, q.shape[2], D)
    scores = q @ k[:, :, None].transpose(-1, -2) * D**-0.5
    weights = scores.masked_fill(hidden(q.shape[3]), INF).softmax(-1)
    return (weights @ v[:, :, None]).reshape(q.shape[0], HQ, q.shape[3], -1)


def grouped_einsum(q, k, v):
    q = q.reshape(q.shape[0], HKV, G, q.shape[2], D)
    scores = torch.einsum("bkgqd,bksd->bkgqs", q, k) / D**0.5
    weights = scores.masked_fill(hidden(q.shape[3]), INF).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", weights, v).flatten(1, 2)


def grouped_blhd(q, k, v):
    q = q.transpose(1, 2).reshape(q.shape[0], q.shape[2], HKV, G, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.einsum("bqkgd,bskd->bkgqs", q, k) / D**0.5
    weights = scores.masked_fill(hidden(q.shape[1]), INF).softmax(-1)
    return torch.einsum("bkgqs,bskd->bqkgd", weights, v).flatten(2, 3).transpose(1, 2)


GROUPS = {
    "expand and reshape": repeated(matmul_attention, expand_reshape),
    "repeat and reshape": repeated(matmul_attention, lambda x: x[:, :, None].repeat(1, 1, G, 1, 1).flatten(1, 2)),
    "repeat_interleave": repeated(matmul_attention, lambda x: x.repeat_interleave(G, dim=1)),
    "repeat_interleave, (BH)LD": repeated(bmm, lambda x: x.repeat_interleave(G, dim=1)),
    "expand and reshape, (BH)LD": repeated(bmm, expand_reshape),
    "repeated along BLHD": lambda q, k, v: bshd(q, *(x.repeat_interleave(G, dim=1) for x in (k, v))),
    "five dimensions": grouped_5d,
    "five dimensions, einsum": grouped_einsum,
    "five dimensions, BL": grouped_blhd,
}


def run(module, tensors):
    """Run a captured graph: placeholders are the tensors by name, and sizes of the first."""
    names = dict(zip("qkv", tensors, strict=True))
    values = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = node.name.lower().strip("l_")
            example = node.meta.get("example_value")
            values.append(names[name] if name in names else int(example))
    return module(*values)[0]


def oracle(q, k, v):
    common = {"geometry": ALWAYS.geometry, "scale": D**-0.5, "offset": 0}
    blocks = reference.select_blocks(q, k, **common, dense_len=0)
    return reference.attention(q, k, v, blocks, **common, dense_len=0)[0].to(q.dtype)


def check(function, heads_kv, dynamic, kv_heads):
    """Found, proved, equal to the dense model under a covering budget and to the oracle under a small one."""
    q, k, v = qkv(heads_kv)
    expected = {COVERING: function(q, k, v), ALWAYS: oracle(q, k, v)}
    for config, wanted in expected.items():
        for tensor in (q, k, v) if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, [0, 2])
        module = capture(function, q, k, v)
        (site,) = run_pass(module, config).sites
        assert site.decision == "switchable", site.explanation
        assert site.key_shape[1] == kv_heads
        assert not any(node.target in (torch.softmax, "softmax", F.softmax) for node in module.graph.nodes)
        assert relative_error(run(module, (q, k, v)), wanted) < 1e-10
        torch._dynamo.reset()
    assert relative_error(expected[ALWAYS], expected[COVERING]) > 1e-3  # the selection does leave keys out


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dynamic):
    check(LAYOUTS[layout], HQ, dynamic, HQ)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    check(SPELLINGS[spelling], HQ, False, HQ)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dynamic):
    check(GROUPS[group], HKV, dynamic, HKV)


def test_a_batch_of_one_with_products_of_three_and_of_four_dimensions():
    def attention(q, k, v):
        scores = (merged(q) @ merged(k).mT).view(1, HQ, L, L) * D**-0.5
        return scores.masked_fill(hidden(L), INF).softmax(-1) @ v

    q, k, v = (x[:1] for x in qkv())
    module = capture(attention, q, k, v)
    (row,) = run_pass(module, ALWAYS).sites
    assert row.decision == "switchable", row.explanation
    assert row.query_shape[:2] == (1, HQ)
    assert relative_error(run(module, (q, k, v)), oracle(q, k, v)) < 1e-10


def test_scores_that_something_else_reads_are_still_masked_in_place():
    def attention(q, k, v):
        scores = q @ k.mT
        scores.masked_fill_(hidden(L), INF)
        return (scores * D**-0.5).softmax(-1) @ v + scores[..., :1].exp()

    q, k, v = qkv()
    expected = attention(q, k, v)
    module = capture(attention, q, k, v)
    (row,) = run_pass(module, COVERING).sites
    assert row.decision == "switchable", row.explanation
    assert relative_error(run(module, (q, k, v)), expected) < 1e-10


class Attention(torch.nn.Module):
    """``nn.MultiheadAttention`` over its own past."""

    def __init__(self, need_weights=False, batch_first=True, bias=True, kdim=None, returned=False):
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(24, 6, batch_first=batch_first, bias=bias, kdim=kdim, vdim=kdim)
        self.need_weights, self.batch_first, self.returned = need_weights, batch_first, returned

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        mask = hidden(x.shape[1 if self.batch_first else 0])
        if not self.need_weights:
            out, weights = self.inner(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)
        else:
            bias = torch.where(mask, INF, 0.0).to(x.dtype)
            out, weights = self.inner(x, x, x, attn_mask=bias, need_weights=True)
        out = out if self.batch_first else out.transpose(0, 1)
        return (out, weights) if self.returned else out


def compiled(model, config, *inputs):
    """The outputs of a compiled model, and the rows of its sites."""
    rows = []

    def backend(module, _example_inputs):
        rows.extend(run_pass(module, config).sites)
        return module.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)(*inputs), rows


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": False}, {"bias": False}, {"kdim": 24}],
    ids=["batch first", "length first", "no bias", "own projections"],
)
def test_multihead_attention_is_spelled_out(options, training):
    model = Attention(**options).double().train(training)
    x = torch.randn(2, L, 24, dtype=torch.float64)
    out, (row,) = compiled(model, COVERING, x)
    assert row.decision == "switchable", row.explanation
    assert relative_error(out, model(x)) < 1e-10
    sparse, _ = compiled(model, ALWAYS, x)
    assert relative_error(sparse, model(x)) > 1e-3


def test_multihead_attention_that_returns_its_weights_stays_as_it_was():
    model = Attention(need_weights=True, returned=True).double().train()
    x = torch.randn(2, L, 24, dtype=torch.float64)
    module = capture(model, x)
    before = str(module.graph)
    (row,) = run_pass(module, ALWAYS).sites
    assert row.reason == "RETURNED_WEIGHTS"
    assert str(module.graph) == before


def test_an_attention_of_an_attention():
    def twice(q, k, v):
        return matmul_attention(F.scaled_dot_product_attention(q, k, k, is_causal=True), k, v)

    q, k, v = qkv()
    module = capture(twice, q, k, v)
    assert [row.decision for row in run_pass(module, COVERING).sites] == ["switchable"] * 2
    assert relative_error(run(module, (q, k, v)), twice(q, k, v)) < 1e-10


def test_low_precision_with_an_upcast_softmax():
    def attention(q, k, v):
        scores = (q.float() @ k.float().transpose(-1, -2)) * D**-0.5
        weights = scores.masked_fill(hidden(L), INF).softmax(-1).to(v.dtype)
        return weights @ v

    q, k, v = qkv(dtype=torch.bfloat16)
    module = capture(attention, q, k, v)
    (row,) = run_pass(module, COVERING).sites
    assert (row.decision, row.dtype) == ("switchable", "bfloat16")
    exact = attention(*(x.double() for x in (q, k, v)))
    out = run(module, (q, k, v))
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 2 * relative_error(attention(q, k, v), exact)
