"""Reading a TokenArchive into PyTorch: batches of images with equally many tokens. Needs torch, pyarrow and numpy.

Legend: B batch, L tokens, D numbers in a continuous token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from components.parts import part_names
from components.store import filesystem, join, read_json


class Batch(NamedTuple):
    """``image_ids``: B names; ``tokens``: int64 [B, L], or float32 [B, L, D] of a continuous tokenizer."""

    image_ids: list[str]
    tokens: Tensor


@dataclass(frozen=True)
class Shard:
    """Which of the readers this one is: rows ``index``, ``index + number``, … of the archive are its own."""

    index: int = 0
    number: int = 1


class TokenArchiveDataset(IterableDataset[Batch]):
    """Batches of equal length, so that nothing is padded; for ``DataLoader(dataset, batch_size=None)``.

    Rows are dealt out evenly to the workers of the loader and to the ranks of ``torch.distributed``, where that was
    initialised before the dataset is made. Every reader goes through the whole archive, which is small, and keeps a
    file and at most ``batch_size`` images a length in memory. Ranks have equally many rows (give or take one), not
    equally many batches: lengths differ.
    """

    def __init__(self, folder: str, *, batch_size: int, seed: int | None = None, drop_last: bool = False) -> None:
        """``folder``: an archive's, local or ``s3://``; ``seed``: shuffle files and rows within them, None: as stored.

        Raises ValueError for a ``batch_size`` below 1, FileNotFoundError when there is no archive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: at least 1")
        header = read_json(join(folder, "tokenizer.json"))
        self.budgets = [int(budget) for budget in header["budgets"]]
        self.codebook_size: int | None = header["codebook_size"]
        self._width = None if self.codebook_size else int(header["latent_dim"])
        self._table = join(folder, "table")
        self._batch_size, self._seed, self._drop_last = batch_size, seed, drop_last
        self._epoch = 0
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank, self._ranks = 0, 1
        if distributed:
            self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def set_epoch(self, epoch: int) -> None:
        """Shuffle otherwise in the epochs to come; call it before the loader makes its workers."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this worker on this rank."""
        waiting: dict[int, list[tuple[str, np.ndarray]]] = {}
        for image_id, tokens in self._rows(self._shard()):
            bucket = waiting.setdefault(len(tokens), [])
            bucket.append((image_id, tokens))
            if len(bucket) == self._batch_size:
                yield self._batch(waiting.pop(len(tokens)))
        if not self._drop_last:
            yield from (self._batch(bucket) for _, bucket in sorted(waiting.items()))

    def _rows(self, shard: Shard) -> Iterator[tuple[str, np.ndarray]]:
        names = part_names(self._table)
        generator = None if self._seed is None else np.random.default_rng((self._seed, self._epoch))
        store, folder = filesystem(self._table)
        start = 0
        for at in generator.permutation(len(names)) if generator else range(len(names)):
            table = pq.read_table(f"{folder}/{names[at]}", filesystem=store)
            order = generator.permutation(len(table)) if generator else np.arange(len(table))
            mine = order[(start + np.arange(len(table))) % shard.number == shard.index]
            start += len(table)
            chosen = table.take(mine)
            lists = chosen["token_ids"].combine_chunks()
            ends = np.cumsum(np.asarray(lists.value_lengths()))
            tokens = np.split(lists.flatten().to_numpy(), ends[:-1])
            yield from zip(chosen["image_id"].to_pylist(), tokens[: len(chosen)], strict=True)

    def _batch(self, rows: list[tuple[str, np.ndarray]]) -> Batch:
        tokens = torch.from_numpy(np.stack([tokens for _, tokens in rows]).astype(self._dtype()))
        return Batch(
            [name for name, _ in rows], tokens if self._width is None else tokens.unflatten(1, (-1, self._width))
        )

    def _dtype(self) -> type[np.generic]:
        return np.int64 if self._width is None else np.float32

    def _shard(self) -> Shard:
        """This worker's place among all workers of all ranks."""
        worker = get_worker_info()
        if worker is None:
            return Shard(self._rank, self._ranks)
        return Shard(self._rank * worker.num_workers + worker.id, self._ranks * worker.num_workers)
