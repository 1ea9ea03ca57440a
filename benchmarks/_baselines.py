"""Dense attention, and sparse attention by FlexAttention, that the kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _gpu import milliseconds
from _stages import Selection
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

FLEX_QUERIES = 128
"""Queries that share a list of blocks in FlexAttention."""

Call = Callable[[], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> tuple[Call, str]:
    """Causal attention by one of PyTorch's fused kernels.

    Where the kernel does not take fewer key/value heads than query heads, they are repeated beforehand.

    Returns:
        The call, and which kernel it runs: `sdpa_kernel` admits no other.

    Raises:
        RuntimeError: the kernel does not take these tensors.
    """
    group = q.shape[1] // k.shape[1]
    name = backend.name.lower().removesuffix("_attention")

    def fixed(keys: Tensor, values: Tensor, gqa: bool) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=gqa)

        call()
        return call

    try:
        return fixed(k, v, group > 1), name
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if group == 1:
            raise
    k, v = (x.detach().repeat_interleave(group, 1) for x in (k, v))
    return fixed(k, v, False), f"{name}, KV heads repeated"


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Call, str]:
    """cuDNN's causal attention; the flash kernel where cuDNN does not take the sizes."""
    try:
        return sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return sdpa(q, k, v, SDPBackend.FLASH_ATTENTION)


def dense_gradient(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> tuple[Callable[[], object], str]:
    """The backward pass of causal attention by one of PyTorch's fused kernels, for a fixed output gradient."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    try:
        return _gradient(q, k, v, backend)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if group == 1:
            raise
    k, v = (x.detach().repeat_interleave(group, 1).requires_grad_() for x in (k, v))
    call, name = _gradient(q, k, v, backend)
    return call, f"{name}, KV heads repeated"


def _gradient(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> tuple[Callable[[], object], str]:
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    grad = torch.randn_like(out)

    def call() -> object:
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    call()
    return call, backend.name.lower().removesuffix("_attention")


def flex_ms(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> float:
    """Time of compiled FlexAttention in ms."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = k.shape[1] != q.shape[1]
    return milliseconds(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=gqa), q.device)


def causal_mask(length: int, device: torch.device) -> BlockMask:
    """The causal mask, built without a mask of single elements."""
    count = -(-length // FLEX_QUERIES)
    tile = torch.arange(count, dtype=torch.int32, device=device)
    diagonal = torch.zeros(1, 1, count, count, dtype=torch.int32, device=device)
    diagonal[0, 0, :, 0] = tile
    return BlockMask.from_kv_blocks(
        torch.ones(1, 1, count, dtype=torch.int32, device=device),
        diagonal,
        tile[None, None],
        tile.expand(1, 1, count, count).contiguous(),
        BLOCK_SIZE=FLEX_QUERIES,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(length, length),
    )


def chosen_blocks(selection: Selection, length: int, blocks: int) -> Tensor:
    """The selection of one unpadded sequence as a set, bool ``[Hkv, length, blocks]``."""
    lists, tokens = selection.lists, selection.plan.shape.tokens
    tiles, heads, capacity = lists.blocks.shape
    there = torch.arange(capacity, device=lists.blocks.device) < lists.counts[..., None]  # [tiles, Hkv, capacity]
    index = torch.where(there, lists.blocks.long() & 0xFFFF, blocks)  # what is no entry goes to a spare column
    chosen = torch.zeros(tiles, tokens, heads, blocks + 1, dtype=torch.bool, device=index.device)
    for token in range(tokens):
        hit = there & (lists.tokens >> token & 1).bool()
        chosen[:, token].scatter_(2, torch.where(hit, index, blocks), hit)
    return chosen[..., :blocks].reshape(tiles * tokens, heads, blocks)[:length].transpose(0, 1).contiguous()


def blocks_mask(chosen: Tensor, group: int, block_size: int) -> BlockMask:
    """The mask of a selection: lists of blocks for every 128 queries, and the exact choice within them.

    Args:
        chosen: bool ``[Hkv, length, n_blocks]``, the length a multiple of 128.
        group: query heads of a key/value head.
        block_size: keys of a block.
    """
    heads, length, blocks = chosen.shape
    tiles = chosen.view(heads, -1, FLEX_QUERIES, blocks)
    first = FLEX_QUERIES * torch.arange(tiles.shape[1], device=chosen.device)
    past = block_size * torch.arange(1, blocks + 1, device=chosen.device) <= first[:, None] + 1  # [tiles, blocks]
    full = tiles.all(2) & past
    partial = tiles.any(2) & ~full

    def listed(entries: Tensor) -> tuple[Tensor, Tensor]:
        wide = entries.repeat_interleave(group, 0)[None]  # [1, Hq, tiles, blocks]
        order = torch.argsort(~wide, dim=-1, stable=True).to(torch.int32)
        return wide.sum(-1, dtype=torch.int32), order.contiguous()

    def visits(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return chosen[head // group, query, key // block_size] & (query >= key)

    return BlockMask.from_kv_blocks(
        *listed(partial),
        *listed(full),
        BLOCK_SIZE=(FLEX_QUERIES, block_size),
        mask_mod=visits,
        seq_lengths=(length, length),
    )
