"""Runs a pipeline: skips what stands, runs the rest on Ray, and records both."""

import logging
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components import tracking
from components.artifacts import DRAFTS
from components.config import MlflowSettings, RaySettings
from components.store import join, remove
from components.tracking import DataSet, Status, Store, TrackingError
from pipelines.cluster import ClusterError, check_demand, cluster, grown, largest_node
from pipelines.config import ConfigError
from pipelines.dag import Pipeline, Planned, plan
from pipelines.execution import Context, Execution
from pipelines.lock import Lock, hold
from pipelines.recorder import Recorder, RunRecord, State
from pipelines.signals import Stop, listening

OUTCOME_OF: Mapping[Status, State] = {"FINISHED": "done", "FAILED": "failed", "KILLED": "cancelled"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How to run a pipeline, as opposed to what."""

    force: tuple[str, ...] = ()  # stages to run again though their artifacts stand
    until: str | None = None  # run what this stage needs, and it, and no more
    retries: int = 2  # of a stage that failed from infrastructure
    backoff_s: float = 2.0  # before the first retry; doubles
    wait_s: float = 0.0  # for another run of the workspace to end
    ray: RaySettings = RaySettings()
    mlflow: MlflowSettings = MlflowSettings()
    config: Mapping[str, Any] = field(default_factory=dict)  # the resolved run config, for the record
    data_set: DataSet | None = None  # what the run reads, for the record


def run(pipeline: Pipeline, *, workspace: str, options: RunOptions | None = None) -> RunRecord:
    """Make every artifact of ``pipeline`` that is missing in ``workspace`` (a folder or ``s3://``).

    A stage that failed is in the record. Raises ValueError when an option names a stage that is not there, and, before
    any stage starts, ConfigError, WorkspaceHeld, DemandError, ClusterError or TrackingError.
    """
    options = options or RunOptions()
    workspace = absolute(workspace)
    wanted = pipeline.until(options.until) if options.until else pipeline
    for name in options.force:
        _ = wanted[name]
    store = _store(options.mlflow, workspace)
    started, run_id = time.monotonic(), f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    with hold(workspace, run_id, options.wait_s) as lock, listening() as stop:
        _clean_up_after_the_dead(workspace, lock, store)
        planned = plan(wanted, workspace, options.force)
        logs = _log_folder(workspace, run_id)
        with (
            _traced(join(logs, "run.log")),
            _ray_for(planned, options, store, logs, stop) as (have, hosts),
            _recorder(store, wanted, run_id, planned, stop) as recorder,
        ):
            if hosts > 1 and "://" in workspace and store.uri.startswith("sqlite"):
                _log.warning(
                    "%s is a file on this machine; other hosts can't log to it: an MLflow server can", store.uri
                )
            context = Context(
                workspace=workspace,
                planned={one.stage.name: one for one in planned},
                logs=logs,
                lock=lock,
                stop=stop,
                recorder=recorder,
                retries=options.retries,
                backoff_s=options.backoff_s,
            )
            recorder.describe(options.config, options.data_set, pipeline.facts)
            _work(context, have)
            return _finish(context, wanted.name, store, started)


def _store(settings: MlflowSettings, workspace: str) -> Store:
    try:
        return tracking.store_for(settings, workspace)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def absolute(workspace: str) -> str:
    """The workspace as stage processes, whose folder is another one, find it."""
    return workspace.rstrip("/") if "://" in workspace else str(Path(workspace).expanduser().absolute())


def _clean_up_after_the_dead(workspace: str, lock: Lock, store: Store) -> None:
    remove(join(workspace, DRAFTS))  # the lock says that nobody writes there now
    if lock.previous is not None:
        tracking.close_abandoned(store, lock.previous.run_id)


def _log_folder(workspace: str, run_id: str) -> str:
    """The folder of a run's logs: in the workspace, or a temporary one when that is in a bucket."""
    folder = Path(tempfile.gettempdir() if "://" in workspace else workspace, "logs", run_id)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


@contextmanager
def _traced(file: str) -> Iterator[None]:
    """Write the trace of what keeps a run from beginning to ``file``: the terminal gets the cause alone."""
    try:
        yield
    except (ClusterError, TrackingError) as error:
        Path(file).write_text(tracking.redact(traceback.format_exc()))
        error.trace = file
        raise


@contextmanager
def _ray_for(
    planned: list[Planned], options: RunOptions, store: Store, logs: str, stop: Stop
) -> Iterator[tuple[Mapping[str, float], int]]:
    """Ray, big enough for every stage to run, its resources and its hosts; no Ray when there is none to run.

    While it starts, which is waiting for its processes, MLflow is imported.
    """
    to_run = [one.stage for one in planned if one.state == "run"]
    if not to_run:
        yield {}, 0
        return
    _log.info("%d of %d stages to run: %s", len(to_run), len(planned), ", ".join(stage.name for stage in to_run))
    import ray

    threading.Thread(target=tracking.load, args=(store,), daemon=True).start()
    with cluster(options.ray, join(logs, "ray.log")):
        stop.listen()
        now, nodes = ray.cluster_resources(), ray.nodes()
        have = grown(now, options.ray.grows_to)
        check_demand(to_run, have, largest_node(nodes, now, have))
        yield have, len({node["NodeManagerAddress"] for node in nodes if node["Alive"]})


@contextmanager
def _recorder(store: Store, pipeline: Pipeline, run_id: str, planned: list[Planned], stop: Stop) -> Iterator[Recorder]:
    """The MLflow run; ended also when the run breaks off."""
    recorder = Recorder(store, pipeline.name, run_id, planned)
    try:
        yield recorder
    except BaseException as error:
        recorder.close("KILLED" if stop.requested or isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def _work(context: Context, have: Mapping[str, float]) -> None:
    """Record what stands and run what doesn't."""
    for one in context.planned.values():
        if one.state == "stands" and one.manifest is not None:
            made, child = one.manifest, context.recorder.reused(one)
            context.record(one.stage.name, "reused", seconds=made.seconds, figures=made.counts, mlflow_run_id=child)
    to_run = [one for one in context.planned.values() if one.state == "run"]
    if to_run:
        Execution(context, to_run, have).run()


def _finish(context: Context, pipeline: str, store: Store, started: float) -> RunRecord:
    """Fill in the stages that never started, and end the record."""
    for name in context.planned.keys() - context.records.keys():
        stopped = context.stop.requested
        context.record(name, "cancelled" if stopped else "blocked", error="" if stopped else _blocker(context, name))
    stages = tuple(context.records[name] for name in context.planned)
    states = {stage.state for stage in stages}
    status: Status = "KILLED" if "cancelled" in states else "FAILED" if states & {"failed", "blocked"} else "FINISHED"
    context.recorder.close(status, stages)
    return RunRecord(
        run_id=context.recorder.run_id,
        pipeline=pipeline,
        workspace=context.workspace,
        state=OUTCOME_OF[status],
        stages=stages,
        seconds=time.monotonic() - started,
        mlflow_uri=tracking.redact(store.uri),
        mlflow_run_id=context.recorder.parent.run_id,
        signal=context.stop.signal if status == "KILLED" else None,
    )


def _blocker(context: Context, name: str) -> str:
    """The failed stage that one which never started waited for."""
    for need in context.planned[name].stage.needs.values():
        record = context.records.get(need)
        if record is not None and record.state == "failed":
            return f"waited for {need}, which failed"
        if record is None or record.state == "blocked":
            return _blocker(context, need)
    raise AssertionError(f"{name} did not start and nothing that it reads failed")
