"""Lowering targets: which one takes a site, what the report says of it, and targets that a user adds."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infllm_pass
from infllm_pass import Reason, SparseAttentionConfig
from infllm_pass.graph.subgraphs import all_graphs
from infllm_pass.kv_cache.spec import StateTensor
from infllm_pass.masks import BATCH, HEAD
from infllm_pass.plan.length_guard import Branch
from infllm_pass.plan.planner import plan_graph
from infllm_pass.plan.site_plan import Lowering
from infllm_pass.rewrite.pipeline import SitePolicy, run_on_export, run_pass
from infllm_pass.rewrite.targets import DEFAULT_TARGETS, Kernels, Refusal
from tests.support import cache_support
from tests.support.cache_support import CachedAttention, GrowingAttention, caches
from tests.support.common import SMALL, capture, count_calls, relative_error

ALWAYS = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})

calls: list[str] = []


@torch.library.custom_op("infllm_tests::counted_attention", mutates_args=())
def counted_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    """Dense causal attention whose queries are the last of the keys; `bias` broadcasts to ``[B, Hq, Lk]``."""
    calls.append("counted")
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if bias is not None:
        scores = scores + bias[:, :, None]
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


@counted_attention.register_fake
def _(q, k, v, key_mask, bias, scale):
    return q.new_empty(*q.shape[:3], v.shape[3])


class Counted:
    """A target that a user could write: an operator of its own, for the sites that it is told to take."""

    name = "counted"

    def __init__(self, takes=lambda request: True, bias=False):
        self.takes = takes
        self.bias = bias

    def accepts(self, request):
        if request.lowering is not Lowering.SPARSE or not self.takes(request):
            return Refusal("it was told not to")
        return None if self.bias or not request.plan.mask.key_terms.bias else Refusal("it adds nothing to scores")

    def state(self, request):
        return None

    def kernels(self, request):
        return Kernels("a loop in Python")

    def emit(self, request, builder):
        q, k, v = builder.operands()
        key_mask, *_ = builder.mask_arguments()
        bias = None
        for term in builder.key_bias():
            bias = term if bias is None else builder.call(operator.add, bias, term)
        return builder.call(torch.ops.infllm_tests.counted_attention.default, q, k, v, key_mask, bias, request.scale)


def two_sites(q, k, v):
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    return F.scaled_dot_product_attention(first, k, v, is_causal=True)


def qkv(length=100, heads_kv=2):
    return (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (2, heads_kv, heads_kv))


def sparsified(function, target, config=SMALL, **settings):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", **settings)
    return infllm_pass.sparsify(compiled, config, targets=[target, *DEFAULT_TARGETS])


def test_a_target_of_the_users_own_computes_the_sites_that_it_accepts():
    target = Counted(lambda request: request.scale != 0.5)
    model = sparsified(two_sites, target)
    q, k, v = qkv()
    calls.clear()
    out = model(q, k, v)
    assert calls == ["counted"]
    first = infllm_pass.switchable_attention(q, k, v, SMALL, scale=0.5)
    assert relative_error(out, F.scaled_dot_product_attention(first, k, v, is_causal=True)) < 1e-12
    rows = infllm_pass.report(model).sites
    assert [row.target for row in rows] == ["block-sparse", "counted"]
    assert [row.kernels for row in rows] == [
        "C++" if rows[0].kernels == "C++" else "torch operators",
        "a loop in Python",
    ]
    assert rows[0].refusals["counted"] == "it was told not to"
    assert set(rows[0].refusals) == {"counted", "sdpa", "decode"}
    assert rows[1].refusals == {}


def test_dense_lengths_stay_with_the_targets_that_compute_them():
    model = sparsified(two_sites, Counted())
    calls.clear()
    q, k, v = qkv(30)
    assert relative_error(model(q, k, v), two_sites(q, k, v)) < 1e-12
    assert calls == []
    assert {row.target for row in infllm_pass.report(model).sites} == {"sdpa"}


def test_a_target_is_an_argument_and_no_setting_of_the_process():
    sparsified(two_sites, Counted())
    assert "counted" not in {target.name for target in DEFAULT_TARGETS}
    q, k, v = qkv()
    model = infllm_pass.sparsify(torch.compile(two_sites, backend="aot_eager"), SMALL)
    calls.clear()
    model(q, k, v)
    assert calls == []


def test_the_order_decides():
    module = capture(two_sites, *qkv())
    run_pass(module, SitePolicy(SMALL, targets=(*DEFAULT_TARGETS, Counted())))
    assert count_calls(module, torch.ops.infllm_tests.counted_attention.default) == 0


def test_a_site_that_no_target_takes_stays_as_it_was():
    module = capture(two_sites, *qkv())
    before = module.code
    rows = run_pass(module, SitePolicy(SMALL, targets=(Counted(lambda request: False),))).sites
    assert module.code == before
    assert [(row.target, row.refusals) for row in rows] == [("", {"counted": "it was told not to"})] * 2


def test_exported_programs_take_targets_too():
    class Sites(nn.Module):
        def forward(self, q, k, v):
            return two_sites(q, k, v)

    q, k, v = qkv()
    program = infllm_pass.export(Sites(), (q, k, v), config=SMALL, targets=[Counted(), *DEFAULT_TARGETS])
    calls.clear()
    assert relative_error(program.module()(q, k, v), two_sites(q, k, v)) < 1e-12
    assert calls == ["counted"] * 2


@pytest.mark.parametrize(
    ("length", "queries", "mask", "expected"),
    [
        (100, 100, None, {Branch.SPARSE: Lowering.SPARSE, Branch.DENSE: Lowering.CAUSAL}),
        (100, 100, "padding", {Branch.SPARSE: Lowering.SPARSE, Branch.DENSE: Lowering.DENSE}),
        (100, 100, "window", {Branch.SPARSE: Lowering.DENSE, Branch.DENSE: Lowering.DENSE}),
        (100, 100, "all", {Branch.SPARSE: Lowering.UNCHANGED, Branch.DENSE: Lowering.UNCHANGED}),
        (100, 40, None, {Branch.SPARSE: Lowering.SPARSE, Branch.DENSE: Lowering.DENSE}),
    ],
    ids=["causal", "padded", "window within the budget", "bidirectional", "last queries"],
)
def test_the_plan_alone_decides_what_a_site_becomes(length, queries, mask, expected):
    def attend(q, k, v, valid):
        place = torch.arange(queries)[:, None] + length - queries
        seen = torch.arange(length)[None] <= place
        if mask == "padding":
            seen = seen & valid[:, None, None]
        elif mask == "window":
            seen = seen & (torch.arange(length)[None] > place - 8)
        elif mask == "all":
            return F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, seen)

    q, k, v = qkv(length)
    module = capture(attend, q[:, :, :queries], k, v, torch.ones(2, length, dtype=torch.bool))
    (plan,) = plan_graph(all_graphs(module)[0], ALWAYS)
    assert {branch: plan.lowering(branch) for branch in Branch} == expected


@dataclass(frozen=True)
class Maxima:
    """A state of another scorer: the largest element of every block of four keys, and how many calls there were."""

    def __call__(self, keys, dtype):
        batch, heads, length, _ = keys
        return (
            StateTensor("maxima", (batch, heads, (length + 3) // 4, 1), dtype),
            StateTensor("calls", (batch, heads, 1, 1), torch.int64),
        )


filled_before: list[list[int]] = []


@torch.library.custom_op("infllm_tests::kept_attention", mutates_args=("state", "filled"))
def kept_attention(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], filled: Tensor, lengths: Tensor) -> Tensor:
    """Dense attention of the last queries of a cache; keeps the maxima of its keys."""
    filled_before.append(filled.tolist())
    ends = lengths.expand(k.shape[0])
    for row, end in enumerate(ends.tolist()):
        begin = int(filled[row]) // 4 * 4
        if int(filled[row]) == 0:
            state[1][row] = 0
        for block in range(begin // 4, -(-end // 4)):
            state[0][row, :, block, 0] = k[row, :, 4 * block : min(4 * block + 4, end)].flatten(1).amax(1)
        state[1][row] += 1
    filled.copy_(ends)
    key, query = torch.arange(k.shape[2]), torch.arange(q.shape[2])[:, None] + ends[:, None, None] - q.shape[2]
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5
    weights = scores.masked_fill((key > query)[:, None], -math.inf).softmax(-1)
    kept.append([tensor.clone() for tensor in state])
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


kept: list[list[Tensor]] = []


@kept_attention.register_fake
def _(q, k, v, state, filled, lengths):
    return q.new_empty(*q.shape[:3], v.shape[3])


class Keeping(Counted):
    """A target that keeps a state of its own of a cache."""

    name = "keeping"

    def state(self, request):
        return Maxima()

    def emit(self, request, builder):
        state, (lengths, *_) = builder.decoding_arguments()
        q, k, v = builder.operands()
        operator_ = torch.ops.infllm_tests.kept_attention.default
        return builder.call(operator_, q, k, v, list(state.tensors), state.filled, lengths)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_a_target_keeps_the_state_that_it_describes(kind):
    """From call to call, and anew where somebody else wrote to the cache."""
    kept.clear()
    filled_before.clear()
    torch.manual_seed(0)
    module = CachedAttention() if kind == "static" else GrowingAttention()
    config = SparseAttentionConfig.from_dict({**cache_support.CONFIG.to_dict(), "dense_len": 0})
    model = sparsified(module, Keeping(), config)
    reference = torch.compile(module, backend="eager")
    cells = caches(2, 40) if kind == "static" else tuple(torch.zeros(2, 2, 0, 8, dtype=torch.float64) for _ in range(2))
    others = tuple(cell.clone() for cell in cells)
    place = 0
    for step, count in enumerate([5, 1, 1, 1, 3]):
        x = cache_support.tokens(2, count)
        if step == 3 and kind == "static":
            cells[0].mul_(2)
            others[0].mul_(2)
        if kind == "static":
            out, expected = model(x, *cells, torch.tensor(place)), reference(x, *others, torch.tensor(place))
        else:
            (out, *cells), (expected, *others) = model(x, *cells), reference(x, *others)
        place += count
        assert relative_error(out, expected) < 1e-12
        maxima, counted = kept[-1]
        keys = cells[0][:, :, :place]
        blocks = [keys[:, :, at : at + 4].flatten(2).amax(2) for at in range(0, place, 4)]
        assert torch.equal(maxima[:, :, : len(blocks), 0], torch.stack(blocks, 2))
    before = [each[0] for each in filled_before]
    assert before == ([0, 5, 6, 0, 8] if kind == "static" else [0, 5, 6, 7, 8])
    assert int(counted[0, 0, 0, 0]) == (2 if kind == "static" else 5)
    assert {row.cache_state for row in infllm_pass.report(model).sites} == {"carried"}
    assert {row.target for row in infllm_pass.report(model).sites} == {"keeping"}


def biased(q, k, v, bias, *, factor=1.0):
    """Causal attention with numbers added to the scores of keys."""
    scores = (q @ k.mT) * (8**-0.5 / factor) + bias
    index = torch.arange(k.shape[2])
    return (scores * factor).masked_fill(index > index[:, None], -math.inf).softmax(-1) @ v


BIASES = {
    "of rows and keys": (lambda b: b[:, None, None], (2, 100), [BATCH]),
    "of keys": (lambda b: b, (100,), []),
    "of heads": (lambda b: b[:, :, None], (2, 2, 100), [BATCH, HEAD]),
    "of heads alone": (lambda b: b[None, :, None], (2, 100), [HEAD]),
    "computed in the graph": (lambda b: b[torch.arange(100).flip(0)].sin(), (100,), []),
    "with dimensions of one": (lambda b: b, (2, 1, 1, 100), [BATCH]),
}


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("form", BIASES)
def test_numbers_added_to_keys_reach_a_target_that_takes_them(form, factor):
    view, shape, axes = BIASES[form]

    def attend(q, k, v, bias):
        return biased(q, k, v, view(bias), factor=factor)

    q, k, v = qkv()
    bias = torch.randn(shape, dtype=torch.float64)
    (plan,) = plan_graph(all_graphs(capture(attend, q, k, v, bias))[0], SMALL)
    (term,) = plan.mask.key_terms.bias
    assert [symbol for symbol in (BATCH, HEAD) if symbol in term.index] == axes
    assert term.factor == factor
    model = sparsified(attend, Counted(bias=True))
    calls.clear()
    assert relative_error(model(q, k, v, bias), attend(q, k, v, bias)) < 1e-12
    assert calls == ["counted"]
    (row,) = infllm_pass.report(model).sites
    assert (row.decision, row.mask, row.target) == ("switchable", "causal, biased keys", "counted")


def test_several_biases_and_padding_are_added_up():
    def attend(q, k, v, a, b, valid):
        scores = (q @ k.mT) * 8**-0.5 + a[:, None, None] + b
        index = torch.arange(k.shape[2])
        seen = (index <= index[:, None]) & valid[:, None, None]
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v

    q, k, v = qkv()
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[1, 90:] = False
    inputs = q, k, v, torch.randn(2, 100, dtype=torch.float64), torch.randn(100, dtype=torch.float64), valid
    model = sparsified(attend, Counted(bias=True))
    calls.clear()
    assert relative_error(model(*inputs), attend(*inputs)) < 1e-12
    assert calls == ["counted"]


@pytest.mark.parametrize("form", ["of heads", "of heads alone"])
def test_without_such_a_target_a_bias_that_differs_in_a_group_is_refused(form):
    """With the reason and the words that a mask gets whose numbers are not understood, and no guard on the length."""
    view, shape, _ = BIASES[form]
    q, k, v = qkv(heads_kv=1)
    module = capture(lambda q, k, v, b: biased(q, k, v, view(b)), q, k, v, torch.randn(shape, dtype=torch.float64))
    before = module.code
    (row,) = run_pass(module, SMALL).sites
    assert (row.reason, row.decision, row.mask, row.guard, row.target) == ("ADDITIVE_BIAS", "dense", "unknown", "", "")
    assert row.explanation.startswith("at node ")
    assert ": its numbers are added to the scores; " in row.explanation
    assert row.explanation.endswith(Reason.ADDITIVE_BIAS.value)
    assert module.code == before
    (decided,) = run_on_export(module, SMALL).sites
    assert (decided.reason, decided.explanation) == (row.reason, row.explanation)


def test_a_refused_bias_leaves_dynamic_lengths_unguarded():
    seen = []

    def backend(module, _inputs):
        seen.append(run_pass(module, SMALL))
        return module.forward

    run = torch.compile(lambda q, k, v, b: biased(q, k, v, b[:, None]), backend=backend, dynamic=True)
    for length in (30, 100):  # on both sides of dense_len
        run(*qkv(length, heads_kv=1), torch.randn(2, length, dtype=torch.float64))
    assert len(seen) == 1


OTHER_NUMBERS = {
    "of queries": lambda s, b: s + b[:, None],
    "of queries and keys": lambda s, b: s + b[:, None] * b,
    "read at a number of queries": lambda s, b: s + b[(torch.arange(100)[:, None] - torch.arange(100)).abs()],
}


@pytest.mark.parametrize("numbers", OTHER_NUMBERS)
def test_other_numbers_are_no_bias_of_keys(numbers):
    def attend(q, k, v, b):
        index = torch.arange(k.shape[2])
        scores = OTHER_NUMBERS[numbers]((q @ k.mT) * 8**-0.5, b)
        return scores.masked_fill(index > index[:, None], -math.inf).softmax(-1) @ v

    q, k, v = qkv()
    b = torch.randn(100, dtype=torch.float64)
    model = sparsified(attend, Counted(bias=True))
    calls.clear()
    with pytest.warns(infllm_pass.errors.NoAttentionSiteWarning):
        out = model(q, k, v, b)
    assert relative_error(out, attend(q, k, v, b)) < 1e-12
    assert [row.reason for row in infllm_pass.report(model).sites] == ["ADDITIVE_BIAS"]
    assert calls == []


def test_what_keeps_a_site_dense_beside_a_bias_is_told():
    """Queries see one key too many; a bias alone would not be in the way."""

    def attend(q, k, v, b, scale):
        index = torch.arange(k.shape[2])
        return ((q @ k.mT) * 0.3 + b).masked_fill(index > index[:, None] + 1, -math.inf).softmax(-1) @ v

    q, k, v = qkv()
    module = capture(attend, q, k, v, torch.randn(100, dtype=torch.float64), torch.tensor(0.3))
    (row,) = run_pass(module, SitePolicy(SMALL, targets=(Counted(bias=True), *DEFAULT_TARGETS))).sites
    assert row.reason == "PARTIAL_KEYS"
