"""States of modules: the prefix that compiled modules put before names, and who relies on it."""

from __future__ import annotations

import inspect
from typing import Any

PREFIX = "_orig_mod."
"""What a compiled module puts before the names of its original's parameters; the same in torch 2.11 to 2.15."""


def drop_compile_prefix(state: dict[str, Any], prefix: str) -> None:
    """Name what a compiled module has put into a state as its original would.

    The versions of modules are kept beside a state under the names of modules: ``_metadata``, an attribute of the
    dictionary in torch 2.11 to 2.15.

    Args:
        state: the state, changed in place.
        prefix: what names of the compiled module begin with.
    """
    full = prefix + PREFIX
    for name in [name for name in state if name.startswith(full)]:
        state[prefix + name.removeprefix(full)] = state.pop(name)
    versions: dict[str, Any] = getattr(state, "_metadata", {})
    for name in [name for name in versions if f"{name}.".startswith(full)]:
        versions[(prefix + f"{name}.".removeprefix(full))[:-1]] = versions.pop(name)


def add_compile_prefix(state: dict[str, Any], prefix: str) -> None:
    """Name what a compiled module is to load as itself; names that have its prefix already stay.

    Args:
        state: the state, changed in place.
        prefix: what names of the compiled module begin with.
    """
    full = prefix + PREFIX
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(full)]:
        state[full + name.removeprefix(prefix)] = state.pop(name)


def asked_for_by_checkpoint() -> bool:
    """Whether ``torch.distributed.checkpoint.state_dict`` is calling, which takes the prefix off by itself.

    It follows every name through the modules and raises where the prefix is missing; the same in torch 2.11 to 2.15.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False
