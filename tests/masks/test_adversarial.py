"""Functions that look like causal attention and are not: none may be rewritten, or the rewrite must be exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import MaskBufferChangedWarning
from infllm_pass.frontend.backend import SwitchableBackend
from infllm_pass.rewrite.report import Report
from tests.support.common import SMALL

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
LENGTH, HEADS, DIM = 72, 4, 8
"""Longer than the dense length and than the visited span of the small budget."""


def run(function: Callable[..., Tensor], *inputs: Tensor, config=SMALL, dynamic: bool) -> tuple[Tensor, Report]:
    """Rewrite a function's graphs without compiling them, and call it."""
    backend = SwitchableBackend(lambda module, _inputs: module.forward, config)
    result = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return result, backend.log.report()


def tensors(batch: int = 2, length: int = LENGTH, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, heads, length, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3))  # type: ignore[return-value]


def gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = torch.autograd.grad((torch.nan_to_num(output) * probe).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(tensor) if part is None else part for part, tensor in zip(found, wanted, strict=True)]


def check(function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool, dense: bool) -> None:
    """Outputs and gradients are those of eager: dense sites under any budget, others under one that covers all keys."""
    expected = function(*inputs)
    actual, report = run(function, *inputs, config=SMALL if dense else COVERING, dynamic=dynamic)
    if dense:
        assert report.switchable == 0, str(report)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    for got, wanted in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


# Spellings: how a mask that is True where a key is seen gets to the scores.


def fused(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    return F.softmax(scores.masked_fill(~keep, float("-inf")), dim=-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = torch.zeros_like(keep, dtype=q.dtype).masked_fill(keep.logical_not(), torch.finfo(q.dtype).min)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


SPELLINGS = [fused, filled, added]


def spelled(name: str, cases: list) -> pytest.MarkDecorator:
    """Parametrizes by each case with static and with dynamic sizes; of the spellings, each has one case in three."""
    parameters = []
    for number, case in enumerate(cases):
        for dynamic in (False, True):
            spelling = SPELLINGS[(number + dynamic) % len(SPELLINGS)]
            words = [getattr(case, "__name__", str(case)), spelling.__name__, "dynamic" if dynamic else "static"]
            parameters.append(pytest.param(case, spelling, dynamic, id="-".join(words)))
    return pytest.mark.parametrize((name, "spelling", "dynamic"), parameters)


# Masks: functions of the queries alone, called with their length; every one differs from a causal mask somewhere.


def _grid(length: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(length)
    return index[:, None], index[None, :]


def off_by_one(n):
    i, j = _grid(n)
    return j <= i + 1


def prefix(n):
    i, j = _grid(n)
    return (j <= i) | (j < 20)


def anti_causal(n):
    i, j = _grid(n)
    return j >= i


def diagonal_blocks(n):
    i, j = _grid(n)
    return i // 16 == j // 16


def causal_blocks(n):
    i, j = _grid(n)
    return j // 16 <= i // 16


def dilated(n):
    i, j = _grid(n)
    return (j <= i) & ((i - j) % 2 == 0)


def one_row_more(n):
    i, j = _grid(n)
    return (j <= i) | (i == 3)


def one_element_less(n):
    i, j = _grid(n)
    return (j <= i) & ~((i == 50) & (j == 2))


def steeper(n):
    i, j = _grid(n)
    return j <= 2 * i


def transposed(n):
    return torch.ones(n, n, dtype=torch.bool).tril().mT


def flipped(n):
    return torch.ones(n, n, dtype=torch.bool).tril().flip(-1)


def rolled(n):
    return torch.ones(n, n, dtype=torch.bool).tril().roll(1, 0) | torch.eye(n, dtype=torch.bool)


def triangle_above(n):
    return torch.ones(n, n, dtype=torch.bool).triu()


def triangle_with_diagonal_one(n):
    return torch.ones(n, n, dtype=torch.bool).tril(diagonal=1)


def inverted_triangle_of_zeros(n):
    return ~torch.zeros(n, n, dtype=torch.bool).tril()


def sliced_from_the_wrong_rows(n):
    return torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[n:, :n]


def sliced_one_row_late(n):
    return torch.ones(n + 1, n + 1, dtype=torch.bool).tril()[1:, :n]


def wrapped_bytes(n):
    i, j = _grid(n)
    return j.to(torch.uint8) * 4 <= i.to(torch.uint8) * 4


def rounded_floats(n):
    i, j = _grid(n)
    return j.bfloat16() + 300 <= i.bfloat16() + 300


def scaled_and_truncated(n):
    i, j = _grid(n)
    return (j * 0.125).int() <= (i * 0.125).int()


def unsigned_difference(n):
    i, j = _grid(n)
    return (i.to(torch.uint8) - j.to(torch.uint8)) >= 0


def one_head_different(n):
    i, j = _grid(n)
    head = torch.arange(HEADS)[:, None, None]
    return (j <= i) | (head == HEADS - 1)


def one_row_of_the_batch_different(n):
    i, j = _grid(n)
    row = torch.arange(2)[:, None, None, None]
    return (j <= i) | (row == 1)


def either_way(n):
    i, j = _grid(n)
    return (j <= i) | (j >= i)


def edited_before(n):
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    keep[5, 40] = True
    return keep


def edited_through_a_view(n):
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    view = keep.view(-1)
    view[7] = True
    return keep


def edited_by_an_operator(n):
    i, j = _grid(n)
    keep = j <= i
    keep.logical_or_(j == 30)
    return keep


def edited_through_out(n):
    i, j = _grid(n)
    keep = j <= i
    torch.ge(j, i - 2, out=keep)
    return keep


def overwritten_indices(n):
    index = torch.arange(n)
    keep = index[None, :] <= index[:, None]
    index.zero_()
    return keep & (index[None, :] <= index[:, None]) | (index[None, :] == 0) & (torch.arange(n) < 3)


def counted_differently(n):
    order = torch.ones(n, dtype=torch.long).cumsum(0)
    return (order[None, :] - 2) <= order[:, None]


def window_alone(n):
    i, j = _grid(n)
    return i - j < 12


def window_shifted(n):
    i, j = _grid(n)
    return (j <= i) & (j >= i - 9) | (j == i + 1)


MASKS = [
    *(off_by_one, prefix, anti_causal, diagonal_blocks, causal_blocks, dilated, one_row_more, one_element_less),
    *(steeper, transposed, flipped, rolled, triangle_above, triangle_with_diagonal_one, inverted_triangle_of_zeros),
    *(sliced_from_the_wrong_rows, sliced_one_row_late, wrapped_bytes, rounded_floats, scaled_and_truncated),
    *(unsigned_difference, one_head_different, one_row_of_the_batch_different, either_way, edited_before),
    *(edited_through_a_view, edited_by_an_operator, edited_through_out, overwritten_indices, counted_differently),
    *(window_alone, window_shifted),
]


@spelled("mask", MASKS)
def test_masks_that_are_not_causal_stay_dense(mask, spelling, dynamic):
    def attend(q, k, v):
        return spelling(q, k, v, mask(q.shape[2]))

    n = LENGTH
    assert not torch.equal(mask(n).expand(2, HEADS, n, n), torch.ones(n, n).tril().bool().expand(2, HEADS, n, n))
    check(attend, *tensors(), dynamic=dynamic, dense=True)


def strictly_below(n):
    i, j = _grid(n)
    return j < i


def short_window(n):
    i, j = _grid(n)
    return (j <= i) & (j > i - 12)


def causal_in_chunks(n):
    i, j = _grid(n)
    return (j <= i) & (i // 32 == j // 32)


@spelled("mask", [strictly_below, short_window, causal_in_chunks])
def test_masks_that_hide_more_than_the_future_are_kept_exactly(mask, spelling, dynamic):
    """The operators could express some of these; today's or tomorrow's pass may do so, but only exactly."""

    def attend(q, k, v):
        return spelling(q, k, v, mask(q.shape[2]))

    check(attend, *tensors(), dynamic=dynamic, dense=False)


# Masks that are data.


def from_positions(q, k, v, _keep, ids):
    return ids[None, :] <= torch.arange(q.shape[2])[:, None]


def from_an_offset(q, k, v, _keep, ids):
    i, j = _grid(q.shape[2])
    return j <= i + ids[0]


def key_seen_by_all(q, k, v, _keep, ids):
    i, j = _grid(q.shape[2])
    return (j <= i) | (ids > 1000)


def query_condition(q, k, v, _keep, ids):
    i, j = _grid(q.shape[2])
    return (j <= i) & ((ids < 1000)[:, None] | (i == j))


def from_the_scores(q, k, v, _keep, _ids):
    return (q @ k.mT) > 0


@spelled("mask", [from_positions, key_seen_by_all, query_condition, from_the_scores])
def test_masks_that_are_data_stay_dense_though_the_example_is_causal(mask, spelling, dynamic):
    def attend(q, k, v, keep, ids):
        return spelling(q, k, v, mask(q, k, v, keep, ids))

    data = (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), torch.arange(LENGTH))
    check(attend, *tensors(), *data, dynamic=dynamic, dense=True)


@spelled("shift", [0, 1, 7])
def test_an_offset_that_is_data_is_kept_whatever_it_is(shift, spelling, dynamic):
    def attend(q, k, v, keep, ids):
        return spelling(q, k, v, from_an_offset(q, k, v, keep, ids))

    data = (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), torch.arange(LENGTH) + shift)
    check(attend, *tensors(), *data, dynamic=dynamic, dense=shift > 0)


class Buffered(torch.nn.Module):
    """A mask in a buffer, causal but for one element."""

    def __init__(self, spelling, row: int, column: int, length: int = LENGTH) -> None:
        super().__init__()
        self.spelling = spelling
        keep = torch.ones(length, length, dtype=torch.bool).tril()
        keep[row, column] ^= True
        self.register_buffer("keep", keep)

    def forward(self, q, k, v):
        return self.spelling(q, k, v, self.keep[: q.shape[2], : q.shape[2]])


@spelled("place", [(0, LENGTH - 1), (LENGTH - 1, 1), (40, 41)])
def test_buffers_wrong_in_one_element_stay_dense(place, spelling, dynamic):
    check(Buffered(spelling, *place), *tensors(), dynamic=dynamic, dense=True)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_a_buffer_that_changes_between_calls_is_read_anew(spelling):
    """What was proved of a buffer's values has to hold for every later call."""
    module = Buffered(spelling, 0, LENGTH - 1, LENGTH)
    module.keep.copy_(torch.ones(LENGTH, LENGTH).tril().bool())
    backend = SwitchableBackend(lambda graph, _inputs: graph.forward, COVERING)
    compiled = torch.compile(module, backend=backend)
    q, k, v = tensors()
    torch.testing.assert_close(compiled(q, k, v), module(q, k, v))
    module.keep.fill_(True)
    with pytest.warns(MaskBufferChangedWarning):
        torch.testing.assert_close(compiled(q, k, v), module(q, k, v))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_a_mask_edited_after_one_use_counts_at_each_use_as_it_is_then(spelling, dynamic):
    def attend(q, k, v):
        keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        first = spelling(q, k, v, keep)
        keep.fill_(True)
        return first + spelling(q, k, v, keep)

    check(attend, *tensors(), dynamic=dynamic, dense=False)


# Computations that are not attention, or not only.


@dataclass(frozen=True)
class Case:
    """A function of q, k and v; `dense` where no rewriting could be exact."""

    function: Callable[..., Tensor]
    dense: bool = True


def _causal(q: Tensor) -> Tensor:
    i, j = _grid(q.shape[2])
    return j <= i


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)) * DIM**-0.5


def _hidden(q: Tensor, k: Tensor) -> Tensor:
    return _scores(q, k).masked_fill(~_causal(q), float("-inf"))


def softmax_over_queries(q, k, v):
    return torch.nan_to_num(_hidden(q, k).softmax(-2)) @ v


def softmax_over_heads(q, k, v):
    return torch.nan_to_num(_hidden(q, k).softmax(1)) @ v


def mask_added_after_the_softmax(q, k, v):
    return (_scores(q, k).softmax(-1) + _causal(q)) @ v


def mask_multiplied_after_the_softmax(q, k, v):
    return (_scores(q, k).softmax(-1) * _causal(q)) @ v


def mask_multiplied_before_the_softmax(q, k, v):
    return (_scores(q, k) * _causal(q)).softmax(-1) @ v


def mask_filled_with_zero(q, k, v):
    return _scores(q, k).masked_fill(~_causal(q), 0.0).softmax(-1) @ v


def mask_that_does_not_hide(q, k, v):
    return (100 * _scores(q, k)).masked_fill(~_causal(q), -100.0).softmax(-1) @ v


def half_precision_fill_that_does_not_hide(q, k, v):
    return (1e5 * _scores(q, k)).masked_fill(~_causal(q), -1e4).softmax(-1) @ v


def added_fill_that_does_not_hide(q, k, v):
    bias = torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype).masked_fill(~_causal(q), -1e4)
    return (1e5 * _scores(q, k) + bias).softmax(-1) @ v


def mask_of_the_wrong_sign(q, k, v):
    return _scores(q, k).masked_fill(_causal(q), torch.finfo(q.dtype).min).softmax(-1) @ v


def hidden_and_shown_again(q, k, v):
    return _hidden(q, k).masked_fill(torch.eye(q.shape[2], dtype=torch.bool).roll(1, 1), 0.0).softmax(-1) @ v


def infinity_cleared(q, k, v):
    return torch.nan_to_num(_hidden(q, k), neginf=-2.0).softmax(-1) @ v


def clamped_scores(q, k, v):
    return _hidden(q, k).clamp(min=-1.0).softmax(-1) @ v


def capped_scores(q, k, v):
    return (5.0 * torch.tanh(_scores(q, k) / 5.0)).masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def linear_bias(q, k, v):
    i, j = _grid(q.shape[2])
    return (_hidden(q, k) + 0.125 * (j - i)).softmax(-1) @ v


def fused_linear_bias(q, k, v):
    i, j = _grid(q.shape[2])
    bias = (0.125 * (j - i)).to(q.dtype).masked_fill(j > i, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def sink(q, k, v):
    scores = torch.cat([_hidden(q, k), torch.ones_like(q[..., :1])], -1)
    return scores.softmax(-1)[..., :-1] @ v


def softmax_plus_one(q, k, v):
    weights = _hidden(q, k).exp()
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


def sigmoid(q, k, v):
    return _hidden(q, k).sigmoid() @ v


def log_softmax(q, k, v):
    return torch.nan_to_num(_hidden(q, k).log_softmax(-1), neginf=0.0) @ v


def softmin(q, k, v):
    return F.softmin(_scores(q, k).masked_fill(~_causal(q), float("inf")), -1) @ v


def squared_weights(q, k, v):
    return _hidden(q, k).softmax(-1).square() @ v


def weights_cut_off(q, k, v):
    weights = _hidden(q, k).softmax(-1)
    return weights.where(weights > 0.05, 0.0) @ v


def transposed_weights(q, k, v):
    return _hidden(q, k).softmax(-1).mT @ v


def wrong_einsum(q, k, v):
    return torch.einsum("bhqk,bhqd->bhkd", _hidden(q, k).softmax(-1), v)


def permuted_weights(q, k, v):
    return _hidden(q, k).softmax(-1).flip(-1) @ v


def rolled_scores(q, k, v):
    return _scores(q, k).roll(1, -1).masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def mixed_heads(q, k, v):
    mixed = torch.einsum("bhqk,hg->bgqk", _scores(q, k), torch.full((HEADS, HEADS), 0.3, dtype=q.dtype))
    return mixed.masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def weights_returned(q, k, v):
    weights = _hidden(q, k).softmax(-1)
    return torch.cat([weights @ v, weights], -1)


def scale_from_data(q, k, v):
    scores = (q @ k.mT) * q.mean()
    return scores.masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def scale_for_each_key(q, k, v):
    return (_scores(q, k) * k.norm(dim=-1)[:, :, None]).masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def scale_for_each_distance(q, k, v):
    i, j = _grid(q.shape[2])
    return (_scores(q, k) / (1 + (i - j).abs())).masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def reshaped_keys(q, k, v):
    scores = q @ k.reshape(*k.shape[:2], k.shape[3], k.shape[2]) * DIM**-0.5
    return scores.masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def keys_of_other_heads(q, k, v):
    return _hidden(q, k.flip(1)).softmax(-1) @ v


def channels_attend(q, k, v):
    scores = q.mT @ k
    keep = torch.ones(DIM, DIM, dtype=torch.bool).tril()
    return v @ scores.masked_fill(~keep, float("-inf")).softmax(-1).mT


def scores_used_twice(q, k, v):
    scores = _scores(q, k)
    return scores.masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v + scores.softmax(-1) @ v


def keys_twice(q, k, v):
    k, v = torch.cat([k, k], 2), torch.cat([v, v.flip(2)], 2)
    keep = _causal(q).repeat(1, 2)
    return _scores(q, k).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def top_left_of_more_keys(q, k, v):
    k, v = torch.cat([k, k], 2), torch.cat([v, v], 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def top_left_of_more_queries(q, k, v):
    return F.scaled_dot_product_attention(torch.cat([q, q], 2), k, v, is_causal=True)


def last_key_unused(q, k, v):
    return _hidden(q, k).softmax(-1)[..., :-1] @ v[:, :, :-1]


def first_key_unused(q, k, v):
    return _hidden(q, k)[..., 1:].softmax(-1).nan_to_num() @ v[:, :, 1:]


def scores_detached(q, k, v):
    return _hidden(q, k).detach().softmax(-1) @ v


def weights_detached(q, k, v):
    return _hidden(q, k).softmax(-1).detach() @ v


def scores_without_gradients(q, k, v):
    with torch.no_grad():
        scores = _hidden(q, k)
    return scores.softmax(-1) @ v


def weights_without_gradients(q, k, v):
    with torch.no_grad():
        weights = _hidden(q, k).softmax(-1)
    return weights @ v


def cast_to_integers_between(q, k, v):
    return (_hidden(q, k).softmax(-1) * 255).int().to(q.dtype) @ v


def scores_edited_in_place(q, k, v):
    scores = _hidden(q, k)
    scores[..., 3].fill_(0.5)
    return scores.softmax(-1) @ v


def scores_masked_in_place(q, k, v):
    scores = _hidden(q, k)
    scores.masked_fill_(torch.eye(q.shape[2], dtype=torch.bool), -3.0)
    return scores.softmax(-1) @ v


def scores_added_to_in_place_through_a_view(q, k, v):
    scores = _hidden(q, k)
    scores[:, 1].add_(torch.arange(q.shape[2]))
    return scores.softmax(-1) @ v


def scores_zeroed_before_the_mask(q, k, v):
    scores = _scores(q, k)
    scores.view(-1)[:40].zero_()
    return scores.masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def keys_detached(q, k, v):
    return fused(q, k.detach().clone(), v, _causal(q))


def keys_repeated_and_detached(q, k, v):
    k = k[:, :2].repeat_interleave(HEADS // 2, 1).detach()
    v = v[:, :2].repeat_interleave(HEADS // 2, 1)
    return fused(q, k, v, _causal(q))


def queries_scaled_by_data(q, k, v):
    return filled(q * k.norm(), k, v, _causal(q))


def values_repeated_without_gradients(q, k, v):
    with torch.no_grad():
        v = v[:, :2].repeat_interleave(HEADS // 2, 1)
    k = k[:, :2].repeat_interleave(HEADS // 2, 1)
    return filled(q, k, v, _causal(q))


def less_the_largest_of_each_key(q, k, v):
    scores = _scores(q, k)
    shifted = scores - scores.amax(-2, keepdim=True)
    return shifted.masked_fill(~_causal(q), float("-inf")).softmax(-1) @ v


def less_the_largest_of_other_scores(q, k, v):
    return (_hidden(q, k) - _scores(k, q).transpose(-2, -1).amax(-2, keepdim=True)).softmax(-1) @ v


def less_a_number_of_each_key(q, k, v):
    return (_hidden(q, k) - k[..., 0].unsqueeze(-2)).softmax(-1) @ v


def subtracted_mask_of_the_wrong_sign(q, k, v):
    return (_scores(q, k) + 1e10 - (_causal(q)).to(q.dtype) * 1e10).softmax(-1) @ v


def added_fill_that_scaling_shows_again(q, k, v):
    return ((_scores(q, k) + (~_causal(q)).to(q.dtype) * -1e9) * 1e-8).softmax(-1) @ v


def least_number_that_scaling_shows_again(q, k, v):
    least = torch.finfo(q.dtype).min
    return (_hidden(q, k).clamp(min=least) * (-1.0 / least)).softmax(-1) @ v


def clamped_from_both_sides(q, k, v):
    return _hidden(q, k).clamp(torch.finfo(q.dtype).min, 0.5).softmax(-1) @ v


def masked_in_place_too_late(q, k, v):
    scores = _scores(q, k)
    weights = scores.softmax(-1)
    scores.masked_fill_(~_causal(q), float("-inf"))
    return weights @ v


def masked_and_shown_again_in_place(q, k, v):
    scores = _scores(q, k)
    scores.masked_fill_(~_causal(q), float("-inf"))
    scores.masked_fill_(~_causal(q), 0.0)
    return scores.softmax(-1) @ v


def edited_through_a_view_after_the_mask(q, k, v):
    scores = _scores(q, k)
    first = scores[..., :1]
    scores.masked_fill_(~_causal(q), float("-inf"))
    first.add_(1.0)
    return scores.softmax(-1) @ v


def keys_tiled(q, k, v):
    k, v = (x[:, : HEADS // 2].repeat(1, 2, 1, 1) for x in (k, v))
    return _hidden(q, k).softmax(-1) @ v


def weights_edited_in_place(q, k, v):
    weights = _hidden(q, k).softmax(-1) * 1.0
    weights[..., 0] = 0.0
    return weights @ v


NOT_ATTENTION = [
    Case(function)
    for function in (
        *(softmax_over_queries, softmax_over_heads, mask_added_after_the_softmax, mask_multiplied_after_the_softmax),
        *(mask_multiplied_before_the_softmax, mask_filled_with_zero, mask_that_does_not_hide),
        *(half_precision_fill_that_does_not_hide, added_fill_that_does_not_hide, mask_of_the_wrong_sign),
        *(
            hidden_and_shown_again,
            infinity_cleared,
            clamped_scores,
        ),
        *(softmax_plus_one, sigmoid, log_softmax, softmin, squared_weights, weights_cut_off, transposed_weights),
        *(wrong_einsum, permuted_weights, rolled_scores, mixed_heads, weights_returned, scale_from_data),
        *(scale_for_each_distance, keys_twice),
        *(top_left_of_more_queries, first_key_unused, scores_detached, weights_detached),
        *(scores_without_gradients, weights_without_gradients, cast_to_integers_between, scores_edited_in_place),
        *(scores_masked_in_place, scores_added_to_in_place_through_a_view, scores_zeroed_before_the_mask),
        *(weights_edited_in_place, subtracted_mask_of_the_wrong_sign, added_fill_that_scaling_shows_again),
        *(least_number_that_scaling_shows_again, clamped_from_both_sides, masked_in_place_too_late),
        *(masked_and_shown_again_in_place, edited_through_a_view_after_the_mask),
    )
]
PERHAPS_ATTENTION = [
    Case(function, dense=False)
    for function in (
        *(
            top_left_of_more_keys,
            scale_for_each_key,
            reshaped_keys,
            keys_of_other_heads,
            scores_used_twice,
            last_key_unused,
        ),
        *(
            keys_tiled,
            keys_detached,
            keys_repeated_and_detached,
            values_repeated_without_gradients,
            queries_scaled_by_data,
            channels_attend,
        ),
        *(capped_scores, linear_bias, fused_linear_bias, sink),
        *(less_the_largest_of_each_key, less_the_largest_of_other_scores, less_a_number_of_each_key),
    )
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", NOT_ATTENTION + PERHAPS_ATTENTION, ids=lambda case: case.function.__name__)
def test_what_only_looks_like_attention_keeps_its_numbers_and_gradients(case, dynamic):
    check(case.function, *tensors(), dynamic=dynamic, dense=case.dense)


# Heads: repeated otherwise than query heads are grouped.


def _repeat(k: Tensor, v: Tensor, how: str) -> tuple[Tensor, Tensor]:
    tiled = [part.repeat(1, HEADS // 2, 1, 1) for part in (k, v)]
    interleaved = [part.repeat_interleave(HEADS // 2, 1) for part in (k, v)]
    if how == "values differently":
        return interleaved[0], tiled[1]
    return (tiled[0], tiled[1]) if how == "tiled" else (interleaved[0], interleaved[1].flip(1))


@spelled("how", ["tiled", "values differently", "values reversed"])
def test_heads_repeated_otherwise_than_in_groups_are_read_as_they_are(how, spelling, dynamic):
    def attend(q, k, v):
        k, v = _repeat(k, v, how)
        return spelling(q, k, v, _causal(q))

    q, _, _ = tensors()
    _, k, v = tensors(heads=2)
    check(attend, q, k, v, dynamic=dynamic, dense=False)


# Randomness, and where a site stands.


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_active_dropout_stays_dense_and_draws_the_same_numbers(dynamic):
    def fused_dropout(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)

    def by_hand(q, k, v):
        return F.dropout(_hidden(q, k).softmax(-1), 0.3, training=True) @ v

    for function in (fused_dropout, by_hand):
        inputs = tensors()
        torch.manual_seed(5)
        expected = function(*inputs)
        torch._dynamo.reset()
        torch.manual_seed(5)
        actual, report = run(function, *inputs, dynamic=dynamic)
        assert report.switchable == 0
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_a_mask_from_outside_a_checkpointed_body_is_not_guessed(spelling):
    def attend(q, k, v):
        keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(diagonal=2)
        return checkpoint(spelling, q, k, v, keep, use_reentrant=False)

    check(attend, *tensors(), dynamic=False, dense=True)


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_empty_and_tiny_inputs_pass_through(spelling, batch, length):
    def attend(q, k, v):
        return spelling(q, k, v, _causal(q))

    config = SparseAttentionConfig.from_dict({**COVERING.to_dict(), "dense_len": 0})
    inputs = tensors(batch, length)
    actual, _ = run(attend, *inputs, config=config, dynamic=False)
    torch.testing.assert_close(actual, attend(*inputs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_keys_written_piece_by_piece_before_they_are_read_are_keys(spelling, dynamic):
    """How multi-head latent attention puts its keys together."""

    def attend(q, k, v):
        keys = k.new_empty(k.shape)
        keys[..., :4] = k[..., 4:]
        keys[..., 4:] = k[..., :4] * 2
        return spelling(q, keys, v, _causal(q))

    check(attend, *tensors(), dynamic=dynamic, dense=False)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_what_a_copy_was_made_of_may_change_before_it_is_used(spelling):
    def attend(q, k, v):
        k, v = k.detach() * 1.0, v * 1.0
        copied = k[:, :2].repeat_interleave(HEADS // 2, 1)
        k.fill_(0.25)
        return spelling(q, copied, v[:, :2].repeat_interleave(HEADS // 2, 1), _causal(q))

    check(attend, *tensors(), dynamic=False, dense=False)


# flex_attention: masks and scores as functions. It has no backward on CPUs.


def flex_off_by_one(b, h, q, k):
    return k <= q + 1


def flex_prefix(b, h, q, k):
    return (k <= q) | (k < 20)


def flex_one_head_different(b, h, q, k):
    return (k <= q) | (h == 1)


def flex_one_row_different(b, h, q, k):
    return (k <= q) & (b == 0) | (k >= q) & (b == 1)


def flex_blocks(b, h, q, k):
    return k // 16 <= q // 16


FLEX_MASKS = [flex_off_by_one, flex_prefix, flex_one_head_different, flex_one_row_different, flex_blocks]


def check_flex(function, *inputs) -> None:
    inputs = [tensor.detach() for tensor in inputs]
    with torch.compiler.set_stance("force_eager"):
        expected = function(*inputs)
    actual, report = run(function, *inputs, dynamic=False)
    assert len(report.sites) == 1
    assert report.switchable == 0, str(report)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", FLEX_MASKS, ids=lambda f: f.__name__)
def test_flex_masks_that_are_not_causal_stay_dense(mask):
    def attend(q, k, v):
        block_mask = create_block_mask(mask, 2, HEADS, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=block_mask)

    check_flex(attend, *tensors())


def squared_distance(score, b, h, q, k):
    return score + 0.1 * (k - q) * (k - q)


def cap_of_a_query(score, b, h, q, k):
    return (5.0 + q) * torch.tanh(score / 5.0)


def shown_in_the_score(score, b, h, q, k):
    return torch.where(k <= q + 1, score, -float("inf"))


@pytest.mark.parametrize("score", [squared_distance, cap_of_a_query, shown_in_the_score], ids=lambda f: f.__name__)
def test_flex_scores_that_are_changed_stay_dense(score):
    def causal(b, h, q, k):
        return k <= q

    def attend(q, k, v):
        block_mask = None
        if score is not shown_in_the_score:
            block_mask = create_block_mask(causal, 2, HEADS, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, score_mod=score, block_mask=block_mask)

    check_flex(attend, *tensors())


def test_a_flex_mask_that_reads_data_stays_dense_though_the_example_is_causal():
    def attend(q, k, v, last):
        def mask(b, h, q_index, k_index):
            return k_index <= last[q_index]

        block_mask = create_block_mask(mask, None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=block_mask)

    check_flex(attend, *tensors(), torch.arange(LENGTH))
