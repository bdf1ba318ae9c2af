"""select.<task> through its door: what it writes and says for real scores and for every odd row there can be."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from components.artifacts import LengthModel, ScoreTable
from components.config import LengthConfig, NoConfig, RuleConfig
from components.select_counts import equal_quality, select
from components.task_config import TaskConfig
from model.selection import MeanTokens
from tests.by_hand import job, of_photographs, photographs, score_table

NAN = float("nan")
BUDGETS = (8, 16, 32)
RULES = {
    "threshold": {"max": 0.08},
    "within": {"ratio": 1.2},
    "best": {},
    "mean_tokens": {"mean": 24},
    "fixed": {"num_tokens": 16},
}


def task(kind: str = "threshold", metric: str = "l1", **parameters) -> TaskConfig:
    return TaskConfig(name="reconstruction", rule=RuleConfig(kind=kind, metric=metric, **parameters))


def chosen(folder: Path, scores: ScoreTable, config: TaskConfig, **inputs) -> tuple[dict, dict, dict]:
    """Columns of the counts, the stage's figures, the first row of rules.json."""
    figures = select(job(folder), config=config, resources=NoConfig(), scores=scores, **inputs)
    told = json.loads((folder / "rules.json").read_text())["rules"]
    return pq.read_table(folder / "table").to_pydict(), figures, told[0]


@pytest.mark.parametrize("kind", RULES)
def test_figures_are_those_of_the_counts(tmp_path: Path, kind: str) -> None:
    made = photographs(40)
    counts, figures, row = chosen(tmp_path / "out", of_photographs(tmp_path / "in", made), task(kind, **RULES[kind]))
    at = [made.budgets.index(tokens) for tokens in counts["num_tokens"]]
    values = made.scores["l1"][np.arange(40), at]
    assert counts["image_id"] == [row["image_id"] for row in made.rows]
    assert counts["value"] == values.tolist()
    assert figures["mean_tokens"] == np.mean(counts["num_tokens"])
    assert figures["satisfied"] == np.mean(counts["satisfied"])
    assert figures["value"] == pytest.approx(values.mean(dtype=np.float64))
    assert figures["histogram"] == " ".join(f"{b}:{counts['num_tokens'].count(b)}" for b in made.budgets)
    fixed = made.scores["l1"].mean(axis=0, dtype=np.float64)
    if row["fixed_tokens"] is not None:  # the curve falls, so it can be read the other way round
        expected = np.interp(-values.mean(dtype=np.float64), -fixed, made.budgets)
        assert row["fixed_tokens"] == pytest.approx(expected)
        assert row["saved"] == pytest.approx(expected - figures["mean_tokens"])


def test_a_fixed_length_saves_nothing_against_itself(tmp_path: Path) -> None:
    _, figures, _ = chosen(
        tmp_path / "out", of_photographs(tmp_path / "in", photographs(40)), task("fixed", num_tokens=24)
    )
    assert figures["fixed_tokens"] == pytest.approx(24) and figures["saved_share"] == pytest.approx(0)


def test_files_are_those_of_the_scores(tmp_path: Path) -> None:
    made = photographs(40)
    whole, parts = of_photographs(tmp_path / "whole", made, 40), of_photographs(tmp_path / "parts", made, 7)
    for kind, parameters in RULES.items():
        one, figures, _ = chosen(tmp_path / f"{kind}1", whole, task(kind, **parameters))
        other, same, _ = chosen(tmp_path / f"{kind}2", parts, task(kind, **parameters))
        assert one == other
        for name, value in figures.items():
            assert same[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12)), name
        names = [file.name for file in sorted((tmp_path / f"{kind}2" / "table").iterdir())]
        assert names == [file.name for file in sorted((tmp_path / "parts" / "table").iterdir())]


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    made, order = photographs(40), np.random.default_rng(0).permutation(40)
    ids = [row["image_id"] for row in made.rows]
    straight = of_photographs(tmp_path / "in", made)
    shuffled = score_table(
        tmp_path / "shuffled", {"l1": made.scores["l1"][order]}, made.budgets, ids=[ids[row] for row in order]
    )
    for kind, parameters in RULES.items():
        one, _, _ = chosen(tmp_path / f"{kind}1", straight, task(kind, **parameters))
        other, _, _ = chosen(tmp_path / f"{kind}2", shuffled, task(kind, **parameters))
        assert dict(zip(one["image_id"], one["num_tokens"], strict=True)) == dict(
            zip(other["image_id"], other["num_tokens"], strict=True)
        )


def test_a_row_without_scores_gets_the_most_tokens_and_is_counted(tmp_path: Path) -> None:
    values = np.array([[0.3, 0.2, 0.1], [NAN, NAN, NAN], [0.1, NAN, NAN], [NAN, 0.05, NAN]])
    scores = score_table(tmp_path / "in", {"l1": values}, BUDGETS, rows_per_file=2)
    for kind, parameters in {**RULES, "fixed": {"num_tokens": 8}}.items():
        counts, figures, row = chosen(tmp_path / kind, scores, task(kind, **parameters))
        assert (counts["num_tokens"][1], counts["value"][1], counts["satisfied"][1]) == (32, None, False), kind
        assert figures["missing"] == row["missing"] == 1
        assert row["compared"] == 1
        for value, satisfied in zip(counts["value"], counts["satisfied"], strict=True):
            assert value is not None or not satisfied, kind


def test_missing_rows_take_nothing_from_the_others_mean(tmp_path: Path) -> None:
    values = np.array([[0.3, 0.2, 0.1], [0.3, 0.2, 0.1], [NAN, NAN, NAN], [NAN, NAN, NAN]])
    scores = score_table(tmp_path / "in", {"l1": values}, BUDGETS)
    counts, _, _ = chosen(tmp_path / "out", scores, task("mean_tokens", mean=16))
    assert sum(counts["num_tokens"][:2]) <= 32 and counts["num_tokens"][2:] == [32, 32]


def test_all_none_and_ties(tmp_path: Path) -> None:
    flat = score_table(tmp_path / "flat", {"l1": np.full((5, 3), 0.1)}, BUDGETS)
    everyone, figures, _ = chosen(tmp_path / "all", flat, task(max=0.5))
    assert everyone["num_tokens"] == [8] * 5 and figures["satisfied"] == 1 and figures["saved_share"] == 0
    nobody, figures, row = chosen(tmp_path / "none", flat, task(max=0.01))
    assert nobody["num_tokens"] == [32] * 5 and figures["satisfied"] == 0
    assert row["fixed_tokens"] == 8 and row["saved"] == -24  # equals get the fewest tokens: 24 are spent for nothing
    for kind in ("best", "mean_tokens"):
        tied, _, _ = chosen(tmp_path / kind, flat, task(kind, **RULES[kind]))
        assert tied["num_tokens"] == [8] * 5


def test_one_image(tmp_path: Path) -> None:
    one = score_table(tmp_path / "in", {"l1": np.array([[0.3, 0.2, 0.1]])}, BUDGETS)
    counts, figures, _ = chosen(tmp_path / "out", one, task(max=0.2))
    assert counts["num_tokens"] == [16] and figures["fixed_tokens"] == 16
    lost = score_table(tmp_path / "lost", {"l1": np.full((1, 3), NAN)}, BUDGETS)
    counts, figures, row = chosen(tmp_path / "lost-out", lost, task(max=0.2))
    assert counts["num_tokens"] == [32] and row["value"] is None and row["fixed_tokens"] is None
    assert "value" not in figures and figures["missing"] == 1


def test_the_direction_is_the_tables_own(tmp_path: Path) -> None:
    """A metric whose name nobody knows, more is better."""
    values = np.array([[0.3, 0.6, 0.5], [0.2, 0.2, 0.9]])
    columns = {"own.crispness": values}
    for way, best, fixed in (("higher", [16, 32], None), ("lower", [8, 8], 8.0)):
        scores = score_table(tmp_path / way, columns, BUDGETS, directions={"own.crispness": way})
        config = TaskConfig(
            name="own", kind="my.tasks:Own", metrics=["crispness"], rule=RuleConfig(kind="best", metric="crispness")
        )
        counts, _, row = chosen(tmp_path / f"{way}-out", scores, config)
        assert counts["num_tokens"] == best
        assert row["fixed_tokens"] == fixed


def test_rules_beside_the_chosen_one_are_reported(tmp_path: Path) -> None:
    config = task(max=0.08).model_copy(
        update={
            "rules": tuple(RuleConfig(kind=k, metric="psnr" if k == "best" else "l1", **p) for k, p in RULES.items())
        }
    )
    scores = of_photographs(tmp_path / "in", photographs(40))
    select(job(tmp_path / "out"), config=config, resources=NoConfig(), scores=scores)
    rows = json.loads((tmp_path / "out" / "rules.json").read_text())["rules"]
    assert len(rows) == 6 and rows[0] == rows[1]
    for row, (kind, parameters) in zip(rows[2:], list(RULES.items())[1:], strict=True):
        alone, _, expected = chosen(
            tmp_path / kind, scores, task(kind, "psnr" if kind == "best" else "l1", **parameters)
        )
        assert row == expected


def test_a_predicted_rule_is_judged_by_true_values(tmp_path: Path) -> None:
    made = photographs(40)
    scores = of_photographs(tmp_path / "in", made)
    predicted = made.scores["l1"] + np.random.default_rng(0).normal(0, 0.01, (40, 8)).astype(np.float32)
    told = score_table(tmp_path / "told", {"predicted": predicted}, made.budgets)
    lengths = LengthModel(uri=told.uri, key="0")
    counts, figures, _ = chosen(tmp_path / "out", scores, task("predicted", max=0.08), lengths=lengths)
    searched, found, _ = chosen(tmp_path / "searched", scores, task(max=0.08))
    first = np.where((predicted <= 0.08).any(1), (predicted <= 0.08).argmax(1), 7)
    assert counts["num_tokens"] == [made.budgets[column] for column in first]
    assert counts["satisfied"] == (made.scores["l1"][np.arange(40), first] <= 0.08).tolist()
    assert figures["same"] == np.mean(np.equal(counts["num_tokens"], searched["num_tokens"]))
    assert (figures["searched_tokens"], figures["searched_satisfied"]) == (found["mean_tokens"], found["satisfied"])


def test_what_is_refused(tmp_path: Path) -> None:
    scores = of_photographs(tmp_path / "in", photographs(40))
    for config, words in (
        (task("predicted", max=0.1), "length stage"),
        (task("mean_tokens", mean=2), "smallest budget"),
        (task("fixed", num_tokens=9), "num_tokens = 9"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen(tmp_path / config.rule.kind, scores, config)
    only_l1 = score_table(tmp_path / "l1", {"l1": photographs(40).scores["l1"]}, photographs(40).budgets)
    with pytest.raises(ValueError, match="no scores \\['psnr'\\]"):
        chosen(tmp_path / "psnr", only_l1, task("threshold", "psnr", min=20))
    with pytest.raises(ValueError, match="only a 'predicted' rule"):
        RuleConfig(kind="best", metric="l1", length=LengthConfig())


@pytest.mark.parametrize("mean", [16, 24, 40])
def test_mean_tokens_against_every_allocation(mean: float) -> None:
    """On sets small enough to try everything: how far the hulls are from the optimum."""
    made, budgets = photographs(40), np.array(photographs(40).budgets)
    pick = np.random.default_rng(0)
    gaps = []
    for _ in range(20):
        values = made.scores["l1"][pick.choice(40, 4, replace=False)].astype(np.float64)
        found = MeanTokens("l1", mean).select(values, list(budgets))
        columns = np.array(list(itertools.product(range(8), repeat=4)))
        allowed = columns[budgets[columns].sum(axis=1) <= mean * 4]
        best = values[np.arange(4), allowed].sum(axis=1).min()
        gap = found.value.sum() - best
        assert -1e-12 <= gap <= found.gap_bound + 1e-12
        gaps.append(gap / best)
    print(
        f"mean {mean}: {np.mean(np.array(gaps) < 1e-9):.0%} optimal, gap {np.mean(gaps):.2%} mean, {max(gaps):.2%} most"
    )


def test_equal_quality_is_on_the_line() -> None:
    assert equal_quality([3.0, 2.0, 1.0], [8, 16, 24], 1.5) == 20
    assert equal_quality([3.0, 2.0, 1.0], [8, 16, 24], 3.5) == 8
    assert equal_quality([3.0, 2.0, 1.0], [8, 16, 24], 0.5) is None
    assert equal_quality([3.0, 3.5, 1.0], [8, 16, 24], 2.25) == 20


def test_a_hundred_thousand_rows_need_no_objects(tmp_path: Path) -> None:
    """Counts over many files add up: every image is in the histogram once."""
    made = photographs(40)
    drawn = np.random.default_rng(0).integers(0, 40, 100_000)
    scores = score_table(tmp_path / "in", {"l1": made.scores["l1"][drawn]}, made.budgets, rows_per_file=9999)
    _, figures, _ = chosen(tmp_path / "out", scores, task("mean_tokens", mean=20))
    assert sum(int(part.split(":")[1]) for part in str(figures["histogram"]).split()) == 100_000
    assert figures["mean_tokens"] <= 20
