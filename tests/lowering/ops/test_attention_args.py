"""The table of arguments, what is made of it, and what compile caches know of the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util as importlib_util
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import infllm_pass.kernels
from infllm_pass.errors import ConfigError
from infllm_pass.kernels.cpu import native
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.lowering.export import fused_op
from infllm_pass.lowering.ops import cu_seqlens, decode, positions, prefill, sources
from infllm_pass.lowering.ops.attention_args import (
    ARGUMENTS,
    SIGNATURES,
    AttentionCall,
    DecodeCall,
    flatten_tensors,
    geometry_of,
    geometry_text,
    no_gradients,
    restore_tensors,
)
from tests.support import ROOT

OPERATORS = [prefill.compress_keys, prefill.select_blocks, prefill.block_attention, prefill.block_attention_backward]
OPERATORS += [decode.decode_attention, fused_op.switchable_attention]

GEOMETRY = BlockGeometry(8, 4, 16, 1, 2, 7, "exact", 4)


def test_the_namespace_holds_these_operators_and_no_others():
    """On all devices, and with Triton."""
    script = """
import importlib, pkgutil, torch
import infllm_pass.kernels, infllm_pass.lowering
for package in (infllm_pass.kernels, infllm_pass.lowering):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "tensorrt" not in module.name:
            importlib.import_module(module.name)
names = (name.removeprefix("infllm::") for name in torch._C._dispatch_get_all_op_names() if "infllm::" in name)
print(*sorted({name.split(".")[0] for name in names}))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert found == sorted([*SIGNATURES, "checked_positions", "segment_bounds"])


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_schemas_are_those_of_the_table(operator):
    schema = operator.default._schema
    types = [f"{ARGUMENTS[name].type} {name}" for name in SIGNATURES[operator.name].names]
    assert (
        str(schema).replace("Tensor(a!)[]", "Tensor[]").startswith(f"infllm::{operator.name}({', '.join(types)}) -> ")
    )
    written = [argument.name for argument in schema.arguments if argument.is_write]
    assert written == (["state"] if operator is decode.decode_attention else [])
    assert all(argument.name in operator.__doc__ for argument in schema.arguments)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_call_is_read_as_it_was_written(name):
    signature = SIGNATURES[name]
    own = tuple(object() for _ in signature.own)
    mask = torch.ones(1, 4, dtype=torch.bool)
    if signature.record is DecodeCall:
        call = DecodeCall(torch.tensor([3]), 0.5, 64, GEOMETRY, torch.tensor([1]), mask, 9)
        arguments = call.arguments
    else:
        call = AttentionCall(0.5, 64, GEOMETRY, mask, offset=3, window=9)
        left_out = len(SIGNATURES["select_blocks"].names) - 3 - (len(signature.names) - len(own))
        arguments = tuple(
            value
            for field, value in zip(SIGNATURES["select_blocks"].names[3:], call.arguments, strict=True)
            if field in signature.names
        )
        assert len(call.arguments) - len(arguments) == left_out
    assert signature.read((*own, *arguments)) == (own, call)
    by_name = dict(zip(signature.names, (*own, *arguments), strict=True))
    del by_name[signature.names[0]]
    assert signature.positional(own[:1], by_name) == (*own, *arguments)


def test_no_function_takes_many_parameters():
    """In lowering; those of kernels are what the kernels need."""
    for file in (ROOT / "lowering").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = node.args
                count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
                assert count <= 12, (file, getattr(node, "name", "lambda"))


TOKENS = replace(GEOMETRY, scorer="tokens", channels=((3, 4, 5, 9),))
GEOMETRIES = [
    BlockGeometry(),
    GEOMETRY,
    replace(GEOMETRY, init_blocks=0),
    replace(GEOMETRY, lse="coarse"),
    replace(GEOMETRY, agnostic_blocks=2),
    TOKENS,
    replace(TOKENS, channels=((0,), (7,))),
    replace(TOKENS, channels=(tuple(range(16)), (0, 2, *range(4, 18))), score_dtype="int8"),
]


def test_a_geometry_has_one_text():
    text = "l=32,s=16,b=64,init=1,local=32,sel=96,lse=coarse,qb=1,score=pooled,ch=,idx=key,agn=0"
    assert BlockGeometry().format() == text
    assert len({geometry.format() for geometry in GEOMETRIES}) == len(GEOMETRIES)
    for geometry in GEOMETRIES:
        assert BlockGeometry.parse(geometry.format()) == geometry
        assert geometry_of(geometry_text(geometry)) == geometry


def test_channels_are_written_as_runs():
    assert "score=tokens,ch=3-5+9-9,idx=key" in TOKENS.format()
    assert (TOKENS.score_dims, BlockGeometry().score_dims) == (4, 0)


@pytest.mark.parametrize("changed", ["l", "lse=other", "l=x", "other=1", "score=other", "idx=int4", "ch=3-x", "ch=3"])
def test_other_texts_are_no_geometry(changed):
    entries = [entry for entry in BlockGeometry().format().split(",") if not entry.startswith(changed[:2])]
    with pytest.raises(ConfigError, match="geometry="):
        BlockGeometry.parse(",".join([*entries, changed]))


def test_tensors_come_back_to_their_places():
    one, two, three = (torch.tensor(number) for number in range(3))
    given = [one, None, [two, three], 7, [], "text"]
    tensors, rest = flatten_tensors(given)
    assert tensors == [one, two, three]
    assert restore_tensors(tensors, rest) == given
    assert no_gradients(rest) == (None, None, [None, None], None, [], None)


def test_numbers_of_a_call_are_in_the_order_of_its_struct():
    """`call_numbers` against ``infllm::Call``; what the geometry gives is there under the names of its fields."""
    sizes = [("batch", "heads_q", "length_q", "dim"), ("_", "heads", "length_k", "_"), ("_", "_", "_", "dim_v")]
    strides = [tuple(f"stride_{name}{place}" for place in range(4)) for name in "qkv"]
    fixed = {name: name for name in native.fixed_numbers(None, 0, BlockGeometry())}
    words = {"lse", "scorer", "channels", "score_dtype", "agnostic_blocks"}
    index = {"index_dims", "index_kind"}
    assert set(fixed) == {*vars(BlockGeometry()), "window", "dense_len", "exact", *index} - words
    numbers = native.call_numbers(*sizes, *strides, "offset", fixed)
    assert numbers == fields_of("query_chunk.h", "struct Call")
    assert set(fixed) < set(fields_of("decode_attention.h", "struct DecodeCall"))


def fields_of(header: str, struct: str) -> list[str]:
    """The integers of a struct in a header, arrays written out."""
    text = (ROOT / "kernels" / "cpu" / "csrc" / header).read_text()
    body = text.split(f"{struct} {{")[1].split("double scale")[0]
    fields = []
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if not line.startswith("int64_t"):
            continue
        for field in line.removeprefix("int64_t").rstrip(";").split(","):
            name, _, count = field.strip().partition("[")
            fields += [f"{name}{place}" for place in range(int(count.rstrip("]")))] if count else [name]
    return fields


def imported_files(module) -> set[Path]:
    """Files of this project that a module imports, and those that they import, inside of functions too."""
    found, pending = set(), [module]
    while pending:
        current = pending.pop()
        file = Path(inspect.getfile(current))
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                package = current.__name__ if file.name == "__init__.py" else current.__name__.rpartition(".")[0]
                base = importlib_util.resolve_name(base, package) if node.level else base
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("infllm_pass."):
                    pending += [sys.modules[name]] if name in sys.modules else load(name)
    return found


def load(name: str) -> list:
    """The module of a name, none where the name is of something in a module."""
    try:
        found = importlib_util.find_spec(name)
    except ModuleNotFoundError:
        return []
    return [] if found is None else [importlib.import_module(name)]


def test_compile_caches_depend_on_all_code_behind_the_operators():
    """Of kernels and operators every module that is imported, however deep, and every C++ header."""
    pytest.importorskip("triton")
    hashed = set(sources.source_files())
    folders = [Path(infllm_pass.kernels.__path__[0]), Path(prefill.__file__).parent]
    reached = set().union(*(imported_files(module) for module in (prefill, decode, cu_seqlens, positions)))
    inside = {file for file in reached if any(folder in file.parents for folder in folders)}
    names = {file.name for file in inside}
    assert {"prefill_triton.py", "attention_args.py", "dkv.py", "persistent.py", "topk.py", "native.py"} <= names
    assert inside <= hashed
    assert {file.name for file in hashed if file.suffix == ".h"} >= {"switchable_attention.h", "vectors.h"}
    assert geometry_text(GEOMETRY).endswith(f";{sources.SOURCES}")


def test_the_hash_changes_with_any_file(tmp_path, monkeypatch):
    for name in ("one.py", "deep/er/two.h", "deep/table.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sources.infllm_pass.kernels, "__path__", [str(tmp_path)])
    hashes = {sources._hash()}
    for file in tmp_path.rglob("*.*"):
        file.write_text("changed")
        hashes.add(sources._hash())
    assert len(hashes) == 4
