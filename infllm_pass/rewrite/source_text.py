"""Parts of a graph as Python source: targets by the name they are imported by, arguments as literals."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import fx

from infllm_pass.compat.aten import registered_name
from infllm_pass.compat.shapes import number_hint

_WELL_KNOWN = ("torch", "torch.nn.functional", "operator", "math", "builtins")
"""Modules that a function is named by rather than by the one that defines it."""


class Unwritable(Exception):
    """Something has no name or literal that another process could read; the message says what."""


def reference(target: Any) -> str:
    """An expression for a function or class, by its module; see `module_of`.

    Raises:
        Unwritable: no module offers it by name.
    """
    registered = registered_name(target)
    if registered is not None:
        return _checked(target, "torch", f"ops.{registered}")
    own, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    if not isinstance(name, str):
        raise Unwritable(f"{target!r} has no name")
    places = [(module, name) for module in _WELL_KNOWN]
    places.append(("torch", f"Tensor.{name}"))
    if isinstance(own, str):
        places += [(own, getattr(target, "__qualname__", name)), (own, name)]
    for module, path in places:
        if _resolved(module, path) is target:
            return f"{module}.{path}"
    raise Unwritable(f"{own}.{name} cannot be imported by its name")


def _checked(target: Any, module: str, path: str) -> str:
    if _resolved(module, path) is not target:
        raise Unwritable(f"{module}.{path} is not what the graph calls")
    return f"{module}.{path}"


def _resolved(module: str, path: str) -> object:
    """What a dotted path in a module stands for; None if there is nothing."""
    try:
        value: object = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return value


def module_of(expression: str) -> str | None:
    """The module to import for an expression that `reference` made; None for a builtin."""
    parts = expression.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return None if name == "builtins" else name
    return None


def literal(value: Any, names: Mapping[fx.Node, str], refer: Callable[[Any], str] = reference) -> str:
    """An expression for an argument of a node.

    Args:
        value: the argument.
        names: the variables of the nodes that may be read.
        refer: makes the expression for a function or class.

    Raises:
        Unwritable: a part of it is no literal, or a node without a variable.
    """

    def of(part: Any) -> str:
        return literal(part, names, refer)

    if isinstance(value, fx.Node):
        if value not in names:
            raise Unwritable(f"node {value.name} is not in the graph")
        return names[value]
    if isinstance(value, Enum):
        return f"{refer(type(value))}.{value.name}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return repr(hint(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str)):
        return "..." if value is Ellipsis else repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(of, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(of, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{of(key)}: {of(part)}" for key, part in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({of(value.start)}, {of(value.stop)}, {of(value.step)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if callable(value):
        return refer(value)
    raise Unwritable(f"an argument is a {type(value).__name__}")


def hint(size: Any) -> Any:
    """The value that a dynamic number had in the traced call, without a guard on it; other numbers as they are.

    Raises:
        Unwritable: it had none.
    """
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    value = number_hint(size)
    if value is None:
        raise Unwritable(f"the size {size} is computed from data")
    return value
