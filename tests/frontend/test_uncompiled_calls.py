"""Models that are compiled by themselves become sparse; calls that run none of the graphs are noticed."""

from __future__ import annotations

import copy
import json
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import infllm_pass
from infllm_pass.errors import (
    NoAttentionSiteError,
    NoAttentionSiteWarning,
    UncompiledCallError,
    UncompiledCallWarning,
    UnsupportedModelError,
)
from infllm_pass.reasons import Uncompiled
from tests.support.common import SMALL, llama, oracle_attention, relative_error, tokens


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def qkv(length=100):
    return tuple(torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))


class Attention(nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")


WAYS = {"compiled forward": compile_forward, "compile()": compile_in_place}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_model_that_compiles_itself_becomes_sparse(way):
    """On both sides of dense_len; whoever else calls the model gets what it did before."""
    plain, lengths = llama(num_hidden_layers=1), (50, 99)
    expected = {}
    for length in lengths:
        ids = tokens(length)
        with oracle_attention(SMALL):
            expected[length] = ids, plain(ids).logits
    dense = plain(expected[99][0]).logits
    WAYS[way](plain)
    own = vars(plain).get("forward"), plain._compiled_call_impl
    model = infllm_pass.sparsify(plain, SMALL, strict=True)
    assert model._infllm_handle.settings.compiler.compiler_name == "eager"
    for ids, logits in expected.values():
        assert relative_error(model(ids).logits, logits) < 1e-8
    assert {graph.branches for graph in infllm_pass.report(model).graphs} == {("dense",), ("sparse",)}
    assert relative_error(plain(expected[99][0]).logits, dense) < 1e-10
    assert (vars(plain).get("forward"), plain._compiled_call_impl) == own
    assert model._orig_mod is plain
    with infllm_pass.dense_mode(model):
        assert relative_error(model(expected[99][0]).logits, dense) < 1e-10


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_compiles_itself_trains_with_the_oracle_s_gradients(way):
    plain, ids = llama(num_hidden_layers=1).train(), tokens(80)

    def gradients(model):
        plain.zero_grad()
        model(ids, labels=ids).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])

    with oracle_attention(SMALL):
        expected = gradients(plain)
    WAYS[way](plain)
    model = infllm_pass.sparsify(plain, SMALL, strict=True)
    assert relative_error(gradients(model), expected) < 1e-7
    assert infllm_pass.report(model).switchable == 1


@torch.no_grad()
def test_a_copy_of_a_model_that_compiles_itself_has_weights_of_its_own():
    plain, ids = llama(num_hidden_layers=1), tokens(80)
    compile_in_place(plain)
    model = infllm_pass.sparsify(plain, SMALL, strict=True)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.mul_(1.1)
    before = model(ids).logits
    changed = llama(num_hidden_layers=1)
    changed.load_state_dict(copied.state_dict())
    with oracle_attention(SMALL):
        expected = changed(ids).logits
    assert relative_error(copied(ids).logits, expected) < 1e-8
    assert torch.equal(model(ids).logits, before)


class Owner(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *inputs):
        return self.part(*inputs) * 1.0


@pytest.mark.parametrize("way", [*WAYS, "torch.compile"])
def test_a_part_that_is_compiled_by_itself_becomes_sparse_with_its_owner(way):
    part = Attention()
    if way == "torch.compile":
        part = torch.compile(part, backend="eager")
    else:
        WAYS[way](part)
    model = infllm_pass.sparsify(torch.compile(Owner(part), backend="eager"), SMALL, strict=True)
    for length in (40, 100):
        inputs = qkv(length)
        with oracle_attention(SMALL):
            expected = attend(*inputs)
        assert relative_error(model(*inputs), expected) < 1e-10
    assert infllm_pass.report(model).switchable == 2


class Projected(nn.Module):
    """Attention with weights, after a break of the graph or not."""

    def __init__(self, breaks):
        super().__init__()
        self.breaks = breaks
        self.projection = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, q, k, v):
        if self.breaks:
            torch._dynamo.graph_break()
        return attend(self.projection(q), k, v)


class Two(nn.Module):
    """Two attentions, the second in a part that is compiled by itself."""

    def __init__(self, breaks):
        super().__init__()
        self.first, self.second = Projected(False), Projected(breaks)
        compile_in_place(self.second)

    def forward(self, q, k, v):
        return self.second(self.first(q, k, v), k, v)


@pytest.mark.parametrize("strict", [False, "all"])
def test_a_part_that_runs_as_it_was_compiled_is_noticed(strict):
    """Dynamo inlines a part unless the part breaks the graph; then its own compilation runs."""
    whole, broken = (
        infllm_pass.sparsify(torch.compile(Two(breaks), backend="eager"), SMALL, strict=strict)
        for breaks in (False, True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole(*qkv())
    assert infllm_pass.report(whole).switchable == 2
    if strict:
        with pytest.raises(UncompiledCallError, match=r"\(second\)"):
            broken(*qkv())
    else:
        with pytest.warns(UncompiledCallWarning, match=r"\(second\).*compiled by itself"):
            broken(*qkv())
    assert infllm_pass.report(broken).switchable == 1
    assert infllm_pass.report(broken).uncompiled_calls == {"PART_COMPILED": 1}


def test_a_disabled_forward_is_refused():
    module = Attention()
    module.forward = torch.compiler.disable(module.forward)
    with pytest.raises(UnsupportedModelError, match=r"torch\.compiler\.disable"):
        infllm_pass.sparsify(module, SMALL)


def sparsified(function=attend, strict=False, **arguments):
    return infllm_pass.sparsify(torch.compile(function, backend="eager", **arguments), SMALL, strict=strict)


@pytest.fixture
def two_graphs_at_most():
    """Dynamo's limit, of which a sparsified model takes four times as much."""
    with torch._dynamo.config.patch(recompile_limit=1):
        yield 4


def test_calls_past_the_recompile_limit_are_warned_of_once_and_counted(two_graphs_at_most):
    model = sparsified(dynamic=False)
    known = [qkv(70 + number) for number in range(two_graphs_at_most)]
    for inputs in known:
        model(*inputs)
    with pytest.warns(UncompiledCallWarning, match="as many graphs of a function as it may"):
        model(*qkv(80))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = qkv(90)
        assert torch.equal(model(*inputs), attend(*inputs))
        model(*known[0])  # has a graph
    report = infllm_pass.report(model)
    assert report.uncompiled_calls == {"RECOMPILE_LIMIT": 2}
    assert json.loads(report.to_json())["uncompiled_calls"] == {"RECOMPILE_LIMIT": 2}
    assert "2 call(s) ran the plain model, dense: RECOMPILE_LIMIT: Dynamo has made" in " ".join(str(report).split())
    with oracle_attention(SMALL):
        expected = attend(*known[0])
    assert relative_error(model(*known[0]), expected) < 1e-10


def test_strict_refuses_calls_past_the_recompile_limit(two_graphs_at_most):
    model = sparsified(dynamic=False, strict=True)
    for number in range(two_graphs_at_most):
        model(*qkv(70 + number))
    for length in (80, 90):
        with pytest.raises(UncompiledCallError, match="as many graphs"):
            model(*qkv(length))
    model(*qkv(70))


def test_a_call_of_which_a_part_is_past_the_limit_is_noticed(two_graphs_at_most):
    """The first attention keeps its graphs, the second has a frame of its own."""

    def two(q, k, v, other):
        x = attend(q, k, v)
        torch._dynamo.graph_break()
        return x.sum() + attend(*other).sum()

    model = sparsified(two, dynamic=False, strict=True)
    first = qkv(70)
    for number in range(two_graphs_at_most):
        model(*first, qkv(80 + number))
    assert infllm_pass.report(model).switchable == 1 + two_graphs_at_most
    with pytest.raises(UncompiledCallError, match="as many graphs"):
        model(*first, qkv(99))
    model(*first, qkv(80))
    assert infllm_pass.report(model).uncompiled_calls == {"RECOMPILE_LIMIT": 1}


def turned_off():
    return torch._dynamo.config.patch(disable=True)


OFF = {
    "STANCE": lambda: torch.compiler.set_stance("force_eager"),
    "DYNAMO_OFF": turned_off,
    "DISPATCH_MODE": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("reason", OFF)
def test_calls_while_dynamo_is_off_are_noticed(reason):
    models = sparsified(), sparsified(strict=True)
    inputs, others = qkv(), qkv(30)
    expected = [model(*inputs) for model in models]
    with OFF[reason]():
        with pytest.warns(UncompiledCallWarning) as caught:
            _ = models[0](*others), models[0](*others)
        with pytest.raises(UncompiledCallError) as raised:
            models[1](*others)
    (warning,) = (each for each in caught if each.category is UncompiledCallWarning)
    assert warning.filename == __file__
    assert Uncompiled[reason].value in str(warning.message)
    assert Uncompiled[reason].value in str(raised.value)
    assert [infllm_pass.report(model).uncompiled_calls[reason] for model in models] == [2, 1]
    torch._dynamo.reset()  # turned off, Dynamo marks functions for good
    assert all(torch.equal(model(*inputs), before) for model, before in zip(models, expected, strict=True))


def disable(module):
    module.forward = torch.compiler.disable(module.forward)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(compile_forward, "COMPILED_ELSEWHERE"), (disable, "DISABLED"), (compile_in_place, "COMPILED_ELSEWHERE")],
    ids=["compiled forward", "disabled forward", "compile()"],
)
def test_a_model_that_changes_after_it_was_sparsified_is_noticed(change, reason):
    module, inputs = Attention(), qkv()
    model = infllm_pass.sparsify(torch.compile(module, backend="eager"), SMALL, strict=True)
    model(*inputs)
    change(module)
    with pytest.raises(UncompiledCallError, match=Uncompiled[reason].value[:30]):
        model(*inputs)
    assert infllm_pass.report(model).uncompiled_calls == {reason: 1}


def test_a_call_without_a_graph_is_no_silent_success():
    """Errors and warnings are of the kinds for models in which nothing is switchable."""
    with pytest.warns(NoAttentionSiteWarning, match="made no graph"):
        assert sparsified(lambda x: x)(3) == 3
    with pytest.raises(NoAttentionSiteError, match="made no graph"):
        sparsified(lambda x: x, strict=True)(3)


def test_dense_mode_is_asked_for_and_not_counted():
    model = sparsified(strict=True)
    inputs = qkv()
    model(*inputs)
    with infllm_pass.dense_mode(model), torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(*inputs), attend(*inputs))
    assert infllm_pass.report(model).uncompiled_calls == {}


def test_a_sparsified_model_inside_another_keeps_its_own_graphs():
    inner = infllm_pass.sparsify(torch.compile(Attention(), backend="eager"), SMALL, strict=True)
    outer = infllm_pass.sparsify(torch.compile(Owner(inner), backend="eager"), {**SMALL.to_dict(), "dense_len": 10**6})
    inputs = qkv()
    with oracle_attention(SMALL):
        expected = attend(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(outer(*inputs), expected) < 1e-10
    assert infllm_pass.report(inner).switchable == 1
    assert infllm_pass.report(outer).uncompiled_calls == infllm_pass.report(inner).uncompiled_calls == {}


@pytest.mark.parametrize("kind", ["module", "function"])
def test_a_compiled_function_that_calls_a_sparsified_model_breaks_its_graph_there(kind):
    model = sparsified(Attention() if kind == "module" else attend, strict=True)

    def caller(*inputs):
        return model(*[x * 2 for x in inputs]) + 1

    inputs = qkv()
    with oracle_attention(SMALL):
        expected = attend(*[x * 2 for x in inputs]) + 1
    assert relative_error(torch.compile(caller, backend="eager")(*inputs), expected) < 1e-10
    assert infllm_pass.report(model).switchable == 1
    torch._dynamo.reset()
    whole = torch.compile(caller, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a sparsified model is compiled by itself"):
        whole(*inputs)


def test_threads_notice_their_own_calls():
    """Dynamo's limit is met in one thread while the other runs its graph again and again."""
    model, inputs, counts = sparsified(dynamic=False), qkv(), 50
    model(*inputs)
    start, raised = threading.Barrier(2, timeout=60), []

    def call(tensors):
        start.wait()
        try:
            for _ in range(counts):
                model(*tensors)
        except Exception as error:
            raised.append(error)

    mode = FlopCounterMode(display=False)  # a mode belongs to a thread

    def inside_a_mode():
        with mode:
            call(qkv(77))

    threads = [threading.Thread(target=call, args=(inputs,)), threading.Thread(target=inside_a_mode)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert raised == []
    assert infllm_pass.report(model).uncompiled_calls == {"DISPATCH_MODE": counts}
