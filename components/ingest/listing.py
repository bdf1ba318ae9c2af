"""What a source holds, as Parquet: the whole of it in an ImageSet, and the files to decode, in blocks.

Both are sorted by path, and so is every listing of a source, so that one is compared with another as they stream by.
"""

import hashlib
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from components.sources import Source, SourceObject, Targets
from components.store import filesystem, read_batches

BLOCK_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("depth", pa.string()),
        pa.field("mask", pa.string()),
        pa.field("split", pa.string()),
        pa.field("complexity", pa.float64()),
    ]
)
LISTING_SCHEMA = BLOCK_SCHEMA.append(pa.field("part", pa.int32(), nullable=False))  # number in its file's name
BLOCKS_PER_LISTING = 64  # row groups in a file of blocks: a task reads one of them and a short footer
ROWS = 8192  # of the listing in memory
DIGEST = 8  # bytes

State = Literal["reused", "added", "changed", "removed"]


@dataclass(frozen=True)
class Listed:
    """An object as it is now (removed: as it was), what became of it, and the part that has it from before."""

    item: SourceObject
    state: State
    part: int | None = None

    @property
    def is_new(self) -> bool:
        """Whether no earlier ImageSet has it as it is, so that it is decoded."""
        return self.state in ("added", "changed")


@dataclass
class Changes:
    """What a listing comes to beside an earlier one."""

    reused: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    bytes_to_decode: int = 0  # as far as the source knows
    listing: str = ""  # the source's digest of what was listed
    gone: dict[int, bytearray] = field(default_factory=dict)  # part -> digests of the URIs whose rows it loses

    @property
    def to_decode(self) -> int:
        """Files that no earlier ImageSet has as they are."""
        return self.added + self.changed

    def count(self, one: Listed, source: Source) -> None:
        """Take note of an object of ``source``."""
        setattr(self, one.state, getattr(self, one.state) + 1)
        if one.is_new:
            self.bytes_to_decode += one.item.size
        if one.part is not None and one.state != "reused":
            self.gone.setdefault(one.part, bytearray()).extend(digest(source.uri(one.item.path)))


def digest(uri: str) -> bytes:
    """A URI in few bytes: a source of millions may lose or change them all."""
    return hashlib.sha256(uri.encode()).digest()[:DIGEST]


def merge(old: Iterator[tuple[SourceObject, int]], new: Iterator[SourceObject]) -> Iterator[Listed]:
    """Every object of two listings sorted by path, once; ``old`` comes with the numbers of its parts.

    Where a listing isn't quite sorted (names that aren't UTF-8) an object may be removed and added instead of reused.
    """
    before, now = next(old, None), next(new, None)
    while before or now:
        if before is None or (now is not None and now.path < before[0].path):
            assert now is not None
            yield Listed(now, "added")
            now = next(new, None)
        elif now is None or before[0].path < now.path:
            yield Listed(before[0], "removed", before[1])
            before = next(old, None)
        else:
            yield Listed(now, "reused" if now == before[0] else "changed", before[1])
            before, now = next(old, None), next(new, None)


def read_again(listed: Iterator[Listed], source: Source, uris: Set[str]) -> Iterator[Listed]:
    """``listed``; what would be reused and is one of ``uris`` counts as changed."""
    for one in listed:
        again = uris and one.state == "reused" and source.uri(one.item.path) in uris
        yield replace(one, state="changed") if again else one


@dataclass(frozen=True)
class Numbering:
    """The parts of a run's new blocks."""

    first: int
    files_per_block: int

    def part(self, place: int) -> int:
        """The number of the part of the file that is decoded as the ``place``-th."""
        return self.first + place // self.files_per_block


def sort_out(
    listed: Iterator[Listed], source: Source, numbering: Numbering, uri: str, changes: Changes
) -> Iterator[SourceObject]:
    """The files to decode, as they come; meanwhile ``changes`` are counted and the listing is written below ``uri``."""
    store, path = filesystem(uri)
    store.create_dir(path, recursive=True)
    rows: list[dict[str, object]] = []
    with pq.ParquetWriter(f"{path}/part-0.parquet", LISTING_SCHEMA, filesystem=store, compression="zstd") as writer:
        for one in listed:
            place = changes.to_decode
            changes.count(one, source)
            if one.state != "removed":
                part = one.part if one.state == "reused" else numbering.part(place)
                rows.append(_row(one.item) | {"part": part})
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, LISTING_SCHEMA))
                rows = []
            if one.is_new:
                yield one.item
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, LISTING_SCHEMA))


def read_listing(uri: str) -> Iterator[tuple[SourceObject, int]]:
    """Every object of the listing below ``uri``, with the number of the part that it is in."""
    for batch in read_batches(uri, batch_rows=ROWS):
        for row in batch.to_pylist():
            part = row.pop("part")
            yield _object(row), part


def write_blocks(objects: Iterator[SourceObject], uri: str, *, files_per_block: int) -> tuple[int, int]:
    """Files to decode as Parquet below ``uri``, one row group a block; returns the numbers of files and of blocks."""
    store, path = filesystem(uri)
    store.create_dir(path, recursive=True)
    num_files = num_blocks = 0
    while block := list(islice(objects, files_per_block)):
        with pq.ParquetWriter(_block_file(path, num_blocks), BLOCK_SCHEMA, filesystem=store) as writer:
            for _ in range(BLOCKS_PER_LISTING):
                writer.write_table(pa.Table.from_pylist([_row(item) for item in block], BLOCK_SCHEMA))
                num_files, num_blocks = num_files + len(block), num_blocks + 1
                block = [] if num_blocks % BLOCKS_PER_LISTING == 0 else list(islice(objects, files_per_block))
                if not block:
                    break
    return num_files, num_blocks


def read_block(uri: str, block: int) -> list[SourceObject]:
    """The files of one block below ``uri``."""
    store, path = filesystem(uri)
    with store.open_input_file(_block_file(path, block)) as stream:
        rows = pq.ParquetFile(stream).read_row_group(block % BLOCKS_PER_LISTING).to_pylist()
    return [_object(row) for row in rows]


def _block_file(path: str, block: int) -> str:
    return f"{path}/part-{block // BLOCKS_PER_LISTING:06d}.parquet"


def _row(item: SourceObject) -> dict[str, object]:
    return {"path": item.path, "size": item.size, "etag": item.etag, **vars(item.targets)}


def _object(row: dict) -> SourceObject:
    return SourceObject(row.pop("path"), row.pop("size"), row.pop("etag"), Targets(**row))
