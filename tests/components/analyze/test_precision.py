"""What is measured anew lies beside stored scores, so it is computed at their precision."""

from dataclasses import replace
from pathlib import Path

import pytest

from components.analyze.settings import AnalyzeConfig
from components.analyze.stage import made
from components.artifacts import TokenCounts
from components.config import RegisteredModel, TablesConfig
from components.publish import publish_tables
from model import AlitTokenizer
from tests.by_hand import finish, job, photographs
from tests.components.analyze.by_hand import PREDICTED, THRESHOLD, inputs_of

SMALL = AnalyzeConfig(images=6, strange_images=4, attention_images=4, timed_images=4, resamples=10)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions of the tokenizers that a test loads."""
    precisions, load = [], AlitTokenizer.load

    def spy(*arguments, **named):
        tokenizer = load(*arguments, **named)
        precisions.append(tokenizer.precision)
        return tokenizer

    monkeypatch.setattr(AlitTokenizer, "load", spy)
    return precisions


@pytest.mark.parametrize(
    ("topic", "precision"),
    [
        ("familiarity", "int8"),
        ("specialization", "bf16"),
        ("representation", "bf16"),
        ("representation", "int8"),
        ("single_pass", "int8"),
        ("regions", "bf16"),
    ],
)
def test_sections(topic: str, precision: str, loaded: list[str], tmp_path: Path) -> None:
    whole = photographs(40)
    rows = [{**row, "label": "ab"[number % 2]} for number, row in enumerate(whole.rows)]
    labelled = replace(whole, rows=rows)
    inputs = inputs_of(tmp_path, labelled, SMALL, [THRESHOLD, PREDICTED], precision=precision)
    loaded.clear()
    section = made(topic, inputs)
    assert section.finding and loaded == [precision]


def test_published_pictures(loaded: list[str], tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, photographs(40), SMALL, precision="bf16")
    loaded.clear()
    (tmp_path / "scores" / "summary.json").write_text('{"rows": []}')
    finish(tmp_path / "counts", TokenCounts, config={"name": "reconstruction"})
    publish_tables(
        job(tmp_path / "out"),
        config=TablesConfig(pictures=1),
        resources=RegisteredModel(name="alit", version=1),
        images=inputs.images,
        tokenizer=inputs.tokenizer,
        scores=inputs.scores,
        counts_reconstruction=TokenCounts.open(str(tmp_path / "counts")),
    )
    assert loaded == ["bf16"]
