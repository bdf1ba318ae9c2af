"""From one Parquet table to another, file by file, with Ray Data.

Every file becomes the file of the same name in the target, whole and in the same row order, so nothing depends on how
many actors there are or which of them took which file; a worker that dies costs its file once more.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from components.artifacts import filesystem, local_folder
from components.config import InferenceResources

if TYPE_CHECKING:
    from model import AlitTokenizer
    from model.inference import Precision

Totals = dict[str, float]


class Worker(Protocol):
    """Built once an actor (models load once); called with the same rows of every source table."""

    def __call__(self, *tables: pa.Table) -> tuple[pa.Table, Totals]:
        """The target's rows, and sums to add up over all rows."""
        ...


@dataclass(frozen=True)
class Mapping:
    """What to map and onto what."""

    sources: Sequence[str]  # folders with the same file names and the same rows in each
    target: str
    build: Callable[[], Worker]
    resources: InferenceResources
    columns: Sequence[list[str] | None]  # read of each source


def part_names(uri: str) -> list[str]:
    """Names of the Parquet files in folder ``uri``, sorted."""
    store, path = filesystem(uri)
    infos = store.get_file_info(fs.FileSelector(path))
    return sorted(info.base_name for info in infos if info.base_name.endswith(".parquet"))


class _FileMapper:
    """The actor: maps whole files."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping, self._worker = mapping, mapping.build()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        totals: Counter[str] = Counter()
        store, folder = filesystem(self._mapping.target)
        path = f"{folder}/{row['name']}"
        writer: pq.ParquetWriter | None = None
        with store.open_output_stream(path) as sink:
            for tables in self._batches(row["name"]):
                mapped, sums = self._worker(*tables)
                writer = writer or pq.ParquetWriter(sink, mapped.schema, compression="zstd")
                writer.write_table(mapped)
                totals.update(sums)
            if writer is not None:
                writer.close()
        return {"rows": [dict(totals)]}

    def _batches(self, name: str) -> Any:
        """The same rows of each source, ``batch_size`` at a time."""
        streams = []
        for uri, columns in zip(self._mapping.sources, self._mapping.columns, strict=True):
            store, folder = filesystem(uri)
            file = pq.ParquetFile(store.open_input_file(f"{folder}/{name}"))
            streams.append(file.iter_batches(batch_size=self._mapping.resources.batch_size, columns=columns))
        for batches in zip(*streams, strict=True):
            yield tuple(pa.Table.from_batches([batch]) for batch in batches)


def load_tokenizer(uri: str, precision: "Precision" = "fp32") -> "AlitTokenizer":
    """The tokenizer of a Tokenizer artifact, on the GPU that Ray gave this actor, if it did."""
    import torch

    from model import AlitTokenizer

    with local_folder(uri) as folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AlitTokenizer.load(folder, device=device, precision=precision)


def map_table(mapping: Mapping, progress: Callable[[str], None]) -> Totals:
    """Map every file; returns the sums of the workers' totals. ``rows`` in them drives the progress line."""
    import ray.data

    store, folder = filesystem(mapping.target)
    store.create_dir(folder, recursive=True)
    names = part_names(mapping.sources[0])
    resources = mapping.resources
    files = ray.data.from_items([{"name": name} for name in names], override_num_blocks=len(names))
    mapped = files.map(
        _FileMapper,
        fn_constructor_args=(mapping,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.actors),
        num_cpus=resources.cpus_per_actor,
        num_gpus=resources.gpus_per_actor or None,
    )
    totals: Counter[str] = Counter()
    for done, row in enumerate(mapped.iter_rows(), start=1):
        totals.update(row["rows"][0])
        progress(f"{int(totals['rows'])} images  {done}/{len(names)} files")
    return dict(totals)
