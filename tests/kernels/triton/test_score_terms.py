"""Score terms in the kernels of prefill attention and its gradients: soft cap, key bias and sinks, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from infllm_pass.kernels import reference
from infllm_pass.kernels.triton.attention_inputs import AttentionInputs
from infllm_pass.kernels.triton.backward import dq
from infllm_pass.kernels.triton.backward.dkv import key_gradients
from infllm_pass.kernels.triton.backward.dq import output_delta, query_gradient
from infllm_pass.kernels.triton.backward.sinks import sink_gradient
from infllm_pass.kernels.triton.configs import ScatteredConfig, override
from infllm_pass.kernels.triton.prefill import attention
from infllm_pass.kernels.triton.prefill.attention import attention_forward
from infllm_pass.kernels.triton.tile_tables import TilePlan
from tests.kernels.triton.test_attention import BOUND, Case, _poisoned, assert_close  # noqa: F401
from tests.support.triton_device import DEVICE, arrange, gpu
from tests.support.triton_support import lists_from_sets


@dataclass(frozen=True)
class Terms:
    """Which terms a case has; `bias`: for how many rows and key/value heads each, 1 or all."""

    softcap: float = 0.0
    bias: tuple[bool, bool] | None = None
    sinks: bool = False

    def draw(self, case: Case) -> dict[str, Tensor | float | None]:
        """The arguments `key_bias`, `sinks` and `softcap`."""
        bias = None
        if self.bias is not None:
            rows, heads = (size if own else 1 for size, own in zip((case.batch, case.heads_kv), self.bias, strict=True))
            bias = 2 * torch.randn(case.length_k, rows, heads, device=DEVICE).permute(1, 2, 0)
            bias[..., 32:48] = float("-inf")  # a block of which no key counts
        sinks = torch.randn(case.heads_kv * case.group, device=DEVICE) + 1 if self.sinks else None
        return {"key_bias": bias, "sinks": sinks, "softcap": self.softcap}


ALL = Terms(1.5, (True, True), True)


def exact_attention(q, k, v, allowed, scale, key_bias, sinks, softcap):
    """Output and log-sum-exp by the formula, in float64."""
    group = q.shape[1] // k.shape[1]
    keys, values = (tensor.repeat_interleave(group, 1) for tensor in (k, v))
    scores = scale * q @ keys.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + key_bias.expand(k.shape[:3]).repeat_interleave(group, 1)[:, :, None]
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return weights[..., : k.shape[2]] @ values, lse


def check(
    case: Case,
    terms: Terms,
    plan: TilePlan | None = None,
    *,
    placed: dict[str, Tensor | None] | None = None,
    every_query: bool = True,
    piece_steps: int | None = None,
) -> None:
    """Compare output, log-sum-exp and all gradients with the formula; `placed`: where sequences lie."""
    q, k, v = case.inputs()
    drawn = terms.draw(case)
    fields = {"geometry": case.geometry, "scale": case.scale, "dense_len": case.dense_len, "window": case.window}
    fields |= placed or {}
    sets = reference.select_blocks(q, k, **fields) if case.sparse else None
    # Queries of 0 weigh all keys that they may see alike: over one-hot values that shows which.
    unit = torch.eye(case.length_k, device=DEVICE).expand(*k.shape[:2], -1, -1)
    allowed = reference.attention(torch.zeros_like(q), k, unit, sets, **fields)[0] > 0

    leaves = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    exact = {name: x.double().requires_grad_() if isinstance(x, Tensor) else x for name, x in drawn.items()}
    expected, expected_lse = exact_attention(*leaves, allowed, case.scale, **exact)
    plan = case.plan(case.length_k - case.length_q) if plan is None else plan
    lists = lists_from_sets(sets, plan, sets.shape[-1], dense_len=case.dense_len) if sets is not None else None
    common = {name: fields[name] for name in ("geometry", "scale", "dense_len", "window")}
    given = AttentionInputs(
        q, k, v, lists, plan, **common, key_mask=fields.get("key_mask"), every_query=every_query, **drawn
    )
    out, lse = attention_forward(given)
    bound = BOUND[case.dtype]
    assert_close(out, expected, bound)
    seen = expected_lse != float("-inf")
    assert torch.equal(lse != float("-inf"), seen)
    assert_close(lse[seen], expected_lse[seen], bound)

    grad = torch.randn_like(out)
    inputs = [*leaves, *(exact[name] for name in ("key_bias", "sinks") if exact[name] is not None)]
    gradients = torch.autograd.grad(expected, inputs, grad.double())
    delta = output_delta(grad, out)
    options = {} if piece_steps is None else {"piece_steps": piece_steps}
    grad_k, grad_v, grad_bias = key_gradients(grad, lse, delta, given, **options)
    found = [query_gradient(grad, lse, delta, given), grad_k, grad_v]
    assert (grad_bias is None) == (drawn["key_bias"] is None)
    found += [] if grad_bias is None else [grad_bias]
    found += [sink_gradient(drawn["sinks"], lse, delta)] if terms.sinks else []
    for name, mine, wanted in zip(("q", "k", "v", "first term", "second"), found, gradients, strict=False):
        assert mine.shape == wanted.shape, name
        # Where scores are far beyond a cap there is no gradient but rounding: measure that against inputs of size 1.
        error = float((mine.double() - wanted).norm())
        assert error <= 2 * bound * max(float(wanted.norm()), 1.0), f"{name}: {error}"


def case(name: str, terms: Terms, **sizes):
    return pytest.param(Case(**{"length_q": 61, "length_k": 93} | sizes), terms, id=name)


TERMS = [
    case("cap, group 1", Terms(softcap=1.5), group=1, heads_kv=2),
    case("cap that all scores exceed", Terms(softcap=1e-3), group=3),
    case("cap that no score comes near", Terms(softcap=50.0), group=3),
    case("bias for all rows and heads", Terms(bias=(False, False)), batch=2, heads_kv=2, length_q=23),
    case("bias by row, window", Terms(bias=(True, False)), batch=2, heads_kv=2, window=37, length_q=23),
    case("bias by head", Terms(bias=(False, True)), group=3, heads_kv=2, dim=24, value_dim=40),
    case("sinks, dense by length", Terms(sinks=True), group=3, heads_kv=2, dense_len=94),
    case("sinks, dense window", Terms(sinks=True), sparse=False, window=18),
    case("all, group 4", ALL, length_q=93),
    case("all, group 16, dense", ALL, group=16, sparse=False, length_q=21),
    case("all, shared by 16 queries", ALL, query_block=16),
    case("all, seven keys", ALL, length_q=7, length_k=7, group=3),
]


@pytest.mark.parametrize(("case", "terms"), TERMS)
def test_terms_match_the_formula(case, terms):
    check(case, terms)


def test_pieces_of_a_block():
    check(Case(length_q=70, length_k=70, group=8), ALL, piece_steps=1)


@pytest.mark.parametrize("terms", [ALL, Terms(sinks=True)], ids=["all", "sinks"])
def test_padded_rows_with_holes(terms):
    """Rows on both sides of dense_len, one without a key; queries that see no key have the sink alone."""
    case = Case(batch=4, length_q=57, length_k=77, dense_len=40)
    bounds = [(0, 77), (31, 77), (9, 30), (40, 40)]
    key_mask = torch.zeros(4, 77, dtype=torch.bool, device=DEVICE)
    for row, (first, end) in enumerate(bounds):
        key_mask[row, first:end] = torch.rand(end - first, device=DEVICE) < 0.7
        key_mask[row, [first, max(end - 1, 0)]] = first < end
    plan = case.plan(20, key_bounds=torch.tensor(bounds, dtype=torch.int32, device=DEVICE))
    check(case, terms, plan, placed={"key_mask": key_mask, "offset": 20}, every_query=False)


def test_packed_queries_and_keys():
    keys, queries = [0, 37, 90, 150, 155], [0, 1, 44, 44, 48]
    case = Case(length_q=48, length_k=155, dense_len=40, group=3)
    bounds = [torch.tensor(cumulative, dtype=torch.int32, device=DEVICE) for cumulative in (keys, queries)]
    placed = {"cu_seqlens_k": bounds[0], "cu_seqlens_q": bounds[1]}
    check(case, ALL, case.packed_plan(*bounds), placed=placed)


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_a_bias_of_minus_infinity_hides_a_key(cap):
    case = Case(length_q=30, length_k=40, group=3)
    q, k, v = case.inputs()
    hidden = torch.rand(1, 40, device=DEVICE) < 0.4
    hidden[:, [0, 39]] = False
    bias = torch.zeros(1, 1, 40, device=DEVICE).masked_fill(hidden[:, None], float("-inf"))
    plan, numbers = case.plan(10), {"geometry": case.geometry, "scale": case.scale, "dense_len": 41, "softcap": cap}
    biased = attention_forward(AttentionInputs(q, k, v, None, plan, **numbers, key_bias=bias))
    masked = attention_forward(AttentionInputs(q, k, v, None, plan, **numbers, key_mask=~hidden))
    for mine, wanted in zip(biased, masked, strict=True):
        assert_close(mine, wanted, 1e-6)


@pytest.mark.parametrize(
    ("terms", "window"), [(ALL, None), (Terms(bias=(False, True)), 85)], ids=["all", "bias, window"]
)
def test_scattered_selections(terms, window, monkeypatch):
    """Gathered by the forward and by the gradient of q."""
    chosen = []

    def noted(original, state):
        def gather(*arguments):
            original(*arguments)
            chosen.append(int(arguments[state][0]))

        return gather

    monkeypatch.setattr(attention, "attend_scattered", noted(attention.attend_scattered, 3))
    monkeypatch.setattr(dq, "add_scattered_gradient", noted(dq.add_scattered_gradient, 5))
    always = ScatteredConfig(threshold=-1.0, pool_bytes=1 << 16)
    with override(scattered=always, scattered_gradient=always):
        check(Case(selected_blocks=6, length_q=61, length_k=165, heads_kv=2, window=window), terms)
    assert chosen == [1, 1]


LONG = {"length_q": 901, "length_k": 1301, "block_size": 64, "selected_blocks": 7, "batch": 2}


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("terms", [Terms(softcap=1.5), Terms(bias=(True, True)), Terms(sinks=True), ALL], ids=str)
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 128), (4, 64), (7, 72), (2, 256)])
def test_long_inputs(group, dim, terms, dtype):
    sizes = {"group": group, "dim": dim, "value_dim": dim, "heads_kv": 2, "scale": dim**-0.5}
    check(Case(**LONG, **sizes, dtype=dtype), terms)
    check(replace(Case(**LONG, **sizes, dtype=dtype), sparse=False, window=300), terms)


arrange(globals())
