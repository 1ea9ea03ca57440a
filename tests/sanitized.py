"""Every Triton kernel once, on odd sizes, for NVIDIA's compute-sanitizer; no test file. See ``make sanitize``."""

from __future__ import annotations

import torch

from infllm_pass import SparseAttentionConfig, switchable_attention
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.decode import new_state
from infllm_pass.lowering.tiled_decode import tiled_decode_arguments, tiled_decode_attention

CONFIG = SparseAttentionConfig(
    kernel_size=32, kernel_stride=16, block_size=64, window_size=128, topk=4, init_blocks=1, dense_len=0
)
CASES = {"G=4": (8, 2, 64), "G=16": (16, 1, 128), "G=3, D=80": (3, 1, 80)}
LENGTH = 777

GEOMETRY = BlockGeometry(init_blocks=1, local_blocks=2, selected_blocks=6)
DENSE_LEN = 600


def attend() -> None:
    """Forward and backward."""
    for name, (heads_q, heads_kv, dim) in CASES.items():
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, LENGTH, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (heads_q, heads_kv, heads_kv)
        )
        key_mask = torch.ones(1, LENGTH, dtype=torch.bool, device="cuda")
        key_mask[:, :5] = False
        for call in ({}, {"key_mask": key_mask}, {"window": 500}):
            out = switchable_attention(q, k, v, CONFIG, **call)
            grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            torch.cuda.synchronize()
            finite = all(bool(x.isfinite().all()) for x in (out, *grads))
            print(f"{name} {sorted(call)}: {'finite' if finite else 'NOT FINITE'}", flush=True)


def decode() -> None:
    """Steps over a cache whose rows lie on both sides of ``DENSE_LEN``; it holds nothing but their keys."""
    for name, (heads_q, heads_kv, dim) in CASES.items():
        torch.manual_seed(0)
        k, v = (torch.randn(2, heads_kv, LENGTH, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        state = new_state(k, GEOMETRY)
        lengths = torch.tensor([LENGTH - 8, DENSE_LEN - 8], device="cuda")
        starts = torch.tensor([3, 0], device="cuda")
        key_mask = torch.rand(2, LENGTH, device="cuda") < 0.9
        for count, others in ((1, (None, None, None)), (5, (starts, key_mask, None)), (1, (starts, None, 500))):
            lengths += count
            q = torch.randn(2, heads_q, count, dim, device="cuda", dtype=torch.bfloat16)
            numbers = (dim**-0.5, DENSE_LEN, *tiled_decode_arguments(GEOMETRY))
            out, _ = tiled_decode_attention(q, k, v, *state, lengths, *others, *numbers)
            torch.cuda.synchronize()
            print(f"{name} decode {count}: {'finite' if bool(out.isfinite().all()) else 'NOT FINITE'}", flush=True)


def main() -> None:
    attend()
    decode()


if __name__ == "__main__":
    main()
