"""The record, against a real sqlite store."""

import logging
import os
import pickle
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from components import tracking
from components.config import MlflowSettings
from components.tracking import (
    DataSet,
    Store,
    Tracker,
    TrackingError,
    close_abandoned,
    open_child,
    open_parent_run,
    redact,
    store_for,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_away_until", {})
    monkeypatch.setattr(tracking, "_backlog", {})


@pytest.mark.parametrize("first", ["tracking.load(store)", "registry.runs_of_versions(store.uri)"])
def test_mlflow_reports_to_nobody(first: str, tmp_path: Path) -> None:
    """Whoever imports it first, in a process that was told nothing."""
    code = f"""
from components import registry, tracking
store = tracking.Store("sqlite:///{tmp_path}/mlflow.db", "alit")
{first}
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
"""
    told = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "PYTEST"))}
    subprocess.run([sys.executable, "-c", code], env=told, cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_for(MlflowSettings(), str(tmp_path_factory.mktemp("work space")))


@pytest.fixture
def tracker(store: Store) -> Tracker:
    return open_parent_run(store, "train 2026-01-01 00:00:00", {"alit.run_id": "r"})


def read(tracker: Tracker) -> Any:
    return MlflowClient(tracking_uri=tracker.uri).get_run(tracker.run_id)


def break_store(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The store goes away; returns the calls that were tried."""
    tried: list[str] = []

    class Away:
        def __getattr__(self, name: str) -> Any:
            tried.append(name)
            raise ConnectionError("the server https://me:secret@host is away")

    monkeypatch.setattr(tracking, "_client", lambda _: Away())
    return tried


class TestStore:
    def test_default_is_the_workspace(self, tmp_path: Path) -> None:
        store = store_for(MlflowSettings(experiment="e"), str(tmp_path))
        assert store == Store(f"sqlite:///{tmp_path}/mlflow.db", "e", f"{tmp_path}/mlflow-artifacts")

    def test_environment_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = MlflowSettings(uri="http://from-config")
        assert store_for(settings, str(tmp_path)).uri == "http://from-config"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
        assert store_for(settings, str(tmp_path)) == Store("http://from-environment", "alit", None)

    def test_relative_database_becomes_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        store = store_for(MlflowSettings(uri="sqlite:///runs/mlflow.db"), "/elsewhere")
        assert store.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
        assert store.artifacts == f"{tmp_path}/runs/mlflow-artifacts"

    def test_bucket_needs_a_uri(self) -> None:
        with pytest.raises(ValueError, match=r"mlflow\.uri"):
            store_for(MlflowSettings(), "s3://bucket/workspace")
        assert store_for(MlflowSettings(uri="http://server:5000"), "s3://bucket/workspace").uri == "http://server:5000"

    def test_unusable(self, tmp_path: Path) -> None:
        with pytest.raises(TrackingError, match="can't be used"):
            open_parent_run(Store("sqlite:////proc/nowhere/mlflow.db", "e"), "n", {})


class TestTracker:
    def test_travels(self, tracker: Tracker) -> None:
        assert pickle.loads(pickle.dumps(tracker)) == tracker
        assert Tracker(**asdict(tracker)) == tracker

    def test_metrics(self, tracker: Tracker) -> None:
        for step in (1, 2):
            tracker.metrics({"loss": 1.0 / step, "l1@32": np.float32(0.5), "word": "no number", "none": None}, step)
        run = read(tracker)
        assert run.data.metrics == {"loss": 0.5, "l1_32": 0.5}
        history = MlflowClient(tracking_uri=tracker.uri).get_metric_history(tracker.run_id, "loss")
        assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]

    def test_params_are_flat_and_cut(self, tracker: Tracker) -> None:
        tracker.params({"a": {"b": 1, "c": {"d": None}}, "tasks": [{"x": 1}], "long": "x" * 9000})
        tracker.params({f"p{n}": n for n in range(250)})
        params = read(tracker).data.params
        assert params["a.b"] == "1" and params["a.c.d"] == "None" and params["tasks"] == '[{"x": 1}]'
        assert len(params["long"]) == tracking.VALUE_LENGTH and params["p249"] == "249"

    def test_no_secret(self, tracker: Tracker) -> None:
        tracker.params({"uri": "s3://key:secret@host/bucket"})
        tracker.tags({"from": "https://me:secret@host"})
        tracker.text("uri: https://me:secret@host", "config.yaml")
        run = read(tracker)
        assert run.data.params["uri"] == "s3://***@host/bucket" and run.data.tags["from"] == "https://***@host"
        assert "secret" not in Path(run.info.artifact_uri, "config.yaml").read_text()
        assert redact("no url, me@host") == "no url, me@host"

    def test_files_pictures_tables(self, tracker: Tracker, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "one.txt").write_text("1")
        tracker.artifact(tmp_path / "folder" / "one.txt")
        tracker.artifact(tmp_path / "folder", "all")
        tracker.picture(np.zeros((8, 8, 3), np.uint8), key="reconstruction", step=3)
        tracker.table({"budget": [32, 64], "l1": [0.2, 0.1]}, "budgets")
        root = Path(read(tracker).info.artifact_uri)
        assert (root / "one.txt").exists() and (root / "all" / "one.txt").exists() and (root / "budgets.json").exists()
        assert any("reconstruction" in path.name for path in (root / "images").iterdir())

    def test_data_set(self, tracker: Tracker) -> None:
        tracker.data_set(DataSet("photos", "d" * 64, "/data/photos", {"images": 980, "rejected": 20}))
        (used,) = read(tracker).inputs.dataset_inputs
        assert (used.dataset.name, used.dataset.digest) == ("photos", "d" * 36)
        assert "980" in used.dataset.profile and "/data/photos" in used.dataset.source

    def test_child(self, tracker: Tracker) -> None:
        child = open_child(tracker, "01 ingest", {"alit.stage": "ingest"})
        assert child.parent == tracker and read(child).data.tags["mlflow.parentRunId"] == tracker.run_id
        child.close("FAILED")
        assert read(child).info.status == "FAILED" and read(tracker).info.status == "RUNNING"

    def test_without_a_run_nothing_happens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tried = break_store(monkeypatch)
        nobody = Tracker()
        nobody.metrics({"a": 1})
        nobody.params({"a": 1})
        nobody.table({"a": [1]}, "t")
        nobody.close()
        assert tried == []


class TestTroubles:
    def test_nothing_raises_and_one_warning(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tried = break_store(monkeypatch)
        with caplog.at_level(logging.WARNING):
            for step in range(100):
                tracker.metrics({"loss": 1.0}, step)
                tracker.picture(np.zeros((2, 2, 3), np.uint8), "k")
            assert open_child(tracker, "01 ingest", {}).run_id == ""
        assert len(tried) == 1  # an absent server is not asked again at every step
        assert len(caplog.records) == 1 and "secret" not in caplog.text

    def test_metrics_wait_for_the_server(self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as away:
            break_store(away)
            tracker.metrics({"loss": 3.0}, 1)
        tracker.metrics({"loss": 2.0}, 2)
        assert read(tracker).data.metrics == {}  # still left alone
        monkeypatch.setattr(tracking, "_away_until", {})
        tracker.metrics({"loss": 1.0}, 3)
        history = MlflowClient(tracking_uri=tracker.uri).get_metric_history(tracker.run_id, "loss")
        assert [m.value for m in history] == [3.0, 2.0, 1.0]

    def test_a_refused_call_does_not_silence_the_next(self, tracker: Tracker, tmp_path: Path) -> None:
        tracker.artifact(tmp_path / "missing")
        tracker.params({"a": 1})
        tracker.params({"a": 2})  # MLflow's params don't change
        tracker.metrics({"loss": 1.0})
        assert read(tracker).data.metrics == {"loss": 1.0}

    def test_abandoned(self, store: Store) -> None:
        mine = open_parent_run(store, "p", {"alit.run_id": "dead"})
        child = open_child(mine, "01 ingest", {"alit.run_id": "dead"})
        finished = open_child(mine, "02 base", {"alit.run_id": "dead"})
        finished.close()
        other = open_parent_run(store, "p", {"alit.run_id": "alive"})
        assert close_abandoned(store, "dead") == 2
        assert [read(t).info.status for t in (mine, child, finished, other)] == [
            "KILLED",
            "KILLED",
            "FINISHED",
            "RUNNING",
        ]

    def test_many_metrics_are_quick(self, tracker: Tracker) -> None:
        started = time.monotonic()
        tracker.metrics({f"m{n}": n for n in range(1500)})
        assert time.monotonic() - started < 10
        assert len(read(tracker).data.metrics) == 1500
