"""TensorRT engines from ONNX files and exported programs, with a plugin for attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infllm_pass.lowering.export.tensorrt.engine import EngineReport

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""For every input with dynamic sizes its least, most usual and largest shape."""


def export_tensorrt(
    onnx_path: str | PathLike[str],
    engine_path: str | PathLike[str],
    profile: Profile | None = None,
    *,
    plugin: bool = True,
    progress: bool = True,
    overwrite: bool = False,
) -> EngineReport:
    """Build a TensorRT engine from a file that `export_onnx` wrote.

    Args:
        onnx_path: the file.
        engine_path: the engine to write.
        profile: shapes of inputs with dynamic sizes.
        plugin: whether attention becomes the plugin; if not, TensorRT imports the body of the nodes.
        progress: whether a bar shows how far TensorRT has come, on a terminal.
        overwrite: whether an existing engine is replaced.

    Returns:
        Which nodes became the plugin, and the engine's inputs.

    Raises:
        MissingDependencyError: neither ``tensorrt`` nor ``tensorrt_rtx`` is installed.
        ExportError: TensorRT cannot parse the file or build the engine, a profile is missing, or the engine exists or
            cannot be written. Nothing is written then.
    """
    from infllm_pass.lowering.export.tensorrt.engine import EngineTarget

    target = EngineTarget(engine_path, overwrite=overwrite)
    return target.build(onnx_path, profile or {}, plugin=plugin, progress=progress)


def register_torch_tensorrt() -> None:
    """Let Torch-TensorRT put the plugin in the place of attention in programs that `export` gave on a CUDA device.

    After it ``torch_tensorrt.dynamo.compile(program, inputs)`` builds engines with the plugin. Sites that the Triton
    kernels do not take (see the report's column `kernels`) run in PyTorch, between engines.

    Raises:
        MissingDependencyError: ``torch_tensorrt`` is not installed.
    """
    from infllm_pass.lowering.export.tensorrt.torch_tensorrt import register_converters

    register_converters()
