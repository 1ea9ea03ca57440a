"""A fast part of the zoo: decisions as recorded, outputs and gradients equal. The whole runs by ``make zoo``."""

from __future__ import annotations

import json

import pytest

from .zoo import huggingface, packages, written
from .zoo.examination import examine
from .zoo.running import FAMILIES
from .zoo.specimens import CannotBuildError, Kind
from .zoo.table import DECISIONS
from .zoo.truth import unexplained

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
