"""The command ``infllm-pass``: demo, explain, calibrate, evaluate, adapt, export, tune, bench and lm-eval."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NoReturn, get_args

import infllm_pass
from infllm_pass.config import WORDS, SparseAttentionConfig
from infllm_pass.errors import ConfigError, InfLLMError
from infllm_pass.kernels.geometry import ScorerName
from infllm_pass.tools.option_types import length_or_auto, natural, positive
from infllm_pass.tools.output import OutputFormat, add_format_options, notes_console, print_data

BAD_INPUT = 2
INTERRUPTED = 130

_FIELD_HELP = {
    "kernel_size": "tokens averaged into one compressed key",
    "kernel_stride": "tokens between the starts of two compressed keys",
    "block_size": "tokens in one key block",
    "init_blocks": "blocks at the start that every query visits",
    "window_size": "tokens before a query's own block that it always visits",
    "topk": "blocks visited beside window_size / block_size, initial and own block included",
    "dense_len": "key length from which attention is sparse, 0: always, auto: where it breaks even",
    "lse": "normaliser of block scores",
    "query_block": "adjacent queries that share one selection",
    "scorer": "what blocks are scored by",
    "score_dims": "channels that the scorer tokens reads, default a quarter of the head, 32 of 64",
    "score_dtype": "what it stores these channels of the keys in",
    "agnostic_topk": "visited blocks that the keys' bias chooses, whatever the query: NOSA",
}

_FIELD_WORDS = {name: get_args(words) for name, words in WORDS.items()}

_EXAMPLES = """\
examples:
  infllm-pass demo                               SmolLM2-135M on 8192 tokens, dense and sparse, in out/
  infllm-pass demo --tokens 2048 --window-size 128 --topk 6
  infllm-pass explain ~/models/Llama-3.1-8B      which attention sites become switchable, and why not
  infllm-pass explain ./model --length 32768 --dense-len 16384 --json
  infllm-pass explain ./model --csv > sites.csv
  infllm-pass explain my_package.models:build    the model that a function returns
  infllm-pass evaluate                           perplexity, needles and more of SmolLM2-135M, dense and sparse
  infllm-pass evaluate ./model --scorer tokens pooled --topk 10 18 --tasks perplexity needle_single
  infllm-pass adapt SmolLM2-135M-Instruct texts/ --out adapted --scorer pooled --lengths 2048 8192
  infllm-pass calibrate SmolLM2-135M-Instruct --text book.txt --out smollm2.json
  infllm-pass export SmolLM2-135M-Instruct --to onnx --out smollm2.onnx
  infllm-pass lm-eval run --model infllm --model_args pretrained=./model,topk=18 --tasks ruler_vt
  infllm-pass bench                              list the benchmarks of a checkout
  infllm-pass bench cpu_prefill --help
  infllm-pass bench prefill --quick              kernels against dense attention, on a CUDA device
  infllm-pass bench --decode                     a decode step over a cache, on a CUDA device or on the CPU
  infllm-pass bench generate --fill random       a whole model's tokens over a static cache, on a CUDA device
"""


class _BadArguments(Exception):
    """What argparse found wrong; never leaves this module."""


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise _BadArguments(f"{self.prog}: {message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, 2 for bad arguments or a refused input, 130 after an interrupt, or a benchmark's own.
    """
    try:
        options = _parser().parse_args(argv)
        code: int = options.run(options)
    except _BadArguments as error:
        return _fail(str(error))
    except InfLLMError as error:
        return _fail(f"infllm-pass: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as leaving:  # argparse, after --help and --version
        return int(leaving.code or 0)
    return code


def _fail(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="infllm-pass",
        description="Dense/sparse switchable attention (InfLLM-V2) for dense models, as a torch.compile pass.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"infllm-pass {infllm_pass.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_explain(commands)
    _add_calibrate(commands)
    _add_evaluate(commands)
    _add_adapt(commands)
    _add_export(commands)
    _add_tune(commands)
    _add_bench(commands)
    _add_lm_eval(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="compare dense and sparse attention on a small public model",
        description="Runs SmolLM2-135M, dense, sparse by token scores and sparse by the published score, on text that "
        "comes with Python; prints perplexity, hidden numbers found, agreement, time and memory side by side, "
        "generates a little text, and writes demo.json and a picture of the selected blocks. Takes some minutes on a "
        "CPU.",
    )
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N", help="length of the text (8192)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where results go (out)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--layer", type=natural, default=20, metavar="N", help="layer to draw, from 0 (20)")
    _add_calibration(parser)
    add_format_options(parser)
    defaults = {"window_size": "512", "topk": "18", "dense_len": "8192, or the text's length if shorter"}
    _add_config(parser, defaults, without=("scorer",))
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from infllm_pass.tools.demo import DemoOptions, comparison_rows, run_demo

    base = SparseAttentionConfig(window_size=512, topk=18, dense_len=min(8192, options.tokens))
    chosen = DemoOptions(
        _configured(base, options),
        tokens=options.tokens,
        out=options.out,
        device=options.device,
        layer=options.layer,
        calibration=options.calibration,
    )
    figures = run_demo(chosen, notes_console(options.format))
    if options.format is not OutputFormat.TABLE:
        print_data(options.format, figures, comparison_rows(figures))
    return 0


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="report every attention site of a model",
        description="Builds the architecture of a local Hugging Face folder from its config.json, without "
        "weights, or the model that a function returns, traces it at one length, and reports which attention sites "
        "become switchable and why others stay dense. A sparse_config in config.json is used; options override its "
        "fields.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="model folder, its config.json, or module:callable for a function that returns a torch.nn.Module, alone "
        "or with its inputs as (module, inputs); the current folder is searched for the module",
    )
    parser.add_argument("--length", type=positive, metavar="N", help="tokens of the input (dense_len)")
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="rows of the input (1)")
    parser.add_argument("--layers", type=positive, metavar="L", help="decoder layers to build (all)")
    _add_calibration(parser)
    add_format_options(parser)
    _add_config(parser, {})
    parser.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    from infllm_pass.tools.explain import explain

    explain(options, lambda base: _configured(base, options), notes_console(options.format))
    return 0


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure which channels of the keys token scores should read",
        description="Runs a model dense on a text, chooses channels for every attention site and key/value head, and "
        "measures which sites need token scores and what budget, by the rows that miss the most. Writes a JSON file "
        "for sparsify(..., calibration=FILE) and --calibration. Takes some minutes on a CPU.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="SmolLM2-135M-Instruct, or a model folder with weights and tokenizer"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (the model's)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="the text (one that comes with Python)")
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens of it to read (8192)")
    parser.add_argument("--length", type=positive, metavar="N", help="tokens that run at once (all, at most 8192)")
    parser.add_argument("--out", type=Path, default=Path("calibration.json"), metavar="FILE", help="(calibration.json)")
    add_format_options(parser)
    _add_config(parser, {}, without=("scorer", "dense_len"))
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from infllm_pass.tools.calibrate_command import calibrate_command

    calibrate_command(options, lambda base: _configured(base, options), notes_console(options.format))
    return 0


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="channels of token scores, from infllm-pass calibrate"
    )


def _add_evaluate(commands: Any) -> None:
    from infllm_pass.evaluation.tasks import TASKS

    parser = commands.add_parser(
        "evaluate",
        help="measure what a model loses by sparse attention",
        description="Compares dense attention with one or several sparse configurations on one model: perplexity by "
        "position, numbers hidden in text, variable tracking, common and frequent words. Every configuration option "
        "takes several values; all combinations are run. A prompt and its answers are one forward pass. Takes some "
        "minutes on a CPU.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="SmolLM2-135M-Instruct",
        help="a model folder with weights and tokenizer (SmolLM2-135M-Instruct)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (the model's)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="a side more for token scores")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="texts to read and to hide things in (three)")
    parser.add_argument("--lengths", nargs="+", type=positive, metavar="N", help="tokens of a prompt (4096)")
    parser.add_argument("--depths", nargs="+", type=float, metavar="X", help="of needles, 0 to 1 (0.1 0.5 0.9)")
    parser.add_argument("--samples", type=positive, metavar="N", help="samples of a task, length and depth (1)")
    parser.add_argument("--digits", type=positive, metavar="N", help="digits of a hidden number (7)")
    parser.add_argument("--seed", type=natural, metavar="N", help="seed of the first sample (0)")
    parser.add_argument("--full", action="store_true", help="three lengths, five depths, four samples each")
    parser.add_argument("--generate", action="store_true", help="also generate text after every prompt")
    parser.add_argument(
        "--backend", choices=("eager", "aot_eager", "inductor"), default="eager", help="of the sparse graphs (eager)"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where results go (out)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    add_format_options(parser)
    defaults = {
        "window_size": "a sixteenth of the longest prompt",
        "topk": "a fifth of the blocks in all",
        "dense_len": "0",
    }
    _add_config(parser, defaults, several=True)
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from infllm_pass.tools.evaluate_command import evaluate_command

    def configured(base: SparseAttentionConfig) -> list[SparseAttentionConfig]:
        given = {name: getattr(options, name) for name in _FIELD_HELP if hasattr(options, name)}
        return [replace(base, **dict(zip(given, values, strict=True))) for values in product(*given.values())]

    evaluate_command(options, configured, notes_console(options.format))
    return 0


def _add_adapt(commands: Any) -> None:
    from infllm_pass.tools.adapt_options import add_options

    parser = commands.add_parser(
        "adapt",
        help="continue a model's training with sparse attention",
        description="Trains a causal language model on long text files, with sparse attention for long rows and dense "
        "attention for short ones, and evaluates it before, meanwhile and after in both modes. Everything is written "
        "to one folder: losses, checkpoints, evaluations, a picture, and a model for from_pretrained whose "
        "configuration carries sparse_config.",
    )
    add_options(parser)
    add_format_options(parser)
    defaults = {
        "window_size": "a sixteenth of the longest rows",
        "topk": "a fifth of the blocks in all",
        "dense_len": "one more than the second longest rows have",
    }
    _add_config(parser, defaults, without=("scorer",))
    parser.set_defaults(run=_adapt)


def _adapt(options: argparse.Namespace) -> int:
    from infllm_pass.tools.adapt_command import adapt_command

    def configured(base: SparseAttentionConfig) -> SparseAttentionConfig:
        given = {name: getattr(options, name) for name in _FIELD_HELP if hasattr(options, name) and name != "scorer"}
        return replace(base, **given)

    adapt_command(options, configured, notes_console(options.format))
    return 0


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model as an ONNX file, a TensorRT engine or an AOTInductor package",
        description="Exports a language model for batches and lengths of any size, dense and sparse attention and the "
        "switch between them inside, and reports every attention site.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="SmolLM2-135M-Instruct, or a model folder: its architecture without weights"
    )
    parser.add_argument("--to", choices=("onnx", "tensorrt", "aoti"), required=True, help="what to write")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file (model.onnx, model.engine or model.pt2)")
    parser.add_argument("--layers", type=positive, metavar="L", help="decoder layers to keep (all)")
    parser.add_argument(
        "--max-length", type=positive, default=8192, metavar="N", help="longest input of a TensorRT engine (8192)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_format_options(parser)
    _add_config(parser, {})
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from infllm_pass.tools.export_command import export_checkpoint

    export_checkpoint(options, lambda base: _configured(base, options), notes_console(options.format))
    return 0


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure where sparse attention breaks even on this machine",
        description="Times dense and sparse attention of one layer by length, on the GPU if there is one. Keeps the "
        'break-even lengths for dense_len="auto": in $INFLLM_BREAK_EVEN or ~/.cache/infllm_pass/break_even.json.',
    )
    parser.add_argument(
        "heads",
        type=_heads,
        nargs="+",
        metavar="QxKxD",
        help="query heads, key/value heads and channels of a head, such as 32x8x128",
    )
    parser.add_argument(
        "--scorers", nargs="+", choices=get_args(ScorerName), default=get_args(ScorerName), help="(both)"
    )
    parser.add_argument("--longest", type=positive, default=65536, metavar="N", help="longest length (65536)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    add_format_options(parser)
    _add_config(parser, {}, without=("scorer", "dense_len"))
    parser.set_defaults(run=_tune)


def _heads(text: str) -> object:
    from infllm_pass.tools.tune_command import Heads

    return Heads.parse(text)


def _tune(options: argparse.Namespace) -> int:
    from infllm_pass.tools.tune_command import tune

    tune(options, lambda base: _configured(base, options), notes_console(options.format))
    return 0


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="run a checkout's benchmarks",
        description="Runs scripts of the checkout's benchmarks/ folder one after the other; without a name, "
        "lists them. Arguments from the first that starts with '-' on are passed to every script; all take --json and "
        "--csv, and print their rows in that form.",
    )
    add_format_options(parser)
    parser.add_argument(
        "--decode",
        nargs=argparse.REMAINDER,
        metavar="ARGUMENT",
        help="run the script of a decode step with these arguments: decode, or cpu_decode without a CUDA device",
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="NAME ... [ARGUMENT ...]",
        help="scripts to run, without .py, and their arguments",
    )
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    root = Path(infllm_pass.__file__).resolve().parent.parent
    folder = root / "benchmarks"
    if not (folder.is_dir() and (root / "pyproject.toml").is_file()):
        raise ConfigError(
            "bench", str(root), "an editable install of a source checkout, which has a benchmarks/ folder"
        )
    scripts = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}
    given: list[str] = options.arguments
    if options.decode is not None:
        given = [_decode_script(), *options.decode]
    cut = next((number for number, argument in enumerate(given) if argument.startswith("-")), len(given))
    names, passed = given[:cut], given[cut:]
    if passed[:1] == ["--"]:
        passed = passed[1:]
    unknown = [name for name in names if name not in scripts]
    if unknown:
        raise ConfigError("bench", unknown[0], "one of " + (", ".join(scripts) or "no script: the folder is empty"))
    form: OutputFormat = options.format
    if not names and form is OutputFormat.TABLE:
        print("\n".join(scripts) or f"{folder} has no scripts")
    elif not names:
        print_data(form, list(scripts), [{"script": name} for name in scripts])
    if form is not OutputFormat.TABLE:
        passed = [f"--{form.value}", *passed]
    for name in names:
        code = subprocess.run([sys.executable, str(scripts[name]), *passed], check=False).returncode
        if code:
            return code
    return 0


def _add_lm_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "lm-eval",
        help="run EleutherAI's lm_eval with the model infllm",
        prefix_chars="\0",  # everything that follows is lm_eval's, options included
        add_help=False,
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=_lm_eval)


def _lm_eval(options: argparse.Namespace) -> int:
    from infllm_pass.tools import lm_eval

    return lm_eval.main(options.arguments)


def _decode_script() -> str:
    """The benchmark of a decode step on this machine."""
    import torch

    return "decode" if torch.cuda.is_available() else "cpu_decode"


def _add_config(
    parser: argparse.ArgumentParser, defaults: dict[str, str], *, without: Sequence[str] = (), several: bool = False
) -> None:
    """One option for every field of the configuration that has a choice; unset options are left out.

    With `several` each takes one value or more, and is a list.
    """
    group = parser.add_argument_group(
        "block selection (defaults in brackets; a budget is topk + window_size / block_size blocks)"
    )
    for field in fields(SparseAttentionConfig):
        if field.name not in _FIELD_HELP or field.name in without:
            continue
        words = _FIELD_WORDS.get(field.name)
        default = defaults.get(field.name, field.default)
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=_FIELD_HELP[field.name] + ("" if default is None else f" ({default})"),
            nargs="+" if several else None,
            **({"choices": words} if words else {"type": _READERS.get(field.name, natural), "metavar": "N"}),
        )


def _configured(base: SparseAttentionConfig, options: argparse.Namespace) -> SparseAttentionConfig:
    """The configuration with the fields that were given as options."""
    return replace(base, **{name: getattr(options, name) for name in _FIELD_HELP if hasattr(options, name)})


_READERS: dict[str, Any] = {"dense_len": length_or_auto}
"""Fields whose options are no mere numbers."""


if __name__ == "__main__":
    sys.exit(main())
