"""Every error this package raises on purpose. Each message says what was given and what to change."""

from __future__ import annotations


class InfLLMError(Exception):
    """Base class of the package's errors."""


class ConfigError(InfLLMError, ValueError):
    """A field of `SparseAttentionConfig` has a value that the method does not allow."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}={value!r} is not valid: expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class TuningError(InfLLMError, ValueError):
    """The file of measured break-even lengths is damaged, or nothing can be measured."""


class ShapeError(InfLLMError, ValueError):
    """Tensors handed to an attention operator do not fit each other."""


class DtypeError(InfLLMError, TypeError):
    """A tensor has a dtype the operator does not take, or tensors have different dtypes."""


class DeviceError(InfLLMError, ValueError):
    """Tensors of one call are on different devices, or on one that cannot do what the call asks for."""


class CachePositionError(InfLLMError, IndexError):
    """New tokens do not fit into a cache at the position that the model was called with."""

    def __init__(self, cache: str, row: int, first: int, tokens: int, capacity: int) -> None:
        advice = "begin at slot 0 or later" if first < 0 else "make the cache larger, or reset or crop it"
        super().__init__(
            f"cache {cache}: row {row} is to get {tokens} tokens from slot {first} on, of {capacity} slots; {advice}"
        )
        self.cache = cache
        self.row = row


class UnsupportedModelError(InfLLMError, TypeError):
    """The object handed to `sparsify`, `dense`, `report` or `explain` is not one they can work on."""


class NoAttentionSiteError(InfLLMError, RuntimeError):
    """``strict=True`` and a compiled graph has no site that became switchable."""


class PagedCacheError(InfLLMError, NotImplementedError):
    """A method of a sparsified model that generates with a paged cache, which the pass does not follow."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"{method}() keeps a paged cache and attends by functions of its own, which would run the original model, "
            "dense and uncompiled: use generate() with a padded batch and a static or dynamic cache; the dense model "
            f"is infllm_pass.dense(model), and its {method}() runs as ever"
        )
        self.method = method


class UncompiledCallError(NoAttentionSiteError):
    """``strict=True`` and a call ran the plain model, or a part of it, instead of the compiled graphs."""


class DenseSiteError(InfLLMError, RuntimeError):
    """``strict="all"`` and a site of a compiled graph stays dense.

    Attributes:
        sites: place, reason and explanation of each of them.
    """

    def __init__(self, sites: tuple[str, ...]) -> None:
        super().__init__(
            f'strict="all" and {len(sites)} attention site(s) stay dense; change what the reason says, or let '
            "filter_fn return False for those that are meant to:\n" + "\n".join(sites)
        )
        self.sites = sites


class ForwardModeError(InfLLMError, NotImplementedError):
    """Tensors with tangents reach sparse attention, which has no forward-mode derivative: they would be lost."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where} got tensors with tangents of forward-mode differentiation (dual_level, torch.func.jvp), and "
            "sparse attention has no rule for them: call the model that was sparsified in its place, or take "
            "derivatives by backward() or torch.autograd.grad"
        )


class CarriedError(BaseException):
    """Carries an error through Dynamo to the call of the sparsified model, which raises it as it is.

    Dynamo wraps every `Exception` of a backend in one of its own, and drops it under ``suppress_errors``.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


class InternalError(InfLLMError, RuntimeError):
    """``strict`` and the pass itself failed at a site; what it failed with is the cause of this error."""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__(
            f"infllm_pass failed at {place} ({type(error).__name__}: {error}): please report it with its traceback; "
            "strict=False leaves the site as it was"
        )


class MissingDependencyError(InfLLMError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'infllm-pass[{extra}]'")
        self.package = package
        self.extra = extra


class CheckpointError(InfLLMError, RuntimeError):
    """A model folder or checkpoint file is missing, damaged or not of a kind that can be loaded."""


class CalibrationError(InfLLMError, ValueError):
    """A calibration is damaged or that of another model, or there is nothing that it could be measured on."""


class ExportError(InfLLMError, RuntimeError):
    """A model, or a part of it, cannot be exported to a format, or a file cannot be written."""


class InputSizeError(ShapeError):
    """An input of a packaged model has a size that the model was not exported for."""


class EvaluationError(InfLLMError, ValueError):
    """A model cannot be evaluated as asked: a text is empty or too short, or a task does not fit the length."""


class AdaptationError(InfLLMError, ValueError):
    """A model cannot be adapted as asked: the text does not do, or a setting does not fit the model."""


class MeasurementError(InfLLMError, RuntimeError):
    """A measuring process ended before it had measured anything."""


class UntunedDeviceWarning(UserWarning):
    """Sparse attention on a GPU is left to operators tuned for the CPU: correct, and slow."""


class UncompiledKernelWarning(UserWarning):
    """A kernel in C++ cannot be compiled on this machine: torch operators take its place, correct and slower."""


class InternalErrorWarning(UserWarning):
    """The pass itself failed at a site, which stays as it was; the text holds the traceback."""


class NoAttentionSiteWarning(UserWarning):
    """A sparsified model was compiled and nothing in it became switchable."""


class UncompiledCallWarning(NoAttentionSiteWarning):
    """A call of a sparsified model ran the plain model, or a part of it, dense instead of the compiled graphs."""


class MaskBufferChangedWarning(UserWarning):
    """A buffer that a compiled graph's mask was read from was overwritten: the graph runs uncompiled and dense."""


class MaskInputWarning(UserWarning):
    """A mask that a compiled graph takes as an input cannot be read in a call: the graph runs uncompiled and dense."""


class UncountedCacheWarning(UserWarning):
    """What is written to a cache is not counted, so that its keys are compressed anew at every step."""


class UncompiledGenerateWarning(UserWarning):
    """A method of a sparsified model that generates ran the original model, or a part of it, dense and uncompiled."""
