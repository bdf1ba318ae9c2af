"""Selection rules: monotone, exact on hand-made tables, optimal on hulls."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model import Best, FixedTokens, MeanTokens, Threshold, Within

BUDGETS = (32, 64, 96, 128)
tables = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, 4), elements=st.floats(0, 1)))
NAN = float("nan")


@given(tables, st.floats(0, 1), st.floats(0, 1))
def test_a_lower_target_never_gives_fewer_tokens(values, one, other):
    strict, lax = sorted((one, other))
    fewer = Threshold("l1", max=lax).select(values, BUDGETS)
    more = Threshold("l1", max=strict).select(values, BUDGETS)
    assert (more.num_tokens >= fewer.num_tokens).all()
    assert (more.satisfied <= fewer.satisfied).all()
    assert (
        Within("l1", 1 + strict).select(values, BUDGETS).column >= Within("l1", 1 + lax).select(values, BUDGETS).column
    ).all()


@given(tables, st.floats(0, 1))
def test_threshold_is_the_first_that_meets_it(values, limit):
    for rule, good in ((Threshold("l1", max=limit), values <= limit), (Threshold("psnr", min=limit), values >= limit)):
        chosen = rule.select(values, BUDGETS)
        for row, column in enumerate(chosen.column):
            assert not good[row, :column].any()
            assert good[row, column] == chosen.satisfied[row]
            assert chosen.satisfied[row] or column == 3
        assert (chosen.value == values[np.arange(len(values)), chosen.column]).all()


@given(tables, st.floats(0, 1))
def test_what_is_settled_is_what_is_chosen(values, limit):
    """Stopping at the first settled column gives the choice that the whole row gives."""
    for rule in (Threshold("l1", max=limit), Within("l1", 1.1), Best("l1"), FixedTokens(64)):
        column = rule.select(values, BUDGETS).column
        stopped = np.full(len(values), 3)
        for k in reversed(range(3)):
            settled = rule.settled(values[:, : k + 1])
            stopped[settled] = k
            assert (column[settled] <= k).all()
        assert (stopped >= column).all()
        if not rule.reads_last:
            unread = values.copy()
            unread[:, -1] = NAN
            assert (rule.select(unread, BUDGETS).column == column).all()


@given(tables)
def test_best_is_best_with_fewest_tokens(values):
    chosen = Best("l1").select(values, BUDGETS)
    assert (chosen.value == values.min(1)).all()
    for row, column in enumerate(chosen.column):
        assert (values[row, :column] > values[row].min()).all()
    assert (Best("psnr").select(values, BUDGETS).value == values.max(1)).all()


def test_nan_is_never_good_enough():
    values = np.array([[NAN, 0.1, NAN, 0.0], [NAN, NAN, NAN, NAN], [0.5, NAN, 0.1, NAN]])
    assert Threshold("l1", max=0.2).select(values, BUDGETS).column.tolist() == [1, 3, 2]
    assert Threshold("l1", max=0.2).select(values, BUDGETS).satisfied.tolist() == [True, False, True]
    assert Best("l1").select(values, BUDGETS).column.tolist() == [3, 3, 2]
    assert Within("l1", 2.0).select(values, BUDGETS).satisfied.tolist() == [True, False, False]
    assert MeanTokens("l1", 128).select(values, BUDGETS).column.tolist() == [3, 0, 2]


def lower_hull_points(row: np.ndarray) -> list[int]:
    """Columns on the lower convex hull of (tokens, value), left to right as far as it falls."""
    tokens, here, points = np.array(BUDGETS), 0, [0]
    while here < 3:
        slopes = (row[here + 1 :] - row[here]) / (tokens[here + 1 :] - tokens[here])
        step = len(slopes) - 1 - int(np.argmin(slopes[::-1]))
        if slopes[step] >= 0:
            break
        here += 1 + step
        points.append(here)
    return points


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda n: arrays(np.float64, (n, 4), elements=st.integers(0, 50).map(float))),
    st.integers(32, 128),
)
def test_mean_tokens_against_every_allocation(values, mean):
    chosen = MeanTokens("l1", mean).select(values, BUDGETS)
    tokens = np.array(BUDGETS)
    assert chosen.num_tokens.mean() <= mean
    allocations = [
        c for c in itertools.product(range(4), repeat=len(values)) if tokens[list(c)].sum() <= mean * len(values)
    ]
    rows = np.arange(len(values))
    best = min(values[rows, list(c)].sum() for c in allocations)
    total = values[rows, chosen.column].sum()
    assert best - 1e-9 <= total <= best + chosen.gap_bound + 1e-9
    spent = chosen.num_tokens.sum()
    on_hull = [
        c for c in itertools.product(*(lower_hull_points(row) for row in values)) if tokens[list(c)].sum() <= spent
    ]
    assert total <= min(values[rows, list(c)].sum() for c in on_hull) + 1e-9, "optimal on the hulls for what it spends"


def test_many_images_are_chosen_for_at_once():
    rng = np.random.default_rng(0)
    values = np.sort(rng.random((100_000, 8), dtype=np.float32), axis=1)[:, ::-1]
    budgets = tuple(range(32, 257, 32))
    chosen = MeanTokens("l1", 100).select(values, budgets)
    assert 99.9 < chosen.num_tokens.mean() <= 100
    fixed = values[:, 2].sum()  # 96 tokens for all
    assert chosen.value.sum() < fixed


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Threshold("l1"), "exactly one"),
        (lambda: Threshold("l1", max=1, min=0), "exactly one"),
        (lambda: Within("l1", 0.9), "at least 1"),
        (lambda: MeanTokens("l1", 20).select(np.zeros((1, 4)), BUDGETS), "smallest budget, 32"),
        (lambda: FixedTokens(33).select(np.zeros((1, 4)), BUDGETS), "num_tokens = 33"),
        (lambda: Best("l1").select(np.zeros((1, 3)), BUDGETS), "one column for each"),
    ],
)
def test_what_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
