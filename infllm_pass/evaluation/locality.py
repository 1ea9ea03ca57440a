"""Locality of selections: the share of a query's blocks that the query before it visits too.

In decoding these blocks need not be fetched again where keys and values lie in slower memory (NOSA, arXiv 2510.13602).
Queries of a text that is read at once choose the blocks that they would choose as steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from infllm_pass.compat.tensors import TorchDispatchMode
from infllm_pass.evaluation.scoring import Scorer
from infllm_pass.frontend.api import with_compiler
from infllm_pass.kernels.cpu import prefill as torch_kernels
from infllm_pass.lowering.ops.attention_args import SELECT

CHUNK_STEPS = 1024
"""Queries whose sets are compared at once."""


@dataclass(frozen=True)
class KeptBlocks:
    """What the second half of a text keeps from query to query, at each site and key/value head.

    Attributes:
        means: mean share of a query's blocks that the one before visits too, one number a sparse site.
        least: the smallest share at each site.
    """

    means: tuple[float, ...]
    least: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over sites."""
        return sum(self.means) / len(self.means)


def shares_kept(blocks: Tensor, count: int) -> Tensor:
    """Share of each query's set that the query before has too.

    Args:
        blocks: int32 ``[B, Hkv, n, S]``, block numbers, -1 in unused places.
        count: blocks of the text.

    Returns:
        float64 ``[B, Hkv, n - 1]``.
    """
    parts = []
    for begin in range(0, blocks.shape[2] - 1, CHUNK_STEPS):
        some = blocks[:, :, begin : begin + CHUNK_STEPS + 1].long()
        sets = torch.zeros(*some.shape[:3], count + 1, dtype=torch.bool, device=blocks.device)
        sets = sets.scatter_(-1, torch.where(some < 0, count, some), True)[..., :count]
        kept = (sets[:, :, 1:] & sets[:, :, :-1]).sum(-1)
        parts.append(kept.double() / sets[:, :, 1:].sum(-1))
    return torch.cat(parts, -1)


class _Selections(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what every sparse site of a run selects."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.means: list[float] = []
        self.least: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.infllm.select_blocks.default:
            self._look(SELECT.positional(args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _look(self, arguments: Sequence[Any]) -> None:
        """The second half's selection, once more and in torch operators: other kernels list blocks by tiles."""
        (q, k, _), call = SELECT.read(arguments)
        first = q.shape[2] // 2
        call = replace(call, offset=call.first_key(q, k) + first)
        half = q[:, :, first:]
        blocks = torch_kernels.select_blocks(half, k, torch_kernels.compress_keys(half, k, call), call)
        shares = shares_kept(blocks, call.geometry.num_blocks(k.shape[2]))
        self.means.append(float(shares.mean()))
        self.least.append(float(shares.min()))


def blocks_kept(model: Callable[..., Any], original: nn.Module, ids: Sequence[int]) -> KeptBlocks | None:
    """Locality of a sparsified model's selections in the second half of a text; None where it selects nothing.

    Args:
        model: a causal language model that `sparsify` returned; its graphs run once, uncompiled.
        original: what it was made of.
        ids: the text's tokens.
    """
    selections = _Selections()

    def observed(module: fx.GraphModule, _inputs: Sequence[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with selections:
                return module.forward(*arguments)

        return run

    Scorer(with_compiler(model, observed), original).logits(ids, torch.tensor([len(ids) - 1]))
    return KeptBlocks(tuple(selections.means), tuple(selections.least)) if selections.means else None
