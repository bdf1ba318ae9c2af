"""The record in MLflow. The only module that imports mlflow.

A pipeline run is one MLflow run with a child per stage. A :class:`Tracker` is plain strings, so it travels to Ray
workers; nothing it does raises: while the server is away metrics wait in memory and the rest is dropped, with one
warning. :class:`Behind` is for training, which must not wait: a thread sends, and catches up after an outage.
"""

import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components.artifacts import WorkspaceError
from components.config import MlflowSettings

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # training waits for these
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # s
}
os.environ.update({**ENVIRONMENT, **os.environ})  # here, for MLflow reads some when it is imported, by whomever
OUTAGE_S = 30.0  # after a failure the server is left alone for so long
BACKLOG_METRICS = 100_000  # kept per run while the server is away; the oldest go first
BACKLOG_CALLS = 10_000  # kept by a Behind while the server is away; the oldest go first
CATCH_UP_S = 180.0  # at the end of a training, for a server that is away
METRICS_PER_CALL = 1000  # MLflow's limit
PAIRS_PER_CALL = 100  # MLflow's limit for params and tags
VALUE_LENGTH = 500
RUNS_PER_CALL = 1000
PARENT = "mlflow.parentRunId"  # tag
ARTIFACTS = "mlflow-artifacts"  # folder of a workspace

_backlog: dict[str, deque[Any]] = {}  # run id -> metrics that were not sent yet
_away_until: dict[str, float] = {}  # tracking URI -> monotonic time
_log = logging.getLogger(__name__)


class TrackingError(WorkspaceError):
    """The store can't be opened: a run that can't be recorded is not begun."""


@dataclass(frozen=True)
class Store:
    """An experiment at a tracking URI; ``artifacts``: where a new one keeps its files, None: the server decides."""

    uri: str
    experiment: str
    artifacts: str | None = None


@dataclass(frozen=True)
class DataSet:
    """What a run reads, for the run's inputs."""

    name: str
    digest: str  # at most 36 characters
    source: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Tracker:
    """Writes to one MLflow run. Without a ``run_id`` it writes nothing, which is what a stage run by itself gets."""

    uri: str = ""
    run_id: str = ""
    experiment: str = ""  # id
    parent_run_id: str = ""

    @property
    def parent(self) -> "Tracker":
        """The tracker of the run above this one."""
        return Tracker(self.uri, self.parent_run_id, self.experiment)

    def metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Numbers at a step, in one call. What isn't a number is left out."""
        if not self.run_id:
            return
        waiting = _backlog.setdefault(self.run_id, deque(maxlen=BACKLOG_METRICS))
        waiting.extend(_metrics(values, step))
        self._send_metrics()

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, flattened to dotted names; long values are cut."""
        from mlflow.entities import Param

        pairs = [Param(_name(k), _short(v)) for k, v in flatten(values).items()]
        for start in range(0, len(pairs), PAIRS_PER_CALL):
            self._send("params", partial(_log_batch, self.run_id, params=pairs[start : start + PAIRS_PER_CALL]))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Words to search by."""
        from mlflow.entities import RunTag

        pairs = [RunTag(k, _short(v)) for k, v in values.items()]
        for start in range(0, len(pairs), PAIRS_PER_CALL):
            self._send("tags", partial(_log_batch, self.run_id, tags=pairs[start : start + PAIRS_PER_CALL]))

    def picture(self, pixels: "np.ndarray", key: str, step: int = 0) -> None:
        """A uint8 [H,W,3] image under ``key`` at a step."""
        self._send("picture", lambda client: client.log_image(self.run_id, pixels, key=key, step=step))

    def table(self, rows: "dict[str, list[Any]] | pd.DataFrame", name: str) -> None:
        """A small table as ``name``.json, which the MLflow page shows."""
        self._send("table", lambda client: client.log_table(self.run_id, rows, f"{name}.json"))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A local file, or all of a local folder."""
        method = "log_artifacts" if Path(path).is_dir() else "log_artifact"
        self._send("artifact", lambda client: getattr(client, method)(self.run_id, str(path), folder))

    def text(self, text: str, name: str) -> None:
        """``text`` as the artifact ``name``."""
        self._send("text", lambda client: client.log_text(self.run_id, redact(text), name))

    def data_set(self, data: DataSet, context: str = "training") -> None:
        """An input of the run."""
        self._send("data set", lambda client: client.log_inputs(self.run_id, [_data_set_input(data, context)]))

    def close(self, status: Status = "FINISHED") -> None:
        """End the run."""
        self._send_metrics()
        self._send("status", lambda client: client.set_terminated(self.run_id, status))
        _backlog.pop(self.run_id, None)

    def _send_metrics(self) -> None:
        waiting = _backlog.get(self.run_id, deque())
        while waiting:
            chunk = [waiting[index] for index in range(min(METRICS_PER_CALL, len(waiting)))]
            if not self._send("metrics", partial(_log_batch, self.run_id, metrics=chunk)):
                return
            for _ in chunk:
                waiting.popleft()

    def _send(self, what: str, call: "Callable[[MlflowClient], Any]") -> bool:
        """Whether ``call`` went through; never raises, whatever MLflow, its database or the network does."""
        return time.monotonic() >= _away_until.get(self.uri, 0.0) and self._attempt(what, call) == "sent"

    def _attempt(self, what: str, call: "Callable[[MlflowClient], Any]") -> Literal["sent", "refused", "away"]:
        if not self.run_id:
            return "refused"
        try:
            call(_client(self.uri))
            return "sent"
        except Exception as error:
            _note_failure(self.uri, what, error)
            return "refused" if _is_refusal(error) else "away"


class Behind:
    """A tracker whose calls return at once: a thread sends them in order, and again after an outage."""

    RETRY_S = 2.0

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._calls: deque[tuple[str, Callable[[Any], Any]]] = deque(maxlen=BACKLOG_CALLS)
        self._news = threading.Event()
        self._closing: float | None = None  # monotonic time after which nothing is tried any more
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers at a step, with the time of this call."""
        self._put("metrics", partial(_log_batch, self._tracker.run_id, metrics=_metrics(values, step)))

    def picture(self, pixels: "np.ndarray", key: str, step: int) -> None:
        """A uint8 [H,W,3] image under ``key`` at a step."""
        self._put("picture", lambda client: client.log_image(self._tracker.run_id, pixels, key=key, step=step))

    def close(self, wait_s: float = CATCH_UP_S) -> int:
        """Send what is left, for at most ``wait_s`` while the server is away; returns how many calls were not sent."""
        self._closing = time.monotonic() + wait_s
        self._news.set()
        self._thread.join(wait_s + 60)
        if self._calls:
            _log.warning("MLflow at %s stayed away: %d calls were not recorded", self._tracker.uri, len(self._calls))
        return len(self._calls)

    def _put(self, what: str, call: "Callable[[Any], Any]") -> None:
        if self._tracker.run_id:
            self._calls.append((what, call))
            self._news.set()

    def _work(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            while self._calls:
                entry = self._calls[0]
                if self._tracker._attempt(*entry) == "away":
                    if self._closing is not None and time.monotonic() > self._closing:
                        return
                    time.sleep(self.RETRY_S)
                elif self._calls and self._calls[0] is entry:  # a full queue has dropped it by now
                    self._calls.popleft()
            if self._closing is not None:
                return


def system_metrics() -> dict[str, float]:
    """What MLflow's own monitors say of this machine now: CPU, memory, disk, network, and GPUs where there are some."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    values: dict[str, float] = {}
    for monitor in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        try:
            one = monitor()
            one.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in one.aggregate_metrics().items()}
        except Exception as error:  # no GPU, no driver, a container without /proc: each is a monitor less
            _log.debug("no %s: %s", monitor.__name__, error)
    return values


def _note_failure(uri: str, what: str, error: Exception) -> None:
    level = logging.DEBUG if uri in _away_until else logging.WARNING
    if not _is_refusal(error):
        _away_until[uri] = time.monotonic() + OUTAGE_S
    _log.log(level, "MLflow at %s did not take %s: %s", redact(uri), what, redact(str(error)).splitlines()[:1])


def _is_refusal(error: Exception) -> bool:
    """Whether the store is there and refused this one call, so that the next may pass."""
    code = getattr(error, "error_code", "")
    return isinstance(error, ValueError | TypeError | FileNotFoundError) or code in {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "RESOURCE_DOES_NOT_EXIST",
    }


def store_for(settings: MlflowSettings, workspace: str) -> Store:
    """Where runs of ``workspace`` are recorded: MLFLOW_TRACKING_URI, else ``settings.uri``, else the workspace.

    Raises ValueError when that would be a database in a bucket.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.uri
    if uri is None and "://" in workspace:
        raise ValueError(f"mlflow.uri: not set, and {workspace!r} can't hold a database; set it or MLFLOW_TRACKING_URI")
    uri = uri or f"sqlite:///{Path(workspace).absolute()}/mlflow.db"
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///")).absolute()  # a worker's folder is another one
        return Store(f"sqlite:///{database}", settings.experiment, str(database.parent / ARTIFACTS))
    on_server = uri.split("://")[0] in {"http", "https"} or uri.startswith("databricks")
    return Store(uri, settings.experiment, None if on_server else f"{workspace}/{ARTIFACTS}")


def load(store: Store) -> None:
    """Import what opens the store, which takes seconds, and open nothing."""
    from mlflow import MlflowClient  # noqa: F401

    if store.uri.startswith("sqlite"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def open_parent_run(store: Store, name: str, tags: Mapping[str, str]) -> Tracker:
    """A new run for a pipeline run; makes the experiment when it is missing. Raises TrackingError."""
    try:
        client = _client(store.uri)
        experiment = _experiment_id(client, store)
        run = client.create_run(experiment, tags=_run_tags(tags), run_name=name)
    except Exception as error:
        raise TrackingError(f"mlflow.uri: {redact(store.uri)!r} can't be used: {redact(_root(error))}") from error
    return Tracker(store.uri, run.info.run_id, experiment)


def open_child(parent: Tracker, name: str, tags: Mapping[str, str]) -> Tracker:
    """A run below ``parent``. When MLflow is away, a tracker that writes nothing."""
    made: list[str] = []
    nested = {**_run_tags(tags), PARENT: parent.run_id}
    parent._send(
        "a child run",
        lambda client: made.append(client.create_run(parent.experiment, tags=nested, run_name=name).info.run_id),
    )
    return Tracker(parent.uri, made[0] if made else "", parent.experiment, parent.run_id)


def close_abandoned(store: Store, run_id: str) -> int:
    """Mark KILLED what is still running of pipeline run ``run_id`` (tag alit.run_id), whose process is dead.

    Returns the number of MLflow runs that were marked.
    """
    client = _client(store.uri)
    experiment = client.get_experiment_by_name(store.experiment)
    if experiment is None:
        return 0
    search = f"tags.`alit.run_id` = '{run_id}' and attributes.status = 'RUNNING'"
    runs = client.search_runs([experiment.experiment_id], search)
    for run in runs:
        tracker = Tracker(store.uri, run.info.run_id, experiment.experiment_id)
        tracker.tags({"alit.state": "killed"})
        tracker.close("KILLED")
    return len(runs)


def used_by_runs(store: Store, newest: int | None = None, further: Iterable[str] = ()) -> set[str]:
    """Keys of the artifacts (tag alit.key) that the experiment's runs refer to, unless these are deleted.

    ``newest``: of so many pipeline runs; None: of all. ``further``: ids of runs that count though they be deleted.
    Raises TrackingError when the store can't be read.
    """
    client = _client(store.uri)
    with _reading(store):
        runs = list(_runs(client, store))
        pipelines = [run.info.run_id for run in runs if PARENT not in run.data.tags]
        counted = set(pipelines if newest is None else pipelines[:newest])
        tags = [run.data.tags for run in runs if run.data.tags.get(PARENT) in counted]
        tags += [_tags_of(client, run_id) for run_id in further]
    return {found["alit.key"] for found in tags if "alit.key" in found}


def known_runs(store: Store) -> set[str]:
    """Ids of the experiment's runs, deleted ones included. Raises TrackingError when the store can't be read."""
    client = _client(store.uri)
    from mlflow.entities import ViewType

    with _reading(store):
        return {run.info.run_id for run in _runs(client, store, ViewType.ALL)}


@contextmanager
def _reading(store: Store) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise TrackingError(f"mlflow.uri: {redact(store.uri)!r} can't be read: {redact(str(error))}") from error


def _runs(client: "MlflowClient", store: Store, view: int = 1) -> Iterator[Any]:
    """The experiment's runs, the newest first; ``view``: MLflow's ViewType, by default of those that aren't deleted."""
    experiment, token = client.get_experiment_by_name(store.experiment), None
    while experiment is not None:
        page = client.search_runs([experiment.experiment_id], "", view, RUNS_PER_CALL, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _tags_of(client: "MlflowClient", run_id: str) -> Mapping[str, str]:
    """A run's tags, also of a deleted one; none of one that MLflow's own gc has removed."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).data.tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _root(error: BaseException) -> str:
    """The first line of what was wrong at the bottom of it, without the layers of HTTP clients above."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _log_batch(run_id: str, client: "MlflowClient", **entities: list[Any]) -> None:
    client.log_batch(run_id, **entities)


def redact(text: str) -> str:
    """``text`` without the user and password of any URL in it."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; anything else is one value."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {
        k: v for name, inner in value.items() for k, v in flatten(inner, f"{path}.{name}" if path else name).items()
    }


@lru_cache(maxsize=4)
def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment_id(client: "MlflowClient", store: Store) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(store.experiment)
    if found is None:
        try:
            return client.create_experiment(store.experiment, artifact_location=store.artifacts)
        except MlflowException:  # another run may have made it since
            found = client.get_experiment_by_name(store.experiment)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"experiment {store.experiment!r} was deleted; restore it or choose another mlflow.experiment")
    return str(found.experiment_id)


def _run_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {"mlflow.source.name": "alit", "mlflow.source.type": "JOB", **{k: _short(v) for k, v in tags.items()}}


def _data_set_input(data: DataSet, context: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": redact(data.source)})
    kind = data.source.split("://")[0] if "://" in data.source else "local"
    entity = Dataset(data.name, data.digest[:36], kind, source, profile=json.dumps(dict(data.counts)))
    return DatasetInput(dataset=entity, tags=[InputTag("mlflow.data.context", context)])


def _metrics(values: Mapping[str, Any], step: int) -> list[Any]:
    """MLflow's metrics of ``values``, as of now; what isn't a number is left out."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(_name(k), float(v), now, step) for k, v in values.items() if _is_number(v)]


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or hasattr(value, "__float__")


def _name(name: str) -> str:
    """``name`` with only what MLflow allows in one."""
    return re.sub(r"[^\w\-./: ]", "_", name)


def _short(value: Any) -> str:
    text = redact(value if isinstance(value, str) else json.dumps(value, default=str) if _nested(value) else str(value))
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"


def _nested(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) and bool(value) and not isinstance(value, str)
