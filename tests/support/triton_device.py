"""Where the tests of the Triton kernels run: on the GPU, or else in Triton's interpreter, in a process of its own.

The interpreter has to be chosen before Triton is imported and changes it for good, so a test file of kernels uses
`DEVICE` and ends with `arrange(globals())`: without a GPU, its tests then give way to a single one that runs the
file again with TRITON_INTERPRET=1, marked `interpreter`. Set that variable by hand to run, select or debug the tests
one by one.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.interpreter_host import run_in_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DIRECT = INTERPRETED or torch.cuda.is_available()
"""Whether this process can run the kernels."""

DEVICE = torch.device("cuda" if DIRECT and not INTERPRETED else "cpu")


def _hasten_interpreter() -> None:
    """Spare Triton's interpreter work that changes no result: more than half of its time.

    It patches the language anew for every call of a device function, though what the launch's first call of a function
    of that module has patched lasts; it computes checks for integer overflow that it heeds in debug mode only; and it
    derives for every value anew what follows from its type.
    """
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: dict[int, Any] = {}

    def launch_anew(executor: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()
        launch(executor, *arguments, **named)

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch(function)
        return patched[module]

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, patch_once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    _remember_types()


def _remember_types() -> None:
    """Make the types of Triton's values, and what is derived from them, once for each element type and shape."""
    core = interpreter.tl.core
    find, make_block, make_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    dtypes: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, dict[str, Any]] = {}

    def find_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find(dtype)
        return dtypes[name]

    def make_block_once(block: Any, element: Any, shape: Any) -> None:
        key = element.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            make_block(block, element, shape)
            blocks[key] = {name: value for name, value in vars(block).items() if name != "element_ty"}
        vars(block).update(blocks[key], element_ty=element)

    def make_tensor_once(tensor: Any, handle: Any, kind: Any) -> None:
        key = tuple(kind.shape) if kind.is_block() else ()
        if key not in shapes:
            make_tensor(tensor, handle, kind)
            shapes[key] = {"shape": tensor.shape, "numel": tensor.numel}
        vars(tensor).update(shapes[key], handle=handle, type=kind, dtype=kind.scalar)

    interpreter._get_np_dtype = find_once
    core.block_type.__init__ = make_block_once
    core.tensor.__init__ = make_tensor_once


if INTERPRETED:
    from triton.runtime import interpreter

    _hasten_interpreter()


def gpu(test: Any) -> Any:
    """Marks a test that needs a CUDA device: the interpreter has no right bfloat16, and is too slow for long inputs."""
    skip = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


def arrange(namespace: dict[str, Any]) -> None:
    """Last line of a test file: ``arrange(globals())``."""
    if DIRECT:
        return
    for name in [name for name in namespace if name.startswith("test_")]:
        del namespace[name]

    @pytest.mark.interpreter
    def test_in_interpreter(record_property):
        record_property("passed", _run_in_interpreter(namespace["__file__"]))

    namespace["test_in_interpreter"] = test_in_interpreter


def _run_in_interpreter(file: str) -> int:
    """Run a test file again under the interpreter; the number of tests that passed."""
    status, output = run_in_interpreter(file)
    passed = re.search(r"(\d+) passed", output)
    if status or not passed:
        pytest.fail(f"under the interpreter:\n{output}", pytrace=False)
    print(f"{passed[1]} tests passed under the interpreter")
    return int(passed[1])
