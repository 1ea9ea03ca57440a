"""Attention over caches whose scores have more than a mask: biases that grow with the keys, sinks, caps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass.kernels import reference
from tests.support.cache_support import CONFIG, DIM, HEADS, HIDDEN, KV_HEADS, CachedAttention, caches, scatter, tokens
from tests.support.common import relative_error

STEPS = [5, 30, 1, 1, 7, 1, 20, 1, 1, 13]
CAP = 1.5
KINDS = ("learned", "ALiBi", "cap and sinks")


class TermAttention(CachedAttention):
    """Attention over a static cache, or over one that grows, written out.

    Args:
        kind: one of `KINDS`. "learned": the bias of a key comes from its token, and is kept beside the keys.
        update: as in `CachedAttention`.
    """

    def __init__(self, kind, **settings):
        super().__init__(**settings)
        self.kind = kind
        self.group = 1 if kind == "ALiBi" else HEADS // KV_HEADS
        self.q = nn.Linear(HIDDEN, self.group * KV_HEADS * DIM).double()
        self.importance = nn.Linear(HIDDEN, KV_HEADS).double()
        self.sinks = nn.Parameter(torch.randn(HEADS, dtype=torch.float64) + 1)
        self.slopes = nn.Parameter(2.0 ** -torch.arange(1.0, 1 + KV_HEADS, dtype=torch.float64))

    def own_bias(self, x):
        """Of new tokens, ``[B, KV_HEADS, T]``."""
        return F.logsigmoid(4 * self.importance(x)).transpose(1, 2)

    def attend(self, q, k, v, biases, mask):
        if self.group > 1:
            k, v = (each.repeat_interleave(self.group, 1) for each in (k, v))
        scores = q @ k.mT * DIM**-0.5
        if self.kind == "cap and sinks":
            scores = torch.tanh(scores / CAP) * CAP
        elif self.kind == "learned":
            scores = scores + biases.repeat_interleave(self.group, 1)[:, :, None]
        else:
            scores = scores + self.slopes[:, None, None] * torch.arange(k.shape[2])
        scores = scores.masked_fill(~mask, torch.finfo(torch.float64).min)
        if self.kind == "cap and sinks":
            scores = torch.cat([scores, self.sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., : k.shape[2]] @ v

    def forward(self, x, keys, values, biases, position, valid=None):
        places = torch.arange(x.shape[1]) + (position[:, None] if self._is_by_row(position) else position)
        rows = places if places.dim() == 2 else places[None]
        q, k, v = (self.heads(project, x) for project in (self.q, self.k, self.v))
        into = rows.expand(x.shape[0], -1) if self.update is scatter else places
        k, v = self.update(keys, into, k), self.update(values, into, v)
        if self.update is scatter:
            biases = biases.scatter_(2, into[:, None].expand(-1, KV_HEADS, -1), self.own_bias(x))
        else:
            biases = biases.index_copy_(2, into, self.own_bias(x))
        mask = torch.arange(keys.shape[2]) <= rows[:, None, :, None]
        if valid is not None:
            mask = mask & valid[:, None, None]
        return self.attend(q, k, v, biases, mask)

    def grow(self, x, keys, values, biases):
        q, k, v = (self.heads(project, x) for project in (self.q, self.k, self.v))
        keys, values, biases = (torch.cat(pair, 2) for pair in ((keys, k), (values, v), (biases, self.own_bias(x))))
        length, count = keys.shape[2], x.shape[1]
        mask = torch.arange(length) <= torch.arange(count)[:, None] + (length - count)
        return self.attend(q, keys, values, biases, mask), keys, values, biases

    def expected(self, x, keys, values, biases, position, valid=None):
        """What the oracle gives; the caches hold `x` already."""
        q = self.heads(self.q, x)
        positions = torch.as_tensor(position).reshape(-1).expand(x.shape[0])
        rows = []
        for row, first in enumerate(positions.tolist()):
            part, seen = slice(row, row + 1), slice(0, first + x.shape[1])
            fields = {"geometry": CONFIG.geometry_for(DIM), "scale": DIM**-0.5, "dense_len": CONFIG.dense_len}
            fields |= {"offset": first} if valid is None else {"offset": 0, "offsets": positions[part]}
            if valid is not None:
                seen, fields["key_mask"] = slice(None), valid[part]
            if self.kind == "cap and sinks":
                fields |= {"softcap": CAP, "sinks": self.sinks}
            elif self.kind == "learned":
                fields["key_bias"] = biases[part, :, seen]
            else:
                fields["key_bias"] = (self.slopes[:, None] * torch.arange(keys.shape[2]))[None, :, seen]
            k, v = keys[part, :, seen], values[part, :, seen]
            rows.append(reference.attention(q[part], k, v, reference.select_blocks(q[part], k, **fields), **fields)[0])
        return torch.cat(rows)


def sparsified(module, **settings):
    torch._dynamo.reset()
    return infllm_pass.sparsify(torch.compile(module, backend="aot_eager", **settings), CONFIG)


PLACES = {
    "one row": {},
    "rows of their own": {"update": scatter, "position": [0, 16, 7], "batch": 3},
    "padding and holes": {"batch": 3, "valid": True},
}


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_static_caches(kind, place):
    batch, position = place.get("batch", 1), torch.as_tensor(place.get("position", 0))
    module = TermAttention(kind, **{name: place[name] for name in ("update",) if name in place})
    model = sparsified(module)
    keys, values = caches(batch)
    biases = torch.full((batch, KV_HEADS, keys.shape[2]), 100.0, dtype=torch.float64)
    valid = None
    if "valid" in place:
        valid = torch.ones(3, 96, dtype=torch.bool)
        valid[0, :3] = valid[1, :31] = valid[2, 20:23] = False
    for count in STEPS:
        x = tokens(batch, count)
        given = (x, keys, values, biases, position.clone())
        out = model(*given, *([] if valid is None else [valid]))
        assert relative_error(out, module.expected(*given, valid)) < 1e-12, position
        position = position + count
    rows = infllm_pass.report(model).sites
    assert {row.decision for row in rows} == {"switchable"}, [row.explanation for row in rows]
    assert {(row.target, row.kernels) for row in rows if row.query_shape[2] == 1} == {("decode", "C++")}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_growing_caches(kind):
    module = TermAttention(kind)
    model = sparsified(module.grow)
    held = [torch.zeros(1, KV_HEADS, 0, width, dtype=torch.float64) for width in (DIM, DIM)]
    held.append(torch.zeros(1, KV_HEADS, 0, dtype=torch.float64))
    position = 0
    for count in [44, 1, 1, 1, 7, 1, 20, 1, 1]:
        x = tokens(1, count)
        out, *held = model(x, *held)
        assert relative_error(out, module.expected(x, *held, position)) < 1e-12, position
        position += count
    rows = infllm_pass.report(model).sites
    assert {row.decision for row in rows} == {"switchable"}, [row.explanation for row in rows]
    assert "decode" in {row.target for row in rows if row.query_shape[2] == 1}


class WritesTwice(TermAttention):
    """Biases of the slots are halved after they were added to the scores."""

    def attend(self, q, k, v, biases, mask):
        out = super().attend(q, k, v, biases, mask)
        biases.mul_(0.5)
        return out


@torch.no_grad()
def test_biases_that_the_graph_changes_later_stay_in_the_model():
    module = WritesTwice("learned")
    model = sparsified(module)
    keys, values = caches()
    biases = torch.zeros(1, KV_HEADS, keys.shape[2], dtype=torch.float64)
    x = tokens(1, 44)
    own = keys.clone(), values.clone(), biases.clone()
    with pytest.warns(infllm_pass.errors.NoAttentionSiteWarning, match="the graph overwrites its memory"):
        out = model(x, keys, values, biases, torch.tensor(0))
    assert torch.equal(out, module(x, *own, torch.tensor(0)))
    assert torch.equal(biases, own[2])
