"""Packed rows in a model: every piece gets what it gets alone, dense and sparse, and all sites are switched."""

import pytest
import torch

import infllm_pass
from infllm_pass.adaptation.packing import NO_LABEL
from infllm_pass.adaptation.rows import Bucket, TrainingRows
from tests.support.common import SMALL, TOKENS
from tests.support.documents import counted_documents
from tests.support.tokenizers import byte_llama, byte_tokenizer

pytest.importorskip("transformers")

LENGTH = 160


@pytest.fixture(scope="module")
def batch():
    """Two rows: pieces of five documents, the longest of which is longer than a row."""
    documents = counted_documents(75, 225, 12, 42, 65, end=256)
    rows = TrainingRows(
        documents,
        [Bucket(LENGTH, 1.0)],
        tokens_per_step=2 * LENGTH,
        steps=1,
        task_share=0.0,
        tasks=(),
        tokenizer=byte_tokenizer(),
        seed=1,
    )
    return rows[0]


def pieces(positions):
    """Where the pieces of a row begin and end."""
    starts = (positions == 0).nonzero().flatten().tolist()
    return list(zip(starts, [*starts[1:], len(positions)], strict=True))


@pytest.fixture(scope="module")
def model():
    return byte_llama(num_hidden_layers=1).double()


def test_rows_have_several_pieces_and_one_of_a_row_of_its_own(batch):
    counts = sorted(len(pieces(row)) for row in batch["position_ids"])
    assert counts[0] == 1
    assert counts[1] > 2


def loss_and_gradient(run, model, batch):
    model.zero_grad()
    out = run(**batch, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), out.loss.item(), torch.cat([each.grad.flatten() for each in model.parameters()])


@pytest.mark.parametrize(
    ("config", "branch"),
    [(SMALL.with_dense_len(LENGTH + 1), "dense"), (SMALL, "sparse"), (TOKENS, "sparse")],
    ids=["dense", "pooled", "tokens"],
)
def test_a_piece_gets_what_it_gets_alone(model, batch, config, branch):
    """On either side of the switch; in a sparse row the pieces of less than 64 tokens are dense."""
    sparse = infllm_pass.sparsify(torch.compile(model, backend="aot_eager"), config, strict="all")
    logits, loss, gradient = loss_and_gradient(sparse, model, batch)
    sites = infllm_pass.report(sparse).sites
    assert [(site.decision, site.branch, site.mask) for site in sites] == [
        ("switchable", branch, "causal, packed sequences")
    ]
    alone = infllm_pass.sparsify(torch.compile(model, backend="eager", dynamic=True), config, strict="all")
    lengths = set()
    total = 0.0
    for row, positions in enumerate(batch["position_ids"]):
        for start, stop in pieces(positions):
            ids = batch["input_ids"][row : row + 1, start:stop]
            with torch.no_grad():
                expected = (model if branch == "dense" else alone)(ids, use_cache=False).logits[0]
            assert torch.allclose(logits[row, start:stop], expected, rtol=1e-8, atol=1e-8), (row, start, stop)
            total += torch.nn.functional.cross_entropy(expected[:-1], ids[0, 1:], reduction="sum").item()
            lengths.add(stop - start)
    assert min(lengths) < SMALL.dense_len < max(lengths)
    counted = (batch["labels"] != NO_LABEL).sum().item()
    assert loss == pytest.approx(total / counted, rel=1e-6)  # transformers computes it in float32
    plain_logits, plain_loss, plain_gradient = loss_and_gradient(model, model, batch)
    if branch == "dense":
        assert torch.allclose(gradient, plain_gradient, rtol=1e-8, atol=1e-10)
        assert loss == pytest.approx(plain_loss, rel=1e-8)
    else:
        assert (logits - plain_logits).abs().max() > 1e-3
