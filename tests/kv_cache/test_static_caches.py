"""Attention over static caches: recognised, switched on the device, and right at every step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import warnings

import pytest
import torch
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch.nn import functional as F

import infllm_pass
from infllm_pass.errors import (
    CachePositionError,
    DeviceError,
    DtypeError,
    InfLLMError,
    ShapeError,
    UncountedCacheWarning,
)
from infllm_pass.frontend import api
from infllm_pass.lowering.ops.attention_args import SIGNATURES
from infllm_pass.plan.length_guard import Branch
from infllm_pass.reasons import Reason
from infllm_pass.rewrite.pipeline import run_on_export, run_pass
from tests.support.cache_support import CONFIG, UPDATES, CachedAttention, caches, expected, scatter, tokens
from tests.support.common import capture, count_calls, llama, oracle_attention, relative_error
from tests.support.common import tokens as ids

SDPA = F.scaled_dot_product_attention
STEPS = [5, 30, 1, 1, 7, 1, 20, 1, 1, 13]
"""Prefill and steps of one and of several tokens, 80 in all: from below `dense_len` to well above the budget."""


def sparsified(module, config=CONFIG, **settings):
    torch._dynamo.reset()
    return infllm_pass.sparsify(torch.compile(module, backend="aot_eager", **settings), config)


def run(model, module, steps, position=0, batch=1, capacity=96, valid=None, config=CONFIG):
    """Feed tokens step by step and compare every step with the oracle; the caches."""
    keys, values = caches(batch, capacity)
    position = torch.as_tensor(position)
    for count in steps:
        x = tokens(batch, count)
        with torch.no_grad():
            out = model(x, keys, values, position.clone(), *([] if valid is None else [valid]))
            assert relative_error(out, expected(module, x, keys, values, position, valid, config)) < 1e-12, position
        position = position + count
    return keys, values


@pytest.mark.parametrize("update", [name for name in UPDATES if name != "index_copy"])
def test_every_way_to_update_a_cache_is_switchable(update):
    module = CachedAttention(UPDATES[update])
    model = sparsified(module)
    run(model, module, STEPS)
    report = infllm_pass.report(model)
    assert {site.reason for site in report.sites} == {"SWITCHABLE"}
    assert {site.guard for site in report.sites} == {"on the device"}


def test_the_budget_matters_in_these_tests():
    """Dense attention would not pass them."""
    module = CachedAttention()
    keys, values = caches()
    x = tokens(1, 80)
    with torch.no_grad():
        dense = module(x, keys, values, torch.tensor(0))
        assert relative_error(dense, expected(module, x, keys, values, 0)) > 1e-2


def test_a_cache_updated_by_copying():
    module = CachedAttention(UPDATES["index_copy"])
    keys, values = caches()
    first, x = tokens(1, 70), tokens(1, 1)
    filled = CachedAttention()
    filled.load_state_dict(module.state_dict())
    with torch.no_grad():
        filled(first, keys, values, 0)
        model = sparsified(module)
        out = model(x, keys, values, torch.tensor(70))
        filled(x, keys, values, 70)
        assert relative_error(out, expected(module, x, keys, values, 70)) < 1e-12
    assert infllm_pass.report(model).switchable == 1


def test_rows_at_positions_of_their_own_are_on_sides_of_their_own():
    module = CachedAttention(scatter)
    run(sparsified(module), module, STEPS, position=[0, 16, 7], batch=3)


def test_padding_before_and_holes_inside_the_rows():
    module = CachedAttention()
    valid = torch.ones(3, 96, dtype=torch.bool)
    valid[0, :3] = valid[1, :31] = valid[2, 20:23] = False
    run(sparsified(module), module, STEPS, batch=3, valid=valid)


def test_a_position_that_is_a_number():
    module = CachedAttention()
    keys, values = caches()
    model = sparsified(module, dynamic=True)
    place = 0
    for count in STEPS:
        x = tokens(1, count)
        with torch.no_grad():
            out = model(x, keys, values, place)
            assert relative_error(out, expected(module, x, keys, values, place)) < 1e-12
        place += count


@pytest.mark.parametrize("length", [30, 70])
def test_a_prompt_at_the_start_of_a_cache_is_switched_by_its_length(length):
    """Nothing is read from a tensor: Dynamo guards on the length, as without a cache."""
    module = CachedAttention()
    model = sparsified(module)
    keys, values = caches()
    x = tokens(1, length)
    with torch.no_grad():
        out = model(x, keys, values, 0)
        assert relative_error(out, expected(module, x, keys, values, 0)) < 1e-12
    (site,) = infllm_pass.report(model).sites
    assert (site.branch, site.guard) == (("dense", "30 < 40") if length < 40 else ("sparse", "70 >= 40"))


def test_a_cache_shorter_than_dense_len_never_is_sparse():
    module = CachedAttention()
    config = dataclasses.replace(CONFIG, dense_len=100)
    model = sparsified(module, config)
    run(model, module, [60, 1, 5], config=config)
    assert {(site.branch, site.guard) for site in infllm_pass.report(model).sites} == {("dense", "capacity 96 < 100")}


def test_splits_of_a_prompt_give_what_one_call_gives():
    module = CachedAttention()
    model = sparsified(module, dynamic=True)
    x = tokens(1, 90)
    with torch.no_grad():
        whole = model(x, *caches(), torch.tensor(0))[:, :, 60:]
        for splits in ([60, 30], [60, 1, 29], [60, 17, 2, 11]):
            kv, outs, place = caches(), [], 0
            for count in splits:
                outs.append(model(x[:, place : place + count], *kv, torch.tensor(place)))
                place += count
            assert relative_error(torch.cat(outs, 2)[:, :, 60:], whole) < 1e-12, splits


def test_gradients_flow_to_queries_keys_and_values():
    """The graph differentiates through the functional update; the caches themselves need no gradient."""
    module = CachedAttention(UPDATES["index_copy"])
    keys, values = caches()
    x, noise = tokens(1, 70), torch.randn(1, 6, 70, 8, dtype=torch.float64)
    covering = dataclasses.replace(CONFIG, topk=40)
    gradients = []
    for model in (module, sparsified(module, covering)):
        module.zero_grad()
        (model(x, keys, values, torch.tensor(4)) * noise).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(relative_error(b, a) < 1e-12 for a, b in zip(*gradients, strict=True))


def test_offsets_are_made_once_for_all_sites_before_the_position_is_written():
    def twice(x, keys, values, position):
        mask = torch.arange(keys.shape[2]) <= torch.arange(x.shape[2])[:, None] + position
        places = torch.arange(x.shape[2]) + position
        position.add_(x.shape[2])
        keys.index_copy_(2, places, x)
        first = SDPA(x, keys, values, mask)
        return SDPA(first, keys, values, mask)

    x, (keys, values) = torch.randn(1, 2, 9, 8, dtype=torch.float64), caches()
    module = capture(twice, x, keys, values, torch.tensor(60))
    report = run_pass(module, CONFIG)
    assert [site.decision for site in report.sites] == ["switchable"] * 2
    assert count_calls(module, SDPA) == 0
    calls = [node for node in module.graph.nodes if node.target is torch.ops.infllm.block_attention.default]
    (offsets,) = {SIGNATURES["block_attention"].named(node)["offsets"] for node in calls}
    assert offsets < next(node for node in module.graph.nodes if node.target == "add_")


def test_exported_graphs_take_the_same_offsets():
    module = CachedAttention()
    keys, values = caches()
    arguments = (tokens(1, 30), keys, values, torch.tensor(45))
    program = torch.export.export(module, arguments)
    rewritten = program.graph_module
    report = run_on_export(rewritten, CONFIG, branch=Branch.SPARSE)
    assert [site.reason for site in report.sites] == ["SWITCHABLE"]
    rewritten.recompile()
    with torch.no_grad():
        module(arguments[0], keys, values, arguments[3])
        out = program.module()(*arguments)
        assert relative_error(out, expected(module, arguments[0], keys, values, 45)) < 1e-12


REFUSED = {
    "the rows' first keys are data": (
        lambda q, k, v, at: SDPA(q, k, v, torch.arange(k.shape[2]) <= (torch.arange(q.shape[2]) * at)[:, None]),
        Reason.UNPROVEN_MASK,
    ),
    "a limit for one query over keys that nothing updates": (
        lambda q, k, v, at: SDPA(q[:, :, :1], k, v, torch.arange(k.shape[2])[None] <= at),
        Reason.BIDIRECTIONAL,
    ),
    "a position that the graph changed": (
        lambda q, k, v, at: SDPA(q, k, v, torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + at.add_(1)),
        Reason.UNPROVEN_MASK,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_position_in_a_cache_stays_dense(what):
    function, reason = REFUSED[what]
    keys, values = caches()
    module = capture(function, torch.randn(1, 2, 9, 8, dtype=torch.float64), keys, values, torch.tensor(3))
    (site,) = run_pass(module, CONFIG).sites
    assert site.reason == reason.name


def store_of(model):
    """The states of a sparsified model's caches."""
    return api._find_handle(model).backend.store


def filled(model):
    """The counts of compressed keys of the states that are not void."""
    states = [state for states in store_of(model)._states.values() for state in states.values()]
    return [state.filled.tolist() for state in states]


@pytest.fixture
def refills(monkeypatch):
    """Counts the states that were made or emptied."""
    count = []
    plain = infllm_pass.kv_cache.store.CacheStore.state

    def state(self, cache, spec):
        found = plain(self, cache, spec)
        if not found.filled.any():
            count.append(spec.name)
        return found

    monkeypatch.setattr(infllm_pass.kv_cache.store.CacheStore, "state", state)
    return count


@pytest.mark.parametrize(
    ("update", "backend"), [("index_copy_", "eager"), ("subscript", "inductor"), ("scatter_", "eager")]
)
def test_compressed_keys_are_carried_from_step_to_step(update, backend, refills):
    torch._dynamo.reset()
    module = CachedAttention(UPDATES[update])
    model = infllm_pass.sparsify(torch.compile(module, backend=backend), CONFIG)
    held = run(model, module, [50, 1, 1, 1])
    assert filled(model) == [[53]]
    assert len(refills) == 1
    site = infllm_pass.report(model).sites[-1]
    assert (site.cache_state, site.guard) == ("carried", "on the device")
    assert "carried" in str(infllm_pass.report(model))
    assert held


def test_prompts_are_not_decoded():
    module = CachedAttention()
    model = sparsified(module, dynamic=True)
    run(model, module, [50, 16, 17])
    assert [site.cache_state for site in infllm_pass.report(model).sites] == ["recomputed", "carried"]


def change_slice(keys):
    keys[:, :, 3] = 5.0


def change_view(keys):
    keys[0].transpose(0, 1)[7].normal_()


CHANGES = {"a slice": change_slice, "a view": change_view, "all": torch.Tensor.normal_, "reset": torch.Tensor.zero_}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_that_others_write_are_compressed_anew(change):
    module = CachedAttention()
    model = sparsified(module)
    keys, values = run(model, module, [50, 1, 1])
    CHANGES[change](keys)
    x = tokens(1, 1)
    with torch.no_grad():
        out = model(x, keys, values, torch.tensor(52))
        assert relative_error(out, expected(module, x, keys, values, 52)) < 1e-12


def test_keys_that_the_graph_writes_elsewhere_are_compressed_anew(refills):
    """The second position is a tensor of its own, as every layer of a cache of transformers has one."""

    class Elsewhere(CachedAttention):
        def forward(self, x, keys, values, position, other):
            keys.index_copy_(2, other + torch.arange(2), self.heads(self.k, x[:, :1].expand(-1, 2, -1)) + 1)
            return super().forward(x, keys, values, position)

    module = Elsewhere()
    model = sparsified(module)
    keys, values = caches()
    with torch.no_grad():
        CachedAttention.forward(module, tokens(1, 50), keys, values, 0)
        for step, other in enumerate([50, 20, 48, 3, 54]):
            x, place = tokens(1, 1), torch.tensor(50 + step)
            out = model(x, keys, values, place, torch.tensor(other))
            assert relative_error(out, expected(module, x, keys, values, place)) < 1e-12
    assert len(refills) == 1  # the count was lowered in the graph, never to nothing


def test_another_first_key_makes_other_windows():
    module = CachedAttention()
    model = sparsified(module)
    keys, values = caches()
    with torch.no_grad():
        module(tokens(1, 60), keys, values, 0)
        for place, start in ((60, 0), (61, 5), (62, 5), (63, 2)):
            x, valid = tokens(1, 1), torch.arange(96)[None] >= start
            out = model(x, keys, values, torch.tensor(place), valid)
            assert relative_error(out, expected(module, x, keys, values, place, valid)) < 1e-12


def test_a_mask_that_is_there_and_gone():
    """Without a mask the first key of every row is that in slot 0, whatever it was with one."""
    module = CachedAttention()
    model = sparsified(module)
    keys, values = caches()
    with torch.no_grad():
        module(tokens(1, 60), keys, values, 0)
        for place, padded in zip(range(60, 66), (True, True, False, False, True, False), strict=True):
            x, valid = tokens(1, 1), torch.arange(96)[None] >= 5 if padded else None
            out = model(x, keys, values, torch.tensor(place), valid)
            assert relative_error(out, expected(module, x, keys, values, place, valid)) < 1e-12


def test_one_tensor_holds_the_caches_of_all_layers(refills):
    """Views of it are made for every call; what one layer writes does not void the other's keys for certain."""
    module = CachedAttention()

    def both(x, stack, position):
        first = module(x, stack[0, 0], stack[0, 1], position)
        return first, module(x + 1, stack[1, 0], stack[1, 1], position)

    model = sparsified(both)
    stack = torch.stack([torch.stack(caches()) for _ in range(2)])
    with torch.no_grad():
        for layer in range(2):
            module(tokens(1, 60), stack[layer, 0], stack[layer, 1], 0)
        for place in range(60, 64):
            x = tokens(1, 1)
            outs = model(x, stack, torch.tensor(place))
            for layer, out in enumerate(outs):
                assert relative_error(out, expected(module, x + layer, *stack[layer], place)) < 1e-12
    assert len(refills) == 2


def test_rows_and_capacity_change():
    module = CachedAttention()
    model = sparsified(module)
    for batch, capacity in ((1, 96), (3, 96), (2, 96), (1, 80), (1, 96)):
        run(model, module, [50, 1, 1, 1], batch=batch, capacity=capacity)


def test_states_live_as_long_as_their_caches():
    module = CachedAttention()
    model = sparsified(module)
    held = [run(model, module, [50, 1]) for _ in range(2)]
    assert len(store_of(model)) == 2
    held.pop()
    gc.collect()
    assert len(store_of(model)) == 1


def test_copies_share_no_states():
    module = CachedAttention()
    store = store_of(model := sparsified(module))
    held = run(model, module, [50, 1])
    assert len(store) == 1
    assert len(copy.deepcopy(store)) == 0
    assert held


def test_with_gradients_the_operator_is_one_that_has_some():
    module = CachedAttention(UPDATES["index_copy"])
    model = sparsified(module, dataclasses.replace(CONFIG, topk=40))
    keys, values = caches()
    filling = CachedAttention()
    filling.load_state_dict(module.state_dict())
    with torch.no_grad():
        filling(tokens(1, 60), keys, values, 0)
    x, gradients = tokens(1, 2), []
    for function in (module, model):
        module.zero_grad()
        function(x, keys, values, torch.tensor(60)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(relative_error(b, a) < 1e-12 for a, b in zip(*gradients, strict=True))
    assert infllm_pass.report(model).sites[-1].cache_state == "recomputed"


@contextlib.contextmanager
def unchanged(model, *held):
    """Whether what is expected to fail wrote to the caches, or to their states."""
    before = [tensor.clone() for tensor in held], filled(model)
    yield
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(held, before[0], strict=True))
    assert filled(model) == before[1]


@pytest.mark.parametrize("update", UPDATES)
def test_tokens_that_do_not_fit_are_an_error_before_anything_is_written(update):
    module = CachedAttention(UPDATES[update])
    model = sparsified(module)
    keys, values = caches()
    with torch.no_grad():
        model(tokens(1, 50), keys, values, torch.tensor([0]))
        model(tokens(1, 1), keys, values, torch.tensor([50]))
        for place, count in ((-1, 1), (-1, 20), (96, 1), (96, 20), (90, 20)):
            with unchanged(model, keys, values), pytest.raises(CachePositionError, match="cache keys: row 0"):
                model(tokens(1, count), keys, values, torch.tensor([place]))


@pytest.mark.parametrize("dynamic", [None, False])
def test_inductor_too_writes_nothing_first(dynamic):
    """It orders operators by the data between them, and would check last."""
    torch._dynamo.reset()
    module = CachedAttention()
    model = infllm_pass.sparsify(torch.compile(module, dynamic=dynamic), CONFIG)
    keys, values = run(model, module, [50, 1])
    for place in (torch.tensor(-1), torch.tensor(96), 96):
        with torch.no_grad(), unchanged(model, keys, values), pytest.raises(CachePositionError, match="cache keys: "):
            model(tokens(1, 1), keys, values, place)
    run(model, module, [1], position=51)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_prompt_longer_than_the_cache_is_refused(dynamic):
    model = sparsified(CachedAttention(), dynamic=dynamic)
    keys, values = caches()
    with torch.no_grad(), unchanged(model, keys, values), pytest.raises(CachePositionError, match="97 tokens"):
        model(tokens(1, 97), keys, values, 0)


def test_rows_that_do_not_fit_are_named():
    model = sparsified(CachedAttention(scatter))
    keys, values = caches(3)
    with torch.no_grad(), unchanged(model, keys, values), pytest.raises(CachePositionError, match="row 2") as caught:
        model(tokens(3, 1), keys, values, torch.tensor([3, 95, 96]))
    assert (caught.value.cache, caught.value.row) == ("keys", 2)


def test_a_position_that_goes_back_cuts_the_text():
    """To any slot, and forward again over what was there: nothing tells it from a text that was cropped."""
    module = CachedAttention(scatter)
    model = sparsified(module)
    keys, values = caches(2)
    with torch.no_grad():
        module(tokens(2, 60), keys, values, 0)
        for position in ([60, 60], [61, 61], [41, 62], [42, 0], [43, 1], [7, 50]):
            x, place = tokens(2, 1), torch.tensor(position)
            out = model(x, keys, values, place)
            assert relative_error(out, expected(module, x, keys, values, place)) < 1e-12, position


def other_rows(keys, values):
    return keys.expand(3, -1, -1, -1).clone(), values.expand(3, -1, -1, -1).clone()


UNFIT = {
    "dtype": (lambda k, v: (k.float(), v.float()), DtypeError, r"^keys is torch.float32 and .* torch.float64"),
    "dtype of values": (lambda k, v: (k, v.float()), DtypeError, "^values is torch.float32"),
    "device": (lambda k, v: (k.to("meta"), v.to("meta")), DeviceError, "^keys is on meta and .* cpu"),
    "device of values": (lambda k, v: (k, v.to("meta")), DeviceError, "^values is on meta"),
    "rows": (other_rows, ShapeError, r"^keys has 3 row\(s\) and x 1"),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("what", UNFIT)
def test_a_cache_that_does_not_fit_is_named(what, dynamic):
    module = CachedAttention()
    model = sparsified(module, dynamic=dynamic)
    keys, values = run(model, module, [50, 1])
    make, error, message = UNFIT[what]
    changed = make(keys, values)
    with torch.no_grad(), unchanged(model, keys, values), pytest.raises(error, match=message):
        model(tokens(1, 1), *changed, torch.tensor(51))
    run(model, module, [1], position=51)


def test_what_the_original_broadcasts_is_broadcast():
    """One token for three rows of a cache is no error of a model that takes it."""
    module = CachedAttention(UPDATES["subscript"])
    model = sparsified(module, dataclasses.replace(CONFIG, topk=40))
    keys, values = caches(3)
    x, copies = tokens(1, 1), (keys.clone(), values.clone())
    with torch.no_grad():
        out = model(x, keys, values, torch.tensor(50))
        assert relative_error(out, module(x, *copies, torch.tensor(50))) < 1e-12
    assert torch.equal(keys, copies[0])


def test_a_failure_that_no_cache_explains_stays_as_it_is():
    class Failing(CachedAttention):
        def forward(self, x, keys, values, position):
            return super().forward(x, keys, values, position) @ torch.ones(3, 3, dtype=torch.float64)

    keys, values = caches()
    with torch.no_grad(), pytest.raises(RuntimeError) as caught:
        sparsified(Failing())(tokens(1, 1), keys, values, torch.tensor(3))
    assert not isinstance(caught.value, InfLLMError)


def test_a_cache_made_in_inference_mode_is_compressed_anew_at_every_step():
    module = CachedAttention()
    model = sparsified(module)
    with torch.inference_mode():
        keys, values = caches()
        module(tokens(1, 50), keys, values, 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for place in range(50, 54):
                keys[:, :, 9] += 1
                x = tokens(1, 1)
                out = model(x, keys, values, torch.tensor(place))
                assert relative_error(out, expected(module, x, keys, values, place)) < 1e-12
    assert sum(issubclass(warning.category, UncountedCacheWarning) for warning in caught) == 1


@torch.no_grad()
def test_in_a_cuda_graph_of_somebody_else_every_replay_starts_over(monkeypatch):
    """What is captured is not run: the emptying of a state has to be part of it, whatever the version counter says."""
    module = CachedAttention()
    model = sparsified(module)
    keys, values = run(model, module, [50, 1, 1])
    state = next(iter(store_of(model)._states[keys].values()))

    def writes(place):
        """How often a step writes to the count of compressed keys."""
        before = state.filled._version
        model(tokens(1, 1), keys, values, torch.tensor(place))
        return state.filled._version - before

    carried = writes(52)
    with monkeypatch.context() as during:
        during.setattr(infllm_pass.kv_cache.store, "is_being_captured", lambda tensor: True)
        with pytest.warns(UncountedCacheWarning, match="reduce-overhead"):
            assert writes(53) == carried + 1
        assert writes(54) == carried + 1
    assert writes(55) == carried + 1  # what replays wrote since is not counted
    assert writes(56) == carried


class BufferedCache(CachedAttention):
    """As gpt-fast: caches and causal mask are buffers, a row of the mask is picked by a position that is an input."""

    def __init__(self):
        super().__init__()
        for name, cache in zip(("keys", "values"), caches(), strict=True):
            self.register_buffer(name, cache)
        self.register_buffer("causal", torch.ones(96, 96, dtype=torch.bool).tril())

    def forward(self, x, places):
        q, k, v = (self.heads(project, x) for project in (self.q, self.k, self.v))
        self.keys[:, :, places], self.values[:, :, places] = k, v
        k, v = (cache.repeat_interleave(3, dim=1) for cache in (self.keys, self.values))
        return SDPA(q, k, v, attn_mask=self.causal[None, None, places])


def test_caches_and_mask_in_buffers():
    module = BufferedCache()
    model = sparsified(module)
    with torch.no_grad():
        model(tokens(1, 60), torch.arange(60))
        for place in range(60, 65):
            x = tokens(1, 1)
            out = model(x, torch.tensor([place]))
            assert relative_error(out, expected(module, x, module.keys, module.values, place)) < 1e-12
    prompt, step = infllm_pass.report(model).sites
    assert (prompt.reason, step.reason, step.cache_state) == ("UNPROVEN_MASK", "SWITCHABLE", "carried")


def test_slots_past_the_end_of_a_buffer_are_refused_also_where_attention_stays_dense():
    """The step is switchable, the prompt is not; negative slots count from the end, as ever."""
    module = BufferedCache()
    model = infllm_pass.sparsify(torch.compile(module, backend="aot_eager"), CONFIG)
    with torch.no_grad():
        model(tokens(1, 60), torch.arange(60))
        model(tokens(1, 1), torch.tensor([60]))
        for first, count in ((96, 1), (-97, 1), (90, 10), (96, 3)):
            with (
                unchanged(model, module.keys, module.values),
                pytest.raises(CachePositionError, match=r"cache self\.keys: "),
            ):
                model(tokens(1, count), torch.arange(count) + first)
        x = tokens(1, 1)
        out = model(x, torch.tensor([-1]))
        assert relative_error(out, expected(module, x, module.keys, module.values, 95)) < 1e-12
    prompt, step = infllm_pass.report(model).sites[:2]
    assert (prompt.reason, step.reason) == ("UNPROVEN_MASK", "SWITCHABLE")


class TestTransformers:
    """A tiny Llama with the caches of transformers.

    Up to `dense_len` everything is visited, so that what earlier layers made of early tokens is the same on both sides.
    """

    config = dataclasses.replace(CONFIG, dense_len=32)

    def static(self, model, capacity=96):
        from transformers import StaticCache

        return StaticCache(config=model.config, max_cache_len=capacity)

    def test_logits_of_every_step_are_those_of_the_whole_prefix(self):
        model = llama()
        sparse, cache, x = sparsified(model, self.config), self.static(model), ids(80)
        place = 0
        with torch.no_grad():
            for count in STEPS:
                out = sparse(x[:, place : place + count], past_key_values=cache).logits[:, -1]
                place += count
                with oracle_attention(self.config):
                    whole = model(x[:, :place], use_cache=False).logits[:, -1]
                assert relative_error(out, whole) < 1e-5, place

    def test_what_a_step_writes_has_a_fixed_address(self):
        """Otherwise Inductor refuses to record a CUDA graph; another cache is no reason to compile again."""
        seen, plain = [], compile_fx.compile_fx_inner

        def inner(module, example_inputs, **settings):
            compiled = plain(module, example_inputs, **settings)
            fixed, written = set(settings["static_input_idxs"]), set(compiled.mutated_input_idxs)
            seen.append((len(written), written - fixed))
            return compiled

        model, x = llama(num_hidden_layers=1), ids(60)
        backend = functools.partial(compile_fx.compile_fx, inner_compile=inner)
        sparse = infllm_pass.sparsify(torch.compile(model, backend=backend), self.config)
        with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
            for _ in range(2):
                cache = self.static(model)
                cache.early_initialization(1, 2, 8, torch.float64, "cpu")
                for part in (slice(0, 50), slice(50, 51), slice(51, 52)):
                    sparse(x[:, part].clone(), past_key_values=cache)
        prompt, step = seen
        assert prompt == (3, set())  # keys, values and position
        assert step == (6, set())  # and k1, k2, and filled

    def test_the_dense_side_decodes_densely(self):
        model, x = llama(num_hidden_layers=1), ids(60)
        sparse = sparsified(model, self.config)
        with torch.no_grad(), oracle_attention(dataclasses.replace(self.config, topk=40)):
            expected = model(x, use_cache=False).logits[:, 50:]
        outs = {}
        for name, call in (("dense", infllm_pass.dense(sparse)), ("mode", sparse), ("sparse", sparse)):
            cache, side = self.static(model), contextlib.nullcontext()
            if name == "mode":
                side = infllm_pass.dense_mode(sparse)
            with torch.no_grad(), side:
                call(x[:, :50], past_key_values=cache)
                steps = [call(x[:, place : place + 1], past_key_values=cache).logits for place in range(50, 60)]
            outs[name] = relative_error(torch.cat(steps, 1), expected)
        assert outs["dense"] < 1e-5
        assert outs["mode"] < 1e-5
        assert outs["sparse"] > 1e-2

    def test_sliding_layers_stay_dense_with_a_reason(self):
        """What they hold is moved or put together at every step: where a query stands in it is not in the graph."""
        from transformers import MistralConfig, MistralForCausalLM, StaticCache

        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
        config = MistralConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, sliding_window=24)
        model = MistralForCausalLM(config).double().eval()
        sparse, cache, x = sparsified(model, self.config), StaticCache(config=config, max_cache_len=96), ids(60)
        with torch.no_grad():
            for part in (slice(0, 30), slice(30, 31), slice(31, 32)):
                out = sparse(x[:, part], past_key_values=cache).logits[:, -1]
                assert relative_error(out, model(x[:, : part.stop], use_cache=False).logits[:, -1]) < 1e-5
        sites = [site for site in infllm_pass.report(sparse).sites if "SWITCHABLE" not in site.reason]
        assert sites
        assert all(site.branch == "dense" and site.explanation for site in sites)

    def test_a_step_is_one_operator_a_layer_and_compiles_once(self):
        model, graphs = llama(), []

        def backend(module, _inputs):
            graphs.append(module)
            return module.forward

        sparse, cache = (
            infllm_pass.sparsify(torch.compile(model, backend=backend), self.config),
            self.static(model, 340),
        )
        x = ids(330)
        with torch.no_grad():
            for place in range(30):
                sparse(x[:, place : place + 1], past_key_values=cache)
            compiled = len(graphs)
            for place in range(30, 330):
                out = sparse(x[:, place : place + 1], past_key_values=cache).logits[:, -1]
            with oracle_attention(self.config):
                whole = model(x, use_cache=False).logits[:, -1]
        assert len(graphs) == compiled
        assert relative_error(out, whole) < 1e-5
        assert count_calls(graphs[-1], SDPA) == count_calls(graphs[-1], torch._C._nn.scaled_dot_product_attention) == 0
        assert count_calls(graphs[-1], torch.ops.infllm.decode_attention.default) == 2

    def test_left_padded_rows(self):
        model = llama()
        sparse, cache, x = sparsified(model, self.config), self.static(model), ids(80, 2)
        mask = torch.ones(2, 80, dtype=torch.long)
        mask[1, :13] = 0
        place = 0
        with torch.no_grad():
            for count in (50, 1, 1, 20, 1):
                seen = mask[:, : place + count]
                positions = (seen.cumsum(1) - 1).clamp(min=0)[:, place:]
                part = x[:, place : place + count]
                arguments = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache}
                out = sparse(part, **arguments).logits[:, -1]
                place += count
                for row, start in enumerate((0, 13)):
                    with oracle_attention(self.config):
                        whole = model(x[row : row + 1, start:place], use_cache=False).logits[:, -1]
                    assert relative_error(out[row], whole[0]) < 1e-5, (place, row)
        assert {site.cache_state for site in infllm_pass.report(sparse).sites} == {"carried", "recomputed"}

    def test_tokens_are_those_of_the_dense_model_with_a_covering_budget(self):
        model = llama()
        sparse = sparsified(model, dataclasses.replace(self.config, topk=40))
        chosen = []
        for each in (model, sparse):
            cache, x = self.static(model, 200), ids(1)[:, :1] * 0 + 7
            with torch.no_grad():
                for _ in range(150):
                    step = each(x[:, -1:], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                    x = torch.cat([x, step], 1)
            chosen.append(x)
        assert torch.equal(*chosen)
