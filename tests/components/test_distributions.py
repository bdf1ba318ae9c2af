"""How two samples are compared: against numbers worked out by hand, and what must hold of any."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.distributions import SAMPLE, compare_counts, compare_scores, histogram, sample, stability_index

histograms = st.integers(2, 8).flatmap(
    lambda bins: st.tuples(*(st.lists(st.integers(0, 500), min_size=bins, max_size=bins) for _ in range(2)))
)


def test_stability_index_by_hand() -> None:
    """Shares (9.5, 89.5 + 0.5 + ...): half an image more in each of two bins of 99 images."""
    before, after = (0.095, 0.905), (0.505, 0.495)  # (9, 90) and (50, 49) of 99, and a half in each of two bins
    by_hand = sum((a - e) * log(a / e) for e, a in zip(before, after, strict=True))
    assert stability_index([9, 90], [50, 49]) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.932, abs=1e-3)


def test_chi_square_by_hand() -> None:
    """(30, 70) and (50, 50): each cell differs from its expectation by 10; 200/40 + 200/60 = 8.33, 1 degree."""
    found = compare_counts([30, 70], [50, 50])
    assert found.p_value == pytest.approx(0.0038924, rel=1e-4)  # survival function of chi-square at 8.3333, df 1
    assert compare_counts([10, 0, 0], [7, 0, 0]).p_value == 1.0


def test_kolmogorov_smirnov_by_hand() -> None:
    """Two of four against four others, all apart: of C(8, 4) = 70 orders two are as far apart."""
    assert compare_scores([0.1, 0.2, 0.3, 0.4], np.array([0.5, 0.6, 0.7, 0.8])).p_value == pytest.approx(2 / 70)


@settings(max_examples=60, deadline=None)
@given(histograms)
def test_what_holds_of_any_two_histograms(pair: tuple[list[int], list[int]]) -> None:
    one, other = pair
    assert stability_index(one, other) >= 0
    assert stability_index(one, other) == pytest.approx(stability_index(other, one))
    assert stability_index(one, one) == 0
    if sum(one) and sum(other):
        assert 0 <= compare_counts(one, other).p_value <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_a_sample_against_itself_differs_by_nothing(values: list[float]) -> None:
    found = compare_scores(values, np.array(values))
    assert found.psi == pytest.approx(0) and found.p_value == pytest.approx(1)


def test_samples_of_one_distribution_pass_and_of_another_do_not() -> None:
    generator = np.random.default_rng(0)
    known = sample(generator.normal(0.08, 0.02, 5000))
    same, other = (compare_scores(known, generator.normal(mean, 0.02, 200)) for mean in (0.08, 0.1))
    assert same.p_value > 0.01 and same.psi < 0.2
    assert other.p_value < 0.01 and other.psi > 0.2


def test_a_sample_is_bounded_in_order_and_finite() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    values[:3] = np.nan, np.inf, -np.inf
    kept = sample(values)
    assert len(kept) == SAMPLE and kept == sorted(kept)
    assert np.median(kept) == pytest.approx(np.median(values[3:]), abs=0.01)
    assert sample(np.array([0.3, np.nan, 0.1])) == [0.1, 0.3]


def test_histogram_has_every_budget() -> None:
    assert histogram(np.array([8, 16, 8]), [8, 16, 24]) == [2, 1, 0]
