"""Which images whole-set quality looks at, their codes, and how often each code is used.

Legend: N images, K budgets, L tokens of a budget, D numbers in a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.artifacts import CodeBook, ImageSet
from components.config import QualityConfig
from components.parts import part_names
from components.store import filesystem


@dataclass
class Sample:
    """Images by id, which is a hash, so that the first of them are a random choice."""

    split: str  # that the images are of: val, or train where none is held out
    images: dict[str, str | None] = field(default_factory=dict)  # id -> label
    probe: dict[str, str | None] = field(default_factory=dict)  # labelled ones of the train split


def draw(images: ImageSet, config: QualityConfig) -> Sample:
    """The sample that ``config`` asks for; no probe images where none is held out, since none could test them."""
    kept: dict[str, dict[str, str | None]] = {"val": {}, "train": {}}
    labelled: dict[str, str | None] = {}
    for _, table in _files(images.table_uri, ["image_id", "split", "label"]):
        for split, found in kept.items():
            rows = table.filter(pc.equal(table["split"], split))
            kept[split] = _first(found | _labels(rows), config.images)
        rows = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.is_valid(table["label"])))
        labelled = _first(labelled | _labels(rows), config.probe_images)
    if kept["val"]:
        return Sample("val", kept["val"], labelled)
    return Sample("train", kept["train"])


def _labels(rows: pa.Table) -> dict[str, str | None]:
    return dict(zip(rows["image_id"].to_pylist(), rows["label"].to_pylist(), strict=True))


def _first(rows: dict[str, str | None], number: int) -> dict[str, str | None]:
    return {name: rows[name] for name in sorted(rows)[:number]}


def _files(uri: str, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    store, folder = filesystem(uri)
    for name in part_names(uri):
        yield name, pq.read_table(f"{folder}/{name}", filesystem=store, columns=list(columns))


@dataclass(frozen=True)
class Codes:
    """Codes of the sampled images, and the uses of every code over the whole split."""

    rows: Mapping[str, np.ndarray]  # id -> codes at all budgets, flat
    budgets: Sequence[int]
    uses: np.ndarray  # int64 [K, codebook]; [K, 0] of a continuous tokenizer
    images: int  # of the split

    def at(self, names: Sequence[str], column: int) -> np.ndarray:
        """Codes [N, L] of the images ``names`` at a budget; of a continuous tokenizer flat latents [N, L * D]."""
        rows = np.stack([self.rows[name] for name in names])
        width = rows.shape[1] // sum(self.budgets)
        start = sum(self.budgets[:column]) * width
        return rows[:, start : start + self.budgets[column] * width]

    def use(self, column: int) -> dict[str, float]:
        """Share of the codebook used at a budget, and how many evenly used codes would be as varied."""
        counts = self.uses[column]
        if not counts.any():
            return {}
        share = counts[counts > 0] / counts.sum()
        return {"usage": float((counts > 0).mean()), "perplexity": float(np.exp(-(share * np.log(share)).sum()))}


def read_codes(images: ImageSet, codes: CodeBook, sample: Sample, budgets: Sequence[int], size: int | None) -> Codes:
    """One pass over the codes; ``size``: of the codebook, None when continuous."""
    wanted = pa.array([*sample.images, *sample.probe])
    rows: dict[str, np.ndarray] = {}
    uses, number = np.zeros((len(budgets), size or 0), dtype=np.int64), 0
    sources = zip(_files(images.table_uri, ["split"]), _files(codes.table_uri, ["image_id", "codes"]), strict=True)
    for (_, splits), (_, table) in sources:
        chosen = table.filter(pc.is_in(table["image_id"], value_set=wanted))
        rows |= dict(zip(chosen["image_id"].to_pylist(), _flat(chosen), strict=True))
        of_split = table.filter(pc.equal(splits["split"], sample.split))
        number += len(of_split)
        if size and len(of_split):
            parts = np.split(_flat(of_split), np.cumsum(budgets)[:-1], axis=1)
            uses += np.stack([np.bincount(part.reshape(-1), minlength=size) for part in parts])
    return Codes(rows, budgets, uses, number)


def _flat(table: pa.Table) -> np.ndarray:
    lists = table["codes"].combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), -1) if len(lists) else np.zeros((0, 0), dtype=np.uint8)
