"""Training batches from Ray Data shards of an ImageSet.

Legend: B images a step over all workers, b = B / workers, N images in the train split.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from components.artifacts import ImageSet, filesystem, read_batches
from components.images import stack

if TYPE_CHECKING:
    import ray.data

SHARD = "train"


class Batches(Protocol):
    """Where a worker's images come from."""

    def at(self, step: int) -> Tensor:
        """This worker's images of ``step``, uint8 [b, 3, H, W]."""
        ...


def train_dataset(images: ImageSet) -> "ray.data.Dataset":
    """The train split as a lazy Ray dataset: image_id, image (uint8 [3, H, W])."""
    import ray.data

    store, path = filesystem(images.table_uri)
    rows = ray.data.read_parquet(path, filesystem=store, columns=["image_id", "split", "image"])
    return rows.filter(expr="split == 'train'").map_batches(_decode, batch_format="pyarrow")


def _decode(table: Any) -> dict[str, Any]:
    return {"image_id": np.asarray(table["image_id"]), "image": stack(table["image"].to_pylist())}


def held_out(images: ImageSet, limit: int) -> Tensor:
    """At most ``limit`` images of the val split, uint8 [n, 3, H, W], those with the smallest ids."""
    kept: dict[str, bytes] = {}
    for batch in read_batches(images.table_uri, columns=["image_id", "split", "image"], batch_rows=1024):
        kept |= {row["image_id"]: row["image"] for row in batch.to_pylist() if row["split"] == "val"}
        kept = {name: kept[name] for name in sorted(kept)[:limit]}
    return torch.from_numpy(stack(list(kept.values()))) if kept else torch.empty(0, dtype=torch.uint8)


class CachedBatches:
    """A train split that fits in memory, read once; every batch follows from the seed and the step alone.

    So a run that is broken off and gone on with sees the same batches, and so does one on another number of workers.
    """

    def __init__(self, shard: "ray.data.DataIterator", *, batch: int, rank: int, world: int, seed: int) -> None:
        ids, images = [], []
        for block in shard.iter_batches(batch_size=512, prefetch_batches=1):
            ids.append(block["image_id"])
            images.append(block["image"])
        order = np.argsort(np.concatenate(ids).astype(str))
        self._images = torch.from_numpy(np.concatenate(images)[order])
        self._batch, self._rank, self._share, self._seed = batch, rank, batch // world, seed

    def at(self, step: int) -> Tensor:
        """This worker's share of batch ``step``; each epoch is a new permutation, its incomplete last batch dropped."""
        epoch, index = divmod(step, len(self._images) // self._batch)
        order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(self._seed + epoch))
        start = index * self._batch + self._rank * self._share
        return self._images[order[start : start + self._share]]


class StreamedBatches:
    """A train split of any size, streamed and shuffled within a buffer; a resumed run begins at a fresh epoch."""

    def __init__(self, shard: "ray.data.DataIterator", *, batch: int, world: int, seed: int, first_step: int) -> None:
        self._shard, self._share, self._seed, self._epoch = shard, batch // world, seed, first_step
        self._stream: Iterator[dict[str, Any]] = iter(())

    def at(self, step: int) -> Tensor:
        """The next images; ``step`` only orders the epochs."""
        for block in self._stream:
            return torch.from_numpy(block["image"])
        self._stream = iter(
            self._shard.iter_batches(
                batch_size=self._share,
                prefetch_batches=2,
                local_shuffle_buffer_size=self._share * 16,
                local_shuffle_seed=self._seed + self._epoch,
                drop_last=True,
            )
        )
        self._epoch += 1
        return self.at(step)
