"""Which alias a new version gets, and how the champion fares on the new model's held-out images; no Ray."""

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from components.artifacts import Figures, ImageSet, Job, Publication, ScoreTable
from components.config import GateConfig, InferenceResources, PromoteConfig
from components.mapping import Mapping, Totals, _FileMapper
from components.parts import Part, part_names
from components.registry import ModelVersion, aliases_of
from components.score import gate as gate_module
from components.score.gate import decide, promote
from components.store import read_json, write_json
from components.task_config import ScoreStageConfig
from components.tracking import Tracker
from model import AlitTokenizer
from model.starter import STARTER
from pipelines.promotion import rolled_back
from tests.by_hand import SIZE, finish, image_set, of_photographs, photographs
from tests.registered import register, tracker_in

L1 = GateConfig(metric="l1", budget=64)
PSNR = GateConfig(metric="psnr", budget=64, margin=0.5)


@pytest.mark.parametrize(
    ("gate", "new", "champion", "larger", "alias"),
    [
        (L1, 0.05, 0.06, False, "champion"),
        (L1, 0.06, 0.06, False, "challenger"),  # equal is not better
        (L1, 0.07, 0.06, False, "challenger"),
        (PSNR, 21.0, 20.0, True, "champion"),
        (PSNR, 20.5, 20.0, True, "challenger"),  # exactly the margin is not more than it
        (PSNR, 19.0, 20.0, True, "challenger"),
        (L1, float("nan"), 0.06, False, "challenger"),
    ],
)
def test_direction_and_margin(gate: GateConfig, new: float, champion: float, larger: bool, alias: str) -> None:
    decision = decide(gate, new, champion, larger_is_better=larger)
    assert decision.alias == alias
    assert f"{new:.6g}" in decision.reason and f"{champion:.6g}" in decision.reason
    assert f"{gate.metric}@{gate.budget}" in decision.reason


def test_without_a_gate_it_waits() -> None:
    decision = decide(None, 0.0, 0.0, larger_is_better=False)
    assert decision.alias == "challenger" and "no gate" in decision.reason


@dataclass(frozen=True)
class Made:
    """What a train pipeline of the starter's weights leaves before ``promote``."""

    folder: Path
    tracker: Tracker
    images: ImageSet
    scores: ScoreTable

    def promote(self, version: ModelVersion, gate: GateConfig | None, **changed: Any) -> Figures:
        """The stage, for a version that was published."""
        output = self.folder / f"promote-{version.name}-{version.version}"
        shutil.rmtree(output, ignore_errors=True)  # a stage's folder is its own
        publication = self.folder / f"publication-{version.name}-{version.version}"
        write_json(f"{publication}/publication.json", {"model": version.name, "version": version.version})
        finish(publication, Publication)
        inputs = {"images": self.images, "scores": self.scores, "publication": Publication.open(str(publication))}
        tracking = asdict(replace(self.tracker, parent_run_id=self.tracker.run_id))
        return promote(
            Job("promote", "0", "", str(output), "", tracking=tracking),
            config=PromoteConfig(gate=gate),
            resources=InferenceResources(batch_size=7),
            **{**inputs, **changed},
        )


def one_after_the_other(mapping: Mapping, progress: Any) -> Totals:
    """map_table without Ray."""
    Path(mapping.target).mkdir(parents=True)
    parts = [Part(name) for name in part_names(mapping.sources[0])]
    mapper = _FileMapper(mapping, parts, ())
    for number in range(len(parts)):
        mapper({"id": number})
    return {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, photos = tmp_path_factory.mktemp("gate"), photographs(48)
    images, scores = image_set(folder / "images", photos), of_photographs(folder / "scores", photos)
    finish(folder / "images", ImageSet, config={"data": {"image_size": SIZE}})
    finish(folder / "scores", ScoreTable, config=ScoreStageConfig(metrics=("l1",)).model_dump(mode="json"))
    manifest = read_json(f"{scores.uri}/artifact.json")
    write_json(f"{scores.uri}/artifact.json", {**manifest, "counts": {"split": "val"}})
    return Made(folder, tracker_in(folder), images, scores)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "map_table", one_after_the_other)


def damaged(folder: Path) -> Path:
    """The starter with a decoder that lost some of its weight."""
    tokenizer = AlitTokenizer.load(STARTER)
    with torch.no_grad():
        for parameter in tokenizer.decoder.parameters():
            parameter.mul_(0.9)
    tokenizer.save(folder)
    return folder


def test_the_first_is_champion_and_the_same_weights_are_not_better(made: Made) -> None:
    first = made.promote(register(made.tracker, name="same"), L1)
    assert (first["alias"], first["reason"]) == ("champion", "the first one")
    second = made.promote(register(made.tracker, name="same"), L1)
    val = [row["split"] == "val" for row in photographs(48).rows]
    mean = photographs(48).scores["l1"][val, -1].mean()
    assert second["new"] == second["champion"] == pytest.approx(mean, rel=1e-6)
    assert second["alias"] == "challenger" and f"{sum(val)} images of val" in str(second["reason"])
    third = made.promote(register(made.tracker, name="same"), None)
    assert third["alias"] == "challenger" and "no gate" in str(third["reason"])
    assert aliases_of(made.tracker.uri, "same") == {"champion": 1, "challenger": 3}


def test_a_better_one_takes_over_and_a_rerun_of_the_stage_leaves_it(made: Made, tmp_path: Path) -> None:
    register(made.tracker, damaged(tmp_path / "damaged"), name="better", alias="champion")
    version = register(made.tracker, name="better")
    figures = made.promote(version, L1)
    assert figures["alias"] == "champion" and figures["new"] < figures["champion"], figures
    assert aliases_of(made.tracker.uri, "better") == {"champion": 2, "previous": 1}
    again = made.promote(version, L1)
    assert again["reason"] == "it was already"
    assert aliases_of(made.tracker.uri, "better") == {"champion": 2, "previous": 1}


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_promotion_that_is_killed_after_some_aliases_can_be_done_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    name, left = f"killed-{moved}", iter(range(moved))
    register(made.tracker, damaged(tmp_path / "damaged"), name=name, alias="champion")
    version, move = register(made.tracker, name=name), MlflowClient.set_registered_model_alias

    def killed_when_done(client: MlflowClient, *what: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        move(client, *what)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed_when_done)
        with suppress(KeyboardInterrupt):
            made.promote(version, L1)
    made.promote(version, L1)
    aliases = aliases_of(made.tracker.uri, name)
    assert aliases == {"champion": 2, "previous": 1}
    assert rolled_back(aliases) == {"champion": 1, "previous": None, "challenger": 2}


def test_a_champion_for_other_images_stays(made: Made, tmp_path: Path) -> None:
    register(made.tracker, name="other", alias="champion")
    narrow = made.promote(register(made.tracker, name="other"), GateConfig(metric="l1", budget=60))
    assert narrow["alias"] == "challenger" and "without 60" in str(narrow["reason"])
    finish(made.folder / "images", ImageSet, config={"data": {"image_size": 32}})
    size = made.promote(register(made.tracker, name="other"), L1)
    finish(made.folder / "images", ImageSet, config={"data": {"image_size": SIZE}})
    assert size["alias"] == "challenger" and "it sees 64 px, these images have 32" in str(size["reason"])
