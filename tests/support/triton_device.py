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
    """Spare Triton's interpreter work that changes no result: half of its time.

    It patches the language anew for every call of a device function, though what the launch's first call of a function
    of that module has patched lasts; and it computes checks for integer overflow that it heeds in debug mode only.
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
