"""Judges in the model registry: versions with their figures, and the files come out as they went in."""

import os
from pathlib import Path

import mlflow
import pytest
from PIL import Image
from skimage import data

from components.images import encode_png
from components.registry import Companions, find_judge, find_tokenizer, judge_digest, register_judge, register_tokenizer
from components.tracking import Store, open_parent_run
from model.starter import model_folder


def test_a_judge_is_registered_with_its_figures_and_comes_out_again(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = open_parent_run(Store(uri, "alit", str(tmp_path / "files")), "run", {})
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "judge.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"weights")
    made = [
        register_judge(tracker, str(folder), name="alit-judge-depth", figures={"abs_rel": 0.5, "skill": skill})
        for skill in (0.1, 0.2)
    ]
    assert [(one.name, one.version) for one in made] == [("alit-judge-depth", 1), ("alit-judge-depth", 2)]
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_model_version("alit-judge-depth", "2")
    assert {name: found.tags[name] for name in found.tags if name.startswith("judge.")} == {
        "judge.abs_rel": "0.5",
        "judge.skill": "0.2",
    }
    assert find_judge(uri, made[0]) == find_judge(uri, made[1]) == judge_digest(str(folder))
    for file in folder.iterdir():
        assert (Path(found.source) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_run_registers_where_it_is_recorded_whatever_else_the_process_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", elsewhere)
    for name in ("one", "other"):
        uri = f"sqlite:///{tmp_path}/{name}.db"
        tracker = open_parent_run(Store(uri, "alit", str(tmp_path / name)), "run", {})
        example = encode_png(Image.fromarray(data.astronaut()))
        made = register_tokenizer(
            tracker, model_folder("starter"), name="alit", companions=Companions({}, {}), example_png=example
        )
        assert find_tokenizer(uri, "models:/alit/1").model == made
        assert os.environ["MLFLOW_REGISTRY_URI"] == elsewhere
    assert not Path(tmp_path, "elsewhere.db").exists()
