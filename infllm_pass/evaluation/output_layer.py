"""Logits of many places without the logits of all: the hidden states of a pass, and the output layer in pieces.

Logits of 8192 tokens over a vocabulary of 262 144 are 8.6 GB in float32; the hidden states that they are made of are
some megabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infllm_pass.errors import EvaluationError

PIECE_LOGITS = 2**26
"""Logits that are made at once, 256 MB in float32: on two CPU cores half as many take 7 to 20 % longer."""

_TRIED = 4
"""Tokens of the text on which pieces are compared with the model's own logits."""

_TOLERANCE = 1e-4
"""Difference from the model's own logits, as a share of the largest; in lower precision some of its steps."""


def output_pieces(output: Callable[[Tensor], Tensor], hidden: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Logits of hidden states, in order, at most `PIECE_LOGITS` at once or those of one place.

    Args:
        output: makes logits ``[n, V]`` of hidden states ``[n, H]``.
        hidden: hidden states, ``[N, H]``.
        vocabulary: V.

    Yields:
        float32 ``[n, V]``.
    """
    for part in torch.split(hidden, max(1, PIECE_LOGITS // vocabulary)):
        yield output(part).float()


class _Stand(nn.Module):
    """Stands in the place of an output layer, whose weights others may look at."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Any:
        """The layer's."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's."""
        return self.layer.bias


class _Keeping(_Stand):
    """Keeps the hidden states that it is given, and makes one logit of each."""

    kept: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[B, L, H]`` to ``[B, L, 1]``."""
        self.kept = hidden
        return hidden[..., :1]


class _Given(_Stand):
    """Makes the logits of other hidden states than those that it is given."""

    hidden: Tensor

    def forward(self, _: Tensor) -> Tensor:
        """The layer's logits, ``[1, n, V]``."""
        logits: Tensor = self.layer(self.hidden[None])
        return logits


class OutputLayer:
    """The output layer of a causal language model of transformers, and what the model does with its logits.

    Only the layer is taken out of the model while this is used: the model is called whole, so that a compiled or
    sparsified one has the attention sites that it has otherwise. What follows the layer, a factor or a soft cap, is
    applied by the model itself, in a pass over one token.

    Attributes:
        vocabulary: logits of a place.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        """Use `OutputLayer.of`, which makes sure that pieces have the logits of the whole."""
        layer = model.get_submodule(path)
        self._model = model
        self._path = path
        self._keeping = _Keeping(layer)
        self._given = _Given(layer)
        self.vocabulary = 1

    @classmethod
    def of(cls, model: nn.Module) -> OutputLayer | None:
        """A model's output layer; None where its logits are not made by one module, place by place."""
        getter = getattr(model, "get_output_embeddings", None)
        layer = getter() if callable(getter) else None
        path = next((name for name, module in model.named_modules() if name and module is layer), None)
        if path is None:
            return None
        found = cls(model, path)
        ids = range(_TRIED)
        with torch.no_grad():
            expected: Tensor = model(input_ids=found._inputs(ids), use_cache=False).logits[0]
            found.vocabulary = expected.shape[-1]
            try:
                actual = found.logits(found.hidden(model, ids)[1:3])
            except EvaluationError:
                return None
        tolerance = max(_TOLERANCE, 4 * torch.finfo(actual.dtype).eps) * float(expected.abs().max())
        same = actual.shape == expected[1:3].shape and torch.allclose(actual, expected[1:3], rtol=0, atol=tolerance)
        return found if same else None

    def hidden(self, run: Callable[..., Any], ids: Sequence[int]) -> Tensor:
        """What the output layer is given in a pass, ``[L, H]``.

        Args:
            run: the model, plain, compiled or sparsified.
            ids: tokens.

        Raises:
            EvaluationError: the pass did not call the layer.
        """
        self._keeping.kept = None
        with self._replaced(self._keeping):
            run(input_ids=self._inputs(ids), use_cache=False)
        kept, self._keeping.kept = self._keeping.kept, None
        if kept is None or kept.shape[:2] != (1, len(ids)):
            raise EvaluationError(
                f"{type(self._model).__name__} did not call its output layer {self._path} on every token: "
                "evaluate the model itself, not a function that runs part of it"
            )
        return kept[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits ``[n, V]`` of hidden states ``[n, H]``."""
        self._given.hidden = hidden
        with self._replaced(self._given):
            logits: Tensor = self._model(input_ids=self._inputs([0]), use_cache=False).logits[0]
        del self._given.hidden
        return logits

    def _inputs(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=next(self._model.parameters()).device)

    @contextlib.contextmanager
    def _replaced(self, stand: _Stand) -> Iterator[None]:
        owner, _, name = self._path.rpartition(".")
        place = self._model.get_submodule(owner)
        setattr(place, name, stand)
        try:
            yield
        finally:
            setattr(place, name, stand.layer)
