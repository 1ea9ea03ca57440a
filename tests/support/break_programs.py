"""Random models whose masks cross graphs, and what they compute against the same models uncompiled.

A model makes a mask in a graph, in eager code, or is handed one; then its trace breaks, the mask is edited in place,
replaced by another of its shape, read by others, viewed or copied; then one or two layers attend with it. Each model is
called several times, with masks of other kinds and lengths. The budget covers every key, so that sparse attention
gives what dense attention gives. ``python -m tests.support.break_programs --programs 5000`` runs many.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import InfLLMError, MaskInputWarning
from infllm_pass.frontend.backend import SwitchableBackend
from tests.support.common import SMALL

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
LENGTHS = (40, 66, 72, 81)
"""Below the dense length of `COVERING` and above it."""
CALLS = 4


@dataclass(frozen=True)
class Kind:
    """What a mask lets through.

    Attributes:
        padding: keys hidden at the front of the first row, and at the end of the second.
        packed: whether rows hold several sequences.
        window: keys that a query sees at most; 0: no limit.
        spoiled: whether one element is not what the rest says.
    """

    padding: int
    packed: bool
    window: int
    spoiled: bool

    @classmethod
    def random(cls, rng: random.Random) -> Kind:
        """A kind, plain ones more often than others."""
        return cls(rng.choice((0, 0, 3, 17)), rng.random() < 0.3, rng.choice((0, 0, 0, 25)), rng.random() < 0.15)

    def mask(self, length: int, seed: int) -> Tensor:
        """The mask ``[2, 1, length, length]``, True where a query sees a key."""
        query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = (key <= query).expand(2, 1, length, length)
        if self.window:
            seen = seen & (key > query - self.window)
        if self.padding:
            valid = torch.ones(2, length, dtype=torch.bool)
            valid[0, : self.padding] = False
            valid[1, length - self.padding :] = False
            seen = seen & valid[:, None, None, :]
        if self.packed:
            ids = (torch.arange(length) >= length // 3).long() + (torch.arange(length) >= length - 9).long()
            seen = seen & (ids[:, None] == ids[None, :])
        seen = seen.clone()
        if self.spoiled:
            at = random.Random(seed).randrange(length)
            seen[0, 0, at, at // 2] ^= True
        return seen


Step = Callable[[Tensor, Tensor], Tensor]
"""What happens to a mask on its way: takes it and another of its shape, returns the one to go on with."""


def broken(mask: Tensor, _other: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return mask


@torch.compiler.disable
def edited(mask: Tensor, _other: Tensor) -> Tensor:
    mask[..., -1, 0] = mask[..., 0, -1]
    return mask


@torch.compiler.disable
def edited_through_a_view(mask: Tensor, other: Tensor) -> Tensor:
    mask.view(-1)[: mask.numel() // 2].copy_(other.reshape(-1)[: mask.numel() // 2])
    return mask


def edited_in_the_graph(mask: Tensor, _other: Tensor) -> Tensor:
    mask[..., 1, 0] = mask[..., 0, -1]
    return mask


@torch.compiler.disable
def overwritten(mask: Tensor, other: Tensor) -> Tensor:
    return mask.copy_(other)


@torch.compiler.disable
def replaced(_mask: Tensor, other: Tensor) -> Tensor:
    return other.clone()


@torch.compiler.disable
def read_by_others(mask: Tensor, _other: Tensor) -> Tensor:
    mask.sum().item()
    return mask


def copied(mask: Tensor, _other: Tensor) -> Tensor:
    return mask.clone()


def viewed(mask: Tensor, _other: Tensor) -> Tensor:
    return mask[:, :, :, :]


@torch.compiler.disable
def expanded(mask: Tensor, _other: Tensor) -> Tensor:
    return mask[:1].expand(2, -1, -1, -1)


STEPS: tuple[Step, ...] = (
    broken,
    broken,
    broken,
    edited,
    edited_through_a_view,
    edited_in_the_graph,
    overwritten,
    replaced,
    read_by_others,
    copied,
    viewed,
    expanded,
)


def as_is(mask: Tensor) -> Tensor:
    return mask


def as_numbers(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))


def as_lowest(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


class Model:
    """A random model.

    Args:
        seed: decides all of it.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.written_as = self.random.choice((as_is, as_is, as_numbers, as_lowest))
        self.spelling = self.random.choice((fused, fused, filled))
        self.made_in = self.random.choice(("graph", "eager", "input"))
        self.before = tuple(self.random.choices(STEPS, k=self.random.randrange(1, 4)))
        self.between = tuple(self.random.choices(STEPS, k=self.random.randrange(0, 3)))
        self.layers = self.random.choice((1, 2))
        kinds = [Kind.random(self.random) for _ in range(2)]
        self.used: list[Tensor] | None = None  # masks as they were attended with, while the model runs uncompiled
        self.calls = [(self.random.choice(kinds), self.random.choice(LENGTHS)) for _ in range(CALLS)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, other: Tensor) -> Tensor:
        """Attend, with a mask made of `seen`, ``[2, 1, L, L]``; `other` is one of its shape."""
        if self.made_in == "graph":
            mask = self.written_as(seen & (torch.arange(q.shape[2])[:, None] >= torch.arange(q.shape[2])))
        else:
            mask = self.eager(seen) if self.made_in == "eager" else seen
        another = other if mask.dtype == torch.bool else self.eager(other)
        for step in self.before:
            mask = step(mask, another)
        out = self.attend(q, k, v, mask)
        if self.layers == 2:
            for step in self.between:
                mask = step(mask, another)
            out = self.attend(q + torch.nan_to_num(out), k, v, mask)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.used is not None:
            self.used.append(mask.clone() if mask.dtype == torch.bool else mask == 0)
        return self.spelling(q, k, v, mask)

    @torch.compiler.disable
    def eager(self, seen: Tensor) -> Tensor:
        return self.written_as(seen)

    def inputs(self, call: int) -> list[Tensor]:
        """The inputs of a call, made anew."""
        kind, length = self.calls[call]
        generator = torch.Generator().manual_seed(self.seed * 8 + call)
        heads = [torch.randn(2, 2, length, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
        others = Kind(5, False, 0, False)
        return [*heads, kind.mask(length, self.seed), others.mask(length, self.seed)]


def run(seed: int) -> Counter[str]:
    """Compare one model with itself uncompiled.

    Returns:
        How many of its calls ran what: "sparse" and "dense" graphs, and "warned" calls.

    Raises:
        AssertionError: they differ.
    """
    torch._dynamo.reset()
    model = Model(seed)
    backend = SwitchableBackend(lambda module, _inputs: module.forward, COVERING)
    compiled = torch.compile(model.__call__, backend=backend)
    seen: Counter[str] = Counter()
    for call in range(CALLS):
        training = model.random.random() < 0.3
        mode = torch.no_grad() if model.random.random() < 0.7 else torch.inference_mode()
        model.used = []
        try:
            expected = model(*model.inputs(call))
        except RuntimeError:  # it writes to an expanded mask
            return Counter({"no program": 1})
        # What padded queries yield, those that see nothing or that nobody sees, means nothing.
        some = torch.stack([mask.any(-1, keepdim=True) & mask.any(-2)[..., None] for mask in model.used]).all(0)
        model.used, inputs = None, model.inputs(call)
        with warnings.catch_warnings(record=True) as caught, torch.enable_grad() if training else mode:
            warnings.simplefilter("always", MaskInputWarning)
            actual = compiled(*inputs)
        actual, expected = (torch.where(some, out, 0.0) for out in (actual, expected))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        seen["warned"] += any(issubclass(warning.category, MaskInputWarning) for warning in caught)
    for site in backend.log.report().sites:
        seen[site.branch if site.decision == "switchable" else site.reason] += 1
        if site.decision == "switchable" and site.mask_origin:
            seen["read"] += 1
    return seen


def run_many(seeds: Iterable[int]) -> Counter[str]:
    """Compare many models, see `run`; a model that fails is named."""
    total: Counter[str] = Counter()
    for seed in seeds:
        total += run(seed)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    total: Counter[str] = Counter()
    failed = 0
    for seed in range(options.first, options.first + options.programs):
        try:
            total += run(seed)
        except (AssertionError, RuntimeError, InfLLMError) as error:
            failed += 1
            print(f"{seed}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
        if seed % 100 == 99:
            print(seed + 1, dict(total), "failed", failed, flush=True)
    print(dict(total), "failed", failed)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
