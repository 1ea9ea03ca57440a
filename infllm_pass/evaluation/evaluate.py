"""Dense attention against sparse configurations, on one model."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from importlib import metadata
from os import PathLike
from typing import Any

import torch
from torch import nn

from infllm_pass.calibration.record import Calibration
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import ConfigError, EvaluationError, UnsupportedModelError
from infllm_pass.evaluation.density import mean_density
from infllm_pass.evaluation.locality import KeptBlocks, blocks_kept
from infllm_pass.evaluation.results import DENSE, Evaluation, SideRun, summarised
from infllm_pass.evaluation.samples import Sample, Writer
from infllm_pass.evaluation.scoring import AnswerScore, Scorer, TextLosses
from infllm_pass.evaluation.tasks import PERPLEXITY, TaskSettings, draw_samples, haystacks, windows
from infllm_pass.evaluation.texts import Text, standard_texts
from infllm_pass.frontend.api import ConfigLike, original_of, report, sparsified_config, sparsify
from infllm_pass.frontend.calibrating import evaluation_mode
from infllm_pass.frontend.compile_settings import recompiles_are_isolated
from infllm_pass.rewrite.report import SiteReport

Tell = Callable[[str, int, int], None]
"""Takes what is being done, how many passes are done, and out of how many."""


def default_config(length: int) -> SparseAttentionConfig:
    """A configuration that visits about a fifth of the blocks of a text, and is sparse at every length.

    Args:
        length: tokens of the text; from 1024 on, its sixteenth is the local window, and its eighth is chosen by score.
    """
    size = SparseAttentionConfig().block_size
    local = max(1, length // (16 * size))
    return SparseAttentionConfig(window_size=local * size, topk=2 * local + 2, dense_len=0)


def evaluate(
    model: Any,
    tokenizer: Any,
    configs: ConfigLike | Sequence[ConfigLike] = None,
    *,
    settings: TaskSettings | None = None,
    texts: Sequence[Text] | None = None,
    prefix: Sequence[int] | None = None,
    calibration: Calibration | str | PathLike[str] | None = None,
    backend: str = "eager",
    generate: bool = False,
    locality: bool = True,
    tell: Tell | None = None,
) -> Evaluation:
    """Measure what a causal language model loses by sparse attention.

    The model runs without dropout. Every prompt and its answers are one forward pass: an answer is right if each of its
    tokens is the likeliest after the prompt and the right answers before it, which is when greedy decoding gives it.
    Nothing is computed before everything that can be refused was looked at.

    Args:
        model: a causal language model of transformers, plain or compiled, or one that `sparsify` returned, whose own
            configuration is then compared with dense.
        tokenizer: its tokenizer.
        configs: what to compare with dense: one configuration or several, in the forms that `sparsify` takes; None:
            `default_config` of the longest sample, or the sparsified model's own. ``dense_len="auto"`` is taken for 0
            in them: it says where sparse attention is faster, and the question is what it loses.
        settings: tasks, lengths, depths, samples and seed; None: the defaults.
        texts: what to read and to hide things in, see `texts.read_texts`; None: `texts.standard_texts`.
        prefix: token ids before every text; None: those that the tokenizer puts there.
        calibration: a `Calibration` of the model, or a file that holds one: every configuration with token scores is
            compared without it and with it.
        backend: what ``torch.compile`` hands the sparse graphs to. The figures are of quality, so that nothing is
            gained by compiling; "inductor" measures what it computes.
        generate: also generate text after every prompt, with the sparse model's decode steps, and look for the answers.
        locality: also look at the sparse sides' selections in the longest texts, one more pass for each, uncompiled.
        tell: called before every pass.

    Returns:
        The figures.

    Raises:
        ConfigError: a configuration or setting is out of its range, or given twice.
        CalibrationError: the calibration cannot be read, or is that of another model.
        EvaluationError: a text is empty or too short, a task does not fit a length, or the model has fewer positions.
        UnsupportedModelError: `model` is no causal language model with token ids for inputs.
        NoAttentionSiteError: nothing in the model became switchable.
    """
    chosen = settings or TaskSettings()
    original, _ = original_of(model)
    if not isinstance(original, nn.Module) or not hasattr(original, "config"):
        raise UnsupportedModelError(
            f"evaluate takes a causal language model of transformers, not a {type(original).__name__}"
        )
    if generate and not callable(getattr(original, "generate", None)):
        raise UnsupportedModelError(f"{type(original).__name__} has no generate(): evaluate it without generation")
    own = sparsified_config(model)
    for name, value in (("configs", configs), ("calibration", calibration)):
        if own is not None and value is not None:
            raise ConfigError(name, value, "None for a sparsified model, or the plain model")
    candidates = [own] if own is not None else _configurations(configs, max(chosen.lengths))
    named = _named(candidates)
    measured = _checked_calibration(calibration, original, candidates)
    _check_model(original, chosen, candidates)
    writer = Writer(tokenizer, prefix)
    stacks = haystacks(writer, standard_texts() if texts is None else texts)
    read = windows(writer, stacks, chosen.lengths) if PERPLEXITY in chosen.tasks else {}
    samples = draw_samples(writer, stacks, chosen)

    sides: list[tuple[str, SparseAttentionConfig, Calibration | None]] = [(n, c, None) for n, c in named.items()]
    if measured is not None:
        sides += [(f"{n} calibrated", c, measured) for n, c in named.items() if c.scorer == "tokens"]
    passes = _Passes(read, samples, writer if generate else None, tell, 1 + len(sides), locality)
    with evaluation_mode(original):
        runs = [passes.run(DENSE, original, original, None)]
        for name, config, known in sides:
            if own is None and not recompiles_are_isolated():
                torch.compiler.reset()  # or the graphs of earlier sides use up the limit, and later ones are refused
            compiled = torch.compile(original, backend=backend)
            run = model if own is not None else sparsify(compiled, config, strict=True, calibration=known)
            runs.append(passes.run(name, run, original, config))
    return summarised(_facts(original, chosen, [each.name for each in stacks], backend), runs, samples, chosen.depths)


class _Passes:
    """The forward passes of each side."""

    def __init__(
        self,
        texts: Mapping[tuple[str, int], Sequence[int]],
        samples: Sequence[Sample],
        generating: Writer | None,
        tell: Tell | None,
        sides: int,
        locality: bool,
    ) -> None:
        self.texts = texts
        self.samples = samples
        self.generating = generating
        self._tell = tell or (lambda *_: None)
        self._done = 0
        longest = max((length for _, length in texts), default=0)
        self._longest = [place for place in texts if place[1] == longest and locality]
        self._all = sides * (len(texts) + len(samples) * (1 if generating is None else 2))
        self._all += (sides - 1) * len(self._longest)

    def run(
        self, name: str, run: Callable[..., Any], original: nn.Module, config: SparseAttentionConfig | None
    ) -> SideRun:
        """Measure one side."""
        begin = time.perf_counter()
        scorer = Scorer(run, original)
        losses: dict[tuple[str, int], TextLosses] = {}
        for (text, length), ids in self.texts.items():
            self._next(f"{name}: reading {length} tokens of {text}")
            losses[text, length] = scorer.losses(ids)
        answers: list[list[AnswerScore]] = []
        for sample in self.samples:
            self._next(f"{name}: {sample.task}, {len(sample.ids)} tokens")
            answers.append(scorer.answers(sample))
        generated: list[list[bool]] = []
        if self.generating is not None:
            for sample in self.samples:
                self._next(f"{name}: {sample.task}, {len(sample.ids)} tokens, generating")
                generated.append(scorer.generated(sample, self.generating.decode))
        kept: dict[tuple[str, int], KeptBlocks] = {}
        for text, length in [] if config is None else self._longest:
            self._next(f"{name}: blocks kept from token to token, {length} tokens of {text}")
            blocks = blocks_kept(run, original, self.texts[text, length])
            if blocks is not None:
                kept[text, length] = blocks
        found = [] if config is None else report(run).sites
        switchable = sum(site.decision == "switchable" for site in found)
        return SideRun(
            name=name,
            config=None if config is None else config.to_dict(),
            sites=None if config is None else (switchable, len(found)),
            density=partial(mean_density, _site_configs(config, found)),
            texts=losses,
            answers=answers,
            generated=generated,
            kept=kept,
            seconds=time.perf_counter() - begin,
        )

    def _next(self, what: str) -> None:
        self._tell(what, self._done, self._all)
        self._done += 1


def _site_configs(
    config: SparseAttentionConfig | None, sites: Sequence[SiteReport]
) -> Counter[SparseAttentionConfig | None]:
    """How many sites have which configuration; None is dense."""
    if config is None:
        return Counter([None])
    return Counter(replace(config, **site.config) if site.decision == "switchable" else None for site in sites)


def _configurations(configs: ConfigLike | Sequence[ConfigLike], longest: int) -> list[SparseAttentionConfig]:
    if configs is None:
        return [default_config(longest)]
    given = configs if isinstance(configs, Sequence) else [configs]
    if not given:
        raise ConfigError("configs", configs, "at least one configuration, or None for the default")
    coerced = map(SparseAttentionConfig.coerce, given)
    return [config.with_dense_len(0) if config.dense_len == "auto" else config for config in coerced]


def _checked_calibration(
    calibration: Calibration | str | PathLike[str] | None,
    model: nn.Module,
    configs: Sequence[SparseAttentionConfig],
) -> Calibration | None:
    if calibration is None:
        return None
    if not any(config.scorer == "tokens" for config in configs):
        raise ConfigError("calibration", calibration, 'a configuration with scorer="tokens", which reads it')
    found = Calibration.coerce(calibration)
    found.check_model(model)
    return found


def _named(configs: Sequence[SparseAttentionConfig]) -> dict[str, SparseAttentionConfig]:
    """Configurations by a name: the scorer, and the fields in which they differ."""
    differing = [
        field.name
        for field in fields(SparseAttentionConfig)
        if field.name != "scorer" and len({getattr(config, field.name) for config in configs}) > 1
    ]
    named: dict[str, SparseAttentionConfig] = {}
    for config in configs:
        name = " ".join([config.scorer, *(f"{key}={getattr(config, key)}" for key in differing)])
        if name in named:
            raise ConfigError("configs", name, "configurations that differ")
        named[name] = config
    return named


def _check_model(model: nn.Module, settings: TaskSettings, configs: Sequence[SparseAttentionConfig]) -> None:
    """Refuse lengths that the model has no positions for, and channels that its heads do not have."""
    own = _text_config(model)
    positions = positions_of(model)
    longest = max(settings.lengths)
    if positions is not None and longest > positions:
        raise EvaluationError(
            f"a length of {longest} tokens was asked for, and {type(model).__name__} has {positions} positions: "
            f"ask for at most {positions}"
        )
    heads, hidden = getattr(own, "num_attention_heads", None), getattr(own, "hidden_size", None)
    size = getattr(own, "head_dim", None) or (hidden // heads if isinstance(heads, int) and hidden else None)
    for each in configs:
        if isinstance(size, int) and each.scorer == "tokens":
            each.score_dims_of(size)


def positions_of(model: nn.Module) -> int | None:
    """How many positions a model of transformers says that it has; None where it says nothing, or adds some itself.

    A rotary embedding of the kind ``dynamic`` scales itself from ``max_position_embeddings`` on.
    """
    own = _text_config(model)
    positions = getattr(own, "max_position_embeddings", None)
    grows = (getattr(own, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    return positions if isinstance(positions, int) and not grows else None


def _text_config(model: nn.Module) -> Any:
    """The configuration of a model's text part."""
    config: Any = model.config
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def _facts(model: nn.Module, settings: TaskSettings, texts: Sequence[str], backend: str) -> dict[str, Any]:
    parameter = next(model.parameters())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "model": type(model).__name__,
        "device": name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "backend": backend,
        "texts": list(texts),
        "settings": asdict(settings),
        "versions": {
            "infllm_pass": metadata.version("infllm-pass"),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
    }
