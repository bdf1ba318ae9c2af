"""Every figure comes with its number of images and an interval."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data

from components.analyze.complexity import complexity
from components.analyze.familiarity import SPOILT, familiarity
from components.analyze.settings import AnalyzeConfig, StrangeSource
from tests.by_hand import photographs
from tests.components.analyze.by_hand import inputs_of

INTERVAL = re.compile(r"^-?[\d.e+-]+ \[-?[\d.e+-]+, -?[\d.e+-]+\]$")


def test_sets_are_near_or_far_and_each_number_has_its_interval(tmp_path: Path) -> None:
    for folder in ("cats", "texts"):
        (tmp_path / folder).mkdir()
        for number, image in enumerate((data.chelsea(), data.astronaut())):
            Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
    ood = (
        StrangeSource(name="cats", source=str(tmp_path / "cats"), kind="near"),
        StrangeSource(name="texts", source=str(tmp_path / "texts")),
    )
    settings = AnalyzeConfig(images=8, strange_images=4, ood=ood, resamples=20)
    section = familiarity(inputs_of(tmp_path / "in", photographs(40), settings))
    (table,) = section.tables
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert kinds | dict.fromkeys(SPOILT, "") == {
        "held out": "in",
        "cats": "near",
        "texts": "",
        **dict.fromkeys(SPOILT, ""),
    }
    assert {name for name in SPOILT if kinds[name] == "near"} == {"upside down", "negative"}
    assert {kinds[name] for name in SPOILT} == {"near", "far"}
    for row in rows.values():
        assert INTERVAL.match(row["tokens"]) and INTERVAL.match(row["jpeg bytes"]) and int(row["images"]) > 1
    assert "cats (near)" in section.finding and "noise (far)" in section.finding


def test_the_fifths_of_the_images_are_in_a_table(tmp_path: Path) -> None:
    made = photographs(80)
    section = complexity(inputs_of(tmp_path, made, AnalyzeConfig(images=12, resamples=20)))
    _, fifths = section.tables
    assert [row[0] for row in fifths.rows] == ["1", "2", "3", "4", "5"]
    assert sum(int(row[-1]) for row in fifths.rows) == 12
    assert all(INTERVAL.match(cell) for row in fifths.rows for cell in row[1:-1])
    assert len(fifths.columns) == len(made.budgets) + 2
    told = re.search(r"n = ([\d +]+)", section.figures[1].caption)
    assert told and [int(part) for part in told[1].split(" + ")] == [int(row[-1]) for row in fifths.rows]


def test_what_people_say_is_beside_what_the_pixels_tell(tmp_path: Path) -> None:
    made = photographs(80)
    inputs = inputs_of(tmp_path, made, AnalyzeConfig(images=12, resamples=20))
    table, _ = complexity(inputs).tables
    assert "people" not in table.columns
    names = inputs.sample(12)
    tokens = dict(zip(names, inputs.counts_of(inputs.criteria[0].task, names), strict=True))
    tokens[names[0]] = None  # of one they said nothing
    for part in Path(inputs.images.table_uri).iterdir():
        rows = pq.read_table(part)
        column = pa.array([tokens.get(name) for name in rows["image_id"].to_pylist()], pa.float64())
        pq.write_table(rows.set_column(rows.column_names.index("complexity"), "complexity", column), part)
    table, _ = complexity(inputs).tables
    first = dict(zip(table.columns, table.rows[0], strict=True))
    assert first["people"] == "1 [1, 1]" and "which 11 of the images have" in table.note


def test_a_kind_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="near"):
        StrangeSource(name="cats", source="demo", kind="middling")
