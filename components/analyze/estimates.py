"""Estimates with bootstrap intervals over images.

Legend: N, M images.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np

Statistic = Callable[..., np.ndarray]
BATCH = 50  # resamples at once


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95% bootstrap interval over images (NaN: none) and their number."""

    value: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        """The figure with its interval, short enough for a table."""
        if isnan(self.value):
            return "undefined"
        interval = f" [{self.low:.3g}, {self.high:.3g}]" if not isnan(self.low) else ""
        return f"{self.value:.3g}{interval}"


@dataclass(frozen=True)
class Bootstrap:
    """95% percentile intervals by scipy.stats.bootstrap, the same for the same seed."""

    resamples: int
    seed: int

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean of [N]; images without a finite value don't count."""
        return self.of([values[np.isfinite(values)]], np.mean)

    def spearman(self, one: np.ndarray, other: np.ndarray) -> Estimate:
        """Rank correlation of [N] with [N]; NaN when either is constant."""
        present = np.isfinite(one) & np.isfinite(other)
        return self.of([one[present], other[present]], spearman, paired=True)

    def difference(self, one: np.ndarray, other: np.ndarray) -> Estimate:
        """Mean of [N] less mean of [M], of different images."""
        return self.of([one, other], lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis))

    def of(self, samples: Sequence[np.ndarray], statistic: Statistic, *, paired: bool = False) -> Estimate:
        """Any statistic of samples that takes ``axis``; its images are the first sample's."""
        from scipy.stats import bootstrap

        number = len(samples[0])
        if min(len(sample) for sample in samples) == 0:
            return Estimate(np.nan, np.nan, np.nan, number)
        value = float(statistic(*samples, axis=-1))
        if min(len(sample) for sample in samples) < 2 or not np.isfinite(value):
            return Estimate(value, np.nan, np.nan, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resample of equal values has no correlation: its interval is NaN
            found = bootstrap(
                [np.asarray(sample, dtype=np.float64) for sample in samples],
                statistic,
                n_resamples=self.resamples,
                batch=BATCH,
                paired=paired,
                vectorized=True,
                method="percentile",
                rng=np.random.default_rng(self.seed),
            )
        low, high = found.confidence_interval
        return Estimate(value, float(low), float(high), number)


def spearman(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
    """Rank correlation along ``axis``: Pearson's of the ranks, ties at their mean rank; NaN for a constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=axis) for values in (one, other)]
    a, b = (rank - rank.mean(axis=axis, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=axis) / np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))


def mann_whitney(one: np.ndarray, other: np.ndarray) -> float:
    """P-value of the two-sided Mann-Whitney test that neither of [N] and [M] tends to be larger."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(one, other).pvalue)


def superiority(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
    """Chance that a value of [..., N] is above one of [..., M], ties half: 0.5 where they are alike.

    The statistic of the Mann-Whitney test over its largest value; along the last axis.
    """
    from scipy.stats import rankdata

    first, second = one.shape[axis], other.shape[axis]
    ranks = rankdata(np.concatenate([one, other], axis=axis), axis=axis)[..., :first].sum(axis=axis)
    return (ranks - first * (first + 1) / 2) / (first * second)
