"""Tuning: which configurations are tried, what is measured under which, and the rows that launches then read."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil

import pytest

from tests.support import ROOT

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from infllm_pass.kernels.triton import configs


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tune")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The tables, in a folder where they may be written."""
    shutil.copytree(configs.TUNING, tmp_path / "tuning")
    monkeypatch.setattr(configs, "TUNING", tmp_path / "tuning")
    configs._look_up.cache_clear()
    yield tmp_path / "tuning"
    configs._look_up.cache_clear()


def forward(capability: int, head_dim: int) -> configs.LaunchConfig | None:
    return configs.find_config(configs.LaunchConfig, "attention_forward", capability, 2, head_dim)


def test_candidates_are_all_combinations_once_and_the_current_one_first(tune):
    current = configs.LaunchConfig(num_stages=3)
    trials = [tune.trial("num_stages=2,3"), tune.trial("max_registers=none,168")]
    made = tune.candidates(current, trials)
    assert [(config.num_stages, config.max_registers) for config in made] == [(3, None), (2, None), (2, 168), (3, 168)]
    with pytest.raises(SystemExit, match=r"no field warps; it has .*num_warps"):
        tune.candidates(current, [tune.trial("warps=4")])


@pytest.mark.parametrize("text", ["num_stages", "num_stages=two"])
def test_a_malformed_trial_is_refused(tune, text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected FIELD=VALUE"):
        tune.trial(text)


def test_each_candidate_is_measured_under_its_own_configuration_and_failures_are_told(tune):
    def time() -> float:
        stages = forward(90, 128).num_stages
        if stages == 4:
            raise OutOfResources(300000, 232448, "shared memory")
        return 10.0 / stages

    tried = tune.candidates(configs.LaunchConfig(num_stages=2), [tune.trial("num_stages=3,4")])
    rows = tune.measure("attention_forward", tried, time)
    assert [row["stage_ms"] for row in rows] == [5.0, pytest.approx(10 / 3), None]
    assert "shared memory" in rows[2]["stage_note"]
    assert tune.note_of(rows, "H100") == 'H100: {"num_stages": 3} 3.33 ms; {} 5 ms'


def test_launches_read_the_row_that_was_written(tune, tables):
    before, narrow = forward(90, 128), forward(90, 64)
    assert before.recorded is not None
    chosen = configs.replace(before, num_stages=5)
    tune.write_row(tables / "sm_90.json", "NVIDIA H100", "attention_forward", 2, 128, chosen, "21 ms")
    configs._look_up.cache_clear()
    assert forward(90, 128) == chosen
    assert forward(90, 64) == narrow
    rows = json.loads((tables / "sm_90.json").read_text())["rows"]
    assert [row["measured"] for row in rows if row["kernel"] == "attention_forward" and 128 in row["head_dims"]] == [
        ["21 ms"]
    ]


def test_a_row_for_several_dimensions_keeps_the_others(tune, tables):
    other = configs.find_config(configs.SelectionConfig, "select", 90, 2, 64)
    tune.write_row(tables / "sm_90.json", "H100", "select", 2, 128, configs.SelectionConfig(windows=32), "27 ms")
    configs._look_up.cache_clear()
    assert configs.find_config(configs.SelectionConfig, "select", 90, 2, 128).windows == 32
    assert configs.find_config(configs.SelectionConfig, "select", 90, 2, 64) == other


def test_a_new_device_gets_a_table(tune, tables):
    assert forward(120, 128) == forward(80, 128)
    tune.write_row(
        tables / "sm_120.json", "RTX", "attention_forward", 2, 128, configs.LaunchConfig(max_keys=32), "30 ms"
    )
    configs._look_up.cache_clear()
    assert forward(120, 128) == configs.LaunchConfig(max_keys=32)
    assert forward(120, 64) == forward(80, 64)


def test_every_kernel_has_a_configuration_on_every_device():
    for kernel, kind in configs.CLASSES.items():
        for element_size in (2, 4):
            for head_dim in (16, 32, 64, 128, 256):
                found = configs.find_config(kind, kernel, 0, element_size, head_dim)
                assert (found is None) == kernel.startswith("scattered"), (kernel, element_size, head_dim)
