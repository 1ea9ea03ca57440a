"""Attention of random shapes in which most sizes are one, in many spellings, against the float64 oracle.

Run by hand: ``python -m tests.support.shape_fuzz COUNT``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels import reference
from tests.support.cache_support import CONFIG
from tests.support.common import relative_error

HIDDEN, CAPACITY = 12, 64
BOUND = 1e-11


@dataclass(frozen=True)
class Shape:
    """One attention.

    Attributes:
        spelling: a key of `SPELLINGS`.
        cache: "none", "dynamic" or "static".
        token_first: whether keys and values lie as ``[B, L, H, D]``.
        masked: whether a mask is written where one could be left out.
        batch: rows.
        kv_heads: heads of keys and values.
        group: query heads for each of them.
        queries: tokens of a call.
        past: keys before the first call's.
        dim: of a head.
    """

    spelling: str
    cache: str
    token_first: bool
    masked: bool
    batch: int
    kv_heads: int
    group: int
    queries: int
    past: int
    dim: int

    @classmethod
    def drawn(cls, rng: random.Random) -> Shape:
        """A random one, of sizes that its spelling can have."""

        def size(*others: int) -> int:
            return rng.choice([1, 1, *others])

        cache = rng.choice(["none", "dynamic", "dynamic", "static"])
        queries = size(3, 7)
        if cache == "none":
            queries = size(45, 57, 64)
        shape = cls(
            spelling=rng.choice(list(SPELLINGS)),
            cache=cache,
            token_first=rng.random() < 0.5,
            masked=rng.random() < 0.5,
            batch=size(2, 3),
            kv_heads=size(2, 3),
            group=size(2, 3),
            queries=queries,
            past=rng.choice([1, 3, 45, 50]),
            dim=rng.choice([8, 8, 4, 1]),
        )
        shape = replace(shape, **_NEEDS.get(shape.spelling, {}))
        shape = replace(shape, past=0 if shape.cache == "none" else shape.past)
        # the view of scores of one key has lost their dimension, and nothing could be chosen there
        return replace(shape, queries=3) if shape.spelling == "reshaped" and shape.keys == 1 else shape

    @property
    def keys(self) -> int:
        """Keys after the first call."""
        return self.past + self.queries


def repeated(x: Tensor, group: int) -> Tensor:
    """Heads of keys or values as many times as there are query heads, as transformers' ``repeat_kv``."""
    if group == 1:
        return x
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, group, length, dim).reshape(batch, heads * group, length, dim)


def softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k, group), repeated(v, group), mask)


def sdpa_expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """One KV head for all query heads, by expand."""
    return F.scaled_dot_product_attention(q, *(x.expand(-1, q.shape[1], -1, -1) for x in (k, v)), mask)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def sdpa_flag(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group != 1)


def sdpa_3d(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    merged = (x.flatten(0, 1) for x in (q, repeated(k, group), repeated(v, group)))
    return F.scaled_dot_product_attention(*merged, mask).unflatten(0, q.shape[:2])


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    k, v = repeated(k, group), repeated(v, group)
    return softmax(q @ k.mT * q.shape[-1] ** -0.5, mask) @ v


def broadcast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """One KV head for all query heads, by broadcasting."""
    return softmax(q @ k.mT * q.shape[-1] ** -0.5, mask) @ v


def bmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, repeated(k, group), repeated(v, group)))
    return torch.bmm(softmax(torch.bmm(q3, k3.mT) * q.shape[-1] ** -0.5, mask), v3).view(*q.shape[:3], -1)


def reshaped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, repeated(k, group), repeated(v, group)))
    scores = torch.bmm(q3, k3.mT).view(*q.shape[:3], k.shape[2]) * q.shape[-1] ** -0.5
    weights = softmax(scores, mask)
    return torch.bmm(weights.view(-1, *weights.shape[2:]), v3).view(*q.shape[:3], -1)


def einsum_blhd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, repeated(k, group), repeated(v, group)))
    weights = softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, mask)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    q5 = q.unflatten(1, (-1, group))
    weights = softmax(torch.einsum("bkgqd,bksd->bkgqs", q5, k) * q.shape[-1] ** -0.5, mask)
    return torch.einsum("bkgqs,bksd->bkgqd", weights, v).flatten(1, 2)


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    q5 = q.unflatten(1, (-1, group))
    return (softmax(q5 @ k[:, :, None].mT * q.shape[-1] ** -0.5, mask) @ v[:, :, None]).flatten(1, 2)


def grouped_blhd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    q5 = q.transpose(1, 2).unflatten(2, (-1, group))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    weights = softmax(torch.einsum("bqkgd,bskd->bkgqs", q5, k) * q.shape[-1] ** -0.5, mask)
    return torch.einsum("bkgqs,bskd->bqkgd", weights, v).flatten(2, 3).transpose(1, 2)


def group_as_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """One token: the members of a group in the place of the queries, as in decoding kernels."""
    q4 = q.view(q.shape[0], k.shape[1], group, q.shape[-1])
    return (softmax(q4 @ k.mT * q.shape[-1] ** -0.5, mask) @ v).view(q.shape[0], -1, 1, v.shape[-1])


def one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """One token, without a dimension for queries."""
    scores = torch.einsum("bhd,bhkd->bhk", q[:, :, 0], repeated(k, group)) * q.shape[-1] ** -0.5
    weights = softmax(scores, None if mask is None else mask[0])
    return torch.einsum("bhk,bhkd->bhd", weights, repeated(v, group))[:, :, None]


def one_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """One row, without a dimension for the batch."""
    q, k, v = (x[0] for x in (q, repeated(k, group), repeated(v, group)))
    return (softmax(q @ k.mT * q.shape[-1] ** -0.5, mask) @ v)[None]


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]] = {
    function.__name__: function
    for function in (
        *(sdpa, sdpa_expanded, sdpa_gqa, sdpa_flag, sdpa_3d, matmul, broadcast, bmm, reshaped, einsum_blhd),
        *(grouped, grouped_matmul, grouped_blhd, group_as_queries, one_token, one_row),
    )
}

_NEEDS: dict[str, dict[str, object]] = {
    "sdpa_expanded": {"kv_heads": 1},
    "sdpa_flag": {"cache": "none"},
    "broadcast": {"kv_heads": 1},
    "group_as_queries": {"queries": 1, "cache": "dynamic"},
    "one_token": {"queries": 1, "cache": "dynamic"},
    "one_row": {"batch": 1},
}


class Attention(nn.Module):
    """Projections around one attention, in float64: no ranking hangs on rounding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        heads = shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads
        self.weights = nn.ParameterList(torch.randn(HIDDEN, count, shape.dim).double() for count in heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, new keys and new values, ``[B, H, T, D]``."""
        q, k, v = (torch.einsum("btc,chd->bhtd", x, weight) for weight in self.weights)
        return q, k, v

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """The output ``[B, H, T, Dv]``, and the keys and values of a dynamic cache in their layout."""
        q, *new = self.project(x)
        tokens, axis = x.shape[1], 1 if self.shape.token_first else 2
        if self.shape.token_first:
            new = [each.transpose(1, 2) for each in new]
        kept: list[Tensor] = []
        if self.shape.cache == "dynamic":
            kept = [torch.cat([old, each], axis) for old, each in zip(past, new, strict=True)]
            k, v = kept
        elif self.shape.cache == "static":
            *caches, position = past
            k, v = (
                cache.index_copy_(axis, position + torch.arange(tokens), each)
                for cache, each in zip(caches, new, strict=True)
            )
        else:
            k, v = new
        first = past[-1] if self.shape.cache == "static" else k.shape[axis] - tokens
        mask = torch.arange(k.shape[axis])[None] <= torch.arange(tokens)[:, None] + first
        plain = tokens == 1 and self.shape.cache != "static" and not self.shape.masked
        if self.shape.token_first:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return SPELLINGS[self.shape.spelling](q, k, v, None if plain else mask, self.shape.group), *kept


def examine(shape: Shape, config: SparseAttentionConfig, *, dynamic: bool | None) -> str:
    """Run two calls of an attention; what is wrong, "" if nothing is."""
    torch._dynamo.reset()
    module = Attention(shape)
    model = infllm_pass.sparsify(torch.compile(module, backend="eager", dynamic=dynamic), config)
    sizes = [shape.batch, shape.kv_heads, CAPACITY if shape.cache == "static" else shape.past, shape.dim]
    if shape.token_first:
        sizes[1:3] = sizes[2:0:-1]
    wrong: list[str] = []
    past = [] if shape.cache == "none" else [torch.randn(sizes).double() for _ in range(2)]
    for call in range(2):
        x = torch.randn(shape.batch, shape.queries, HIDDEN).double()
        used = shape.past + call * shape.queries if past else 0
        position = [torch.tensor(used)] if shape.cache == "static" else []
        given = [each.clone() for each in past]
        with torch.no_grad():
            q, *new = module.project(x)
            out, *kept = model(x, *given, *position)
        k, v = (_whole(shape, old, each, used) for old, each in zip(past, new, strict=True)) if past else new
        error = relative_error(out, _oracle(q, k, v, config))
        wrong += [] if error <= BOUND else [f"call {call} differs by {error:.1e}"]
        past = kept if shape.cache == "dynamic" else given
    sites = infllm_pass.report(model).sites
    dense = {str(site.reason) for site in sites if site.decision != "switchable"}
    wrong += [f"dense: {', '.join(sorted(dense))}"] if dense or not sites else []
    return "; ".join(wrong)


def _whole(shape: Shape, old: Tensor, new: Tensor, used: int) -> Tensor:
    """All keys or values ``[B, H, L, D]`` of a call."""
    old = old.transpose(1, 2) if shape.token_first else old
    return torch.cat([old[:, :, :used], new], 2)


def _oracle(q: Tensor, k: Tensor, v: Tensor, config: SparseAttentionConfig) -> Tensor:
    common = {"geometry": config.geometry_for(k.shape[-1]), "scale": q.shape[-1] ** -0.5, "dense_len": config.dense_len}
    common["offset"] = k.shape[2] - q.shape[2]
    selected = reference.select_blocks(q, k, **common) if k.shape[2] >= config.dense_len else None
    return reference.attention(q, k, v, selected, **common)[0]


def fuzz(count: int, seed: int = 0, **settings: object) -> Iterator[tuple[int, Shape, str]]:
    """What is wrong with random attentions, each with the number that makes it again.

    Args:
        count: how many are examined.
        seed: of the first.
        settings: fields of the configuration.
    """
    config = replace(CONFIG, **settings)
    for number in range(seed, seed + count):
        rng = random.Random(number)
        torch.manual_seed(number)
        shape = Shape.drawn(rng)
        wrong = examine(shape, config, dynamic=rng.choice([None, None, True]))
        if wrong:
            yield number, shape, wrong


if __name__ == "__main__":
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    found = list(fuzz(total))
    for number, shape, wrong in found:
        print(number, wrong, shape)
    print(f"{total} attentions, {len(found)} wrong")
