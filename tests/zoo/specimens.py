"""What the zoo examines: models with everything needed to build and call them, and the batches they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

LENGTH = 100
"""Tokens in a row: over the dense length and the visited span of the small budget; more than the vocabulary."""


class Kind(Enum):
    """The kinds of batches. The value is what the table calls them."""

    PLAIN = "plain"
    PADDED = "padded"
    PACKED = "packed"


@dataclass(frozen=True)
class Batch:
    """Inputs of one call.

    Attributes:
        kind: what kind of batch it is.
        ids: tokens ``[B, L]``.
        attention_mask: int64 ``[B, L]``, 1 where a token is valid, or None.
        position_ids: ``[B, L]``, restarting at 0 in every packed sequence, or None.
        valid: bool ``[B, L]``, where outputs are compared.
    """

    kind: Kind
    ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    valid: Tensor


@dataclass(frozen=True)
class Specimen:
    """A model under examination.

    Attributes:
        name: the architecture.
        implementation: how it computes attention.
        build: makes the model, in eval mode, with weights of its own choosing.
        call: runs a model on a batch and returns logits ``[B, L, vocabulary]``.
        kinds: the batches that `call` can express.
        dtype: what the model is run in; float64 unless its own code asks for float32.
    """

    name: str
    implementation: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Batch], Tensor]
    kinds: tuple[Kind, ...] = (Kind.PLAIN,)
    dtype: torch.dtype = torch.float64

    @property
    def key(self) -> str:
        """The specimen's name in tables and on the command line."""
        return f"{self.name}/{self.implementation}"


class CannotBuildError(Exception):
    """An architecture that cannot be built here; the message says why in a line."""


def make_batch(kind: Kind) -> Batch:
    """A batch of one kind: one row, rows padded left, right and not at all, or two rows of packed sequences."""
    generator = torch.Generator().manual_seed(7)
    rows = {Kind.PLAIN: 1, Kind.PADDED: 3, Kind.PACKED: 2}[kind]
    ids = torch.randint(5, 90, (rows, LENGTH), generator=generator)
    valid = torch.ones(rows, LENGTH, dtype=torch.bool)
    if kind is Kind.PADDED:
        valid[0, :17] = False
        valid[1, -11:] = False
        return Batch(kind, ids, valid.long(), None, valid)
    if kind is Kind.PACKED:
        positions = [torch.cat([torch.arange(first), torch.arange(LENGTH - first)]) for first in (29, 75)]
        return Batch(kind, ids, None, torch.stack(positions), valid)
    return Batch(kind, ids, None, None, valid)


def roughen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give every parameter a random value, from its name alone, so large that attention is far from uniform."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(dtype)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 1.5 / max(parameter.shape[-1], 1) ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model
