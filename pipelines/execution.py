"""Stages on their way through Ray: started when their inputs stand, retried, cancelled, committed.

The driver does the deciding and the committing; a stage's process only fills its draft folder. So a run that is killed
at any moment leaves finished artifacts and drafts, and the next one begins by deleting the drafts.
"""

import logging
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from components import artifacts
from components.artifacts import SEEN, Draft, Job, Manifest, WorkspaceError
from components.parts import files_digest
from components.store import join, remove
from pipelines.cluster import fits, free_placement_groups, runtime_env
from pipelines.dag import Planned
from pipelines.failures import Failure, diagnose
from pipelines.lock import Lock
from pipelines.recorder import Recorder, StageRecord, State
from pipelines.signals import Stop
from pipelines.stage_process import Board, Order, Outcome, Progress, execute

POLL_S = 0.25
CANCEL_S = 10.0  # a stage that hasn't ended so long after it was cancelled is killed
TERMINATE_S = 1.0  # the same after SIGTERM: `ray job stop` follows it with SIGKILL in 3 s

_log = logging.getLogger(__name__)


class LockLost(WorkspaceError):
    """Another run took the workspace for abandoned; nothing may be committed any more."""


@dataclass
class Context:
    """One run: what is given, and what has become of its stages so far."""

    workspace: str
    planned: Mapping[str, Planned]
    logs: str  # folder
    lock: Lock
    stop: Stop
    recorder: Recorder
    retries: int = 2
    backoff_s: float = 2.0
    records: dict[str, StageRecord] = field(default_factory=dict)

    def uri(self, name: str) -> str:
        """Where a stage's artifact stands, or will."""
        return join(self.workspace, name, self.planned[name].key)

    def log(self, name: str) -> str:
        """The file with the output of a stage's process."""
        return join(self.logs, f"{name}.log")

    def record(self, name: str, state: State, **details: Any) -> StageRecord:
        """Set down what became of a stage."""
        planned = self.planned[name]
        self.records[name] = StageRecord(
            name=name,
            key=planned.key,
            state=state,
            uri=self.uri(name),
            reason=planned.reason,
            headline=planned.stage.headline,
            **details,
        )
        return self.records[name]


@dataclass
class Attempt:
    """One try of a stage."""

    planned: Planned
    number: int
    draft: Draft
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """The stage's."""
        return self.planned.stage.name

    @property
    def seconds(self) -> float:
        """Since it started."""
        return time.monotonic() - self.started


class Execution:
    """Runs the stages of ``to_run`` on a connected Ray whose resources are ``have``."""

    def __init__(self, context: Context, to_run: list[Planned], have: Mapping[str, float]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.context, self.have, self.ray = context, have, ray
        names = {one.stage.name for one in to_run}
        self.sorter = TopologicalSorter({one.stage.name: names & set(one.stage.needs.values()) for one in to_run})
        self.sorter.prepare()
        self.waiting: list[tuple[float, str, int]] = []  # not before (monotonic), stage, number of the try
        self.running: dict[Any, Attempt] = {}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        placed = {"num_cpus": 0, "scheduling_strategy": here}
        # Stages that follow each other share a process: starting one and importing MLflow takes 2 s of processor time.
        self.task = ray.remote(max_retries=0, **placed)(execute).options(runtime_env=runtime_env())
        self.board = ray.remote(Board).options(**placed).remote()

    def run(self) -> None:
        """Run every stage that can be; comes back when none is left or a stop was asked for."""
        try:
            while not self.context.stop.requested:
                self._start_ready()
                if not self.running and not self.waiting:
                    return
                self._take_finished(POLL_S)
        finally:
            self._cancel()

    def _start_ready(self) -> None:
        self.waiting += [(0.0, name, 1) for name in self.sorter.get_ready()]
        for entry in list(self.waiting):
            not_before, name, number = entry
            demands = [attempt.planned.stage.demand for attempt in self.running.values()]
            planned = self.context.planned[name]
            if not_before <= time.monotonic() and fits(planned.stage.demand, demands, self.have):
                self.waiting.remove(entry)
                self._start(planned, number)

    def _start(self, planned: Planned, number: int) -> None:
        context, name = self.context, planned.stage.name
        _log.info("%-12s starts (%s)", name, planned.reason if number == 1 else f"try {number}")
        scratch = join(context.workspace, "scratch", name, planned.key)
        if planned.reason == "forced" and number == 1:
            remove(scratch)  # or training would find itself finished
        if number > 1 and not self.running:
            free_placement_groups()
        attempt = Attempt(planned, number, Draft(context.workspace, name, planned.key))
        job = Job(
            stage=name,
            key=planned.key,
            workspace=context.workspace,
            output=attempt.draft.uri,
            scratch=scratch,
            code=planned.stage.version,
            fresh=planned.reason == "forced",
            tracking=asdict(context.recorder.started(planned)),
            progress=Progress(self.board, name),
        )
        self.running[self.task.remote(self._order(planned, job))] = attempt

    def _order(self, planned: Planned, job: Job) -> Order:
        stage, context = planned.stage, self.context
        inputs = {
            argument: (context.planned[need].stage.produces, context.uri(need))
            for argument, need in stage.needs.items()
        }
        return Order(stage.run, stage.config, stage.resources, inputs, job, context.log(stage.name))

    def _take_finished(self, timeout_s: float) -> None:
        if self.running:
            done, _ = self.ray.wait(list(self.running), timeout=timeout_s)
        else:
            done = []
            time.sleep(timeout_s)
        self._show_progress()
        for ref in done:
            attempt = self.running.pop(ref)
            self._settle(attempt, self._outcome(ref, attempt))

    def _outcome(self, ref: Any, attempt: Attempt) -> Outcome:
        try:
            outcome: Outcome = self.ray.get(ref)
            return outcome
        except Exception as error:  # the process died, or what it wanted to say did not survive the way
            self._write_trace(attempt, error)
            return Outcome(failure=diagnose(error))

    def _write_trace(self, attempt: Attempt, error: Exception) -> None:
        """To the stage's log, whose process can't any more; a disk that is full must not hide why."""
        with suppress(OSError), open(self.context.log(attempt.name), "a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)))

    def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """Commit, retry, or give up."""
        failure = outcome.failure or self._commit(attempt, outcome)
        if failure is None:
            self._ended(attempt, "done", figures=outcome.figures)
            self.sorter.done(attempt.name)
            return
        with suppress(OSError):  # a store that is away; the next run deletes drafts
            attempt.draft.discard()
        if failure.transient and attempt.number <= self.context.retries:
            pause = self.context.backoff_s * 2 ** (attempt.number - 1)
            _log.warning("%-12s will be tried again in %.0f s: %s", attempt.name, pause, failure.cause)
            self.waiting.append((time.monotonic() + pause, attempt.name, attempt.number + 1))
            return
        self._ended(attempt, "failed", error=failure.cause)

    def _commit(self, attempt: Attempt, outcome: Outcome) -> Failure | None:
        """Raises LockLost; what else keeps it from being committed is the stage's failure."""
        try:
            self._check_lock()
            manifest = self._manifest(attempt, outcome)
            attempt.draft.commit(manifest, replaces=attempt.planned.manifest, check=self._check_lock)
            return None
        except (OSError, ValueError) as error:  # ValueError: the lock's, for credentials that ran out
            self._write_trace(attempt, error)
            return diagnose(error)

    def _check_lock(self) -> None:
        if not self.context.lock.held():
            raise LockLost(f"{self.context.workspace}: another run took the workspace over; this one must stop")

    def _manifest(self, attempt: Attempt, outcome: Outcome) -> Manifest:
        planned, stage = attempt.planned, attempt.planned.stage
        kind = getattr(artifacts, stage.produces)
        return Manifest(
            schema=kind.schema,
            version=kind.version,
            stage=stage.name,
            key=planned.key,
            inputs={argument: self.context.planned[need].key for argument, need in stage.needs.items()},
            config=stage.config.model_dump(mode="json"),
            counts=outcome.figures,
            code=stage.version,
            # The world may have changed since the plan: then this isn't what the key says, and won't stand for it.
            fingerprint={name: outcome.figures.get(SEEN + name, fact) for name, fact in stage.fingerprint.items()},
            files=files_digest(join(attempt.draft.uri, "table")),
            mlflow_run_id=self.context.recorder.started(planned).run_id or None,
            seconds=round(attempt.seconds, 3),
        )

    def _ended(self, attempt: Attempt, state: State, **details: Any) -> None:
        record = self.context.record(
            attempt.name,
            state,
            seconds=attempt.seconds,
            log=self.context.log(attempt.name),
            attempts=attempt.number,
            mlflow_run_id=self.context.recorder.started(attempt.planned).run_id,
            **details,
        )
        self.context.recorder.ended(record)
        if state == "failed":
            _log.error("%-12s failed: %s (log: %s)", record.name, record.error, record.log)
        else:
            _log.info("%-12s %s in %.1f s", record.name, state, record.seconds)

    def _show_progress(self) -> None:
        try:
            lines = self.ray.get(self.board.drain.remote(), timeout=5)
        except self.ray.exceptions.RayError as error:
            _log.warning("no progress lines: %s", diagnose(error).cause)
            return
        for stage, line in lines:
            if line:
                _log.info("%-12s %s", stage, line)

    def _cancel(self) -> None:
        """End running stages. The record first: after SIGTERM there may be only seconds left."""
        attempts, refs = list(self.running.values()), list(self.running)
        for ref in refs:
            self.ray.cancel(ref)
        for attempt in attempts:
            self._ended(attempt, "cancelled")
        if self.context.stop.requested:
            self.context.recorder.close("KILLED")
        grace_s = TERMINATE_S if self.context.stop.signal == signal.SIGTERM else CANCEL_S
        left = self.ray.wait(refs, num_returns=len(refs), timeout=grace_s)[1] if refs else []
        for ref in left:
            self.ray.cancel(ref, force=True)
        if left:
            self.ray.wait(left, num_returns=len(left), timeout=TERMINATE_S)
        for attempt in attempts:
            attempt.draft.discard()
        self.running.clear()
