"""Random attentions with score terms and near misses of them, and what the pass makes of them.

A program scales scores, caps, biases, masks and joins a sink, in orders that are mostly right. Whatever the pass
decides, its result has to be the program's own. ``python -m tests.support.term_programs --programs 2000`` runs many.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter

import torch

from tests.support import score_terms
from tests.support.common import relative_error

B, L, D = 2, 23, 4


class Program:
    """A random attention of q, k, v, numbers of heads ``[Hq]`` and numbers of rows, heads and keys ``[B, Hkv, L]``.

    Args:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.heads, self.heads_kv = self.random.choice([(4, 4), (4, 2), (6, 2), (2, 1)])
        self.offset = self.random.choice([0] * 8 + [1, 3])  # of the mask; 0: causal
        self.steps = self._steps()
        self.sink = self.random.choice(["", "", "", "", "head", "head", "number", "query", "key", "twice"])
        self.turn = self.random.choice([1, 1, 1, -1])  # of the distance

    def _steps(self) -> list[str]:
        """What is done to the scores, in order."""
        steps = ["scale", "cap", "bias", "mask"]
        if self.random.random() < 0.5:
            steps.remove("cap")
        if self.random.random() < 0.2:
            steps.insert(steps.index("mask"), "bias")
        if self.random.random() < 0.2:
            steps.remove("bias")
        if self.random.random() < 0.2:
            place = self.random.randrange(len(steps) - 1)
            steps[place], steps[place + 1] = steps[place + 1], steps[place]
        if self.random.random() < 0.1:
            steps.insert(self.random.randrange(len(steps)), self.random.choice(["cap", "shift", "scale"]))
        self.choices = [self.random.random() for _ in steps]
        return steps

    def inputs(self) -> list[torch.Tensor]:
        """The arguments, float64."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(B, self.heads, L, D), *[(B, self.heads_kv, L, D)] * 2, (self.heads,), (B, self.heads_kv, L)]
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def __call__(self, q, k, v, of_head, of_key):
        """The program itself."""
        group = self.heads // self.heads_kv
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q @ k.mT
        for step, chosen in zip(self.steps, self.choices, strict=True):
            if step == "scale":
                scores = scores * (0.5 + chosen)
            elif step == "shift":
                scores = scores + (chosen - 0.5)
            elif step == "cap":
                cap = 2 + chosen * 3 if chosen < 0.9 else -3.0
                scores = torch.tanh(scores / cap) * (cap if chosen < 0.8 else 3.0)
            elif step == "bias":
                scores = scores + self._bias(chosen, q, of_head, of_key)
            else:
                scores = scores.masked_fill(self._distance() > self.offset, -torch.inf)
        return self._softmax(scores, q, of_head) @ v

    def _softmax(self, scores, q, of_head):
        if not self.sink:
            return scores.softmax(-1)
        column = {
            "head": of_head[None, :, None, None].expand(B, -1, L, 1),
            "number": torch.full((B, self.heads, L, 1), 0.5, dtype=q.dtype),
            "query": q[..., :1],
            "key": scores[..., :1].detach().clamp(-1, 1),
            "twice": of_head[None, :, None, None].expand(B, -1, L, 2),
        }[self.sink]
        return torch.cat([scores, column], -1).softmax(-1)[..., :L]

    @staticmethod
    def _distance():
        place = torch.arange(L)
        return place - place[:, None]

    def _bias(self, chosen, q, of_head, of_key):
        """Numbers added to the scores; the later ones depend on query and key together."""
        group = self.heads // self.heads_kv
        shared = of_head[::group].repeat_interleave(group) if chosen * 1000 % 1 < 0.7 else of_head
        slopes, distance = shared.sigmoid()[:, None, None], self.turn * self._distance()
        forms = [
            lambda: of_key.repeat_interleave(group, 1)[:, :, None],
            lambda: of_key[:, :1, None],
            lambda: of_key[0, 0],
            lambda: torch.cat([of_key, of_key], -1)[:, :1, None, 5 : 5 + L],
            lambda: of_key[:, :1, None].masked_fill(self._distance() > 0, -torch.inf),
            lambda: slopes * distance,
            lambda: -(slopes * distance) / 2.0,
            lambda: -slopes * distance.abs(),
            lambda: slopes * (distance + 2).abs(),
            lambda: slopes * (distance - 2).double().abs(),
            lambda: 0.25 * distance,
            lambda: slopes * torch.arange(L) - slopes * torch.arange(L)[:, None],
            lambda: of_key.repeat(1, group, 1)[:, :, None],
            lambda: q[..., :1],
            lambda: slopes * distance * distance,
            lambda: slopes * (distance // 2),
            lambda: slopes * distance.clamp(min=-3),
            lambda: of_key[:, :1, None] * torch.arange(L)[:, None],
            lambda: of_key[:, :1].flip(-1)[..., None] + of_key[:, :1, None],
        ]
        right = 12  # of the forms; two programs in three take one of these
        return forms[
            int(chosen * 1.5 * right) if chosen < 2 / 3 else right + int((chosen * 3 - 2) * (len(forms) - right))
        ]()


def run_many(seeds) -> Counter:
    """How many programs became switchable and stayed dense.

    Raises:
        AssertionError: the pass changed what one computes.
    """
    found: Counter = Counter()
    for seed in seeds:
        program = Program(seed)
        inputs = program.inputs()
        expected = program(*inputs)
        out, rows = score_terms.rewritten(program, *inputs)
        seen = expected.isfinite().all(-1)  # rows that see no key are NaN there
        error = relative_error(out[seen], expected[seen])
        decisions = {row.reason for row in rows}
        assert error < 1e-9, f"program {seed}: {decisions}, off by {error:.1e}"
        assert "INTERNAL" not in decisions, f"program {seed}: {rows[0].explanation}"
        found.update(row.reason for row in rows)
    return found


def main() -> int:
    """Run programs and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    print(dict(run_many(range(arguments.first, arguments.first + arguments.programs))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
