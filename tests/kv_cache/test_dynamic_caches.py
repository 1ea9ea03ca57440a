"""Keys that grow by concatenation: one query over them is causal where the last key is its own token's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.rewrite.pipeline import run_on_export, run_pass
from tests.support.common import SMALL, capture, llama, oracle_attention, relative_error, tokens

ALWAYS = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})
COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
HEADS, D = 3, 8
WIDTH = HEADS * D


def split(x):
    return x.unflatten(-1, (-1, D)).transpose(1, 2)


class Step(nn.Module):
    """One layer of attention over keys and values of earlier calls; subclasses say how they are put together."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.learned = nn.Parameter(torch.randn(1, HEADS, 1, D))
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def put_together(self, past, new):
        return torch.cat([past, new], 2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def project(self, x):
        return split(self.q(x)), split(self.k(x)), split(self.v(x))

    def forward(self, x, past_k, past_v):
        q, k, v = self.project(x)
        k, v = self.put_together(past_k, k), self.put_together(past_v, v)
        return self.attend(q, k, v), k, v


class Grouped(Step):
    """Two heads share a key head."""

    def project(self, x):
        q, k, v = super().project(x)
        return torch.cat([q, q], 1), k, v

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Byhand(Step):
    def attend(self, q, k, v):
        return (q @ k.transpose(-1, -2) * D**-0.5).softmax(-1) @ v


class LengthFirst(Step):
    """The cache is kept as ``[B, L, H, D]``."""

    def put_together(self, past, new):
        return torch.cat((past.transpose(1, 2), new.transpose(1, 2)), dim=-3).transpose(1, 2)


class PrefixBefore(Step):
    """Learned keys stand before the cache's."""

    def put_together(self, past, new):
        return torch.cat([self.learned.expand(past.shape[0], -1, -1, -1), past, new], 2)


class Rotated(Step):
    def project(self, x):
        q, k, v = super().project(x)
        angle = torch.arange(D, device=x.device).cos()
        return q * angle, k * angle, v


class OneProjection(Step):
    def project(self, x):
        return [
            split(part) for part in (torch.cat([self.q.weight, self.k.weight, self.v.weight]) @ x.mT).mT.chunk(3, -1)
        ]


class Encoder(Step):
    """Attention to an encoder: nothing is appended."""

    def put_together(self, past, new):
        return past


class EncoderInGraph(Step):
    """Keys are computed in this call, all of them."""

    def put_together(self, past, new):
        return torch.cat([past * self.scale[:D], new], 2)


class LearnedLast(Step):
    """A learned key stands last, as with the bias keys of `nn.MultiheadAttention`."""

    def put_together(self, past, new):
        return torch.cat([past, self.learned.repeat(past.shape[0], 1, 1, 1)], 2)


class ScaledLearnedLast(Step):
    """The last key and the query are computed from one parameter."""

    def project(self, x):
        q, k, v = super().project(x * self.scale)
        return q, k, v

    def put_together(self, past, new):
        return torch.cat([past, (self.learned * self.scale[:D]).expand(past.shape[0], -1, -1, -1)], 2)


class ZeroLast(Step):
    def put_together(self, past, new):
        return torch.cat([past, past.new_zeros(past.shape[0], HEADS, 1, D)], 2)


class OtherInputLast(Step):
    """The last key is an input."""

    def put_together(self, past, new):
        return torch.cat([past[:, :, :-1], past[:, :, -1:]], 2)


class NewFirst(Step):
    """A cache that grows at its front."""

    def put_together(self, past, new):
        return torch.cat([new, past], 2)


class NewAmid(Step):
    def put_together(self, past, new):
        return torch.cat([past, new, past], 2)


class TwoKeysNew(Step):
    def put_together(self, past, new):
        return torch.cat([past, torch.cat([new, new], 2)], 2)


class AlongFeatures(Step):
    """The parts are halves of the features."""

    def put_together(self, past, new):
        return torch.cat([past[..., : D // 2], (past[..., D // 2 :] + new[..., D // 2 :])], 3)


class Trimmed(Step):
    """A cache that forgets its first key when it grows."""

    def forward(self, x, past_k, past_v):
        out, k, v = super().forward(x, past_k, past_v)
        return out, k[:, :, 1:], v[:, :, 1:]


STEPS = [Step, Grouped, Byhand, LengthFirst, PrefixBefore, Rotated, OneProjection]
OTHERS = {
    Encoder: "BIDIRECTIONAL",
    EncoderInGraph: "BIDIRECTIONAL",
    LearnedLast: "BIDIRECTIONAL",
    ScaledLearnedLast: "BIDIRECTIONAL",
    ZeroLast: "BIDIRECTIONAL",
    OtherInputLast: "BIDIRECTIONAL",
    NewFirst: "BIDIRECTIONAL",
    NewAmid: "BIDIRECTIONAL",
    TwoKeysNew: "BIDIRECTIONAL",
    AlongFeatures: "BIDIRECTIONAL",
    Trimmed: "PARTIAL_KEYS",
}


def inputs(queries=1, length=70, batch=2):
    torch.manual_seed(0)
    shapes = (batch, queries, WIDTH), *[(batch, HEADS, length, D)] * 2
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def rows(model, dialect, arguments, dynamic):
    if dialect == "dynamo":
        return run_pass(capture(model, *arguments, dynamic=dynamic), ALWAYS).sites
    grown = {2: torch.export.Dim("length", min=4, max=500)} if dynamic else None
    program = torch.export.export(model, arguments, dynamic_shapes=(None, grown, grown))
    return run_on_export(program.graph_module, ALWAYS).sites


DIALECTS = pytest.mark.parametrize("dialect", ["dynamo", "export"])


@DIALECTS
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_a_step_over_growing_keys_is_switchable(kind, dynamic, dialect):
    torch.manual_seed(0)
    (row,) = rows(kind().double(), dialect, inputs(), dynamic)
    assert (row.decision, row.reason, row.mask) == ("switchable", "SWITCHABLE", "causal")


@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("config", [ALWAYS, COVERING], ids=["small budget", "covering budget"])
@torch.no_grad()
def test_a_step_equals_the_oracle_and_the_model(kind, config):
    torch.manual_seed(0)
    model, arguments = kind().double(), inputs(length=131)
    got = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), config, strict=True)(*arguments)[0]
    assert relative_error(got, model(*arguments)[0]) < 1e-10 or config is ALWAYS
    if kind is Byhand:
        model.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)
    with oracle_attention(config):
        oracle_attention_heads(HEADS)
        expected = model(*arguments)[0]
    assert relative_error(got, expected) < 1e-10


def oracle_attention_heads(heads):
    F.scaled_dot_product_attention.heads = heads


@DIALECTS
@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_what_does_not_grow_by_its_own_token_stays_dense(kind, dialect):
    torch.manual_seed(0)
    (row,) = rows(kind().double(), dialect, inputs(), None)
    assert (row.decision, row.reason) == ("dense", OTHERS[kind])


@torch.no_grad()
def test_several_queries_without_a_mask_stay_dense():
    (row,) = rows(Step().double(), "dynamo", inputs(queries=2), None)
    assert (row.decision, row.reason) == ("dense", "CROSS_ATTENTION")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask of ones"])
@torch.no_grad()
def test_every_step_of_a_dynamic_cache_equals_the_oracle_on_the_whole_prefix(implementation, masked):
    """One layer, whose keys do not depend on how earlier calls attended; the length crosses `dense_len` on the way."""
    plain = llama(num_hidden_layers=1)
    model = llama(num_hidden_layers=1, attn_implementation=implementation)
    model = infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL, strict=True)
    ids = tokens(140)

    def masks(length):
        return {"attention_mask": torch.ones(1, length, dtype=torch.long)} if masked else {}

    out, far = model(ids[:, :40], **masks(40)), 0.0
    oracle = plain(ids[:, :40])  # one layer: what its cache holds does not depend on attention
    dense = plain(ids[:, :40])
    for place in range(40, 140):
        token = ids[:, place : place + 1]
        out = model(token, past_key_values=out.past_key_values, **masks(place + 1))
        with oracle_attention(SMALL):
            oracle = plain(token, past_key_values=oracle.past_key_values)
        dense = plain(token, past_key_values=dense.past_key_values)
        assert relative_error(out.logits, oracle.logits) < (1e-5 if implementation == "eager" else 1e-9), place
        far = max(far, relative_error(dense.logits, oracle.logits))
    assert far > 1e-2  # the selection does leave keys out
    report = infllm_pass.report(model)
    assert {site.decision for site in report.sites} == {"switchable"}
    steps = {(site.branch, site.cache_state) for site in report.sites if site.query_shape[2] == 1}
    assert steps == {("dense", ""), ("sparse", "carried")}
    assert len(report.graphs) <= 5


@torch.no_grad()
def test_steps_of_a_deep_model_continue_its_prefill():
    """Always sparse, the steps of all layers equal one call on the whole text."""
    plain = llama()
    model = infllm_pass.sparsify(torch.compile(plain, backend="eager"), ALWAYS, strict=True)
    ids = tokens(90)
    out = model(ids[:, :50])
    logits = [out.logits]
    for position in range(50, 90):
        out = model(ids[:, position : position + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    with oracle_attention(ALWAYS):
        expected = plain(ids).logits
    assert relative_error(torch.cat(logits, 1), expected) < 1e-8
