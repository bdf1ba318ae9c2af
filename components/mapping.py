"""From one Parquet table to another, file by file, with Ray Data.

Every file becomes the file of the same name in the target, whole and in the same row order, so nothing depends on how
many actors there are or which of them took which file; a worker that dies costs its file once more. What an earlier
table has already (components/parts.py) is linked or copied instead, so that only new images meet a model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from components.config import InferenceResources
from components.parts import THREADS, Part, Plan, completed, count_rows, link_files, part_names, read_part
from components.store import filesystem, local_folder

if TYPE_CHECKING:
    from model import AlitTokenizer
    from model.inference import Precision

Totals = dict[str, float]


class Worker(Protocol):
    """Built once an actor (models load once); called with the same rows of every source table."""

    def __call__(self, *tables: pa.Table) -> tuple[pa.Table, Totals]:
        """The target's rows, image_id first, and sums to add up over all rows, ``rows`` among them."""
        ...


@dataclass(frozen=True)
class Mapping:
    """What to map and onto what."""

    sources: Sequence[str]  # folders with the same file names and the same rows in each
    target: str
    build: Callable[[], Worker]
    resources: InferenceResources
    columns: Sequence[list[str] | None]  # read of each source


class _FileMapper:
    """The actor: maps whole files."""

    def __init__(self, mapping: Mapping, parts: Sequence[Part], names: Sequence[str]) -> None:
        self._mapping, self._parts, self._names, self._worker = mapping, parts, names, mapping.build()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        totals: Counter[str] = Counter()
        part = self._parts[row["id"]]
        taken = [one.read() for one in part.taken]
        store, folder = filesystem(self._mapping.target)
        writer: pq.ParquetWriter | None = None
        with store.open_output_stream(f"{folder}/{part.name}") as sink:
            for tables in self._batches(part.name):
                made, sums = self._worker(*tables)
                made = completed(made, taken, self._names)
                writer = writer or pq.ParquetWriter(sink, made.schema, compression="zstd")
                writer.write_table(made)
                totals.update(sums)
            if writer is not None:
                writer.close()
        return {"rows": [dict(totals)]}

    def _batches(self, name: str) -> Iterator[tuple[pa.Table, ...]]:
        """The same rows of each source, ``batch_size`` at a time."""
        streams = []
        for uri, columns in zip(self._mapping.sources, self._mapping.columns, strict=True):
            store, folder = filesystem(uri)
            file = pq.ParquetFile(store.open_input_file(f"{folder}/{name}"))
            streams.append(file.iter_batches(batch_size=self._mapping.resources.batch_size, columns=columns))
        for batches in zip(*streams, strict=True):
            yield tuple(pa.Table.from_batches([batch]) for batch in batches)


def load_tokenizer(uri: str, precision: "Precision" = "fp32") -> "AlitTokenizer":
    """The tokenizer of a Tokenizer artifact, on the GPU that Ray gave this actor, if it did; the actor is for that."""
    import torch

    from model import AlitTokenizer
    from model.memory import keep_freed_memory

    keep_freed_memory()
    with local_folder(uri) as folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AlitTokenizer.load(folder, device=device, precision=precision)


def map_table(mapping: Mapping, progress: Callable[[str], None]) -> Totals:
    """Map every file; returns the sums of the workers' totals. ``rows`` in them drives the progress line."""
    return _map_files(mapping, [Part(name) for name in part_names(mapping.sources[0])], (), progress)


def map_parts(
    plan: Plan, mapping_of: Callable[[frozenset[str]], Mapping], *, target: str, progress: Callable[[str], None]
) -> Totals:
    """Fill ``target`` as ``plan`` says; ``mapping_of``: what makes the given columns of it, of the images first.

    Returns the sums of the workers' totals, their ``rows`` as ``made``; ``rows`` are all.
    """
    total, made = 0, Counter[str]()
    for table, names in plan.linked.items():
        link_files(table, target, names)
        total += count_rows(target, names)
        progress(f"{total} images taken over")
    for new, parts in plan.groups():
        mapping = mapping_of(new)
        if new:
            made.update(_map_files(mapping, parts, plan.names, progress))
        else:
            total += _copy_files(mapping, parts, plan)
    rows = made.pop("rows", 0)
    return {**made, "made": rows, "rows": total + rows}


def _copy_files(mapping: Mapping, parts: Sequence[Part], plan: Plan) -> int:
    """Write files for which nothing is made; returns their rows."""
    store, folder = filesystem(mapping.target)
    store.create_dir(folder, recursive=True)

    def copy(part: Part) -> int:
        rows = read_part(mapping.sources[0], part.name, plan.keys)
        table = completed(rows, [one.read() for one in part.taken], plan.names)
        pq.write_table(table, f"{folder}/{part.name}", filesystem=store, compression="zstd")
        return len(table)

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(copy, parts))


def _map_files(
    mapping: Mapping, parts: Sequence[Part], names: Sequence[str], progress: Callable[[str], None]
) -> Totals:
    import ray.data

    store, folder = filesystem(mapping.target)
    store.create_dir(folder, recursive=True)
    resources, pool = mapping.resources, mapping.resources.actor_range
    least = 1 if isinstance(resources.actors, int) else pool.min  # a fixed number works on when a node is lost
    files = ray.data.range(len(parts), override_num_blocks=len(parts))
    mapped = files.map(
        _FileMapper,
        fn_constructor_args=(mapping, parts, names),
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=pool.max),
        num_cpus=resources.cpus_per_actor,
        num_gpus=resources.gpus_per_actor or None,
        memory=resources.memory_mb_per_actor << 20 or None,  # bytes
    )
    totals: Counter[str] = Counter()
    for done, row in enumerate(mapped.iter_rows(), start=1):
        totals.update(row["rows"][0])
        progress(f"{int(totals['rows'])} images  {done}/{len(parts)} files")
    return dict(totals)
