"""What is garbage: by rule, and in workspaces on a disk and in a bucket."""

from pathlib import Path

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components import buckets
from components.artifacts import DRAFTS, Draft, Manifest, exists, join, read_manifest, write_json
from components.tracking import Store, open_child, open_parent_run
from pipelines.cli import main
from pipelines.config import load_config
from pipelines.garbage import Folder, marked, reachable
from pipelines.lock import hold
from pipelines.train import build
from tests.s3_server import client_of, point, s3_server


def manifest(key: str, *inputs: str) -> Manifest:
    return Manifest("image_set", 1, "ingest", key, {f"input_{need}": need for need in inputs}, {}, {})


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


def make(workspace: str, stage: str, key: str, *inputs: str) -> str:
    draft = Draft(workspace, stage, key)
    write_json(join(draft.uri, "figures.json"), {"stage": stage})
    return draft.commit(manifest(key, *inputs), replaces=read_manifest(draft.final))


def fill(workspace: str, uri: str, planned: str, folder: Path) -> dict[str, str]:
    """Artifacts that the plan, a run and nothing refers to, and a draft; name -> place."""
    keys = {name: letter * 16 for name, letter in (("source", "a"), ("used", "b"), ("lost", "c"), ("deleted", "d"))}
    made = {name: make(workspace, "score", key) for name, key in keys.items()}
    made["used"] = make(workspace, "score", keys["used"], keys["source"])
    made["planned"] = make(workspace, "ingest", planned)
    for name in ("deleted", "used"):
        parent = open_parent_run(Store(uri, "alit", str(folder / "files")), "run", {})
        child = open_child(parent, name, {"alit.stage": "score", "alit.key": keys[name]})
        if name == "deleted":
            mlflow.MlflowClient(tracking_uri=uri).delete_run(child.run_id)
    write_json(join(workspace, DRAFTS, "score-x", "figures.json"), {})
    write_json(join(workspace, "logs", "20260101", "score.log"), {})
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


def check(workspace: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{folder}/mlflow.db"
    arguments = [f"workspace={workspace}", f"mlflow.uri={uri}", "data.crops=4"]
    planned = build(load_config("demo", arguments)).keys()["ingest"]
    made = fill(workspace, uri, planned, folder)
    command = ["gc", "demo", *(word for text in arguments for word in ("--set", text))]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "3 folders" in said and all(key in said for key in ("c" * 16, "d" * 16, "score-x"))
    assert all(exists(place) for place in made.values())  # a dry run
    assert main([*command, "--keep-runs", "1"]) == 0 and "3 folders" in capsys.readouterr().out
    assert main([*command, "--keep-runs", "0"]) == 0 and "5 folders" in capsys.readouterr().out
    with hold(workspace, "another"):
        assert main([*command, "--delete"]) == 1
        assert "is in use by run another" in capsys.readouterr().err
    assert main([*command, "--delete"]) == 0
    assert {name for name, place in made.items() if not exists(place)} == {"lost", "deleted", "draft"}
    capsys.readouterr()
    assert main(command) == 0 and "0 folders" in capsys.readouterr().out
    assert not buckets.is_bucket(workspace) or not Path("s3:").exists()
