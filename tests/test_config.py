from __future__ import annotations

from types import SimpleNamespace

import pytest

from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ConfigError

MINICPM4_1 = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}


def test_what_a_model_leaves_out_is_as_published():
    config = SparseAttentionConfig.from_model_config(SimpleNamespace(sparse_config={}))
    assert config == SparseAttentionConfig.from_dict({**MINICPM4_1, "scorer": "pooled"})
    assert SparseAttentionConfig() == SparseAttentionConfig.from_dict(
        {**MINICPM4_1, "dense_len": "auto", "scorer": "tokens"}
    )
    assert (config.local_blocks, config.selected_blocks, config.visited_tokens) == (32, 96, 6144)


def test_reads_a_model_configuration():
    model_config = SimpleNamespace(sparse_config={**MINICPM4_1, "topk": 32})
    assert SparseAttentionConfig.from_model_config(model_config).topk == 32
    assert SparseAttentionConfig.coerce(model_config).selected_blocks == 64


def test_model_configuration_without_sparse_config():
    with pytest.raises(ConfigError, match="sparse_config"):
        SparseAttentionConfig.from_model_config(SimpleNamespace(sparse_config=None))


def test_round_trip_and_hash():
    config = SparseAttentionConfig(topk=8, lse="exact", query_block=16)
    assert SparseAttentionConfig.from_dict(config.to_dict()) == config
    assert len({config, SparseAttentionConfig.from_dict(config.to_dict())}) == 1


def test_the_preset_of_nosa_is_as_released():
    """33 of 64 blocks before the query-agnostic ones: the first, the own and 16 before it, and 15 by score."""
    config = SparseAttentionConfig.nosa()
    aware = config.geometry.query_aware
    assert (config.selected_blocks, aware.selected_blocks, aware.init_blocks, aware.local_blocks) == (64, 33, 1, 16)
    assert (config.agnostic_topk, config.dense_len, config.lse, config.scorer) == (31, 0, "exact", "pooled")
    assert (config.kernel_size, config.kernel_stride, config.block_size) == (32, 16, 64)
    assert SparseAttentionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"agnostic_topk": -1}, "agnostic_topk", "at least 0"),
        ({"agnostic_topk": True}, "agnostic_topk", "an integer"),
        ({"agnostic_topk": 63}, "agnostic_topk", "at most topk - init_blocks - 1 = 62"),
        ({"agnostic_topk": 8, "scorer": "tokens"}, "scorer", '"pooled" with agnostic_topk=8'),
        ({"agnostic_topk": 8, "kernel_size": 2080}, "kernel_size", r"at most window_size \+ kernel_stride = 2064"),
    ],
)
def test_query_agnostic_blocks_that_cannot_be(changes, field, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        SparseAttentionConfig(**{"scorer": "pooled", **changes})
    assert str(caught.value).startswith(field)
    SparseAttentionConfig(scorer="pooled", agnostic_topk=62)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("kernel_size", 0, "at least 1"),
        ("kernel_size", 40, "multiple of kernel_stride=16, such as 48"),
        ("kernel_stride", -1, "at least 1"),
        ("block_size", 65, "multiple of kernel_stride=16, such as 80"),
        ("window_size", 100, "multiple of block_size=64, such as 128"),
        ("window_size", 0, "at least 1"),
        ("init_blocks", 0, "at least 1"),
        ("topk", 1, "at least init_blocks + 1 = 2"),
        ("topk", True, "an integer"),
        ("topk", 64.0, "an integer"),
        ("dense_len", -1, "at least 0"),
        ("dense_len", "8192", "an integer"),
        ("use_nope", True, "False"),
        ("lse", "fine", "'coarse', 'exact'"),
        ("checkpoint_saves", "all", "'nothing', 'selection', 'attention'"),
        ("query_block", 0, "at least 1"),
    ],
)
def test_invalid_fields_are_named(field, value, expected):
    with pytest.raises(ConfigError) as caught:
        SparseAttentionConfig(**{field: value})
    assert caught.value.field == field
    assert f"{field}={value!r}" in str(caught.value)
    assert expected in str(caught.value)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'window_size'"):
        SparseAttentionConfig.from_dict({"windowsize": 2048})


@pytest.mark.parametrize("value", [3, "topk=3", [("topk", 3)]])
def test_coerce_rejects_other_types(value):
    with pytest.raises(ConfigError, match="a SparseAttentionConfig, a dict"):
        SparseAttentionConfig.coerce(value)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        SparseAttentionConfig().topk = 3


@pytest.mark.parametrize(
    ("head_dim", "channels"), [(8, 8), (16, 16), (32, 16), (48, 32), (64, 32), (80, 32), (128, 32), (256, 64)]
)
def test_channels_that_token_scores_read_by_default(head_dim, channels):
    assert SparseAttentionConfig(scorer="tokens").score_dims_of(head_dim) == channels
