"""Compile time: what finding, proving and rewriting add to ``torch.compile`` for Llamas of 4, 32 and 80 layers.

Layers are tiny, so that the time is the compiler's: Dynamo traces the model, the pass runs, and a backend that compiles
nothing takes the graph. ``pass`` is the pass alone; its share is of the time that Dynamo takes without it. Inductor,
which would come after, takes many times longer than either.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import results_header, show, write_results
from rich.console import Console
from rich.progress import track
from torch import fx, nn

from infllm_pass import SparseAttentionConfig
from infllm_pass.rewrite.pipeline import run_pass
from infllm_pass.tools.output import add_format_options

RESULTS = Path(__file__).parent / "results" / "cpu" / "compile_time.json"
LENGTH = 64


def build(layers: int, implementation: str) -> nn.Module:
    """A Llama with tiny layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config).eval()


def compile_seconds(
    model: nn.Module, dynamic: bool, rewrite: Callable[[fx.GraphModule], object]
) -> tuple[float, float]:
    """Processor seconds until the first result of a compiled model, and those that a rewriting of its graphs takes."""
    spent = 0.0

    def backend(module: fx.GraphModule, _example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal spent
        begin = time.process_time()
        rewrite(module)
        spent += time.process_time() - begin
        return module.forward

    torch._dynamo.reset()
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic or None)
    begin = time.process_time()
    with torch.no_grad():
        compiled(ids, use_cache=False)
    return time.process_time() - begin, spent


def measure(layers: int, implementation: str, dynamic: bool, repeats: int) -> dict[str, Any]:
    """One row: medians of `repeats` compilations."""
    model = build(layers, implementation)
    config = SparseAttentionConfig(dense_len=2 * LENGTH)
    switchable = 0

    def rewrite(module: fx.GraphModule) -> None:
        nonlocal switchable
        sites = run_pass(module, config).sites
        switchable = sum(site.decision == "switchable" for site in sites)

    without = statistics.median(compile_seconds(model, dynamic, lambda _: None)[0] for _ in range(repeats))
    runs = [compile_seconds(model, dynamic, rewrite) for _ in range(repeats)]
    alone = statistics.median(spent for _, spent in runs)
    return {
        "case": f"{implementation}/{'dynamic' if dynamic else 'static'}/{layers}",
        "layers": layers,
        "switchable": switchable,
        "without_s": without,
        "with_s": statistics.median(total for total, _ in runs),
        "pass_s": alone,
        "share": alone / without,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32, 80], help="decoder layers")
    parser.add_argument("--implementations", nargs="+", default=["sdpa", "eager"], help="of attention in transformers")
    parser.add_argument("--dynamic", action="store_true", help="lengths and batch as symbols; default: as numbers")
    parser.add_argument("--repeats", type=int, default=3, help="timed compilations; their median is reported")
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_format_options(parser)
    arguments = parser.parse_args()

    cases = [(layers, name) for name in arguments.implementations for layers in arguments.layers]
    measure(1, "sdpa", arguments.dynamic, 1)  # what is loaded and compiled once in a process is not counted
    console = Console(stderr=True)
    rows = [measure(*case, arguments.dynamic, arguments.repeats) for case in track(cases, "compiling", console=console)]
    columns = {
        "switchable": "sites",
        "without_s": "without s",
        "with_s": "with s",
        "pass_s": "pass s",
        "share": "share",
    }
    show(arguments.format, rows, columns, {"switchable": "d", "share": ".1%"})
    write_results(arguments.output, results_header(), rows)


if __name__ == "__main__":
    main()
