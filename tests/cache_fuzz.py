"""Random sequences of operations on caches, against recomputation from scratch: ``python -m tests.cache_fuzz COUNT``.

One compiled module decodes all of them. What it returns is compared, at every call, with the float64 oracle over the
keys that the cache then holds; nothing of the past enters the comparison.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import infllm_pass

from .cache_support import CONFIG, CachedAttention, caches, expected, scatter, tokens
from .conftest import relative_error

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
    """

    keys: Tensor
    values: Tensor
    lengths: list[int]
    valid: Tensor

    @classmethod
    def new(cls, rng: random.Random) -> Conversation:
        talk = cls(*caches(BATCH, CAPACITY), [0] * BATCH, torch.ones(BATCH, CAPACITY, dtype=torch.bool))
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


@dataclass
class Session:
    """A compiled module and the conversations that it is used for.

    Attributes:
        rng: decides.
        model: the sparsified module.
        module: the original.
        talks: conversations; the current one is the first.
        log: what was done since the sequence began.
    """

    rng: random.Random
    model: Callable[..., Tensor]
    module: CachedAttention
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
        x, position = tokens(BATCH, count), torch.tensor(talk.lengths)
        with torch.no_grad():
            out = self.model(x, talk.keys, talk.values, position, talk.valid)
            wanted = expected(self.module, x, talk.keys, talk.values, position, talk.valid)
        talk.lengths = [length + count for length in talk.lengths]
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
        """Take tokens back, from each row a number of its own."""
        self.talk.lengths = [self.rng.randint(length // 2, length) for length in self.talk.lengths]

    def reset(self) -> None:
        """Begin a new text, over an emptied cache or over what it holds."""
        self.talk.lengths = [0] * BATCH
        self.talk.pad(self.rng)
        if self.rng.random() < 0.5:
            self.talk.keys.zero_()
            self.talk.values.zero_()

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
            self.talks.insert(0, Conversation.new(self.rng))
        self.rng.shuffle(self.talks)

    def write(self) -> None:
        """Change keys behind the model's back: a slot, or a view of several."""
        row, slot = self.rng.randrange(BATCH), self.rng.randrange(CAPACITY - 8)
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
                self.module(tokens(BATCH, 3), talk.keys, talk.values, torch.tensor(talk.lengths), talk.valid)
            talk.lengths = [length + 3 for length in talk.lengths]

    def run(self, operations: int) -> None:
        """One sequence of operations, from a new cache on."""
        self.talks, self.log = [Conversation.new(self.rng)], []
        calls = [self.prompt, self.step, self.step, self.step, self.several]
        others = [self.crop, self.reset, self.reorder, self.swap, self.write, self.mask, self.original]
        for _ in range(operations):
            operation = self.rng.choice(self.rng.choice([calls, calls, others]))
            self.log.append(operation.__name__)
            operation()


def fuzz(sequences: int, seed: int = 0, operations: int = 14) -> Session:
    """Run sequences of operations; the session, for what its model compiled.

    Raises:
        AssertionError: a call differs from recomputation.
    """
    torch.manual_seed(seed)
    torch._dynamo.reset()
    module = CachedAttention(scatter)
    model = infllm_pass.sparsify(torch.compile(module, backend="eager"), CONFIG)
    session = Session(random.Random(seed), model, module)
    for number in range(sequences):
        torch.manual_seed(seed + number)
        session.rng.seed(seed + number)
        session.run(operations)
    return session


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(infllm_pass.report(fuzz(count).model))
    print(f"{count} sequences, no mismatch")
