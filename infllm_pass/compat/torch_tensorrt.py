"""Torch-TensorRT: where its converters and its lowering passes are registered.

Nothing is imported before a function is called: the package needs a GPU to be imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any


def converter_registry() -> ModuleType:
    """The module that holds ``DYNAMO_ATEN_CONVERTERS`` and ``dynamo_tensorrt_converter``.

    ``torch_tensorrt.dynamo.conversion._ConverterRegistry`` in torch-tensorrt 2.11. The decorator is public as a member
    of ``torch_tensorrt.dynamo.conversion``, the table is not.
    """
    return importlib.import_module("torch_tensorrt.dynamo.conversion._ConverterRegistry")


def add_lowering_pass(lowering_pass: Callable[..., Any]) -> None:
    """Run a function of a graph module and the settings before Torch-TensorRT partitions a graph.

    ``torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass``, a decorator, in torch-tensorrt 2.11. Nothing public.
    """
    importlib.import_module("torch_tensorrt.dynamo.lowering.passes")._aten_lowering_pass(lowering_pass)
