"""A comparison of two variants whose scores are known."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.analyze.comparison import compare
from components.analyze.sections import NUMBERS_SCHEMA
from components.analyze.settings import CompareStageConfig, Variant
from components.artifacts import Analysis, Artifact, TokenCounts, Tokenizer
from components.config import NoConfig, RuleConfig
from components.select_counts import select
from components.store import write_table
from components.task_config import TaskConfig
from tests.by_hand import finish, job, score_table

BUDGETS = (8, 16)
SPLIT = ["val"] * 30 + ["train"] * 10


def artifacts(
    folder: Path, name: str, values: np.ndarray, rule: RuleConfig, split: list[str] = SPLIT
) -> dict[str, Artifact]:
    """What a variant leaves behind."""
    scores = score_table(folder / name / "scores", {"l1": values}, BUDGETS, split=split)
    task = TaskConfig(name="reconstruction", rule=rule)
    select(job(folder / name / "counts"), config=task, resources=NoConfig(), scores=scores)
    rows = [{"section": "regions", "name": "hard at 16", "value": 0.25, "low": 0.2, "high": 0.3, "images": 30}]
    write_table(str(folder / name / "analysis" / "table"), pa.Table.from_pylist(rows, schema=NUMBERS_SCHEMA))
    for kind, place in ((TokenCounts, "counts"), (Analysis, "analysis"), (Tokenizer, "tokenizer")):
        (folder / name / place).mkdir(exist_ok=True)
        finish(folder / name / place, kind)
    made = {place: str(folder / name / place) for place in ("counts", "analysis", "tokenizer")}
    return {
        f"scores_{name}": scores,
        f"counts_{name}": TokenCounts(made["counts"], "0"),
        f"analysis_{name}": Analysis(made["analysis"], "0"),
        f"tokenizer_{name}": Tokenizer(made["tokenizer"], "0"),
    }


@pytest.fixture
def found(tmp_path: Path) -> dict:
    first = np.random.default_rng(0).uniform(0.1, 0.2, (40, 2)).astype(np.float32)
    worse = first + np.float32(0.05)
    worse[3] = np.nan  # an image that one variant lacks
    fixed = RuleConfig(kind="fixed", metric="l1", num_tokens=8)
    inputs = artifacts(tmp_path, "first", first, fixed) | artifacts(tmp_path, "worse", worse, fixed)
    inputs |= artifacts(tmp_path, "dear", first, RuleConfig(kind="fixed", metric="l1", num_tokens=16))
    variants = [Variant(name=name, at={"steps": at}) for name, at in (("first", 100), ("worse", 50), ("dear", 200))]
    config = CompareStageConfig(variants=variants, task="reconstruction", column="l1", resamples=100, seed=0)
    figures = compare(job(tmp_path / "out"), config=config, resources=NoConfig(), **inputs)
    (section,) = json.loads((tmp_path / "out" / "sections.json").read_text())["sections"]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {one["file"] for one in section["figures"]}
    (table,) = section["tables"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    return {"figures": figures, "section": section, "rows": rows, "first": np.delete(first[:30], 3, axis=0)}


def test_held_out_images_that_all_have(found: dict) -> None:
    assert found["section"]["images"] == found["figures"]["images"] == 29
    assert found["figures"]["comparison.first: chosen"] == pytest.approx(found["first"][:, 0].mean(), rel=1e-6)


def test_a_difference_is_image_by_image_so_its_interval_is_narrow(found: dict) -> None:
    assert found["rows"]["worse"]["difference at the most"] == "0.05 [0.05, 0.05]"
    assert found["rows"]["worse"]["difference"] == "0.05 [0.05, 0.05]"
    assert "worse: worse (+0.05)" in found["section"]["finding"]


def test_variants_that_spend_more_are_not_compared_at_their_counts(found: dict) -> None:
    assert found["rows"]["dear"]["difference"] == ""
    assert found["rows"]["dear"]["difference at the most"] == "0 [0, 0]"
    assert "no different: dear" in found["section"]["finding"]


def test_what_an_analysis_says_of_regions_is_shown(found: dict) -> None:
    assert found["rows"]["first"]["hard"] == "0.25 [0.2, 0.3]" and found["rows"]["first"]["worst"] == ""


def test_every_image_counts_where_none_is_held_out(tmp_path: Path) -> None:
    values, fixed = np.full((40, 2), 0.5, np.float32), RuleConfig(kind="fixed", metric="l1", num_tokens=8)
    inputs = artifacts(tmp_path, "first", values, fixed, ["train"] * 40)
    inputs |= artifacts(tmp_path, "second", values / 2, fixed, ["train"] * 40)
    variants = [Variant(name=name) for name in ("first", "second")]
    config = CompareStageConfig(variants=variants, task="reconstruction", column="l1", resamples=20, seed=0)
    figures = compare(job(tmp_path / "out"), config=config, resources=NoConfig(), **inputs)
    assert figures["images"] == 40
    assert figures["comparison.second: chosen"] == pytest.approx(0.25)
