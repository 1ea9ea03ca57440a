"""A fast part of the zoo: decisions as recorded, outputs and gradients equal. The whole runs by ``make zoo``."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from infllm_pass.sites.rotary import Rotary
from tests.support.key_channels import measured
from tests.zoo import __main__ as zoo_command
from tests.zoo import channels, huggingface, oracle, packages, running, written
from tests.zoo.channels import read_keys
from tests.zoo.examination import Finding, examine
from tests.zoo.running import FAMILIES, Result
from tests.zoo.specimens import CannotBuildError, Kind, Specimen
from tests.zoo.table import DECISIONS, TABLE
from tests.zoo.truth import unexplained

EXPECTED = json.loads(DECISIONS.read_text())

FAST = [
    ("bloom", "eager", Kind.PLAIN),
    ("deepseek_v3", "sdpa", Kind.PADDED),
    ("falcon", "eager", Kind.PADDED),
    ("gemma2", "eager", Kind.PLAIN),
    ("gemma3_text", "sdpa", Kind.PLAIN),
    ("gpt2", "eager", Kind.PACKED),
    ("gpt_neo", "eager", Kind.PLAIN),
    ("gpt_oss", "eager", Kind.PLAIN),
    ("gptj", "eager", Kind.PLAIN),
    ("llama", "eager", Kind.PACKED),
    ("llama", "flex_attention", Kind.PADDED),
    ("llama", "sdpa", Kind.PACKED),
    ("mamba", "eager", Kind.PLAIN),
    ("mistral", "sdpa", Kind.PADDED),
    ("mixtral", "sdpa", Kind.PLAIN),
    ("opt", "sdpa", Kind.PLAIN),
    ("qwen2", "eager", Kind.PADDED),
    ("qwen3_next", "sdpa", Kind.PLAIN),
    ("whisper", "sdpa", Kind.PLAIN),
]


def check(family, specimen, kind):
    finding = examine(specimen, kind, gradients=kind is Kind.PLAIN)
    assert finding.equal, finding
    assert finding.decision() == EXPECTED[family][specimen.name][specimen.implementation][kind.value]
    if finding.switchable:
        assert finding.sparse > 1e-3  # the small budget does leave keys out


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("architecture", "implementation", "kind"), FAST, ids=lambda part: getattr(part, "value", part)
)
def test_a_transformers_model_is_decided_as_recorded_and_equal(architecture, implementation, kind):
    check("transformers", huggingface.specimen(architecture, implementation), kind)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("architecture", written.architectures())
def test_a_model_written_for_the_tests_is_decided_as_recorded_and_equal(architecture):
    for specimen in written.specimens(architecture):
        check("written for the tests", specimen, Kind.PLAIN)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("architecture", ["torchtune llama3_2", "litgpt Llama-3.2-1B", "x-transformers alibi"])
def test_a_model_of_another_package_is_decided_as_recorded_and_equal(architecture):
    try:
        found = list(packages.specimens(architecture))
    except CannotBuildError as error:
        pytest.skip(str(error))
    for specimen in found:
        check("packages", specimen, Kind.PLAIN)


def test_the_record_covers_the_zoo_and_holds_no_wrong_rewrite():
    assert {family: set(module.architectures()) for family, module in FAMILIES.items()} == {
        family: set(entries) for family, entries in EXPECTED.items()
    }
    for entries in EXPECTED.values():
        for architecture, implementations in entries.items():
            for implementation, kinds in implementations.items() if "unbuilt" not in implementations else ():
                for kind, decision in kinds.items():
                    assert decision["equal"], (architecture, implementation, kind)
                    assert "INTERNAL" not in decision["reasons"], (architecture, implementation, kind)


def test_every_recorded_dense_site_has_a_true_cause():
    assert unexplained(EXPECTED) == []


def test_results_are_kept_and_gone_on_from(monkeypatch, tmp_path):
    kept = tmp_path / "results"
    arguments = ["zoo", "nanoGPT style", "llama2.c style", "--results", str(kept)]
    monkeypatch.setattr("sys.argv", arguments)
    asked = []

    def run(wanted, _workers):
        asked.append(list(wanted))
        for family, architecture in wanted[:1]:  # and is stopped
            yield Result(family, architecture, {"fused": {"plain": Finding(calls=2, covering=0.5, tolerance=1.0)}})

    monkeypatch.setattr(zoo_command, "run_zoo", run)
    with pytest.raises(KeyError):
        zoo_command.main()
    assert zoo_command.main() == 0
    names = ["llama2.c style", "nanoGPT style"]
    assert asked == [[("written for the tests", name) for name in rest] for rest in (names, names[1:])]
    found = [Result.from_json(line) for line in kept.read_text().splitlines()]
    assert [result.architecture for result in found] == names
    assert found[0].findings["fused"]["plain"].equal


@pytest.mark.timeout(120)
def test_processes_are_replaced(monkeypatch):
    monkeypatch.setattr(running, "PROCESS_LIFE", 2)
    worker = running._Worker()
    processes = []
    for _ in range(3):
        assert "draft model" in worker.ask("transformers", "gemma4_assistant").unbuilt
        processes.append(worker._process)
    worker.stop()
    assert processes[0] is processes[1] is not processes[2]


@pytest.mark.parametrize("keeps", [True, False], ids=["padding kept out", "padding shows"])
def test_a_model_whose_padding_shows_is_not_held_to_its_output(keeps, monkeypatch):
    """Where numbers differ in a padded batch it is an error, unless the model itself has no fixed output there."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(96, 24)

        def forward(self, ids, mask):
            x = self.embedding(ids)
            x = x * mask[..., None] if keeps else x
            heads = x.unflatten(-1, (3, 8)).transpose(1, 2)
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            seen = causal & mask[:, None, None].bool() if keeps else causal
            return (
                torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, seen).transpose(1, 2).flatten(2)
            )

    def wrong(call):
        """An oracle that is off."""
        return lambda *args: (call(*args)[0] * 1.5, None)

    torch.manual_seed(0)
    model = Model().double()
    specimen = Specimen("test", "own", lambda: model, lambda m, batch: m(batch.ids, batch.attention_mask))
    assert examine(specimen, Kind.PADDED).equal
    monkeypatch.setattr(oracle, "_block_attention", wrong(oracle._block_attention))
    finding = examine(specimen, Kind.PADDED)
    assert finding.equal is (not keeps)
    assert ("padding" in finding.unusable) is (not keeps)


READ_FAST = ["cohere", "deepseek_v2", "deepseek_v3", "glm", "gpt2", "gpt_neox", "gptj", "llama", "mimo_v2_flash", "phi"]
"""Architectures whose keys turn by their positions alone, and one without a rotary embedding."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("architecture", READ_FAST)
def test_the_keys_of_a_transformers_model_turn_as_recorded_and_as_measured(architecture):
    found = read_keys(next(iter(huggingface.specimens(architecture))))
    assert list(dict.fromkeys(keys.text for keys in found)) == channels.record()["transformers"][architecture]
    turned = [keys for keys in found if isinstance(keys.rotary, Rotary)]
    assert bool(turned) is (architecture != "gpt2")
    for keys in turned:
        angles = measured(keys.keys, keys.rotary)
        assert all(low <= high + 1e-6 for low, high in pairwise(angles)), angles


def test_the_record_of_keys_covers_the_zoo():
    recorded = channels.record()
    for family in ("transformers", "written for the tests"):
        built = {name for name, entry in EXPECTED[family].items() if "unbuilt" not in entry}
        assert set(recorded[family]) == built
    texts = {text for entries in recorded.values() for entry in entries.values() for text in entry}
    assert not [text for text in texts if "is not followed" in text or "is not known" in text]
    assert TABLE.read_text().endswith(channels.section())
