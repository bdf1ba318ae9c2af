"""What a score table is made of, column by column, and which columns earlier tables have already.

A column's *piece key* is a hash of all that decides an image's value: tokenizer, metric, judge, code. Which images a
table has is not in it: their files' names say that.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from components.artifacts import Job, Judge, finished
from components.judges.record import value_digest
from components.parts import Earlier
from components.plugins import source_digest
from components.scores import METRICS
from components.store import join, read_json
from components.task_config import TASK_KINDS, ScoreStageConfig
from model.selection import LARGER_IS_BETTER
from model.weights import perceptual_weights

VERSION = "2"  # raise it when a metric of this software gives other values


@dataclass(frozen=True)
class Column:
    """One metric in the table; ``task``: of a task that isn't one of pixels."""

    name: str
    metric: str
    piece: str
    task: str | None = None


def wanted_columns(config: ScoreStageConfig, makers: Mapping[str, str], judges: Mapping[str, Judge]) -> list[Column]:
    """The columns that ``config`` asks for; ``makers``: what decides codes and their images; ``judges`` by task."""
    columns = []
    for metric in config.metrics:
        facts = {"metric": metric, "weights": _perceptual(config) if metric == "perceptual" else None}
        columns.append(Column(metric, metric, _piece(makers, facts)))
    for task in config.tasks:
        own = source_digest(task.kind) if task.kind not in TASK_KINDS else ""
        judge = value_digest(judges[task.name].uri) if task.name in judges else ""
        for metric in task.metrics:
            facts = {"metric": metric, "kind": task.kind, "code": own, "judge": judge}
            columns.append(Column(f"{task.name}.{metric}", metric, _piece(makers, facts), task.name))
    return columns


def _perceptual(config: ScoreStageConfig) -> dict[str, Any]:
    path = perceptual_weights(config.perceptual)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path else ""
    return {**asdict(config.perceptual), "weights": digest}


def _piece(makers: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    canonical = json.dumps({"version": VERSION, **makers, **facts}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def earlier_tables(job: Job, columns: Sequence[Column]) -> Iterator[Earlier]:
    """The finished score tables that have some of ``columns``, the newest first; none for a forced stage."""
    ours = {column.piece: column.name for column in columns}
    for uri, _ in () if job.fresh else finished(job.workspace, job.stage):
        told = sorted(_read_metrics(uri).items(), key=lambda item: item[1].get("place", 0))
        theirs = {name: about["piece"] for name, about in told}
        same = [*theirs.items()] == [(column.name, column.piece) for column in columns]
        shared = {name: ours[piece] for name, piece in theirs.items() if piece in ours}
        if shared:
            yield Earlier(join(uri, "table"), shared, same)


def _read_metrics(uri: str) -> dict[str, dict[str, Any]]:
    """The table's ``metrics.json``; none in tables of before there was one."""
    try:
        return read_json(join(uri, METRICS))
    except FileNotFoundError:
        return {}


def direction(metric: str) -> str:
    """Whether "lower" or "higher" is better, for a metric of this software."""
    return "higher" if metric in LARGER_IS_BETTER else "lower"
