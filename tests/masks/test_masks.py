"""What the prover proves, what it refuses, and that what it proves is true of the real mask."""

from __future__ import annotations

import itertools

import pytest
import torch

from infllm_pass.graph.facts import same, size
from infllm_pass.graph.subgraphs import all_graphs
from infllm_pass.masks import MaskPredicate, UnprovenMask, prove_mask
from infllm_pass.masks.interpreter import Interpreter
from tests.support.common import capture, llama, tokens
from tests.support.mask_support import key_mask


def proof_of(function, *inputs, dynamic=None):
    """Capture ``function(*inputs) -> mask`` and prove the tensor that it returns."""
    module = capture(function, *inputs, dynamic=dynamic)
    facts = all_graphs(module)[0].facts
    output = next(node for node in module.graph.nodes if node.op == "output")
    return prove_mask(Interpreter(facts), output.args[0][0]), output.args[0][0]


def offset_is(proof, offset) -> bool:
    """Whether a mask is causal with an offset, and has neither a window nor packed sequences."""
    narrower = proof.window is not None or proof.segments is not None if isinstance(proof, MaskPredicate) else True
    return not narrower and same(proof.causal_offset, size(offset))


def positions(x):
    return torch.arange(x.shape[1]), torch.arange(x.shape[1])


CAUSAL = {
    "key <= query": lambda q, k: k[None, :] <= q[:, None],
    "query >= key": lambda q, k: q[:, None] >= k[None, :],
    "key < query + 1": lambda q, k: k[None, :] < q[:, None] + 1,
    "query + 1 > key": lambda q, k: (q + 1)[:, None] > k,
    "not key > query": lambda q, k: ~(k[None, :] > q[:, None]),
    "query - key >= 0": lambda q, k: (q[:, None] - k[None, :]) >= 0,
    "shifted on both sides": lambda q, k: (k + 7)[None, :] <= (q + 7)[:, None],
    "functions": lambda q, k: torch.le(k.unsqueeze(0), q.unsqueeze(-1)),
    "transposed": lambda q, k: (q[None, :] >= k[:, None]).transpose(0, 1),
    "anded with true": lambda q, k: torch.ones((), dtype=torch.bool) & (k[None, :] <= q[:, None]),
    "four dimensions": lambda q, k: (k[None, None, None, :] <= q[None, None, :, None]).expand(2, 1, -1, -1),
    "cast to int and back": lambda q, k: (k[None, :] <= q[:, None]).to(torch.int64).bool(),
    "where": lambda q, k: torch.where(k[None, :] > q[:, None], False, True),
    "view": lambda q, k: k.view(1, -1) <= q.view(-1, 1),
    "permute": lambda q, k: (q[None, :] >= k[:, None]).permute(1, 0),
    "same segment": lambda q, k: (k[None, :] <= q[:, None]) & ((q * 0)[:, None] == (k * 0)[None, :]),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_spellings_are_proved(spelling, dynamic):
    build = CAUSAL[spelling]
    proof, _ = proof_of(lambda x: build(*positions(x)), torch.zeros(2, 37), dynamic=dynamic)
    assert offset_is(proof, 0), proof
    assert not proof.key_terms.mask


NOT_CAUSAL = {
    "strict": lambda q, k: k[None, :] < q[:, None],
    "one too many": lambda q, k: k[None, :] <= q[:, None] + 1,
    "anti-causal": lambda q, k: k[None, :] >= q[:, None],
    "transposed causal": lambda q, k: (k[None, :] <= q[:, None]).transpose(0, 1),
    "prefix": lambda q, k: (k[None, :] <= q[:, None]) | (k[None, :] < 5),
    "window": lambda q, k: (k[None, :] <= q[:, None]) & (k[None, :] > q[:, None] - 8),
    "block diagonal": lambda q, k: (q[:, None] // 8) == (k[None, :] // 8),
    "every second key": lambda q, k: (2 * k)[None, :] <= q[:, None],
    "reversed queries": lambda q, k: k[None, :] <= (q.shape[0] - 1 - q)[:, None],
    "first rows only": lambda q, k: torch.where(q[:, None] < 9, k[None, :] <= q[:, None], True),
    "cumulative sum of ones": lambda q, k: k[None, :] < torch.ones_like(q).cumsum(0)[:, None] * 2,
    "int8 overflows": lambda q, k: k.to(torch.int8)[None, :] <= q.to(torch.int8)[:, None],
    "float positions": lambda q, k: k.float()[None, :] <= q.float()[:, None],
    "an index counted from the end": lambda q, k: k[(k - 1,)][None, :] <= (q - 1)[:, None],
    "constant": lambda q, k: torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", NOT_CAUSAL)
def test_what_is_not_causal_is_not_proved_causal(spelling, dynamic):
    build = NOT_CAUSAL[spelling]
    proof, _ = proof_of(lambda x: build(*positions(x)), torch.zeros(2, 37), dynamic=dynamic)
    assert not offset_is(proof, 0), proof


def test_a_limit_off_by_one_keeps_its_offset():
    """The prover says what the mask is; that its offset fits no key length is the planner's to refuse."""
    proof, _ = proof_of(lambda x: NOT_CAUSAL["strict"](*positions(x)), torch.zeros(2, 37))
    assert offset_is(proof, -1)


def test_a_mask_edited_in_place_is_refused():
    def build(x):
        q, k = positions(x)
        mask = k[None, :] <= q[:, None]
        mask[:, 0] = False
        return mask

    proof, _ = proof_of(build, torch.zeros(2, 37))
    assert isinstance(proof, UnprovenMask)
    assert "overwrites" in proof.why


def test_a_mask_counts_what_its_ingredients_were_when_it_was_made():
    def build(x):
        q, k = positions(x)
        mask = k[None, :] <= q[:, None]
        q.add_(1)
        return mask, q

    proof, _ = proof_of(build, torch.zeros(2, 37))
    assert offset_is(proof, 0)


@pytest.mark.parametrize("late", [False, True], ids=["edited before", "edited through a view that is read later"])
def test_a_mask_of_an_ingredient_that_was_edited_is_refused(late):
    def build(x):
        q, k = positions(x)
        view = q[:, None]
        q.add_(1)
        return k[None, :] <= (view if late else q[:, None]), q

    proof, _ = proof_of(build, torch.zeros(2, 37))
    assert isinstance(proof, UnprovenMask)
    assert "overwrites" in proof.why


def test_a_mask_given_as_input_is_unknown():
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    proof, _ = proof_of(lambda mask: mask & True, causal)
    assert isinstance(proof, UnprovenMask)


PADDED = {
    "bool": lambda m: m.bool()[:, None, None, :],
    "not equal zero": lambda m: (m != 0)[:, None, None, :],
    "equals one": lambda m: m.eq(1).unsqueeze(1).unsqueeze(1),
    "positive": lambda m: (m > 0)[:, None, None, :],
    "zero is less": lambda m: (m.new_zeros(()) < m)[:, None, None, :],
    "first row of the mask": lambda m: (m[:1] != 0)[:, None, None, :],
}


@pytest.mark.parametrize("spelling", PADDED)
def test_a_padding_mask_becomes_a_key_condition(spelling):
    def build(m):
        q, k = positions(m)
        return (k[None, :] <= q[:, None]) & PADDED[spelling](m)

    mask = torch.randint(0, 2, (3, 21))
    proof, _ = proof_of(build, mask)
    assert offset_is(proof, 0), proof
    (condition,) = proof.key_terms.mask
    (leaf,) = condition.leaves
    assert leaf[2].op == "placeholder"
    assert torch.equal(
        key_mask(condition, {leaf[2]: mask}, 3, 21)[:, None, None, :], PADDED[spelling](mask).expand(3, -1, -1, -1)
    )


def test_a_padding_mask_over_queries_is_not_a_key_condition():
    def build(m):
        q, k = positions(m)
        return (k[None, :] <= q[:, None]) & m.bool()[:, None, :, None]

    proof, _ = proof_of(build, torch.ones(2, 21, dtype=torch.long))
    assert isinstance(proof, UnprovenMask)


def test_a_padding_mask_read_at_a_shifted_key_is_not_a_key_condition():
    def build(m):
        q, k = positions(m)
        batch = torch.arange(m.shape[0])[:, None, None]
        return (k[None, :] <= q[:, None]) & m.bool()[batch, (k // 2)[None, None, :]]

    proof, _ = proof_of(build, torch.ones(2, 21, dtype=torch.long))
    assert isinstance(proof, UnprovenMask)


def test_the_mask_of_transformers_is_proved_with_and_without_padding():
    model = llama()
    for inputs in ({}, {"attention_mask": torch.cat([torch.zeros(2, 3), torch.ones(2, 18)], 1).long()}):
        torch._dynamo.reset()
        module = capture(model, tokens(21, 2), use_cache=False, **inputs)
        facts = all_graphs(module)[0].facts
        attention = [n for n in module.graph.nodes if "scaled_dot_product" in str(n.target)]
        proof = prove_mask(Interpreter(facts), attention[0].kwargs["attn_mask"])
        assert offset_is(proof, 0), proof
        assert len(proof.key_terms.mask) == len(inputs)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_packed_position_ids_of_transformers_are_sequences(dynamic):
    module = capture(llama(), tokens(21), use_cache=False, position_ids=torch.arange(21)[None] % 9, dynamic=dynamic)
    facts = all_graphs(module)[0].facts
    attention = next(n for n in module.graph.nodes if "scaled_dot_product" in str(n.target))
    proof = prove_mask(Interpreter(facts), attention.kwargs["attn_mask"])
    assert str(proof) == "causal, packed sequences", proof
    assert proof.segments.node.meta["example_value"].dtype == torch.int64


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_proofs_agree_with_the_real_masks(length):
    """Every proof from this file, against the mask that the function really builds, element by element."""
    for build in itertools.chain(CAUSAL.values(), NOT_CAUSAL.values()):
        x = torch.zeros(2, length)
        proof, _ = proof_of(lambda x, build=build: build(*positions(x)), x, dynamic=False)
        torch._dynamo.reset()
        if not isinstance(proof, MaskPredicate) or proof.causal_offset is None:
            continue
        q, k = positions(x)
        expected = k[None, :] <= q[:, None] + int(proof.causal_offset)
        assert torch.equal(build(q, k).expand(2, 1, length, length)[0, 0], expected)
