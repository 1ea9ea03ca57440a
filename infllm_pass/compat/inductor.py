"""Inductor and AOTInductor: settings of the compilation that runs, packages, C++ compilers.

Inductor is imported when a function is called: it takes longer to import than all else that this package needs.
"""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import torch
from torch.export import ExportedProgram


def compiles_ahead_of_time() -> bool:
    """Whether the compilation that runs in this thread is one of AOTInductor.

    ``V.aot_compilation``, the same in torch 2.11 to 2.15. Nothing public.
    """
    from torch._inductor.virtualized import V

    return bool(V.aot_compilation)


def records_cuda_graphs() -> bool:
    """Whether the compilation that runs in this thread is to record CUDA graphs.

    ``torch._inductor.config.triton.cudagraphs``, the same in torch 2.11 to 2.15; ``torch.compile`` sets it through
    ``mode`` or ``options``, and there is no public way to read it.
    """
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def compile_package(program: ExportedProgram, path: str, options: dict[str, Any]) -> None:
    """Compile an exported program into a file that needs no Python.

    ``torch._inductor.aoti_compile_and_package``, which PyTorch documents under this name; the same in torch 2.11 to
    2.15.

    Raises:
        Exception: one of `package_errors`: Inductor cannot compile a part of the program.
    """
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def package_errors() -> tuple[type[Exception], ...]:
    """What `compile_package` raises for a program that it cannot compile; ``InductorError`` in torch 2.11 to 2.15."""
    from torch._inductor import exc

    return (exc.InductorError,)


def load_package(path: str) -> Any:
    """A callable for a file that `compile_package` wrote.

    ``torch._inductor.aoti_load_package``, which PyTorch documents under this name; the same in torch 2.11 to 2.15.
    """
    return torch._inductor.aoti_load_package(path)


def find_cpp_compiler() -> str:
    """The C++ compiler that Inductor calls.

    ``torch._inductor.cpp_builder.get_cpp_compiler``, the same in torch 2.11 to 2.15. Nothing public.

    Raises:
        Exception: one of `cpp_errors`: there is none.
    """
    from torch._inductor import cpp_builder

    return str(cpp_builder.get_cpp_compiler())


def compiled_cpp(source: str) -> ctypes.CDLL:
    """C++ compiled with Inductor's compiler and flags, kept in its cache on disk.

    ``torch._inductor.codecache.CppCodeCache.load``, the same in torch 2.11 to 2.15.
    ``torch.utils.cpp_extension.load_inline`` is public, but needs ninja and knows nothing of vector flags.

    Raises:
        Exception: one of `cpp_errors`: there is no compiler, or it refuses the source.
    """
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load(source)
    return library


def cpp_errors() -> tuple[type[Exception], ...]:
    """What `find_cpp_compiler` and `compiled_cpp` raise.

    ``InvalidCxxCompiler`` and ``CppCompileError`` of ``torch._inductor.exc``, the same in torch 2.11 to 2.15; OSError
    where the cache cannot be written or the library not be loaded.
    """
    from torch._inductor import exc

    return exc.InvalidCxxCompiler, exc.CppCompileError, OSError


def kernel_readers() -> tuple[ModuleType, tuple[str, ...]]:
    """The functions that read off a Triton kernel's source what it writes to: their module, and their names there.

    ``torch._higher_order_ops.triton_kernel_wrap``: ``identify_mutated_tensors`` in torch 2.11,
    ``identify_accessed_tensors`` from 2.13 on. Each takes the kernel, its arguments and its tensor descriptors. Nothing
    public replaces them: a ``triton_op`` does not say what its kernels write.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    names = ("identify_accessed_tensors", "identify_mutated_tensors")
    return triton_kernel_wrap, tuple(name for name in names if hasattr(triton_kernel_wrap, name))
