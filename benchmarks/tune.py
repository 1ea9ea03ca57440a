"""Measures launch configurations of one Triton kernel and writes the fastest to the tuning table of the device.

    python benchmarks/tune.py attention_forward --heads 32x2x128 --try num_stages=2,3 max_registers=none,168 --write

Every combination of the values given with ``--try`` is measured, in place of the current configuration's fields and
beside the current configuration itself. The ``scattered`` kernels are timed with the tiles' part of their work;
``threshold=-1,1e9`` compares them with tiles that visit all of their blocks. ``--write`` puts the fastest one, with the
figures of all, into ``kernels/triton/tuning/sm_XX.json``, as the row for the data type's size and the head dimension
that was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _stages as stages
import torch
import triton
from _common import note, show
from _data import MAIN, Heads, make_data
from _gpu import (
    Row,
    add_scoring,
    attempt,
    blocks_option,
    config_for,
    geometry_of,
    gpu_parser,
    heads_option,
    milliseconds,
    positive_option,
    require_gpu,
    scoring_of,
)
from triton.errors import TritonError

from infllm_pass import SparseAttentionConfig
from infllm_pass.kernels.triton import configs


def value_of(text: str) -> int | float | bool | None:
    """A field's value: ``none``, ``true``, ``false`` or a number."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def trial(text: str) -> tuple[str, list[Any]]:
    """A field and the values to try, from ``name=value,value``."""
    name, equals, values = text.partition("=")
    try:
        if equals:
            return name, [value_of(value) for value in values.split(",")]
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected FIELD=VALUE,VALUE such as num_stages=2,3, got {text!r}")


def candidates(current: Any, trials: list[tuple[str, list[Any]]]) -> list[Any]:
    """The current configuration, then every combination of the values that differs from it."""
    known = {field.name for field in dataclasses.fields(current)}
    unknown = [name for name, _ in trials if name not in known]
    if unknown:
        raise SystemExit(
            f"{type(current).__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    names = [name for name, _ in trials]
    made = [
        dataclasses.replace(current, **dict(zip(names, values, strict=True)))
        for values in itertools.product(*(values for _, values in trials))
    ]
    return [current, *dict.fromkeys(config for config in made if config != current)]


def changes(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from the defaults of its class, as a table holds them."""
    usual = type(config)()
    changed = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changed = {name: value for name, value in changed.items() if value != getattr(usual, name)}
    if changed.get("recorded") is not None:
        changed["recorded"] = changes(changed["recorded"])
    return changed


def write_row(file: Path, device: str, kernel: str, element_size: int, head_dim: int, config: Any, note: str) -> None:
    """Put a row into a tuning table, in place of the one for the same kernel, element size and head dimension.

    Args:
        file: the table; created where it is missing.
        device: name of the device that was measured.
        kernel: the kernel's name in the tables.
        element_size: bytes of an element.
        head_dim: padded head dimension.
        config: the configuration.
        note: what was measured.
    """
    table = json.loads(file.read_text()) if file.exists() else {"device": device, "rows": []}
    row = {"kernel": kernel, "element_size": element_size, "head_dims": [head_dim], "config": changes(config)}
    row["measured"] = [note]
    kept = []
    for old in table["rows"]:
        same = old["kernel"] == kernel and old.get("element_size") in (None, element_size)
        dims = old.get("head_dims")
        if same and old.get("element_size") == element_size and dims is not None and head_dim in dims:
            dims = [dim for dim in dims if dim != head_dim]
            if not dims:
                continue
            old = {**old, "head_dims": dims}
        kept.append(old)
    place = next((number for number, old in enumerate(kept) if old["kernel"] == kernel), len(kept))
    table["rows"] = [*kept[:place], row, *kept[place:]]
    file.write_text(json.dumps(table, indent=2) + "\n")


def timing(
    kernel: str, heads: Heads, length: int, config: SparseAttentionConfig, data: str, device: torch.device
) -> Callable[[], float]:
    """A function that times the stage that runs the kernel, in ms: bfloat16, one sequence, or one decode step."""
    if kernel == "decode":
        import decode

        steps = decode.Layers(heads, 1, length, geometry_of(config, heads.dim), device).sparse(length - 8, 0)
        return lambda: decode.replayed_ms(steps)
    q, k, v = make_data(data, heads, length, device)
    selection = stages.select(q, k, config)
    out, lse = stages.attend(q, k, v, selection, config)
    calls: dict[str, Callable[[], object]] = {
        "compress": lambda: stages.compress(k, selection.plan, config),
        **dict.fromkeys(("select", "select_tokens"), lambda: stages.select(q, k, config)),
        **dict.fromkeys(("attention_forward", "scattered"), lambda: stages.attend(q, k, v, selection, config)),
        "key_gradients": lambda: stages.backward(out, q, k, v, out, lse, selection, config),
        **dict.fromkeys(
            ("query_gradient", "scattered_gradient"),
            stages.gradient_of_queries(torch.randn_like(out), q, k, v, out, lse, selection, config),
        ),
    }
    return lambda: milliseconds(calls[kernel], device)


def measure(kernel: str, configurations: list[Any], time: Callable[[], float]) -> list[Row]:
    """A row for every configuration: its fields, and its time or why it failed."""

    def timed() -> float:
        try:
            return time()
        except TritonError as error:  # a configuration that the device has no memory or registers for
            raise RuntimeError(str(error)) from error

    rows: list[Row] = []
    for config in configurations:
        fields = changes(config)
        row: Row = {"case": json.dumps(fields), "config": config}
        with configs.override(**{kernel: config}):
            attempt(row, "stage", timed)
        rows.append(row)
    return rows


def note_of(rows: list[Row], what: str) -> str:
    """One line of all figures, the fastest first."""
    timed = sorted((row for row in rows if row["stage_ms"] is not None), key=lambda row: row["stage_ms"])
    return f"{what}: " + "; ".join(f"{row['case']} {row['stage_ms']:.3g} ms" for row in timed)


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument("kernel", choices=sorted(configs.CLASSES))
    options.add_argument("--heads", type=heads_option, default=MAIN[0], metavar="QxKxD")
    options.add_argument("--length", type=positive_option, default=131072, metavar="N", help="tokens")
    options.add_argument("--blocks", type=blocks_option, default=64, metavar="N", help="visited blocks (64)")
    options.add_argument("--data", choices=["local", "random"], default="local")
    add_scoring(options)
    options.add_argument("--try", dest="trials", type=trial, nargs="+", default=[], metavar="FIELD=VALUE,VALUE")
    options.add_argument("--write", action="store_true", help="write the fastest to the device's table")
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    major, minor = torch.cuda.get_device_capability(device)
    scoring = scoring_of(arguments)
    if arguments.kernel in ("compress", "select"):
        scoring = dataclasses.replace(scoring, scorer="pooled")
    config = config_for(arguments.blocks, 0, scoring)
    size = config.score_dims_of(arguments.heads.dim) if arguments.kernel == "select_tokens" else arguments.heads.dim
    head_dim = max(16, triton.next_power_of_2(size))
    kind = configs.CLASSES[arguments.kernel]
    current = configs.find_config(kind, arguments.kernel, 10 * major + minor, 2, head_dim) or kind()
    tried = candidates(current, arguments.trials)
    case = (arguments.heads, arguments.length, config, arguments.data)
    rows = measure(arguments.kernel, tried, timing(arguments.kernel, *case, device))
    told = [{key: value for key, value in row.items() if key != "config"} for row in rows]
    show(arguments.format, told, {"stage_ms": "ms"}, {"stage_ms": ".4f"})
    timed = [row for row in rows if row["stage_ms"] is not None]
    if not timed:
        raise SystemExit("no configuration ran")
    best = min(timed, key=lambda row: row["stage_ms"])
    note(arguments.format, f"fastest: {best['case']}")
    if arguments.write:
        name = torch.cuda.get_device_name(device)
        what = f"{name}, {arguments.heads}, {arguments.length} tokens, {arguments.blocks} blocks, {arguments.data} data"
        what += scoring.suffix
        measured = note_of(rows, f"{what}, torch {torch.__version__}, triton {triton.__version__}")
        file = configs.TUNING / f"sm_{10 * major + minor}.json"
        write_row(file, name, arguments.kernel, 2, head_dim, best["config"], measured)
        note(arguments.format, f"wrote {file}")


if __name__ == "__main__":
    main()
