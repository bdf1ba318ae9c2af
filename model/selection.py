"""How many tokens an image gets: pure functions over an array of metric values, one column per budget.

Every rule has ``select(values, budgets)``: values float [N, K] (row: image, column: budget, fewest tokens first) and
budgets [K] increasing. NaN is never good enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
LARGER_IS_BETTER = frozenset(
    {
        *("psnr", "ssim", "ms_ssim", "accuracy", "correct", "agreement", "probability", "probability_label"),
        *("delta1", "delta1_judge", "miou", "miou_judge", "cosine", "recall1", "recall5"),
    }
)


@dataclass(frozen=True)
class Selection:
    """The choice for N images."""

    column: NDArray[np.int64]  # [N], index into the budgets
    num_tokens: NDArray[np.int64]  # [N]
    value: Floats  # [N], the metric at the chosen count
    satisfied: NDArray[np.bool_]  # [N], whether the rule's condition holds there
    gap_bound: float = 0.0  # MeanTokens: the total can be at most this far above the optimum on the hulls


class Rule(Protocol):
    """A selection rule."""

    @property
    def metric(self) -> str:
        """The metric whose values the rule reads."""
        ...

    def select(self, values: Floats, budgets: Sequence[int]) -> Selection:
        """Choose one budget an image."""
        ...

    def settled(self, values: Floats) -> NDArray[np.bool_]:
        """For values [N, k] of the first k budgets: images whose choice is their last column, whatever would follow."""
        ...

    @property
    def reads_last(self) -> bool:
        """Whether the value at the most tokens can change the choice; if not, it need not be measured."""
        ...


def _checked(values: Floats, budgets: Sequence[int]) -> Floats:
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] != len(budgets):
        raise ValueError(
            f"values has shape {values.shape}: one column for each of the {len(budgets)} budgets is needed"
        )
    return values


def _first(good: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The first True of each row, else the last column; and whether there was one."""
    satisfied: NDArray[np.bool_] = np.asarray(good.any(axis=1))
    return np.where(satisfied, good.argmax(axis=1), good.shape[1] - 1).astype(np.int64), satisfied


def _selection(values: Floats, budgets: Sequence[int], column: NDArray[np.int64], ok: NDArray[np.bool_]) -> Selection:
    return Selection(column, np.asarray(budgets, dtype=np.int64)[column], values[np.arange(len(values)), column], ok)


@dataclass(frozen=True)
class Threshold:
    """The fewest tokens whose metric is at most ``max`` (or at least ``min``); if none is, the most tokens."""

    metric: str
    max: float | None = None
    min: float | None = None

    def __post_init__(self) -> None:
        if (self.max is None) == (self.min is None):
            raise ValueError(f"Threshold(max={self.max}, min={self.min}): exactly one of the two is needed")

    def _good(self, values: Floats) -> NDArray[np.bool_]:
        if self.max is not None:
            return np.asarray(values <= self.max)
        assert self.min is not None
        return np.asarray(values >= self.min)

    def select(self, values: Floats, budgets: Sequence[int]) -> Selection:
        """Choose one budget an image."""
        values = _checked(values, budgets)
        return _selection(values, budgets, *_first(self._good(values)))

    def settled(self, values: Floats) -> NDArray[np.bool_]:
        """Met at the last column."""
        return self._good(values[:, -1])

    @property
    def reads_last(self) -> bool:
        """No: an image that comes so far gets the most tokens either way."""
        return False


class _NeedsEveryBudget:
    """A rule that can decide nothing before it has seen the largest budget."""

    def settled(self, values: Floats) -> NDArray[np.bool_]:
        """Never."""
        return np.zeros(len(values), dtype=bool)

    @property
    def reads_last(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True)
class Within(_NeedsEveryBudget):
    """The fewest tokens whose metric is within ``ratio`` >= 1 of the image's own value at the most tokens.

    Lower is better: value <= ratio * last. Higher is better: value * ratio >= last.
    """

    metric: str
    ratio: float
    larger_is_better: bool | None = None  # None: as the metric's name says

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise ValueError(f"Within(ratio={self.ratio}): at least 1 is needed")

    def select(self, values: Floats, budgets: Sequence[int]) -> Selection:
        """Choose one budget an image."""
        values = _checked(values, budgets)
        last = values[:, -1:]
        larger = _larger_is_better(self.metric, self.larger_is_better)
        good = values * self.ratio >= last if larger else values <= self.ratio * last
        return _selection(values, budgets, *_first(good))


@dataclass(frozen=True)
class Best(_NeedsEveryBudget):
    """The best value; the fewest tokens among equals."""

    metric: str
    larger_is_better: bool | None = None  # None: as the metric's name says

    def select(self, values: Floats, budgets: Sequence[int]) -> Selection:
        """Choose one budget an image; satisfied unless every value is NaN."""
        values = _checked(values, budgets)
        loss = _as_loss(values, _larger_is_better(self.metric, self.larger_is_better))
        good = (loss == loss.min(axis=1, keepdims=True)) & ~np.isnan(values)
        return _selection(values, budgets, *_first(good))


def _larger_is_better(metric: str, given: bool | None) -> bool:
    return metric in LARGER_IS_BETTER if given is None else given


def _as_loss(values: Floats, larger_is_better: bool) -> Floats:
    """Lower is better, NaN is the worst."""
    loss = -values if larger_is_better else values
    return np.where(np.isnan(values), np.inf, loss)


@dataclass(frozen=True)
class FixedTokens(_NeedsEveryBudget):
    """The same count for every image."""

    num_tokens: int
    metric: str = "l1"

    def select(self, values: Floats, budgets: Sequence[int]) -> Selection:
        """Choose ``num_tokens``; raises ValueError when it is no budget."""
        values = _checked(values, budgets)
        if self.num_tokens not in budgets:
            raise ValueError(f"num_tokens = {self.num_tokens}: allowed are the budgets {list(budgets)}")
        column = np.full(len(values), list(budgets).index(self.num_tokens), dtype=np.int64)
        return _selection(values, budgets, column, np.ones(len(values), dtype=bool))


@dataclass(frozen=True)
class MeanTokens(_NeedsEveryBudget):
    """Over the whole set: the smallest total of the metric with at most ``mean`` tokens an image.

    Each image's values become the lower convex hull of its (tokens, value) points; hull edges of all images are taken
    steepest first while they fit. That is optimal over hull points for the tokens it spends; with the tokens left over
    the total could fall by at most ``gap_bound`` (the first edge that did not fit, in proportion).
    """

    metric: str
    mean: float
    larger_is_better: bool | None = None  # None: as the metric's name says

    def select(self, values: Floats, budgets: Sequence[int]) -> Selection:
        """Choose one budget an image; raises ValueError when ``mean`` is below the smallest budget."""
        values = _checked(values, budgets)
        tokens = np.asarray(budgets, dtype=np.int64)
        if not self.mean >= tokens[0]:
            raise ValueError(
                f"MeanTokens(mean={self.mean}): the smallest budget, {tokens[0]}, is the least there can be"
            )
        loss = _as_loss(values, _larger_is_better(self.metric, self.larger_is_better)).astype(np.float64)
        start, edges = _hull_edges(loss, tokens)
        spare = int(np.floor(self.mean * len(values))) - int(tokens[start].sum())
        order = np.lexsort((edges.source, edges.image, -edges.slope))
        spent = np.cumsum(edges.cost[order])
        taken = int(np.searchsorted(spent, spare, side="right"))
        column = start.copy()
        np.maximum.at(column, edges.image[order[:taken]], edges.target[order[:taken]])
        left = spare - (int(spent[taken - 1]) if taken else 0)
        gap = float(edges.slope[order[taken]] * left) if taken < len(order) else 0.0
        chosen = _selection(values, budgets, column, np.isfinite(loss[np.arange(len(loss)), column]))
        return Selection(chosen.column, chosen.num_tokens, chosen.value, chosen.satisfied, gap)


@dataclass(frozen=True)
class _Edges:
    """Hull edges of all images: where each starts and ends, what it costs in tokens, what it gains a token."""

    image: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    cost: NDArray[np.int64]
    slope: Floats


def _hull_edges(loss: Floats, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], _Edges]:
    """Each image's first usable budget, and the falling edges of its lower convex hull from there."""
    num_images, num_budgets = loss.shape
    finite = np.isfinite(loss)
    start = np.where(finite.any(axis=1), finite.argmax(axis=1), 0).astype(np.int64)
    here, active = start.copy(), finite.any(axis=1)
    parts: list[tuple[NDArray[Any], ...]] = []
    rows = np.arange(num_images)
    for _ in range(num_budgets - 1):
        with np.errstate(invalid="ignore", divide="ignore"):
            gain = (loss[rows, here][:, None] - loss) / (tokens[None, :] - tokens[here][:, None])
        gain[:, :] = np.where(tokens[None, :] > tokens[here][:, None], gain, -np.inf)
        # The steepest next point; among equally steep ones the farthest, so that collinear points are one edge.
        target = num_budgets - 1 - gain[:, ::-1].argmax(axis=1)
        slope = gain[rows, target]
        active = active & (slope > 0)
        if not active.any():
            break
        at = np.flatnonzero(active)
        parts.append((at, here[at], target[at], tokens[target[at]] - tokens[here[at]], slope[at]))
        here = np.where(active, target, here)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0, np.int64)] * 5
    return start, _Edges(*columns)
