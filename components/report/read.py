"""What the artifacts of a run say, as the page wants it.

Legend: N rows, K budgets.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.artifacts import (
    Analysis,
    Artifact,
    CodeBook,
    ImageSet,
    Publication,
    ScoreTable,
    TokenArchive,
    TokenCounts,
    Tokenizer,
)
from components.mapping import part_names
from components.registry import ModelVersion
from components.rules import column, describe
from components.scores import budgets_of, larger_is_better, told_split
from components.store import exists, filesystem, join, read_batches, read_json
from components.task_config import TaskConfig


@dataclass(frozen=True)
class Run:
    """The artifacts of a run; ``others``: those that only the lineage and the timings are about."""

    images: ImageSet
    tokenizer: Tokenizer
    codes: CodeBook
    scores: ScoreTable
    publication: Publication
    made: Mapping[str, Artifact]

    @cached_property
    def registered(self) -> ModelVersion:
        """As what the tokenizer is."""
        return ModelVersion.of(self.publication)

    @property
    def model(self) -> str:
        """The same for people."""
        return f"{self.registered.name}, version {self.registered.version}"

    @cached_property
    def tasks(self) -> "list[Task]":
        """In the order of the config."""
        return [Task.read(counts, self) for counts in self.made.values() if isinstance(counts, TokenCounts)]

    @property
    def shown(self) -> "Task":
        """The task that pictures are chosen and judged by: one of pixels, where there is one."""
        return next((task for task in self.tasks if task.config.kind == "reconstruction"), self.tasks[0])

    @cached_property
    def budgets(self) -> list[int]:
        """Token counts, increasing."""
        return budgets_of(self.scores)

    @cached_property
    def larger_is_better(self) -> dict[str, bool]:
        """For every metric of the score table."""
        return larger_is_better(self.scores)

    @cached_property
    def curves(self) -> "list[Curve]":
        """Every metric against tokens."""
        rows = read_json(join(self.scores.uri, "summary.json"))["rows"]
        return [
            Curve(name, larger, [row for row in rows if row["column"] == name and row["mean"] is not None])
            for name, larger in self.larger_is_better.items()
        ]

    @property
    def split(self) -> str:
        """Of the images that the curves are about, as people call it."""
        return "held-out" if told_split(self.scores) == "val" else "training"

    @property
    def artifacts(self) -> list[Artifact]:
        """All of them, in the order they were finished."""
        named = (self.images, self.tokenizer, self.codes, self.scores, self.publication)
        found = {one.uri: one for one in (*named, *self.made.values())}
        return sorted(found.values(), key=lambda artifact: (artifact.manifest.created, artifact.manifest.stage))

    def analyses(self, file: str) -> Iterator[tuple[Analysis, Any]]:
        """Each analysis that has the JSON ``file``, and what it says."""
        for artifact in self.made.values():
            if isinstance(artifact, Analysis) and exists(join(artifact.uri, file)):
                yield artifact, read_json(join(artifact.uri, file))


@dataclass(frozen=True)
class Curve:
    """A metric at each budget; ``rows`` as summary.json has them, those without an image left out."""

    name: str
    larger_is_better: bool
    rows: Sequence[Mapping[str, Any]]

    def at(self, num_tokens: int) -> float | None:
        """The mean at a budget."""
        return next((row["mean"] for row in self.rows if row["num_tokens"] == num_tokens), None)


@dataclass(frozen=True)
class Task:
    """What a task chose and what its rules come to."""

    config: TaskConfig
    counts: TokenCounts
    rules: Sequence[Mapping[str, Any]]  # of rules.json, the task's own first
    sizes: Mapping[str, Any]  # of sizes.json; empty where nothing was packed

    @classmethod
    def read(cls, counts: TokenCounts, run: Run) -> "Task":
        """The task that ``counts`` is of."""
        config = TaskConfig.model_validate(counts.manifest.config)
        packed = [one for one in run.made.values() if isinstance(one, TokenArchive)]
        mine = [one for one in packed if one.manifest.inputs.get("counts") == counts.key]
        sizes = read_json(join(mine[0].uri, "sizes.json")) if mine and exists(join(mine[0].uri, "sizes.json")) else {}
        return cls(config, counts, read_json(join(counts.uri, "rules.json"))["rules"], sizes)

    @property
    def name(self) -> str:
        """As the config has it."""
        return self.config.name

    @property
    def rule(self) -> str:
        """The rule that chose, in a few words."""
        return describe(self.config.rule)

    @property
    def column(self) -> str:
        """Of the score table: what the rule reads."""
        return column(self.config, self.config.rule.metric)

    @property
    def mine(self) -> Mapping[str, Any]:
        """The figures of the rule that chose."""
        return self.rules[0]

    def satisfied(self, rule: Mapping[str, Any]) -> float | None:
        """The share of the images with a value that meet the rule of ``rules.json``."""
        images = sum(self.histogram.values())
        measured = images - rule["missing"]
        return rule["satisfied"] * images / measured if measured else None

    @property
    def histogram(self) -> dict[int, int]:
        """Images at each budget."""
        return {
            int(at): int(images) for at, _, images in (one.partition(":") for one in self.mine["histogram"].split())
        }


def whole_column(uri: str, name: str) -> np.ndarray:
    """One column of a table [N]."""
    return np.concatenate([np.asarray(batch[0]) for batch in read_batches(uri, columns=[name])])


def is_held_out(scores: ScoreTable) -> np.ndarray:
    """Which rows are of the val split; all of them where none is held out. bool [N]."""
    parts = [np.asarray(pc.equal(batch[0], "val")) for batch in read_batches(scores.table_uri, columns=["split"])]
    rows = np.concatenate(parts)
    return rows if rows.any() else np.ones_like(rows)


def read_rows(uri: str, rows: np.ndarray, columns: list[str]) -> list[dict[str, Any]]:
    """Rows by number, which increase; only the files that they are in are read."""
    store, folder = filesystem(uri)
    found: list[dict[str, Any]] = []
    start = 0
    for name in part_names(uri):
        with store.open_input_file(f"{folder}/{name}") as stream:
            file = pq.ParquetFile(stream)
            stop = start + file.metadata.num_rows
            here = rows[(rows >= start) & (rows < stop)] - start
            if len(here):
                found += file.read(columns=columns).take(pa.array(here)).to_pylist()
            start = stop
    return found


def finite(values: Any) -> Any:
    """JSON's values as they are, numbers that are not finite as None: pages have no NaN."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)
