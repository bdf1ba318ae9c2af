"""ingest: the files of a source become an ImageSet; what can't become an image becomes a row of ``rejected``.

The listing is written first, in blocks of ``files_per_block`` files; then each block is read, decoded and written by
one Ray task as one Parquet file that carries the block's number. So nothing as large as the data set is ever in one
process or in the object store, a task that is run again writes the same file again, and the rows, in the order of
the listing, depend on nothing but the source and the config.
"""

import hashlib
import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import IMAGES_SCHEMA, REJECTED_SCHEMA, Figures, Job, filesystem, join, write_bytes
from components.config import IngestResources, IngestStageConfig
from components.image_files import BadImage
from components.images import Prepared, encode_png, image_id, prepare
from components.sources import Source, SourceObject, Targets, open_source
from components.targets import Kind, prepare_target

LISTING_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("depth", pa.string()),
        pa.field("mask", pa.string()),
        pa.field("split", pa.string()),
    ]
)
BLOCKS_PER_LISTING = 64  # row groups in a file of the listing: a task reads one of them and a short footer
MAX_TASKS = 4096  # beyond so many blocks a task takes several, one after the other
TASK_RETRIES = 3  # a file that kills its worker must fail the run, not be tried for ever (Ray Data's default)
REASONS_TOLD = 3
PROGRESS_S = 2.0


@dataclass(frozen=True)
class Work:
    """What every decoding task is given."""

    source: Source
    config: IngestStageConfig
    output: str


@dataclass
class Tally:
    """What became of the files of one block, or of all that were read so far."""

    images: int = 0
    rejected: int = 0
    train: int = 0
    val: int = 0
    bytes: int = 0  # of the images at the working size
    depth: int = 0  # images that have it
    mask: int = 0
    labels: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)  # the first few

    def add(self, other: "Tally") -> None:
        """Count what ``other`` counted too."""
        for name in ("images", "rejected", "train", "val", "bytes", "depth", "mask"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.labels |= other.labels
        self.reasons = (self.reasons + other.reasons)[:REASONS_TOLD]

    def figures(self) -> Figures:
        """The stage's figures."""
        return {
            "images": self.images,
            "rejected": self.rejected,
            "train": self.train,
            "val": self.val,
            "labels": len(self.labels),
            "bytes": self.bytes,
            "depth": self.depth,
            "mask": self.mask,
        }

    def to_json(self) -> str:
        """As text: the one column type that is the same for every block."""
        return json.dumps(asdict(self) | {"labels": sorted(self.labels)})

    @classmethod
    def from_json(cls, text: str) -> "Tally":
        """The reverse of :meth:`to_json`."""
        values = json.loads(text)
        return cls(**values | {"labels": set(values["labels"])})


def ingest(job: Job, *, config: IngestStageConfig, resources: IngestResources) -> Figures:
    """Write ``listing``, ``table`` (IMAGES_SCHEMA) and ``rejected`` (REJECTED_SCHEMA) under ``job.output``.

    Figures: images, rejected, train, val, labels (different ones), bytes (of the stored images), depth and mask (images
    that have them). Raises ValueError when the source can't be listed, holds no good image, or more files than
    ``config.limits.max_rejected`` are bad.
    """
    work = Work(open_source(config.data), config, job.output)
    num_files, num_blocks = write_listing(
        work.source.list(), join(job.output, "listing"), files_per_block=resources.files_per_block
    )
    job.progress(f"{num_files} files listed")
    total, told = Tally(), time.monotonic()
    with closing(_decode_all(work, num_blocks, resources)) as tallies:
        for tally in tallies:
            total.add(tally)
            _check_rejected(total, config.limits.max_rejected)
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                job.progress(f"{total.images + total.rejected}/{num_files} files, {total.rejected} rejected")
    if not total.images:
        raise ValueError(f"data.source {config.data.source!r}: no good image in it: {'; '.join(total.reasons)}")
    if not total.rejected:
        _write(join(job.output, "rejected"), 0, REJECTED_SCHEMA, [])  # the table is there, and empty
    job.progress(f"{total.images} images, {total.rejected} rejected")
    return total.figures()


def write_listing(objects: Iterator[SourceObject], uri: str, *, files_per_block: int) -> tuple[int, int]:
    """The listing as Parquet below ``uri``, one row group a block; returns the numbers of files and of blocks."""
    store, path = filesystem(uri)
    store.create_dir(path, recursive=True)
    num_files = num_blocks = 0
    while block := list(islice(objects, files_per_block)):
        with pq.ParquetWriter(_listing_file(path, num_blocks), LISTING_SCHEMA, filesystem=store) as writer:
            for _ in range(BLOCKS_PER_LISTING):
                writer.write_table(pa.Table.from_pylist([_listing_row(item) for item in block], LISTING_SCHEMA))
                num_files, num_blocks = num_files + len(block), num_blocks + 1
                block = [] if num_blocks % BLOCKS_PER_LISTING == 0 else list(islice(objects, files_per_block))
                if not block:
                    break
    return num_files, num_blocks


def read_listing(uri: str, block: int) -> list[SourceObject]:
    """The files of one block of the listing below ``uri``."""
    store, path = filesystem(uri)
    with store.open_input_file(_listing_file(path, block)) as stream:
        rows = pq.ParquetFile(stream).read_row_group(block % BLOCKS_PER_LISTING).to_pylist()
    return [SourceObject(row.pop("path"), row.pop("size"), row.pop("etag"), Targets(**row)) for row in rows]


def decode_block(block: int, work: Work) -> Tally:
    """Read, decode and write one block: ``table/part-BLOCK`` and, for bad files, ``rejected/part-BLOCK``."""
    images: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for item in read_listing(join(work.output, "listing"), block):
        try:
            images.append(_image_row(item, work))
        except BadImage as error:
            rejected.append({"uri": work.source.uri(item.path), "reason": error.reason})
    if images:
        _write(join(work.output, "table"), block, IMAGES_SCHEMA, images)
    if rejected:
        _write(join(work.output, "rejected"), block, REJECTED_SCHEMA, rejected)
    return _tally(images, rejected)


def choose_split(path: str, held_out: float) -> str:
    """``val`` for a share ``held_out`` of all paths, by hash: it stays when other files come and go."""
    number = int.from_bytes(hashlib.sha256(f"split/{path}".encode()).digest()[:8])
    return "val" if number < held_out * 2**64 else "train"


def _decode_all(work: Work, num_blocks: int, resources: IngestResources) -> Generator[Tally, None, None]:
    """The blocks' tallies as they are done, in any order; closing it ends what still runs."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        blocks = ray.data.range(num_blocks, override_num_blocks=min(num_blocks, MAX_TASKS))
        done = blocks.map(
            _decode_row,
            fn_args=(work,),
            compute=ray.data.TaskPoolStrategy(size=min(resources.tasks, num_blocks)),
            num_cpus=1,
            memory=resources.memory_mb_per_task << 20 or None,  # bytes
            ray_remote_args_fn=_remote_args,
        )
    for row in done.iter_rows():
        yield Tally.from_json(row["tally"])


def _remote_args() -> dict[str, Any]:
    return {"max_retries": TASK_RETRIES}


def _decode_row(row: dict[str, Any], work: Work) -> dict[str, Any]:
    return {"tally": decode_block(int(row["id"]), work).to_json()}


def _listing_row(item: SourceObject) -> dict[str, Any]:
    return {"path": item.path, "size": item.size, "etag": item.etag, **vars(item.targets)}


def _image_row(item: SourceObject, work: Work) -> dict[str, Any]:
    """A row of IMAGES_SCHEMA; raises BadImage."""
    limits, size, targets = work.config.limits, work.config.data.image_size, item.targets
    if item.size > limits.max_bytes:
        which = "" if targets.depth is None and targets.mask is None else ", in the largest of image, depth and mask"
        raise BadImage(f"too many bytes: {item.size} are more than {limits.max_bytes}{which}")
    data = _read(item.path, item.etag, work)
    prepared = prepare(data, size=size, max_pixels=limits.max_pixels)
    return {
        "image_id": image_id(item.path, data),
        "uri": work.source.uri(item.path),
        "label": targets.label,
        "width": prepared.width,
        "height": prepared.height,
        "split": targets.split or choose_split(item.path, work.config.data.held_out),
        "image": encode_png(prepared.image),
        "depth": _target(item, "depth", prepared, work),
        "mask": _target(item, "mask", prepared, work),
    }


def _target(item: SourceObject, kind: Kind, image: Prepared, work: Work) -> bytes | None:
    """The depth map or mask of ``item`` as PNG at the working size; raises BadImage that names the file."""
    path: str | None = getattr(item.targets, kind)
    if path is None:
        return None
    size, max_pixels = work.config.data.image_size, work.config.limits.max_pixels
    try:
        return prepare_target(_read(path, item.etag, work), kind, like=image, size=size, max_pixels=max_pixels)
    except BadImage as error:
        raise BadImage(f"{kind} {work.source.uri(path)}: {error.reason}") from error


def _read(path: str, etag: str, work: Work) -> bytes:
    """The file's content. Other errors than these two are the disk's or the network's and fail the stage."""
    try:
        data = work.source.read(path, etag)
    except (FileNotFoundError, PermissionError) as error:
        hint = "; it is not there, or its name is not UTF-8" if isinstance(error, FileNotFoundError) else ""
        raise BadImage(f"cannot be read: {error.strerror}{hint}") from error
    if len(data) > work.config.limits.max_bytes:  # it grew since it was listed, or its source lists no sizes
        raise BadImage(f"too many bytes: {len(data)} are more than {work.config.limits.max_bytes}")
    return data


def _tally(images: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]) -> Tally:
    val = sum(row["split"] == "val" for row in images)
    return Tally(
        images=len(images),
        rejected=len(rejected),
        train=len(images) - val,
        val=val,
        bytes=sum(len(row["image"]) for row in images),
        depth=sum(row["depth"] is not None for row in images),
        mask=sum(row["mask"] is not None for row in images),
        labels={row["label"] for row in images} - {None},
        reasons=[f"{row['uri']}: {row['reason']}" for row in rejected[:REASONS_TOLD]],
    )


def _check_rejected(total: Tally, limit: int) -> None:
    if total.rejected > limit:
        seen = total.images + total.rejected
        told = "; ".join(total.reasons)
        raise ValueError(
            f"{total.rejected} of the {seen} files read so far are bad, ingest.max_rejected allows {limit}: {told}"
        )


def _listing_file(path: str, block: int) -> str:
    return f"{path}/part-{block // BLOCKS_PER_LISTING:06d}.parquet"


def _write(uri: str, block: int, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """One file of a table, whole or not at all; PNG is packed already, so binary columns are stored as they are."""
    described = [field.name for field in schema if field.type != pa.binary()]
    packed = {name: "zstd" if name in described else "none" for name in schema.names}
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, sink, compression=packed, use_dictionary=described, write_statistics=described)
    write_bytes(join(uri, f"part-{block:06d}.parquet"), sink.getvalue().to_pybytes())
