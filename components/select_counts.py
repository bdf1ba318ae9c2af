"""select.<task>: the fewest tokens that serve a task, per image: a pass over a small table, no model.

File by file; only MeanTokens, which weighs images against each other, holds the whole column of its metric.

Legend: N rows, K budgets.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.artifacts import COUNTS_SCHEMA, Figures, Job, LengthModel, ScoreTable
from components.config import NoConfig, RuleConfig
from components.rules import build_rule, column, describe, searched
from components.scores import budgets_of, larger_is_better, score_files, values_of, whole_column
from components.store import filesystem, join, write_json
from components.task_config import TaskConfig
from model.selection import Rule, Selection

HOW = (
    "value: mean of the rule's metric at the chosen counts. fixed_tokens: the one count for all images that has the "
    "same mean, on the line between the two budgets around it (which is what a mix of the two gives), over the "
    "`compared` images that have a finite value at every budget; null: no budget is as good. saved: by how much the "
    "mean count of those images is below it. missing: images without a value; they get the most tokens and are not "
    "satisfied. same: share of images for which a predicted rule and the threshold it stands for give one count; "
    "searched_tokens, searched_satisfied: that threshold's own."
)


@dataclass(frozen=True)
class _Part:
    """One file of the score table as one rule sees it."""

    name: str
    rows: slice  # of the whole table
    values: np.ndarray  # float32 [N, K]


_Choose = Callable[[_Part], Selection]


def select(
    job: Job, *, config: TaskConfig, resources: NoConfig, scores: ScoreTable, lengths: LengthModel | None = None
) -> Figures:
    """Write TokenCounts of the task's rule, file by file beside the score table's own, and what all its rules come to.

    ``lengths``: what predicted rules choose from. Raises ValueError for a rule that the scores don't allow.
    """
    rules = (config.rule, *config.rules)
    columns = [column(config, rule.metric) for rule in rules]
    larger, budgets = larger_is_better(scores), budgets_of(scores)
    if unknown := set(columns) - set(larger):
        raise ValueError(f"task {config.name!r}: no scores {sorted(unknown)} in {scores.uri}, there are {list(larger)}")
    table_columns = ["image_id", "split", *dict.fromkeys(columns)]
    choosers = [_chooser(scores, rule, name, lengths) for rule, name in zip(rules, columns, strict=True)]
    tallies = [Tally(rule, larger[name], budgets) for rule, name in zip(rules, columns, strict=True)]
    store, folder = filesystem(join(job.output, "table"))
    store.create_dir(folder, recursive=True)
    start = 0
    for name, table in score_files(scores, table_columns):
        rows = slice(start, start := start + len(table))
        held_out = np.asarray(pc.equal(table["split"], "val"))
        for number, (choose, tally) in enumerate(zip(choosers, tallies, strict=True)):
            part = _Part(name, rows, values_of(table, columns[number], len(budgets)))
            chosen = choose(part)
            tally.add(part.values, chosen, held_out)
            if number == 0:
                counts = _counts(table["image_id"], chosen, config.name, describe(config.rule))
                pq.write_table(counts, f"{folder}/{name}", filesystem=store, compression="zstd")
    write_json(join(job.output, "rules.json"), {"rules": [tally.row() for tally in tallies], "how": HOW})
    return tallies[0].figures()


def _chooser(scores: ScoreTable, rule: RuleConfig, name: str, lengths: LengthModel | None) -> _Choose:
    """What chooses for the rows of one file under ``rule``, whose metric is the column ``name``."""
    budgets = budgets_of(scores)
    if rule.kind == "predicted":
        if lengths is None:
            raise ValueError(f"rule {describe(rule)!r}: it needs the predictions of the length stage")
        return _Predicted(rule, budgets, lengths)
    built = build_rule(rule, larger_is_better=larger_is_better(scores)[name])
    if rule.kind != "mean_tokens":
        return lambda part: _completed(part.values, built.select(part.values, budgets), budgets)
    whole = _over_all(built, whole_column(scores, name), budgets)
    return lambda part: _completed(part.values, _rows(whole, part.rows), budgets)


def _over_all(rule: Rule, values: np.ndarray, budgets: list[int]) -> Selection:
    """The choice for all images at once; those without a value take no part in it."""
    present = ~np.isnan(values).all(axis=1)
    chosen = rule.select(values[present], budgets)
    column, satisfied = np.zeros(len(values), dtype=np.int64), np.zeros(len(values), dtype=bool)
    column[present], satisfied[present] = chosen.column, chosen.satisfied
    tokens, value = np.asarray(budgets)[column], values[np.arange(len(values)), column]
    return Selection(column, tokens, value, satisfied, chosen.gap_bound)


@dataclass(frozen=True)
class _Predicted:
    """Chooses by predicted values; value and satisfied are those of the true ones."""

    rule: RuleConfig
    budgets: list[int]
    lengths: LengthModel

    def __call__(self, part: _Part) -> Selection:
        store, folder = filesystem(self.lengths.table_uri)
        table = pq.read_table(f"{folder}/{part.name}", filesystem=store, columns=["predicted"])
        predicted = values_of(table, "predicted", len(self.budgets))
        threshold = build_rule(searched(self.rule))
        at = threshold.select(predicted, self.budgets).column
        value = part.values[np.arange(len(at)), at]
        satisfied = threshold.settled(value[:, None])
        chosen = Selection(at, np.asarray(self.budgets)[at], value, satisfied)
        return _completed(part.values, chosen, self.budgets)


def _rows(chosen: Selection, rows: slice) -> Selection:
    column, tokens = chosen.column[rows], chosen.num_tokens[rows]
    return Selection(column, tokens, chosen.value[rows], chosen.satisfied[rows], chosen.gap_bound)


def _completed(values: np.ndarray, chosen: Selection, budgets: Sequence[int]) -> Selection:
    """Rows without any value at the most tokens, unsatisfied: what can't be measured must lose nothing."""
    missing = np.isnan(values).all(axis=1)
    return replace(
        chosen,
        column=np.where(missing, len(budgets) - 1, chosen.column),
        num_tokens=np.where(missing, budgets[-1], chosen.num_tokens),
        satisfied=chosen.satisfied & ~np.isnan(chosen.value),
    )


def _counts(image_id: pa.ChunkedArray, chosen: Selection, task: str, rule: str) -> pa.Table:
    columns = {
        "image_id": image_id,
        "task": pa.repeat(task, len(image_id)),
        "rule": pa.repeat(rule, len(image_id)),
        "num_tokens": pa.array(chosen.num_tokens, pa.int32()),
        "value": pa.array(chosen.value, pa.float32(), mask=np.isnan(chosen.value)),
        "satisfied": pa.array(chosen.satisfied),
    }
    return pa.table(columns, schema=COUNTS_SCHEMA)


@dataclass
class Tally:
    """Sums over the files of what one rule chose; see HOW."""

    rule: RuleConfig
    larger_is_better: bool
    budgets: list[int]
    sums: dict[str, float] = field(default_factory=dict)
    gap_bound: float = 0.0

    def __post_init__(self) -> None:
        self.histogram = np.zeros(len(self.budgets), dtype=np.int64)
        self.curve = np.zeros(len(self.budgets))  # of the metric at each budget

    def add(self, values: np.ndarray, chosen: Selection, held_out: np.ndarray) -> None:
        """Count the rows of one file: their values [N, K], what was chosen, whether they are held out."""
        compared = np.isfinite(values).all(axis=1)
        measured = np.isfinite(chosen.value)
        self._sum("images", np.ones(len(values)))
        self._sum("tokens", chosen.num_tokens)
        self._sum("satisfied", chosen.satisfied)
        self._sum("missing", np.isnan(values).all(axis=1))
        self._sum("measured", measured)
        self._sum("value", chosen.value[measured])
        self._sum("held_out", held_out)
        self._sum("held_out_tokens", chosen.num_tokens[held_out])
        self._sum("compared", compared)
        self._sum("compared_tokens", chosen.num_tokens[compared])
        self._sum("compared_value", chosen.value[compared])
        if self.rule.kind == "predicted":
            threshold = build_rule(searched(self.rule)).select(values, self.budgets)
            self._sum("same", threshold.column == chosen.column)
            self._sum("searched_tokens", threshold.num_tokens)
            self._sum("searched_satisfied", threshold.satisfied)
        self.histogram += np.bincount(chosen.column, minlength=len(self.budgets))
        self.curve += values[compared].sum(axis=0, dtype=np.float64)
        self.gap_bound = chosen.gap_bound

    def _sum(self, name: str, numbers: np.ndarray) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(numbers.sum(dtype=np.float64))

    def _mean(self, name: str, over: str = "images") -> float | None:
        return self.sums[name] / self.sums[over] if self.sums[over] else None

    def row(self) -> dict[str, Any]:
        """Every figure, None where there is nothing to say."""
        fixed, tokens = self._fixed(), self._mean("compared_tokens", "compared")
        saved = None if fixed is None or tokens is None else fixed - tokens
        row = {
            "rule": describe(self.rule),
            "metric": self.rule.metric,
            "mean_tokens": self._mean("tokens"),
            "satisfied": self._mean("satisfied"),
            "value": self._mean("value", "measured"),
            "counts_used": int((self.histogram > 0).sum()),
            "missing": int(self.sums["missing"]),
            "compared": int(self.sums["compared"]),
            "fixed_tokens": fixed,
            "saved": saved,
            "saved_share": None if saved is None or not fixed else saved / fixed,
            "mean_tokens_held_out": self._mean("held_out_tokens", "held_out"),
            "gap_bound": self.gap_bound or None,
            "histogram": " ".join(f"{b}:{int(n)}" for b, n in zip(self.budgets, self.histogram, strict=True)),
        }
        if self.rule.kind == "predicted":
            row |= {name: self._mean(name) for name in ("same", "searched_tokens", "searched_satisfied")}
        return row

    def _fixed(self) -> float | None:
        if not self.sums["compared"]:
            return None
        sign = -1 if self.larger_is_better else 1
        losses = sign * self.curve / self.sums["compared"]
        return equal_quality(losses, self.budgets, sign * self.sums["compared_value"] / self.sums["compared"])

    def figures(self) -> Figures:
        """What there is to say of the rule, for the table at the end of a run."""
        return {
            name: value for name, value in self.row().items() if value is not None and name not in ("rule", "metric")
        }


def equal_quality(losses: Iterable[float], budgets: Sequence[int], loss: float) -> float | None:
    """The fewest tokens at which the line through (budgets, mean losses) is as low as ``loss``; None: it never is."""
    previous: tuple[float, float] | None = None
    for tokens, here in zip(budgets, losses, strict=True):
        if here <= loss:
            if previous is None:
                return float(tokens)
            share = (previous[1] - loss) / (previous[1] - here)
            return previous[0] + share * (tokens - previous[0])
        previous = (float(tokens), here)
    return None
