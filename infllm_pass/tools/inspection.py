"""Captures q, k, v and the selection of one attention site, and measures the attention its blocks hold.

The model runs uncompiled, on the graph that the pass rewrote, and only as far as the site that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infllm_pass.compat.tensors import TorchDispatchMode
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import NoAttentionSiteError, UnsupportedModelError
from infllm_pass.frontend.backend import SwitchableBackend
from infllm_pass.frontend.compile_settings import compile_with, settings_of
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops.attention_args import ATTEND, AttentionCall
from infllm_pass.rewrite.pipeline import SitePolicy

CHUNK_ELEMENTS = 1 << 24
"""Scores held at once by `attention_mass`: 64 MB in float32."""


@dataclass(frozen=True)
class AttentionInputs:
    """What one sparse attention site computed with.

    Attributes:
        q: queries after position encoding, ``[B, Hq, Lq, D]``; query ``i`` has key index ``Lk - Lq + i``.
        k: keys, ``[B, Hkv, Lk, D]``.
        v: values, ``[B, Hkv, Lk, Dv]``.
        blocks: blocks that every query visits, int32 ``[B, Hkv, Lq, S]``, in no particular order and -1 in
            unused places; numbered from the first valid key of each row.
        key_mask: bool ``[B, Lk]``, True where a key is valid; None: all are.
        scale: softmax scale.
        config: the configuration that the blocks were selected with.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    key_mask: Tensor | None
    scale: float
    config: SparseAttentionConfig


class _Reached(Exception):
    """Ends a run of the model at the wanted site; never leaves this module."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments


class _StopAtSite(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts sparse calls of ``infllm::block_attention`` and ends the run at one of them."""

    def __init__(self, wanted: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted = wanted
        self.passed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.infllm.block_attention.default and args[3]:
            if self.passed == self.wanted:
                raise _Reached(args)
            self.passed += 1
        return func(*args, **(kwargs or {}))


def attention_inputs(
    model: Callable[..., Any],
    site_number: int,
    *example_inputs: Any,
    config: SparseAttentionConfig | None = None,
    **example_kwargs: Any,
) -> AttentionInputs:
    """Run a model up to one sparse attention site and return what the site computes with.

    Args:
        model: a module or function, plain or compiled; it is not changed, and runs without gradients.
        site_number: which call of sparse attention, counted from 0 in the order they run: the layer of a
            decoder that is sparse throughout.
        example_inputs: positional inputs, long enough for ``config.dense_len``.
        config: what is selected; None: the defaults.
        example_kwargs: keyword inputs.

    Raises:
        NoAttentionSiteError: the model ran fewer sparse attention calls.
        UnsupportedModelError: `model` cannot be sparsified, or the site has a sliding window, packed sequences, or
            queries that are not the last of the keys, which `AttentionInputs` does not tell.
    """
    chosen = SparseAttentionConfig.coerce(config)
    stop = _StopAtSite(site_number)

    def run_observed(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        def observed(*args: Any) -> Any:
            with stop:
                return module.forward(*args)

        return observed

    original, settings = settings_of(model)
    run = compile_with(original, SwitchableBackend(run_observed, SitePolicy(chosen)), settings)
    try:
        with torch.no_grad():
            run(*example_inputs, **example_kwargs)
    except _Reached as reached:
        (q, k, v, (blocks,)), call = ATTEND.read(reached.arguments)
        _check_site(site_number, call, usual=k.shape[2] - q.shape[2])
        return AttentionInputs(q, k, v, blocks, call.key_mask, call.scale, chosen)
    raise NoAttentionSiteError(
        f"site {site_number} was asked for, but the model made {stop.passed} sparse attention calls: check "
        f"infllm_pass.explain(...), and that the input has at least dense_len={chosen.dense_len} tokens"
    )


def _check_site(site_number: int, call: AttentionCall, *, usual: int) -> None:
    """Refuse a site of more than whole rows that end with the last query, and products of queries and keys."""
    found = {
        "an offset": call.offsets is not None or call.offset not in (None, usual),
        "packed sequences": call.cu_seqlens_q is not None or call.cu_seqlens_k is not None,
        "a sliding window": call.window is not None,
        "a soft cap": call.softcap != 0.0,
        "a key bias": call.key_bias is not None,
        "sinks": call.sinks is not None,
    }
    if any(found.values()):
        names = " and ".join(name for name, there in found.items() if there)
        raise UnsupportedModelError(
            f"site {site_number} has {names}: choose a site whose queries are the last of whole rows of keys, with "
            "scores that are products of both"
        )


def recent_blocks(geometry: BlockGeometry, length_q: int, length_k: int) -> Tensor:
    """The selection that spends the whole budget on the initial and the most recent blocks.

    Args:
        geometry: the block geometry; only its budget, block size and initial blocks count.
        length_q: queries, the last of the keys.
        length_k: keys.

    Returns:
        int32 ``[Lq, S]``, -1 in unused places.
    """
    own = torch.arange(length_k - length_q, length_k) // geometry.block_size  # [Lq]
    first = torch.arange(geometry.init_blocks).expand(length_q, -1)
    last = own[:, None] - torch.arange(geometry.selected_blocks - geometry.init_blocks)
    initial = torch.where(first <= own[:, None], first, -1)
    return torch.cat([initial, torch.where(last >= geometry.init_blocks, last, -1)], 1).int()


def attention_mass(
    q: Tensor,
    k: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The part of each query's dense attention that falls on the blocks it visits.

    Queries run in chunks; memory is O(chunk x Lk).

    Args:
        q: ``[B, Hq, Lq, D]``; the queries are the last of the keys.
        k: ``[B, Hkv, Lk, D]``.
        blocks: int32 ``[B, Hkv, Lq, S]``, -1 in unused places; numbered from a row's first valid key.
        block_size: tokens in a block.
        scale: softmax scale.
        key_mask: bool ``[B, Lk]``, True where a key is valid; None: all are.

    Returns:
        Between 0 and 1, float32 ``[B, Hkv, Lq]``: the mean over the query heads of each key/value head. 0 for
        a query that sees no key.
    """
    batch, _, length_q, _ = q.shape
    heads, length_k = k.shape[1], k.shape[2]
    mass = q.new_zeros(batch, heads, length_q, dtype=torch.float32)
    index = torch.arange(length_k, device=q.device)
    count = -(-length_k // block_size)
    chunk = max(1, CHUNK_ELEMENTS // (q.shape[1] * length_k))
    for row in range(batch):
        valid = torch.ones_like(index, dtype=torch.bool) if key_mask is None else key_mask[row]
        start = int(valid.int().argmax())
        block_of = ((index - start) // block_size).clamp(min=0)  # [Lk]
        keys = k[row].float()
        for begin in range(0, length_q, chunk):
            part = slice(begin, begin + chunk)
            queries = q[row, :, part].float().reshape(heads, q.shape[1] // heads, -1, q.shape[3])  # [Hkv, G, n, D]
            seen = valid & (index <= (index[length_k - length_q :][part])[:, None])  # [n, Lk]
            scores = scale * queries @ keys[:, None].mT  # [Hkv, G, n, Lk]
            weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1).mean(1).nan_to_num_()  # [Hkv, n, Lk]
            chosen = blocks[row, :, part].long()  # [Hkv, n, S]
            visited = weights.new_zeros(*chosen.shape[:2], count + 1)
            visited.scatter_(-1, torch.where(chosen < 0, count, chosen), 1.0)
            mass[row, :, part] = (weights * visited[..., block_of]).sum(-1)
    return mass
