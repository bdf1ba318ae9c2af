"""A night with a registered model, the next one, other champions, and what may be thrown away afterwards."""

import re
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.entities import Run
from PIL import Image

from model import AlitTokenizer
from tests.by_hand import photographs
from tests.integration.conftest import Result, Workspace, alit, settings
from tests.registered import register, registry_at, tracker_in

pytestmark = pytest.mark.slow

NEW = 40  # images of a night
GATE = "publish.gate={metric: l1, budget: 64}"


@dataclass(frozen=True)
class Night:
    """A rerun on a folder of images, twice."""

    folder: Path
    arguments: list[str]
    first: Result
    second: Result


def night(finished: Workspace, folder: Path) -> Night:
    values = (f"workspace={finished.path}", f"data.source={folder}", "publish.pictures=1")
    arguments = ["rerun", *settings(*values)]
    first = alit("run", *arguments)
    assert first.code == 0, first.out + first.err
    return Night(folder, arguments, first, alit("run", *arguments))


@pytest.fixture(scope="module")
def similar(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """Other crops of the photographs that the model was trained on."""
    folder = tmp_path_factory.mktemp("similar")
    rows = [row for row in photographs(200).rows if row["split"] == "train"]
    for number, row in enumerate(rows[:: max(1, len(rows) // NEW)][:NEW]):
        (folder / f"{number}.png").write_bytes(row["image"])
    return night(finished, folder)


@pytest.fixture(scope="module")
def noise(finished: Workspace, similar: Night) -> Night:
    """What no photograph is like, in the same folder."""
    generator = np.random.default_rng(0)
    for number in range(NEW):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(similar.folder / f"noise-{number}.png")
    return night(finished, similar.folder)


def client_of(finished: Workspace) -> mlflow.MlflowClient:
    uri = registry_at(finished.path)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def parents(finished: Workspace, pipeline: str) -> list[Run]:
    """The pipeline's runs, the oldest first."""
    client = client_of(finished)
    (experiment,) = [one for one in client.search_experiments() if one.name == "alit"]
    wanted = f"tags.alit.pipeline = '{pipeline}'"
    return list(client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time"]))


def news(run: Run) -> dict[str, float]:
    return {name.removeprefix("news/"): n for name, n in run.data.metrics.items() if name.startswith("news/")}


def aliases(finished: Workspace) -> dict[str, int]:
    model = client_of(finished).get_registered_model("alit-demo")
    return {alias: int(version) for alias, version in model.aliases.items()}


def stages_done(said: Result) -> list[str]:
    """The stages that ran, in order."""
    return re.findall(r"^(\S+) +done +\d", said.out, re.MULTILINE)


def artifacts_in(said: Result) -> list[str]:
    """The stages of the artifacts in gc's table."""
    return re.findall(r"^([a-z.]+)/[0-9a-f]{16} ", said.out, re.MULTILINE)


def test_two_nights(finished: Workspace, similar: Night) -> None:
    assert re.search(r"^promote +done .*alias champion", finished.result.out, re.MULTILINE)
    assert "publish" in stages_done(similar.first) and "base" not in stages_done(similar.first)
    assert f"added {NEW}" in similar.first.out and f"encoded {NEW}" in similar.first.out
    assert similar.second.code == 0 and not stages_done(similar.second)
    assert "added 0" in similar.second.out and "encoded 0" in similar.second.out
    first, second = parents(finished, "rerun")[:2]
    nothing = {"added": 0, "changed": 0, "removed": 0, "encoded": 0, "scored": 0}
    assert news(first) == {**nothing, "images": NEW, "added": NEW, "encoded": NEW, "scored": NEW}
    assert news(second) == {**nothing, "images": NEW}
    assert "version 1" in first.data.tags["alit.model"]
    assert {first.info.status, second.info.status} == {"FINISHED"}
    fetched, trained = (finished.path / "model").glob("*"), finished.artifact("distill")
    (folder,) = fetched
    for name in ("weights.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


def test_drift_is_seen_and_no_more_than_that(finished: Workspace, similar: Night, noise: Night) -> None:
    assert not re.search(r"^drift: ", similar.first.out, re.MULTILINE), similar.first.out
    (flagged,) = re.findall(r"^drift: (.*)", noise.first.out, re.MULTILINE)
    assert "reconstruction tokens" in flagged and "l1@64" in flagged
    runs = parents(finished, "rerun")
    told = {name: news(runs[2])[name] for name in ("images", "added", "encoded", "scored")}
    assert told == {"images": 2 * NEW, "added": NEW, "encoded": NEW, "scored": NEW}  # and these alone are compared
    assert [run.data.tags["alit.drift"] == "none" for run in runs[:4]] == [True, True, False, False]
    assert runs[2].data.metrics["psi.l1_64"] > 3 * runs[0].data.metrics["psi.l1_64"]
    rows = [pq.read_table(path).to_pylist() for path in (finished.path / "drift").glob("*/table/part-0.parquet")]
    assert sorted(sum(row["flagged"] for row in table) > 0 for table in rows) == [False, True]
    assert len(list((finished.path / "drift").glob("*/drift.png"))) == 2
    page = alit("report", *noise.arguments)
    assert page.code == 0 and f"report      {page.out.strip()}" in noise.second.out
    shown = Path(page.out.strip()).read_text()
    assert ">Drift<" in shown and "Flagged: " in shown and "alit-demo, version 1" in shown
    assert '"models:/alit-demo/1"' in shown


def test_another_champion(finished: Workspace, similar: Night) -> None:
    again = alit("run", *finished.arguments, *settings(GATE, "tasks.0.rule.max=0.09"))
    assert again.code == 0, again.out + again.err
    assert stages_done(again)[-3:] == ["publish", "promote", "report"]
    run = parents(finished, "train")[-1]
    assert run.data.metrics["promotion/new"] == run.data.metrics["promotion/champion"]  # the same weights
    assert "not better" in run.data.tags["alit.promotion"] and run.data.tags["alit.alias"] == "challenger"
    assert aliases(finished) == {"champion": 1, "challenger": 2}

    tokenizer = AlitTokenizer.load(finished.artifact("distill"))
    with torch.no_grad():
        for parameter in tokenizer.decoder.parameters():
            parameter.mul_(0.9)
    damaged = finished.path.parent / "damaged"
    tokenizer.save(damaged)
    version = register(tracker_in(finished.path), damaged).version
    moved = alit("promote", *finished.arguments, "--version", str(version))
    assert moved.code == 0 and f"version 1 -> version {version}" in moved.out, moved.out + moved.err
    planned = alit("plan", *similar.arguments)
    assert f"is version {version}" in planned.out
    assert re.search(r"^model +\w+ +run +content \w+ -> \w+", planned.out, re.MULTILINE), planned.out
    assert re.search(r"^tokenize +\w+ +run +.*input tokenizer changed", planned.out, re.MULTILINE)
    assert re.search(r"^ingest +\w+ +stands", planned.out, re.MULTILINE)

    better = alit("run", *finished.arguments, *settings(GATE, "tasks.0.rule.max=0.085"), "--until", "promote")
    assert better.code == 0 and "better by" in better.out, better.out + better.err
    assert aliases(finished) == {"champion": 4, "previous": version, "challenger": 2}
    made = client_of(finished).get_model_version("alit-demo", "4")
    assert "better by" in made.tags["alit.champion"] and "better by" in made.description

    planned = alit("plan", *similar.arguments)  # the weights of version 1 again
    states = dict(re.findall(r"^(\S+) +[0-9a-f]{16} +(\w+)", planned.out, re.MULTILINE))
    assert {name for name, state in states.items() if state == "run"} == {"drift", "report", "publish"}

    assert alit("rollback", *finished.arguments).code == 0
    assert aliases(finished) == {"champion": version, "challenger": 4}
    none = alit("rollback", *similar.arguments)
    assert none.code == 2 and "no previous" in none.err
    assert alit("promote", *similar.arguments).code == 0
    assert aliases(finished) == {"champion": 4, "previous": version}
    none = alit("promote", *finished.arguments)
    assert none.code == 2 and "no challenger" in none.err


def test_what_no_run_refers_to_goes(finished: Workspace, similar: Night, noise: Night) -> None:
    for file in similar.folder.glob("noise-*"):
        file.unlink()  # the plan is that of the first night again
    kept = alit("gc", *similar.arguments)
    assert kept.code == 0
    assert set(artifacts_in(kept)) <= {"select.reconstruction"}  # which `alit select` makes without a run
    assert "scratch/distill/" in kept.out  # of a stage that is finished
    client = client_of(finished)
    drifted = [run for run in parents(finished, "rerun") if run.data.tags["alit.drift"] != "none"]
    dropped = {run.info.run_id for run in drifted}
    for run in client.search_runs(["1"], max_results=1000):
        if {run.info.run_id, run.data.tags.get("mlflow.parentRunId")} & dropped:
            client.delete_run(run.info.run_id)
    found = alit("gc", *similar.arguments)
    assert artifacts_in(found).count("ingest") == artifacts_in(found).count("tokenize") == 1, found.out
    assert "model" not in artifacts_in(found)
    assert len(list((finished.path / "ingest").iterdir())) == 3
    assert alit("gc", *similar.arguments, "--delete").code == 0
    assert len(list((finished.path / "ingest").iterdir())) == 2
    assert list((finished.path / "logs").iterdir())
    assert "0 folders" in alit("gc", *similar.arguments).out
    for arguments in (finished.arguments, similar.arguments):
        planned = alit("plan", *arguments).out
        assert re.search(r"^pack.reconstruction +\w+ +stands", planned, re.MULTILINE), planned
