"""More positions: the rotary embedding is transformers' own, the pass still finds it, and a saved model keeps it."""

import copy
import math
import re

import pytest
import torch

import infllm_pass
from infllm_pass.adaptation.rotary import KINDS, extend_positions
from infllm_pass.errors import AdaptationError, ConfigError
from infllm_pass.evaluation.evaluate import positions_of
from tests.support.tokenizers import byte_llama

transformers = pytest.importorskip("transformers")

SHORT, LONG = 64, 256


@pytest.fixture(scope="module")
def model():
    return byte_llama(hidden_size=128, max_position_embeddings=SHORT, num_hidden_layers=1)


def rebuilt(model, config):
    extended = type(model)(config).eval()
    extended.load_state_dict(model.state_dict())
    return extended


def cosines(model, length):
    """What the model's rotary embedding gives for a text of this length, cosines and sines ``[length, 2 D]``."""
    cos, sin = model.model.rotary_emb(torch.zeros(1, length, 1), torch.arange(length)[None])
    return torch.cat([cos[0], sin[0]], -1)


def angles(model, length):
    """Angle of each pair for each position, ``[length, D / 2]``, from the definition of each kind."""
    cos, sin = cosines(model, length).chunk(2, -1)
    half = cos.shape[1] // 2
    return torch.atan2(sin[:, :half], cos[:, :half]), torch.hypot(sin[:, :half], cos[:, :half])


def turned(frequencies, length):
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequencies.double())
    return torch.atan2(angle.sin(), angle.cos())


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_that_the_kind_is_defined_by(model, kind):
    extended = rebuilt(model, extend_positions(model.config, LONG, kind))
    head, base, factor = model.config.head_dim, 10_000.0, LONG / SHORT
    plain = base ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    scale = 1.0
    if kind == "linear":
        expected = plain / factor
    elif kind == "dynamic":
        grown = base * (factor * LONG / SHORT - (factor - 1)) ** (head / (head - 2))
        expected = grown ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    else:  # YaRN's ramp between 32 turns and 1 turn of the positions trained on; long factors begin there
        turns = torch.tensor([head * math.log(SHORT / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (32, 1)])
        low, high = max(math.floor(turns[0]), 0), min(math.ceil(turns[1]), head - 1)
        ramp = ((torch.arange(head // 2) - low) / (high - low)).clamp(0, 1)
        expected = plain / factor * ramp + plain * (1 - ramp)
        scale = 1 + 0.1 * math.log(factor) if kind == "yarn" else math.sqrt(1 + math.log(factor) / math.log(SHORT))
    found, norms = angles(extended, LONG)
    difference = (found.double() - turned(expected, LONG)).remainder(2 * math.pi)
    assert torch.minimum(difference, 2 * math.pi - difference).max() < 1e-3
    assert torch.allclose(norms, torch.full_like(norms, scale), rtol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_short_texts_keep_their_frequencies(model, kind):
    extended = rebuilt(model, extend_positions(model.config, LONG, kind))
    cosines(extended, LONG)  # what a long text sets must not stay
    found, _ = angles(extended, SHORT - 1)
    assert torch.allclose(found, angles(model, SHORT - 1)[0], atol=1e-6)


def test_longrope_takes_factors_of_a_search(model):
    half = model.config.head_dim // 2
    given = {"long_factor": [2.0 + n for n in range(half)], "short_factor": [1.5] * half, "attention_factor": 1.0}
    extended = rebuilt(model, extend_positions(model.config, LONG, "longrope", given))
    plain = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    for length, factors in ((LONG, given["long_factor"]), (SHORT, given["short_factor"])):
        found, norms = angles(extended, length)
        assert torch.allclose(found.double(), turned(plain / torch.tensor(factors), length), atol=1e-3)
        assert torch.allclose(norms, torch.ones_like(norms))


@pytest.mark.parametrize("kind", KINDS)
def test_the_pass_finds_sites_and_rotary_channels_and_equals_the_model(model, kind):
    """A budget of all blocks, so that sparse attention has the model's own result, alone and packed."""
    extended = rebuilt(model, extend_positions(model.config, LONG, kind)).double()
    config = {"scorer": "tokens", "topk": 4, "window_size": 64, "dense_len": 0}
    sparse = infllm_pass.sparsify(torch.compile(extended, backend="eager"), config, strict="all")
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (1, 230))
    packed = torch.cat([torch.arange(150), torch.arange(80)])[None]
    with torch.no_grad():
        for options in ({}, {"position_ids": packed}):
            actual = sparse(ids, use_cache=False, **options).logits
            expected = extended(ids, use_cache=False, **options).logits
            assert torch.allclose(actual, expected, rtol=1e-8, atol=1e-8)
    sites = infllm_pass.report(sparse).sites
    assert [site.decision for site in sites] == ["switchable"] * len(sites)
    assert len(sites) == 2
    assert {site.branch for site in sites} == {"sparse"}
    assert all("lowest rotary frequencies, half-split" in site.scores for site in sites)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_keeps_its_positions(model, kind, tmp_path):
    extended = rebuilt(model, extend_positions(model.config, LONG, kind))
    extended.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == extended.config.rope_parameters
    assert loaded.config.max_position_embeddings == (SHORT if kind == "dynamic" else LONG)
    assert positions_of(loaded) == (None if kind == "dynamic" else LONG)
    ids = torch.arange(200)[None] % 256
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, extended(ids, use_cache=False).logits)


def test_the_configuration_handed_in_is_not_changed(model):
    before = copy.deepcopy(model.config.to_dict())
    extended = extend_positions(model.config, LONG)
    assert model.config.to_dict() == before
    assert extended.rope_parameters["factor"] == 4.0
    assert extended.rope_parameters["rope_theta"] == before["rope_parameters"]["rope_theta"]


def test_parameters_are_handed_on(model):
    extended = extend_positions(model.config, LONG, "yarn", {"beta_fast": 16.0})
    assert extended.rope_parameters["beta_fast"] == 16.0


def test_layers_within_a_window_keep_theirs():
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": dict(rope), "full_attention": {**rope, "rope_theta": 1_000_000.0}},
        max_position_embeddings=SHORT,
    )
    extended = extend_positions(config, LONG, "longrope")
    assert extended.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    full = extended.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"], full["rope_theta"]) == ("longrope", 4.0, 1_000_000.0)
    assert len(full["long_factor"]) == config.head_dim // 2


def test_a_model_with_a_second_count_of_positions_keeps_it():
    config = transformers.Phi3Config(max_position_embeddings=SHORT, original_max_position_embeddings=SHORT)
    extended = extend_positions(config, LONG, "longrope")
    assert (extended.max_position_embeddings, extended.original_max_position_embeddings) == (LONG, SHORT)


@pytest.mark.parametrize(
    ("config", "options", "kind", "message"),
    [
        ({}, {"kind": "ntk"}, ConfigError, "kind='ntk' is not valid: expected one of yarn, longrope, linear, dynamic"),
        ({}, {"length": SHORT}, ConfigError, "length=64 is not valid: expected more than the model's 64 positions"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
            {},
            AdaptationError,
            "scaled already ('linear')",
        ),
    ],
)
def test_what_cannot_be_extended_is_refused(config, options, kind, message):
    given = transformers.LlamaConfig(max_position_embeddings=SHORT, **config)
    with pytest.raises(kind, match=re.escape(message)):
        extend_positions(given, **{"length": LONG, **options})


@pytest.mark.parametrize("name", ["GPT2Config", "BloomConfig", "FalconConfig"])
def test_models_without_a_rotary_embedding_are_refused(name):
    given = getattr(transformers, name)(**({"alibi": True} if name == "FalconConfig" else {}))
    with pytest.raises(AdaptationError, match="describes no rotary embedding"):
        extend_positions(given, 100_000)
