"""Reading a ScoreTable, one Parquet file at a time.

Legend: N rows, K budgets.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import ScoreTable
from components.parts import part_names
from components.store import filesystem, join, read_json

if TYPE_CHECKING:
    from model.inference import Precision

METRICS = "metrics.json"


def budgets_of(scores: ScoreTable) -> list[int]:
    """Token counts of the columns' values, increasing."""
    return [int(budget) for budget in read_json(join(scores.uri, "budgets.json"))]


def told_split(scores: ScoreTable) -> str:
    """The split that its figures are about: "val", or "train" where nothing is held out."""
    return str(scores.manifest.counts["split"])


def precision_of(scores: ScoreTable) -> "Precision":
    """At which images were decoded for them: what is measured anew to lie beside them needs the same."""
    precision: Precision = scores.manifest.config.get("precision", "fp32")
    return precision


def larger_is_better(scores: ScoreTable) -> dict[str, bool]:
    """Whether more is better, for every metric column of the table."""
    return {name: metric["direction"] == "higher" for name, metric in read_json(join(scores.uri, METRICS)).items()}


def score_files(scores: ScoreTable, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Name and rows of each file; raises ValueError for a column that the table lacks."""
    store, folder = filesystem(scores.table_uri)
    for name in part_names(scores.table_uri):
        with store.open_input_file(f"{folder}/{name}") as stream:
            file = pq.ParquetFile(stream)
            missing = set(columns) - set(file.schema_arrow.names)
            if missing:
                raise ValueError(f"{scores.uri}: no scores {sorted(missing)}, there are {file.schema_arrow.names}")
            yield name, file.read(columns=columns, use_threads=False)


def values_of(table: pa.Table, column: str, num_budgets: int) -> np.ndarray:
    """float32 [N, K]; NaN where a row or a value is null."""
    lists = table[column].combine_chunks()
    values = np.full((len(lists), num_budgets), np.nan, dtype=np.float32)
    present = lists.flatten().to_numpy(zero_copy_only=False)
    values[np.asarray(lists.is_valid())] = present.reshape(-1, num_budgets)
    return values


def whole_column(scores: ScoreTable, column: str) -> np.ndarray:
    """Every row's values of one metric, float32 [N, K]: 32 MB for a million images and 8 budgets."""
    budgets = budgets_of(scores)
    return np.concatenate([values_of(table, column, len(budgets)) for _, table in score_files(scores, [column])])
