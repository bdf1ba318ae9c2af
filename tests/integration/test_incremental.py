"""A rerun costs what is new, and ends with the tables of a run from scratch."""

import json
from pathlib import Path

import pytest

from pipelines.dag import plan
from tests.nightly import TABLES, change, figures, leftovers, nightly, photographs, rows, run_nightly

pytestmark = pytest.mark.slow

IMAGES = 150
BROKEN = "00075x.png"


def test_only_what_is_new_is_read_encoded_and_scored(own_ray: None, tmp_path: Path) -> None:
    source, space = tmp_path / "photos", tmp_path / "w"
    photographs(source, range(IMAGES))
    (source / BROKEN).write_bytes(b"no image")
    first = run_nightly(source, space)
    told = figures(first)
    assert (told["ingest"]["images"], told["ingest"]["rejected"], told["ingest"]["added"]) == (IMAGES, 1, IMAGES + 1)
    assert told["tokenize"]["encoded"] == told["score"]["scored"] == IMAGES
    before = {stage: rows(first, stage) for stage in TABLES}

    change(source, deleted=(0, 1, 49, 100, 149))
    assert [(one.stage.name, one.reason) for one in plan(nightly(source), str(space)) if one.state == "run"][0] == (
        "ingest",
        "source changed",
    )
    second = run_nightly(source, space)
    told = figures(second)
    counted = {name: told["ingest"][name] for name in ("images", "rejected", "added", "changed", "removed", "reused")}
    assert counted == {"images": 157, "rejected": 1, "added": 12, "changed": 3, "removed": 5, "reused": 143}
    assert told["tokenize"]["encoded"] == told["score"]["scored"] == 15
    assert told["score"]["decoded_images"] == 15 * 4
    added = json.loads((Path(second.stages[1].uri) / "added.json").read_text())["parts"]
    assert len(added) == 1 and all((Path(second.stages[1].uri) / "table" / name).is_file() for name in added)
    assert before == {stage: rows(first, stage) for stage in TABLES}, "the earlier artifacts are as they were"

    anew = run_nightly(source, tmp_path / "anew")
    only_here = {"added", "changed", "removed", "reused", "encoded", "scored", "decoded_images"}
    for name, numbers in figures(anew).items():
        for figure, value in numbers.items():
            same = told[name][figure] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9))
            assert figure in only_here or same, (name, figure, value)
    for stage in TABLES:
        assert rows(second, stage).equals(rows(anew, stage)), stage

    again = run_nightly(source, space)
    assert {stage.state for stage in again.stages} == {"reused"}
    assert not list(leftovers(space))

    looser = figures(run_nightly(source, space, "ingest.max_rejected=7"))
    assert (looser["ingest"]["reused"], looser["tokenize"]["encoded"], looser["score"]["scored"]) == (158, 0, 0)

    forced = figures(run_nightly(source, space, force=("ingest", "tokenize", "score")))
    assert forced["ingest"]["reused"] == 0 and forced["ingest"]["added"] == 158
    assert forced["tokenize"]["encoded"] == forced["score"]["scored"] == 157
