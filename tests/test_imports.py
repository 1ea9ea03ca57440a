"""What a process that runs tests finds under the names of the checkout's folders."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier())


def places(name):
    spec = importlib.util.find_spec(name)
    return [] if spec is None else [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else ())]


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in ("tests", "infllm_pass")])
def test_no_folder_of_the_checkout_stands_for_a_package(name):
    assert not [place for place in places(name) if Path(place).resolve().is_relative_to(ROOT / name)]


PROBE = """
import importlib.util, runpy, sys
import {package}
spec = importlib.util.find_spec("kernels")
print([] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())])
"""


@pytest.mark.parametrize("package", ["tests", "tests.conftest", "tests.zoo"])
def test_modules_of_the_tests_leave_the_checkout_off_the_path(package):
    command = [sys.executable, "-c", PROBE.format(package=package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "kernels") not in done.stdout
