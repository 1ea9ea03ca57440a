"""What calling this package's operators costs on the CPU beside their kernels, in microseconds a call, on tiny tensors.

``call_us``: the operator. ``direct_us``: the function that computes it, called with the same tensors. ``dispatch_us``:
what is between them: PyTorch's dispatcher, reading the arguments, checks. ``nothing``: an operator of the same
arguments that computes nothing, registered as here and by `torch.library.custom_op`. Each is the best of many calls, as
other work on the machine can only add to it.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import results_header, write_results
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from infllm_pass.kernels.cpu import decode as decode_kernels
from infllm_pass.kernels.cpu import prefill as prefill_kernels
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.ops.attention_args import ATTEND, DECODE, AttentionCall, DecodeCall, Signature, geometry_text
from infllm_pass.lowering.ops.decode import decode_attention, new_state
from infllm_pass.lowering.ops.prefill import block_attention, compress_keys, select_blocks
from infllm_pass.lowering.ops.registry import Operator

RESULTS = Path(__file__).parent / "results" / "cpu" / "dispatch.json"

GEOMETRY = BlockGeometry()
SCALE = 0.125


def microseconds(call: Callable[[], object], rounds: int) -> float:
    """The best of many calls."""
    with torch.no_grad():
        return min(timeit.repeat(call, number=1, repeat=rounds)) * 1e6


def tensors(queries: int, keys: int) -> list[Tensor]:
    """Queries, keys and values of one head."""
    return [torch.randn(1, 1, length, 16) for length in (queries, keys, keys)]


def measure_decode(rounds: int) -> dict[str, Any]:
    """A step over a cache of 16 keys."""
    q, k, v = tensors(1, 16)
    state, end = new_state(k, GEOMETRY), torch.tensor([16])
    call = DecodeCall(end, SCALE, 64, GEOMETRY)
    given = (q, k, v, state, *call.arguments)
    return row(
        "decode_attention",
        lambda: decode_attention.default(*given),
        lambda: decode_kernels.decode_attention(q, k, v, state, call),
        rounds,
    )


def measure_prompt(rounds: int) -> list[dict[str, Any]]:
    """A prompt of 16 tokens, operator by operator."""
    q, k, v = tensors(16, 16)
    call = AttentionCall(SCALE, 0, GEOMETRY)
    state = compress_keys(q, k, *call.arguments)
    selection = select_blocks(q, k, state, *call.arguments)
    return [
        row(
            "compress_keys",
            lambda: compress_keys.default(q, k, *call.arguments),
            lambda: prefill_kernels.compress_keys(q, k, call),
            rounds,
        ),
        row(
            "select_blocks",
            lambda: select_blocks.default(q, k, state, *call.arguments),
            lambda: prefill_kernels.select_blocks(q, k, state, call),
            rounds,
        ),
        row(
            "block_attention",
            lambda: block_attention.default(q, k, v, selection, *call.arguments),
            lambda: prefill_kernels.attention_forward(q, k, v, selection[0], call),
            rounds,
        ),
    ]


def row(case: str, call: Callable[[], object], direct: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Figures of an operator and of the function that computes it."""
    called, computed = microseconds(call, rounds), microseconds(direct, rounds)
    return {"case": case, "call_us": called, "direct_us": computed, "dispatch_us": called - computed}


def measure_registrations(rounds: int) -> list[dict[str, Any]]:
    """An operator with the arguments of a decode step, and one with those of attention, that do nothing."""

    def measure(case: str, signature: Signature[Any]) -> dict[str, Any]:
        q, k, v = tensors(1, 16)
        others = {"scale": SCALE, "softcap": 0.0, "dense_len": 64, "geometry": geometry_text(GEOMETRY)}
        others |= {"selection": [], "lengths": q}
        others |= {"state": new_state(k, GEOMETRY), "q": q, "k": k, "v": v}
        given = tuple(others.get(name) for name in signature.names)
        out = torch.empty(1), torch.empty(1)
        name = f"benchmark_{case}"
        ours = Operator(name, signature, compute=lambda *_, out=out: out, fake=lambda *_, out=out: out, doc="Nothing.")
        theirs = torch.library.custom_op(
            f"infllm_benchmark::{case}",
            lambda *_, out=out: (out[0].clone(), out[1].clone()),
            mutates_args=("state",) if signature is DECODE else (),
            schema=signature.schema,
        )
        calls = {"call_us": lambda: ours.default(*given), "custom_op_us": lambda: theirs._opoverload(*given)}
        return {"case": f"nothing/{case}", **{key: microseconds(each, rounds) for key, each in calls.items()}}

    return [measure("decode_attention", DECODE), measure("block_attention", ATTEND)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000, help="calls, of which the best is reported")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    rows = [measure_decode(arguments.rounds), *measure_prompt(arguments.rounds)]
    rows += measure_registrations(arguments.rounds)
    columns = ("call_us", "direct_us", "dispatch_us", "custom_op_us")
    table = Table(Column("case", no_wrap=True), *columns)
    for each in rows:
        table.add_row(str(each["case"]), *(f"{each[name]:.1f}" if name in each else "" for name in columns))
    Console().print(table)
    write_results(arguments.output, results_header(), rows)


if __name__ == "__main__":
    main()
