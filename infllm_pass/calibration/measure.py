"""Running a dense model on text and looking at the queries and keys of its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from infllm_pass.calibration.channels import by_variance
from infllm_pass.calibration.judge import PUBLISHED, Rows, missed, worst
from infllm_pass.calibration.record import Key, SiteCalibration, key_of
from infllm_pass.compat.tensors import FakeTensor
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.emit.builder import Emitter
from infllm_pass.errors import CalibrationError
from infllm_pass.graph.subgraphs import all_graphs, held_tensors
from infllm_pass.kernels.geometry import ChannelSets
from infllm_pass.plan.planner import plan_graph
from infllm_pass.plan.score_channels import from_rotary
from infllm_pass.plan.site_plan import SitePlan
from infllm_pass.sites import AttentionSite
from infllm_pass.sites.layouts import Layouts
from infllm_pass.sites.rotary import Rotary, RotaryReader

TOLERANCE = 0.1
"""Share of the attention that the worst rows may lose against the best choice of the full budget."""

BUDGET_SHARES = (0.25, 0.375, 0.5, 0.75, 1.0)
"""Budgets that are tried, as shares of the configuration's `topk`."""

BY_VARIANCE = "largest key variance"
BY_FREQUENCY = "lowest rotary frequencies"

JUDGED_ROWS = 128
"""Queries of a text that a site is judged by: those of a passage that was seen before."""


@dataclass
class Sums:
    """Moments of a site's keys, for each key/value head and channel, ``[Hkv, D]``.

    Attributes:
        count: keys seen.
        first: their sum.
        second: the sum of their squares.
    """

    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, keys: Tensor) -> None:
        """Count keys ``[B, Hkv, L, D]``."""
        keys = keys.double()
        self.count += keys.shape[0] * keys.shape[2]
        self.first = self.first + keys.sum((0, 2))
        self.second = self.second + keys.square().sum((0, 2))

    @property
    def variance(self) -> tuple[tuple[float, ...], ...]:
        """The variance of every channel."""
        mean = torch.as_tensor(self.first) / self.count
        found = (torch.as_tensor(self.second) / self.count - mean.square()).clamp(min=0.0)
        return tuple(map(tuple, found.tolist()))


@dataclass
class Observed:
    """What is known of one site while a calibration runs.

    Attributes:
        rotary: the rotary embedding of its keys.
        scale: its softmax scale.
        window: its sliding window.
        config: what it is configured with.
        sums: moments of its keys.
        candidates: channels that token scores may read, by what they are chosen by.
        lost: for each score and budget what it misses, see `judge.missed`.
    """

    rotary: Rotary | str
    scale: float
    window: int | None
    config: SparseAttentionConfig
    sums: Sums = field(default_factory=Sums)
    candidates: dict[str, ChannelSets] = field(default_factory=dict)
    lost: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)

    @property
    def budgets(self) -> list[int]:
        """The budgets that are tried, in blocks in all."""
        least = self.config.init_blocks + 1
        tops = sorted({max(least, round(share * self.config.topk)) for share in BUDGET_SHARES})
        return [top + self.config.local_blocks for top in tops]

    def choose(self) -> None:
        """Choose the channels that token scores may read, once the keys' variance is known."""
        variance = self.sums.variance
        head_dim = len(variance[0])
        dims = self.config.score_dims_of(head_dim)
        self.candidates = {BY_VARIANCE: by_variance(variance, self.rotary, dims)}
        if isinstance(self.rotary, Rotary) and dims < head_dim:
            self.candidates[BY_FREQUENCY] = from_rotary(self.rotary, head_dim, self.config).sets * len(variance)

    def judge(self, q: Tensor, k: Tensor, rows: int) -> None:
        """Measure what scores miss for the last queries of each text, ``[B, Hq, L, D]`` and ``[B, Hkv, L, D]``."""
        for one_q, one_k in zip(q, k, strict=True):
            judged = Rows(one_q[:, -rows:].float(), one_k.float(), self.scale, self.window)
            for name, by_budget in missed(judged, self.config, self.candidates, self.budgets).items():
                for budget, values in by_budget.items():
                    self.lost.setdefault(name, {}).setdefault(budget, []).append(values.cpu())

    def found(self, key: Key) -> SiteCalibration:
        """What was found, with what is recommended."""
        variance = self.sums.variance
        heads = range(len(variance))
        names = list(self.candidates)
        if not self.lost:
            sets = self.candidates[names[0]]
            return SiteCalibration(key[0], key[1], len(variance[0]), sets, variance, names[0])
        lost = {name: {b: torch.cat(v, 1) for b, v in by_budget.items()} for name, by_budget in self.lost.items()}
        full = self.budgets[-1]
        best = [min(names, key=lambda name: worst(lost[name][full][head])) for head in heads]
        losses = {
            "pooled": {budget: worst(lost[PUBLISHED][budget]) for budget in self.budgets},
            "tokens": {
                budget: worst(torch.stack([lost[best[h]][budget][h] for h in heads])) for budget in self.budgets
            },
        }
        scorer = "pooled" if losses["pooled"][full] <= max(TOLERANCE, losses["tokens"][full]) else "tokens"
        limit = max(TOLERANCE, losses[scorer][full])
        enough = min(budget for budget, loss in losses[scorer].items() if loss <= limit)
        return SiteCalibration(
            module=key[0],
            order=key[1],
            head_dim=len(variance[0]),
            channels=tuple(self.candidates[best[head]][head] for head in heads),
            variance=variance,
            chosen_by=" and ".join(dict.fromkeys(best)),
            scorer=scorer,
            topk=enough - self.config.local_blocks,
            missed={name: round(by_budget[full], 6) for name, by_budget in losses.items()},
        )


class Observer:
    """A Dynamo backend that runs graphs as they are, and lets somebody look at the queries and keys of their sites.

    Args:
        config: decides which sites are switchable, and how many channels are wanted.
    """

    def __init__(self, config: SparseAttentionConfig) -> None:
        self.config = config
        self.sites: dict[Key, Observed] = {}
        self.dense: list[str] = []
        self._look: Callable[[Observed, Tensor, Tensor], None] | None = None
        self.__name__ = "infllm_calibration"

    @contextmanager
    def looking(self, look: Callable[[Observed, Tensor, Tensor], None]) -> Iterator[None]:
        """Call a function with every site's queries and keys, ``[B, H, L, D]``, while the model runs."""
        self._look = look
        try:
            yield
        finally:
            self._look = None

    def __call__(self, module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        """The contract of a Dynamo backend."""
        for view in all_graphs(module, held_tensors(module, example_inputs)):
            reader = RotaryReader(Layouts(view.facts))
            for plan in plan_graph(view, self.config):
                if plan.switchable and isinstance(plan.site, AttentionSite):
                    self._watch(view.module.graph, plan, plan.site, reader)
                elif not plan.switchable:
                    self.dense.append(f"{plan.reason.name}: {plan.detail or plan.reason.value}")
            view.module.recompile()
        return module.forward

    def _watch(self, graph: fx.Graph, plan: SitePlan, site: AttentionSite, reader: RotaryReader) -> None:
        """Hand a site's queries and keys on, just before its attention."""
        key, head_dim = key_of(site), int(site.shape(site.key_heads)[3])
        window = None if plan.mask is None or plan.mask.window is None else int(plan.mask.window)
        chosen = plan.config or self.config
        self.sites.setdefault(key, Observed(reader.read(site, head_dim), float(plan.scale or 0.0), window, chosen))
        observed = self.sites[key]

        def observe(q: Tensor, k: Tensor) -> Tensor:
            if self._look is not None and not isinstance(q, FakeTensor):
                self._look(observed, q.detach(), k.detach())
            return q

        emitter = Emitter(graph)
        with graph.inserting_before(site.node):
            operands = [emitter.operand(site.node, each, site.query) for each in (site.query, site.key_heads)]
            graph.call_function(observe, tuple(operands))
        emitter.keep({})


def run_calibration(
    model: Callable[..., Any], observer: Observer, texts: Sequence[Tensor], tell: Callable[[str, int, int], None]
) -> tuple[SiteCalibration, ...]:
    """Look at a model's keys on some texts, choose channels, and judge scores on passages that are repeated.

    Args:
        model: the model, compiled with the observer as its backend; takes ids ``[1, L]``.
        observer: the observer.
        texts: ids ``[1, L]``, of equal length.
        tell: is called with what is done, how many steps are, and how many there are.

    Returns:
        What was found at each site, in the order of the graph.

    Raises:
        CalibrationError: no site is switchable.
    """
    length = texts[0].shape[1]
    rows = min(JUDGED_ROWS, length // 8)
    judged = texts[:: max(1, len(texts) // 2)][:2] if length > observer.config.visited_tokens else []
    steps = len(texts) + len(judged)
    for number, text in enumerate(texts):
        tell("variance of keys", number, steps)
        with observer.looking(lambda observed, _q, k: observed.sums.add(k)):
            model(text)
    if not observer.sites:
        why = "; ".join(sorted(set(observer.dense))) or "its graphs have no attention"
        raise CalibrationError(f"there is nothing to calibrate, no attention site is switchable: {why}")
    for observed in observer.sites.values():
        observed.choose()
    for number, text in enumerate(judged):
        tell("passages that are repeated", len(texts) + number, steps)
        with observer.looking(lambda observed, q, k: observed.judge(q, k, rows)):
            model(with_repetition(text, rows, number))
    tell("done", steps, steps)
    return tuple(observed.found(key) for key, observed in observer.sites.items())


def with_repetition(ids: Tensor, rows: int, seed: int) -> Tensor:
    """A text whose last tokens repeat a passage of its first half, as a sharp test of what attention looks up.

    Args:
        ids: ``[1, L]``.
        rows: tokens that are repeated.
        seed: chooses the passage.
    """
    half = ids.shape[1] // 2
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(0, max(1, half - rows), (), generator=generator))
    return torch.cat([ids[:, :-rows], ids[:, start : start + rows]], dim=1)
