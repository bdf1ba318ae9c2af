"""select.<task>: the fewest tokens that serve a task, per image: a pass over a small table, no model."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import COUNTS_SCHEMA, Figures, Job, ScoreTable, filesystem, join, read_json
from components.config import NoConfig, RuleConfig
from components.mapping import part_names
from components.rules import build_rule, describe
from components.task_config import TaskConfig
from model.selection import Selection


@dataclass(frozen=True)
class Choice:
    """The counts of a whole score table."""

    selection: Selection
    budgets: list[int]
    rule: str
    split: np.ndarray  # [N] "train" or "val"

    def figures(self) -> Figures:
        """Means over all images, and over the held-out ones where there are any."""
        tokens, satisfied = self.selection.num_tokens, self.selection.satisfied
        counts = {budget: int((tokens == budget).sum()) for budget in self.budgets}
        figures: Figures = {
            "mean_tokens": float(tokens.mean()),
            "satisfied": float(satisfied.mean()),
            "value": float(np.nanmean(self.selection.value)),
            "counts_used": sum(number > 0 for number in counts.values()),
            "histogram": " ".join(f"{budget}:{number}" for budget, number in counts.items()),
        }
        held_out = self.split == "val"
        if held_out.any():
            figures["mean_tokens_held_out"] = float(tokens[held_out].mean())
        if self.selection.gap_bound:
            figures["gap_bound"] = self.selection.gap_bound
        return figures


def select(job: Job, *, config: TaskConfig, resources: NoConfig, scores: ScoreTable) -> Figures:
    """Write TokenCounts, file by file beside the score table's own."""
    choice = choose(scores, config.rule)
    write_counts(scores, choice, config.name, join(job.output, "table"))
    return choice.figures()


def choose(scores: ScoreTable, rule: RuleConfig) -> Choice:
    """Apply ``rule`` to every image of ``scores``; only one metric's column is read."""
    budgets = [int(budget) for budget in read_json(join(scores.uri, "budgets.json"))]
    values, splits = [], []
    for table in _files(scores, [rule.metric, "split"]):
        flat = table[rule.metric].combine_chunks()
        values.append(flat.values.to_numpy(zero_copy_only=False).reshape(len(flat), len(budgets)))
        splits.append(np.asarray(table["split"]).astype(str))
    selection = build_rule(rule).select(np.concatenate(values), budgets)
    return Choice(selection, budgets, describe(rule), np.concatenate(splits))


def write_counts(scores: ScoreTable, choice: Choice, task: str, target: str) -> None:
    """TokenCounts as Parquet files with the names and rows of the score table's."""
    store, folder = filesystem(target)
    store.create_dir(folder, recursive=True)
    start = 0
    for name, table in zip(part_names(scores.table_uri), _files(scores, ["image_id"]), strict=True):
        rows = slice(start, start + len(table))
        start += len(table)
        columns = {
            "image_id": table["image_id"],
            "task": pa.repeat(task, len(table)),
            "rule": pa.repeat(choice.rule, len(table)),
            "num_tokens": pa.array(choice.selection.num_tokens[rows], pa.int32()),
            "value": pa.array(choice.selection.value[rows], pa.float32()),
            "satisfied": pa.array(choice.selection.satisfied[rows]),
        }
        pq.write_table(
            pa.table(columns, schema=COUNTS_SCHEMA), f"{folder}/{name}", filesystem=store, compression="zstd"
        )


def _files(scores: ScoreTable, columns: list[str]) -> Iterator[pa.Table]:
    store, folder = filesystem(scores.table_uri)
    for name in part_names(scores.table_uri):
        yield pq.read_table(f"{folder}/{name}", filesystem=store, columns=columns)
