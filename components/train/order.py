"""The order in which a streamed training sees its images: it follows from seed, step and number of workers alone.

An epoch is the files of the ImageSet in a new order, one after the other. It is cut into windows of some steps, a
window into one part a worker, and a part's images are shuffled. Ray Data reads and decodes the parts, one task and one
block each, and deals them out in turn. So a training that goes on from a step reads what an unbroken one would have.

Legend: B images a step over all workers, b = B / workers, N images in the train split.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from components.store import filesystem
from components.train.data import Decode

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

WINDOW_BYTES = 96 << 20  # of decoded pixels in a part
BLOCK_BYTES = 1 << 30  # Ray Data cuts larger blocks, and a part must stay whole


@dataclass(frozen=True)
class Part:
    """Images ``start`` up to ``stop`` of an epoch, shuffled by ``seed``."""

    epoch: int
    start: int
    stop: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class EpochOrder:
    """The plan of a training on ``world`` workers; raises ValueError where the batch can't be shared evenly."""

    table_uri: str
    counts: Mapping[str, int]  # file -> images to train on in it
    decode: Decode
    batch: int
    image_bytes: int  # of one decoded image
    seed: int
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.world:
            raise ValueError(
                f"batch_size = {self.batch}: streamed images are dealt out evenly, so a multiple of the number of "
                f"workers, {self.world}, is needed; or let each worker keep the images (training.cache_mb)"
            )

    @property
    def steps_per_epoch(self) -> int:
        """N // B: the incomplete last batch is dropped."""
        return sum(self.counts.values()) // self.batch

    @property
    def steps_per_window(self) -> int:
        """As many as fit a part into WINDOW_BYTES."""
        return max(1, WINDOW_BYTES // (self.batch // self.world * self.image_bytes))

    def on(self, world: int) -> "EpochOrder":
        """The same on another number of workers."""
        return replace(self, world=world)

    def skip(self, step: int) -> int:
        """How many steps of its window were done before ``step``."""
        return step % self.steps_per_epoch % self.steps_per_window

    def parts(self, epoch: int, first_step: int = 0) -> Iterator[Part]:
        """The parts of ``epoch`` from the window of its step ``first_step`` on, the workers in turn."""
        share, length = self.batch // self.world, self.steps_per_window
        for step in range(first_step // length * length, self.steps_per_epoch, length):
            rows = min(length, self.steps_per_epoch - step) * share
            for rank in range(self.world):
                start = step * self.batch + rank * rows
                yield Part(epoch, start, start + rows, (self.seed, epoch, start))

    def rows(self, part: Part) -> Iterator[tuple[str, int, int]]:
        """(file, first, last + 1) of the train images that make up ``part``."""
        names = sorted(self.counts)
        order = np.random.default_rng((self.seed, part.epoch)).permutation(len(names))
        at = 0
        for name in (names[index] for index in order):
            first, last = max(part.start - at, 0), min(part.stop - at, self.counts[name])
            if first < last:
                yield name, first, last
            at += self.counts[name]

    def read(self, part: Part) -> pa.Table:
        """The part's rows as the ImageSet stores them."""
        store, folder = filesystem(self.table_uri)
        tables = []
        for name, first, last in self.rows(part):
            table = pq.read_table(f"{folder}/{name}", filesystem=store, columns=self.decode.columns)
            tables.append(self.decode.rows(table, "train")[first:last])
        whole = pa.concat_tables(tables)
        return whole.take(np.random.default_rng(part.seed).permutation(len(whole)))


class Epochs(Datasource):
    """An epoch an execution, beginning at ``first_step`` of the training."""

    def __init__(self, order: EpochOrder, first_step: int) -> None:
        super().__init__()
        self.order = order
        self.first_epoch, self.first_step = divmod(first_step, order.steps_per_epoch)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: PNG packs as it likes."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a part, whatever ``parallelism`` Ray Data has in mind."""
        executions = data_context._execution_idx if data_context is not None else 0  # as Ray's own file shuffle does
        first = self.first_step if executions == 0 else 0
        return [
            ReadTask(_reader(self.order, part), BlockMetadata(part.stop - part.start, None, None, None))
            for part in self.order.parts(self.first_epoch + executions, first)
        ]


def _reader(order: EpochOrder, part: Part) -> Callable[[], list[pa.Table]]:
    return lambda: [order.read(part)]


def streamed(order: EpochOrder, first_step: int, tasks: int) -> "ray.data.Dataset":
    """The decoded images of the parts in turn, lazily, ``tasks`` parts at once.

    The tasks ask for no CPU: workers that hold all of them would never see an image.
    """
    import ray.data

    limits: Any = {"num_cpus": 0, "concurrency": tasks}
    # More blocks than one would cut parts in pieces.
    rows = ray.data.read_datasource(Epochs(order, first_step), override_num_blocks=1, **limits)
    return rows.map_batches(order.decode, batch_format="pyarrow", batch_size=None, **limits)


class InOrder(DataConfig):
    """Hands each worker its parts in their order, on however many workers there are, from the newest checkpoint on."""

    def __init__(self, order: EpochOrder, first_step: Callable[[], int], tasks: int) -> None:
        super().__init__()
        self._order, self._first_step, self._tasks = order, first_step, tasks

    def configure(
        self,
        datasets: "dict[str, ray.data.Dataset]",
        world_size: int,
        worker_handles: "list[ActorHandle] | None",
        worker_node_ids: list[str] | None,
        **_: Any,
    ) -> "list[dict[str, ray.data.DataIterator]]":
        """Called by Ray Train whenever a group of workers starts."""
        output: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name in datasets:
            images = streamed(self._order.on(world_size), self._first_step(), self._tasks)
            options = self._resolve_execution_options(name)
            options.preserve_order = True
            images.context.execution_options = options
            images.context.target_max_block_size = BLOCK_BYTES
            for rank, split in enumerate(images.streaming_split(world_size, equal=True)):
                output[rank][name] = split
        return output
