"""infllm_pass: InfLLM-V2 dense/sparse switchable attention for dense models, as a pass for ``torch.compile``.

    model = infllm_pass.sparsify(torch.compile(model))

One attention call: `frontend` hands Dynamo's graph to the pass; `graph` reads its operators, `sites` finds attention,
`masks` proves what each mask lets through, `plan` decides and evaluates the length guard, `emit` and `rewrite`
replace the call, with `kv_cache` for decode steps; `runtime` checks at every call what a proof relied on. `lowering`
holds the operators that the call becomes and `kernels` what computes them. A report says what was done at every site,
`calibration` measures which channels of the keys its scores should read, `evaluation` what a model loses, and
`adaptation` trains it on; docs/design.md follows a call.
"""

from infllm_pass.adaptation import AdaptationConfig, Adapted, Bucket, adapt
from infllm_pass.calibration.record import Calibration
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.evaluation import Evaluation, evaluate
from infllm_pass.export.aoti import Package, load_package, package
from infllm_pass.export.export import export, export_onnx
from infllm_pass.export.tensorrt import export_tensorrt, register_torch_tensorrt
from infllm_pass.frontend.api import dense, dense_mode, explain, report, sparsify
from infllm_pass.frontend.calibrating import calibrate
from infllm_pass.frontend.functional import switchable_attention, switchable_attention_varlen
from infllm_pass.reasons import Reason
from infllm_pass.rewrite.report import GraphReport, Report, SiteReport
from infllm_pass.sites import AttentionSite

__version__ = "0.1.0"

__all__ = [
    "AdaptationConfig",
    "Adapted",
    "AttentionSite",
    "Bucket",
    "Calibration",
    "Evaluation",
    "GraphReport",
    "Package",
    "Reason",
    "Report",
    "SiteReport",
    "SparseAttentionConfig",
    "adapt",
    "calibrate",
    "dense",
    "dense_mode",
    "evaluate",
    "explain",
    "export",
    "export_onnx",
    "export_tensorrt",
    "load_package",
    "package",
    "register_torch_tensorrt",
    "report",
    "sparsify",
    "switchable_attention",
    "switchable_attention_varlen",
]
