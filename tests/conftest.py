from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor_config

from infllm_pass import SparseAttentionConfig
from infllm_pass.tools.checkpoint import load_model, load_tokenizer
from tests.support import ROOT
from tests.support.common import SMALL, llama

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["kernels/triton/*", "gpu/*", "benchmarks/test_benchmark_stages.py"]


def pytest_collection_modifyitems(items):
    """What takes longest comes first, long before the end, and in one worker, which shares what it loads."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("checkpoint", "interpreter")))


def pytest_collection_finish():
    """Spare the collector the objects of modules, which stay: an eighth of the time of tests that compile."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def small() -> SparseAttentionConfig:
    return SMALL


@pytest.fixture
def shared_cpp_runtime(tmp_path):
    """Let AOTInductor use a C++ compiler that links the C++ runtime as a shared library.

    With a static one the process gets a second runtime, and loading a package, whatever is in it, crashes it.
    """
    for compiler in (os.environ.get("CXX", "g++"), "/usr/bin/g++"):
        if links_shared_runtime(compiler, tmp_path):
            with inductor_config.patch({"cpp.cxx": (None, compiler)}):
                yield
            return
    pytest.skip("no C++ compiler here links the C++ runtime as a shared library: set CXX to one")


@pytest.fixture
def cpp_program(tmp_path, monkeypatch):
    """The program of ``examples/cpp``, built: its path, and a function of a package and ids that gives its logits."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("_program")
    try:
        path = program.build_program(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return path, functools.partial(program.run_program, path)


def links_shared_runtime(compiler: str, folder: Path) -> bool:
    library = folder / "probe.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    source = "#include <string>\nstd::string text(int number) { return std::to_string(number); }\n"
    try:
        subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return b"libstdc++.so" in library.read_bytes()


@pytest.fixture(scope="session")
def tiny_llama():
    return llama()


@pytest.fixture(scope="session")
def whole_smollm2():
    """The public checkpoint, read once: its 4-bit weights take longer to unpack than most tests of it."""
    return load_model()


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return load_tokenizer()
