"""Queries, keys and values that the GPU benchmarks run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_pass.errors import CheckpointError

CORRELATION = 0.98
"""Of neighbouring tokens in ``local`` data: they share about 80 % of the blocks that they select."""

CHECKPOINT_LAYER = 15
CHECKPOINT_WINDOW = 8192
"""Positions that SmolLM2-135M was trained on."""

_CHUNK = 256


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and numbers a head.

    Attributes:
        queries: query heads, a multiple of `keys`.
        keys: key/value heads.
        dim: numbers in a head.
    """

    queries: int
    keys: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """From ``"32x8x128"``."""
        queries, keys, dim = (int(number) for number in text.split("x"))
        if min(queries, keys, dim) < 1 or queries % keys:
            raise ValueError(f"expected QUERYxKEYxDIM with QUERY a multiple of KEY, got {text!r}")
        return cls(queries, keys, dim)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.queries // self.keys

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}x{self.dim}"


MAIN = (Heads(32, 2, 128), Heads(32, 8, 128))
"""The geometries that kernels are tuned for: 16 and 4 query heads to a KV head."""

LENGTHS = (32768, 65536, 131072)

SMOLLM2 = Heads(9, 3, 64)


def make_data(
    kind: str,
    heads: Heads,
    length: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    file: Path | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[1, heads, length, dim]``.

    Args:
        kind: ``random``: independent, of unit variance. ``local``: queries and keys follow an AR(1) process along
            the tokens, `CORRELATION` and unit variance. ``checkpoint``: see `checkpoint_data`.
        heads: the sizes.
        length: tokens.
        device: where the data go.
        dtype: their type.
        file: where ``checkpoint`` data were saved by ``checkpoint_inputs.py``; None: the model runs.
    """
    if kind == "checkpoint":
        return (
            checkpoint_data(heads, length, device, dtype) if file is None else saved_data(file, heads, length, device)
        )
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for count, local in ((heads.queries, kind == "local"), (heads.keys, kind == "local"), (heads.keys, False)):
        data = torch.empty(1, count, length, heads.dim, device=device, dtype=dtype)
        for head in range(count):  # one head at a time: the noise is float32
            noise = torch.randn(length, heads.dim, device=device, generator=generator)
            data[0, head] = correlated(noise, CORRELATION) if local else noise
        tensors.append(data)
    q, k, v = tensors
    return q, k, v


def correlated(noise: Tensor, rho: float) -> Tensor:
    """``x[t] = rho x[t-1] + sqrt(1 - rho^2) noise[t]``, ``x[0] = noise[0]``, along the first of two dimensions.

    Two triangular products in place of a loop: within chunks of tokens, then over the chunks' last tokens.
    """
    length, dim = noise.shape
    count = -(-length // _CHUNK)
    steps = math.sqrt(1 - rho**2) * F.pad(noise, (0, 0, 0, count * _CHUNK - length))
    steps[0] = noise[0]
    within = _powers(rho, _CHUNK, noise) @ steps.view(count, _CHUNK, dim)  # [count, CHUNK, dim]
    last = _powers(rho**_CHUNK, count, noise) @ within[:, -1]  # [count, dim]
    decay = rho ** torch.arange(1, _CHUNK + 1, device=noise.device, dtype=noise.dtype)
    within[1:] += decay[:, None] * last[:-1, None]
    return within.reshape(-1, dim)[:length]


def _powers(rho: float, size: int, like: Tensor) -> Tensor:
    """Lower triangular ``rho ** (i - j)``."""
    index = torch.arange(size, device=like.device, dtype=like.dtype)
    return torch.tril(rho ** (index[:, None] - index).clamp(min=0))


def checkpoint_data(
    heads: Heads, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention of layer 15 of SmolLM2-135M receives for the text of `infllm_pass.tools.checkpoint.corpus`.

    The model was trained on 8 192 positions: longer data are windows of so many tokens one after the other, each
    with position encodings of its own.

    Raises:
        CheckpointError: the checkpoint is not installed, the sizes are not its, or the text is too short.
    """
    from infllm_pass.tools.checkpoint import corpus, load_model, load_tokenizer

    if heads != SMOLLM2:
        raise CheckpointError(f"SmolLM2-135M has heads {SMOLLM2}, {heads} were asked for")
    ids = corpus(load_tokenizer(), length)
    model = load_model(dtype).model.to(device)
    pieces = [_layer_inputs(model, window.to(device)) for window in ids.split(CHECKPOINT_WINDOW, dim=1)]
    q, k, v = (torch.cat(parts, dim=2).to(dtype) for parts in zip(*pieces, strict=True))
    return q, k, v


def saved_data(file: Path, heads: Heads, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`checkpoint_data` from a file, repeated along the tokens where it is shorter than `length`.

    Raises:
        CheckpointError: the file holds other sizes.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    found = Heads(tensors["q"].shape[1], tensors["k"].shape[1], tensors["q"].shape[3])
    if found != heads:
        raise CheckpointError(f"{file} has heads {found}, {heads} were asked for")
    copies = -(-length // tensors["q"].shape[2])
    q, k, v = (tensors[name].repeat(1, 1, copies, 1)[:, :, :length].to(device) for name in ("q", "k", "v"))
    return q, k, v


@torch.no_grad()
def _layer_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """q, k and v of one layer's attention, before heads are repeated."""
    seen: list[list[Tensor]] = []
    plain = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        step = q.shape[1] // model.config.num_key_value_heads if k.shape[1] == q.shape[1] else 1
        if len(seen) <= CHECKPOINT_LAYER:
            wanted = len(seen) == CHECKPOINT_LAYER
            seen.append([q.clone(), k[:, ::step].clone(), v[:, ::step].clone()] if wanted else [])
        return plain(q, k, v, *arguments, **keywords)

    F.scaled_dot_product_attention = spy  # type: ignore[assignment]
    try:
        model(ids, use_cache=False)
    finally:
        F.scaled_dot_product_attention = plain
    return seen[CHECKPOINT_LAYER]
