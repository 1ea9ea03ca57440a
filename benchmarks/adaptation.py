"""What training with sparse attention recovers: runs that differ in the scorer alone, against a dense control.

Each run is ``infllm-pass adapt`` with the same rows, then ``infllm-pass evaluate`` of its model, in a folder of its own
below ``--runs``; what is in a folder already is not run again, so that runs can be made one by one. Other options go
to ``infllm-pass adapt``, such as ``--steps`` and ``--extend-to``. Perplexity is that of the last half of the
held-out texts; the score is the mean over the tasks of the share of right answers; a fifth of the blocks is visited.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import dump_results, git_commit, note, show
from _gpu import Row, gpu_parser, results_path

from infllm_pass.evaluation import default_config
from infllm_pass.evaluation.results import ALL_TEXTS, DENSE

SCORERS = (DENSE, "tokens", "pooled")
STEPS_OF_REASONING = ("variable_tracking", "chained_lookups")
DEPTHS = ("0.1", "0.3", "0.5", "0.7", "0.9")
COLUMNS = {
    "perplexity": "perplexity",
    "change": "of the control",
    "score": "score",
    "score_share": "of the control",
    "multi_step_share": "multi-step, of the control",
}
FORMATS = {"perplexity": ".3f", "change": "+.2%", "score": ".3f", "score_share": ".1%", "multi_step_share": ".1%"}


def run(arguments: argparse.Namespace, scorer: str, others: list[str]) -> None:
    """Train with one scorer and evaluate the model, as far as that was not done before."""
    folder = arguments.runs / scorer
    held_out = [str(file) for file in arguments.held_out]
    if not (folder / "adaptation.json").exists():
        texts = [str(file) for file in arguments.files]
        command = ["adapt", arguments.model, *texts, "--scorer", scorer, "--held-out", *held_out]
        _infllm_pass(*command, "--evaluation-tasks", "perplexity", "--out", str(folder), *others)
    if not (folder / "tasks" / "evaluation.json").exists():
        config = default_config(arguments.length)
        sides = ("tokens", "pooled") if scorer == DENSE else (scorer,)
        budget = ["--window-size", str(config.window_size), "--topk", str(config.topk)]
        size = ["--lengths", str(arguments.length), "--depths", *DEPTHS, "--samples", str(arguments.samples)]
        command = ["evaluate", str(folder / "model"), "--text", *held_out, "--scorer", *sides]
        _infllm_pass(*command, *budget, *size, "--seed", "100", "--out", str(folder / "tasks"))


def _infllm_pass(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "infllm_pass.tools.cli", *command], check=True)


def summarise(runs: Path, scorers: list[str]) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of finished runs: a row for each run and side, then one for each evaluation meanwhile.

    Args:
        runs: the folder with a folder for each scorer.
        scorers: those to read; the first is the control, if it is dense.
    """
    read = {scorer: _read(runs / scorer) for scorer in scorers}
    rows = [row for scorer, (_, tasks) in read.items() for row in _side_rows(scorer, tasks)]
    control = next((row for row in rows if (row["scorer"], row["side"]) == (DENSE, DENSE)), None)
    if control is not None:
        for row in rows:
            row["change"] = row["perplexity"] / control["perplexity"] - 1
            row["score_share"] = row["score"] / control["score"]
            row["multi_step_share"] = row["multi_step"] / control["multi_step"] if control["multi_step"] else None
    for scorer, (adapted, _) in read.items():
        rows += _curve_rows(scorer, adapted)
    adapted, tasks = read[scorers[0]]
    facts = {name: adapted[name] for name in ("documents", "text_tokens", "trained_tokens", "parameters", "config")}
    evaluated = {name: tasks[name] for name in ("device", "dtype", "texts", "settings")}
    versions = {**adapted["versions"], **tasks["versions"]}
    return {**evaluated, **versions, **facts, "commit": git_commit()}, rows


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    adapted = json.loads((folder / "adaptation.json").read_text(encoding="utf-8"))
    return adapted, json.loads((folder / "tasks" / "evaluation.json").read_text(encoding="utf-8"))


def _side_rows(scorer: str, found: dict[str, Any]) -> list[Row]:
    rows = []
    for side in dict.fromkeys(row["side"] for row in found["perplexity"]):
        texts = {row["text"]: row for row in found["perplexity"] if row["side"] == side}
        tasks = {row["task"]: row for row in found["tasks"] if row["side"] == side}
        right = {task: row["exact"] for task, row in tasks.items()}
        rows.append(
            {
                "case": f"{scorer} {side}",
                "kind": "run",
                "scorer": scorer,
                "side": side,
                "density": texts[ALL_TEXTS]["density"],
                "perplexity": texts[ALL_TEXTS]["perplexity"],
                "texts": {text: row["perplexity"] for text, row in texts.items() if text != ALL_TEXTS},
                "score": sum(right.values()) / len(right),
                "multi_step": sum(right[task] for task in STEPS_OF_REASONING) / len(STEPS_OF_REASONING),
                "tasks": {
                    task: {"right": round(row["exact"] * row["answers"]), "answers": row["answers"], "nll": row["nll"]}
                    for task, row in tasks.items()
                },
            }
        )
    return rows


def _curve_rows(scorer: str, adapted: dict[str, Any]) -> list[Row]:
    tokens = adapted["config"]["tokens_per_step"]
    return [
        {
            "case": f"{scorer} {row['side']} {step}",
            "kind": "curve",
            "scorer": scorer,
            "side": row["side"],
            "step": int(step),
            "trained_tokens": int(step) * tokens,
            "perplexity": row["perplexity"],
        }
        for step, found in adapted["evaluations"].items()
        for row in found["perplexity"]
        if row["text"] == ALL_TEXTS
    ]


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    options.add_argument("model", metavar="MODEL", help="SmolLM2-135M-Instruct, or a model folder")
    options.add_argument("files", type=Path, nargs="+", metavar="FILE", help="text files and folders to train on")
    options.add_argument("--held-out", type=Path, nargs="+", required=True, metavar="FILE", help="texts of evaluations")
    options.add_argument("--runs", type=Path, required=True, metavar="DIR", help="where each run gets a folder")
    options.add_argument("--scorers", nargs="+", choices=SCORERS, default=list(SCORERS), help="runs (all)")
    options.add_argument("--length", type=int, default=8192, metavar="N", help="tokens of a task's prompt (8192)")
    options.add_argument("--samples", type=int, default=8, metavar="N", help="of a task and depth (8)")
    return options


def main() -> None:
    arguments, others = parser().parse_known_args()
    for scorer in arguments.scorers:
        run(arguments, scorer, others)
    header, rows = summarise(arguments.runs, arguments.scorers)
    path = results_path("adaptation", arguments.results, header)
    dump_results(path, header, rows)
    show(arguments.format, [row for row in rows if row["kind"] == "run"], COLUMNS, FORMATS)
    note(arguments.format, f"written to {path}")


if __name__ == "__main__":
    main()
