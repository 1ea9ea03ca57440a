"""Masks in every form that the prover follows: floats, fills, buffers, packed sequences, windows, and near misses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from infllm_pass.graph.subgraphs import all_graphs
from infllm_pass.masks import MaskPredicate, UnprovenMask, prove_terms
from infllm_pass.masks.interpreter import Interpreter
from infllm_pass.masks.normal_form import BATCH, KEY
from infllm_pass.sites import find_sites
from tests.support.mask_support import captured, check_proof, mask_of, node_values, prove_output

LENGTH = 19
MIN = torch.finfo(torch.float32).min


def causal(n):
    index = torch.arange(n)
    return index[None, :] <= index[:, None]


def padding(x):
    return (x[..., 0] > 0).long()


FLOATS = {
    "where": lambda x: torch.where(causal(x.shape[1]), 0.0, float("-inf")),
    "where with the lowest number": lambda x: torch.where(causal(x.shape[1]), torch.zeros(()), MIN),
    "where method": lambda x: torch.zeros(()).where(causal(x.shape[1]), torch.tensor(MIN)),
    "masked_fill": lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(~causal(x.shape[1]), float("-inf")),
    "masked_fill with a large number": lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(
        ~causal(x.shape[1]), -1e9
    ),
    "triu of -inf": lambda x: torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1),
    "triu function": lambda x: torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), diagonal=1)[None, None],
    "tril of ones": lambda x: torch.ones(x.shape[1], x.shape[1]).tril() == 1,
    "tril of booleans": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "tril, inverted and scaled": lambda x: (1.0 - torch.tril(torch.ones(x.shape[1], x.shape[1]))) * MIN,
    "inverted booleans, scaled": lambda x: (~causal(x.shape[1])).float() * MIN,
    "integers": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.uint8).tril().bool(),
    "triu, transposed": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu().t(),
    "not triu": lambda x: ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1),
    "half precision": lambda x: torch.where(causal(x.shape[1]), 0.0, -65504.0).half(),
    "cast to bfloat16": lambda x: torch.where(causal(x.shape[1]), 0.0, MIN).to(torch.bfloat16),
    "two floats added": lambda x: torch.where(causal(x.shape[1]), 0.0, MIN) + torch.full((), 0.0),
    "exclusive or": lambda x: causal(x.shape[1]) ^ torch.zeros((), dtype=torch.bool),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FLOATS)
def test_causal_masks_of_numbers_are_proved(form, dynamic):
    module, inputs = captured(FLOATS[form], torch.randn(2, LENGTH, 4), dynamic=dynamic)
    proof, _ = prove_output(module)
    assert str(proof) == "causal", proof
    assert proof.causal_offset == 0
    check_proof(proof, module, inputs)


def packed_ids(positions):
    before = positions[:, :1] - 1
    return (torch.diff(positions, prepend=before, dim=-1) != 1).cumsum(-1)


def same_sequence(ids):
    return ids[:, None, :, None] == ids[:, None, None, :]


def packed(positions):
    order = positions[:, None, None, :] <= positions[:, None, :, None]
    return same_sequence(packed_ids(positions)) & order


POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4], [5, 6, 7, 0, 1, 2, 3, 4, 5, 0, 1]])


def inverted(hidden):
    """As transformers 4 expands a padding mask, with a causal one added."""
    return hidden.masked_fill(hidden.bool(), MIN) + torch.where(causal(hidden.shape[-1]), 0.0, MIN)


COMBINED = {
    "padding": (
        lambda x: causal(x.shape[1]) & padding(x).bool()[:, None, None, :],
        "causal, padded keys",
    ),
    "padding, added as numbers": (
        lambda x: torch.where(causal(x.shape[1]), 0.0, MIN) + (~padding(x).bool())[:, None, None, :].float() * MIN,
        "causal, padded keys",
    ),
    "padding as inverted integers": (
        lambda x: torch.where(causal(x.shape[1]), 0.0, MIN).masked_fill(
            (1.0 - padding(x)[:, None, None, :].float()).bool(), MIN
        ),
        "causal, padded keys",
    ),
    "padding as numbers that are filled where they are not 0": (
        lambda x: inverted(1.0 - padding(x)[:, None, None, :].float()),
        "causal, padded keys",
    ),
    "padding that is data, as numbers": (
        lambda x: inverted(1.0 - x[..., 0].long()[:, None, None, :].float()),
        "causal, padded keys",
    ),
    "padding of floats": (
        lambda x: causal(x.shape[1]) & (x[:, None, None, :, 0] != 0),
        "causal, padded keys",
    ),
    "lengths of the rows": (
        lambda x: causal(x.shape[1]) & (torch.arange(x.shape[1]) < padding(x).sum(1)[:, None])[:, None, None, :],
        "causal, padded keys",
    ),
    "left padding by lengths": (
        lambda x: causal(x.shape[1]) & (torch.arange(x.shape[1]) >= padding(x).sum(1)[:, None])[:, None, None, :],
        "causal, padded keys",
    ),
    "two tests of keys": (
        lambda x: (
            causal(x.shape[1])
            & ((padding(x) != 0) | (torch.arange(x.shape[1]) < 2))[:, None, None, :]
            & (x[:, None, None, :, 0] != 1)
        ),
        "causal, padded keys",
    ),
    "a padding mask padded to the keys": (
        lambda x: (
            causal(x.shape[1]) & torch.nn.functional.pad(padding(x)[:, 3:].bool(), (3, 0), value=True)[:, None, None, :]
        ),
        "causal, padded keys",
    ),
    "a padding mask behind ones": (
        lambda x: (
            causal(x.shape[1])
            & torch.cat([torch.ones_like(padding(x)[:, :4]), padding(x)[:, 4:]], 1).bool()[:, None, None, :]
        ),
        "causal, padded keys",
    ),
    "window": (
        lambda x: causal(x.shape[1]) & ~causal(x.shape[1]).tril(-5),
        "causal, window 5",
    ),
    "window by index": (
        lambda x: (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) < 5) & causal(x.shape[1]),
        "causal, window 5",
    ),
    "window by distance": (
        lambda x: (
            (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs().le(4)
            & ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        ),
        "causal, window 5",
    ),
    "window of numbers": (
        lambda x: (
            torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
            + torch.full((x.shape[1], x.shape[1]), float("-inf")).tril(-5)
        ),
        "causal, window 5",
    ),
    "the tighter of two windows": (
        lambda x: causal(x.shape[1]) & ~causal(x.shape[1]).tril(-5) & ~causal(x.shape[1]).tril(-7),
        "causal, window 5",
    ),
    "window and padding": (
        lambda x: causal(x.shape[1]) & ~causal(x.shape[1]).tril(-5) & padding(x).bool()[:, None, None, :],
        "causal, window 5, padded keys",
    ),
    "sequences numbered by their starts": (
        lambda x: causal(x.shape[1]) & same_sequence((x[..., 0] == 0).cumsum(-1)),
        "causal, packed sequences",
    ),
    "sequences, padding and a window": (
        lambda x: (
            causal(x.shape[1])
            & same_sequence((x[..., 0] == 0).cumsum(-1))
            & padding(x).bool()[:, None, None, :]
            & ~causal(x.shape[1]).tril(-5)
        ),
        "causal, window 5, padded keys, packed sequences",
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", COMBINED)
def test_what_a_causal_mask_is_combined_with_is_proved(form, dynamic):
    build, expected = COMBINED[form]
    module, inputs = captured(build, torch.randint(0, 3, (2, LENGTH, 4)).float(), dynamic=dynamic)
    proof, _ = prove_output(module)
    assert str(proof) == expected, proof
    assert proof.causal_offset == 0
    check_proof(proof, module, inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("window", [None, 3])
def test_order_of_positions_within_packed_sequences_is_order_of_indices(window, dynamic):
    def narrow(positions):
        return packed(positions) & (positions[:, None, None, :] > positions[:, None, :, None] - 3)

    module, inputs = captured(packed if window is None else narrow, POSITIONS, dynamic=dynamic)
    proof, _ = prove_output(module)
    assert str(proof) == ("causal, packed sequences" if window is None else "causal, window 3, packed sequences"), proof
    check_proof(proof, module, inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_window_around_the_query_is_a_limit_past_it(dynamic):
    def around(x):
        index = torch.arange(x.shape[1])
        return (index[:, None] - index).abs() < 5

    module, inputs = captured(around, torch.randn(2, LENGTH, 4), dynamic=dynamic)
    proof, _ = prove_output(module)
    assert (proof.causal_offset, proof.window) == (4, 9)
    check_proof(proof, module, inputs)


NEAR_MISSES = {
    "positions without sequences": (
        lambda p: p[:, None, None, :] <= p[:, None, :, None],
        "it is an input of the graph",
    ),
    "sequence numbers that are data": (
        lambda p: same_sequence(p) & causal(p.shape[1]),
        "it is an input of the graph",
    ),
    "a cumulative sum of data": (
        lambda p: same_sequence(p.cumsum(-1)) & causal(p.shape[1]),
        "it sums data that may be other than 0 and 1",
    ),
    "steps of two": (
        lambda p: (
            same_sequence((torch.diff(p, prepend=p[:, :1] - 1) == 2).cumsum(-1))
            & (p[:, None, None, :] <= p[:, None, :, None])
        ),
        "it is an input of the graph",
    ),
    "sequences of another tensor": (
        lambda p: same_sequence(packed_ids(p)) & (p[:, None, None, :] * 2 <= p[:, None, :, None]),
        "it is an input of the graph",
    ),
    "other sequences": (
        lambda p: (packed_ids(p)[:, None, :, None] != packed_ids(p)[:, None, None, :]) & causal(p.shape[1]),
        "it numbers sequences",
    ),
    "sequences of neighbours": (
        lambda p: (packed_ids(p)[:, None, :, None] == packed_ids(p).roll(1, 1)[:, None, None, :]) & causal(p.shape[1]),
        "no rule for this operator",
    ),
    "sequences of keys alone": (
        lambda p: (packed_ids(p)[:, None, :, None] == packed_ids(p)[:, None, None, :] + 1) & causal(p.shape[1]),
        "it numbers sequences",
    ),
    "a mask that is data": (lambda p: p[:, None, :, None] + p[:, None, None, :] > 3, "it is an input of the graph"),
    "numbers that are data": (
        lambda p: (p[:, None, :, None] + p[:, None, None, :]).float(),
        "its numbers are added to the scores",
    ),
    "data of queries times the lowest number": (
        lambda p: (1.0 - p[:, None, :, None].float()) * MIN + torch.where(causal(p.shape[1]), 0.0, MIN),
        "make the data bool first",
    ),
    "a number that hides too little": (
        lambda p: torch.where(causal(p.shape[1]), 0.0, -1e4),
        "hides nothing for certain",
    ),
    "a number that is not 0": (lambda p: torch.where(causal(p.shape[1]), 1.0, float("-inf")), "hides nothing"),
    "roots of distances": (
        lambda p: (
            torch.where(causal(p.shape[1]), 0.0, MIN)
            - (torch.arange(p.shape[1])[:, None] - torch.arange(p.shape[1])).abs().float().sqrt()
        ),
        "its numbers are added to the scores",
    ),
    "distances of data": (
        lambda p: causal(p.shape[1]) & ((p[:, None, :, None] - p[:, None, None, :]).abs() < 3),
        "it is an input of the graph",
    ),
    "distances in a narrow dtype": (
        lambda p: causal(p.shape[1]) & (torch.arange(p.shape[1])[:, None].float() - 1).abs().lt(3),
        "absolute value of numbers that are not int64",
    ),
    "chunks": (
        lambda p: causal(p.shape[1]) & (torch.arange(p.shape[1])[:, None] // 4 == torch.arange(p.shape[1]) // 4),
        "it tests",
    ),
    "a window without a causal limit": (
        lambda p: torch.arange(p.shape[1])[:, None] - torch.arange(p.shape[1]) < 5,
        "none towards later ones",
    ),
    "an empty window": (lambda p: causal(p.shape[1]) & ~causal(p.shape[1]), "hides every key"),
    "heads that differ": (
        lambda p: causal(p.shape[1]) & (torch.arange(4)[:, None, None] + torch.arange(p.shape[1]) < 9),
        "it tests",
    ),
    "a prefix": (
        lambda p: causal(p.shape[1]) | (torch.arange(p.shape[1]) < 4),
        "it tests",
    ),
    "a prefix of each row": (
        lambda p: causal(p.shape[1]) | (torch.arange(p.shape[1]) < p[:, :1])[:, None, None, :],
        "it is an input of the graph",
    ),
    "memory of floats taken for integers": (
        lambda p: torch.where(causal(p.shape[1]), 1.0, 0.0).view(torch.int32) == 1,
        "another dtype",
    ),
    "a number that a narrow dtype does not hold": (
        lambda p: torch.ones(p.shape[1], p.shape[1], dtype=torch.uint8).tril() == -255,
        "does not hold",
    ),
    "numbers of a narrow dtype that overflow": (
        lambda p: causal(p.shape[1]).to(torch.int8) * 127 + 2 < 0,
        "does not hold",
    ),
    "complex numbers": (lambda p: causal(p.shape[1]).to(torch.complex64) == 1, "does not hold"),
    "a list as index": (
        lambda p: causal(p.shape[1])[[0, 1, 0]][:, :3],
        "list",
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", NEAR_MISSES)
def test_near_misses_stay_unproven_and_say_why(form, dynamic):
    build, words = NEAR_MISSES[form]
    module, _inputs = captured(build, POSITIONS, dynamic=dynamic)
    proof, _ = prove_output(module)
    assert isinstance(proof, UnprovenMask), proof
    assert words in proof.why


def test_data_times_the_lowest_number_is_a_bias_of_keys():
    """It hides keys where the data is 0, which no proof can know of numbers."""

    def build(p):
        return (1.0 - p[:, None, None, :].float()) * MIN + torch.where(causal(p.shape[1]), 0.0, MIN)

    module, _inputs = captured(build, POSITIONS)
    proof, _ = prove_output(module)
    assert isinstance(proof, MaskPredicate)
    (bias,) = proof.key_terms.bias
    assert bias.index == (BATCH, 0, 0, KEY)
    assert proof.causal_offset == 0


def test_a_limit_for_each_row_keeps_its_offsets():
    def build(starts):
        index = torch.arange(LENGTH)
        return index <= index[:5, None] + starts[:, None, None, None]

    module, _inputs = captured(build, torch.tensor([3, 7]))
    proof, _ = prove_output(module)
    assert isinstance(proof, MaskPredicate)
    assert proof.causal_offset.is_number is False


class Buffers(nn.Module):
    """A mask from buffers, as nanoGPT, GPT-2, llama2.c and gpt-fast keep them."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        size = 32
        self.register_buffer("lower", torch.tril(torch.ones(size, size)).view(1, 1, size, size))
        self.register_buffer("mask", torch.full((1, 1, size, size), float("-inf")).triu(1), persistent=False)
        self.register_buffer("bias", torch.ones(size, size, dtype=torch.uint8).tril().bool()[None, None])
        self.register_buffer("hidden", torch.tensor(MIN))
        self.register_buffer("positions", torch.arange(size)[None])
        self.register_buffer("band", torch.ones(size, size).tril().bool() & ~torch.ones(size, size).tril(-6).bool())
        self.register_buffer("scattered", torch.rand(size, size) > 0.5)
        self.register_buffer("spoiled", self.bias.clone())
        self.spoiled[0, 0, 30, 2] = False
        self.weight = nn.Parameter(torch.ones(size, size).tril(), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))
        self.plain = torch.ones(size, size).tril().bool()

    def forward(self, x):
        return self.form(self, x, x.shape[1])


BUFFERS = {
    "nanoGPT": (lambda m, x, n: m.lower[:, :, :n, :n] != 0, "causal"),
    "nanoGPT, filled": (
        lambda m, x, n: torch.zeros(n, n).masked_fill(m.lower[:, :, :n, :n] == 0, float("-inf")),
        "causal",
    ),
    "llama2.c": (lambda m, x, n: m.mask[:, :, :n, :n], "causal"),
    "GPT-2": (lambda m, x, n: torch.where(m.bias[:, :, n - n : n, :n], 0.0, m.hidden), "causal"),
    "an attribute": (lambda m, x, n: m.plain[None, None, :n, :n], "causal"),
    "gpt-fast, positions in the graph": (lambda m, x, n: m.plain[None, None, torch.arange(n)][..., :n], "causal"),
    "positions from a buffer": (
        lambda m, x, n: m.positions[:, None, None, :n] <= m.positions[:, None, :n, None],
        "causal",
    ),
    "positions from a buffer, packed": (lambda m, x, n: packed(m.positions[:, :n]), "causal"),
    "a band": (lambda m, x, n: m.band[:n, :n], "causal, window 6"),
    "a band added": (lambda m, x, n: torch.where(m.band[:n, :n], 0.0, MIN) + m.mask[:, :, :n, :n], "causal, window 6"),
    "two of them": (lambda m, x, n: (m.bias[:, :, :n, :n], m.mask[:, :, :n, :n]), "causal"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", BUFFERS)
def test_buffers_are_read_by_value(form, dynamic):
    build, expected = BUFFERS[form]
    model = Buffers(build)
    module, inputs = captured(model, torch.randn(2, LENGTH, 4), dynamic=dynamic)
    proof, facts = prove_output(module)
    assert str(proof) == expected, proof
    assert facts.held.readings
    check_proof(proof, module, inputs)


NOT_READ = {
    "a scattered mask": (lambda m, x, n: m.scattered[:n, :n], "none of the forms"),
    "one element away": (lambda m, x, n: m.spoiled[:, :, :n, :n], "none of the forms"),
    "written by the graph": (lambda m, x, n: m.plain.logical_not_()[:n, :n], "overwrites"),
    "an argument": (lambda m, x, n: x[0, :, :1] != 0, "input of the graph"),
    "a parameter": (lambda m, x, n: m.weight[:n, :n] == 1, "none of the forms"),
}


@pytest.mark.parametrize("form", NOT_READ)
def test_other_tensors_are_not_read_by_value(form):
    build, words = NOT_READ[form]
    module, _inputs = captured(Buffers(build), torch.randn(2, LENGTH, 4))
    proof, _ = prove_output(module)
    assert isinstance(proof, UnprovenMask)
    assert words in proof.why


def expanded_mask(x, function):
    """As transformers builds masks of custom functions: ``vmap`` over batch, head, query and key."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=dims, out_dims=0)
    indices = [torch.arange(n) for n in (x.shape[0], 1, x.shape[1], x.shape[1])]
    with TransformGetItemToIndex():
        return function(*indices)


EXPANDED = {
    "causal": (lambda x: lambda b, h, q, k: k <= q, "causal"),
    "window": (lambda x: lambda b, h, q, k: (k <= q) & (k > q - 5), "causal, window 5"),
    "padding": (
        lambda x: (lambda valid: lambda b, h, q, k: (k <= q) & valid[b, k])(x[..., 0] != 0),
        "causal, padded keys",
    ),
    "sequences": (
        lambda x: (lambda ids: lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k]))((x[..., 0] == 0).cumsum(-1)),
        "causal, packed sequences",
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", EXPANDED)
def test_mask_functions_expanded_by_vmap_are_followed(form, dynamic):
    build, expected = EXPANDED[form]
    x = torch.randint(0, 2, (2, LENGTH, 4)).float()
    module, inputs = captured(lambda x: expanded_mask(x, build(x)), x, dynamic=dynamic)
    proof, _ = prove_output(module)
    assert str(proof) == expected, proof
    if dynamic is False:
        visible = expanded_mask(x, build(x)).expand(2, 1, LENGTH, LENGTH)
        assert torch.equal(visible, mask_of(proof, node_values(module, inputs), (2, LENGTH, LENGTH)))


def test_what_is_unknown_inside_vmap_depends_on_every_index():
    """`roll` is not followed: its element may be another one for each query and key."""
    build = lambda b, h, q, k: (k <= q) & (torch.stack([k, q]).roll(1)[0] > 3)  # noqa: E731
    module, _inputs = captured(lambda x: expanded_mask(x, build), torch.randn(2, LENGTH, 4))
    proof, _ = prove_output(module)
    assert isinstance(proof, UnprovenMask), proof


def test_a_mask_function_of_flex_attention_is_read_with_its_indices_and_tensors():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def attend(q, valid):
        ids = valid.logical_not().cumsum(-1)

        def visible(b, h, i, j):
            return (j <= i) & (j > i - 7) & valid[b, j] & (ids[b, i] == ids[b, j])

        block_mask = create_block_mask(visible, 2, None, q.shape[2], q.shape[2], device="cpu")
        return flex_attention(q, q, q, block_mask=block_mask)

    valid = torch.ones(2, 128, dtype=torch.bool)
    module, _ = captured(attend, torch.randn(2, 1, 128, 16), valid)
    facts = all_graphs(module)[0].facts
    (site,) = find_sites(facts)
    proof = prove_terms(Interpreter(facts), site.masks)
    assert str(proof) == "causal, window 7, padded keys, packed sequences", proof


def test_a_counter_in_a_buffer_is_not_read():
    """It would change from call to call; the offset stays its name."""

    def build(module, x, n):
        return torch.arange(n) <= torch.arange(n)[:, None] + module.count

    module, _inputs = captured(Buffers(build), torch.randn(2, LENGTH, 4))
    proof, facts = prove_output(module)
    assert "count" in str(proof.causal_offset)
    assert not facts.held.readings


def filled(n):
    return torch.zeros(n, n, dtype=torch.bool).masked_fill_(torch.arange(n) <= torch.arange(n)[:, None], True)


def filled_twice(x):
    mask = filled(x.shape[1])
    mask.masked_fill_(torch.arange(x.shape[1]) < 3, False)
    return mask


def filled_in_part(x):
    """The part is filled, and the whole is read."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask[:, :5].masked_fill_(torch.arange(x.shape[1])[:, None] > 7, False)
    return mask


def test_a_mask_that_is_filled_once_in_place_is_followed():
    module, inputs = captured(lambda x: filled(x.shape[1])[None, None], torch.randn(2, LENGTH, 4))
    proof, _ = prove_output(module)
    check_proof(proof, module, inputs)
    assert str(proof) == "causal"


@pytest.mark.parametrize("build", [filled_twice, filled_in_part])
def test_a_mask_that_is_filled_further_is_not_taken_for_what_it_was(build):
    module, _inputs = captured(build, torch.randn(2, LENGTH, 4))
    proof, _ = prove_output(module)
    assert isinstance(proof, UnprovenMask)
    assert "overwrites" in proof.why
