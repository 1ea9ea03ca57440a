"""What the distribution installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import infllm_pass

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_nothing_installs_at_top_level_beside_the_package(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"infllm_pass"}


def test_every_module_of_the_tree_is_in_the_wheel(wheel):
    names = set(wheel.namelist())
    folders = {"infllm_pass": "infllm_pass", "lowering": "infllm_pass/lowering", "kernels": "infllm_pass/kernels"}
    for folder, installed in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{installed}/{path.relative_to(ROOT / folder)}" in names
    headers = {
        f"infllm_pass/kernels/cpu/csrc/{name}.h" for name in ("vectors", "switchable_attention", "decode_attention")
    }
    assert {"infllm_pass/py.typed", *headers} <= names


def test_the_wheel_has_the_version_of_the_module(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert f"\nVersion: {infllm_pass.__version__}\n" in wheel.read(metadata).decode()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_entry_points_and_licence(wheel):
    names = wheel.namelist()
    (points,) = [name for name in names if name.endswith("entry_points.txt")]
    text = wheel.read(points).decode()
    assert "infllm = infllm_pass.frontend.backend:infllm" in text
    assert "infllm-pass = infllm_pass.tools.cli:main" in text
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_backend_entry_point_loads():
    (point,) = entry_points(group="torch_dynamo_backends", name="infllm")
    assert callable(point.load())


def test_importing_the_package_needs_no_optional_dependency():
    program = (
        "import sys; sys.modules.update({name: None for name in ('transformers', 'matplotlib', 'triton', 'onnx')}); "
        "import infllm_pass; print(infllm_pass.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == infllm_pass.__version__
