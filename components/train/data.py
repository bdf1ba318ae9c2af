"""Training batches from an ImageSet: kept in each worker's memory, or streamed from Ray Data.

Legend: B images a step over all workers, b = this worker's share of them, N images in the train split.
"""

import heapq
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from components.artifacts import GridSet, ImageSet
from components.images import Share, stack
from components.parts import part_names
from components.store import filesystem
from components.targets import BYTES_A_PIXEL, decode_targets

if TYPE_CHECKING:
    import ray.data

SHARD = "train"


@dataclass(frozen=True)
class Batch:
    """A worker's images of one step, uint8 [b, 3, H, W], and what their source says of them, by column."""

    images: Tensor
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> "Batch":
        """The same there."""
        return Batch(self.images.to(device), {name: t.to(device) for name, t in self.targets.items()})


class Batches(Protocol):
    """Where a worker's images come from."""

    def at(self, step: int) -> Batch:
        """This worker's share of ``step``."""
        ...


@dataclass(frozen=True)
class Decode:
    """Rows of an ImageSet as arrays: image_id, image (uint8 [3, H, W]) and target columns.

    A label becomes its number among ``classes`` (-1: another); see components.targets for depth and mask. Images
    that lack one of the targets are left out. ``grids``: of a GridSet, its grids too, float32 [E * h * w].
    """

    targets: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    grids: bool = False

    @property
    def columns(self) -> list[str]:
        """What is read of the table."""
        return ["image_id", "split", "image", *self.targets, *([GridSet.column] if self.grids else [])]

    def image_bytes(self, size: int, grid_bytes: int) -> int:
        """Of one image of ``size`` px a side, its targets and its grid of ``grid_bytes``."""
        return (3 + sum(BYTES_A_PIXEL[name] for name in self.targets)) * size**2 + grid_bytes

    def rows(self, table: pa.Table, split: str) -> pa.Table:
        """Those of ``split`` that have every target."""
        wanted = pc.equal(table["split"], split)
        for name in self.targets:
            wanted = pc.and_(wanted, pc.is_valid(table[name]))
        return table.filter(wanted)

    def __call__(self, table: Any) -> dict[str, Any]:
        """For Ray Data."""
        found = decode_targets(table, self.targets)
        if "label" in found:
            numbers = {name: number for number, name in enumerate(self.classes)}
            found["label"] = np.array([numbers.get(name, -1) for name in found["label"]], dtype=np.int64)
        if self.grids:
            found[GridSet.column] = _grids(table[GridSet.column].combine_chunks())
        return {"image_id": np.asarray(table["image_id"]), "image": stack(table["image"].to_pylist()), **found}


def _grids(column: pa.FixedSizeListArray) -> np.ndarray:
    """float32 [N, E * h * w]."""
    flat: np.ndarray = column.flatten().to_numpy()
    return flat.reshape(len(column), -1)


def count_train(images: ImageSet, decode: Decode) -> dict[str, int]:
    """How many images each file of the table has to train on; only the columns that say so are read."""
    tables = _tables(images, ["split", *decode.targets])
    return {name: len(decode.rows(table, "train")) for name, table in tables}


def label_names(images: ImageSet) -> tuple[str, ...]:
    """The different labels of the train split, sorted."""
    names: set[str] = set()
    for _, table in _tables(images, ["split", "label"]):
        names |= set(table.filter(pc.equal(table["split"], "train"))["label"].drop_null().to_pylist())
    return tuple(sorted(names))


def read_train(images: ImageSet, decode: Decode, threads: int) -> dict[str, np.ndarray]:
    """The train split whole, by image_id, ``threads`` files of the table at once; what is read lies in memory once."""
    ids: dict[str, list[str]] = {}
    for name, table in _tables(images, ["image_id", "split", *decode.targets]):
        ids[name] = decode.rows(table, "train")["image_id"].to_pylist()
    order = np.argsort(np.concatenate(list(ids.values())))
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    ends = np.cumsum([len(of_file) for of_file in ids.values()])
    rows = {name: places[end - len(ids[name]) : end] for name, end in zip(ids, ends, strict=True) if ids[name]}
    store, folder = filesystem(images.table_uri)

    def read(name: str) -> dict[str, np.ndarray]:
        table = pq.read_table(f"{folder}/{name}", filesystem=store, columns=decode.columns)
        return decode(decode.rows(table, "train"))

    def put(name: str, part: Mapping[str, np.ndarray]) -> None:
        for column, values in part.items():
            whole[column][rows[name]] = values

    first, *others = rows
    part = read(first)
    whole = {column: np.empty((len(places), *values.shape[1:]), values.dtype) for column, values in part.items()}
    put(first, part)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda name: put(name, read(name)), others))
    return whole


def held_out(images: ImageSet, limit: int, decode: Decode, share: Share | None = None) -> Batch:
    """At most ``limit`` images of the val split, those with the smallest ids; of these the ``share`` of one worker.

    Without grids: what is measured of a model is measured of all of it.
    """
    decode = replace(decode, grids=False)
    found = heapq.nsmallest(limit, _val_rows(images, decode))
    share = share or Share(0, 1, 1)
    wanted = found[len(found) * share.start // share.of : len(found) * share.stop // share.of]
    if not wanted:
        return Batch(torch.empty(0, dtype=torch.uint8))
    store, folder = filesystem(images.table_uri)
    parts = []
    for name in sorted({name for _, name, _ in wanted}):
        table = pq.read_table(f"{folder}/{name}", filesystem=store, columns=decode.columns)
        parts.append(table.take([row for _, file, row in wanted if file == name]))
    return _batch(decode(pa.concat_tables(parts).sort_by("image_id")))


def _val_rows(images: ImageSet, decode: Decode) -> Iterator[tuple[str, str, int]]:
    """Id, file and place in it of each image of the val split that has the targets."""
    for name, table in _tables(images, ["image_id", "split", *decode.targets]):
        numbered = table.append_column("row", pa.array(np.arange(len(table))))
        kept = decode.rows(numbered, "val")
        yield from zip(kept["image_id"].to_pylist(), [name] * len(kept), kept["row"].to_pylist(), strict=True)


def _tables(images: ImageSet, columns: list[str]) -> Iterator[tuple[str, Any]]:
    store, folder = filesystem(images.table_uri)
    for name in part_names(images.table_uri):
        yield name, pq.read_table(f"{folder}/{name}", filesystem=store, columns=columns)


def _batch(block: Mapping[str, np.ndarray]) -> Batch:
    columns = {name: torch.from_numpy(values) for name, values in block.items() if name != "image_id"}
    return Batch(columns.pop("image"), columns)


class CachedBatches:
    """A train split in memory, from :func:`read_train`; every batch follows from the seed and the step alone.

    So a run that is broken off and gone on with sees the same batches, and so does one on another number of workers.
    """

    def __init__(self, split: Mapping[str, np.ndarray], *, share: Share, seed: int) -> None:
        self._whole = _batch(split)
        self._number, self._share, self._seed = len(split["image_id"]), share, seed

    def at(self, step: int) -> Batch:
        """This worker's share of batch ``step``; each epoch is a new permutation, its incomplete last batch dropped."""
        epoch, index = divmod(step, self._number // self._share.of)
        order = torch.randperm(self._number, generator=torch.Generator().manual_seed(self._seed + epoch))
        rows = order[index * self._share.of :][self._share.start : self._share.stop]
        return Batch(self._whole.images[rows], {name: t[rows] for name, t in self._whole.targets.items()})


class StreamedBatches:
    """A train split of any size, streamed in the order of components.train.order, from the first step asked for on.

    ``skip``: steps of the first window that were done before it.
    """

    def __init__(self, shard: "ray.data.DataIterator", *, share: Share, skip: int) -> None:
        self._shard, self._size, self._skip = shard, len(share), skip
        self._stream: Iterator[dict[str, Any]] = iter(())
        self._last: tuple[int, Batch] | None = None

    def at(self, step: int) -> Batch:
        """The images of ``step``: the same again as often as they are asked for, else the next ones."""
        if self._last is None or self._last[0] != step:
            self._last = step, _batch(self._next())
        return self._last[1]

    def _next(self) -> dict[str, Any]:
        """From the stream; one execution of the dataset is one epoch."""
        for block in self._stream:
            return block
        self._stream = iter(
            self._shard.iter_batches(batch_size=self._size, prefetch_batches=2, drop_last=True, batch_format="numpy")
        )
        for _ in range(self._skip):
            next(self._stream)
        self._skip = 0
        return self._next()
