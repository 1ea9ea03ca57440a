"""What soft caps, key biases and sinks cost on the GPU: one layer, bfloat16, batch 1, forward and backward.

Sparse attention of the same q, k and v without a term and with each, in turns; ``ratio`` is to the row without.
A key bias and sinks have gradients in the backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _common import show
from _data import Heads, make_data
from _gpu import (
    Row,
    add_layer,
    config_for,
    gpu_header,
    gpu_parser,
    in_turns,
    require_gpu,
    save,
    scoring_of,
)
from torch import Tensor

from infllm_pass import SparseAttentionConfig, switchable_attention

COLUMNS = {"ms": "forward, ms", "ratio": "ratio", "bwd_ms": "backward, ms", "bwd_ratio": "ratio of backward"}


def terms_of(name: str, heads: Heads, length: int, device: torch.device) -> dict[str, Any]:
    """The arguments of a term, with gradients."""
    torch.manual_seed(1)
    made: dict[str, Callable[[], Any]] = {
        "none": dict,
        "softcap": lambda: {"softcap": 50.0},
        "key_bias": lambda: {"key_bias": torch.randn(1, heads.keys, length, device=device, requires_grad=True)},
        "sinks": lambda: {"sinks": torch.randn(heads.queries, device=device, requires_grad=True)},
    }
    return made[name]()  # type: ignore[no-any-return]


def calls(
    q: Tensor, k: Tensor, v: Tensor, config: SparseAttentionConfig, terms: dict[str, Any]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass without gradients, and the backward pass for a fixed output gradient."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = switchable_attention(*leaves, config, **terms)
    grad = torch.randn_like(out)
    wanted = [*leaves, *(x for x in terms.values() if isinstance(x, Tensor))]

    def forward() -> object:
        with torch.no_grad():
            return switchable_attention(q, k, v, config, **terms)

    return forward, lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def measure(heads: Heads, length: int, config: SparseAttentionConfig, data: str, device: torch.device) -> list[Row]:
    """A row without a term and one with each."""
    q, k, v = make_data(data, heads, length, device)
    names = ("none", "softcap", "key_bias", "sinks")
    runs = {name: calls(q, k, v, config, terms_of(name, heads, length, device)) for name in names}
    kinds = [in_turns({name: pair[which] for name, pair in runs.items()}, device) for which in range(2)]
    rows: list[Row] = []
    for name in names:
        (ms, bwd), (base, base_bwd) = ([kind[which] for kind in kinds] for which in (name, "none"))
        row: Row = {"case": f"{heads}/{length}/{data}/{name}", "heads": str(heads), "length": length, "term": name}
        row |= {"ms": ms, "ratio": ms / base, "bwd_ms": bwd, "bwd_ratio": bwd / base_bwd}
        rows.append(row)
    return rows


def parser() -> argparse.ArgumentParser:
    options = gpu_parser(__doc__)
    add_layer(options, lengths=[65536])
    return options


def main() -> None:
    arguments = parser().parse_args()
    device = require_gpu()
    config = config_for(arguments.blocks, 0, scoring_of(arguments))
    rows = [
        row
        for heads in arguments.heads
        for length in arguments.lengths
        for row in measure(heads, length, config, arguments.data, device)
    ]
    show(arguments.format, rows, COLUMNS, {"ratio": ".3f", "bwd_ratio": ".3f"})
    save("score_terms", arguments.results, gpu_header(device), rows)


if __name__ == "__main__":
    main()
