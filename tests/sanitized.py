"""Every Triton kernel once, on odd sizes, for NVIDIA's compute-sanitizer; no test file. See ``make sanitize``."""

from __future__ import annotations

import torch

from infllm_pass import SparseAttentionConfig, switchable_attention

CONFIG = SparseAttentionConfig(
    kernel_size=32, kernel_stride=16, block_size=64, window_size=128, topk=4, init_blocks=1, dense_len=0
)
CASES = {"G=4": (8, 2, 64), "G=16": (16, 1, 128), "G=3, D=80": (3, 1, 80)}
LENGTH = 777


def main() -> None:
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


if __name__ == "__main__":
    main()
