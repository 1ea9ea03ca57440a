"""``dense_len="auto"``: rows of measured break-even lengths, the package's and the user's, and what a site gets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import ConfigError, TuningError
from infllm_pass.plan import break_even as table
from infllm_pass.plan.break_even import AttentionPlace, BreakEvenRow, add_user_rows, break_even, resolved

H100 = AttentionPlace("NVIDIA H100 80GB HBM3", 32, 8, 128)
PUBLISHED = SparseAttentionConfig(scorer="pooled")
MINE = BreakEvenRow("cpu", "pooled", 4, 2, 8, 6, 16, 1, 300, "measured here")


@pytest.fixture(autouse=True)
def user_rows(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "rows.json"
    monkeypatch.setenv(table.USER_FILE, str(path))
    return path


def test_a_measured_case_gets_its_length():
    found = break_even(PUBLISHED, H100)
    assert found.length == 20224  # 20 187 in whole multiples of 256
    assert found.origin.startswith("break-even measured: benchmarks/breakeven.py")


@pytest.mark.parametrize(
    ("place", "config", "length", "nearest"),
    [
        (H100, replace(PUBLISHED, topk=160), 40448, "NVIDIA H100 80GB HBM3, 32x8x128"),  # twice the blocks
        (H100, replace(PUBLISHED, topk=16), 10240, "NVIDIA H100 80GB HBM3, 32x8x128"),  # half the blocks
        (H100, replace(PUBLISHED, topk=4, window_size=64), 10240, "NVIDIA H100 80GB HBM3, 32x8x128"),  # and no less
        (H100, replace(PUBLISHED, scorer="tokens"), 28416, "NVIDIA H200, 32x8x128"),  # rather another GPU
        (replace(H100, kv_heads=32), PUBLISHED, 49920, "NVIDIA H200, 32x32x128"),
        (replace(H100, device="NVIDIA L4", kv_heads=2), PUBLISHED, 13312, "NVIDIA H200, 32x2x128"),
    ],
)
def test_other_cases_are_estimated_from_the_nearest(place, config, length, nearest):
    found = break_even(config, place)
    assert found.length == length
    assert f"estimated from {nearest}, 96 blocks" in found.origin
    assert "infllm-pass tune" in found.origin


def test_a_cpu_is_no_gpu():
    cpu = replace(H100, device="cpu")
    token_scores, pooled = (break_even(replace(PUBLISHED, scorer=name), cpu).length for name in ("tokens", "pooled"))
    assert token_scores == pytest.approx(1.25 * pooled, abs=256)
    assert "from cpu" in break_even(PUBLISHED, replace(H100, device="cpu")).origin


def test_the_user_s_rows_come_before_the_package_s(user_rows):
    assert add_user_rows([MINE]) == user_rows
    config, place = SparseAttentionConfig(**SIZES, scorer="pooled"), AttentionPlace("cpu", 4, 2, 8)
    assert break_even(config, place) == table.BreakEven(512, "break-even measured: measured here")
    add_user_rows([replace(MINE, length=900), replace(MINE, kv_heads=1)])
    assert break_even(config, place).length == 1024
    assert len(json.loads(user_rows.read_text())["rows"]) == 2
    assert list(user_rows.parent.iterdir()) == [user_rows]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": [{}]}', json.dumps({"rows": [vars(MINE) | {"length": 0}]}),
             json.dumps({"rows": [vars(MINE) | {"length": "12"}]})]
)  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_it(user_rows, text):
    user_rows.parent.mkdir()
    user_rows.write_text(text)
    with pytest.raises(TuningError, match=f"{user_rows} is damaged"):
        break_even(PUBLISHED, H100)


def test_numbers_are_left_alone():
    config = replace(PUBLISHED, dense_len=77)
    assert resolved(config, H100) is config
    with pytest.raises(ConfigError, match="dense_len='auto'"):
        _ = PUBLISHED.switch_length


def test_rows_that_are_added_count_at_once():
    config, place = SparseAttentionConfig(**SIZES, scorer="pooled"), AttentionPlace("cpu", 4, 2, 8)
    for length, expected in ((300, 512), (900, 1024)):
        add_user_rows([replace(MINE, length=length)])
        assert resolved(config, place).dense_len == expected


SIZES = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 4}


def attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(("length", "branch"), [(511, "dense"), (512, "sparse")])
def test_a_site_switches_at_the_length_of_its_device(length, branch):
    add_user_rows([MINE])
    model = infllm_pass.sparsify(torch.compile(attention, backend="eager"), {**SIZES, "scorer": "pooled"})
    q, k, v = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    out = model(q, k, v)
    (site,) = infllm_pass.report(model).sites
    assert (site.branch, site.config["dense_len"], site.dense_len_origin) == (
        branch,
        512,
        "break-even measured: measured here",
    )
    same = torch.allclose(out, attention(q, k, v), atol=1e-5)
    assert same == (branch == "dense")
    function = infllm_pass.switchable_attention(q, k, v, {**SIZES, "scorer": "pooled"})
    torch.testing.assert_close(function, out)


def rotated(q, k, v):
    angles = torch.arange(q.shape[2])[:, None] * 10000.0 ** (-torch.arange(16) / 16)
    cos, sin = (each.repeat(1, 2) for each in (angles.cos(), angles.sin()))
    q, k = (x * cos + torch.cat([-x[..., 16:], x[..., :16]], -1) * sin for x in (q, k))
    return attention(q, k, v)


@pytest.mark.parametrize(("function", "read"), [(rotated, 16), (attention, 32)])
def test_a_site_that_reads_more_channels_breaks_even_later(function, read):
    """Half of 32 channels by the rotary embedding; without one nothing tells which, and all are read."""
    add_user_rows([replace(MINE, scorer="tokens", head_dim=32, length=512, score_dims=16)])
    model = infllm_pass.sparsify(torch.compile(function, backend="eager"), {**SIZES, "scorer": "tokens"})
    q, k, v = torch.randn(1, 4, 600, 32), torch.randn(1, 2, 600, 32), torch.randn(1, 2, 600, 32)
    model(q, k, v)
    (site,) = infllm_pass.report(model).sites
    assert site.scores.startswith(f"tokens {read} of 32" if read < 32 else "tokens 32 of 32")
    assert (site.branch, site.config["dense_len"]) == (("sparse", 512) if read == 16 else ("dense", 1024))


def test_the_function_reads_all_channels():
    add_user_rows([replace(MINE, scorer="tokens", head_dim=32, length=512, score_dims=16)])
    q, k, v = torch.randn(1, 4, 600, 32), torch.randn(1, 2, 600, 32), torch.randn(1, 2, 600, 32)
    config = {**SIZES, "scorer": "tokens"}
    torch.testing.assert_close(infllm_pass.switchable_attention(q, k, v, config), attention(q, k, v))
    add_user_rows([replace(MINE, scorer="tokens", head_dim=32, length=512, score_dims=32)])
    assert not torch.allclose(infllm_pass.switchable_attention(q, k, v, config), attention(q, k, v), atol=1e-5)


def test_a_row_that_never_broke_even_stays_dense():
    add_user_rows([replace(MINE, length=table.NEVER)])
    config, place = SparseAttentionConfig(**SIZES, scorer="pooled"), AttentionPlace("cpu", 4, 2, 8)
    assert break_even(config, place).length == table.NEVER
