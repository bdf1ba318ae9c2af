"""How token counts and scores are distributed: kept short beside a model, and compared with those of other images.

The population stability index says how large a difference is, a two-sample test whether it may be chance. With few
images the index is large by chance alone, with many the test finds what nobody would mind; so neither is read alone.

Legend: N images, K budgets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from components.artifacts import ScoreTable, TokenCounts
from components.config import RuleConfig
from components.parts import part_names
from components.rules import describe
from components.scores import budgets_of, larger_is_better, score_files, whole_column
from components.store import filesystem

SAMPLE = 512  # values of a metric that are kept: evenly spaced in rank
BINS = 10  # of the index of a metric: deciles of the reference
HALF = 0.5  # image that is added to every bin, so that an empty one has a logarithm
EXPECTED = 5  # images a cell of the chi-square test must expect; neighbours are merged until it does


@dataclass(frozen=True)
class Difference:
    """Between two samples."""

    psi: float  # population stability index: below 0.1 small, above 0.2 large, by the usual rule of thumb
    p_value: float  # of a difference like this or larger between two samples of one distribution


def reference_of(scores: ScoreTable, counts: Mapping[str, TokenCounts]) -> dict[str, Any]:
    """What is kept of the train split (of all images where there is none) as JSON, some tens of kilobytes.

    ``images``; ``counts``: task -> its rule in words, ``tokens`` and ``images`` of each count; ``scores``: column ->
    budget, the smallest and the largest -> at most SAMPLE values.
    """
    budgets = budgets_of(scores)
    split = np.concatenate([np.asarray(table["split"]).astype(str) for _, table in score_files(scores, ["split"])])
    rows = split == "train" if (split == "train").any() else np.full(len(split), True)
    return {
        "images": int(rows.sum()),
        "counts": {
            task: {
                "rule": describe(RuleConfig.model_validate(chosen.manifest.config["rule"])),
                "tokens": budgets,
                "images": histogram(tokens_of(chosen)[rows], budgets),
            }
            for task, chosen in counts.items()
        },
        "scores": {
            name: {str(budgets[at]): sample(values[:, at]) for at in dict.fromkeys((0, len(budgets) - 1))}
            for name in larger_is_better(scores)
            for values in [whole_column(scores, name)[rows]]
        },
    }


def tokens_of(counts: TokenCounts, parts: Sequence[str] | None = None) -> np.ndarray:
    """Token counts [N] of all rows, or of the files named ``parts``."""
    store, folder = filesystem(counts.table_uri)
    names = part_names(counts.table_uri) if parts is None else parts
    tables = [pq.read_table(f"{folder}/{name}", filesystem=store, columns=["num_tokens"]) for name in names]
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(table["num_tokens"]) for table in tables)])


def histogram(tokens: np.ndarray, budgets: Sequence[int]) -> list[int]:
    """How many images have each of the ``budgets``."""
    return [int((tokens == budget).sum()) for budget in budgets]


def sample(values: np.ndarray) -> list[float]:
    """The finite ``values`` in order, or SAMPLE of them evenly spaced in rank, to six digits."""
    ordered = np.sort(values[np.isfinite(values)])
    if len(ordered) > SAMPLE:
        ordered = ordered[((np.arange(SAMPLE) + HALF) * len(ordered) / SAMPLE).astype(int)]
    return [float(f"{value:.6g}") for value in ordered]


def stability_index(expected: Sequence[int], actual: Sequence[int]) -> float:
    """PSI of two histograms over the same bins: the sum of (a - e) ln(a / e) over the bins' shares a and e.

    Half an image is added to each bin.
    """
    shares = []
    for counts in (expected, actual):
        filled = np.asarray(counts, dtype=np.float64) + HALF
        shares.append(filled / filled.sum())
    e, a = shares
    return float(((a - e) * np.log(a / e)).sum())


def compare_counts(expected: Sequence[int], actual: Sequence[int]) -> Difference:
    """Two histograms over the same counts: PSI, and a chi-square test of one distribution for both."""
    from scipy.stats import chi2_contingency

    table = _merged(np.array([expected, actual], dtype=np.int64))
    p_value = chi2_contingency(table, correction=False).pvalue if table.shape[1] > 1 else 1.0
    return Difference(stability_index(expected, actual), float(p_value))


def _merged(table: np.ndarray) -> np.ndarray:
    """Columns with too few images joined to their right neighbours, the last ones to their left."""
    least = table.sum(axis=1).min() / table.sum()  # share of the smaller sample
    columns: list[np.ndarray] = []
    held = np.zeros(2, dtype=np.int64)
    for column in table.T:
        held = held + column
        if held.sum() * least >= EXPECTED:
            columns.append(held)
            held = np.zeros(2, dtype=np.int64)
    if columns:
        columns[-1] = columns[-1] + held
    return np.stack(columns or [held], axis=1)


def compare_scores(expected: Sequence[float], actual: np.ndarray) -> Difference:
    """Two samples of a metric: PSI over deciles of the first, and the Kolmogorov-Smirnov test."""
    from scipy.stats import ks_2samp

    edges = np.unique(np.quantile(expected, np.linspace(0, 1, BINS + 1)[1:-1]))
    binned = [np.bincount(np.searchsorted(edges, v, side="left"), minlength=len(edges) + 1) for v in (expected, actual)]
    return Difference(stability_index(*binned), float(ks_2samp(expected, actual).pvalue))
