"""Distillation from the model's own dense mode, some tokens at a time: logits of all tokens never exist at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infllm_pass.adaptation.adapters import body_of
from infllm_pass.adaptation.packing import NO_LABEL
from infllm_pass.errors import AdaptationError
from infllm_pass.frontend.api import dense_mode

MOST_LOGITS = 2**28
"""Logits that exist at once, 1 GB in float32, and some copies of them."""

TOLERANCE = 1e-3


class _ChunkedLoss(torch.autograd.Function):
    """Losses of hidden states under one output layer; gradients are made beside the losses, chunk by chunk.

    For logits `s` of the student and `t` of the teacher, with ``p = softmax(s)`` and ``q = softmax(t)``, what is
    minimised is ``(1 - w) * -log p[label] + w * KL(q || p)``; its gradient by `s` is
    ``p - (1 - w) * onehot - w * q``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, taught: Tensor, labels: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means over the tokens: what is minimised, the loss on the labels, and the divergence.

        Args:
            ctx: autograd's.
            hidden: the student's hidden states, ``[N, H]``.
            weight: of the output layer, ``[V, H]``.
            bias: of the output layer, ``[V]``.
            taught: the teacher's hidden states, ``[N, H]``.
            labels: int64 ``[N]``; tokens labelled `NO_LABEL` count for nothing.
            share: the weight of the divergence.
        """
        count = labels.ne(NO_LABEL).sum().clamp(min=1).float()
        cast = weight.to(hidden.dtype)
        sums = hidden.new_zeros(2, dtype=torch.float32)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        size = max(1, MOST_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), size):
            part, label = hidden[start : start + size], labels[start : start + size]
            kept = label.ne(NO_LABEL)[:, None]
            place = label.clamp(min=0)[:, None]
            log_p = F.log_softmax(_logits(part, cast, bias), -1)  # [n, V], float32
            log_q = F.log_softmax(_logits(taught[start : start + size], cast, bias), -1)
            q = log_q.exp()
            sums[0] -= (log_p.gather(1, place) * kept).sum()
            sums[1] += ((log_q.sub_(log_p).mul_(q)).sum(-1, keepdim=True) * kept).sum()
            gradient = log_p.exp_().sub_(q, alpha=share)
            gradient.scatter_add_(1, place, torch.full_like(place, share - 1, dtype=gradient.dtype))
            gradient.mul_(kept / count)
            lower = gradient.to(hidden.dtype)
            by_hidden[start : start + size] = lower @ cast
            if by_weight is not None:
                by_weight += lower.T @ part
            if by_bias is not None:
                by_bias += gradient.sum(0)
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        loss, divergence = sums / count
        ctx.mark_non_differentiable(loss, divergence)
        return (1 - share) * loss + share * divergence, loss, divergence

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight, by_bias = ctx.saved_tensors
        scaled = (None if each is None else each * scale for each in (by_weight, by_bias))
        return (by_hidden * scale.to(by_hidden.dtype), *scaled, None, None, None)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).float()


def chunked_losses(
    hidden: Tensor, taught: Tensor, output: nn.Linear, labels: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimised, the loss on the labels and the divergence, as means over the labelled tokens.

    Args:
        hidden: the student's hidden states, ``[..., L, H]``.
        taught: the teacher's, of the same shape, without gradients.
        output: the layer that makes logits of them.
        labels: int64 ``[..., L]``: a token's own id, which the state before it predicts.
        share: weight of the divergence, 0 to 1.
    """
    student, teacher = (each[..., :-1, :].flatten(0, -2) for each in (hidden, taught))
    found = _ChunkedLoss.apply(student, output.weight, output.bias, teacher, labels[..., 1:].flatten(), share)
    minimised, loss, divergence = found
    return minimised, loss, divergence


@contextlib.contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps no copies of weights: those made without gradients are of no use to layers with checkpoints."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


class Distilled:
    """Losses of a batch with the model's own dense mode for a teacher: same weights, same batch, no gradients.

    Args:
        model: a sparsified causal language model of transformers, with adapters or without.
        original: the plain one inside.
        share: weight of the divergence.

    Raises:
        AdaptationError: the model's logits are not its output layer on its hidden states.
    """

    def __init__(self, model: nn.Module, original: Any, share: float) -> None:
        self._model = model
        self._share = share
        output = original.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise AdaptationError(
                f"{type(original).__name__} has no linear output layer: train it without distillation"
            )
        self._output = output
        ids = torch.arange(4, device=output.weight.device)[None]
        with torch.no_grad():
            expected = original(input_ids=ids, use_cache=False).logits
            actual = output(body_of(original)(input_ids=ids, use_cache=False).last_hidden_state)
        if not torch.allclose(actual.float(), expected.float(), rtol=TOLERANCE, atol=TOLERANCE):
            raise AdaptationError(
                f"{type(original).__name__} changes its logits after the output layer: train it without distillation"
            )

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimised, the loss on the text and the divergence."""
        inputs = {name: each for name, each in batch.items() if name != "labels"}
        with torch.no_grad(), dense_mode(self._model), _uncached_casts():
            taught = body_of(self._model)(**inputs, use_cache=False).last_hidden_state
        hidden = body_of(self._model)(**inputs, use_cache=False).last_hidden_state
        return chunked_losses(hidden, taught, self._output, batch["labels"], self._share)
