"""``generate`` of transformers on sparsified models: the sparsified forward runs, and its tokens are the right ones."""

from __future__ import annotations

import copy
import functools
import importlib.util

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import (
    CachePositionError,
    DeviceError,
    DtypeError,
    PagedCacheError,
    ShapeError,
)
from infllm_pass.kernels.cpu import decode
from infllm_pass.tools.checkpoint import corpus
from tests.support import ROOT
from tests.support.common import SMALL, llama, oracle_attention
from tests.tools.test_checkpoint import first_layers

transformers = pytest.importorskip("transformers")

COVERING = SparseAttentionConfig.from_dict({**SMALL.to_dict(), "topk": 40})
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 30}


def tokens(length, batch=1):
    """Without token 0, which pads: transformers reads padding off the tokens where it is given no mask."""
    return torch.randint(1, 64, (batch, length))


def left_padding(batch=3, length=50):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : 7 * row] = 0
    return mask


def sparsified(model, config=COVERING, backend="eager"):
    return infllm_pass.sparsify(torch.compile(model, backend=backend), config, strict=True)


def calls_of(model):
    return model._infllm_handle.calls


def rows_of_steps(model):
    return [site for site in infllm_pass.report(model).sites if site.query_shape[2] == 1]


@pytest.fixture(scope="module")
def tiny():
    return llama(num_hidden_layers=1).float()


STATIC = {"cache_implementation": "static"}
WAYS = {
    "greedy": {},
    "padded batch": {"attention_mask": left_padding()},
    "padded batch, static cache": {"attention_mask": left_padding(), **STATIC},
    "prompt in chunks, static cache": {"prefill_chunk_size": 17, **STATIC},
    "padded batch in chunks": {"attention_mask": left_padding(), "prefill_chunk_size": 17},
    "beam search": {"num_beams": 3, "num_return_sequences": 2},
    "beam search, static cache": {"num_beams": 3, **STATIC},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "no cache": {"use_cache": False},
}


TOGETHER = [
    "greedy",
    "padded batch, static cache",
    "padded batch in chunks",
    "prompt in chunks, static cache",
    "beam search",
    "beam search, static cache",
    "sampling",
    "prompt lookup",
    "no cache",
]
"""Each kind of batch and prompt over each cache, but not each combination of the three."""


@pytest.mark.parametrize("way", TOGETHER)
def test_with_a_covering_budget_the_tokens_are_those_of_the_dense_model(way, tiny):
    arguments = {**GREEDY, **WAYS[way]}
    arguments["max_new_tokens"] = 20  # from below dense_len to above
    ids = tokens(50, len(arguments.get("attention_mask", [0])))
    torch.manual_seed(7)
    expected = tiny.generate(ids, **arguments)
    model = sparsified(tiny)
    torch.manual_seed(7)
    got = model.generate(ids, **arguments)
    assert torch.equal(got, expected)
    report = infllm_pass.report(model)
    steps = 2 if way == "prompt lookup" else 20  # how many tokens a lookup finds depends on the text
    assert calls_of(model) >= steps
    assert {site.decision for site in report.sites} == {"switchable"}
    assert {site.branch for site in report.sites} == {"dense", "sparse"} or "static" in way
    assert len(report.graphs) <= (12 if way == "prompt lookup" else 8)  # a lookup's steps have many lengths


def test_an_assistant_model_drafts_for_a_sparsified_one(tiny):
    ids, arguments = tokens(50), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_length": 70}
    expected = tiny.generate(ids, **arguments)
    draft = sparsified(llama(num_hidden_layers=1, intermediate_size=32).float())
    model = sparsified(tiny)
    assert torch.equal(model.generate(ids, **arguments, assistant_model=draft), expected)
    assert calls_of(model) > 1
    assert calls_of(draft) > 1


def static_cache(model, rows=1, capacity=60, dtype=torch.float32, device="cpu"):
    cache = transformers.StaticCache(config=model.config, max_cache_len=capacity)
    cache.early_initialization(rows, 2, 8, dtype, device)
    return cache


@torch.no_grad()
@pytest.mark.parametrize(
    ("misfit", "error", "length"),
    [({"rows": 2}, ShapeError, 20), ({"dtype": torch.bfloat16}, DtypeError, 1), ({"device": "meta"}, DeviceError, 20)],
    ids=["rows", "dtype", "device"],
)
def test_a_cache_that_does_not_fit_is_named(misfit, error, length, tiny):
    """Before keys and values are written. Torch 2.14 runs what it cannot trace up to the error, and moves positions."""
    cache = static_cache(tiny, **misfit)
    with pytest.raises(error, match=r"^(past_key_values|cache).layers\[0\].keys (is|has)"):
        sparsified(tiny)(tokens(length), past_key_values=cache)
    layer = cache.layers[0]
    written = [layer.keys, layer.values]
    if TorchVersion(torch.__version__) < "2.14":
        written.append(layer.cumulative_length)
    assert all(tensor.is_meta or not tensor.any() for tensor in written)


def test_a_batch_that_a_cache_has_no_rows_for_is_an_error(tiny):
    with pytest.raises(ShapeError, match=r"keys has 1 row\(s\) and input_ids 2"):
        sparsified(tiny).generate(tokens(9, 2), past_key_values=static_cache(tiny), **GREEDY)


@pytest.mark.parametrize("mask", [None, left_padding(1, 50)], ids=["no mask", "mask"])
def test_generating_past_the_capacity_is_an_error_of_the_step_that_does_not_fit(mask, tiny):
    """Found from the length of the text, on the host, before the model is called; what fits was generated."""
    model, cache = sparsified(tiny), static_cache(tiny, capacity=60)
    with pytest.raises(CachePositionError, match="to get 1 tokens from slot 60 on, of 60 slots"):
        model.generate(tokens(50), attention_mask=mask, past_key_values=cache, **GREEDY)
    assert calls_of(model) == 11
    assert cache.get_seq_length() == 60


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_past_the_capacity_is_an_error_before_anything_is_written(backend, tiny):
    model, cache = sparsified(tiny, backend=backend), static_cache(tiny, capacity=60)
    for length in (58, 1, 1):
        model(tokens(length), past_key_values=cache)
    layer = cache.layers[0]
    before = layer.keys.clone(), layer.values.clone()
    for length in (1, 20):
        with pytest.raises(CachePositionError, match=r"cache (past_key_values|cache).layers\[0\].keys: row 0 .* 60 on"):
            model(tokens(length), past_key_values=cache)
    assert cache.get_seq_length() == 60
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])


def test_a_streamer_gets_every_token(tiny):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    ids, streamer = tokens(50), Streamer()
    got = sparsified(tiny).generate(ids, **GREEDY, streamer=streamer)
    assert streamer.seen == got[0].tolist()
    assert streamer.ended


def test_with_a_small_budget_the_tokens_are_those_of_the_oracle():
    plain = llama(num_hidden_layers=1)
    ids = tokens(50)
    with oracle_attention(SMALL):
        expected = plain.generate(ids, **GREEDY)
    model = sparsified(plain, SMALL)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert not torch.equal(plain.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(cache, tiny):
    model, mask, ids = sparsified(tiny, SMALL), left_padding(), tokens(50, 3)
    ids[mask == 0] = 0
    together = model.generate(ids, attention_mask=mask, **GREEDY, cache_implementation=cache)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, 7 * row :], **GREEDY, cache_implementation=cache)
        assert torch.equal(together[row, 7 * row :], alone[0]), row


@torch.no_grad()
def test_right_padding_and_packing_give_every_sequence_what_it_gets_alone(tiny):
    """As tokenizers pad, and as packed batches restart their positions; always sparse, so that it shows."""
    model = sparsified(tiny.double(), SparseAttentionConfig.from_dict({**SMALL.to_dict(), "dense_len": 0}))
    lengths = (90, 61)
    parts = [tokens(length) for length in lengths]
    alone = [model(part).logits[0] for part in parts]
    ids, mask = torch.zeros(2, 90, dtype=torch.long), torch.zeros(2, 90, dtype=torch.long)
    for row, part in enumerate(parts):
        ids[row, : part.shape[1]], mask[row, : part.shape[1]] = part[0], 1
    padded = model(ids, attention_mask=mask).logits
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits[0]
    for row, (length, expected) in enumerate(zip(lengths, alone, strict=True)):
        assert torch.allclose(padded[row, :length], expected, rtol=1e-8, atol=1e-8)
        begin = sum(lengths[:row])
        assert torch.allclose(packed[begin : begin + length], expected, rtol=1e-8, atol=1e-8)
    tiny.float()


def test_a_mask_that_hides_nothing_is_left_out_and_one_that_does_is_not(tiny):
    model, ids, mask = sparsified(tiny), tokens(50), torch.ones(1, 50, dtype=torch.long)
    model.generate(ids, attention_mask=mask, **GREEDY)
    assert {site.mask for site in infllm_pass.report(model).sites} == {"causal"}
    mask[0, :9] = 0  # the very tensor that was found to hide nothing
    expected = tiny.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert "causal, padded keys" in {site.mask for site in infllm_pass.report(model).sites}


def test_a_mask_is_read_once_and_not_at_every_step(tiny, monkeypatch):
    read, plain = [], torch.Tensor.all

    def counted(self, *args, **kwargs):
        read.append(tuple(self.shape))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "all", counted)
    model = sparsified(tiny)
    model.generate(tokens(50), **GREEDY, attention_mask=torch.ones(1, 50, dtype=torch.long))
    assert [shape for shape in read if len(shape) == 2 and shape[1] >= 50] == [(1, 50)]


def test_the_view_is_the_original_but_for_its_calls(tiny):
    plain = copy.deepcopy(tiny)
    model = sparsified(plain)
    hooked = []
    plain.register_forward_hook(lambda *_: hooked.append(torch.compiler.is_compiling()))
    model.generate(tokens(50), **GREEDY, cache_implementation="static")
    assert plain._previous_max_cache_length == 80 - 1  # generation writes to the original
    assert len(hooked) == calls_of(model) == 30
    plain.generation_config.max_new_tokens = 3
    assert model.generate(tokens(9), pad_token_id=0, do_sample=False).shape == (1, 12)
    assert model.generate.__name__ == "generate"
    assert calls_of(model) == 33


def test_dense_mode_generates_dense():
    plain = llama(num_hidden_layers=1)
    model, ids = sparsified(plain, SMALL), tokens(70)
    expected = plain.generate(ids, **GREEDY)
    with infllm_pass.dense_mode(model):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert not torch.equal(model.generate(ids, **GREEDY), expected)


def on_every_device(**arguments):
    config = transformers.CompileConfig(**arguments)
    config._compile_all_devices = True
    return config


def test_a_compile_configuration_is_honoured(tiny):
    ids = tokens(50)
    arguments = {**GREEDY, "cache_implementation": "static", "compile_config": on_every_device(backend="aot_eager")}
    expected = tiny.generate(ids, **{**GREEDY, "cache_implementation": "static"})
    model = sparsified(tiny)
    assert torch.equal(model.generate(ids, **arguments), expected)
    graphs = len(infllm_pass.report(model).graphs)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert len(infllm_pass.report(model).graphs) == graphs  # compiled once for all calls
    assert {site.decision for site in rows_of_steps(model)} == {"switchable"}


def test_the_named_backend_decodes_the_steps_of_a_sparsified_model(tiny, monkeypatch):
    """With one call of the decode operator for each step, its compressed keys carried."""
    calls, plain = [], decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *a, **k: calls.append(a) or plain(*a, **k))
    ids, arguments = tokens(50), {**GREEDY, "cache_implementation": "static"}
    config = on_every_device(backend="infllm", mode=None, options={"backend": "aot_eager"})
    model = sparsified(tiny)
    assert torch.equal(model.generate(ids, **arguments, compile_config=config), tiny.generate(ids, **arguments))
    assert len(calls) == 29
    assert {site.cache_state for site in rows_of_steps(model)} == {"carried"}


def test_the_named_backend_leaves_the_steps_of_a_plain_model_dense(tiny):
    """Transformers makes the mask of static caches outside the graph, where nothing is proved of it."""
    ids, seen = tokens(50), len(infllm_pass.report().graphs)
    expected = tiny.generate(ids, **GREEDY, cache_implementation="static")
    options = {**COVERING.to_dict(), "backend": "aot_eager"}
    config = on_every_device(backend="infllm", mode=None, options=options)
    got = copy.deepcopy(tiny).generate(ids, **GREEDY, cache_implementation="static", compile_config=config)
    assert torch.equal(got, expected)
    sites = [site for graph in infllm_pass.report().graphs[seen:] for site in graph.sites]
    assert {(site.query_shape[2], site.decision, site.reason) for site in sites} == {(1, "dense", "UNPROVEN_MASK")}
    assert all("in the values of attention_mask, made outside of the graph" in site.explanation for site in sites)


class Captioner(nn.Module):
    """A model that generates with a part of it, as models of images and text do."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def forward(self, ids):
        return self.language_model(ids).logits

    def generate(self, ids, **arguments):
        return self.language_model.generate(ids, **arguments)


def test_generating_with_a_part_of_the_model_runs_that_part_sparsified(tiny):
    model = infllm_pass.sparsify(torch.compile(Captioner(tiny), backend="eager"), COVERING, strict=True)
    ids = tokens(50)
    assert torch.equal(model.generate(ids, **GREEDY), tiny.generate(ids, **GREEDY))
    assert calls_of(model) == GREEDY["max_new_tokens"]
    assert {site.decision for site in infllm_pass.report(model).sites} == {"switchable"}


class Looping(nn.Module):
    """A model with a loop of its own, outside transformers."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def forward(self, ids):
        return self.language_model(ids, use_cache=False).logits

    @torch.no_grad()
    def generate(self, ids, steps):
        for _ in range(steps):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        return ids


def test_a_loop_of_the_model_s_own_calls_the_sparsified_forward(tiny):
    plain = Looping(tiny)
    ids = tokens(60)
    model = infllm_pass.sparsify(torch.compile(plain, backend="eager"), COVERING, strict=True)
    assert torch.equal(model.generate(ids, 9), plain.generate(ids, 9))
    assert calls_of(model) == 9


@pytest.mark.parametrize(
    "method", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_methods_with_a_paged_cache_are_refused(tiny, method):
    """Before anything is computed; the dense model has them."""
    model = sparsified(tiny)
    with pytest.raises(PagedCacheError, match=rf"{method}\(\) keeps a paged cache.*use generate\(\)"):
        getattr(model, method)([[1, 2, 3]])
    assert infllm_pass.report(model).graphs == []
    assert callable(getattr(infllm_pass.dense(model), method))


def test_all_layers_over_growing_caches_are_switchable():
    """Dynamo may give the caches of the layers, which have one length, a symbol each."""
    dense = llama(num_hidden_layers=3).float()
    model, arguments = sparsified(dense), {**GREEDY, **WAYS["padded batch"]}
    ids = tokens(50, len(arguments["attention_mask"]))
    assert torch.equal(model.generate(ids, **arguments), dense.generate(ids, **arguments))
    assert {site.decision for site in infllm_pass.report(model).sites} == {"switchable"}
    assert {site.cache_state for site in rows_of_steps(model)} >= {"carried"}


def test_a_model_without_generate_gets_none():
    model = infllm_pass.sparsify(torch.compile(nn.Linear(2, 2), backend="eager"), COVERING)
    assert not hasattr(model, "generate")


@pytest.fixture(scope="module")
def smollm2(whole_smollm2):
    return first_layers(whole_smollm2, 2)


@pytest.mark.checkpoint
@pytest.mark.parametrize("way", ["padded batch", "prompt in chunks, static cache"])
def test_the_public_checkpoint_generates_the_dense_model_s_200_tokens(way, smollm2, smollm2_tokenizer):
    covering = SparseAttentionConfig(window_size=256, topk=8, dense_len=256)
    ids = corpus(smollm2_tokenizer, 480)[:, :320].view(2, 160) if "batch" in way else corpus(smollm2_tokenizer, 160)
    arguments = {**WAYS[way], "do_sample": False, "pad_token_id": 2, "eos_token_id": None, "max_new_tokens": 200}
    if "batch" in way:
        arguments["attention_mask"] = left_padding(2, 160)
    if "chunks" in way:
        arguments["prefill_chunk_size"] = 100
    model = sparsified(smollm2, covering)
    assert torch.equal(model.generate(ids, **arguments), smollm2.generate(ids, **arguments))
    assert calls_of(model) in (200, 201)
    assert {site.decision for site in infllm_pass.report(model).sites} == {"switchable"}
    assert "carried" in {site.cache_state for site in rows_of_steps(model)}


@pytest.mark.checkpoint
def test_all_layers_of_the_public_checkpoint_generate_the_dense_model_s_tokens(whole_smollm2, smollm2_tokenizer):
    covering = SparseAttentionConfig(window_size=256, topk=8, dense_len=256)
    arguments = {**STATIC, "do_sample": False, "pad_token_id": 2, "eos_token_id": None, "max_new_tokens": 40}
    ids, model = corpus(smollm2_tokenizer, 240), sparsified(whole_smollm2, covering)
    assert torch.equal(model.generate(ids, **arguments), whole_smollm2.generate(ids, **arguments))
    assert calls_of(model) == 40
    steps = rows_of_steps(model)
    assert len(steps) == whole_smollm2.config.num_hidden_layers == 30
    assert {(site.decision, site.cache_state) for site in steps} == {("switchable", "carried")}


@pytest.mark.checkpoint
def test_a_pipeline_runs_the_sparsified_model(smollm2, smollm2_tokenizer):
    model = sparsified(smollm2)
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    outputs = [
        transformers.pipeline("text-generation", model=it, tokenizer=smollm2_tokenizer)("The way to", **arguments)
        for it in (model, smollm2)
    ]
    assert outputs[0] == outputs[1]
    assert calls_of(model) == 5


@pytest.mark.checkpoint
@pytest.mark.parametrize("flags", [[], ["--dense", "--cache", "dynamic"]], ids=["", "dense"])
def test_the_example_streams_an_answer(flags, smollm2, monkeypatch, capsys):
    path = ROOT / "examples" / "generate_long.py"
    spec = importlib.util.spec_from_file_location("generate_long", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "load_model", lambda: copy.deepcopy(smollm2))  # loading takes longer than all else
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    example.main(["--tokens", "200", "--new", "6", "--layers", "1", *flags])
    printed = capsys.readouterr().out
    assert "6 new tokens" in printed
    assert ("2 switchable" in printed) is (flags == [])
    assert ("attention site(s)" in printed) is (flags == [])
