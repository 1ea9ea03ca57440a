"""Proofs about masks as tensors again, to compare them with the masks themselves."""

from __future__ import annotations

import sympy
import torch

from infllm_pass.masks import KeyCondition, MaskPredicate
from infllm_pass.masks.emission import Site, build


def call(target, *args, **kwargs):
    """Calls a function, or a tensor method for a name."""
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def key_mask(condition: KeyCondition, tensors, batch: int, length: int, sizes=None) -> torch.Tensor:
    """A key condition as ``[B, Lk]``; `tensors` gives the real tensor of each leaf's node, `sizes` of each symbol."""
    leaves = {name: tensors[node] for name, _, node in condition.leaves}

    def size(symbol):
        return leaves[symbol.name] if symbol.name in leaves else sizes[symbol]

    site = Site(call, lambda name: (leaves[name], leaves[name].shape), size, batch, length, torch.device("cpu"))
    return torch.as_tensor(build(condition.expression, site)).expand(batch, length)


def mask_of(proof: MaskPredicate, tensors, shape, sizes=None) -> torch.Tensor:
    """What a proof says a mask is, bool ``[B, 1, Lq, Lk]``."""
    batch, length_q, length_k = shape
    query, key = torch.arange(length_q)[:, None], torch.arange(length_k)[None, :]
    mask = torch.ones(batch, 1, length_q, length_k, dtype=torch.bool)
    values = {symbol: value for symbol, value in (sizes or {}).items()}

    def number(expr):
        return int(sympy.sympify(expr).xreplace(values))

    if proof.causal_offset is not None:
        limit = query + number(proof.causal_offset)
        mask &= key <= limit
        if proof.window is not None:
            mask &= key > limit - number(proof.window)
    for condition in proof.key_conditions:
        mask &= key_mask(condition, tensors, batch, length_k, sizes)[:, None, None, :]
    if proof.segments is not None:
        ids = tensors[proof.segments.node]
        ids = ids.reshape(-1, ids.shape[-1]).expand(batch, -1)
        runs = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], 1).cumsum(1)
        place = (query[:, 0] + number(proof.segments.offset)).clamp(0, ids.shape[1] - 1)
        mask &= (runs[:, place][:, :, None] == runs[:, None, :length_k])[:, None]
    return mask
