"""Private names of other packages are read in ``infllm_pass/compat`` alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDERS = ("infllm_pass", "lowering", "kernels")
COMPAT = ROOT / "infllm_pass" / "compat"
OPERATORS = ("aten", "torch.ops")
"""Operators are called by the names of their schemas, which are kept compatible, underscore or not."""

UNSTABLE = ("torch.fx.experimental",)
KEYS = ("grapharg", "tensor_dict", "_dynamo_static_input_type")
"""Keys of ``Node.meta`` that PyTorch nowhere describes."""


def modules() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if COMPAT not in path.parents)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Underscored names that this package defines itself: functions, classes, attributes of ``self``, constants."""
    found: set[str] = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if is_private(name)}


def uses(source: str, own: set[str] = frozenset()) -> Iterator[tuple[int, str]]:
    """Where a module reads a private name of another package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if any(map(is_private, alias.name.split("."))) or alias.name.startswith(UNSTABLE):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and not (node.module or "").startswith("infllm_pass"):
            name = node.module or ""
            private = any(map(is_private, name.split("."))) or any(is_private(alias.name) for alias in node.names)
            if name != "__future__" and (private or name.startswith(UNSTABLE)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if not ast.unparse(node.value).startswith(OPERATORS):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.FunctionDef) and _overrides(node):
            yield node.lineno, f"super().{node.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and is_private(name) and name not in own:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = getattr(node.args[0], "value", None)
            if isinstance(name, str) and any(map(is_private, name.split("."))):
                yield node.lineno, name
        elif isinstance(node, ast.Constant) and node.value in KEYS:
            yield node.lineno, repr(node.value)


def _overrides(function: ast.FunctionDef) -> bool:
    """Whether a private method calls the one that it overrides, and so relies on a base class's private name."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == function.name)
    return is_private(function.name) and any(ast.unparse(call.value).startswith("super(") for call in calls)


OWN = own_names()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_another_package_is_read(path):
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in uses(path.read_text(), OWN)]
    assert not found, "give each a function in infllm_pass/compat, with a test of its own:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from torch._dynamo import OptimizedModule",
        "import torch._inductor.config",
        "from torch.utils import _pytree",
        "from torch.fx.experimental.symbolic_shapes import statically_known_true",
        "model._orig_mod",
        "torch._C._has_mkldnn",
        "getattr(function, '_torchdynamo_disable', False)",
        "node.meta['grapharg']",
        "importlib.import_module('a._b.c')",
        "class A(B):\n    def _prepare(self):\n        return super()._prepare()",
    ],
)
def test_private_names_are_found(source):
    assert list(uses(source))


@pytest.mark.parametrize(
    "source", ["self.__dict__", "torch.ops.aten._softmax.default", "from __future__ import a", "a.b"]
)
def test_other_names_are_not(source):
    assert not list(uses(source))


def test_compat_imports_nothing_of_the_package_but_errors():
    for path in COMPAT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not name.startswith("infllm_pass") or name == "infllm_pass.errors", f"{path.name}: {name}"
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: relative import"
