"""AOTInductor packages of exported programs that run without Python and without this project.

Triton operators are compiled in as they are. The CPU's operators are Python, which a package cannot call: a C++ kernel
takes their place (`lowering.inductor.cpp_extern`).
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from infllm_pass.compat import inductor
from infllm_pass.compat.shapes import expression_of
from infllm_pass.errors import ExportError

from ..export import fused_op
from ..export.atomic_file import refuse_unwritable, written_whole
from . import cpp_extern
from .mutation_cache import remembered_accesses

SUFFIX = ".pt2"

RANGES = "infllm_pass.input_sizes"
"""Key of a package's metadata. JSON: for every tensor a list of sizes, each a number or ``[least, most or null]``."""


class PackageTarget:
    """A package to be written, checked before any work is done for it.

    Args:
        path: the file.
        overwrite: whether an existing file is replaced.

    Raises:
        ExportError: the file exists or cannot be written, its name does not end in ``.pt2``, or there is no C++
            compiler.
    """

    def __init__(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix != SUFFIX:
            raise ExportError(f"{self.path} is no name for a package: let it end in {SUFFIX}")
        refuse_unwritable(self.path, overwrite=overwrite)
        _require_compiler()

    def write(self, program: ExportedProgram) -> None:
        """Compile a program; the file appears whole, or not at all.

        Args:
            program: the program, from `infllm_pass.export`. Its graph is changed.

        Raises:
            ExportError: a part of the program cannot be compiled, or the file cannot be written.
            DtypeError: a site on the CPU has a dtype that is not taken.
        """
        join(program)
        options = {"aot_inductor.metadata": {RANGES: json.dumps(input_sizes(program))}}
        for node in program.graph.nodes:
            if node.target is fused_op.OPERATOR:
                node.target = cpp_extern.OPERATOR
        with written_whole(self.path) as path, remembered_accesses():
            try:
                inductor.compile_package(program, str(path), options)
            except inductor.package_errors() as error:
                raise ExportError(f"Inductor cannot compile the program: {error}") from error


def _require_compiler() -> None:
    try:
        inductor.find_cpp_compiler()
    except inductor.cpp_errors() as error:
        raise ExportError("packaging needs a C++ compiler: install g++, or name one in the variable CXX") from error


def join(program: ExportedProgram) -> None:
    """Make one operator of all calls that are implemented in Python, the one that has a C++ kernel.

    Args:
        program: the program. Its graph is changed.

    Raises:
        ExportError: a call has no such form.
        DtypeError: a call has a dtype that is not taken.
    """
    fused_op.join_sites(program.graph, lambda node: not fused_op.is_tiled(node))
    for node in program.graph.nodes:
        if node.target is not fused_op.OPERATOR:
            continue
        example = node.meta["val"]
        if example.device.type != "cpu":
            raise ExportError(
                f"{node.name} is left to torch operators on {example.device.type}, which are packaged for the CPU "
                f"only: {fused_op.refusal(node) or 'this program was exported for another device'}"
            )


def input_sizes(program: ExportedProgram) -> list[list[Any]]:
    """The sizes that a program takes: for every tensor among its inputs, numbers and ranges."""
    users = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    sizes = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in users:
            value = node.meta.get("val")
            sizes.append([_range(program, size) for size in value.shape] if isinstance(value, Tensor) else [])
    return sizes


def _range(program: ExportedProgram, size: int | SymInt) -> int | list[int | None]:
    if isinstance(size, int):
        return size
    bounds = program.range_constraints.get(expression_of(size))
    if bounds is None:
        return [0, None]
    # torch.export says 2 where nothing was asked for, and tells 1 from it by its strides alone.
    least = 1 if bounds.lower <= 2 else int(bounds.lower)
    return [least, int(bounds.upper) if bounds.upper.is_Integer else None]
