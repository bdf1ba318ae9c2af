"""Training batches from Ray Data shards of an ImageSet.

Legend: B images a step over all workers, b = this worker's share of them, N images in the train split.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from components.artifacts import ImageSet, filesystem
from components.images import Share, stack
from components.mapping import part_names
from components.targets import decode_targets

if TYPE_CHECKING:
    import ray.data

SHARD = "train"


@dataclass(frozen=True)
class Batch:
    """A worker's images of one step, uint8 [b, 3, H, W], and what their source says of them, by column."""

    images: Tensor
    targets: Mapping[str, Tensor] = field(default_factory=dict)


class Batches(Protocol):
    """Where a worker's images come from."""

    def at(self, step: int) -> Batch:
        """This worker's share of ``step``."""
        ...


@dataclass(frozen=True)
class Targets:
    """The target columns that a training learns from: images without them are left out.

    ``labels``: the classes of the label column in order, whose numbers come instead.
    """

    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def train_rows(self, table: Any) -> Any:
        """Which rows of an ImageSet's table are trained on."""
        wanted = pc.equal(table["split"], "train")
        for name in self.columns:
            wanted = pc.and_(wanted, pc.is_valid(table[name]))
        return wanted


NO_TARGETS = Targets()


def count_train(images: ImageSet, targets: Targets = NO_TARGETS) -> dict[str, int]:
    """How many images each file of the table has to train on; only the columns that say so are read."""
    counts = {}
    for name, table in _tables(images, ["split", *targets.columns]):
        counts[name] = int(pc.sum(targets.train_rows(table)).as_py() or 0)
    return counts


def labels_of(images: ImageSet) -> tuple[str, ...]:
    """The labels of the train split, sorted."""
    found: set[str] = set()
    for _, table in _tables(images, ["split", "label"]):
        found |= set(pc.unique(table["label"].filter(pc.equal(table["split"], "train"))).to_pylist())
    return tuple(sorted(label for label in found if label is not None))


def train_dataset(images: ImageSet, targets: Targets) -> "ray.data.Dataset":
    """The train split as a lazy Ray dataset: image_id, image (uint8 [3, H, W]) and the ``targets``."""
    import ray.data
    from ray.data.expressions import col

    store, path = filesystem(images.table_uri)
    rows = ray.data.read_parquet(path, filesystem=store, columns=["image_id", "split", "image", *targets.columns])
    wanted = col("split") == "train"
    for name in targets.columns:
        wanted &= col(name).is_not_null()
    return rows.filter(expr=wanted).map_batches(decode, fn_args=(targets,), batch_format="pyarrow")


def decode(table: Any, targets: Targets = NO_TARGETS) -> dict[str, Any]:
    """Rows of an ImageSet as arrays; label as the number of its class, -1 for one that is none."""
    columns = {"image_id": np.asarray(table["image_id"]), "image": stack(table["image"].to_pylist())}
    columns |= decode_targets(table, targets.columns)
    if "label" in columns:
        numbers = {label: number for number, label in enumerate(targets.labels)}
        columns["label"] = np.array([numbers.get(label, -1) for label in columns["label"]], dtype=np.int64)
    return columns


def held_out(images: ImageSet, limit: int, share: Share | None = None) -> Batch:
    """At most ``limit`` images of the val split, those with the smallest ids; of these the ``share`` of one worker."""
    found = heapq.nsmallest(limit, _val_rows(images))
    share = share or Share(0, 1, 1)
    wanted = found[len(found) * share.start // share.of : len(found) * share.stop // share.of]
    kept: dict[str, bytes] = {}
    for name in sorted({name for _, name, _ in wanted}):
        store, folder = filesystem(images.table_uri)
        table = pq.read_table(f"{folder}/{name}", filesystem=store, columns=["image_id", "image"])
        rows = table.take([row for _, file, row in wanted if file == name])
        kept |= dict(zip(rows["image_id"].to_pylist(), rows["image"].to_pylist(), strict=True))
    pixels = stack([kept[image_id] for image_id, _, _ in wanted]) if wanted else np.empty(0, np.uint8)
    return Batch(torch.from_numpy(pixels))


def _val_rows(images: ImageSet) -> Iterator[tuple[str, str, int]]:
    for name, table in _tables(images, ["image_id", "split"]):
        rows = np.flatnonzero(np.asarray(table["split"]) == "val")
        yield from ((table["image_id"][int(row)].as_py(), name, int(row)) for row in rows)


def _tables(images: ImageSet, columns: list[str]) -> Iterator[tuple[str, Any]]:
    store, folder = filesystem(images.table_uri)
    for name in part_names(images.table_uri):
        yield name, pq.read_table(f"{folder}/{name}", filesystem=store, columns=columns)


class CachedBatches:
    """A train split that fits in memory, read once; every batch follows from the seed and the step alone.

    So a run that is broken off and gone on with sees the same batches, and so does one on another number of workers.
    """

    def __init__(self, shard: "ray.data.DataIterator", *, share: Share, seed: int) -> None:
        blocks = list(shard.iter_batches(batch_size=512, prefetch_batches=1))
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        order = np.argsort(columns.pop("image_id").astype(str))
        self._columns = {name: torch.from_numpy(values[order]) for name, values in columns.items()}
        self._number, self._share, self._seed = len(order), share, seed

    def at(self, step: int) -> Batch:
        """This worker's share of batch ``step``; each epoch is a new permutation, its incomplete last batch dropped."""
        epoch, index = divmod(step, self._number // self._share.of)
        order = torch.randperm(self._number, generator=torch.Generator().manual_seed(self._seed + epoch))
        rows = order[index * self._share.of :][self._share.start : self._share.stop]
        chosen = {name: values[rows] for name, values in self._columns.items()}
        return Batch(chosen.pop("image"), chosen)


class StreamedBatches:
    """A train split of any size, streamed in the order of components.train.order, from ``first_step`` on."""

    def __init__(self, shard: "ray.data.DataIterator", *, share: Share, skip: int) -> None:
        self._shard, self._size, self._skip = shard, len(share), skip
        self._stream: Iterator[dict[str, Any]] = iter(())

    def at(self, step: int) -> Batch:
        """The next images; one execution of the dataset is one epoch."""
        for block in self._stream:
            columns = {name: torch.from_numpy(values) for name, values in block.items() if name != "image_id"}
            return Batch(columns.pop("image"), columns)
        self._stream = iter(
            self._shard.iter_batches(batch_size=self._size, prefetch_batches=2, drop_last=True, batch_format="numpy")
        )
        for _ in range(self._skip):
            next(self._stream)
        self._skip = 0
        return self.at(step)
