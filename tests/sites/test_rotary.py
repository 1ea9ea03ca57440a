"""The rotary embedding of a site's keys: read off every spelling, and measured on the keys themselves."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from infllm_pass import SparseAttentionConfig
from infllm_pass.export.export import _held_values
from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.graph.subgraphs import all_graphs
from infllm_pass.plan.score_channels import from_rotary
from infllm_pass.sites import find_sites
from infllm_pass.sites.layouts import Layouts
from infllm_pass.sites.rotary import Rotary, RotaryReader
from tests.support.key_channels import Observer, measured

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 32, 24
HALF = [(i, i + DIM // 2) for i in range(DIM // 2)]
ADJACENT = [(2 * i, 2 * i + 1) for i in range(DIM // 2)]


def frequencies(count, base=100.0):
    return base ** -(torch.arange(count) / count)


def rotate_half(x):
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)


class Attention(nn.Module):
    """Attention with a rotary embedding of its own spelling on queries and keys ``[B, H, L, D]``."""

    rotary_dim = DIM

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(16, HEADS * DIM)
        self.k = nn.Linear(16, KV_HEADS * DIM)
        self.v = nn.Linear(16, KV_HEADS * DIM)
        self.register_buffer("inv_freq", frequencies(self.rotary_dim // 2))
        self.prepare()

    def prepare(self):
        pass

    def angles(self, x):
        return torch.outer(torch.arange(x.shape[-2]).float(), self.inv_freq)  # [L, R/2]

    def rotate(self, x):
        raise NotImplementedError

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class HalfSplit(Attention):
    def rotate(self, x):
        angles = self.angles(x)
        angles = torch.cat([angles, angles], dim=-1)
        return x * angles.cos() + rotate_half(x) * angles.sin()


class Chunked(Attention):
    def rotate(self, x):
        cos, sin = self.angles(x).cos(), self.angles(x).sin()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Scaled(Attention):
    """As of YaRN: another base, and a factor on sines and cosines."""

    def rotate(self, x):
        angles = self.angles(x)[None, None]
        cos, sin = (torch.cat([t, t], -1) * 1.3 for t in (angles.cos(), angles.sin()))
        return ((x.float() * cos) + (rotate_half(x.float()) * sin)).to(x.dtype)


class Stacked(Attention):
    def rotate(self, x):
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (self.angles(x).cos(), self.angles(x).sin()))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin


class Unbound(Attention):
    def rotate(self, x):
        cos, sin = self.angles(x).cos(), self.angles(x).sin()
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3)


class Polar(Attention):
    def rotate(self, x):
        angles = self.angles(x)
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


class ComplexTable(Attention):
    def prepare(self):
        angles = torch.outer(torch.arange(64).float(), self.inv_freq)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def rotate(self, x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[-2]]).flatten(-2)


class Tables(Attention):
    def prepare(self):
        angles = torch.outer(torch.arange(64).float(), self.inv_freq)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos()[None, None])
        self.register_buffer("sin", angles.sin()[None, None])

    def rotate(self, x):
        places = torch.arange(x.shape[-2])[None]
        cos, sin = (t.squeeze(1).squeeze(0)[places].unsqueeze(1) for t in (self.cos, self.sin))
        return x * cos + rotate_half(x) * sin


class GatheredTable(Attention):
    def prepare(self):
        angles = torch.outer(torch.arange(64).float(), self.inv_freq)
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], dim=-1))

    def rotate(self, x):
        places = torch.arange(x.shape[-2])[None].unsqueeze(-1).repeat(1, 1, self.table.shape[-1])
        sin, cos = torch.split(torch.gather(self.table[None], 1, places), self.table.shape[-1] // 2, dim=-1)
        sin, cos = (torch.repeat_interleave(t[:, None], 2, 3) for t in (sin, cos))
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


class Partial(Attention):
    rotary_dim = 8

    def rotate(self, x):
        angles = torch.cat([self.angles(x)] * 2, dim=-1)
        turned, plain = x[..., :8], x[..., 8:]
        turned = turned * angles.cos() + rotate_half(turned) * angles.sin()
        return torch.cat([turned, plain], dim=-1)


class LastChannels(Attention):
    rotary_dim = 16

    def rotate(self, x):
        angles = torch.cat([self.angles(x)] * 2, dim=-1)
        plain, turned = x.split([16, 16], dim=-1)
        return torch.cat([plain, turned * angles.cos() + rotate_half(turned) * angles.sin()], dim=-1)


class Computed(Attention):
    def angles(self, x):
        inverse = 1.0 / (100.0 ** (torch.arange(0, DIM, 2, dtype=torch.float32) / DIM))
        return torch.einsum("i,j->ij", torch.arange(x.shape[-2], dtype=torch.float32), inverse)

    rotate = HalfSplit.rotate


class Wavelengths(Attention):
    def angles(self, x):
        lengths = 100.0 ** (torch.arange(0, DIM, 2, dtype=torch.float32) / DIM)
        return torch.arange(x.shape[-2], dtype=torch.float32)[:, None] / lengths

    rotate = HalfSplit.rotate


class ColumnTimesRow(Attention):
    def angles(self, x):
        places = torch.arange(x.shape[-2])[None]
        return (self.inv_freq[None, :, None].expand(1, -1, 1) @ places[:, None, :].float()).transpose(1, 2)[:, None]

    rotate = HalfSplit.rotate


class Shuffled(Attention):
    """Frequencies in no order: that of the channels follows from their values."""

    def prepare(self):
        self.inv_freq.copy_(self.inv_freq[torch.randperm(DIM // 2, generator=torch.Generator().manual_seed(3))])

    rotate = HalfSplit.rotate


class Axes(Attention):
    """Sections of the frequencies count positions along axes of their own, as in multi-axis embeddings."""

    def angles(self, x):
        places = torch.arange(x.shape[-2]).expand(3, 1, -1)
        angles = self.inv_freq * places[..., None].float()  # [3, 1, L, D/2]
        parts = angles.split([4, 6, 6], dim=-1)
        return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)[:, None]

    rotate = HalfSplit.rotate


class InterleavedAxes(Attention):
    def angles(self, x):
        places = torch.arange(x.shape[-2]).expand(3, 1, -1)
        angles = self.inv_freq * places[..., None].float()
        first = angles[0].clone()
        for axis in (1, 2):
            first[..., axis:12:3] = angles[axis, ..., axis:12:3]
        return first[:, None]

    rotate = HalfSplit.rotate


class Assigned(Attention):
    rotary_dim = 16

    def rotate(self, x):
        angles = torch.cat([self.angles(x)] * 2, dim=-1)
        result = torch.empty_like(x)
        result[..., 16:] = x[..., 16:]
        result[..., :16] = x[..., :16] * angles.cos() + rotate_half(x[..., :16]) * angles.sin()
        return result


class InPlace(Attention):
    def rotate(self, x):
        angles = torch.cat([self.angles(x)] * 2, dim=-1)
        other = rotate_half(x) * angles.sin()
        x = x * 1.0
        x *= angles.cos()
        x += other
        return x


class BeforeTranspose(Attention):
    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, DIM) for f in (self.q, self.k, self.v))
        angles = torch.cat([self.angles(x)] * 2, dim=-1)[None, :, None]
        q, k = (t * angles.cos() + rotate_half(t) * angles.sin() for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q.unflatten(1, (KV_HEADS, -1)) @ k.unsqueeze(2).transpose(-1, -2) / DIM**0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


class Normalised(HalfSplit):
    """Keys are scaled after their rotation, by a number of their own and by a weight for each channel."""

    def prepare(self):
        self.weight = nn.Parameter(torch.rand(DIM // 2).repeat(2) + 0.5)

    def rotate(self, x):
        x = super().rotate(x)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Biased(Attention):
    """Keys are a sum before their rotation."""

    def prepare(self):
        self.bias = nn.Parameter(torch.rand(DIM))

    def rotate(self, x):
        return HalfSplit.rotate(self, (x - x.mean(-1, keepdim=True)) + self.bias)


class Permuted(Attention):
    """Pairs of its own: ``d`` with ``D - 1 - d``, by reading backwards."""

    def rotate(self, x):
        cos, sin = self.angles(x).cos(), self.angles(x).sin()
        a = x[..., : DIM // 2]
        b = torch.stack([x[..., DIM - 1 - i] for i in range(DIM // 2)], dim=-1)
        low, high = a * cos - b * sin, b * cos + a * sin
        back = torch.stack([high[..., DIM // 2 - 1 - i] for i in range(DIM // 2)], dim=-1)
        return torch.cat([low, back], dim=-1)


SPELLINGS = {
    HalfSplit: HALF,
    Chunked: HALF,
    Scaled: HALF,
    Stacked: ADJACENT,
    Unbound: ADJACENT,
    Polar: ADJACENT,
    ComplexTable: ADJACENT,
    Tables: HALF,
    GatheredTable: ADJACENT,
    Partial: [(i, i + 4) for i in range(4)],
    LastChannels: [(16 + i, 24 + i) for i in range(8)],
    Computed: HALF,
    Wavelengths: HALF,
    ColumnTimesRow: HALF,
    Shuffled: HALF,
    Axes: HALF,
    InterleavedAxes: HALF,
    Assigned: [(i, i + 8) for i in range(8)],
    InPlace: HALF,
    BeforeTranspose: HALF,
    Normalised: HALF,
    Biased: HALF,
    Permuted: [(i, DIM - 1 - i) for i in range(DIM // 2)],
}


def same_rows():
    return torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1)).repeat(1, LENGTH, 1)


def observed(model, *args, dynamic=False):
    torch._dynamo.reset()
    observer = Observer()
    with torch.no_grad():
        torch.compile(model, backend=observer, dynamic=dynamic)(*args)
    (found,) = observer.found
    return found


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pairs_are_read_and_turn_by_ascending_frequencies(spelling, dynamic):
    found = observed(spelling().eval(), same_rows(), dynamic=dynamic)
    assert isinstance(found.rotary, Rotary), found.rotary
    assert sorted(found.rotary.pairs) == SPELLINGS[spelling]
    assert set(found.rotary.unrotated) == set(range(DIM)) - {c for pair in SPELLINGS[spelling] for c in pair}
    assert not found.rotary.order  # by their values
    angles = measured(found.keys, found.rotary)
    assert len(angles) == len(SPELLINGS[spelling])
    assert all(low <= high + 1e-6 for low, high in pairwise(angles))
    assert angles[0] < angles[-1]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_exported_graphs_give_the_same_pairs(spelling):
    model = spelling().eval()
    expected = observed(model, same_rows()).rotary
    program = torch.export.export(model, (same_rows(),))
    values = _held_values(program)
    found = []
    for known in (values, {}):
        nodes = {node: known[node.name] for node in program.graph.nodes if node.name in known}
        (view, *_) = all_graphs(program.graph_module, HeldTensors({}, looked_at=nodes))
        layouts = Layouts(view.facts)
        (site,) = find_sites(view.facts, layouts)
        found.append(RotaryReader(layouts).read(site, DIM))
    with_values, without = found
    assert with_values == expected
    assert isinstance(without, Rotary), without
    assert sorted(without.pairs) == sorted(expected.pairs)
    assert without.order or spelling in (Computed, Wavelengths)  # these have no buffer
    assert (without.pairs == expected.pairs) is (spelling is not Shuffled)


def chosen(rotary, dims=16):
    return from_rotary(rotary, DIM, SparseAttentionConfig(scorer="tokens", score_dims=dims))


def test_the_channels_are_those_that_turn_the_least():
    found = observed(HalfSplit().eval(), same_rows())
    (channels,) = chosen(found.rotary).sets
    assert channels == (*range(8, 16), *range(24, 32))
    assert chosen(found.rotary).origin == "lowest rotary frequencies, half-split"
    row = found.keys[0].double()
    turn = torch.complex(row[..., :16], row[..., 16:])
    angle = (turn[:, 1] / turn[:, 0]).angle().abs()[0]
    assert sorted(angle.argsort()[:8].tolist()) == list(range(8, 16))


def test_channels_without_rotation_come_first():
    found = observed(Partial().eval(), same_rows()).rotary
    assert chosen(found).sets == (tuple(range(8, 24)),)
    assert chosen(found).origin == "channels without rotation"
    found = observed(LastChannels().eval(), same_rows()).rotary
    assert chosen(found).sets == (tuple(range(16)),)
    assert chosen(found, 32).origin == "all channels"
    few = Rotary(tuple(range(4)), tuple((4 + i, 18 + i) for i in reversed(range(14))), "half-split", "")
    assert chosen(few).sets == ((0, 1, 2, 3, *range(12, 18), *range(26, 32)),)
    assert chosen(few).origin == "4 channels without rotation, then lowest rotary frequencies, half-split"


class Given(nn.Module):
    """Sines and cosines are inputs of the graph: their values are nobody's to know."""

    def forward(self, q, k, v, cos, sin):
        k = k * cos + rotate_half(k) * sin
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_frequencies_of_unknown_value_fall_with_their_index_and_the_report_says_so():
    q, k, v = (torch.randn(1, HEADS, LENGTH, DIM) for _ in range(3))
    angles = torch.outer(torch.arange(LENGTH).float(), frequencies(DIM // 2)).repeat(1, 2)
    found = observed(Given(), q, k, v, angles.cos(), angles.sin()).rotary
    assert found.pairs == tuple(reversed(HALF))
    assert chosen(found).origin == (
        "lowest rotary frequencies, half-split, taken to fall with their index, as their values are not known"
    )


class StaticCache(HalfSplit):
    def forward(self, x, keys, values, position):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        k = self.rotate(k)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        seen = torch.arange(keys.shape[2])[None, :] <= position[:, None]
        return F.scaled_dot_product_attention(self.rotate(q), keys, values, attn_mask=seen, enable_gqa=True)


class AssignedCache(StaticCache):
    def forward(self, x, keys, values, position):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        k = self.rotate(k)
        keys[:, :, position] = k
        values[:, :, position] = v
        seen = torch.arange(keys.shape[2])[None, :] <= position[:, None]
        return F.scaled_dot_product_attention(self.rotate(q), keys, values, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("model", [StaticCache, AssignedCache], ids=lambda each: each.__name__)
@pytest.mark.parametrize("tokens", [1, 8])
def test_keys_of_a_static_cache_turn_as_those_that_are_written_to_it(model, tokens):
    caches = [torch.zeros(1, KV_HEADS, 64, DIM) for _ in range(2)]
    found = observed(model().eval(), same_rows()[:, :tokens], *caches, torch.arange(tokens)).rotary
    assert isinstance(found, Rotary), found
    assert found.pairs == tuple(reversed(HALF))


class GrowingCache(HalfSplit):
    def forward(self, x, keys, values):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        keys, values = torch.cat([keys, self.rotate(k)], dim=2), torch.cat([values, v], dim=2)
        return F.scaled_dot_product_attention(self.rotate(q), keys, values, enable_gqa=True), keys, values


def test_keys_of_a_growing_cache_turn_as_those_that_are_appended():
    past = [torch.zeros(1, KV_HEADS, 10, DIM) for _ in range(2)]
    found = observed(GrowingCache().eval(), same_rows()[:, :1], *past).rotary
    assert isinstance(found, Rotary), found
    assert found.pairs == tuple(reversed(HALF))


class NormalisedFirst(nn.Module):
    """Keys have a weight for each channel before their rotation, by sines and cosines that are inputs."""

    def forward(self, q, k, v, weight, cos, sin):
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True)) * weight
        k = k * cos + rotate_half(k) * sin
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_what_scales_keys_before_their_rotation_is_told_from_what_turns_them():
    q, k, v = (torch.randn(1, HEADS, LENGTH, DIM) for _ in range(3))
    angles = torch.outer(torch.arange(LENGTH).float(), frequencies(DIM // 2)).repeat(1, 2)
    found = observed(NormalisedFirst(), q, k, v, torch.rand(DIM), angles.cos(), angles.sin()).rotary
    assert isinstance(found, Rotary), found
    assert found.pairs == tuple(reversed(HALF))


class Checkpointed(nn.Module):
    """The layer is a nested graph; sines and cosines are made outside of it."""

    def __init__(self):
        super().__init__()
        self.layer = HalfSplit()

    def forward(self, x):
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.layer.inv_freq).repeat(1, 2)

        def body(x, cos, sin):
            q, k, v = (
                f(x).view(1, x.shape[1], -1, DIM).transpose(1, 2) for f in (self.layer.q, self.layer.k, self.layer.v)
            )
            q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return checkpoint(body, x, angles.cos(), angles.sin(), use_reentrant=False)


def test_sines_of_the_graph_around_a_nested_one_are_followed():
    torch._dynamo.reset()
    observer = Observer()
    torch.compile(Checkpointed(), backend=observer)(same_rows().requires_grad_())
    (found,) = observer.found
    assert isinstance(found.rotary, Rotary), found.rotary
    assert found.rotary.pairs == tuple(reversed(HALF))
    assert not found.rotary.order


class Plain(Attention):
    def rotate(self, x):
        return x


class Reflected(Attention):
    """Mixes pairs, and turns nothing: a reflection."""

    def rotate(self, x):
        cos, sin = self.angles(x).cos(), self.angles(x).sin()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, a * sin - b * cos], dim=-1)


class Chained(Attention):
    """Every channel is mixed with its neighbour: no pairs."""

    def rotate(self, x):
        angles = torch.cat([self.angles(x)] * 2, dim=-1)
        neighbours = torch.cat([x[..., 1:], x[..., :1]], dim=-1)
        return x * angles.cos() + neighbours * angles.sin()


class OwnAngles(Attention):
    """The two channels of a pair turn by different angles."""

    def rotate(self, x):
        angles = self.angles(x)
        a, b = x.chunk(2, dim=-1)
        other = angles * 2.0
        return torch.cat([a * angles.cos() - b * angles.sin(), b * other.cos() + a * other.sin()], dim=-1)


class Shifted(Attention):
    """A token is mixed with the one before it: what is rotated is not one token's key."""

    def rotate(self, x):
        return x + F.pad(x[..., :-1, :], (0, 0, 1, 0)) * 0.5


class HiddenRotation(Attention):
    """Half of the channels are turned by an operator that is not followed."""

    def rotate(self, x):
        angles = torch.cat([self.angles(x)[..., :8]] * 2, dim=-1)
        known, hidden = x[..., :16], x[..., 16:]
        matrix = torch.stack([angles.cos(), angles.sin()], dim=-1).mean(-1)
        known = known * angles.cos() + rotate_half(known) * angles.sin()
        return torch.cat([known, torch.addcmul(hidden, hidden, matrix)], dim=-1)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Plain, "no rotary embedding found"),
        (Shifted, "no rotary embedding found"),
        (Reflected, "its keys mix channels in pairs that are no rotation"),
        (OwnAngles, "its keys mix channels in pairs that are no rotation"),
        (Chained, "its keys mix channels otherwise than in pairs"),
        (HiddenRotation, "some channels are made of positions in a way that is not followed"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_no_rotation_is_not_taken_for_one(model, why):
    found = observed(model().eval(), same_rows()).rotary
    assert found == why
    picked = chosen(found)
    assert picked.sets == (tuple(range(DIM)),)
    assert picked.origin == f"{why}: all channels are read; calibrate to use fewer"


def test_layers_of_one_form_are_read_once_and_others_for_themselves():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([HalfSplit(), HalfSplit(), Shuffled(), Stacked()])

        def forward(self, x):
            return [layer(x) for layer in self.layers]

    torch._dynamo.reset()
    observer = Observer()
    reads = []
    original = RotaryReader._read

    def counted(self, site, head_dim):
        reads.append(site.key_heads.node)
        return original(self, site, head_dim)

    RotaryReader._read = counted
    try:
        with torch.no_grad():
            torch.compile(Layers().eval(), backend=observer)(same_rows())
    finally:
        RotaryReader._read = original
    first, second, third, fourth = (found.rotary for found in observer.found)
    assert len(reads) == 3
    assert first == second
    assert third.pairs != first.pairs
    assert sorted(third.pairs) == sorted(first.pairs)
    assert fourth.pairing == "interleaved"
