"""Compressed keys of caches that grow by concatenation: carried to the tensor that continues a cache, never stale."""

from __future__ import annotations

import dataclasses
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.errors import UncountedCacheWarning
from infllm_pass.frontend import api
from infllm_pass.kernels.cpu import decode
from infllm_pass.plan.length_guard import Branch
from infllm_pass.rewrite.pipeline import run_on_export
from tests.support.cache_support import CONFIG, DIM, HEADS, KV_HEADS, GrowingAttention, expected, tokens
from tests.support.common import llama, oracle_attention, relative_error
from tests.support.common import tokens as ids

FINE = CONFIG.geometry.kernel_size


def sparsified(module, config=CONFIG, backend="eager", **settings):
    torch._dynamo.reset()
    return infllm_pass.sparsify(torch.compile(module, backend=backend, **settings), config)


def prompt(count=50, batch=1):
    """Keys and values of `count` tokens, from nowhere."""
    return tuple(torch.randn(batch, KV_HEADS, count, DIM, dtype=torch.float64) for _ in range(2))


@torch.no_grad()
def step(model, module, cache, count=1, valid=None, config=CONFIG):
    """Append tokens, compare with the oracle over all keys, and return the grown cache."""
    x = tokens(cache[0].shape[0], count)
    out, *grown = model(x, *cache, *([] if valid is None else [valid]))
    assert relative_error(out, expected(module, x, *grown, grown[0].shape[2] - count, valid, config)) < 1e-12
    return tuple(grown)


def run(model, module, cache, counts, **settings):
    for count in counts:
        cache = step(model, module, cache, count, **settings)
    return cache


def store_of(model):
    return api._find_handle(model).backend.store


def states_of(model):
    return [state for states in store_of(model)._growing.values() for state in states.values()]


def last_state(model):
    """What the report says of the graph compiled last."""
    site = infllm_pass.report(model).sites[-1]
    return site.cache_state, site.cache_detail


@pytest.fixture
def compressed(monkeypatch):
    """How many fine windows of a row were compressed, call by call."""
    counts, plain = [], decode.pool_keys

    def pool_keys(k, size, stride):
        means = plain(k, size, stride)
        if size == FINE:
            counts.append(means.shape[1])
        return means

    monkeypatch.setattr(decode, "pool_keys", pool_keys)
    return counts


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_every_step_equals_the_oracle_and_compresses_what_is_new(backend, compressed):
    """From a graph for one length to one for all lengths, with steps of one and of several tokens."""
    module = GrowingAttention()
    model = sparsified(module, backend=backend)
    cache = run(model, module, prompt(), [1] * 30 + [5, 1, 16, 2] + [1] * 20)
    assert cache[0].shape[2] == 124
    assert compressed[0] == CONFIG.geometry.num_compressed(51)
    assert sum(compressed) == CONFIG.geometry.num_compressed(124)
    (state,) = states_of(model)
    assert state.filled.tolist() == [124]
    assert last_state(model) == ("carried", "")
    assert len(infllm_pass.report(model).graphs) <= 4


def test_the_budget_matters_in_these_tests():
    """Dense attention would not pass them."""
    module, cache, x = GrowingAttention(), prompt(), tokens(1, 1)
    with torch.no_grad():
        out, *grown = module(x, *cache)
        assert relative_error(out, expected(module, x, *grown, 50)) > 1e-2


def test_graphs_do_not_multiply_as_the_text_grows():
    module = GrowingAttention()
    model = sparsified(module)
    cache = run(model, module, prompt(70), [1] * 3)
    graphs = len(infllm_pass.report(model).graphs)
    assert graphs <= 2
    memory = {state.tensors[0].shape[0] for state in states_of(model)}
    for _ in range(70):
        cache = step(model, module, cache)
        memory |= {state.tensors[0].shape[0] for state in states_of(model)}
    assert len(infllm_pass.report(model).graphs) == graphs
    assert memory == {32, 64}  # it was doubled once


@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_padding_before_the_rows(lse, compressed):
    config = dataclasses.replace(CONFIG, lse=lse)
    module = GrowingAttention()
    model = sparsified(module, config)
    cache, starts = prompt(60, batch=2), torch.tensor([0, 13])
    for count in [1] * 20 + [3, 7] + [1] * 18:
        valid = torch.arange(cache[0].shape[2] + count) >= starts[:, None]
        cache = step(model, module, cache, count, valid, config)
    geometry = config.geometry
    assert sum(compressed) == geometry.num_compressed(108) + geometry.num_compressed(108 - 13)


def test_another_first_key_makes_other_windows():
    module = GrowingAttention()
    model = sparsified(module)
    cache = prompt(60, batch=2)
    for first in (0, 0, 5, 5, 2, 30):
        valid = torch.arange(cache[0].shape[2] + 1) >= torch.tensor([[first], [4]])
        cache = step(model, module, cache, valid=valid)
    assert last_state(model)[0] == "carried"


def test_a_mask_that_is_there_and_gone():
    """Without a mask the first key of every row is that in slot 0, whatever it was with one."""
    module = GrowingAttention()
    model = sparsified(module)
    cache = prompt(60)
    for padded in (True, True, False, False, True, False):
        valid = torch.arange(cache[0].shape[2] + 1)[None] >= 5 if padded else None
        cache = step(model, module, cache, valid=valid)


def test_a_second_continuation_of_a_cache_starts_over(compressed):
    module = GrowingAttention()
    model = sparsified(module)
    old = run(model, module, prompt(60), [1] * 4)
    first = step(model, module, old)
    second = step(model, module, old, 2)
    del compressed[:]
    first, second = run(model, module, first, [1] * 4), run(model, module, second, [1] * 4)
    assert sum(compressed) <= 4
    assert len(states_of(model)) == 2
    assert not torch.equal(first[0][:, :, 64], second[0][:, :, 64])


def crop(cache):
    return tuple(part[:, :, :-9] for part in cache)


def crop_in_copies(cache):
    return tuple(part[:, :, :-9].clone() for part in cache)


def reorder(cache):
    return tuple(part.index_select(0, torch.tensor([1, 0])) for part in cache)


def forget(cache):
    return tuple(part[:, :, 8:] for part in cache)


def write(cache):
    cache[0][:, :, 3] = 5.0
    return cache


def write_to_a_view(cache):
    cache[0][0].transpose(0, 1)[7].normal_()
    return cache


def other_heads(cache):
    return tuple(part.flip(1) for part in cache)


def one_row_twice(cache):
    return tuple(part[1:].expand(2, -1, -1, -1) for part in cache)


CHANGES = {
    crop: True,
    crop_in_copies: False,
    reorder: False,
    forget: False,
    write: False,
    write_to_a_view: False,
    other_heads: False,
    one_row_twice: False,
}
"""What is done to a cache between calls, and whether its compressed keys stay true."""


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_cache_that_was_changed(change, compressed):
    module = GrowingAttention()
    model = sparsified(module)
    cache = change(run(model, module, prompt(70, batch=2), [1] * 5))
    del compressed[:]
    cache = step(model, module, cache)
    all_of_them = 2 * CONFIG.geometry.num_compressed(cache[0].shape[2])
    assert sum(compressed) == (0 if CHANGES[change] else all_of_them)
    run(model, module, cache, [1, 4, 1])
    assert sum(compressed) <= sum(compressed[:2]) + 4


def test_states_live_as_long_as_their_caches():
    module = GrowingAttention()
    model = sparsified(module)
    held = [run(model, module, prompt(60), [1, 1]) for _ in range(2)]
    assert len(store_of(model)) == 2
    held.pop()
    gc.collect()
    assert len(store_of(model)) == 1
    held.pop()
    gc.collect()
    assert len(store_of(model)) == 0


def test_a_prompt_leaves_no_state_and_the_step_after_it_compresses_all(compressed):
    module = GrowingAttention()
    model = sparsified(module, dynamic=True)
    cache = run(model, module, prompt(60), [1, 17])
    assert last_state(model) == ("recomputed", "a call has more than 16 queries")
    assert len(states_of(model)) == 0
    del compressed[:]
    run(model, module, cache, [16, 1, 1])
    assert sum(compressed) == CONFIG.geometry.num_compressed(96)


def test_below_dense_len_nothing_is_kept():
    module = GrowingAttention()
    model = sparsified(module)
    cache = run(model, module, prompt(20), [1] * 19)
    assert len(store_of(model)) == 0
    cache = run(model, module, cache, [1] * 10)
    assert cache[0].shape[2] == 49
    assert [state.filled.tolist() for state in states_of(model)] == [[49]]


def test_a_call_that_fails_loses_the_state(monkeypatch, compressed):
    module = GrowingAttention()
    model = sparsified(module)
    cache = run(model, module, prompt(60), [1, 1])
    with monkeypatch.context() as during:
        during.setattr(decode.native, "decode_attention", lambda *_: 1 / 0)
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            model(tokens(1, 1), *cache)
    del compressed[:]
    run(model, module, cache, [1])
    assert sum(compressed) == CONFIG.geometry.num_compressed(63)


def test_caches_made_in_inference_mode_are_compressed_anew_at_every_step():
    module = GrowingAttention()
    model = sparsified(module)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = prompt(60)
        for _ in range(4):
            x = tokens(1, 1)
            out, *cache = model(x, *cache)
            assert relative_error(out, expected(module, x, *cache, cache[0].shape[2] - 1)) < 1e-12
            cache[0][:, :, 9] += 1
    assert sum(issubclass(warning.category, UncountedCacheWarning) for warning in caught) == 1
    assert len(store_of(model)) == 0


def test_in_a_cuda_graph_of_somebody_else_nothing_is_kept(monkeypatch):
    module = GrowingAttention()
    model = sparsified(module)
    cache = run(model, module, prompt(60), [1, 1])
    monkeypatch.setattr(infllm_pass.kv_cache.store, "is_being_captured", lambda tensor: True)
    with pytest.warns(UncountedCacheWarning, match="reduce-overhead"):
        cache = step(model, module, cache)
    run(model, module, cache, [1, 1])
    assert len(store_of(model)) == 0


class TokensFirst(GrowingAttention):
    """The cache is kept as ``[B, L, H, D]``."""

    def forward(self, x, keys, values):
        out, *grown = super().forward(x, *(part.transpose(1, 2) for part in (keys, values)))
        return out, *(part.transpose(1, 2) for part in grown)


class Copied(GrowingAttention):
    """What the graph returns is a copy."""

    def forward(self, x, keys, values):
        out, keys, values = super().forward(x, keys, values)
        return out, keys.clone(), values.clone()


class OtherLayout(GrowingAttention):
    """What the graph returns is not what it takes: heads and tokens change places at every call."""

    def forward(self, x, keys, values):
        out, *grown = super().forward(x, keys, values)
        return out, *(part.transpose(1, 2) for part in grown)


class Internal(GrowingAttention):
    """The grown keys stay inside."""

    def forward(self, x, keys, values):
        out, _, values = super().forward(x, keys, values)
        return out, values + 0, values


class PartOfThem(GrowingAttention):
    """The last of the earlier keys is left out."""

    def forward(self, x, keys, values):
        return super().forward(x, keys[:, :, :-1], values[:, :, :-1])


class LearnedBefore(GrowingAttention):
    """A learned key stands before the others."""

    def __init__(self):
        super().__init__()
        self.learned = torch.nn.Parameter(torch.randn(1, KV_HEADS, 1, DIM, dtype=torch.float64))

    def forward(self, x, keys, values):
        q, k, v = (self.heads(project, x) for project in (self.q, self.k, self.v))
        keys, values = torch.cat([self.learned, keys, k], 2), torch.cat([self.learned, values, v], 2)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (keys, values))
        return F.scaled_dot_product_attention(q, k, v), keys, values


class WrittenTo(GrowingAttention):
    """The graph writes to what it returns."""

    def forward(self, x, keys, values):
        out, keys, values = super().forward(x, keys, values)
        returned = keys.clone()
        returned[:, :, 2] = 0
        return out, returned, values


class WrittenToBetween(GrowingAttention):
    """The graph returns a copy of a copy that it wrote to in between."""

    def forward(self, x, keys, values):
        out, keys, values = super().forward(x, keys, values)
        between = keys.clone()
        between[:, :, 2] = 0
        return out, between.clone(), values


class WrittenToAfter(GrowingAttention):
    """The graph writes to the keys that it attended to."""

    def forward(self, x, keys, values):
        out, keys, values = super().forward(x, keys, values)
        keys[:, :, 2] = 0
        return out, keys, values


class WrittenToBefore(GrowingAttention):
    """The graph writes to the keys that it was given, before it continues them."""

    def forward(self, x, keys, values):
        keys[:, :, 2] = 0
        return super().forward(x, keys, values)


def oracle_of(module, x, keys, values):
    """The oracle over what the module attends to, whatever it returns."""
    with oracle_attention(CONFIG):
        F.scaled_dot_product_attention.heads = KV_HEADS
        return GrowingAttention.forward(module, x, keys, values)[0]


@pytest.mark.parametrize("kind", [TokensFirst, Copied], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_other_ways_to_keep_a_cache(kind, compressed):
    module = kind()
    model = sparsified(module)
    first = (1, 2) if kind is TokensFirst else (1, 1)
    cache = [part.transpose(*first).contiguous() for part in prompt(60)]
    for _ in range(12):
        x, before = tokens(1, 1), [part.transpose(*first) for part in cache]
        out, *cache = model(x, *cache)
        assert relative_error(out, oracle_of(module, x, *before)) < 1e-12
    assert last_state(model) == ("carried", "")
    assert sum(compressed) == CONFIG.geometry.num_compressed(72)


UNKNOWN = {
    OtherLayout: "the graph does not return its keys as it takes them",
    Internal: "the graph does not return its keys as it takes them",
    PartOfThem: "it reads a part of the earlier keys",
    LearnedBefore: "its keys are put together of more than earlier and new ones",
    WrittenTo: "the graph does not return its keys as it takes them",
    WrittenToBetween: "the graph does not return its keys as it takes them",
    WrittenToAfter: "the graph writes to its keys",
    WrittenToBefore: "the graph writes to its keys",
}


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_what_is_not_known_to_continue_a_cache_is_compressed_anew(kind):
    module = kind()
    model = sparsified(module)
    x, cache = tokens(1, 1), prompt(60)
    out = model(x, *cache)[0]
    assert last_state(model) == ("recomputed", UNKNOWN[kind])
    assert UNKNOWN[kind].split()[-1] in str(infllm_pass.report(model))
    if kind is PartOfThem:
        cache = [part[:, :, :-1] for part in cache]
    if kind is not LearnedBefore:
        assert relative_error(out, oracle_of(module, x, *cache)) < 1e-12


def test_with_gradients_keys_are_compressed_anew():
    module = GrowingAttention()
    model = sparsified(module)
    model(tokens(1, 1), *prompt(60))[0].sum().backward()
    assert last_state(model) == ("recomputed", "gradients are asked for")


@torch.no_grad()
def test_an_exported_step_keeps_nothing():
    program = torch.export.export(GrowingAttention(), (tokens(1, 1), *prompt(60)))
    (site,) = run_on_export(program.graph_module, CONFIG, branch=Branch.SPARSE).sites
    assert (site.cache_state, site.cache_detail) == (
        "recomputed",
        "nothing outlives a call of an exported or nested graph",
    )


GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 30}


class TestTransformers:
    """A tiny Llama with the dynamic cache of transformers; one layer: keys do not depend on what attention visited."""

    config = dataclasses.replace(CONFIG, dense_len=32)

    @pytest.fixture
    def plain(self):
        return llama(num_hidden_layers=1)

    def oracle(self, plain, x, **settings):
        with oracle_attention(self.config):
            return plain.generate(x, **GREEDY, **settings)

    def test_generation_compresses_every_window_once(self, plain, compressed):
        model, x = sparsified(plain, self.config), ids(50).clamp(min=1)
        assert torch.equal(model.generate(x, **GREEDY), self.oracle(plain, x))
        assert sum(compressed) == self.config.geometry.num_compressed(79)

    def test_drafts_that_are_taken_back(self, plain, compressed):
        """Prompt lookup crops the cache; tokens are those of one step after the other."""
        model, x = sparsified(plain, self.config), ids(10).clamp(min=1).repeat(1, 5)
        got = model.generate(x, **GREEDY, prompt_lookup_num_tokens=4)
        assert torch.equal(got, self.oracle(plain, x))
        assert sum(compressed) < 3 * self.config.geometry.num_compressed(79)

    def test_an_assistant_s_drafts(self, plain):
        draft = llama(num_hidden_layers=1, intermediate_size=32)
        model, x = sparsified(plain, self.config), ids(50).clamp(min=1)
        got = model.generate(x, **GREEDY, assistant_model=draft)
        assert torch.equal(got, self.oracle(plain, x))

    def test_beams(self, plain):
        model, x = sparsified(plain, self.config), ids(50).clamp(min=1)
        assert torch.equal(model.generate(x, **GREEDY, num_beams=3), self.oracle(plain, x, num_beams=3))

    def test_states_go_with_the_cache(self, plain):
        model = sparsified(plain, self.config)
        model.generate(ids(50).clamp(min=1), **GREEDY)
        gc.collect()
        assert len(store_of(model)) == 0

    def test_the_dense_side_keeps_nothing(self, plain, compressed):
        model, x = sparsified(plain, self.config), ids(50).clamp(min=1)
        with infllm_pass.dense_mode(model):
            assert torch.equal(model.generate(x, **GREEDY), plain.generate(x, **GREEDY))
        assert compressed == []
