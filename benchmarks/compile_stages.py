"""Compile time by stage: Dynamo, the pass, AOTAutograd, Inductor and Triton, for dense and sparse graphs of one model.

A model of SmolLM2-135M's sizes (30 layers, 9 query and 3 key/value heads of 64) with random weights: compiling does not
depend on them. Each case runs in a process of its own, first with empty compile caches, then again with those that the
first run left. ``plain`` is ``torch.compile`` alone, ``dense`` and ``sparse`` are the two sides of the switch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import results_header, show, write_results

from infllm_pass.tools.output import add_format_options

RESULTS = Path(__file__).parent / "results" / "compile_stages.json"
LENGTH = 16384
CASES = ("plain", "dense", "sparse")
STAGES = {
    "dynamo": "bytecode_tracing",
    "aot": "create_aot_dispatcher_function",
    "inductor": "compile_fx_inner",
    "codegen": "GraphLowering.run",
}
"""Columns, and the timers of ``torch._dynamo.utils`` that they show; the timers are nested."""


def build(layers: int, device: str) -> torch.nn.Module:
    """A Llama of SmolLM2-135M's sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def run_case(case: str, train: bool, layers: int, length: int, device: str) -> dict[str, Any]:
    """Seconds of one compilation, in this process."""
    import triton
    from torch._dynamo.utils import compilation_time_metrics

    import infllm_pass

    in_process = 0.0

    def listener(*, times: Any, **_: Any) -> None:
        nonlocal in_process
        in_process += times.total / 1e6

    triton.knobs.compilation.listener = listener
    model = build(layers, device)
    model = model.train() if train else model.eval()
    dense_len = {"dense": 2 * length, "sparse": length // 2}.get(case)
    compiled = torch.compile(model)
    if dense_len is not None:
        compiled = infllm_pass.sparsify(compiled, {"dense_len": dense_len}, strict=True)
    ids = torch.randint(0, 49152, (1, length), device=device)
    if device == "cuda":
        torch.cuda.synchronize()

    def step() -> None:
        if train:
            compiled(ids, labels=ids, use_cache=False).loss.backward()
        else:
            with torch.no_grad():
                compiled(ids, use_cache=False, logits_to_keep=1)
        if device == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    step()
    second = time.perf_counter() - begin
    spent = {name: sum(times) for name, times in compilation_time_metrics.items()}
    stages = {name: spent.get(timer, 0.0) for name, timer in STAGES.items()}
    return {"first_s": first, "second_s": second, "stages": stages, "triton_in_process_s": in_process, "timers": spent}


def measure(case: str, train: bool, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a case: with empty caches, and with full ones."""
    rows = []
    with tempfile.TemporaryDirectory() as caches:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        for cache in ("cold", "warm"):
            job = json.dumps([case, train, arguments.layers, arguments.length, arguments.device])
            command = [sys.executable, __file__, "--job", job]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append({"case": case, "mode": "training" if train else "inference", "cache": cache, **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    add_format_options(parser)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run_case(*json.loads(arguments.job))))
        return
    rows: list[dict[str, Any]] = []
    for mode in arguments.modes:
        for case in arguments.cases:
            for row in measure(case, mode == "training", arguments):
                rows.append(row)
                print(mode, case, row["cache"], f"{row['first_s']:.1f} s", file=sys.stderr, flush=True)
    columns = {"mode": "mode", "cache": "caches", "first_s": "first s", **dict(zip(STAGES, STAGES, strict=True))}
    columns |= {"triton_in_process_s": "triton in process", "second_s": "second s"}
    show(arguments.format, [row | row["stages"] for row in rows], columns)
    write_results(arguments.output, results_header(), rows)


if __name__ == "__main__":
    main()
