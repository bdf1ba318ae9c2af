"""Parts of an ImageSet: a block of files read and decoded, or an earlier part without the rows that have gone.

Each is made by one Ray task as one Parquet file. So nothing as large as the data set is ever in one process or in the
object store, and the rows depend on nothing but the files, whichever task makes them and however often.
"""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import IMAGES_SCHEMA, REJECTED_SCHEMA
from components.config import IngestResources, IngestStageConfig
from components.image_files import BadImage
from components.images import Prepared, encode_png, image_id, prepare
from components.ingest.listing import DIGEST, digest, read_block
from components.ingest.tally import REASONS_TOLD, Tally
from components.parts import kept_name, link_files, part_name
from components.sources import Source, SourceObject
from components.store import filesystem, join, read_batches, write_bytes
from components.targets import Kind, prepare_target

MAX_TASKS = 4096
# Ray Data takes 0.2 s from the end of a task to the start of the next, so that a task is to have some seconds of work.
FILES_A_TASK, BYTES_A_TASK = 4096, 256 << 20  # at most, of small files and of large ones
TASKS_A_SLOT = 4  # at least, so that all slots end at about the same time and progress is seen
NO_ACCESS = "cannot be read for want of access: "  # in a reason: access may come, and the file's ETag stays
TASK_RETRIES = 3  # a file that kills its worker must fail the run, not be tried for ever (Ray Data's default)


@dataclass(frozen=True)
class Shrunk:
    """An earlier part, and the digests of the URIs whose rows it loses."""

    before: Tally
    gone: bytes


@dataclass(frozen=True)
class Work:
    """What every task is given."""

    source: Source
    config: IngestStageConfig
    output: str
    first: int = 0  # number of the first block's part
    base: str = ""  # URI of the ImageSet that ``shrunk`` are parts of
    shrunk: Sequence[Shrunk] = ()


def decode_block(block: int, work: Work) -> Tally:
    """Read, decode and write one block: a part of ``table`` and, for bad files, one of ``rejected``."""
    images: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for item in read_block(join(work.output, "blocks"), block):
        try:
            images.append(_image_row(item, work))
        except BadImage as error:
            rejected.append({"uri": work.source.uri(item.path), "reason": error.reason})
    number = work.first + block
    file, rejects = (part_name(number, rows) if rows else "" for rows in (images, rejected))
    write_rows(join(work.output, "table"), file, IMAGES_SCHEMA, images)
    write_rows(join(work.output, "rejected"), rejects, REJECTED_SCHEMA, rejected)
    return _tally(images, rejected, part=number, file=file, rejects=rejects)


def shrink(shrunk: Shrunk, work: Work) -> Tally:
    """Write an earlier part again without the rows that have gone; a file that loses none is linked."""
    before = shrunk.before
    gone = {shrunk.gone[at : at + DIGEST] for at in range(0, len(shrunk.gone), DIGEST)}
    images, file = _kept(before.file, "table", "image_id", gone, work)
    rejected, rejects = _kept(before.rejects, "rejected", "uri", gone, work)
    return _tally(images, rejected, part=before.part, file=file, rejects=rejects)


def _kept(name: str, table: str, key: str, gone: set[bytes], work: Work) -> tuple[list[dict[str, Any]], str]:
    """The rows of the file ``name`` that have not ``gone``, and the name of the file that has them now."""
    if not name:
        return [], ""
    source, target = join(work.base, table), join(work.output, table)
    store, folder = filesystem(source)
    before = pq.read_table(f"{folder}/{name}", filesystem=store)
    rows = [row for row in before.to_pylist() if digest(row["uri"]) not in gone]
    if len(rows) == len(before):
        link_files(source, target, [name])
        return rows, name
    name = kept_name(name, (row[key] for row in rows)) if rows else ""
    write_rows(target, name, before.schema, rows)
    return rows, name


def choose_split(path: str, held_out: float) -> str:
    """``val`` for a share ``held_out`` of all paths, by hash: it stays when other files come and go."""
    number = int.from_bytes(hashlib.sha256(f"split/{path}".encode()).digest()[:8])
    return "val" if number < held_out * 2**64 else "train"


def make_parts(
    work: Work, num_blocks: int, size_bytes: int, resources: IngestResources
) -> Generator[Tally, None, None]:
    """Tallies of shrunk parts and decoded blocks as they are done, in any order; closing it ends what still runs.

    ``size_bytes``: of the blocks' files, as far as the source knows.
    """
    import ray.data

    number = len(work.shrunk) + num_blocks
    if not number:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        numbers = [{"id": one} for one in range(number)]  # not ray.data.range, whose reading tasks would take turns
        done = ray.data.from_items(numbers, override_num_blocks=_num_tasks(number, size_bytes, resources)).map(
            _make_part,
            fn_args=(work,),
            compute=ray.data.TaskPoolStrategy(size=min(resources.tasks, number)),
            num_cpus=1,
            memory=resources.memory_mb_per_task << 20 or None,  # bytes
            max_retries=TASK_RETRIES,
        )
    for row in done.iter_rows():
        yield Tally.from_json(row["tally"])


def _num_tasks(number: int, size_bytes: int, resources: IngestResources) -> int:
    """How many tasks share ``number`` parts; one that has several makes them one after the other."""
    enough = max(number * resources.files_per_block // FILES_A_TASK, size_bytes // BYTES_A_TASK)
    return min(number, max(enough, TASKS_A_SLOT * resources.tasks), MAX_TASKS)


def _make_part(row: dict[str, Any], work: Work) -> dict[str, Any]:
    block = int(row["id"]) - len(work.shrunk)
    tally = decode_block(block, work) if block >= 0 else shrink(work.shrunk[int(row["id"])], work)
    return {"tally": tally.to_json()}


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
        "complexity": targets.complexity,
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
    except FileNotFoundError as error:
        raise BadImage(f"cannot be read: {error.strerror}; it is not there, or its name is not UTF-8") from error
    except PermissionError as error:
        raise BadImage(f"{NO_ACCESS}{error.strerror}") from error
    if len(data) > work.config.limits.max_bytes:  # it grew since it was listed, or its source lists no sizes
        raise BadImage(f"too many bytes: {len(data)} are more than {work.config.limits.max_bytes}")
    return data


def unreadable(uri: str) -> Iterator[str]:
    """URIs of the files that the ImageSet at ``uri`` lacks for want of access, to them or to their targets."""
    for batch in read_batches(join(uri, "rejected")):
        yield from (row["uri"] for row in batch.to_pylist() if NO_ACCESS in row["reason"])


def _tally(images: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]], **part: Any) -> Tally:
    val = sum(row["split"] == "val" for row in images)
    return Tally(
        **part,
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


def write_rows(uri: str, name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """The file ``name`` of folder ``uri``, whole or not at all; nothing where the name is empty.

    PNG is packed already, so binary columns are stored as they are.
    """
    if not name:
        return
    described = [field.name for field in schema if field.type != pa.binary()]
    packed = {column: "zstd" if column in described else "none" for column in schema.names}
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, sink, compression=packed, use_dictionary=described, write_statistics=described)
    write_bytes(join(uri, name), sink.getvalue().to_pybytes())
