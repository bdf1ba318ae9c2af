"""Runs of toy pipelines on a real Ray with a real MLflow store."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run
from toy_stages import RAY, chain, events, stage

from components.artifacts import read_manifest
from components.config import MlflowSettings, RaySettings
from components.tracking import DataSet, TrackingError
from pipelines.bucket_lock import LockUnreachable
from pipelines.cluster import ClusterError, DemandError, stage_environment
from pipelines.dag import Demand, Pipeline, plan
from pipelines.lock import Holder, LocalLock, WorkspaceHeld, hold
from pipelines.recorder import RunRecord
from pipelines.runner import RunOptions, run
from pipelines.summary import lines_of

pytestmark = pytest.mark.slow

OPTIONS = RunOptions(ray=RAY, backoff_s=0.1)
STARTUP_S = 90.0


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """One Ray for the tests that don't care which: a run uses what is connected and leaves it be."""
    ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def states(record: RunRecord) -> dict[str, str]:
    return {one.name: one.state for one in record.stages}


def text_of(record: RunRecord, name: str) -> str:
    return Path(record[name].uri, "toy.txt").read_text()


def drafts(workspace: Path) -> list[Path]:
    return list((workspace / ".drafts").glob("*"))


def runs(workspace: Path) -> list[Run]:
    """Every MLflow run of the workspace, oldest first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{workspace}/mlflow.db")
    experiment = client.get_experiment_by_name("alit")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def wait_for(what: Callable[[], Any], seconds: float = STARTUP_S) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing within {seconds} s")


class Driver:
    """A run in a process of its own, in another folder, with a Ray of its own."""

    def __init__(self, workspace: Path, **of: dict[str, Any]) -> None:
        folder = workspace.parent / "elsewhere"
        folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import toy_stages; toy_stages.main()", str(workspace), json.dumps(of)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": stage_environment()["PYTHONPATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Until ``what`` is true, or the driver has ended too early."""
        wait_for(lambda: what() or self.process.poll() is not None)
        assert self.process.poll() is None, self.end()[2]

    def end(self) -> tuple[int, dict[str, Any], str]:
        """Exit code, the record, what the terminal showed."""
        out, shown = self.process.communicate(timeout=STARTUP_S)
        return self.process.returncode, json.loads(out) if out.strip().startswith("{") else {}, shown


@pytest.mark.usefixtures("shared_ray")
class TestRuns:
    def test_runs_everything_then_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        record = run(chain(), workspace=str(tmp_path), options=OPTIONS)
        assert set(states(record).values()) == {"done"} and record.exit_code == 0
        assert text_of(record, "third") == "321"
        assert record["third"].figures == {"length": 3, "tries": 1, "word": "3"}
        manifest = read_manifest(record["third"].uri)
        assert manifest is not None
        assert manifest.mlflow_run_id == record["third"].mlflow_run_id and manifest.seconds > 0
        assert manifest.inputs == {"from_second": record["second"].key} and manifest.config == {"text": "3"}
        assert drafts(tmp_path) == []

        def no_ray(*_: Any) -> None:
            raise AssertionError("nothing is left to run on Ray")

        monkeypatch.setattr("pipelines.runner.cluster", no_ray)
        started = time.monotonic()
        again = run(chain(), workspace=str(tmp_path), options=OPTIONS)
        assert time.monotonic() - started < 10
        assert set(states(again).values()) == {"reused"} and again.exit_code == 0
        assert again["third"].figures == record["third"].figures

    def test_log_has_all_output(self, tmp_path: Path) -> None:
        record = run(Pipeline("toy", (stage("one"),)), workspace=str(tmp_path), options=OPTIONS)
        log = Path(record["one"].log).read_text()
        assert "printed by one" in log and "logged by one" in log and "working on a" in log

    def test_progress_reaches_the_terminal(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        run(Pipeline("toy", (stage("one", seconds=0.5),)), workspace=str(tmp_path), options=OPTIONS)
        assert any(line.startswith("one ") and line.endswith("working on a") for line in caplog.messages)

    def test_changed_upstream_reruns_downstream(self, tmp_path: Path) -> None:
        def pipeline(text: str) -> Pipeline:
            return Pipeline("toy", (stage("first", text=text), stage("second", needs=("first",)), stage("aside")))

        run(pipeline("x"), workspace=str(tmp_path), options=OPTIONS)
        record = run(pipeline("y"), workspace=str(tmp_path), options=OPTIONS)
        assert states(record) == {"first": "done", "second": "done", "aside": "reused"}
        assert text_of(record, "second") == "ay"
        back = run(pipeline("x"), workspace=str(tmp_path), options=OPTIONS)
        assert set(states(back).values()) == {"reused"} and text_of(back, "second") == "ax"

    def test_a_source_that_changed_after_the_plan_is_read_again(self, tmp_path: Path) -> None:
        def pipeline(found: str) -> Pipeline:
            planned = {"listing": "as planned"}
            return Pipeline("toy", (replace(stage("one", listing=found), fingerprint=planned), stage("aside")))

        run(pipeline("with one more"), workspace=str(tmp_path), options=OPTIONS)
        again = run(pipeline("as planned"), workspace=str(tmp_path), options=OPTIONS)  # the one more is gone
        assert states(again) == {"one": "done", "aside": "reused"} and again["one"].reason == "source changed"
        last = run(pipeline("as planned"), workspace=str(tmp_path), options=OPTIONS)
        assert states(last) == {"one": "reused", "aside": "reused"}

    def test_until_and_force(self, tmp_path: Path) -> None:
        options = RunOptions(ray=RAY, until="second")
        record = run(chain(), workspace=str(tmp_path), options=options)
        assert states(record) == {"first": "done", "second": "done"}
        forced = run(chain(), workspace=str(tmp_path), options=RunOptions(ray=RAY, until="second", force=("first",)))
        assert states(forced) == {"first": "done", "second": "reused"}
        assert forced["first"].key == record["first"].key
        assert forced["first"].figures["tries"] == 1  # its scratch was cleared, or training would have nothing to do
        for bad in (RunOptions(until="nowhere"), RunOptions(force=("nowhere",))):
            with pytest.raises(ValueError, match="no stage 'nowhere'"):
                run(chain(), workspace=str(tmp_path), options=bad)

    def test_independent_stages_overlap(self, tmp_path: Path) -> None:
        log = tmp_path / "events"
        pair = tuple(stage(name, seconds=2.0, events=str(log)) for name in ("left", "right"))
        run(Pipeline("toy", pair), workspace=str(tmp_path / "w"), options=OPTIONS)
        assert [what.split()[0] for what, _, _ in events(log)] == ["start", "start", "end", "end"]
        assert len({pid for _, _, pid in events(log)}) == 2

    def test_stages_that_do_not_fit_together_take_turns(self, tmp_path: Path) -> None:
        log = tmp_path / "events"
        half = Demand(cpus=1, data_cpus=1)
        names = ("left", "right")
        pair = tuple(replace(stage(name, seconds=0.2, events=str(log)), demand=half) for name in names)
        run(Pipeline("toy", pair), workspace=str(tmp_path / "w"), options=OPTIONS)
        assert [what.split()[0] for what, _, _ in events(log)] == ["start", "end", "start", "end"]

    def test_failure_names_stage_cause_and_log(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        record = run(chain(second={"fail": "value"}), workspace=str(tmp_path), options=OPTIONS)
        assert states(record) == {"first": "done", "second": "failed", "third": "blocked", "aside": "done"}
        assert record.exit_code == 1 and record["second"].attempts == 1
        assert record["second"].error == "ValueError: the toy is broken"
        assert record["third"].error == "waited for second, which failed"
        assert "Traceback" in Path(record["second"].log).read_text()
        told = next(r.getMessage() for r in caplog.records if r.levelname == "ERROR")
        assert "second" in told and "the toy is broken" in told and record["second"].log in told
        assert drafts(tmp_path) == []
        ending = "\n".join(lines_of(record))
        assert f"second failed: {record['second'].error}\n  next: mend what the cause names" in ending
        assert f"  log:  {record['second'].log}" in ending and "Traceback" not in ending
        statuses = {r.info.run_name.split()[-1]: r.info.status for r in runs(tmp_path)[1:]}
        assert statuses == {"first": "FINISHED", "second": "FAILED", "aside": "FINISHED"}
        assert runs(tmp_path)[0].info.status == "FAILED"

        fixed = run(chain(), workspace=str(tmp_path), options=OPTIONS)
        assert states(fixed) == {"first": "reused", "second": "done", "third": "done", "aside": "reused"}

    def test_cause_inside_ray_data(self, tmp_path: Path) -> None:
        record = run(Pipeline("toy", (stage("one", fail="data"),)), workspace=str(tmp_path), options=OPTIONS)
        assert record["one"].error == "ValueError: a bad row" and record["one"].attempts == 1

    def test_infrastructure_is_tried_again(self, tmp_path: Path) -> None:
        lost = stage("lost", fail="exit", once=True)
        net = stage("net", fail="connection", once=True)
        record = run(Pipeline("toy", (lost, net)), workspace=str(tmp_path), options=OPTIONS)
        assert states(record) == {"lost": "done", "net": "done"}
        assert [one.attempts for one in record.stages] == [2, 2]
        assert record["lost"].figures["tries"] == 2  # the second try found the first one's scratch
        assert len(runs(tmp_path)) == 3  # a retry is no run of its own
        assert drafts(tmp_path) == []

    def test_the_trace_of_a_lost_process_is_in_the_log(self, tmp_path: Path) -> None:
        failing = tuple(stage(name, fail=name) for name in ("exit", "actor", "disk"))
        options = RunOptions(ray=RAY, retries=0)
        record = run(Pipeline("toy", failing), workspace=str(tmp_path), options=options)
        causes = {"exit": "WorkerCrashedError", "actor": "ActorDiedError", "disk": "OSError: [Errno 28]"}
        for name, cause in causes.items():
            assert record[name].error.startswith(cause), record[name].error
            assert cause.split(":")[0] in Path(record[name].log).read_text()
        ending = "\n".join(lines_of(record))
        assert "make room on the disk" in ending and ending.count("whether memory ran out") == 2

    def test_infrastructure_is_given_up(self, tmp_path: Path) -> None:
        options = RunOptions(ray=RAY, retries=1, backoff_s=0.1)
        record = run(Pipeline("toy", (stage("net", fail="connection"),)), workspace=str(tmp_path), options=options)
        assert record["net"].state == "failed" and record["net"].attempts == 2
        assert record["net"].error == "ConnectionResetError: https://***@store went away"

    def test_a_lock_out_of_reach_for_a_moment_is_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held, asked = LocalLock.held, []

        def away_at_first(lock: LocalLock) -> bool:
            if threading.current_thread() is threading.main_thread():  # not the heart
                asked.append(lock)
                if len(asked) == 1:
                    raise LockUnreachable("workspace 's3://work': 503")
            return held(lock)

        monkeypatch.setattr(LocalLock, "held", away_at_first)
        record = run(Pipeline("toy", (stage("one"),)), workspace=str(tmp_path), options=OPTIONS)
        assert record["one"].state == "done" and record["one"].attempts == 2

    def test_bad_stage_functions(self, tmp_path: Path) -> None:
        bad = (stage("missing", run="nothing"), stage("none", run="returns_none"))
        record = run(Pipeline("toy", bad), workspace=str(tmp_path), options=OPTIONS)
        assert record["missing"].error.startswith("AttributeError") and "dict, not NoneType" in record["none"].error

    def test_modules_are_found_by_tasks_of_stages(self, tmp_path: Path) -> None:
        record = run(Pipeline("toy", (stage("deep", run="nested"),)), workspace=str(tmp_path), options=OPTIONS)
        assert record["deep"].state == "done", record["deep"].error

    def test_demand_too_large(self, tmp_path: Path) -> None:
        big = replace(stage("big"), demand=Demand(cpus=2, data_cpus=1, workers=2, setting="training"))
        log = tmp_path / "events"
        small = stage("small", events=str(log))
        with pytest.raises(
            DemandError, match=r"big wants 2 workers x 1 CPU \+ 1 for Ray Data = 3 CPUs, the cluster has 2"
        ):
            run(Pipeline("toy", (small, big)), workspace=str(tmp_path / "w"), options=OPTIONS)
        assert events(log) == []
        with hold(str(tmp_path / "w"), "next"):  # the refused run let go of the workspace
            pass

    def test_mlflow_is_needed_before_the_start_only(self, tmp_path: Path) -> None:
        nowhere = MlflowSettings(uri="http://127.0.0.1:9")
        with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
            run(chain(), workspace=str(tmp_path), options=RunOptions(ray=RAY, mlflow=nowhere))
        assert not (tmp_path / "first").exists()


@pytest.mark.usefixtures("shared_ray")
class TestRecord:
    def test_parent_children_and_reuse(self, tmp_path: Path) -> None:
        data = DataSet("toys", "0123abcd", str(tmp_path), {"images": 3})
        config = {"data": {"size": 64}, "mlflow": {"uri": "https://me:secret@host"}, "tasks": [{"name": "t"}]}
        options = RunOptions(ray=RAY, config=config, data_set=data)
        first = run(chain(), workspace=str(tmp_path), options=options)
        parent, *children = runs(tmp_path)
        assert parent.info.run_id == first.mlflow_run_id and parent.info.status == "FINISHED"
        assert parent.info.run_name.startswith("toy 2")
        assert parent.data.tags["alit.run_id"] == first.run_id and parent.data.tags["alit.state.third"] == "done"
        assert parent.data.params["data.size"] == "64" and "secret" not in str(parent.data.params)
        assert parent.data.metrics["seconds.first"] > 0
        assert [i.dataset.name for i in parent.inputs.dataset_inputs] == ["toys"]
        saved = Path(parent.info.artifact_uri.removeprefix("file://"), "config.yaml").read_text()
        assert "size: 64" in saved and "secret" not in saved
        assert sorted(child.info.run_name[:3] for child in children) == ["01 ", "02 ", "03 ", "04 "]
        third = next(child for child in children if child.data.tags["alit.stage"] == "third")
        assert third.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert third.data.tags["alit.key"] == first["third"].key and third.data.tags["alit.state"] == "done"
        assert third.data.metrics["length"] == 3 and third.data.params["text"] == "3"

        second = run(chain(), workspace=str(tmp_path), options=options)
        parent, *children = runs(tmp_path)[5:]
        assert parent.info.run_id == second.mlflow_run_id
        for child in children:
            name = child.data.tags["alit.stage"]
            assert child.info.status == "FINISHED" and child.data.tags["alit.state"] == "reused"
            assert child.data.tags["alit.made_by_run_id"] == first[name].mlflow_run_id
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id


class TestOwnRay:
    """Runs that start and stop a Ray themselves, in processes of their own."""

    @pytest.fixture(autouse=True)
    def no_shared_ray(self) -> None:
        ray.shutdown()

    def test_killed_driver(self, tmp_path: Path) -> None:
        workspace, log = tmp_path / "w", tmp_path / "events"
        driver = Driver(workspace, second={"events": str(log), "seconds": 60.0})
        driver.wait_for(lambda: events(log))
        assert drafts(workspace)
        driver.process.kill()  # and not waited for: a zombie is dead too
        os.waitid(os.P_PID, driver.process.pid, os.WEXITED | os.WNOWAIT)

        code, record, shown = Driver(workspace).end()
        assert code == 0, shown
        assert "took over the workspace" in shown
        by_name = {one["name"]: one for one in record["stages"]}
        assert by_name["first"]["state"] == "reused" and by_name["second"]["state"] == "done"
        assert by_name["second"]["figures"]["tries"] == 2  # scratch outlives the kill
        assert drafts(workspace) == [] and not (workspace / ".lock").exists()
        assert {p.state for p in plan(chain(), str(workspace))} == {"stands"}
        dead = [r for r in runs(workspace) if r.data.tags["alit.run_id"] != record["run_id"]]
        assert {r.data.tags.get("alit.stage", "parent"): r.info.status for r in dead}["parent"] == "KILLED"
        assert {r.data.tags.get("alit.stage", "parent"): r.info.status for r in dead}["second"] == "KILLED"
        assert "RUNNING" not in {r.info.status for r in runs(workspace)}
        driver.process.communicate()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_stopped_driver(self, tmp_path: Path, number: signal.Signals) -> None:
        workspace, log = tmp_path / "w", tmp_path / "events"
        driver = Driver(workspace, second={"events": str(log), "seconds": 60.0})
        driver.wait_for(lambda: events(log))
        asked = time.monotonic()
        os.killpg(driver.process.pid, number)  # as a terminal does: to the driver's whole process group
        code, record, shown = driver.end()
        assert code == 128 + number, shown
        assert time.monotonic() - asked < 30
        by_name = {one["name"]: one["state"] for one in record["stages"]}
        assert by_name["first"] == "done" and by_name["second"] == by_name["third"] == "cancelled"
        assert drafts(workspace) == [] and not (workspace / ".lock").exists()
        statuses = {r.data.tags.get("alit.stage", "parent"): r.info.status for r in runs(workspace)}
        assert statuses["parent"] == statuses["second"] == "KILLED" and statuses["first"] == "FINISHED"
        assert len(events(log)) == 1  # the stage did not go on behind our back

    def test_second_run_is_refused(self, tmp_path: Path) -> None:
        workspace = tmp_path / "w"
        with hold(str(workspace), "the-first"):
            code, _, shown = Driver(workspace).end()
        assert code == 1
        assert "WorkspaceHeld" in shown and "the-first" in shown and f"pid {os.getpid()}" in shown

    def test_terminal_is_quiet(self, tmp_path: Path) -> None:
        code, record, shown = Driver(tmp_path / "w").end()
        assert code == 0, shown
        ours = [line for line in shown.splitlines() if line.strip()]
        assert all(line.startswith("[20") for line in ours), shown
        assert record["mlflow_uri"] == f"sqlite:///{tmp_path}/w/mlflow.db"

    def test_no_cluster_at_the_address(self, tmp_path: Path) -> None:
        options = RunOptions(ray=RaySettings(address="ray://127.0.0.1:9"))
        with pytest.raises(ClusterError, match="ray.address"):
            run(chain(), workspace=str(tmp_path), options=options)


class TestLock:
    """Only the lock; no Ray."""

    def test_refuses_and_names_the_holder(self, tmp_path: Path) -> None:
        with hold(str(tmp_path), "one"), pytest.raises(WorkspaceHeld) as caught, hold(str(tmp_path), "two"):
            pass
        assert caught.value.holder.run_id == "one" and f"pid {os.getpid()}" in str(caught.value)
        with hold(str(tmp_path), "three") as lock:
            assert lock.previous is None

    def test_waits(self, tmp_path: Path) -> None:
        release = threading.Event()

        def first() -> None:
            with hold(str(tmp_path), "one"):
                release.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        wait_for((tmp_path / ".lock").exists, 5)
        threading.Timer(0.5, release.set).start()
        with hold(str(tmp_path), "two", wait_s=10):
            assert json.loads((tmp_path / ".lock").read_text())["run_id"] == "two"
        thread.join()

    @pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"birth": "1"}])
    def test_dead_here(self, tmp_path: Path, change: dict[str, Any]) -> None:
        self.leave_behind(tmp_path, **change)
        with hold(str(tmp_path), "new") as lock:
            assert lock.previous is not None and lock.previous.run_id == "old" and lock.held()

    def test_elsewhere_goes_by_the_heartbeat(self, tmp_path: Path) -> None:
        self.leave_behind(tmp_path, host="elsewhere", place="elsewhere 1", pid=2**22 + 1)
        with pytest.raises(WorkspaceHeld, match="host elsewhere"), hold(str(tmp_path), "new"):
            pass
        long_ago = time.time() - 61
        os.utime(tmp_path / ".lock", (long_ago, long_ago))
        with hold(str(tmp_path), "new") as lock:
            assert lock.previous is not None

    def test_one_of_many_takes_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Eight threads at the lock of a dead run: one at a time, and one took it from the dead."""
        monkeypatch.setattr("pipelines.lock.POLL_S", 0.02)
        self.leave_behind(tmp_path, pid=2**22 + 1)
        inside, most, took = [0], [0], []

        def contend(number: int) -> None:
            with hold(str(tmp_path), f"run-{number}", wait_s=60) as lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                took.append(lock.previous)
                time.sleep(0.01)
                inside[0] -= 1

        threads = [threading.Thread(target=contend, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] and len([p for p in took if p is not None]) == 1

    def test_lost(self, tmp_path: Path) -> None:
        with hold(str(tmp_path), "one") as lock:
            self.leave_behind(tmp_path)
            assert not lock.held()
        assert json.loads((tmp_path / ".lock").read_text())["run_id"] == "old"  # not ours to delete

    @staticmethod
    def leave_behind(workspace: Path, **changes: Any) -> None:
        workspace.mkdir(exist_ok=True)
        (workspace / ".lock").write_text(json.dumps({**asdict(Holder.me("old")), **changes}))
