"""TensorRT engine builder: parses the ONNX file, sets the optimization profile, reports progress and layers."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from infllm_pass.errors import ExportError, MissingDependencyError

from ..atomic_file import refuse_unwritable, written_whole
from ..onnx.op_spec import NAME
from .plugin import register_plugin

PACKAGES = ("tensorrt", "tensorrt_rtx")

RTX_LIBRARY = "libtensorrt_rtx.so"

Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class EngineReport:
    """What an engine was built of.

    Attributes:
        package: the package that built it, ``tensorrt`` or ``tensorrt_rtx``.
        version: its version.
        plugins: layers that are the plugin, by the names of their ONNX nodes.
        bodies: loops that stand in the network in place of plugins, from the bodies of nodes.
        inputs: the network's inputs and their shapes, -1 where a size is dynamic.
        size: bytes of the engine.
    """

    package: str
    version: str
    plugins: tuple[str, ...]
    bodies: int
    inputs: Mapping[str, tuple[int, ...]]
    size: int

    def __str__(self) -> str:
        """One line for every plugin, after one for the engine."""
        inputs = ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items())
        lines = [f"{self.package} {self.version}: {len(self.plugins)} plugins, {self.size} bytes; {inputs}"]
        return "\n".join([*lines, *(f"  {name}: {NAME}" for name in self.plugins)])


def find_tensorrt() -> ModuleType:
    """The module ``tensorrt`` or, where that is not installed, ``tensorrt_rtx``.

    Raises:
        MissingDependencyError: neither is installed.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(package)
    raise MissingDependencyError("tensorrt", "tensorrt", "building an engine")


class EngineTarget:
    """An engine to be written, checked before any work is done for it.

    Args:
        path: the file.
        overwrite: whether an existing file is replaced.

    Raises:
        ExportError: the file exists, or its folder cannot be written to.
        MissingDependencyError: TensorRT is not installed.
    """

    def __init__(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        refuse_unwritable(self.path, overwrite=overwrite)
        self.trt = find_tensorrt()

    def build(
        self, onnx_path: str | PathLike[str], profile: Mapping[str, Shapes], *, plugin: bool, progress: bool
    ) -> EngineReport:
        """Build the engine; the file appears whole, or not at all. See `infllm_pass.export_tensorrt`."""
        if not Path(onnx_path).is_file():
            raise ExportError(f"{onnx_path} is no file")
        job = {"onnx_path": os.fspath(onnx_path), "profile": dict(profile), "plugin": plugin, "progress": progress}
        with written_whole(self.path) as path:
            job["engine_path"] = str(path)
            return _build(self.trt, **job) if _finds_library(self.trt) else _build_in_child(self.trt, job)


def _build(
    trt: ModuleType,
    *,
    onnx_path: str,
    engine_path: str,
    profile: Mapping[str, Shapes],
    plugin: bool,
    progress: bool,
) -> EngineReport:
    if plugin:
        register_plugin(trt)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx_path):
        errors = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise ExportError(f"TensorRT cannot parse {onnx_path}: {errors}")
    settings = builder.create_builder_config()
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names stay in the engine
    _add_profile(builder, settings, network, profile)
    with _shown(trt, progress) as monitor:
        if monitor is not None:
            settings.progress_monitor = monitor
        engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise ExportError(f"TensorRT cannot build an engine from {onnx_path}: see what it logged")
    written = bytes(engine)
    Path(engine_path).write_bytes(written)
    return _report(trt, network, len(written))


def _finds_library(trt: ModuleType) -> bool:
    """Whether the parser will find TensorRT's library: for RTX it asks for a name that no file of the wheel has."""
    if trt.__name__ != "tensorrt_rtx":
        return True
    try:
        ctypes.CDLL(RTX_LIBRARY)
    except OSError:
        return False
    return True


def _build_in_child(trt: ModuleType, job: Mapping[str, Any]) -> EngineReport:
    """Build in a process that finds the library: where libraries are looked for is settled when a process starts."""
    spec = importlib.util.find_spec(f"{trt.__name__}_libs")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    libraries = [library for place in places for library in Path(place).glob(f"{RTX_LIBRARY}.*")]
    if not libraries:
        raise ExportError(f"{RTX_LIBRARY} is not found: put its folder on LD_LIBRARY_PATH")
    with tempfile.TemporaryDirectory(prefix="infllm_pass.") as folder:
        (Path(folder) / RTX_LIBRARY).symlink_to(libraries[0])
        paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        done = subprocess.run(
            [sys.executable, "-m", "infllm_pass.lowering.export.tensorrt.engine", trt.__name__, json.dumps(job)],
            env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        raise ExportError(f"building the engine ended with exit code {done.returncode}: see what TensorRT logged")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ExportError(answer["error"])
    inputs = {name: tuple(shape) for name, shape in answer.pop("inputs").items()}
    return EngineReport(**{**answer, "plugins": tuple(answer["plugins"]), "inputs": inputs})


def _main(package: str, job: str) -> None:
    """The process of `_build_in_child`: prints the report, or what was wrong, as JSON."""
    try:
        answer = asdict(_build(importlib.import_module(package), **json.loads(job)))
    except ExportError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def _report(trt: ModuleType, network: Any, size: int) -> EngineReport:
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    return EngineReport(
        package=trt.__name__,
        version=trt.__version__,
        plugins=tuple(layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3),
        bodies=sum(layer.type == trt.LayerType.TRIP_LIMIT for layer in layers),
        inputs={each.name: tuple(each.shape) for each in inputs},
        size=size,
    )


def _add_profile(builder: Any, settings: Any, network: Any, shapes: Mapping[str, Shapes]) -> None:
    """Tell TensorRT the shapes of inputs with dynamic sizes."""
    inputs = {network.get_input(number).name: network.get_input(number) for number in range(network.num_inputs)}
    unknown = sorted(set(shapes) - set(inputs))
    if unknown:
        raise ExportError(f"the profile names {unknown[0]!r}: the file's inputs are {', '.join(inputs)}")
    profile = builder.create_optimization_profile()
    for name, tensor in inputs.items():
        if name in shapes:
            try:
                profile.set_shape(name, *(tuple(shape) for shape in shapes[name]))
            except ValueError as error:
                raise ExportError(f"the profile of {name!r} does not ascend: {shapes[name]}") from error
        elif -1 in tuple(tensor.shape):
            raise ExportError(
                f"the input {name!r} has dynamic sizes {tuple(tensor.shape)}: give its least, usual and largest shape "
                "in `profile`"
            )
    if shapes:
        settings.add_optimization_profile(profile)


class _shown:
    """A bar on the terminal for each phase of a build; nothing where standard output is no terminal."""

    def __init__(self, trt: ModuleType, wanted: bool) -> None:
        self._trt = trt
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._wanted = wanted and console.is_terminal

    def __enter__(self) -> Any:
        if not self._wanted:
            return None
        self._progress.start()
        return progress_monitor(self._trt, self._progress)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def progress_monitor(trt: ModuleType, progress: Progress) -> Any:
    """A monitor that shows the phases of a build, an ``IProgressMonitor``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Called by TensorRT, from any thread."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, TaskID] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = progress.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.update(self.phases[phase_name], completed=step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            progress.remove_task(self.phases.pop(phase_name))

    return Monitor()


if __name__ == "__main__":
    _main(*sys.argv[1:])
