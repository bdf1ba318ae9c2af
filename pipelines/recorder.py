"""What a pipeline run leaves in MLflow: a parent run, a child per stage, reused ones included."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from components import tracking
from components.artifacts import Figures
from components.software import lineage_tags
from components.tracking import DataSet, Status, Store, Tracker
from pipelines.dag import Planned

State = Literal["done", "reused", "failed", "blocked", "cancelled"]

STATUS: dict[State, Status] = {
    "done": "FINISHED",
    "reused": "FINISHED",
    "failed": "FAILED",
    "blocked": "FAILED",
    "cancelled": "KILLED",
}


@dataclass(frozen=True)
class StageRecord:
    """What became of one stage in a run."""

    name: str
    key: str
    state: State
    uri: str  # where its artifact stands, or would stand
    reason: str = ""  # why it had to run
    seconds: float = 0.0  # of a reused stage: what it took when it was made
    figures: Figures = field(default_factory=dict)
    headline: tuple[str, ...] = ()  # names of the figures to show
    error: str = ""  # one line
    log: str = ""  # file with the output of its process
    attempts: int = 0
    mlflow_run_id: str = ""


NEWS: Mapping[str, tuple[str, tuple[str, ...]]] = {  # name -> the stage that knows, its figures: the first it has
    "added": ("ingest", ("added", "images")),
    "changed": ("ingest", ("changed",)),
    "removed": ("ingest", ("removed",)),
    "encoded": ("tokenize", ("encoded", "images")),
    "scored": ("score", ("scored", "images")),
}


def news_of(stages: Iterable[StageRecord]) -> dict[str, int]:
    """How many images there are, and how many were added, changed, removed, encoded and scored in this run.

    A reused stage did none of that. Stages that don't tell new images from old ones took all of them for new.
    """
    by_name = {stage.name: stage for stage in stages}
    news = {}
    if "ingest" in by_name and "images" in by_name["ingest"].figures:
        news["images"] = int(by_name["ingest"].figures["images"])
    for name, (stage, figures) in NEWS.items():
        found = by_name.get(stage)
        told = [found.figures[figure] for figure in figures if found is not None and figure in found.figures]
        if found is not None and told:
            news[name] = int(told[0]) if found.state == "done" else 0
    return news


@dataclass(frozen=True)
class RunRecord:
    """What became of a run."""

    run_id: str
    pipeline: str
    workspace: str
    state: State  # done, failed or cancelled
    stages: tuple[StageRecord, ...]
    seconds: float
    mlflow_uri: str  # without credentials
    mlflow_run_id: str
    signal: int | None = None  # that stopped it

    @property
    def exit_code(self) -> int:
        """0 done, 1 a stage failed, 128 + signal when it was stopped."""
        if self.signal is not None:
            return 128 + self.signal
        return 0 if self.state == "done" else 1

    @property
    def news(self) -> dict[str, int]:
        """What of the images was new; see :func:`news_of`."""
        return news_of(self.stages)

    def __getitem__(self, name: str) -> StageRecord:
        """The record of one stage; raises KeyError."""
        return {stage.name: stage for stage in self.stages}[name]


class Recorder:
    """Keeps the record of one run. Opening it raises TrackingError; after that MLflow's troubles stop nothing."""

    def __init__(self, store: Store, pipeline: str, run_id: str, planned: list[Planned]) -> None:
        self.run_id = run_id
        self.numbers = {one.stage.name: number for number, one in enumerate(planned, 1)}
        name = f"{pipeline} {time.strftime('%Y-%m-%d %H:%M:%S')}"
        about = {"alit.run_id": run_id, "alit.pipeline": pipeline, "alit.state": "running"}
        keys = {f"alit.key.{one.stage.name}": one.key for one in planned}
        self.parent = tracking.open_parent_run(store, name, {**about, **lineage_tags(), **keys})
        self.children: dict[str, Tracker] = {}
        self.data: DataSet | None = None

    def describe(self, config: Mapping[str, Any], data: DataSet | None, facts: Mapping[str, str]) -> None:
        """The run's config as params and as a file, the data it reads, and what was found out while planning."""
        self.parent.params(config)
        self.parent.tags({f"alit.{name}": fact for name, fact in facts.items()})
        self.parent.text(yaml.safe_dump(dict(config), sort_keys=False), "config.yaml")
        self.data = data
        if data is not None:
            self.parent.data_set(data)
            self.parent.tags({"alit.data_digest": data.digest})

    def started(self, planned: Planned) -> Tracker:
        """The child run of a stage that starts; of one that starts again, the same."""
        name = planned.stage.name
        if name not in self.children:
            self.children[name] = self._open(planned, {"alit.state": "running", "alit.reason": planned.reason})
            self.children[name].params(planned.stage.config.model_dump(mode="json"))
            if self.data is not None and "images" in planned.stage.needs:
                self.children[name].data_set(self.data)
        return self.children[name]

    def reused(self, planned: Planned) -> str:
        """Record a stage whose artifact stands, with a link to the run that made it. Returns the child run's id."""
        assert planned.manifest is not None
        made_by = planned.manifest.mlflow_run_id or ""
        link = f"Reused from run [{made_by}](#/experiments/{self.parent.experiment}/runs/{made_by})"
        tags = {"alit.state": "reused", "alit.made_by_run_id": made_by, "mlflow.note.content": link}
        child = self._open(planned, tags if made_by else {"alit.state": "reused"})
        child.metrics(planned.manifest.counts)
        child.close("FINISHED")
        return child.run_id

    def ended(self, record: StageRecord) -> None:
        """The end of a stage that had started."""
        child = self.children.pop(record.name, Tracker())
        child.metrics({**record.figures, "seconds": record.seconds})
        words = {name: value for name, value in record.figures.items() if isinstance(value, str)}
        error = {"alit.error": record.error} if record.error else {}
        child.tags({"alit.state": record.state, "alit.attempts": record.attempts, **words, **error})
        child.close(STATUS[record.state])

    def close(self, status: Status, stages: tuple[StageRecord, ...] = ()) -> None:
        """End the run, and children that were left open."""
        for child in self.children.values():
            child.tags({"alit.state": status.lower()})
            child.close(status)
        self.children.clear()
        self.parent.metrics({f"seconds.{stage.name}": stage.seconds for stage in stages if stage.state == "done"})
        self.parent.metrics({f"news/{name}": number for name, number in news_of(stages).items()})
        for stage in stages:
            self.parent.metrics({name: psi for name, psi in stage.figures.items() if name.startswith("psi.")})
            self.parent.tags({"alit.drift": stage.figures["drift"]} if "drift" in stage.figures else {})
        states = {f"alit.state.{stage.name}": stage.state for stage in stages}
        errors = {f"alit.error.{stage.name}": stage.error for stage in stages if stage.error}
        self.parent.tags({"alit.state": status.lower(), **states, **errors})
        self.parent.close(status)

    def _open(self, planned: Planned, tags: Mapping[str, str]) -> Tracker:
        name = planned.stage.name
        about = {"alit.run_id": self.run_id, "alit.stage": name, "alit.key": planned.key}
        return tracking.open_child(self.parent, f"{self.numbers[name]:02d} {name}", {**about, **tags})
