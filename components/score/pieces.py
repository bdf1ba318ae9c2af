"""What a score table is made of, column by column, and which columns an earlier table has already.

A column's *piece key* is a hash of all that decides its values: images, codes, tokenizer, metric, judge, code.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from components.artifacts import Judge, filesystem, join, read_json, read_manifest
from components.plugins import source_digest
from components.scores import METRICS
from components.task_config import TASK_KINDS, ScoreStageConfig
from model.selection import LARGER_IS_BETTER
from model.weights import perceptual_weights

VERSION = "1"  # raise it when a metric of this software gives other values


@dataclass(frozen=True)
class Column:
    """One metric in the table; ``task``: of a task that isn't one of pixels."""

    name: str
    metric: str
    piece: str
    task: str | None = None


def wanted_columns(config: ScoreStageConfig, inputs: Mapping[str, str], judges: Mapping[str, Judge]) -> list[Column]:
    """The columns that ``config`` asks for; ``inputs``: keys of images, codes, tokenizer, ``judges`` by task."""
    columns = []
    for metric in config.metrics:
        facts = {"metric": metric, "weights": _perceptual(config) if metric == "perceptual" else None}
        columns.append(Column(metric, metric, _piece(inputs, facts)))
    for task in config.tasks:
        own = source_digest(task.kind) if task.kind not in TASK_KINDS else ""
        judge = judges[task.name].key if task.name in judges else ""
        for metric in task.metrics:
            facts = {"metric": metric, "kind": task.kind, "code": own, "judge": judge}
            columns.append(Column(f"{task.name}.{metric}", metric, _piece(inputs, facts), task.name))
    return columns


def _perceptual(config: ScoreStageConfig) -> dict[str, Any]:
    path = perceptual_weights(config.perceptual)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path else ""
    return {**asdict(config.perceptual), "weights": digest}


def _piece(inputs: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    canonical = json.dumps({"version": VERSION, **inputs, **facts}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def find_earlier(workspace: str, columns: Sequence[Column]) -> dict[str, dict[str, str]]:
    """Table of an earlier ScoreTable in ``workspace`` -> its columns with the pieces of ours -> our names for them."""
    found: dict[str, dict[str, str]] = {}
    missing = {column.piece: column.name for column in columns}
    for uri in _finished(workspace) if workspace else ():
        for name, about in _read_metrics(uri).items():
            if about["piece"] in missing:
                found.setdefault(join(uri, "table"), {})[name] = missing.pop(about["piece"])
    return found


def _finished(workspace: str) -> list[str]:
    """The score tables that stand, by name."""
    store, path = filesystem(join(workspace, "score"))
    names = sorted(info.base_name for info in store.get_file_info(fs.FileSelector(path, allow_not_found=True)))
    uris = [join(workspace, "score", name) for name in names]
    return [uri for uri in uris if read_manifest(uri) is not None]


def _read_metrics(uri: str) -> dict[str, dict[str, Any]]:
    """The table's ``metrics.json``; none in tables of before there was one."""
    try:
        return read_json(join(uri, METRICS))
    except FileNotFoundError:
        return {}


def direction(metric: str) -> str:
    """Whether "lower" or "higher" is better, for a metric of this software."""
    return "higher" if metric in LARGER_IS_BETTER else "lower"
