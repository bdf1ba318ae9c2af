"""drift, on scores of real photographs and a registered reference; no Ray."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.artifacts import MANIFEST, Figures, Job, Manifest, TokenCounts
from components.config import DriftConfig, NoConfig, RegisteredModel, RuleConfig
from components.distributions import reference_of
from components.drift import drift
from components.select_counts import select
from components.store import read_json, write_json
from components.task_config import TaskConfig
from tests.by_hand import Photographs, finish, image_set, job, of_photographs, photographs
from tests.registered import register, registry_at, tracker_in

CROPS = 48


def told(folder: Path, made: Photographs, rule: float = 0.08) -> tuple[Any, dict[str, TokenCounts]]:
    """Scores, and the counts of one task."""
    scores = of_photographs(folder / "scores", made)
    task = TaskConfig(name="reconstruction", metrics=("l1",), rule=RuleConfig(kind="threshold", metric="l1", max=rule))
    select(job(folder / "counts"), config=task, resources=NoConfig(), scores=scores)
    finish(folder / "counts", TokenCounts, config=task.model_dump(mode="json"))
    return scores, {"reconstruction": TokenCounts.open(str(folder / "counts"))}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with version 1, which knows its training's images, and version 2, which doesn't."""
    folder = tmp_path_factory.mktemp("drift")
    tracker = tracker_in(folder)
    register(tracker, reference=reference_of(*told(folder / "training", photographs(CROPS))))
    register(tracker)
    return folder


def worse(made: Photographs) -> Photographs:
    """The same photographs as if half as much again were lost of each."""
    return replace(made, scores={name: values * 1.5 for name, values in made.scores.items()})


def first(made: Photographs, number: int) -> Photographs:
    return replace(made, rows=made.rows[:number], scores={name: v[:number] for name, v in made.scores.items()})


def found(known: Path, folder: Path, made: Photographs, version: int = 1, rule: float = 0.08, **more: Any) -> Figures:
    scores, counts = told(folder, made, rule)
    images = image_set(folder / "images", made)
    if "added" in more:
        write_json(f"{images.uri}/added.json", {"parts": more.pop("added")})
    output = Job("drift", "0", "", str(folder / "drift"), "", tracking={"uri": registry_at(known)})
    return drift(
        output,
        config=DriftConfig(**more),
        resources=RegisteredModel(name="alit-demo", version=version),
        images=images,
        scores=scores,
        **{f"counts_{task}": chosen for task, chosen in counts.items()},
    )


def test_the_training_s_own_images_are_like_them(known: Path, tmp_path: Path) -> None:
    figures = found(known, tmp_path, photographs(CROPS))
    assert figures["drift"] == "none" and figures["flags"] == 0 and figures["images"] == CROPS
    with Image.open(tmp_path / "drift" / "drift.png") as picture:
        assert picture.width > 300
    (section,) = read_json(str(tmp_path / "drift" / "sections.json"))["sections"]
    assert section["finding"] == "Nothing is flagged." and section["images"] == CROPS
    assert section["figures"][0]["file"] == "drift.png" and section["tables"][0]["rows"][1][0] == "l1@8"


def test_images_that_lose_more_are_flagged_and_named(known: Path, tmp_path: Path) -> None:
    figures = found(known, tmp_path, worse(photographs(CROPS)))
    assert "reconstruction tokens" in str(figures["drift"]) and "l1@64" in str(figures["drift"])
    rows = {row["name"]: row for row in read_json(str(tmp_path / "drift" / "drift.json"))["rows"]}
    assert rows["l1@64"]["mean"] == pytest.approx(1.5 * photographs(CROPS).scores["l1"][:, -1].mean(), rel=1e-4)
    assert figures["psi.l1@64"] == rows["l1@64"]["psi"] > 0.2 and rows["l1@64"]["p_value"] < 0.01
    strict = found(known, tmp_path / "strict", worse(photographs(CROPS)), psi=1e6)
    assert strict["flags"] == 0 and strict["psi.l1@64"] == figures["psi.l1@64"]


def test_few_images_are_no_reason_for_a_flag(known: Path, tmp_path: Path) -> None:
    figures = found(known, tmp_path, worse(first(photographs(CROPS), 20)))
    assert figures == {"images": 20, "flags": 0, "drift": "too few to say: 20 new images, 30 are needed"}


def test_only_the_parts_that_were_added_count(known: Path, tmp_path: Path) -> None:
    none = found(known, tmp_path / "none", worse(photographs(CROPS)), added=[])
    assert none["images"] == 0 and "too few to say" in str(none["drift"])
    names = sorted(path.name for path in (tmp_path / "none" / "scores" / "table").iterdir())
    some = found(known, tmp_path / "some", worse(photographs(CROPS)), added=names[:1], min_images=10)
    assert 0 < some["images"] < CROPS and some["flags"]


def test_images_of_a_night_that_failed_count_in_the_next(known: Path, tmp_path: Path) -> None:
    """Three nights add a file each; the first was published, the second was not."""
    made = photographs(CROPS)
    scores, counts = told(tmp_path, made)
    names = sorted(path.name for path in Path(scores.table_uri).iterdir())
    nights = [image_set(tmp_path / "w" / "ingest" / f"night-{number}", made) for number in range(3)]
    for number, images in enumerate(nights):
        write_json(f"{images.uri}/added.json", {"parts": [names[number]]})
        os.utime(Path(images.uri, MANIFEST), (number, number))
    published = Manifest("publication", 1, "publish", "p", {"images": nights[0].key}, {}, {})
    (tmp_path / "w" / "publish" / "p").mkdir(parents=True)
    write_json(str(tmp_path / "w" / "publish" / "p" / MANIFEST), asdict(published))
    output = Job("drift", "0", str(tmp_path / "w"), str(tmp_path / "drift"), "", tracking={"uri": registry_at(known)})
    figures = drift(
        output,
        config=DriftConfig(min_images=1),
        resources=RegisteredModel(name="alit-demo", version=1),
        images=nights[2],
        scores=scores,
        counts_reconstruction=counts["reconstruction"],
    )
    assert figures["images"] == sum(pq.read_metadata(Path(scores.table_uri, name)).num_rows for name in names[1:])


def test_without_a_reference_it_says_so(known: Path, tmp_path: Path) -> None:
    figures = found(known, tmp_path, worse(photographs(CROPS)), version=2)
    assert figures["drift"] == "the model has no reference to compare with" and figures["flags"] == 0


def test_counts_of_another_rule_are_not_compared(known: Path, tmp_path: Path) -> None:
    figures = found(known, tmp_path, photographs(CROPS), rule=0.05)
    assert figures["drift"] == "none" and "psi.reconstruction tokens" not in figures and "psi.l1@8" in figures


def test_the_reference_is_small_and_of_the_train_split(known: Path) -> None:
    made = photographs(CROPS)
    reference = reference_of(*told(known / "again", made))
    train = [row["split"] == "train" for row in made.rows]
    assert reference["images"] == sum(train) == sum(reference["counts"]["reconstruction"]["images"])
    assert np.mean(reference["scores"]["l1"]["8"]) == pytest.approx(made.scores["l1"][train, 0].mean(), rel=1e-4)
