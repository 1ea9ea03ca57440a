"""Transformers as small repositories write them: after nanoGPT, gpt-fast and llama2.c, in code of this project."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shrink import VOCABULARY
from .specimens import Batch, Specimen, roughen

_WIDTH, _HEADS, _KV_HEADS, _LAYERS, _LONGEST = 64, 4, 2, 2, 128
_DIM = _WIDTH // _HEADS


class _FusedProjections(nn.Module):
    """nanoGPT's attention: one projection for q, k and v; fused, or by hand with a triangle of ones."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("ones", torch.ones(_LONGEST, _LONGEST).tril().view(1, 1, _LONGEST, _LONGEST))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, _HEADS, _DIM).transpose(1, 2) for part in self.qkv(x).split(_WIDTH, dim=2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.ones[:, :, :length, :length] == 0, float("-inf"))
            y = self.dropout(F.softmax(scores, dim=-1)) @ v
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class _CachedKeys(nn.Module):
    """gpt-fast's attention: rows of a boolean buffer picked by position, heads repeated, keys kept if asked for."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        self.qkv = nn.Linear(_WIDTH, _WIDTH + 2 * _KV_HEADS * _DIM, bias=False)
        self.out = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.register_buffer("mask", torch.ones(_LONGEST, _LONGEST, dtype=torch.bool).tril())
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, _KV_HEADS, _LONGEST, _DIM))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        positions = torch.arange(length, device=x.device)
        q, k, v = self.qkv(x).split([_WIDTH, _KV_HEADS * _DIM, _KV_HEADS * _DIM], dim=-1)
        q = q.view(batch, length, _HEADS, _DIM).transpose(1, 2)
        k, v = (part.view(batch, length, _KV_HEADS, _DIM).transpose(1, 2) for part in (k, v))
        mask = self.mask[None, None, positions]
        if self.cached:
            keys, values = self.keys.clone(), self.values.clone()
            keys[:, :, positions], values[:, :, positions] = k, v
            k, v = keys, values
        else:
            mask = mask[..., :length]
        k, v = (part.repeat_interleave(_HEADS // _KV_HEADS, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class _AddedTriangle(nn.Module):
    """llama2.c's attention: rotated halves, heads repeated by expand, a buffer of -inf added above the diagonal."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.k = nn.Linear(_WIDTH, _KV_HEADS * _DIM, bias=False)
        self.v = nn.Linear(_WIDTH, _KV_HEADS * _DIM, bias=False)
        self.out = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.register_buffer("mask", torch.full((1, 1, _LONGEST, _LONGEST), float("-inf")).triu(diagonal=1))
        angles = torch.outer(torch.arange(_LONGEST).float(), 1e4 ** (-torch.arange(0, _DIM, 2) / _DIM))
        self.register_buffer("cos", angles.cos()[None, :, None])
        self.register_buffer("sin", angles.sin()[None, :, None])

    def rotate(self, x: Tensor) -> Tensor:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.rotate(self.q(x).view(batch, length, _HEADS, _DIM))
        k = self.rotate(self.k(x).view(batch, length, _KV_HEADS, _DIM))
        v = self.v(x).view(batch, length, _KV_HEADS, _DIM)
        k, v = (
            part[:, :, :, None].expand(-1, -1, -1, _HEADS // _KV_HEADS, -1).reshape(batch, length, _HEADS, _DIM)
            for part in (k, v)
        )
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        else:
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(_DIM) + self.mask[:, :, :length, :length]
            y = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, -1))


class _Model(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, _WIDTH)
        self.place = nn.Embedding(_LONGEST, _WIDTH)
        self.attention = nn.ModuleList(attention() for _ in range(_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(2 * _LAYERS))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))
            for _ in range(_LAYERS)
        )
        self.head = nn.Linear(_WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for layer, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * layer](x))
            x = x + self.feed[layer](self.norms[2 * layer + 1](x))
        return self.head(x)


_STYLES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "nanoGPT style": {
        "fused": partial(_FusedProjections, fused=True),
        "by hand": partial(_FusedProjections, fused=False),
    },
    "gpt-fast style": {
        "own keys": partial(_CachedKeys, cached=False),
        "cached keys": partial(_CachedKeys, cached=True),
    },
    "llama2.c style": {
        "fused": partial(_AddedTriangle, fused=True),
        "by hand": partial(_AddedTriangle, fused=False),
    },
}


def architectures() -> list[str]:
    """The styles."""
    return sorted(_STYLES)


def specimens(architecture: str) -> Iterator[Specimen]:
    """The ways in which a style computes attention."""
    for implementation in _STYLES[architecture]:
        yield specimen(architecture, implementation)


def specimen(architecture: str, implementation: str) -> Specimen:
    """One specimen."""
    attention = _STYLES[architecture][implementation]
    return Specimen(architecture, implementation, lambda: roughen(_Model(attention), torch.float64), _call)


def _call(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.ids)
