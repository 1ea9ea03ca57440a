"""Examining one specimen: what the pass decides at its sites, and whether the numbers stay those of the model."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from infllm_pass import SparseAttentionConfig
from infllm_pass.frontend.backend import SwitchableBackend
from infllm_pass.rewrite.report import SiteReport
from tests.support.common import SMALL

from .oracle import count_operators, with_oracle
from .shrink import VOCABULARY
from .specimens import LENGTH, Batch, Kind, Specimen, make_batch

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest relative error of a position's logits, and of the gradients. Models compute parts in float32 whatever they
run in; one key too many or too few, or a scale that is off, is an error of a percent and more where it matters."""


@dataclass
class Finding:
    """What was found for one specimen and one kind of batch.

    Attributes:
        calls: softmaxes over keys and fused attention calls in the traced graphs, counted without the matcher.
        sites: sites that the matcher found.
        switchable: sites that were rewritten.
        reasons: how often each `Reason` was given.
        masks: how often each verdict on a mask was given.
        details: explanations of the sites that stay dense, once each.
        covering: largest relative error against the dense model, with a budget that covers the length.
        small: largest relative error against the oracle, with a budget that does not.
        gradients: the larger relative error of all gradients, for both budgets; None where not computed.
        sparse: how far the small budget is from the dense model: 0.0 would mean that nothing was tested.
        tolerance: the largest error that passes.
        packs: whether the model itself keeps packed sequences apart; None where nothing is packed.
        unusable: why the model itself gives nothing to compare with on such a batch: what it or tracing it raised, or
            that its padding is not kept out.
        error: what went wrong with the pass in the way; "" when nothing did.
    """

    calls: int = 0
    sites: int = 0
    switchable: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    covering: float | None = None
    small: float | None = None
    gradients: float | None = None
    sparse: float | None = None
    tolerance: float = 0.0
    packs: bool | None = None
    unusable: str = ""
    error: str = ""

    @property
    def worst(self) -> float | None:
        """The largest of the errors; None where nothing was compared."""
        return max((error for error in (self.covering, self.small, self.gradients) if error is not None), default=None)

    @property
    def equal(self) -> bool:
        """Whether every comparison is within the tolerance, or the model itself takes no such batch."""
        return bool(self.unusable) or (not self.error and self.worst is not None and self.worst <= self.tolerance)

    def decision(self) -> dict[str, Any]:
        """What must not drift: everything but figures that depend on the machine."""
        kept = ("calls", "sites", "switchable", "reasons", "masks", "packs", "unusable", "error")
        return {name: value for name, value in asdict(self).items() if name in kept} | {"equal": self.equal}


class _Variants:
    """A Dynamo backend that takes each graph through the pass once for each budget, and runs the variant asked for."""

    def __init__(self) -> None:
        self.active = "dense"
        self.calls = 0
        self.operators = 0
        self.backends = {
            "covering": SwitchableBackend(_uncompiled, COVERING),
            "small": SwitchableBackend(_uncompiled, SMALL),
            "oracle": SwitchableBackend(self._by_the_oracle, SMALL),
        }

    def __call__(self, module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.calls += sum(_attends(node) for part in _graphs(module) for node in part.graph.nodes)
        runs = {"dense": module.forward}
        for name, backend in self.backends.items():
            runs[name] = backend(copy.deepcopy(module), example_inputs)
        return lambda *args: runs[self.active](*args)

    def _by_the_oracle(self, module: fx.GraphModule, _example_inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile nothing, and put the oracle in the place of the operators, which are counted."""
        self.operators += count_operators(module)
        return with_oracle(module).forward

    @property
    def rows(self) -> list[SiteReport]:
        """The sites found so far."""
        return self.backends["small"].log.report().sites


def _uncompiled(module: fx.GraphModule, _example_inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile nothing."""
    return module.forward


def _graphs(module: fx.GraphModule) -> list[fx.GraphModule]:
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


_SOFTMAX = ("softmax", "_softmax", "softmax_", "log_softmax")


def _attends(node: fx.Node) -> bool:
    """Whether a node is attention as anyone would count it: fused, or a softmax of one row of keys for each query."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is F.scaled_dot_product_attention or name == "flex_attention":
        return True
    value = node.meta.get("example_value")
    if name not in _SOFTMAX or not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return bool(value.shape[-2] >= LENGTH and value.shape[-1] >= LENGTH)


def examine(specimen: Specimen, kind: Kind, *, gradients: bool = False) -> Finding:
    """Examine one specimen in one kind of batch.

    Args:
        specimen: the model.
        kind: the batch.
        gradients: whether to compare the gradients of one training step as well.
    """
    torch._dynamo.reset()
    model = specimen.build()
    batch = make_batch(kind)
    finding = Finding(tolerance=TOLERANCES[specimen.dtype], unusable=_unusable(specimen, model, batch))
    if finding.unusable:
        return finding
    gradients = gradients and _differentiable(specimen, model, batch)
    variants = _Variants()

    def compiled_call(batch: Batch) -> Tensor:
        return specimen.call(model, batch)

    compiled = torch.compile(compiled_call, backend=variants)  # type: ignore[call-overload]

    def run(variant: str) -> Tensor:
        variants.active = variant
        return compiled(batch)

    with torch.set_grad_enabled(gradients):
        with torch.compiler.set_stance("force_eager"):
            expected = specimen.call(model, batch)
            step = _gradients(model, expected) if gradients else None
        try:
            first = run("dense")
        except Exception:
            finding.unusable = _untraceable(specimen, model, batch)
            if finding.unusable:
                return finding
            raise
        finding.calls = variants.calls
        _describe(finding, variants.rows, variants.operators)
        outputs: dict[str, Tensor] = {}
        steps: dict[str, Tensor] = {}
        for variant in ("covering", "small", "oracle"):
            outputs[variant] = run(variant)
            if gradients:
                steps[variant] = _gradients(model, outputs[variant])
    traced = _error(first, expected, batch.valid)
    if not traced <= finding.tolerance:
        finding.error = f"the graph that Dynamo traced differs from the model by {traced:.0e} before the pass"
        return finding
    finding.covering = _error(outputs["covering"], expected, batch.valid)
    finding.small = _error(outputs["small"], outputs["oracle"], batch.valid)
    finding.sparse = _error(outputs["small"], expected, batch.valid)
    if step is not None:
        finding.gradients = max(_distance(steps["covering"], step), _distance(steps["small"], steps["oracle"]))
    if kind is Kind.PADDED and not finding.equal and _leaks(specimen, model, batch, expected):
        return Finding(unusable="what its padding holds changes its own output")
    if kind is Kind.PACKED:
        finding.packs = _packs(specimen, model, batch, expected)
    return finding


def _describe(finding: Finding, rows: list[SiteReport], operators: int) -> None:
    finding.sites = len(rows)
    finding.switchable = sum(row.decision == "switchable" for row in rows)
    finding.reasons = dict(sorted(Counter(row.reason for row in rows).items()))
    finding.masks = dict(sorted(Counter(row.mask for row in rows).items()))
    finding.details = sorted({row.explanation for row in rows if row.decision != "switchable"})
    if operators != finding.switchable:
        finding.error = f"{finding.switchable} sites are reported switchable and {operators} were rewritten"


@torch.no_grad()
def _unusable(specimen: Specimen, model: nn.Module, batch: Batch) -> str:
    """Why the model itself takes no such batch; "" if it does."""
    try:
        with torch.compiler.set_stance("force_eager"):
            logits = specimen.call(model, batch)
    except Exception as error:
        return one_line(error)
    return "" if bool(logits[batch.valid].isfinite().all()) else "its own output is not finite"


@torch.no_grad()
def _leaks(specimen: Specimen, model: nn.Module, batch: Batch, expected: Tensor) -> bool:
    """Whether the model's own output for valid tokens depends on the padding, of which attention may make anything."""
    other = replace(batch, ids=batch.ids.where(batch.valid, (batch.ids + 1) % VOCABULARY))
    with torch.compiler.set_stance("force_eager"):
        error = _error(specimen.call(model, other), expected, batch.valid)
    return not error <= TOLERANCES[specimen.dtype]


def _untraceable(specimen: Specimen, model: nn.Module, batch: Batch) -> str:
    """Why Dynamo does not trace the model, with no pass in the way; "" if it does."""
    torch._dynamo.reset()
    try:
        torch.compile(lambda: specimen.call(model, batch), backend="eager")()
    except Exception as error:
        return one_line(error)
    return ""


def one_line(error: BaseException) -> str:
    """An exception in a line: its kind, and the first line of what it says that names an error itself, if any."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return f"{type(error).__name__}: {' '.join((named or lines or [''])[0].split())[:160]}"


def _differentiable(specimen: Specimen, model: nn.Module, batch: Batch) -> bool:
    """Whether the model itself can be differentiated; some write over what their backward needs."""
    try:
        with torch.compiler.set_stance("force_eager"):
            _gradients(model, specimen.call(model, batch))
    except (AssertionError, RuntimeError):
        return False
    return True


def _gradients(model: nn.Module, logits: Tensor) -> Tensor:
    """All gradients of one training step, as one vector; the loss is a fixed random projection of the logits."""
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((logits * probe).sum(), parameters, allow_unused=True)
    return torch.cat([part.double().flatten() for part in found if part is not None])


def _distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _error(actual: Tensor, expected: Tensor, valid: Tensor) -> float:
    """Largest relative error of a valid position; NaN anywhere gives infinity."""
    actual, expected = (tensor.detach().double()[valid] for tensor in (actual, expected))
    scale = expected.norm(dim=-1).clamp_min(1e-3 * float(expected.norm()) / math.sqrt(max(len(expected), 1)))
    error = float(((actual - expected).norm(dim=-1) / scale).max())
    return error if math.isfinite(error) else math.inf


@torch.no_grad()
def _packs(specimen: Specimen, model: nn.Module, batch: Batch, packed: Tensor) -> bool:
    """Whether the model's own output for packed sequences is that of each sequence alone."""
    assert batch.position_ids is not None
    with torch.compiler.set_stance("force_eager"):
        for row, positions in enumerate(batch.position_ids):
            second = int((positions == 0).nonzero()[-1])
            alone = Batch(
                Kind.PACKED,
                batch.ids[row : row + 1, second:],
                None,
                batch.position_ids[row : row + 1, second:],
                batch.valid[row : row + 1, second:],
            )
            error = _error(specimen.call(model, alone), packed[row : row + 1, second:], alone.valid)
            if not error <= TOLERANCES[specimen.dtype]:
                return False
    return True
