"""Intervals against published and computed values, and how often they hold what they should."""

import math
import random

import pytest

from infllm_pass.evaluation.statistics import bootstrap_mean, relative_perplexity, wilson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(hits, trials, low, high):
    assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "trials", "confidence"), [(3, 7, 0.9), (0, 5, 0.95), (12, 12, 0.99)])
def test_wilson_agrees_with_scipy(hits, trials, confidence):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, trials).proportion_ci(confidence, method="wilson")
    assert wilson(hits, trials, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_ends_where_the_score_test_does():
    """By definition: the share at either end is just as far from the observed one as the quantile says."""
    for end in wilson(5, 17):
        assert abs(5 / 17 - end) / math.sqrt(end * (1 - end) / 17) == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(hits, trials):
    with pytest.raises(ValueError, match="hits of"):
        wilson(hits, trials)


def test_bootstrap_is_as_wide_as_the_normal_interval_of_many_values():
    draw = random.Random(1)
    values = [draw.gauss(2.0, 1.0) for _ in range(400)]
    mean = sum(values) / 400
    spread = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values) / 400 / 400)
    assert bootstrap_mean([values]) == pytest.approx((mean - spread, mean + spread), abs=0.02)


def test_bootstrap_gives_each_group_the_same_weight_and_redraws_within_it():
    assert bootstrap_mean([[1.0] * 3, [3.0] * 50]) == (2.0, 2.0)
    assert bootstrap_mean([[1.0, 2.0, 5.0]]) == bootstrap_mean([[1.0, 2.0, 5.0]])
    assert bootstrap_mean([[1.0, 2.0, 5.0]], seed=1) != bootstrap_mean([[1.5, 2.0, 5.0]], seed=1)


def test_bootstrap_holds_the_mean_about_as_often_as_it_says():
    draw = random.Random(2)
    held = 0
    for seed in range(200):
        low, high = bootstrap_mean([[draw.gauss(0, 1) for _ in range(30)]], seed=seed)
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_differences_of_loss_become_ratios_of_perplexity():
    assert relative_perplexity([math.log(1.02)] * 3) == pytest.approx(0.02)
    assert relative_perplexity([0.0]) == 0.0
