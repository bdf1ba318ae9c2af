"""The stage analyze in a plan: there when asked for, keyed by what it reads of the outside world."""

from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import main
from pipelines.config import load_config
from pipelines.train import build

MISTAKES = {
    "analyze={typo: 1}": ("analyze.typo = 1", "no such key"),
    "analyze={sections: [beauty]}": ("analyze.sections.0 = 'beauty'", "complexity"),
    "analyze={images: 1}": ("analyze.images = 1", "greater than or equal to 4"),
    "analyze={ood: [{name: far, source: /no/such}]}": ("analyze", "/no/such"),
    "analyze={ood: [{name: far, source: demo}, {name: far, source: demo}]}": ("ood = ['far', 'far']", "differ"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_told_in_one_message(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--set", override]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    for part in MISTAKES[override]:
        assert part in said


def test_no_section_no_stage() -> None:
    assert "analyze" not in build(load_config("demo", ["analyze=null"])).names


def test_it_reads_what_each_task_left() -> None:
    rule = "tasks.0.rules=[{kind: predicted, metric: l1, max: 0.08}]"
    needs = build(load_config("demo", ["analyze={}", rule]))["analyze"].needs
    assert needs["counts_reconstruction"] == "select.reconstruction"
    assert needs["length_reconstruction"] == "length.reconstruction"
    assert build(load_config("demo", ["analyze={}"]))["publish"].needs["analyze"] == "analyze"


def test_other_images_change_its_key_and_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "far" / "1.png")
    settings = ["analyze={ood: [{name: far, source: far}]}"]
    before = build(load_config("demo", settings))
    assert before["analyze"].config.settings.ood[0].source == str(tmp_path / "far")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "far" / "2.png")
    after, keys = build(load_config("demo", settings)).keys(), before.keys()
    changed = {name for name in keys if keys[name] != after[name]}
    assert "analyze" in changed
    assert not changed & {"ingest", "base", "distill", "tokenize", "score", "select.reconstruction", "matrix"}
