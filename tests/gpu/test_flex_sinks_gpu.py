"""gpt-oss through flex attention, whose sinks join after the softmax: only on GPUs does flex attention give the
log-sum-exp that they need."""

from __future__ import annotations

import pytest
import torch

import infllm_pass
from tests.sites.test_score_term_models import COVERING, gpt_oss
from tests.support.common import relative_error, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.no_grad()
def test_sinks_of_gpt_oss_are_read_off_flex_attention():
    sizes = {"head_dim": 16, "num_attention_heads": 4}
    model, plain = (
        gpt_oss(**sizes, attn_implementation=kind).float().to("cuda") for kind in ("flex_attention", "eager")
    )
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), COVERING)
    ids = tokens(200, 2).to("cuda")
    out, wanted = (m(input_ids=ids, use_cache=False).logits for m in (sparse, plain))
    rows = infllm_pass.report(sparse).sites
    assert [row.mask for row in rows] == ["causal, window 30, sinks", "causal, sinks"], [
        row.explanation for row in rows
    ]
    assert rows[1].decision == "switchable"
    assert relative_error(out, wanted) < 1e-4
