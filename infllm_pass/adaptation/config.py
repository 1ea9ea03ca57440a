"""What a training run is: data shares, sparse attention, optimiser, checkpoints and evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from infllm_pass.adaptation.rows import Bucket
from infllm_pass.adaptation.tasks import TRAINING_TASKS
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import ConfigError
from infllm_pass.evaluation.evaluate import default_config
from infllm_pass.evaluation.tasks import PERPLEXITY, TaskSettings

Attention = Literal["sparse", "dense"]
Precision = Literal["bfloat16", "float32"]
RotaryKind = Literal["yarn", "longrope", "linear", "dynamic"]

MOST_BUCKETS = 4
"""Each length is a graph of its own, beside those of evaluations, and Dynamo keeps eight of a function."""

EVALUATED = (PERPLEXITY, "needle_single", "needle_multikey")
"""Tasks of evaluations, if none are named."""


def default_sparse(longest: int) -> SparseAttentionConfig:
    """What is selected if nobody says, in rows of up to so many tokens; the buckets decide from which length on."""
    return replace(default_config(longest), dense_len="auto")


@dataclass(frozen=True)
class AdaptationConfig:
    """How a model is trained on.

    Attributes:
        buckets: lengths of rows, and the share of the steps that each gets; shares add up to 1.
        tokens_per_step: tokens between two updates of the weights, a multiple of every length.
        steps: updates of the weights.
        task_share: share of the rows that hold a synthetic task.
        tasks: names out of `tasks.TRAINING_TASKS`.
        seed: of the rows' order, the tasks and dropout.
        attention: "sparse", or "dense" for a control that sees the same rows.
        sparse: what is selected, and from which length on, as a configuration or a dict of its fields; None:
            `default_config` of the longest bucket. ``dense_len="auto"``, also with None: rows, and documents in rows,
            of more tokens than a query visits and than the second longest bucket has.
        learning_rate: the highest; it rises for `warmup` steps and falls to 0 along a cosine.
        warmup: steps.
        weight_decay: of AdamW.
        max_grad_norm: larger gradients are scaled to it; 0: none are.
        accumulation: parts that a step's rows are computed in, one after the other.
        gradient_checkpointing: compute layers again in the backward pass, instead of keeping what is in them.
        precision: "bfloat16", by autocast over float32 weights, or "float32".
        backend: what ``torch.compile`` hands graphs to.
        lora: rank of adapters that are trained in place of the weights (PEFT); 0: the weights are trained.
        distill: weight of the Kullback-Leibler divergence from the model's own dense mode, 0 to 1; the loss on the text
            has the rest. 0: none.
        extend_to: positions that the rotary embedding is extended to before training; None: as it is.
        extend_kind: how, see `rotary.extend_positions`.
        checkpoint_every: steps from one checkpoint to the next; 0: none.
        keep: how many checkpoints are kept, at least 2.
        log_every: steps from one reading of the losses to the next.
        evaluate_every: steps from one evaluation to the next; 0: only before and after.
        evaluation: what evaluations ask for; None: perplexity and needles at the longest bucket's length.
        workers: processes that make rows beside the training.

    Raises:
        ConfigError: a value is out of its range.
    """

    buckets: tuple[Bucket, ...] = (Bucket(2048, 0.5), Bucket(8192, 0.5))
    tokens_per_step: int = 32768
    steps: int = 1000
    task_share: float = 0.1
    tasks: tuple[str, ...] = tuple(TRAINING_TASKS)
    seed: int = 0
    attention: Attention = "sparse"
    sparse: SparseAttentionConfig | Mapping[str, Any] | None = None
    learning_rate: float = 1e-4
    warmup: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: Precision = "bfloat16"
    backend: str = "inductor"
    lora: int = 0
    distill: float = 0.0
    extend_to: int | None = None
    extend_kind: RotaryKind = "yarn"
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 10
    evaluate_every: int = 0
    evaluation: TaskSettings | None = field(default=None)
    workers: int = 1

    def __post_init__(self) -> None:
        self._check_ranges()
        lengths = [bucket.length for bucket in self.buckets]
        if not 1 <= len(lengths) <= MOST_BUCKETS or len(set(lengths)) < len(lengths):
            raise ConfigError("buckets", lengths, f"one to {MOST_BUCKETS} different lengths")
        if not math.isclose(sum(bucket.share for bucket in self.buckets), 1, abs_tol=1e-6):
            raise ConfigError("buckets", [bucket.share for bucket in self.buckets], "shares that add up to 1")
        for length in lengths:
            if self.tokens_per_step % (length * self.accumulation):
                raise ConfigError(
                    "tokens_per_step",
                    self.tokens_per_step,
                    f"a multiple of every length, {self.accumulation} times where steps are accumulated: "
                    f"{self.accumulation} x {length} does not fit",
                )
        sparse = default_sparse(self.longest) if self.sparse is None else SparseAttentionConfig.coerce(self.sparse)
        if sparse.dense_len == "auto":
            shorter = max((length for length in lengths if length < self.longest), default=0)
            sparse = sparse.with_dense_len(max(shorter, min(sparse.visited_tokens, self.longest - 1)) + 1)
        if self.attention == "sparse" and self.longest < sparse.switch_length:
            raise ConfigError(
                "dense_len",
                sparse.dense_len,
                f"at most the longest length, {self.longest}: nothing would be sparse",
            )
        object.__setattr__(self, "sparse", sparse)
        if self.evaluation is None:
            object.__setattr__(self, "evaluation", TaskSettings(tasks=EVALUATED, lengths=(self.longest,)))

    def _check_ranges(self) -> None:
        for name, words in (("attention", Attention), ("precision", Precision), ("extend_kind", RotaryKind)):
            if getattr(self, name) not in get_args(words):
                raise ConfigError(name, getattr(self, name), "one of " + ", ".join(map(repr, get_args(words))))
        least = {"tokens_per_step": 1, "steps": 1, "accumulation": 1, "keep": 2, "log_every": 1}
        counts = ("warmup", "lora", "checkpoint_every", "evaluate_every", "workers")
        for name, smallest in {**least, **dict.fromkeys(counts, 0)}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(name, value, f"an integer of at least {smallest}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(name, value, "a finite number of at least 0")
        for name in ("task_share", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(name, getattr(self, name), "0 to 1")
        if self.distill and self.attention == "dense":
            raise ConfigError("distill", self.distill, "0 for a dense control, which would be its own teacher")

    @property
    def longest(self) -> int:
        """Tokens of the longest rows."""
        return max(bucket.length for bucket in self.buckets)

    @property
    def sparse_config(self) -> SparseAttentionConfig:
        """`sparse`, which is always known once the configuration is made, with a number as ``dense_len``."""
        return SparseAttentionConfig.coerce(self.sparse)

    @property
    def task_settings(self) -> TaskSettings:
        """`evaluation`, which is always known once the configuration is made."""
        return self.evaluation or TaskSettings()

    @property
    def micro_batches(self) -> int:
        """Batches of a run: `accumulation` for each step."""
        return self.steps * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaptationConfig:
        """Build from what `to_dict` gave, also after it was JSON."""
        evaluation: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["evaluation"].items()
        }
        return cls(
            **{
                **values,
                "buckets": tuple(Bucket(**bucket) for bucket in values["buckets"]),
                "tasks": tuple(values["tasks"]),
                "sparse": SparseAttentionConfig.from_dict(values["sparse"]),
                "evaluation": TaskSettings(**evaluation),
            }
        )
