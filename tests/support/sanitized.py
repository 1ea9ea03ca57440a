"""Every kernel of prefill, training and decoding once, on odd sizes, for compute-sanitizer; see ``make sanitize``.

``python -m tests.support.sanitized [part of a case's name ...]`` runs every case, or those that match; the cases of
decoding are named ``decode``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from infllm_pass import SparseAttentionConfig, switchable_attention
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton.backward import dq
from infllm_pass.kernels.triton.configs import ScatteredConfig, find_config, override
from infllm_pass.kernels.triton.prefill import attention
from infllm_pass.lowering.ops.attention_args import DecodeCall
from infllm_pass.lowering.ops.decode import decode_attention, new_state

CONFIG = SparseAttentionConfig(
    kernel_size=32, kernel_stride=16, block_size=64, window_size=128, topk=4, dense_len=0, scorer="pooled"
)
FINE = SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=0, scorer="pooled"
)
TOKENS = replace(CONFIG, scorer="tokens")

GEOMETRY = BlockGeometry(init_blocks=1, local_blocks=2, selected_blocks=6)
DENSE_LEN = 600


@dataclass(frozen=True)
class Case:
    """Heads and sizes of a call; level: queries are zero, so that all scores are equal; terms: a cap, a bias, sinks."""

    heads_q: int
    heads_kv: int
    dim: int
    length: int = 777
    config: SparseAttentionConfig = field(default=CONFIG)
    gathered: bool = False
    level: bool = False
    terms: bool = False

    def score_terms(self) -> dict[str, Any]:
        """Arguments of the terms; those with gradients are leaves."""
        if not self.terms:
            return {}
        bias = torch.randn(1, self.heads_kv, self.length, device="cuda", requires_grad=True)
        return {
            "key_bias": bias,
            "sinks": torch.randn(self.heads_q, device="cuda", requires_grad=True),
            "softcap": 20.0,
        }


CASES = {
    "G=4": Case(8, 2, 64),
    "G=16": Case(16, 1, 128),
    "G=3, D=80": Case(3, 1, 80),
    "G=4, gathered": Case(8, 2, 64, gathered=True),
    "G=3, D=80, gathered": Case(3, 1, 80, gathered=True),
    "G=4, tokens": Case(8, 2, 64, config=TOKENS),
    "G=16, tokens, shared by 64": Case(16, 1, 128, config=replace(TOKENS, query_block=64)),
    "G=3, D=80, int8": Case(3, 1, 80, config=replace(TOKENS, score_dtype="int8")),
    "G=1, float8, shared by 16": Case(4, 4, 32, config=replace(TOKENS, score_dtype="fp8", query_block=16)),
    "G=4, terms": Case(8, 2, 64, terms=True),
    "G=3, D=80, terms, gathered": Case(3, 1, 80, terms=True, gathered=True),
    "G=4, terms, tokens": Case(8, 2, 64, config=TOKENS, terms=True),
    "G=4, terms, agnostic": Case(8, 2, 64, config=replace(CONFIG, agnostic_topk=2), terms=True),
    # Every block competes: more than a row's pieces in registers hold, so that ranking reads them from memory.
    "G=2, equal scores": Case(4, 2, 32, length=3001, config=FINE, level=True),
}


@contextmanager
def always_scattered() -> Iterator[list[bool]]:
    """Gather whatever the data, in chunks of few tiles, so that rings of buffers come round; yields what was done."""
    done: list[bool] = []

    def noted(module: Any, name: str, state: int) -> Any:
        def gather(*arguments: Any) -> None:
            original(*arguments)
            done.append(bool(arguments[state][0]))

        original = getattr(module, name)
        return mock.patch.object(module, name, gather)

    configs = {}
    for name in ("scattered", "scattered_gradient"):
        measured = find_config(ScatteredConfig, name, 90, 2, 128)
        assert measured is not None
        configs[name] = replace(measured, threshold=-1.0, pool_bytes=1 << 18)
    with (
        override(**configs),
        noted(attention, "attend_scattered", 3),
        noted(dq, "add_scattered_gradient", 5),
    ):
        yield done


def run(name: str, case: Case) -> bool:
    """Forward and backward without and with a key mask and a window; whether all went as it should."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, case.length, case.dim, device="cuda", dtype=torch.bfloat16)
        for heads in (case.heads_q, case.heads_kv, case.heads_kv)
    )
    if case.level:
        q.zero_()
    inputs, terms = [x.requires_grad_() for x in (q, k, v)], case.score_terms()
    leaves = [*inputs, *(x for x in terms.values() if isinstance(x, torch.Tensor))]
    key_mask = torch.ones(1, case.length, dtype=torch.bool, device="cuda")
    key_mask[:, :5] = False
    key_mask[:, 300:310] = False
    well = True
    for call in ({}, {"key_mask": key_mask}, {"window": 500}):
        out = switchable_attention(*inputs, case.config, **call, **terms)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()
        finite = all(bool(x.isfinite().all()) for x in (out, *grads))
        print(f"{name} {sorted(call)}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        well &= finite
    return well


def attend(wanted: Callable[[str], bool]) -> bool:
    """Forward and backward of the cases that are wanted; whether all went as it should."""
    well = True
    for name, case in CASES.items():
        if not wanted(name):
            continue
        if not case.gathered:
            well &= run(name, case)
            continue
        with always_scattered() as done:
            well &= run(name, case)
        if not (done and all(done)):
            print(f"{name}: NOT GATHERED", flush=True)
            well = False
    return well


def decode(name: str, case: Case) -> bool:
    """Steps over a cache whose rows lie on both sides of ``DENSE_LEN``; whether all results are finite."""
    torch.manual_seed(0)
    k, v = (torch.randn(2, case.heads_kv, case.length, case.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    geometry = replace(GEOMETRY, agnostic_blocks=case.config.agnostic_topk)
    if case.config.scorer == "tokens":
        channels = tuple(tuple(range(head % 2, case.dim, 2)) for head in range(case.heads_kv))  # a table of sets
        scored = {"scorer": "tokens", "channels": channels, "score_dtype": case.config.score_dtype}
        geometry = replace(geometry, **scored, query_block=case.config.query_block)
    state = new_state(k, geometry)
    lengths = torch.tensor([case.length - 8, DENSE_LEN - 8], device="cuda")
    starts = torch.tensor([3, 0], device="cuda")
    key_mask = torch.rand(2, case.length, device="cuda") < 0.9
    terms = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in case.score_terms().items()}
    well = True
    for count, others in ((1, (None, None, None)), (5, (starts, key_mask, None)), (1, (starts, None, 500))):
        lengths += count
        q = torch.randn(2, case.heads_q, count, case.dim, device="cuda", dtype=torch.bfloat16)
        call = DecodeCall(lengths, case.dim**-0.5, DENSE_LEN, geometry, *others, **terms)
        out, _ = decode_attention(q, k, v, state, *call.arguments)
        torch.cuda.synchronize()
        finite = bool(out.isfinite().all())
        print(f"{name} decode {count}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        well &= finite
    return well


def main(parts: list[str]) -> int:
    def wanted(name: str) -> bool:
        return not parts or any(part in name for part in parts)

    well = attend(wanted)
    for name, case in CASES.items():
        if not case.gathered and not case.level and wanted(f"decode {name}"):
            well &= decode(name, case)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
