"""Models, logs and stores that threads share, and what must not grow without bound."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass.kv_cache import store as cache_store
from infllm_pass.kv_cache.spec import StateTensor
from infllm_pass.kv_cache.store import CachedGraph, CacheState, CacheStore
from infllm_pass.rewrite.log import CompileLog
from infllm_pass.rewrite.report import GraphReport
from tests.support.cache_support import CONFIG, CachedAttention, caches, expected
from tests.support.cache_support import tokens as steps_of
from tests.support.common import SMALL, relative_error


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def qkv():
    return tuple(torch.randn(1, 2, 100, 8, dtype=torch.float64) for _ in range(3))


def together(*parts):
    """Run functions in a thread each; what they raised."""
    raised = []

    def run(part):
        try:
            part()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return raised


def test_dense_mode_lasts_until_the_last_block_has_ended():
    """However the blocks of threads overlap."""
    model = infllm_pass.sparsify(torch.compile(attend, backend="eager"), SMALL)
    inputs = qkv()
    sparse, dense = model(*inputs), attend(*inputs)
    step, outputs = threading.Barrier(2, timeout=60), {}

    def first():
        with infllm_pass.dense_mode(model):
            step.wait()  # both are inside
        step.wait()

    def second():
        with infllm_pass.dense_mode(model):
            step.wait()
            step.wait()  # the first has left
            outputs["inside"] = model(*inputs)
        outputs["outside"] = model(*inputs)

    assert together(first, second) == []
    assert relative_error(outputs["inside"], dense) < 1e-10
    assert torch.equal(outputs["outside"], sparse)
    assert torch.equal(model(*inputs), sparse)


def test_nested_dense_mode_of_one_thread():
    model = infllm_pass.sparsify(torch.compile(attend, backend="eager"), SMALL)
    inputs = qkv()
    sparse = model(*inputs)
    with infllm_pass.dense_mode(model):
        with infllm_pass.dense_mode(model):
            pass
        assert relative_error(model(*inputs), attend(*inputs)) < 1e-10
    assert torch.equal(model(*inputs), sparse)


def test_a_thread_counts_its_own_calls():
    """``generate`` asks whether it called the model, whatever other threads do meanwhile."""
    model = infllm_pass.sparsify(torch.compile(attend, backend="eager"), SMALL)
    inputs, counts = qkv(), []

    def call():
        for _ in range(20):
            model(*inputs)
        counts.append(model._infllm_handle.calls)

    model(*inputs)
    assert together(call, call) == []
    assert counts == [20, 20]
    assert model._infllm_handle.calls == 1


def test_threads_number_the_graphs_of_a_log_apart():
    log, module = CompileLog(), torch.fx.symbolic_trace(nn.Linear(2, 2))
    start = threading.Barrier(4, timeout=60)

    def add():
        start.wait()
        for _ in range(100):
            log.add(GraphReport(log.new_number(), ()), module)

    assert together(*[add] * 4) == []
    assert sorted(graph.graph for graph in log.report().graphs) == list(range(400))
    assert log.added == 400


def test_a_log_remembers_the_latest_graphs():
    log, module = CompileLog(most=3), torch.fx.symbolic_trace(nn.Linear(2, 2))
    for _ in range(10):
        log.add(GraphReport(log.new_number(), ()), module)
    assert [graph.graph for graph in log.report().graphs] == [7, 8, 9]
    assert log.added == 10


@pytest.mark.parametrize("forgets_dead", [False, True])
def test_the_log_of_many_models_drops_dead_ones(forgets_dead):
    log, alive = CompileLog(forgets_dead=forgets_dead), torch.fx.symbolic_trace(nn.Linear(2, 2))
    log.add(GraphReport(log.new_number(), ()), alive)
    log.add(GraphReport(log.new_number(), ()), torch.fx.symbolic_trace(nn.ReLU()))  # reads no parameters
    for _ in range(5):
        log.add(GraphReport(log.new_number(), ()), torch.fx.symbolic_trace(nn.Linear(2, 2)))
    gc.collect()
    assert len(log.report().graphs) == (2 if forgets_dead else 7)
    assert [graph.graph for graph in log.report_for(alive.parameters()).graphs] == [0]


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        return attend(self.q(x), x, x)


def test_the_named_backend_forgets_dead_models():
    def compiled():
        model = torch.compile(Projected(), backend="infllm", options={**SMALL.to_dict(), "backend": "eager"})
        model(torch.randn(1, 2, 80, 8))
        return len(infllm_pass.report(model).graphs)

    gc.collect()
    before = len(infllm_pass.report().graphs)
    for _ in range(3):
        assert compiled() == 1
        torch._dynamo.reset()
        gc.collect()
    assert len(infllm_pass.report().graphs) <= before


def counted_states(monkeypatch):
    """The states that are made from now on."""
    made = []

    class Counted(CacheState):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(cache_store, "CacheState", Counted)
    return made


def named(module):
    return torch.compile(module, backend="infllm", options={**CONFIG.to_dict(), "backend": "aot_eager"})


@torch.no_grad()
def test_graphs_of_the_named_backend_share_the_states_of_caches(monkeypatch):
    """A graph of one query goes on with what a graph of three kept."""
    made, module = counted_states(monkeypatch), CachedAttention()
    model, (keys, values) = named(module), caches()
    for count, position in ((60, 0), (3, 60), (1, 63), (2, 64), (1, 66)):
        x = steps_of(1, count)
        out = model(x, keys, values, torch.tensor(position))
        assert relative_error(out, expected(module, x, keys, values, position)) < 1e-12, position
    assert len(made) == 1
    assert infllm_pass.report(model).sites[-1].cache_state == "carried"


@torch.no_grad()
def test_two_models_of_the_named_backend_decode_from_one_cache():
    """What one keeps holds for the other, and what one writes voids nothing that it should not, nor too little."""
    modules = CachedAttention(), CachedAttention()
    models, (keys, values) = [named(module) for module in modules], caches()
    position = 0
    for number, count in enumerate((60, 3, 1, 1, 2, 1, 1)):
        model, module = models[number % 2], modules[number % 2]
        x = steps_of(1, count)
        out = model(x, keys, values, torch.tensor(position))
        assert relative_error(out, expected(module, x, keys, values, position)) < 1e-12, position
        position += count
        if number == 4:
            keys[:, :, 20:30] = torch.randn_like(keys[:, :, 20:30])  # somebody else writes


@torch.no_grad()
def test_a_model_that_is_compiled_in_two_ways_has_one_store(monkeypatch):
    made, module = counted_states(monkeypatch), CachedAttention()
    model = infllm_pass.sparsify(torch.compile(module, backend="aot_eager"), CONFIG)
    handle, (keys, values) = model._infllm_handle, caches()
    model(steps_of(1, 60), keys, values, torch.tensor(0))
    model(steps_of(1, 1), keys, values, torch.tensor(60))
    again = handle.compiled_as(module, {"backend": "aot_eager", "dynamic": False})
    x = steps_of(1, 1)
    out = again(x, keys, values, torch.tensor(61))
    assert relative_error(out, expected(module, x, keys, values, 61)) < 1e-12
    assert len(made) == 1


class Spec:
    """A cache whose state is one window."""

    position, layout, keys, view, padded = 0, "layout", (1, 1, 1), (), False

    @staticmethod
    def rows(cache):
        return cache.shape[0]

    @staticmethod
    def tensors(rows, dtype):
        return tuple(StateTensor(name, (rows, 1, 1, 1), dtype) for name in "ab")


def test_threads_get_one_state_of_a_cache():
    store, tensors, start = (
        CacheStore(),
        [torch.zeros(1, 1, 1, 1) for _ in range(200)],
        threading.Barrier(4, timeout=60),
    )
    found = [[] for _ in range(4)]

    def ask(mine):
        start.wait()
        mine += [store.state(cache, Spec) for cache in tensors]
        assert len(store) <= len(tensors)

    assert together(*[lambda mine=mine: ask(mine) for mine in found]) == []
    for states in zip(*found, strict=True):
        assert len({id(state) for state in states}) == 1


class OnDevice:
    """A tensor on a CUDA device, as far as streams go."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self):
        self.recorded = []

    def record_stream(self, stream):
        self.recorded.append(stream.cuda_stream)

    def zero_(self):
        return self


class Stream:
    def __init__(self, number):
        self.cuda_stream = number


def test_a_state_is_recorded_once_in_every_stream_that_uses_it(monkeypatch):
    """Or its memory would be given away while another stream than the one it was made in still reads it."""
    tensors = [OnDevice() for _ in range(4)]
    store, state = CacheStore(), CacheState(tensors[:2], *tensors[2:])
    monkeypatch.setattr(store, "state", lambda cache, spec: state)
    monkeypatch.setattr(store, "version", lambda cache: 0)
    graph = CachedGraph(lambda *inputs: None, (Spec,), store)
    for number in (7, 7, 9, 7, 9):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, number=number: Stream(number))
        graph(object())
    assert [tensor.recorded for tensor in tensors] == [[7, 9]] * 4


def test_memory_that_grew_is_recorded_anew():
    state = CacheState([torch.zeros(4, 1, 1, 1) for _ in range(2)], torch.zeros(1), torch.zeros(1))

    def described(*slots):
        return tuple(StateTensor("k", (1, 1, count, 1), torch.float32) for count in slots)

    state.streams.update((7, 9))
    state.prefix(described(3, 4))
    assert state.streams == {7, 9}
    state.prefix(described(5, 4))
    assert state.streams == set()
