"""analyze on a Ray of its own, everything on: photographs with labels and masks, a predicted rule, another source."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.analyze.settings import TOPICS, AnalyzeConfig, AnalyzeStageConfig, Criterion, StrangeSource
from components.analyze.stage import analyze
from components.artifacts import LengthModel, TokenCounts
from components.config import InferenceResources, LengthConfig, LengthStageConfig, NoConfig, RuleConfig
from components.images import decode_png, encode_png
from components.length import train_length
from components.select_counts import select
from components.task_config import TaskConfig
from tests.by_hand import Photographs, code_book, image_set, job, of_photographs, photographs, tokenizer_artifact

pytestmark = pytest.mark.slow
CROPS = 80
RULES = (
    RuleConfig(kind="threshold", metric="l1", max=0.08),
    RuleConfig(kind="predicted", metric="l1", max=0.08),
)


def with_targets(made: Photographs) -> Photographs:
    """A label and a mask that the pixels tell: whether the image is bright, and which of its pixels are."""
    rows = []
    for row in made.rows:
        grey = decode_png(row["image"]).mean(-1)
        mask = encode_png(Image.fromarray((grey > grey.mean()).astype(np.uint8)))
        rows.append({**row, "label": "bright" if grey.mean() > 110 else "dark", "mask": mask})
    return Photographs(rows, made.budgets, made.codes, made.scores)


@pytest.mark.usefixtures("own_ray")
def test_everything_on(tmp_path: Path) -> None:
    made = with_targets(photographs(CROPS))
    resources, scores = InferenceResources(batch_size=16), of_photographs(tmp_path / "scores", made)
    images, codes = image_set(tmp_path / "images", made), code_book(tmp_path / "codes", made)
    length = LengthStageConfig(metric="l1", column="l1", length=LengthConfig(steps=100))
    model = {"images": images, "tokenizer": tokenizer_artifact(), "scores": scores}
    train_length(job(tmp_path / "length"), config=length, resources=resources, **model)
    lengths = LengthModel(uri=str(tmp_path / "length"), key="0")
    task = TaskConfig(name="reconstruction", rule=RULES[0], rules=RULES[1:])
    select(job(tmp_path / "counts"), config=task, resources=NoConfig(), scores=scores, lengths=lengths)
    strange = tmp_path / "strange"
    strange.mkdir()
    for number in range(6):
        stripes = np.zeros((70, 80, 3), np.uint8)
        stripes[:, :: 2 + number] = 255
        Image.fromarray(stripes).save(strange / f"{number}.png")
    settings = AnalyzeConfig(
        images=16,
        strange_images=6,
        attention_images=8,
        timed_images=8,
        resamples=50,
        ood=(StrangeSource(name="stripes", source=str(strange)),),
    )
    criterion = Criterion(task="reconstruction", rules=tuple((rule, "l1") for rule in RULES))
    figures = analyze(
        job(tmp_path / "out"),
        config=AnalyzeStageConfig(settings=settings, criteria=(criterion,)),
        resources=resources,
        codes=codes,
        counts_reconstruction=TokenCounts(uri=str(tmp_path / "counts"), key="0"),
        length_reconstruction=lengths,
        **model,
    )
    sections = {one["id"]: one for one in json.loads((tmp_path / "out" / "sections.json").read_text())["sections"]}
    assert tuple(sections) == TOPICS
    for section in sections.values():
        print(section["finding"])
        assert "Not measured" not in section["finding"] and section["claim"] and section["tables"], section["id"]
        for figure in section["figures"]:
            with Image.open(tmp_path / "out" / figure["file"]) as picture:
                assert picture.width == 720 and figure["alt"] and figure["caption"]
        for table in section["tables"]:
            assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    numbers = {f"{row['section']}.{row['name']}": row for row in pq.read_table(tmp_path / "out" / "table").to_pylist()}
    assert {name: numbers[name]["value"] for name in figures} == figures
    val = [row for row, image in enumerate(made.rows) if image["split"] == "val"]
    sampled = sorted(val, key=lambda row: made.rows[row]["image_id"])[:16]
    tokens = np.array(pq.read_table(tmp_path / "counts" / "table")["num_tokens"])[sampled]
    assert numbers["familiarity.held out: tokens"]["value"] == tokens.mean()
    assert numbers["complexity.l1 at 8, fifth 1"]["images"] == 4
    error = made.scores["l1"][sampled].mean(axis=0)  # a whole image's error is its cells' mean
    assert numbers["regions.all at 8"]["value"] == pytest.approx(error[0], rel=1e-4)
    assert numbers["regions.hard at 64"]["value"] > numbers["regions.other at 64"]["value"]
    assert numbers["familiarity.noise: tokens"]["value"] == 64
    assert numbers["familiarity.stripes: tokens"]["images"] == 6
    for budget in made.budgets:
        for name in ("IoU of the best token", "IoU of a subset"):
            assert 0 < numbers[f"specialization.{name} at {budget}"]["value"] <= 1
        assert 0 < numbers[f"specialization.entropy at {budget}"]["value"] < 1
    assert numbers["representation.flat at 64"]["value"] > 0.5
    assert 0 < numbers["single_pass.reconstruction: same"]["value"] <= 1


@pytest.mark.usefixtures("own_ray")
def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    made = photographs(40)
    scores = of_photographs(tmp_path / "scores", made)
    rule = RuleConfig(kind="mean_tokens", metric="l1", mean=32)
    task = TaskConfig(name="reconstruction", rule=rule)
    select(job(tmp_path / "counts"), config=task, resources=NoConfig(), scores=scores)
    wanted = ("familiarity", "representation", "single_pass")
    analyze(
        job(tmp_path / "out"),
        config=AnalyzeStageConfig(
            settings=AnalyzeConfig(sections=wanted),
            criteria=(Criterion(task="reconstruction", rules=((rule, "l1"),)),),
        ),
        resources=InferenceResources(),
        images=image_set(tmp_path / "images", made),
        tokenizer=tokenizer_artifact(),
        codes=code_book(tmp_path / "codes", made),
        scores=scores,
        counts_reconstruction=TokenCounts(uri=str(tmp_path / "counts"), key="0"),
    )
    sections = json.loads((tmp_path / "out" / "sections.json").read_text())["sections"]
    assert [one["id"] for one in sections] == list(wanted)
    assert all(one["finding"].startswith("Not measured") and one["images"] == 0 for one in sections)
