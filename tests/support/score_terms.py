"""Terms of the scores beside the mask: a target that computes every one of them, dense, and models that have them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm_pass import SparseAttentionConfig
from infllm_pass.plan.site_plan import Lowering
from infllm_pass.rewrite.pipeline import SitePolicy, run_pass
from infllm_pass.rewrite.targets import DEFAULT_TARGETS, Kernels, Refusal
from tests.support.common import SMALL

ALWAYS_SPARSE = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})

CAP, WINDOW, BLOCK = 3.0, 192, 16


def blocks_before_the_window() -> tuple[Tensor, Tensor, set[int]]:
    """Two heads of a query that want a block each, where there is room for one beside the own block and the one before.

    The scores of the first are near the lowest that `CAP` allows. Sixty blocks before a window of `WINDOW` keys, taken
    for blocks of that score, would be most of what its weights are divided by, and the other head's block would win.

    Returns:
        ``[1, 2, 1, 16]`` and ``[1, 1, 1152, 16]``, of which channels 4 and 5 count, for a scale of 1; and the blocks of
        `BLOCK` keys that are visited.
    """
    capped = torch.tensor([-2.7, 2.4]).repeat(72 * BLOCK, 1)
    capped[62 * BLOCK : 63 * BLOCK, 0] += 0.5
    capped[65 * BLOCK : 66 * BLOCK, 1] += 0.3
    k = torch.zeros(1, 1, 72 * BLOCK, 16)
    k[0, 0, :, 4:6] = CAP * torch.atanh(capped / CAP)
    q = torch.zeros(1, 2, 1, 16)
    q[0, 0, 0, 4] = q[0, 1, 0, 5] = 1.0
    return q, k, {62, 70, 71}


taken: list[tuple[str, ...]] = []
"""The terms of each site that the target took."""


def attend_with_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    window: int | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    scale: float,
) -> Tensor:
    """Dense causal attention whose queries are the last of the keys, term by term as they are defined."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + (key_bias if key_bias.shape[1] == 1 else key_bias.repeat_interleave(group, 1))[:, :, None]
    place = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    key = torch.arange(k.shape[2])
    seen = key <= place
    if window is not None:
        seen = seen & (key > place - window)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None, None])
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # no key is seen, nor a sink
    return ((scores - lse).exp() @ v.repeat_interleave(group, 1).to(scores.dtype)).to(q.dtype)


class TakesTerms:
    """A target for sparse sites with terms of the scores, which computes them dense."""

    name = "terms"

    def accepts(self, request):
        if request.lowering is not Lowering.SPARSE or not request.plan.terms:
            return Refusal("there is no term, or nothing sparse")
        biases = request.plan.mask.key_terms.bias
        heads = int(request.site.query_heads), int(request.site.kv_heads)
        return None if all(bias.is_shared_by(*heads) for bias in biases) else Refusal("it differs within a group")

    def state(self, request):
        return None

    def kernels(self, request):
        return Kernels("torch operators")

    def emit(self, request, builder):
        taken.append(request.plan.terms)
        key_mask, offsets, _, bounds, offset, window = builder.mask_arguments()
        assert (offsets, bounds, offset) == (None, None, None)
        terms = builder.terms()
        terms = terms["key_bias"], terms["sinks"], terms["softcap"]
        return builder.call(attend_with_terms, *builder.operands(), key_mask, window, *terms, request.scale)


def rewritten(function, *inputs):
    """The result of a function after the pass, with a target that takes all terms, and its sites."""
    rows = []

    def backend(module, _inputs):
        rows.extend(run_pass(module, SitePolicy(ALWAYS_SPARSE, targets=(TakesTerms(), *DEFAULT_TARGETS))).sites)
        return module.forward

    torch._dynamo.reset()
    taken.clear()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs), rows
