"""Helpers for tests of the Triton kernels: interpreter switch, selections as lists, ahead-of-time compilation."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterable

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from infllm_pass.kernels.triton.tile_tables import TileLists, TilePlan, TileShape


def lists_from_sets(selected: Tensor, plan: TilePlan, capacity: int, *, dense_len: int = 0) -> TileLists:
    """The lists of a selection given as a set, bool ``[B, Hkv, Lq, n_blocks]``, built entry by entry."""
    shape: TileShape = plan.shape
    heads = selected.shape[1]
    blocks = torch.full((plan.num_tiles, heads, capacity), -7, dtype=torch.int16)
    tokens = torch.full((plan.num_tiles, heads, capacity), -1, dtype=shape.mask_dtype)
    counts = torch.zeros(plan.num_tiles, heads, dtype=torch.int32)
    sets = selected.cpu()
    for number, (batch, query, begin, end, _, _, length, _) in enumerate(plan.panels.cpu().tolist()):
        if end == 0 or length < dense_len:
            continue
        for part in range(shape.tiles):
            tile = number * shape.tiles + part
            masks: dict[tuple[int, int], int] = {}
            for token in range(shape.tokens):
                index = part * shape.tokens + token
                if begin <= index < end:
                    for head, block in sets[batch, :, query + index].nonzero().tolist():
                        masks[head, block] = masks.get((head, block), 0) | 1 << token
            for (head, block), mask in sorted(masks.items()):
                at = int(counts[tile, head])
                bits = 8 * tokens.element_size()
                blocks[tile, head, at] = block
                tokens[tile, head, at] = mask - (1 << bits) if mask >> (bits - 1) else mask
                counts[tile, head] += 1
    device = selected.device
    return TileLists(blocks.to(device), tokens.to(device), counts.to(device))


def sets_from_lists(lists: TileLists, plan: TilePlan, batch: int, heads: int, queries: int, blocks: int) -> Tensor:
    """The selection that lists stand for, bool ``[B, Hkv, Lq, n_blocks]``; asserts that the lists are well formed."""
    sets = torch.zeros(batch, heads, queries, blocks, dtype=torch.bool)
    numbers, masks, counts = lists.blocks.cpu().long() & 0xFFFF, lists.tokens.cpu().long(), lists.counts.cpu()
    shape = plan.shape
    for panel, (row, query, begin, end, *_) in enumerate(plan.panels.cpu().tolist()):
        for part in range(shape.tiles):
            tile = panel * shape.tiles + part
            for head in range(heads):
                count = int(counts[tile, head])
                if not count:
                    continue
                listed, mask = numbers[tile, head, :count], masks[tile, head, :count]
                assert bool((listed[1:] > listed[:-1]).all()), "blocks ascend"
                assert bool((mask != 0).all()), "every entry has a token"
                for token in range(shape.tokens):
                    hit = (mask >> token) & 1 != 0
                    index = part * shape.tokens + token
                    if begin <= index < end:
                        sets[row, head, query + index, listed[hit]] = True
                    else:
                        assert not bool(hit.any()), "only tokens that exist"
    return sets.to(lists.blocks.device)


_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one program may use, by compute capability."""


def capabilities(number: int, dtype: torch.dtype, hot: bool) -> Iterable[int]:
    """GPUs to compile a kernel's variant for: as few as show what differs between them.

    The first variant has one of each generation of matrix instructions. Hot ones, which must not spill there, have
    sm_90; float32, whose tiles fill it, the least shared memory; the others one of both by turns.

    Args:
        number: the variant's place among the variants of its kernel.
        dtype: that of queries and keys.
        hot: whether a tuned configuration is concerned.
    """
    if number == 0:
        return 86, 90, 100
    return (90,) if hot or (number % 2 and dtype.itemsize == 2) else (86,)


def compile_ahead(
    kernel: triton.JITFunction,
    arguments: dict[str, object],
    *,
    capability: int,
    num_warps: int,
    num_stages: int,
    **options,
) -> dict[str, int]:
    """Compile a kernel without a GPU; registers, spilled bytes and shared memory as the assembler reports them.

    Args:
        kernel: the kernel.
        arguments: a value for every parameter: a dtype for a pointer to it, the type name "i32" (or "i32:16" where
            the caller always passes multiples of 16), "i64" or "fp32" for numbers, anything else for constexprs.
        capability: 90 for sm_90.
        num_warps: as at launch.
        num_stages: as at launch.
    """
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.dtype):
            signature[name] = _POINTERS[value]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, str) and value.split(":")[0] in ("i32", "i64", "fp32"):
            signature[name] = value.split(":")[0]
            if value.endswith(":16"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages, **options},
        )
    report = log.getvalue() if "Used" in log.getvalue() else _assemble(compiled.asm["ptx"], capability)
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", report)]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    return {"registers": max(registers), "spilled": max(spilled, default=0), "shared": compiled.metadata.shared}


def _assemble(ptx: str, capability: int) -> str:
    """What the assembler reports of a kernel that Triton took from its cache."""
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", "--gpu-name", architecture, file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
