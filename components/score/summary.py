"""A score table in short: each metric at each budget over the held-out images.

Legend: N images, K budgets.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow.parquet as pq

from components.parts import part_names
from components.scores import values_of
from components.store import filesystem


@dataclass(frozen=True)
class Row:
    """One metric at one budget; numbers are None where no image has a value."""

    column: str
    num_tokens: int
    mean: float | None
    median: float | None
    p5: float | None  # the 5th percentile
    p95: float | None
    count: int  # images with a value
    missing: int  # without


def summarise(table: str, columns: Sequence[str], budgets: Sequence[int]) -> tuple[str, list[dict[str, object]], dict]:
    """The split that is told of (val, or train without one), :class:`Row` values, and column -> rows missing in all.

    Reads one column at a time; ``table``: the folder of the Parquet files.
    """
    split = _column(table, "split")
    told_of = "val" if (split == "val").any() else "train"
    rows, missing = [], {}
    for name in columns:
        values = np.concatenate([values_of(part, name, len(budgets)) for part in _parts(table, name)])
        missing[name] = int(np.isnan(values).all(axis=1).sum())
        rows += [asdict(row) for row in _rows(name, values[split == told_of], budgets)]
    return told_of, rows, missing


def _rows(name: str, values: np.ndarray, budgets: Sequence[int]) -> list[Row]:
    rows = []
    for budget, numbers in zip(budgets, values.T, strict=True):
        present = numbers[~np.isnan(numbers)].astype(np.float64)
        told: Sequence[float | None] = [None] * 4
        if len(present):
            told = [float(present.mean()), *(float(np.percentile(present, at)) for at in (50, 5, 95))]
        rows.append(Row(name, int(budget), *told, count=len(present), missing=len(numbers) - len(present)))
    return rows


def _column(table: str, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(part[name]).astype(str) for part in _parts(table, name)])


def _parts(table: str, name: str) -> list:
    store, folder = filesystem(table)
    return [pq.read_table(f"{folder}/{file}", filesystem=store, columns=[name]) for file in part_names(table)]
