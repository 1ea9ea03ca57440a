"""The public entry points on whole models: numbers, kept compile settings, the switch, and errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ConfigError, NoAttentionSiteError, NoAttentionSiteWarning, UnsupportedModelError
from infllm_pass.rewrite.log import CompileLog
from tests.support.common import SMALL, llama, oracle_attention, relative_error, tokens

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def qkv(length=100, dtype=torch.float64):
    return tuple(torch.randn(1, 2, length, 8, dtype=dtype) for _ in range(3))


def padding_mask(length):
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, : length // 5] = 0
    mask[1, -7:] = 0
    return mask


@pytest.mark.parametrize(
    ("backend", "bound"),
    [("eager", 1e-10), ("aot_eager", 1e-10), ("inductor", 1e-5)],  # Inductor's float32 rotary angles round otherwise
)
@torch.no_grad()
def test_a_covering_budget_equals_the_dense_model(backend, bound):
    plain = llama(num_hidden_layers=1)
    model = infllm_pass.sparsify(torch.compile(plain, backend=backend), COVERING, strict=True)
    for length in (63, 90):
        ids = tokens(length, 2)
        assert relative_error(model(ids).logits, plain(ids).logits) < bound
    assert {branch for graph in infllm_pass.report(model).graphs for branch in graph.branches} == {"dense", "sparse"}


@pytest.mark.parametrize(("length", "use_cache"), [(64, True), (99, False)], ids=["is_causal", "mask tensor"])
@torch.no_grad()
def test_a_small_budget_equals_the_oracle(length, use_cache, tiny_llama):
    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend="aot_eager"), SMALL, strict=True)
    ids = tokens(length)
    with oracle_attention(SMALL):
        expected = tiny_llama(ids, use_cache=use_cache).logits
    assert relative_error(model(ids, use_cache=use_cache).logits, expected) < 1e-8
    assert relative_error(tiny_llama(ids).logits, expected) > 1e-3  # the selection does leave keys out


@pytest.mark.parametrize("length", [50, 110])
@torch.no_grad()
def test_padded_batches_equal_the_oracle(length, tiny_llama):
    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend="aot_eager"), SMALL, strict=True)
    ids, mask = tokens(length, 3), padding_mask(length)
    with oracle_attention(SMALL, mask.bool()):
        expected = tiny_llama(ids, attention_mask=mask).logits
    actual = model(ids, attention_mask=mask).logits
    assert torch.isfinite(actual).all()
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-8
    assert {site.mask for site in infllm_pass.report(model).sites} == {"causal, padded keys"}


@pytest.mark.parametrize(("split", "dynamic"), [(40, None), (97, True)])
@torch.no_grad()
def test_a_prompt_continued_on_its_cache_equals_one_call(split, dynamic, tiny_llama):
    """The second call's queries are the last of the keys: its mask is proved with the cache's length as offset."""
    config = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0})
    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend="eager", dynamic=dynamic), config, strict=True)
    ids = tokens(131)
    whole = model(ids).logits
    first = model(ids[:, :split])
    second = model(ids[:, split:], past_key_values=first.past_key_values)
    assert relative_error(torch.cat([first.logits, second.logits], 1), whole) < 1e-8
    assert {site.reason for site in infllm_pass.report(model).sites} == {"SWITCHABLE"}
    assert infllm_pass.report(model).sites[-1].mask_elided


@pytest.mark.parametrize(
    ("checkpointing", "mask"),
    [(False, False), (False, True), (True, False)],
    ids=["plain", "padded", "activation checkpointing"],
)
def test_a_training_step_has_the_gradients_of_the_oracle(checkpointing, mask):
    plain = llama().train()
    ids = tokens(80, 3 if mask else 1)
    extra = {"attention_mask": padding_mask(80)} if mask else {}
    labels = ids if not mask else ids.masked_fill(extra["attention_mask"] == 0, -100)

    def step(model):
        plain.zero_grad()
        model(ids, labels=labels, **extra).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])

    with oracle_attention(SMALL, extra["attention_mask"].bool() if mask else None):
        expected = step(plain)
    if checkpointing:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    model = infllm_pass.sparsify(torch.compile(plain, backend="aot_eager"), SMALL, strict=True)
    assert relative_error(step(model), expected) < 1e-7
    assert infllm_pass.report(model).switchable == 2


def test_autocast_computes_in_the_dtype_of_the_call():
    q, k, v = qkv(dtype=torch.float32)
    model = infllm_pass.sparsify(torch.compile(attend, backend="aot_eager"), COVERING, strict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, attend(q, k, v)) < 1e-2


def test_plain_functions_modules_and_compiled_functions_are_accepted():
    q, k, v = qkv()
    expected = attend(q, k, v)

    class Module(nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    for model in (attend, torch.compile(attend), torch.compile(attend, dynamic=True), Module(), Module().forward):
        torch._dynamo.reset()
        switchable = infllm_pass.sparsify(model, COVERING, strict=True)
        assert relative_error(switchable(q, k, v), expected) < 1e-10
        assert infllm_pass.report(switchable).switchable == 1


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "max-autotune"},
        {"mode": "reduce-overhead"},
        {"options": {"epilogue_fusion": False}},
        {"backend": "aot_eager", "dynamic": True},
        {"backend": "eager", "fullgraph": True},
        {"dynamic": False},
    ],
    ids=str,
)
def test_compile_settings_are_kept(options):
    handle = infllm_pass.sparsify(torch.compile(attend, **options), COVERING)._infllm_handle
    settings = handle.settings
    assert settings.arguments["fullgraph"] == options.get("fullgraph", False)
    assert settings.arguments["dynamic"] == options.get("dynamic")
    if "backend" in options:
        assert settings.compiler.compiler_name == options["backend"]
    else:
        wanted = torch._TorchCompileInductorWrapper(options.get("mode"), options.get("options"), options.get("dynamic"))
        assert settings.compiler.config == wanted.config
    q, k, v = qkv()
    switchable = infllm_pass.sparsify(torch.compile(attend, **options), COVERING, strict=True)
    assert relative_error(switchable(q, k, v), attend(q, k, v)) < 1e-10


def test_fullgraph_still_refuses_graph_breaks():
    def broken(q, k, v):
        torch._dynamo.graph_break()
        return attend(q, k, v)

    switchable = infllm_pass.sparsify(torch.compile(broken, backend="eager", fullgraph=True), SMALL)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        switchable(*qkv())


@torch.no_grad()
def test_the_original_is_untouched_and_weights_are_shared(tiny_llama):
    compiled = torch.compile(tiny_llama, backend="aot_eager")
    ids = tokens(99)
    before = compiled(ids).logits
    model = infllm_pass.sparsify(compiled, SMALL)
    assert relative_error(model(ids).logits, before) > 1e-3
    assert torch.equal(compiled(ids).logits, before)
    assert model.lm_head.weight is tiny_llama.lm_head.weight
    assert model is not compiled


COPIES = {
    "deep copy of its owner": lambda model: copy.deepcopy(nn.ModuleList([model]))[0],
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", COPIES)
@torch.no_grad()
def test_a_copy_is_a_sparsified_model_with_weights_of_its_own(way):
    plain, ids = llama(num_hidden_layers=1), tokens(80).clamp(min=1)  # token 0 pads
    model = infllm_pass.sparsify(torch.compile(plain, backend="eager"), SMALL, strict=True)
    before = model(ids).logits
    copied = COPIES[way](model)
    assert list(copied.state_dict()) == list(model.state_dict())
    for parameter in copied.parameters():
        parameter.mul_(1.2)
    changed = copy.deepcopy(plain)
    changed.load_state_dict(copied._orig_mod.state_dict())
    with oracle_attention(SMALL):
        expected = changed(ids).logits
    assert relative_error(copied(ids).logits, expected) < 1e-8
    assert relative_error(model(ids).logits, before) == 0.0
    assert len(infllm_pass.report(copied).graphs) == len(infllm_pass.report(model).graphs) == 1
    with infllm_pass.dense_mode(copied):
        assert relative_error(copied(ids).logits, changed(ids).logits) < 1e-8
    arguments = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with oracle_attention(SMALL):
        generated = changed.generate(ids, **arguments)
    assert torch.equal(copied.generate(ids, **arguments), generated)
    assert copied._infllm_handle.calls == 2 + 3


def test_a_copy_of_a_traced_module_is_sparsified():
    """Graph modules copy themselves, and a compiled module asks its original for what it lacks."""
    model = infllm_pass.sparsify(torch.compile(torch.fx.symbolic_trace(nn.Linear(2, 2)), backend="eager"), SMALL)
    assert infllm_pass.report(copy.deepcopy(model)).graphs == []


@torch.no_grad()
def test_sparsifying_twice_replaces_the_first_configuration():
    q, k, v = qkv()
    first = infllm_pass.sparsify(torch.compile(attend, backend="aot_eager", dynamic=True), SMALL)
    assert relative_error(first(q, k, v), attend(q, k, v)) > 1e-2
    second = infllm_pass.sparsify(first, COVERING)
    assert relative_error(second(q, k, v), attend(q, k, v)) < 1e-10
    assert second._infllm_handle.settings == first._infllm_handle.settings
    assert infllm_pass.report(second).switchable == infllm_pass.report(first).switchable == 1


@pytest.mark.parametrize("first", ["dense model", "named backend"])
def test_the_pass_never_stands_in_front_of_itself(first):
    if first == "named backend":
        model = torch.compile(attend, backend="infllm", options={**SMALL.to_dict(), "backend": "aot_eager"})
    else:
        model = infllm_pass.dense(infllm_pass.sparsify(torch.compile(attend, backend="aot_eager"), SMALL))
    again = infllm_pass.sparsify(model, COVERING)
    assert again._infllm_handle.settings.compiler.compiler_name == "aot_eager"
    q, k, v = qkv()
    assert relative_error(again(q, k, v), attend(q, k, v)) < 1e-10


@torch.no_grad()
def test_dense_gives_the_dense_model_back(tiny_llama):
    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend="aot_eager"), SMALL)
    ids = tokens(99)
    dense = infllm_pass.dense(model)
    expected = tiny_llama(ids).logits
    assert relative_error(dense(ids).logits, expected) < 1e-10
    assert relative_error(model(ids).logits, expected) > 1e-3
    (graph,) = infllm_pass.report(dense).graphs
    assert all(site.branch == "dense" and site.mask_elided for site in graph.sites)


@torch.no_grad()
def test_dense_mode_switches_for_a_block_and_compiles_once(tiny_llama):
    compiles = []

    def backend(module, _example_inputs):
        compiles.append(module)
        return module.forward

    model = infllm_pass.sparsify(torch.compile(tiny_llama, backend=backend), SMALL)
    ids = tokens(99)
    sparse, expected = model(ids).logits, tiny_llama(ids).logits
    assert len(compiles) == 1
    for _ in range(3):
        with infllm_pass.dense_mode(model):
            assert relative_error(model(ids).logits, expected) < 1e-10
        assert torch.equal(model(ids).logits, sparse)
    assert len(compiles) == 2


def test_dense_mode_ends_with_an_exception():
    model = infllm_pass.sparsify(torch.compile(attend, backend="aot_eager"), SMALL)
    q, k, v = qkv()
    sparse = model(q, k, v)
    with pytest.raises(KeyError), infllm_pass.dense_mode(model):
        raise KeyError
    assert torch.equal(model(q, k, v), sparse)


@torch.no_grad()
def test_minicpm_model_configuration():
    fields = {**SMALL.to_dict()}
    del fields["lse"], fields["query_block"]
    model = infllm_pass.sparsify(torch.compile(attend, backend="eager"), SimpleNamespace(sparse_config=fields))
    assert model._infllm_handle.policy.config == SMALL


def test_a_model_without_attention_warns_once():
    model = infllm_pass.sparsify(torch.compile(nn.Linear(4, 4), backend="eager"), SMALL)
    with pytest.warns(NoAttentionSiteWarning, match="call no fused attention"):
        model(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))
        model(torch.randn(2, 2, 4))


def test_a_model_whose_sites_are_all_dense_says_why():
    def bidirectional(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    model = infllm_pass.sparsify(torch.compile(bidirectional, backend="eager"), SMALL, strict=True)
    with pytest.raises(NoAttentionSiteError, match="BIDIRECTIONAL: every query sees every key"):
        model(*qkv())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: 3, "got int"),
        (lambda: nn.Linear, "got the class Linear"),
        (lambda: "model", "got str"),
        (lambda: torch.compiler.disable(attend), "torch.compiler.disable"),
        (lambda: torch.compiler.disable(nn.Linear(2, 2)), "torch.compiler.disable"),
    ],
)
def test_models_that_cannot_be_sparsified(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        infllm_pass.sparsify(model(), SMALL)


def test_a_bad_configuration_is_refused_before_the_model_is_looked_at():
    with pytest.raises(ConfigError):
        infllm_pass.sparsify(3, {"topk": 0})


@pytest.mark.parametrize("function", [infllm_pass.dense, infllm_pass.report])
def test_what_was_not_sparsified_is_refused(function):
    with pytest.raises(UnsupportedModelError, match="not a sparsified model"):
        function(attend)
    with pytest.raises(UnsupportedModelError, match="not a sparsified model"), infllm_pass.dense_mode(attend):
        pass


@torch.no_grad()
def test_the_backend_is_known_to_dynamo_by_name():
    plain = llama(num_hidden_layers=1)
    assert "infllm" in torch._dynamo.list_backends()
    options = {**COVERING.to_dict(), "backend": "aot_eager"}
    model = torch.compile(plain, backend="infllm", options=options)
    ids = tokens(99)
    assert relative_error(model(ids).logits, plain(ids).logits) < 1e-10
    (graph,) = infllm_pass.report(model).graphs
    assert graph.branches == ("sparse",)
    assert infllm_pass.report(torch.compile(llama(), backend="infllm")).graphs == []
    assert graph in infllm_pass.report().graphs


@torch.no_grad()
def test_the_compile_config_of_transformers_finds_the_backend():
    from transformers import CompileConfig

    plain = llama(num_hidden_layers=1)
    arguments = CompileConfig(backend="infllm", mode=None, options=COVERING.to_dict(), fullgraph=False).to_dict()
    model = torch.compile(plain, **arguments)
    ids = tokens(99)
    assert relative_error(model(ids).logits, plain(ids).logits) < 1e-5
    assert infllm_pass.report(model).switchable == 1


def test_the_named_backend_refuses_a_bad_configuration():
    model = torch.compile(attend, backend="infllm", options={"topk": 0})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="topk=0 is not valid"):
        model(*qkv())


def test_parameters_of_a_dead_model_match_no_report():
    log = CompileLog()
    assert log.report_for([torch.zeros(2)]).graphs == []
