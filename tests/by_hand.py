"""Artifacts made without Ray: real photographs, coded and scored by the starter tokenizer, as the pipeline has them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.artifacts import (
    IMAGES_SCHEMA,
    MANIFEST,
    CodeBook,
    ImageSet,
    Job,
    Manifest,
    ScoreTable,
    Tokenizer,
)
from components.config import DataConfig
from components.images import encode_png, image_id, prepare, stack, to_float
from components.sources import open_source
from model import AlitTokenizer, TokenBatch
from model.metrics import METRICS
from model.selection import LARGER_IS_BETTER
from model.starter import STARTER
from model.tokens import id_type

SIZE = 64


@dataclass(frozen=True)
class Photographs:
    """Crops of the demo's photographs with their codes and scores at every budget of the starter tokenizer."""

    rows: list[dict]  # of IMAGES_SCHEMA
    budgets: tuple[int, ...]
    codes: np.ndarray  # [N, sum of budgets]
    scores: dict[str, np.ndarray]  # metric -> float32 [N, K]


@lru_cache(maxsize=4)
def photographs(crops: int) -> Photographs:
    """``crops`` of them; measured once a process."""
    source = open_source(DataConfig(source="demo", image_size=SIZE, crops=crops))
    rows = []
    for item in source.list():
        data = source.read(item.path)
        made = prepare(data, size=SIZE, max_pixels=10**8)
        rows.append(
            {
                "image_id": image_id(item.path, data),
                "uri": source.uri(item.path),
                "label": item.targets.label,
                "width": made.width,
                "height": made.height,
                "split": item.targets.split or "train",
                "image": encode_png(made.image),
            }
        )
    tokenizer = AlitTokenizer.load(STARTER)
    images = to_float(torch.from_numpy(stack([row["image"] for row in rows])))
    codes, scores = [], {name: [] for name in METRICS}
    with torch.inference_mode():
        for step in tokenizer.rollout(images):
            codes.append(step.codes.numpy().astype(id_type(tokenizer.config.codebook_size)))
            restored = tokenizer.decode(TokenBatch.from_numpy(list(codes[-1]), tokenizer.config.codebook_size))
            for name, values in scores.items():
                values.append(METRICS[name](images, restored).numpy())
    table = {name: np.stack(values, axis=1) for name, values in scores.items()}
    return Photographs(rows, tokenizer.budgets, np.concatenate(codes, axis=1), table)


def job(folder: Path) -> Job:
    """A job that writes into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f"{folder.name}-scratch"
    return Job(stage="test", key="0", workspace="", output=str(folder), scratch=str(scratch))


def finish(
    folder: Path, kind: type, *, stage: str = "test", config: Mapping | None = None, counts: Mapping | None = None
) -> None:
    """Write ``artifact.json``."""
    manifest = Manifest(kind.schema, kind.version, stage, folder.name, {}, dict(config or {}), dict(counts or {}))
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))


def write_files(folder: Path, table: pa.Table, rows_per_file: int) -> None:
    """``table`` in files of so many rows."""
    (folder / "table").mkdir(parents=True)
    for number, start in enumerate(range(0, len(table), rows_per_file)):
        pq.write_table(table.slice(start, rows_per_file), folder / "table" / f"part-{number:06d}.parquet")


def image_set(folder: Path, made: Photographs, rows_per_file: int = 20) -> ImageSet:
    """The photographs as an ImageSet."""
    write_files(folder, pa.Table.from_pylist(made.rows, schema=IMAGES_SCHEMA), rows_per_file)
    finish(folder, ImageSet)
    return ImageSet.open(str(folder))


def code_book(folder: Path, made: Photographs, rows_per_file: int = 20) -> CodeBook:
    """Their codes as a CodeBook."""
    codes = pa.array(list(made.codes), pa.list_(pa.from_numpy_dtype(made.codes.dtype)))
    ids = [row["image_id"] for row in made.rows]
    write_files(folder, pa.table({"image_id": ids, "codes": codes}), rows_per_file)
    (folder / "budgets.json").write_text(json.dumps(list(made.budgets)))
    finish(folder, CodeBook)
    return CodeBook.open(str(folder))


def tokenizer_artifact() -> Tokenizer:
    """The starter, as a stage gets a tokenizer."""
    return Tokenizer(uri=str(STARTER), key="starter")


def of_photographs(folder: Path, made: Photographs, rows_per_file: int = 20) -> ScoreTable:
    """Their pixel scores as a ScoreTable."""
    ids, split = zip(*[(row["image_id"], row["split"]) for row in made.rows], strict=True)
    return score_table(folder, made.scores, made.budgets, ids=ids, split=split, rows_per_file=rows_per_file)


def score_table(
    folder: Path,
    columns: Mapping[str, np.ndarray],
    budgets: Sequence[int],
    *,
    ids: Sequence[str] | None = None,
    split: Sequence[str] | None = None,
    rows_per_file: int = 20,
    directions: Mapping[str, str] | None = None,
) -> ScoreTable:
    """A ScoreTable of ``columns`` (float [N, K]; a row of NaN is a null)."""
    number = len(next(iter(columns.values())))
    ids = ids or [f"{row:06d}" for row in range(number)]
    lists = {name: score_lists(values) for name, values in columns.items()}
    split = list(split or ["val"] * number)
    table = pa.table({"image_id": list(ids), "split": split, **lists})
    write_files(folder, table, rows_per_file)
    (folder / "budgets.json").write_text(json.dumps([int(budget) for budget in budgets]))
    ways = {name: "higher" if name in LARGER_IS_BETTER else "lower" for name in columns} | dict(directions or {})
    told = {name: {"task": name.rpartition(".")[0], "direction": way, "missing": 0} for name, way in ways.items()}
    (folder / "metrics.json").write_text(json.dumps(told))
    finish(folder, ScoreTable, counts={"split": "val" if "val" in split else "train"})
    return ScoreTable.open(str(folder))


def score_lists(values: np.ndarray) -> pa.ListArray:
    """list<float32>; a row of NaN is null."""
    values = np.asarray(values, dtype=np.float32)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    missing = np.isnan(values).all(axis=1)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values.reshape(-1)), mask=pa.array(missing) if missing.any() else None
    )
