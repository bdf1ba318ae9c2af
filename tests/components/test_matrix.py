"""The criterion x task matrix through its door, on real scores and on rows made to break it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.artifacts import ScoreTable, TokenCounts
from components.config import MatrixConfig, MatrixStageConfig, NoConfig, RuleConfig
from components.matrix import allocate, matrix
from components.select_counts import select
from components.task_config import TaskConfig
from tests.by_hand import job, of_photographs, photographs, score_table

NAN = float("nan")
BUDGETS = (8, 16, 32)
L1 = TaskConfig(name="reconstruction", rule=RuleConfig(kind="threshold", metric="l1", max=0.08))
PSNR = TaskConfig(name="sharpness", kind="reconstruction", rule=RuleConfig(kind="threshold", metric="psnr", min=24))


def run(folder: Path, scores: ScoreTable, tasks: list[TaskConfig], criteria: dict[str, str], **settings) -> dict:
    counts = {}
    for task in tasks:
        select(job(folder / task.name), config=task, resources=NoConfig(), scores=scores)
        counts[f"counts_{task.name}"] = TokenCounts(uri=str(folder / task.name), key="0")
    config = MatrixStageConfig(settings=MatrixConfig(resamples=100, **settings), criteria=criteria)
    figures = matrix(job(folder / "matrix"), config=config, resources=NoConfig(), scores=scores, **counts)
    found = json.loads((folder / "matrix" / "matrix.json").read_text())
    assert figures["sentence"] == found["sentence"]
    return found


def cell(found: dict, criterion: str, column: str) -> dict:
    (one,) = [c for c in found["cells"] if (c["criterion"], c["column"]) == (criterion, column)]
    return one


def test_real_scores(tmp_path: Path) -> None:
    made = photographs(40)
    scores = of_photographs(tmp_path / "in", made)
    found = run(tmp_path, scores, [L1, PSNR], {"reconstruction": "l1", "sharpness": "psnr"})
    val = np.array([row["split"] == "val" for row in made.rows])
    assert found["images"] == val.sum() and found["mean_tokens"] == 32
    assert {(c["criterion"], c["column"]) for c in found["cells"]} == {
        (one, other) for one in ("l1", "mse", "psnr") for other in ("l1", "mse", "psnr")
    }
    for one in found["cells"]:
        assert 32 - 8 / val.sum() <= one["mean_tokens"] <= 32  # all spend the same, to the last step
        curve = made.scores[one["column"]][val].mean(axis=0, dtype=np.float64)
        assert one["fixed"] == pytest.approx(np.interp(one["mean_tokens"], made.budgets, curve))
        sign = 1 if one["column"] == "psnr" else -1
        assert one["gain"] == pytest.approx(sign * (one["mean"] - one["fixed"]))
        assert one["low"] <= one["gain"] <= one["high"]
    for column in ("l1", "mse"):  # an allocation by a distance itself is never worse than the same for all
        assert cell(found, column, column)["gain"] > 0
        assert found["best"]["reconstruction"]["best"] in ("l1", "mse", "psnr")
    table = pq.read_table(tmp_path / "matrix" / "table").to_pylist()
    assert table == found["cells"]
    with Image.open(tmp_path / "matrix" / "matrix.png") as picture:
        assert picture.width > 200


def test_the_verdict_is_what_the_numbers_say(tmp_path: Path) -> None:
    """Two tasks that need their tokens for different images; then one whose own criterion says nothing."""
    generator = np.random.default_rng(0)
    needs = generator.random((60, 1)) < 0.5
    falls, flat = np.array([[0.9, 0.5, 0.1]]), np.array([[0.9, 0.9, 0.9]])
    noise = generator.normal(0, 1e-3, (60, 3))
    columns = {"a.loss": np.where(needs, falls, flat) + noise, "b.loss": np.where(needs, flat, falls) + noise}
    ways = dict.fromkeys(columns, "lower")
    scores = score_table(tmp_path / "in", columns, BUDGETS, directions=ways)
    found = run(tmp_path, scores, [], {"a": "a.loss", "b": "b.loss"})
    assert all(verdict["own_is_best"] and verdict["clear"] for verdict in found["best"].values())
    assert "2 of 2 tasks do best under their own criterion" in found["sentence"]
    assert cell(found, "a.loss", "b.loss")["gain"] < 0 < cell(found, "a.loss", "a.loss")["gain"]
    columns["b.loss"] = np.where(needs, flat, falls)
    columns["c.loss"] = generator.random((60, 3))
    columns["d.loss"] = -columns["b.loss"]
    scores = score_table(tmp_path / "two", columns, BUDGETS, directions=dict.fromkeys(columns, "lower"))
    found = run(tmp_path / "again", scores, [], {"b": "b.loss", "d": "d.loss"})
    assert found["best"]["b"]["best"] == "b.loss"
    assert cell(found, "d.loss", "d.loss")["unsteered"] == pytest.approx(8, abs=0.2)  # it never wants more tokens


def test_more_is_better_where_the_table_says_so(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rising = np.sort(generator.random((30, 3)), axis=1)
    scores = score_table(tmp_path / "in", {"a.x": rising}, BUDGETS, directions={"a.x": "higher"})
    up = cell(run(tmp_path, scores, [], {"a": "a.x"}), "a.x", "a.x")
    scores = score_table(tmp_path / "two", {"a.x": -rising}, BUDGETS, directions={"a.x": "lower"})
    down = cell(run(tmp_path / "again", scores, [], {"a": "a.x"}), "a.x", "a.x")
    assert up["mean"] == -down["mean"] > up["fixed"] and up["gain"] == down["gain"] > 0


def test_missing_rows_are_left_out_cell_by_cell(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((20, 3))
    partly = values.copy()
    partly[:5] = NAN
    partly[5, 1] = NAN
    gone = np.full((20, 3), NAN)
    columns = {"l1": values, "a.loss": partly, "b.loss": gone}
    scores = score_table(tmp_path / "in", columns, BUDGETS, directions=dict.fromkeys(columns, "lower"))
    found = run(tmp_path, scores, [], {"r": "l1", "a": "a.loss", "b": "b.loss"})
    assert cell(found, "l1", "l1")["images"] == 20
    for one in (cell(found, "l1", "a.loss"), cell(found, "a.loss", "l1"), cell(found, "a.loss", "a.loss")):
        assert one["images"] == 14 and one["mean_tokens"] <= 16
    assert not [c for c in found["cells"] if "b.loss" in (c["criterion"], c["column"])]
    assert found["best"]["b"]["best"] is None and not found["best"]["b"]["own_is_best"]


def test_counts_of_one_task_used_for_another(tmp_path: Path) -> None:
    made = photographs(40)
    scores = of_photographs(tmp_path / "in", made)
    found = run(tmp_path, scores, [L1, PSNR], {"reconstruction": "l1", "sharpness": "psnr"})
    val = np.array([row["split"] == "val" for row in made.rows])
    tokens = np.array(pq.read_table(tmp_path / "reconstruction" / "table")["num_tokens"])[val]
    at = np.searchsorted(made.budgets, tokens)
    (one,) = [c for c in found["across"] if (c["criterion"], c["column"]) == ("reconstruction", "psnr")]
    assert one["mean_tokens"] == tokens.mean()
    assert one["mean"] == pytest.approx(made.scores["psnr"][val][np.arange(val.sum()), at].mean(dtype=np.float64))


def test_one_image_and_repeated_runs(tmp_path: Path) -> None:
    scores = score_table(tmp_path / "in", {"l1": np.array([[0.3, 0.2, 0.1]])}, BUDGETS)
    one = cell(run(tmp_path, scores, [], {"r": "l1"}), "l1", "l1")
    assert (one["images"], one["mean_tokens"], one["gain"]) == (1, 16, 0)
    made = of_photographs(tmp_path / "made", photographs(40))
    first = run(tmp_path / "1", made, [], {"r": "l1"}, seed=3)
    assert run(tmp_path / "2", made, [], {"r": "l1"}, seed=3) == first
    assert run(tmp_path / "3", made, [], {"r": "l1"}, seed=4) != first


def test_the_random_share_is_spent_to_the_last_step() -> None:
    budgets = np.array(BUDGETS)
    for mean in (8, 11, 16, 31.5, 32):
        column, unsteered = allocate(np.ones((40, 3)), budgets, mean, seed=0)
        spent = budgets[column].mean()
        assert mean - 16 / 40 <= spent <= mean
        assert unsteered == pytest.approx(spent - 8)
