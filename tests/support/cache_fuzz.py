"""Random sequences of operations on caches, against recomputation from scratch.

Run by hand: ``python -m tests.support.cache_fuzz COUNT``.

One compiled module decodes all of them. What it returns is compared, at every call, with the float64 oracle over the
keys that the cache then holds; nothing of the past enters the comparison.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import infllm_pass
from infllm_pass import SparseAttentionConfig
from tests.support.cache_support import CONFIG, CachedAttention, GrowingAttention, caches, expected, scatter, tokens
from tests.support.common import relative_error

BATCH, CAPACITY = 2, 80
BOUND = 1e-11


@dataclass
class Conversation:
    """Two rows of a cache, and where they stand.

    Attributes:
        keys: the cache.
        values: the same.
        lengths: slots in use, a number a row.
        valid: bool ``[BATCH, CAPACITY]``: padding before the rows, and holes.
        config: what the model is configured with.
    """

    keys: Tensor
    values: Tensor
    lengths: list[int]
    valid: Tensor
    config: SparseAttentionConfig

    @classmethod
    def new(cls, rng: random.Random, config: SparseAttentionConfig) -> Conversation:
        talk = cls(*caches(BATCH, CAPACITY), [0] * BATCH, torch.ones(BATCH, CAPACITY, dtype=torch.bool), config)
        talk.pad(rng)
        return talk

    def pad(self, rng: random.Random) -> None:
        """Other padding, and a hole now and then, for a new text."""
        self.valid.fill_(True)
        for row in range(BATCH):
            self.valid[row, : rng.choice([0, 0, rng.randint(1, 9)])] = False
            if rng.random() < 0.3:
                hole = rng.randint(10, 40)
                self.valid[row, hole : hole + rng.randint(1, 6)] = False

    def call(self, model: Callable[..., Any], x: Tensor) -> Tensor:
        """Append tokens; what the model gives for them."""
        out: Tensor = model(x, self.keys, self.values, torch.tensor(self.lengths), self.valid)
        self.lengths = [length + x.shape[1] for length in self.lengths]
        return out

    def expected(self, module: CachedAttention, x: Tensor) -> Tensor:
        """What the oracle gives for the tokens appended last."""
        position = torch.tensor(self.lengths) - x.shape[1]
        return expected(module, x, self.keys, self.values, position, self.valid, self.config)

    def crop(self, rng: random.Random) -> None:
        """Take tokens back, from each row a number of its own."""
        self.lengths = [rng.randint(length // 2, length) for length in self.lengths]

    def clear(self, rng: random.Random) -> None:
        """Begin a new text, over an emptied cache or over what it holds."""
        self.lengths = [0] * BATCH
        self.pad(rng)
        if rng.random() < 0.5:
            self.keys.zero_()
            self.values.zero_()


@dataclass
class GrowingConversation(Conversation):
    """Two rows of one length of a cache that grows by concatenation; `valid` has a place for every key to come."""

    @classmethod
    def new(cls, rng: random.Random, config: SparseAttentionConfig) -> Conversation:
        talk = cls(*caches(BATCH, 0), [0] * BATCH, torch.ones(BATCH, CAPACITY, dtype=torch.bool), config)
        talk.pad(rng)
        return talk

    def pad(self, rng: random.Random) -> None:
        """The same; a hole has keys behind it, so that a row's last key is one that is seen."""
        super().pad(rng)
        self._show_new_keys()

    def _show_new_keys(self) -> None:
        self.valid[:, max(self.keys.shape[2] - 1, 10) :] = True

    def call(self, model: Callable[..., Any], x: Tensor) -> Tensor:
        length = self.keys.shape[2] + x.shape[1]
        out, self.keys, self.values = model(x, self.keys, self.values, self.valid[:, :length])
        self.lengths = [length] * BATCH
        return out

    def expected(self, module: CachedAttention, x: Tensor) -> Tensor:
        length = self.lengths[0]
        return expected(module, x, self.keys, self.values, length - x.shape[1], self.valid[:, :length], self.config)

    def crop(self, rng: random.Random) -> None:
        """Take tokens back: from views of the cache, or from copies."""
        length = rng.randint(self.lengths[0] // 2, self.lengths[0])
        self.lengths = [length] * BATCH
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        if rng.random() < 0.3:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self._show_new_keys()

    def clear(self, rng: random.Random) -> None:
        """Begin a new text with a new cache."""
        self.keys, self.values = caches(BATCH, 0)
        self.lengths = [0] * BATCH
        self.pad(rng)


@dataclass
class Session:
    """A compiled module and the conversations that it is used for.

    Attributes:
        rng: decides.
        model: the sparsified module.
        module: the original.
        config: what the model is configured with.
        kind: of the conversations.
        talks: conversations; the current one is the first.
        log: what was done since the sequence began.
    """

    rng: random.Random
    model: Callable[..., Tensor]
    module: CachedAttention
    config: SparseAttentionConfig = CONFIG
    kind: type[Conversation] = Conversation
    talks: list[Conversation] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def talk(self) -> Conversation:
        return self.talks[0]

    def append(self, count: int) -> None:
        """Call the model with tokens that fit, and compare."""
        talk = self.talk
        count = min(count, CAPACITY - max(talk.lengths))
        if count < 1:
            return self.reset()
        x = tokens(BATCH, count)
        with torch.no_grad():
            out = talk.call(self.model, x)
            wanted = talk.expected(self.module, x)
        seen = wanted.abs().amax((1, 3)) > 0  # what padding yields is free
        error = relative_error(out.transpose(1, 2)[seen], wanted.transpose(1, 2)[seen]) if bool(seen.any()) else 0.0
        assert error < BOUND, (error, self.log)
        assert bool(out.isfinite().all()), self.log
        return None

    def prompt(self) -> None:
        self.append(self.rng.randint(17, 45))

    def step(self) -> None:
        self.append(1)

    def several(self) -> None:
        self.append(self.rng.choice([2, 5, 16]))

    def crop(self) -> None:
        self.talk.crop(self.rng)

    def reset(self) -> None:
        self.talk.clear(self.rng)

    def reorder(self) -> None:
        """Continue from another row, as beam search does: in new tensors, or in place."""
        rows = torch.tensor([self.rng.randrange(BATCH) for _ in range(BATCH)])
        talk = self.talk
        talk.lengths = [talk.lengths[row] for row in rows.tolist()]
        talk.valid = talk.valid[rows]
        if self.rng.random() < 0.5:
            talk.keys, talk.values = talk.keys.index_select(0, rows), talk.values.index_select(0, rows)
        else:
            talk.keys.copy_(talk.keys[rows])
            talk.values.copy_(talk.values[rows])

    def swap(self) -> None:
        """Go on with another conversation, an old or a new one."""
        if len(self.talks) > 2:
            self.talks.pop(self.rng.randrange(3))
        if self.rng.random() < 0.5:
            self.talks.insert(0, self.kind.new(self.rng, self.config))
        self.rng.shuffle(self.talks)

    def write(self) -> None:
        """Change keys behind the model's back: a slot, or a view of several."""
        row, slot = self.rng.randrange(BATCH), self.rng.randrange(max(1, self.talk.keys.shape[2] - 8))
        if slot >= self.talk.keys.shape[2]:
            return
        if self.rng.random() < 0.5:
            self.talk.keys[row, :, slot] = 4 * torch.randn(1, dtype=torch.float64)
        else:
            self.talk.keys.transpose(1, 2)[:, slot : slot + 8].normal_(std=4)

    def mask(self) -> None:
        """Other keys become valid under the text that there is."""
        self.talk.pad(self.rng)

    def original(self) -> None:
        """Let the dense original append tokens."""
        talk = self.talk
        if max(talk.lengths) + 3 <= CAPACITY:
            with torch.no_grad():
                talk.call(self.module, tokens(BATCH, 3))

    def run(self, operations: int) -> None:
        """One sequence of operations, from a new cache on."""
        self.talks, self.log = [self.kind.new(self.rng, self.config)], []
        calls = [self.prompt, self.step, self.step, self.step, self.several]
        others = [self.crop, self.reset, self.reorder, self.swap, self.write, self.mask, self.original]
        for _ in range(operations):
            operation = self.rng.choice(self.rng.choice([calls, calls, others]))
            self.log.append(operation.__name__)
            operation()


def fuzz(sequences: int, seed: int = 0, operations: int = 14, *, growing: bool = False, **settings: Any) -> Session:
    """Run sequences of operations; the session, for what its model compiled.

    Args:
        sequences: how many.
        seed: of the first.
        operations: of a sequence.
        growing: over caches that grow by concatenation, not static ones.
        settings: fields of the configuration.

    Raises:
        AssertionError: a call differs from recomputation.
    """
    torch.manual_seed(seed)
    torch._dynamo.reset()
    module = GrowingAttention() if growing else CachedAttention(scatter)
    config = replace(CONFIG, **settings)
    model = infllm_pass.sparsify(torch.compile(module, backend="eager"), config)
    kind = GrowingConversation if growing else Conversation
    session = Session(random.Random(seed), model, module, config, kind)
    with torch._dynamo.config.patch(recompile_limit=64):  # before torch 2.13 `sparsify` cannot raise it for itself
        for number in range(sequences):
            torch.manual_seed(seed + number)
            session.rng.seed(seed + number)
            session.run(operations)
    return session


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for growing in (False, True):
        for scorer in ("pooled", "tokens"):
            print(infllm_pass.report(fuzz(count, growing=growing, scorer=scorer).model))
            print(f"{count} sequences over {'growing' if growing else 'static'} caches, {scorer}: no mismatch")
