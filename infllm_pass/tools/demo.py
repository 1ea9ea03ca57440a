"""The demo: SmolLM2-135M, dense and sparse with both scorers, on text from the standard library."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import infllm_pass
from infllm_pass.calibration.record import Calibration
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import ConfigError, DeviceError
from infllm_pass.evaluation.needles import QUERIES, needle_multiquery
from infllm_pass.evaluation.samples import Sample, Writer
from infllm_pass.evaluation.tasks import haystacks
from infllm_pass.evaluation.texts import Text, manual
from infllm_pass.lowering.export.atomic_file import written_whole
from infllm_pass.plan.length_guard import Branch
from infllm_pass.tables import Column, FittedTable, output_console
from infllm_pass.tools.checkpoint import SMOLLM2, corpus, find_checkpoint, load_tokenizer
from infllm_pass.tools.demo_worker import Job, LayerPicture, SideResult, Tell, measure_and_draw, measure_side, run_apart

LAYERS = 30
POSITIONS = 8192
"""Sizes of the demo's model: its layers, and the longest text that it was trained on."""

LEAST_TOKENS = 256

DENSE, SPARSE, PUBLISHED = SIDES = ("dense", "sparse", "published")
"""The sides: dense attention, blocks chosen by scores of single tokens, and by the published score of pooled keys."""

ROOM_OF_NEEDLE = 128
"""Tokens of a sample for each hidden number."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs.

    Attributes:
        config: what sparse attention selects; ``dense_len`` at most `tokens`. Its scorer is not read: both run.
        tokens: length of the text, 256 to 8192.
        out: folder for the figures and pictures; it is made if need be.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        layer: the layer to draw, 0 to 29.
        generate: tokens to generate.
        calibration: file of a calibration; None: channels are read off the graph.

    Raises:
        ConfigError: a value is out of its range.
        DeviceError: the device is not there.
    """

    config: SparseAttentionConfig
    tokens: int = POSITIONS
    out: Path = Path("out")
    device: str = "auto"
    layer: int = 20
    generate: int = 24
    calibration: Path | None = None

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("tokens", self.tokens, LEAST_TOKENS, POSITIONS),
            ("layer", self.layer, 0, LAYERS - 1),
            ("generate", self.generate, 1, self.tokens // 2),
        ):
            if not least <= value <= most:
                raise ConfigError(name, value, f"{least} to {most}")
        if self.config.switch_length > self.tokens:
            raise ConfigError(
                "dense_len", self.config.dense_len, f"at most the {self.tokens} tokens, so that a side is sparse"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("device 'cuda' was asked for, and torch sees no GPU: use --device cpu")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError("out", str(self.out), "a folder, or a path where one can be made")

    @property
    def resolved_device(self) -> str:
        """The device as "cpu" or "cuda"."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


def run_demo(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Measure both sides, print them side by side, and write figures and pictures.

    Args:
        options: what to run.
        console: where to print; None: the terminal.

    Returns:
        The figures, as written to ``demo.json``.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        CalibrationError: the calibration cannot be read, or is that of another model.
        MissingDependencyError: transformers, gguf or matplotlib is not installed.
        MeasurementError: a measuring process died.
    """
    console = console or output_console()
    begin = time.perf_counter()
    find_checkpoint()
    config = options.config
    calibration = None if options.calibration is None else Calibration.load(options.calibration)
    console.print(
        f"model   [bold]{SMOLLM2.name}[/bold], license {SMOLLM2.license}, {SMOLLM2.source}; 4-bit weights "
        f"from the package {SMOLLM2.package} {SMOLLM2.version}",
        highlight=False,
    )
    with _stage(console, "text") as tell:
        tell("reading the text", 0, 0)
        tokenizer = load_tokenizer()
        ids = corpus(tokenizer, options.tokens)
        sample = hidden_numbers(tokenizer, options.tokens)
    chosen = replace(config, scorer="tokens")
    text, device = tuple(ids[0].tolist()), options.resolved_device
    job = Job(text, sample, chosen, device, options.generate, options.layer, calibration)
    quiet = replace(job, generate=0)
    _print_plan(console, job)
    sides: dict[str, SideResult] = {}
    picture: LayerPicture
    with _stage(console, SPARSE) as tell:
        sides[SPARSE], picture = run_apart(measure_and_draw, job, tell=tell)
    console.print(sides[SPARSE].report)
    with _stage(console, DENSE) as tell:
        sides[DENSE] = run_apart(measure_side, quiet, Branch.DENSE, tell=tell)
    with _stage(console, PUBLISHED) as tell:
        published = replace(quiet, config=replace(config, scorer="pooled"))
        sides[PUBLISHED] = run_apart(measure_side, published, Branch.SPARSE, tell=tell)

    figures = _figures(options, job, sides, picture)
    figures["wall_s"] = time.perf_counter() - begin
    options.out.mkdir(parents=True, exist_ok=True)
    image = options.out / f"selection-layer-{options.layer}.png"
    with written_whole(image) as file:
        file.write_bytes(picture.png)
    with written_whole(options.out / "demo.json") as file:
        file.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(_comparison(figures))
    _print_generation(console, tokenizer, job, sides[SPARSE])
    console.print(
        f"layer {options.layer}: the visited blocks hold {100 * picture.selected_mass:.1f} % of dense attention, "
        f"as many initial and most recent blocks {100 * picture.recent_mass:.1f} %"
    )
    written = f"written: {image}, {options.out / 'demo.json'}; {figures['wall_s']:.0f} s in all"
    console.print(written, soft_wrap=True)  # a path that is broken over lines cannot be copied
    return figures


def hidden_numbers(tokenizer: Any, tokens: int) -> Sample:
    """Numbers hidden in the text, as many as a sample of `tokens` has room for, at most `QUERIES`."""
    writer = Writer(tokenizer, ())
    (text,) = haystacks(writer, [Text("manual", manual())])
    asked = max(1, min(QUERIES, tokens // ROOM_OF_NEEDLE))
    return needle_multiquery(writer, text, tokens, digits=7, seed=0, asked=asked)


def _print_plan(console: Console, job: Job) -> None:
    """What is going to be run."""
    config, tokens = job.config, len(job.ids)
    blocks = config.geometry.num_blocks(tokens)
    visited = min(config.selected_blocks, blocks)
    forced = config.init_blocks + config.local_blocks + 1
    console.print(
        f"text    the first {tokens} tokens of pydoc_data.topics (Python {platform.python_version()})\n"
        f"sparse  a query visits at most {visited} of {blocks} blocks of {config.block_size} tokens: "
        f"{config.init_blocks} initial, {config.local_blocks} + 1 local, "
        f"{max(0, visited - forced)} selected by score\n"
        f"device  {_device_name(job.device)}, {str(job.dtype).removeprefix('torch.')}"
    )
    if visited == blocks:
        console.print("[yellow]the budget covers the whole text: sparse equals dense; lower --topk[/yellow]")


@contextmanager
def _stage(console: Console, name: str) -> Iterator[Tell]:
    """A spinner with the elapsed time, and a bar where the amount of work is known."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"{name}: {what}", completed=done, total=total or None)

        yield tell


def _figures(options: DemoOptions, job: Job, sides: Mapping[str, SideResult], picture: LayerPicture) -> dict[str, Any]:
    """All figures as plain data; times in seconds, memory in bytes."""
    import transformers

    dense = sides[DENSE]
    return {
        "model": SMOLLM2.name,
        "checkpoint": {
            "package": f"{SMOLLM2.package}=={SMOLLM2.version}",
            "sha256": SMOLLM2.sha256,
            "license": SMOLLM2.license,
        },
        "tokens": len(job.ids),
        "needles": len(job.sample.answers),
        "config": job.config.to_dict(),
        "selected_blocks": options.config.selected_blocks,
        "blocks": options.config.geometry.num_blocks(len(job.ids)),
        "device": _device_name(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "infllm_pass": infllm_pass.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        DENSE: _side_figures(dense),
        **{side: _side_figures(sides[side]) | _agreement(dense, sides[side]) for side in (SPARSE, PUBLISHED)},
        "layer": {
            "number": job.layer,
            "selected_mass": picture.selected_mass,
            "recent_mass": picture.recent_mass,
        },
        "generated": list(sides[SPARSE].generated),
        "report": sides[SPARSE].report.to_dict(),
    }


def _agreement(dense: SideResult, sparse: SideResult) -> dict[str, float]:
    """How often both sides expect the same next token."""
    same = [a == b for a, b in zip(dense.top1, sparse.top1, strict=True)]
    half = same[len(same) // 2 :]
    return {"top1_agreement": sum(same) / len(same), "top1_agreement_last_half": sum(half) / len(half)}


def _side_figures(side: SideResult) -> dict[str, float]:
    half = len(side.top1) // 2
    return {
        "perplexity": _perplexity(side.losses),
        "perplexity_last_half": _perplexity(side.losses[half:]),
        "first_call_s": side.first_call_s,
        "compile_s": side.compile_s,
        "forward_s": side.forward_s,
        "peak_bytes": side.peak_bytes,
        "needles_found": sum(score.exact for score in side.needles),
        "needles_nll": math.fsum(score.nll for score in side.needles) / len(side.needles),
    }


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(math.fsum(losses) / len(losses))


_COMPARED = (
    ("perplexity", "perplexity", "{:.3f}", 1.0),
    ("perplexity_last_half", "perplexity, last half of the text", "{:.3f}", 1.0),
    ("needles_found", "hidden numbers found, of {needles}", "{:.0f}", 1.0),
    ("needles_nll", "their negative log-likelihood (nats)", "{:.3f}", 1.0),
    ("top1_agreement", "same likeliest next token as dense", "{:.1f} %", 100.0),
    ("top1_agreement_last_half", "same likeliest next token, last half", "{:.1f} %", 100.0),
    ("forward_s", "forward, compiled (s)", "{:.2f}", 1.0),
    ("compile_s", "compiling, once (s)", "{:.1f}", 1.0),
    ("peak_bytes", "peak memory (MB)", "{:.0f}", 1e-6),
)
"""Figures of the comparison: key, title, format and factor."""


def comparison_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The sides next to each other as plain data, a row for each figure."""
    return [{"figure": key, **{side: figures[side].get(key) for side in SIDES}} for key, *_ in _COMPARED]


def _comparison(figures: dict[str, Any]) -> FittedTable:
    """The sides next to each other."""
    rows = []
    for values, (_, title, form, factor) in zip(comparison_rows(figures), _COMPARED, strict=True):
        sides = {side: form.format(factor * values[side]) for side in SIDES if values[side] is not None}
        rows.append({"figure": title.format(needles=figures["needles"])} | sides)
    headings = {DENSE: "dense", SPARSE: "sparse, token scores", PUBLISHED: "sparse, published score"}
    columns = (
        Column("figure", "", folds=True, right=False),
        *(Column(side, headings[side]) for side in SIDES),
    )
    return FittedTable(columns, rows, f"{figures['tokens']} tokens, all compiled")


def _print_generation(console: Console, tokenizer: Any, job: Job, sparse: SideResult) -> None:
    """The end of the prompt, what was generated after it, and how the text really goes on."""
    start = len(job.ids) - job.generate
    prompt, text, truth = (
        escape(tokenizer.decode(list(ids)))
        for ids in (job.ids[max(0, start - 40) : start], sparse.generated, job.ids[start:])
    )
    console.print(
        f"\n[bold]generation[/bold]: the prefill of {start} tokens ran sparse; the {job.generate} new tokens were "
        "decoded by the original model, dense, on the cache that it left",
        highlight=False,
    )
    for name, shown, style in (("prompt", "…" + prompt, "dim"), ("generated", text, "green"), ("text", truth, "dim")):
        console.print(f"[bold]{name:>10}[/bold]  [{style}]{' '.join(shown.split())}[/{style}]", highlight=False)
    console.print()


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
