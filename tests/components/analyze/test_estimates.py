"""Estimates against known answers and against scipy's own."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, spearmanr

from components.analyze.estimates import Bootstrap, mann_whitney, spearman, superiority

BOOTSTRAP = Bootstrap(resamples=300, seed=0)


def test_ranks_that_agree_and_that_are_reversed() -> None:
    values = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.6])
    assert BOOTSTRAP.spearman(values, values**3).value == pytest.approx(1)
    assert BOOTSTRAP.spearman(values, -np.exp(values)).value == pytest.approx(-1)


def test_spearman_is_scipys_with_ties_and_along_an_axis() -> None:
    generator = np.random.default_rng(1)
    one, other = generator.integers(0, 5, (3, 40)), generator.integers(0, 5, (3, 40))
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    assert spearman(one, other) == pytest.approx(expected)


def test_a_constant_has_no_correlation() -> None:
    found = BOOTSTRAP.spearman(np.ones(10), np.arange(10.0))
    assert np.isnan([found.value, found.low, found.high]).all() and found.images == 10
    assert str(found) == "undefined"


def test_missing_values_count_for_nothing() -> None:
    found = BOOTSTRAP.mean(np.array([1.0, np.nan, 3.0]))
    assert (found.value, found.images) == (2.0, 2)
    assert np.isnan(BOOTSTRAP.mean(np.array([])).value)
    assert np.isnan(BOOTSTRAP.mean(np.array([5.0])).low)  # one image has no interval


def test_intervals_are_seeded_and_narrow_with_images() -> None:
    values = np.random.default_rng(2).normal(size=400)
    few, many = BOOTSTRAP.mean(values[:25]), BOOTSTRAP.mean(values)
    assert few == BOOTSTRAP.mean(values[:25])
    assert few.low < few.value < few.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.2)


def test_a_difference_of_two_sets() -> None:
    found = BOOTSTRAP.difference(np.arange(50.0) + 10, np.arange(50.0))
    assert found.value == pytest.approx(10) and found.low < 10 < found.high


def test_superiority_is_the_statistic_of_mann_whitney() -> None:
    generator = np.random.default_rng(3)
    one, other = generator.integers(0, 8, 30), generator.integers(2, 10, 20)
    assert superiority(one, other) == pytest.approx(mannwhitneyu(one, other).statistic / 600)
    assert superiority(np.array([5.0]), np.array([1.0, 2.0])) == 1
    assert mann_whitney(np.arange(30.0), np.arange(30.0)) > 0.9
    assert mann_whitney(np.arange(30.0), np.arange(30.0) + 100) < 1e-6
