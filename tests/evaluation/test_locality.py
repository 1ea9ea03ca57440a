"""Locality of selections: the share of blocks that a query keeps, against sets written out, and where it is shown."""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import infllm_pass
from infllm_pass.evaluation import TaskSettings, Text
from infllm_pass.evaluation.locality import blocks_kept, shares_kept
from infllm_pass.evaluation.plots import draw_locality
from infllm_pass.tools.inspection import attention_inputs
from tests.support import ROOT
from tests.support.common import SMALL
from tests.support.tokenizers import byte_llama, byte_tokenizer

transformers = pytest.importorskip("transformers")

LENGTH = 500
POOLED = replace(SMALL, dense_len=0, topk=7, lse="exact")
TEXT = Text("lines", "".join(f"Line {number} of a text says {number * 7919 % 997}.\n" for number in range(60)))
SETTINGS = TaskSettings(tasks=("perplexity",), lengths=(LENGTH,))


def by_hand(blocks):
    """Shares kept, from sets of block numbers."""
    sets = [[{*row.tolist()} - {-1} for row in head] for head in blocks.flatten(0, 1)]
    return torch.tensor([[len(b & a) / len(b) for a, b in pairwise(s)] for s in sets])


def test_shares_are_those_of_sets(monkeypatch):
    monkeypatch.setattr("infllm_pass.evaluation.locality.CHUNK_STEPS", 4)
    blocks = torch.stack([torch.rand(2, 3, 11, 9).argsort(-1)[..., :5] for _ in range(1)])[0].int()
    blocks[..., 3][torch.rand(2, 3, 11) < 0.3] = -1
    found = shares_kept(blocks, 9)
    assert found.shape == (2, 3, 10)
    torch.testing.assert_close(found.flatten(0, 1), by_hand(blocks).double())


@pytest.fixture(scope="module")
def found():
    """A plain model by both scores."""
    configs = [POOLED, replace(POOLED, scorer="tokens", lse="coarse")]
    return infllm_pass.evaluate(byte_llama(), byte_tokenizer(), configs, settings=SETTINGS, texts=[TEXT])


def test_figures_are_those_of_the_selections(found):
    """Each site's mean, against the blocks that the site computes with."""
    ids = byte_tokenizer()(TEXT.content, return_tensors="pt").input_ids[:, :LENGTH]
    rows = {row.side: row for row in found.locality}
    assert list(rows) == ["pooled lse=exact", "tokens lse=coarse"]
    for row, scorer, lse in zip(rows.values(), ("pooled", "tokens"), ("exact", "coarse"), strict=True):
        assert (row.text, row.tokens, row.bound, len(row.by_site)) == ("lines", LENGTH, 0.0, 2)
        config = replace(POOLED, scorer=scorer, lse=lse)
        shares = []
        for site, mean in enumerate(row.by_site):
            blocks = attention_inputs(byte_llama(), site, input_ids=ids, use_cache=False, config=config).blocks
            shares.append(by_hand(blocks[:, :, LENGTH // 2 :]))
            assert mean == pytest.approx(float(shares[-1].mean()), abs=1e-3)  # kernels round, which may move a block
        assert row.kept == pytest.approx(sum(row.by_site) / 2)
        assert row.least == pytest.approx(min(float(each.min()) for each in shares))
        assert 0.3 < row.kept < 1.0


def test_a_side_that_selects_nothing_has_no_row():
    dense = replace(POOLED, dense_len=LENGTH + 1)
    found = infllm_pass.evaluate(byte_llama(), byte_tokenizer(), dense, settings=SETTINGS, texts=[TEXT])
    assert (found.locality, draw_locality(found)) == ((), None)
    model = byte_llama()
    assert blocks_kept(infllm_pass.sparsify(torch.compile(model, backend="eager"), dense), model, range(90)) is None


def test_they_are_shown(found):
    pytest.importorskip("matplotlib")
    assert draw_locality(found).startswith(b"\x89PNG")
    (kept,) = [row.kept for row in found.locality if row.side.startswith("pooled")]
    assert f"{100 * kept:.1f} %" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["locality"][0]["kept"] == kept
    (row,) = [row for row in found.to_rows() if row["measure"] == "blocks kept" and row["side"].startswith("pooled")]
    assert row["value"] == kept


def test_query_agnostic_blocks_are_kept():
    """The model of the example with random importance: no step falls below the bound, and more is kept."""
    spec = importlib.util.spec_from_file_location("nosa", ROOT / "examples" / "nosa.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    if "cache" not in inspect.signature(example.LlamaAttention.forward).parameters:
        pytest.skip("the example is written for transformers 5.24")
    sizes = byte_llama().config.to_diff_dict() | {"model_type": example.NosaConfig.model_type}
    torch.manual_seed(0)
    model = example.NosaForCausalLM(example.NosaConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        for layer in model.model.layers:
            layer.self_attn.A.normal_()
    configs = [POOLED, replace(POOLED, agnostic_topk=5)]
    found = infllm_pass.evaluate(model, byte_tokenizer(), configs, settings=SETTINGS, texts=[TEXT])
    pooled, nosa = found.locality
    assert (pooled.bound, nosa.bound) == (0.0, 5 / 9)
    assert nosa.least >= nosa.bound
    assert nosa.kept > pooled.kept
    assert pooled.least < nosa.least
