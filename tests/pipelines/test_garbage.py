"""What is garbage: by rule, and in workspaces on a disk and in a bucket."""

from pathlib import Path

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components import buckets
from components.artifacts import DRAFTS, Draft, Manifest, read_manifest
from components.store import exists, join, write_json
from components.tracking import Store, open_child, open_parent_run
from pipelines.cli import main
from pipelines.config import load_config
from pipelines.garbage import Folder, marked, reachable
from pipelines.lock import hold
from pipelines.train import build
from tests.s3_server import client_of, point, s3_server


def manifest(key: str, *inputs: str, made_by: str | None = None) -> Manifest:
    needs = {f"input_{need}": need for need in inputs}
    return Manifest("image_set", 1, "ingest", key, needs, {}, {}, mlflow_run_id=made_by)


def folders(needs: dict[str, list[str]]) -> list[Folder]:
    return [Folder(f"w/{key}", "stage", key, manifest(key, *inputs)) for key, inputs in needs.items()]


def test_what_a_root_was_made_from_stays_however_far_back() -> None:
    chain = folders({"a": [], "b": ["a"], "c": ["b", "x"], "d": ["a"], "e": ["d"]})
    assert reachable(chain, {"c"}) == {"a", "b", "c", "x"}
    assert [one.uri for one in marked(chain, [], {"c"})] == ["w/d", "w/e"]


def test_unfinished_artifacts_and_scratch() -> None:
    known = [Folder("w/a", "distill", "a", manifest("a")), Folder("w/b", "distill", "b")]
    scratch = [Folder(f"w/scratch/{key}", "distill", key) for key in "acd"]
    why = {one.uri: one.why for one in marked(known, scratch, {"a", "c"})}
    assert why == {
        "w/b": "was never finished",
        "w/scratch/a": "scratch of a finished stage",
        "w/scratch/d": "scratch that no run and no plan refers to",  # c is killed training that will go on
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(*(st.sets(st.integers(0, max(0, i - 1))) for i in range(n)))))
def test_nothing_kept_lacks_its_inputs(needs: tuple[set[int], ...]) -> None:
    graph = {str(at): [str(need) for need in inputs if need < at] for at, inputs in enumerate(needs)}
    roots = {str(at) for at in range(0, len(needs), 3)}
    gone = {one.uri.removeprefix("w/") for one in marked(folders(graph), [], roots)}
    assert not gone & roots
    assert all(need not in gone for key, inputs in graph.items() if key not in gone for need in inputs)


def make(workspace: str, stage: str, key: str, *inputs: str, made_by: str | None = None) -> str:
    draft = Draft(workspace, stage, key)
    write_json(join(draft.uri, "figures.json"), {"stage": stage})
    return draft.commit(manifest(key, *inputs, made_by=made_by), replaces=read_manifest(draft.final))


def recorded(uri: str, experiment: str, key: str, folder: Path) -> str:
    """The id of a new child run that refers to the artifact ``key``."""
    parent = open_parent_run(Store(uri, experiment, str(folder / "files")), "run", {})
    return open_child(parent, "score", {"alit.stage": "score", "alit.key": key}).run_id


def fill(workspace: str, uri: str, planned: dict[str, str], folder: Path) -> dict[str, str]:
    """Artifacts that the plan, a run and nothing refers to, a draft, and half-written files; name -> place."""
    keys = {name: letter * 16 for name, letter in (("source", "a"), ("used", "b"), ("lost", "c"), ("deleted", "d"))}
    made = {name: make(workspace, "score", key) for name, key in keys.items()}
    made["used"] = make(workspace, "score", keys["used"], keys["source"])
    made["planned"] = make(workspace, "ingest", planned["ingest"])
    for name in ("deleted", "used"):
        child = recorded(uri, "alit", keys[name], folder)
        if name == "deleted":
            mlflow.MlflowClient(tracking_uri=uri).delete_run(child)
    write_json(join(workspace, DRAFTS, "score-x", "figures.json"), {})
    write_json(join(workspace, "logs", "20260101", "score.log"), {})
    if not buckets.is_bucket(workspace):
        write_json(join(workspace, ".lock.part"), {})
        write_json(join(workspace, "scratch", "distill", planned["distill"], "state.json.x.part"), {})
        write_json(join(workspace, "mlflow-artifacts", "own.part"), {})  # a name that a run chose for its file
    else:
        for place in (f"alit/scratch/distill/{planned['distill']}/state", "alit/mlflow-artifacts/own", "other/file"):
            upload = buckets.client().create_multipart_upload(Bucket="work", Key=place)["UploadId"]
            part = {"Bucket": "work", "Key": place, "UploadId": upload, "PartNumber": 1}
            buckets.client().upload_part(**part, Body=b"half of it")
    return made | {"draft": join(workspace, DRAFTS, "score-x"), "logs": join(workspace, "logs", "20260101")}


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_gc(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "disk":
        check(str(tmp_path / "w"), tmp_path, capsys)
        return
    with s3_server() as endpoint:
        client_of(endpoint).create_bucket(Bucket="work")
        point(monkeypatch, endpoint)
        check("s3://work/alit", tmp_path, capsys)


def half_written(workspace: str) -> set[str]:
    """The names of partial files, or the keys of uploads that were not completed."""
    if buckets.is_bucket(workspace):
        uploads = buckets.client().list_multipart_uploads(Bucket="work").get("Uploads", ())
        return {one["Key"].rpartition("/")[2] for one in uploads}
    return {path.name for path in Path(workspace).rglob("*.part")}


def check(workspace: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{folder}/mlflow.db"
    arguments = [f"workspace={workspace}", f"mlflow.uri={uri}", "data.crops=4"]
    planned = build(load_config("demo", arguments)).keys()
    made = fill(workspace, uri, planned, folder)
    command = ["gc", "demo", *(word for text in arguments for word in ("--set", text))]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    in_bucket = buckets.is_bucket(workspace)
    partial = {"state"} if in_bucket else {".lock.part", "state.json.x.part"}
    assert f"3 folders and {len(partial)} unfinished files" in said and all(name in said for name in partial)
    assert half_written(workspace) > partial and "own" not in said
    assert all(key in said for key in ("c" * 16, "d" * 16, "score-x"))
    assert all(exists(place) for place in made.values())  # a dry run
    assert main([*command, "--keep-runs", "1"]) == 0 and "3 folders" in capsys.readouterr().out
    assert main([*command, "--keep-runs", "0"]) == 0 and "5 folders" in capsys.readouterr().out
    with hold(workspace, "another"):
        assert main([*command, "--delete"]) == 1
        assert "is in use by run another" in capsys.readouterr().err
    assert main([*command, "--delete"]) == 0
    assert half_written(workspace) == ({"own", "file"} if in_bucket else {"own.part"})
    assert {name for name, place in made.items() if not exists(place)} == {"lost", "deleted", "draft"}
    capsys.readouterr()
    assert main(command) == 0 and "0 folders" in capsys.readouterr().out
    assert not in_bucket or not Path("s3:").exists()


def test_an_mlflow_that_knows_nothing_of_it_lets_nothing_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server, workspace = f"sqlite:///{tmp_path}/server.db", str(tmp_path / "w")
    child = recorded(server, "alit", "a" * 16, tmp_path)
    made = [make(workspace, "score", letter * 16, made_by=child) for letter in "ab"]
    command = ["gc", "demo", "--set", f"workspace={workspace}", "--set", "data.crops=4"]
    for wrong in ([], ["--set", f"mlflow.uri={server}", "--set", "mlflow.experiment=another"]):
        for delete in ([], ["--delete"]):
            assert main([*command, *wrong, *delete]) == 2
            said = capsys.readouterr().err
            assert (
                child in said and "set MLFLOW_TRACKING_URI" in said and ("another" if wrong else "w/mlflow.db") in said
            )
    assert all(map(exists, made))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    mlflow.MlflowClient(tracking_uri=server).delete_run(child)  # and is known still
    make(workspace, "score", "c" * 16, made_by="0" * 32)  # of a run that another MLflow may have
    make(workspace, "score", "d" * 16)  # MLflow was away when it was made
    assert main([*command, "--delete"]) == 0
    said = capsys.readouterr()
    assert "3 folders" in said.out and "1 artifacts are kept" in said.err and "0" * 32 in said.err
    assert [path.name for path in (tmp_path / "w" / "score").iterdir()] == ["c" * 16]
