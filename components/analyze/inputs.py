"""What the sections read: a bounded sample of images, and what the pipeline knows of each of them.

Legend: N images, K budgets.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.analyze.estimates import Bootstrap
from components.analyze.settings import AnalyzeConfig, Criterion
from components.artifacts import CodeBook, ImageSet, LengthModel, ScoreTable, TokenCounts, Tokenizer
from components.mapping import load_tokenizer
from components.scores import budgets_of, larger_is_better, precision_of, score_files, values_of
from components.store import read_batches

if TYPE_CHECKING:
    from model import AlitTokenizer

ROWS = 1024  # read at once


@dataclass(frozen=True)
class Inputs:
    """Small and picklable: every section is made from it alone, in a process of its own."""

    settings: AnalyzeConfig
    criteria: tuple[Criterion, ...]
    images: ImageSet
    tokenizer: Tokenizer
    codes: CodeBook
    scores: ScoreTable
    counts: Mapping[str, TokenCounts]  # by task
    lengths: Mapping[str, LengthModel]  # by task, of those that have a predicted rule
    batch_size: int = 32

    @property
    def bootstrap(self) -> Bootstrap:
        """How intervals are made."""
        return Bootstrap(self.settings.resamples, self.settings.seed)

    @property
    def budgets(self) -> list[int]:
        """Token counts, increasing."""
        return budgets_of(self.scores)

    def load_tokenizer(self) -> "AlitTokenizer":
        """At the precision of the scores, so that what it measures can be held against them."""
        return load_tokenizer(self.tokenizer.uri, precision_of(self.scores))

    def sample(self, number: int, *, having: str | None = None, split: str = "val") -> list[str]:
        """Ids of at most ``number`` images of ``split``, in order; ``having``: only those with such a target.

        Ids are hashes, so that the first of them are a random choice. Where nothing is held out "val" is everything.
        """
        kept = self._first(number, having, split)
        return kept or (self._first(number, having, None) if split == "val" and not self._held_out else kept)

    @property
    def _held_out(self) -> bool:
        return any(pc.any(pc.equal(batch["split"], "val")).as_py() for batch in self._batches(["split"]))

    def _first(self, number: int, having: str | None, split: str | None) -> list[str]:
        kept: list[str] = []
        for batch in self._batches(["image_id", "split", *([having] if having else [])]):
            rows = batch if split is None else batch.filter(pc.equal(batch["split"], split))
            rows = rows.filter(pc.is_valid(rows[having])) if having else rows
            kept = sorted([*kept, *rows["image_id"].to_pylist()])[:number]
        return kept

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        return read_batches(self.images.table_uri, columns=columns, batch_rows=ROWS)

    def column(self, names: Sequence[str], column: str) -> list:
        """A column of the ImageSet for these images, in their order."""
        return _picked(self._batches(["image_id", column]), names, column)

    def counts_of(self, task: str, names: Sequence[str]) -> np.ndarray:
        """Tokens that the task's own rule chose, int64 [N]."""
        batches = read_batches(self.counts[task].table_uri, columns=["image_id", "num_tokens"])
        return np.array(_picked(batches, names, "num_tokens"), dtype=np.int64)

    def losses_of(self, names: Sequence[str], column: str) -> np.ndarray:
        """A metric at each budget as a loss (lower is better), float64 [N, K]; NaN where it is missing."""
        sign = -1 if larger_is_better(self.scores)[column] else 1
        return sign * self.values_of(names, column)

    def values_of(self, names: Sequence[str], column: str) -> np.ndarray:
        """A metric at each budget as it was measured, float64 [N, K]; NaN where it is missing."""
        found: dict[str, np.ndarray] = {}
        wanted, width = pa.array(names, pa.string()), len(self.budgets)
        for _, table in score_files(self.scores, ["image_id", column]):
            rows = table.filter(pc.is_in(table["image_id"], value_set=wanted))
            found |= dict(zip(rows["image_id"].to_pylist(), values_of(rows, column, width), strict=True))
        return np.array([found[name] for name in names], dtype=np.float64).reshape(len(names), width)


def _picked(batches: Iterable[pa.RecordBatch], names: Sequence[str], column: str) -> list:
    wanted, found = pa.array(names, pa.string()), {}
    for batch in batches:
        rows = batch.filter(pc.is_in(batch["image_id"], value_set=wanted))
        found |= dict(zip(rows["image_id"].to_pylist(), rows[column].to_pylist(), strict=True))
    return [found[name] for name in names]
